"""Models that need something of their own: what qz writes is what the library writes, or runs as the original does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from converted import quantized
from reference import differing_files, transformers_model

LANGUAGE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def saved(model: Any, folder: Path) -> Path:
    """The model as bfloat16 in a folder."""
    model.bfloat16().save_pretrained(folder)
    return folder


def same_as_the_library(model_class: Any, source: Path, output: Path, method: str) -> Any:
    """Quantize by qz and by the library; every file is the same. Returns the library's model."""
    theirs = transformers_model(model_class, source, method)
    reference = output.with_name(output.name + "-reference")
    theirs.save_pretrained(reference)
    summary = quantized(source, output, method)
    assert differing_files(reference, output) == []
    assert summary.footprint_after == theirs.get_memory_footprint()
    return theirs


def mobilebert() -> Any:
    sizes = {"embedding_size": 64, "intra_bottleneck_size": 64, "true_hidden_size": 64, "intermediate_size": 128}
    return transformers.MobileBertForMaskedLM(
        transformers.MobileBertConfig(
            hidden_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=100, **sizes
        )
    )


def gemma3n() -> Any:
    return transformers.Gemma3nForCausalLM(
        transformers.Gemma3nTextConfig(
            **LANGUAGE,
            head_dim=16,
            vocab_size_per_layer_input=128,
            hidden_size_per_layer_input=64,
            layer_types=["sliding_attention", "full_attention"],
            num_kv_shared_layers=0,
            laurel_rank=64,
            sliding_window=16,
            activation_sparsity_pattern=[0.0, 0.0],
            max_position_embeddings=64,
        )
    )


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("make", [mobilebert, gemma3n])
def test_a_tied_head_does_not_make_another_layer_the_last_one(make: Any, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    source = saved(model, tmp_path / "source")
    same_as_the_library(type(model), source, tmp_path / "output", method)
