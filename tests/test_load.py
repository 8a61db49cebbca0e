"""qz.load: what qz wrote as objects of the libraries, also where these refuse it; and PEFT on top of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import FluxPipeline, FluxTransformer2DModel

import pipelines
import qz
import zoo
from conftest import Qz
from converted import dequantized, quantized
from forward import diffusers_output, transformers_output
from qz import MissingInput, UsageError
from reference import diffusers_model

METHODS = ("nf4", "fp4", "nf4-double", "int8")


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one.float() - two.float()).norm() / two.float().norm())


def some(*here: str) -> list[Any]:
    """The methods ``here``; make soak has the others."""
    return [pytest.param(method, marks=[] if method in here else pytest.mark.soak) for method in METHODS]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a small FLUX transformer, a method's output, and that dequantized, by the method."""
    root = tmp_path_factory.mktemp("flux")
    zoo.build("flux").save_pretrained(root / "source")

    @cache
    def made(method: str) -> Path:
        quantized(root / "source", root / method, method, max_shard_bytes=100_000)
        dequantized(root / method, root / f"{method}-back")
        return root

    return made


@pytest.mark.parametrize("method", some("nf4-double", "int8"))
def test_a_quantized_diffusers_model_runs_without_a_gpu(method: str, flux: Callable[[str], Path]) -> None:
    made = flux(method)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="No GPU found"):
            FluxTransformer2DModel.from_pretrained(made / method)
    assert len(list((made / method).glob("*.safetensors"))) > 1
    model = qz.load(made / method, device="cpu")
    theirs = diffusers_model(FluxTransformer2DModel, made / method, None)
    back = FluxTransformer2DModel.from_pretrained(made / f"{method}-back", torch_dtype=torch.bfloat16)
    with torch.no_grad():
        ours, same, plain = (diffusers_output(each) for each in (model, theirs, back))
    assert torch.equal(ours, same)
    assert relative(ours, plain) < (0.05 if method == "int8" else 0.02)
    told = json.loads((made / method / "qz.json").read_text())["about"]
    assert model.get_memory_footprint() == told["memory_footprint"]["after"]
    assert not model.training


@pytest.mark.parametrize("method", METHODS)
def test_a_transformers_model_is_what_from_pretrained_gives(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    quantized(tiny_llama, tmp_path / "output", method)
    ours = qz.load(tmp_path / "output", device="cpu")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "output")
    assert type(ours) is type(theirs)
    with torch.no_grad():
        assert torch.equal(transformers_output(ours), transformers_output(theirs))


def test_a_pipeline_draws_without_a_gpu(tmp_path: Path, forked_qz: Qz) -> None:
    pipelines.flux(tmp_path / "source")
    components = ("--component", "text_encoder_2=int8", "--component", "vae=none")
    made = forked_qz("quantize", tmp_path / "source", "--nf4", *components, "-o", tmp_path / "output")
    assert made.returncode == 0, made.stderr
    pipeline = qz.load(tmp_path / "output", device="cpu")
    assert type(pipeline) is FluxPipeline
    assert pipeline.transformer.is_loaded_in_4bit
    assert pipeline.text_encoder_2.is_loaded_in_8bit
    assert pipeline.vae.dtype == torch.bfloat16
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        image = pipeline(
            pipelines.PROMPT, height=16, width=16, num_inference_steps=1, max_sequence_length=16, output_type="np"
        )
    assert image.images.shape == (1, 16, 16, 3)
    alone = qz.load(tmp_path / "output", subfolder="transformer", device="cpu")
    assert type(alone) is FluxTransformer2DModel


def test_an_unquantized_model_loads_too(flux: Callable[[str], Path], tiny_llama: Path) -> None:
    assert qz.load(flux("int8") / "int8-back", device="cpu").dtype == torch.bfloat16
    assert qz.load(tiny_llama, device="cpu").dtype == torch.bfloat16


def test_what_is_not_there_is_said(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(MissingInput, match="hf download owner/model"):
        qz.load("owner/model")
    with pytest.raises(UsageError, match="cannot be used"):
        qz.load(tiny_llama, device="cuda:77")


def test_layers_that_the_cpu_kernels_do_not_take_run_all_the_same(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    quantized(tmp_path / "source", tmp_path / "nf4", "nf4")
    dequantized(tmp_path / "nf4", tmp_path / "back")
    model = qz.load(tmp_path / "nf4", device="cpu")
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        assert relative(transformers_output(model), transformers_output(back)) < 0.01


def trained(model: Any, steps: int = 6) -> list[float]:
    """The losses of a few steps of an adapter that learns two sentences."""
    tokens = torch.arange(16).reshape(2, 8) + 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", some("nf4", "int8"))
def test_an_adapter_trains_on_what_qz_wrote_and_merges(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    quantized(tiny_llama, tmp_path / "output", method)
    base = qz.load(tmp_path / "output", device="cpu")
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    losses = trained(model)
    assert losses[-1] < losses[0] - 0.3
    model.save_pretrained(str(tmp_path / "adapter"))

    def again() -> Any:  # a forward of its own for each: it repacks weights on some CPUs, which merging does not know
        return PeftModel.from_pretrained(qz.load(tmp_path / "output", device="cpu"), tmp_path / "adapter").eval()

    with torch.no_grad():
        apart, merged = transformers_output(again()), transformers_output(again().merge_and_unload())
    assert relative(merged, apart) < 0.35  # it is quantized once more
