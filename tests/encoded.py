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
