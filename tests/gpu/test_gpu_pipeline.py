"""A small FluxPipeline of what qz wrote: the library's image, offload, device map, compile and dequantize."""

from __future__ import annotations

import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converted import quantized
from reference import bitsandbytes_arguments
from zoo import build

METHODS = ("nf4", "nf4-double", "int8")
PROMPT = "a small red house"


def tokenizers() -> tuple[Any, Any]:
    """Tokenizers of single letters, in the classes that the pipeline expects, within the zoo's vocabulary of 100."""
    from transformers import CLIPTokenizer, T5Tokenizer

    letters = list(string.ascii_lowercase)
    clip = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    return (
        CLIPTokenizer(vocab={token: number for number, token in enumerate(clip)}, merges=[], model_max_length=77),
        T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=32),
    )


def save_parts(folder: Path) -> None:
    """The parts of a pipeline, unquantized, each in its folder."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    build("flux").save_pretrained(folder / "transformer")
    build("clip").to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    build("t5-encoder").save_pretrained(folder / "text_encoder_2")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.4,
    ).to(torch.bfloat16).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    for tokenizer, name in zip(tokenizers(), ("tokenizer", "tokenizer_2"), strict=True):
        tokenizer.save_pretrained(folder / name)


def pipeline(parts: Path, transformer: Any, text_encoder_2: Any) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextModel

    clip, t5 = tokenizers()
    made = FluxPipeline(
        transformer=transformer,
        text_encoder_2=text_encoder_2,
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=torch.bfloat16),
        vae=AutoencoderKL.from_pretrained(parts / "vae", torch_dtype=torch.bfloat16),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(parts / "scheduler"),
        tokenizer=clip,
        tokenizer_2=t5,
    )
    made.set_progress_bar_config(disable=True)
    return made


def image(made: Any, device: str = "cuda") -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = made(
        PROMPT,
        height=32,
        width=32,
        num_inference_steps=4,
        max_sequence_length=32,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
    ).images[0]
    assert found.shape == (32, 32, 3)
    assert np.isfinite(found).all()
    assert found.std() > 0.01
    return found


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    save_parts(folder)
    return folder


def library_parts(parts: Path, method: str) -> tuple[Any, Any]:
    from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
    from transformers import BitsAndBytesConfig as TransformersConfig
    from transformers import T5EncoderModel

    options = bitsandbytes_arguments(method)
    return (
        FluxTransformer2DModel.from_pretrained(
            parts / "transformer", quantization_config=BitsAndBytesConfig(**options), torch_dtype=torch.bfloat16
        ),
        T5EncoderModel.from_pretrained(
            parts / "text_encoder_2",
            quantization_config=TransformersConfig(**options),
            dtype=torch.bfloat16,
            device_map={"": 0},
        ),
    )


def our_parts(parts: Path, folder: Path, method: str, device: str = "cuda") -> tuple[Any, Any]:
    from diffusers import FluxTransformer2DModel
    from transformers import T5EncoderModel

    models = []
    for name in ("transformer", "text_encoder_2"):
        output = folder / name
        summary = quantized(parts / name, output, method, device=device)
        if name == "transformer":
            model = FluxTransformer2DModel.from_pretrained(output, torch_dtype=torch.bfloat16)
        else:
            model = T5EncoderModel.from_pretrained(output, dtype=torch.bfloat16, device_map={"": 0})
        assert model.get_memory_footprint() == summary.footprint_after
        models.append(model)
    return models[0], models[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_image_is_the_one_from_the_librarys_parts(parts: Path, method: str, tmp_path: Path) -> None:
    theirs = image(pipeline(parts, *library_parts(parts, method)).to("cuda"))
    ours = image(pipeline(parts, *our_parts(parts, tmp_path, method)).to("cuda"))
    assert np.array_equal(ours, theirs)
    from_cpu = image(pipeline(parts, *our_parts(parts, tmp_path / "cpu", method, "cpu")).to("cuda"))
    print(f"\nimage, {method}: equal; from parts written on the CPU it differs by {np.abs(from_cpu - ours).max():.4f}")


@pytest.mark.parametrize("method", METHODS)
def test_a_pipeline_quantized_whole_runs_offloaded_and_by_device_map(parts: Path, method: str, tmp_path: Path) -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import T5EncoderModel

    expected = image(pipeline(parts, *our_parts(parts, tmp_path / "parts", method)).to("cuda"))
    offloaded = pipeline(parts, *our_parts(parts, tmp_path / "again", method))
    offloaded.enable_model_cpu_offload()
    assert np.array_equal(image(offloaded), expected)

    whole = tmp_path / "whole"
    pipeline(
        parts,
        FluxTransformer2DModel.from_pretrained(parts / "transformer", torch_dtype=torch.bfloat16),
        T5EncoderModel.from_pretrained(parts / "text_encoder_2", dtype=torch.bfloat16),
    ).save_pretrained(whole)
    flag, *double = ("--int8",) if method == "int8" else ("--nf4", *(["--double-quant"] if "double" in method else []))
    command = [sys.executable, "-m", "qz", "quantize", whole, flag, *double, "--device", "cuda", "-o", tmp_path / "qz"]
    subprocess.run([*map(str, command), "--components", "transformer,text_encoder_2"], check=True)
    for device_map in ("cuda", "balanced"):
        placed = FluxPipeline.from_pretrained(tmp_path / "qz", torch_dtype=torch.bfloat16, device_map=device_map)
        placed.set_progress_bar_config(disable=True)
        assert np.array_equal(image(placed), expected), device_map


@pytest.mark.parametrize("method", ["nf4", "nf4-double"])
def test_it_compiles_to_one_graph(parts: Path, method: str, tmp_path: Path) -> None:
    made = pipeline(parts, *our_parts(parts, tmp_path, method)).to("cuda")

    def timed() -> float:
        begun = time.perf_counter()
        image(made)
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    eager_image = image(made)
    eager = min(timed() for _ in range(3))
    made.transformer.compile(fullgraph=True)
    first, compiled_image = timed(), image(made)
    compiled = min(timed() for _ in range(3))
    print(f"\n4 steps, {method}: eager {eager:.3f} s, compiled {compiled:.3f} s (first {first:.1f} s)")
    assert np.abs(compiled_image - eager_image).max() < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_both_libraries_dequantize_it(parts: Path, method: str, tmp_path: Path) -> None:
    for model, theirs in zip(our_parts(parts, tmp_path, method), library_parts(parts, method), strict=True):
        mine, reference = model.dequantize(), theirs.dequantize()
        assert not any("4bit" in type(module).__name__ or "8bit" in type(module).__name__ for module in mine.modules())
        for one, two in zip(mine.state_dict().values(), reference.state_dict().values(), strict=True):
            assert torch.equal(one, two)
