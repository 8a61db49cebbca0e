"""What the libraries themselves write: the oracle of the parity tests. Not a line of qz is used here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

METHODS = ("nf4", "fp4", "nf4-double", "int8")


def bitsandbytes_arguments(method: str) -> dict[str, Any]:
    """Arguments of ``BitsAndBytesConfig`` for a method of the grid."""
    if method == "int8":
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": method.removesuffix("-double"),
        "bnb_4bit_use_double_quant": method.endswith("-double"),
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }


def transformers_model(
    model_class: Any, source: Path, method: str, dtype: str = "auto", skips: list[str] | None = None
) -> Any:
    """``from_pretrained`` with a quantization config, on CPU."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**bitsandbytes_arguments(method), llm_int8_skip_modules=skips)
    return model_class.from_pretrained(source, quantization_config=config, dtype=dtype, device_map="cpu")


def diffusers_model(
    model_class: Any, source: Path, method: str | None, dtype: torch.dtype | None = None, skips: list[str] | None = None
) -> Any:
    """What diffusers' ``from_pretrained`` does, by its own functions, without its check for a GPU.

    ``method`` None loads a quantized folder.
    """
    from accelerate import init_empty_weights
    from diffusers import BitsAndBytesConfig
    from diffusers.models.model_loading_utils import load_model_dict_into_meta
    from diffusers.quantizers import DiffusersAutoQuantizer

    config = model_class.load_config(source)
    state: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        state |= load_file(file)
    if method is None:
        quantizer = DiffusersAutoQuantizer.from_config(config["quantization_config"], pre_quantized=True)
        dtype = dtype or next(t.dtype for t in state.values() if t.dtype in (torch.bfloat16, torch.float16))
    else:
        wanted = BitsAndBytesConfig(**bitsandbytes_arguments(method), llm_int8_skip_modules=skips)
        quantizer = DiffusersAutoQuantizer.from_config(wanted, pre_quantized=False)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default)
    try:
        with init_empty_weights():
            model = model_class.from_config(config)
    finally:
        torch.set_default_dtype(default)
    fp32 = model_class._keep_in_fp32_modules or []
    fp32 = [fp32] if isinstance(fp32, str) else fp32
    quantizer.preprocess_model(model=model, device_map=None, keep_in_fp32_modules=fp32)
    known = model.state_dict().keys()
    unexpected = [name for name in state if name not in known]
    load_model_dict_into_meta(
        model,
        state,
        dtype=dtype,
        hf_quantizer=quantizer,
        keep_in_fp32_modules=fp32,
        device_map={"": "cpu"},
        unexpected_keys=unexpected,
    )
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    model.register_to_config(_pre_quantization_dtype=dtype, quantization_config=quantizer.quantization_config)
    return model.eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's weight files by name."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = load_file(file)
        assert not tensors.keys() & loaded.keys(), "a tensor is stored twice"
        tensors |= loaded
    return tensors


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Names of tensors that are missing on a side, or differ in dtype, shape or a bit."""
    mine, theirs = tensors_of(one), tensors_of(other)

    def same(name: str) -> bool:
        if name not in mine or name not in theirs:
            return False
        a, b = mine[name], theirs[name]
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)

    return sorted(name for name in mine | theirs if not same(name))


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, NaN payloads and all."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def differing_files(reference: Path, output: Path) -> list[str]:
    """Names of files that are missing on a side or differ in a byte, but for the record that only qz writes."""
    names = {path.name for path in reference.iterdir()} | {path.name for path in output.iterdir()} - {"qz.json"}

    def same(name: str) -> bool:
        pair = (reference / name, output / name)
        return all(path.is_file() for path in pair) and pair[0].read_bytes() == pair[1].read_bytes()

    return sorted(name for name in names if not same(name))


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def dequantized_by_bitsandbytes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every quantized weight among ``tensors`` as bitsandbytes' own functions give it back, by name.

    4-bit weights go through as one row: on CPUs with AVX-512, bitsandbytes 0.50.2 reads the scales of the wrong block
    where a row is no multiple of the block size. Of FP4's second zero see ``with_one_zero``.
    """
    import bitsandbytes.functional as bnb

    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        if last == "SCB":
            found[f"{owner}.weight"] = bnb.int8_vectorwise_dequant(tensors[f"{owner}.weight"], tensor)
        elif last.startswith("bitsandbytes__"):
            weight = owner.removesuffix(".quant_state")
            parts = {key: value for key, value in tensors.items() if key.startswith(f"{weight}.")}
            state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
            shape, state.shape = state.shape, torch.Size([state.shape.numel()])
            values = bnb.dequantize_4bit(tensors[weight].view(torch.uint8), state)
            if state.quant_type == "fp4":
                values = with_one_zero(values.reshape(-1), tensors[weight].view(torch.uint8))
            found[weight] = values.reshape(shape)
    return found


def with_one_zero(values: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Flat FP4 values with +0.0 for code 8, as the quant map has it.

    bitsandbytes 0.50.2 gives -0.0 in its portable code (and on GPUs) and +0.0 in its AVX-512 and torch code.
    """
    octets = packed.reshape(-1)
    is_second_zero = torch.stack([octets >> 4, octets & 15], 1).reshape(-1)[: values.numel()] == 8
    assert not values[is_second_zero].any()
    return torch.where(is_second_zero, values.abs(), values)
