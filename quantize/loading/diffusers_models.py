"""Models of diffusers by the library's own pieces: its ``from_pretrained`` refuses quantized ones without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qz import MalformedInput
from qz.formats.checkpoint.quantization.quantized import QuantizedWeight
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.diffusers.classes import model_class_of
from qz.quantize.libraries.diffusers.internals import empty_model, float32_modules, load_into_meta, quantizer_of
from qz.quantize.planning.dequantization import dtype_before


def load_diffusers_model(
    checkpoint: Checkpoint, root: Path, weights: Mapping[str, QuantizedWeight], device: str
) -> Any:
    """The model on ``device``: built empty, given quantized layers by the library's quantizer, filled file by file."""
    from safetensors.torch import load_file

    model_class = model_class_of(checkpoint)
    dtype = getattr(torch, dtype_before(checkpoint, weights))
    if not weights:
        model = model_class.from_pretrained(root, variant=checkpoint.variant, torch_dtype=dtype)
        return model.to(device).eval()
    quantizer = quantizer_of(checkpoint.config["quantization_config"])
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = empty_model(model_class, {k: v for k, v in checkpoint.config.items() if k != "quantization_config"})
    finally:
        torch.set_default_dtype(default)
    fp32 = float32_modules(model)
    quantizer.preprocess_model(model=model, device_map=None, keep_in_fp32_modules=fp32)
    for file in checkpoint.files:  # a weight and its companions are in one file
        load_into_meta(model, load_file(root / file), dtype, quantizer, fp32, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise MalformedInput(f"{root} lacks {', '.join(left[:3])} of {model_class.__name__}. Quantize it again.")
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    model.register_to_config(_pre_quantization_dtype=dtype, quantization_config=quantizer.quantization_config)
    return model.eval()
