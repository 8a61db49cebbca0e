"""What ``qz quantize PIPELINE`` wrote is loaded as it is, and draws what parts draw that the libraries quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipelines
from commands import run
from qz.cli.commands.quantize import quantize
from reference import bitsandbytes_arguments

QUANTIZED = {
    "flux": ("transformer", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder_3"),
    "sdxl": ("unet",),
}
DTYPES = {"flux": torch.bfloat16, "sd3": torch.float16, "sdxl": torch.float32}


def drawn(folder: Path, name: str, **parts: Any) -> np.ndarray[Any, Any]:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=DTYPES[name], **parts).to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    more = {} if name == "sdxl" else {"max_sequence_length": 32}
    picture: np.ndarray[Any, Any] = pipeline(
        pipelines.PROMPT,
        height=32,
        width=32,
        num_inference_steps=4,
        output_type="np",
        generator=torch.Generator("cpu").manual_seed(7),
        **more,
    ).images[0]
    assert np.isfinite(picture).all()
    return picture


def library_part(source: Path, part: str, method: str, dtype: torch.dtype) -> Any:
    """The part as its library quantizes it while loading."""
    import diffusers
    import transformers

    options = bitsandbytes_arguments(method)
    if part.startswith("text_encoder"):
        config = transformers.BitsAndBytesConfig(**options)
        return transformers.T5EncoderModel.from_pretrained(
            source / part, quantization_config=config, dtype=dtype, device_map={"": 0}
        )
    model_class = getattr(diffusers, diffusers.UNet2DConditionModel.load_config(source / part)["_class_name"])
    return model_class.from_pretrained(
        source / part, quantization_config=diffusers.BitsAndBytesConfig(**options), torch_dtype=dtype
    )


@pytest.mark.parametrize("method", ["nf4", "nf4-double", "int8"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_the_whole_output_loads_as_it_is_and_draws_the_same(name: str, method: str, tmp_path: Path) -> None:
    source = getattr(pipelines, name)(tmp_path / "source")
    how = {"int8": True} if method == "int8" else {"double_quant": method.endswith("double")}
    report = run(quantize, source, output=tmp_path / "out", device="cuda", **how)
    assert {row["name"] for row in report["components"] if row["converted"]} == set(QUANTIZED[name])
    theirs = {part: library_part(source, part, method, DTYPES[name]) for part in QUANTIZED[name]}
    assert np.array_equal(drawn(tmp_path / "out", name), drawn(source, name, **theirs))
