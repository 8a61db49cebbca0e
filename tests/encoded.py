"""Checkpoints in the forms of other tools, made from a folder of plain weights by those tools' own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]


def linears(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The matrices inside of a Llama's layers."""
    return [name for name, tensor in state.items() if name.endswith("proj.weight") and tensor.ndim == 2]


def rewritten(
    source: Path, target: Path, change: Callable[[State], Any], quantization: Mapping[str, Any] | None = None
) -> Path:
    """A copy of a model folder with its tensors changed, and what its config then says of its quantization."""
    shutil.copytree(source, target)
    file = next(target.glob("*.safetensors"))
    state = load_file(file)
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, {"format": "pt"})
    if quantization is not None:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "quantization_config": dict(quantization)}))
    return target


def fp8_blocks(state: State, block: tuple[int, int], scale_fmt: str = "float") -> None:
    """``weight_scale_inv``, as transformers quantizes."""
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=config))
    for name in linears(state):
        state |= quantize.convert({name: state[name]})


def fp8_scaled(
    state: State, suffix: str, per_row: bool, dtype: torch.dtype = torch.float8_e4m3fn, shape: tuple[int, ...] = ()
) -> None:
    """A scale for each weight, or for each of its rows, under the name ``<module>.<suffix>``."""
    for name in linears(state):
        weight = state[name].float()
        largest = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().amax()
        scale = largest / torch.finfo(dtype).max
        state[name] = (weight / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
        state[f"{name.removesuffix('.weight')}.{suffix}"] = scale if per_row else scale.reshape(shape)


def compressed(state: State, form: str, weights: Mapping[str, Any]) -> State:
    """``weight_packed`` or codes with their scales by compressed-tensors; what it decompresses them to is returned."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor: Any = BaseCompressor.get_value_from_registry(form)
    expected: State = {name: tensor for name, tensor in state.items() if name not in linears(state)}
    for name in linears(state):
        weight = state.pop(name)
        low, high = _extremes(weight, weights)
        overall = None
        if weights["strategy"] == "tensor_group":
            overall = generate_gparam(low.amin().reshape(1), high.amax().reshape(1))
        scale, zero = calculate_qparams(low, high, arguments, overall)
        own = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        if overall is not None:
            own["weight_global_scale"] = overall
        packed = compressor.compress(own, scheme)
        expected[name] = compressor.decompress(packed, scheme)["weight"]
        module = name.removesuffix("weight")
        state |= {module + part: tensor for part, tensor in packed.items()}
    return expected


def _extremes(weight: torch.Tensor, weights: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    strategy, group = weights["strategy"], weights.get("group_size")
    if strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if strategy == "block":
        rows, columns = weights["block_structure"]
        padding = (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
        padded = torch.nn.functional.pad(weight, padding)
        blocks = padded.reshape(padded.shape[0] // rows, rows, -1, columns)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.reshape(weight.shape[0], -1, group or weight.shape[1])
    return groups.amin(-1), groups.amax(-1)


def said_by_compressed_tensors(form: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": dict(weights)}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def words(codes: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes packed along the last dimension into int32, the first in the lowest bits, or in the places of ``order``."""
    if order is not None:
        codes = codes.reshape(*codes.shape[:-1], -1, len(order))[..., list(order)].flatten(-2)
    stream = codes.long().unsqueeze(-1) >> torch.arange(bits) & 1
    thirty_two = stream.reshape(*codes.shape[:-1], -1, 32)
    return (thirty_two << torch.arange(32)).sum(-1).to(torch.uint32).view(torch.int32)


def gptq(state: State, bits: int, group: int, version: str = "gptq", order: bool = False) -> State:
    """Random codes, scales and zero points as GPTQ stores them; what they stand for is returned.

    By the format's description: rows of ``qweight`` hold 32 / bits codes of a column, ``qzeros`` those of neighbouring
    columns, less one in the original format; the value is ``scales[g_idx] * (qweight - qzeros[g_idx])`` in float16.
    """
    expected = {name: tensor for name, tensor in state.items() if name not in linears(state)}
    for name in linears(state):
        out, inner = state.pop(name).shape
        groups = inner // group
        codes = torch.randint(0, 1 << bits, (inner, out))
        zeros = torch.randint(0, 1 << bits, (groups, out))
        scales = (torch.rand(groups, out) / 50).half()
        of = torch.randperm(inner) // group if order else torch.arange(inner) // group
        stored = zeros - 1 & (1 << bits) - 1 if version == "gptq" else zeros
        module = name.removesuffix("weight")
        state |= {
            f"{module}qweight": words(codes.T, bits).T,
            f"{module}qzeros": words(stored, bits),
            f"{module}scales": scales,
            f"{module}g_idx": of.int(),
        }
        expected[name] = (scales[of] * (codes - zeros[of]).half()).T.contiguous()
    return expected


def awq(state: State, group: int) -> State:
    """The same for AWQ: rows of ``qweight`` and ``qzeros`` hold eight columns in the order 0 2 4 6 1 3 5 7."""
    expected = {name: tensor for name, tensor in state.items() if name not in linears(state)}
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    for name in linears(state):
        out, inner = state.pop(name).shape
        codes, zeros = torch.randint(0, 16, (inner, out)), torch.randint(0, 16, (inner // group, out))
        scales = (torch.rand(inner // group, out) / 50).half()
        of = torch.arange(inner) // group
        module = name.removesuffix("weight")
        state |= {
            f"{module}qweight": words(codes, 4, order),
            f"{module}qzeros": words(zeros, 4, order),
            f"{module}scales": scales,
        }
        expected[name] = ((codes - zeros[of]).half() * scales[of]).T.contiguous()
    return expected
