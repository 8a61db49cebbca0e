"""Writes ``lycoris_values.safetensors``: LoRAs of every kind of LyCORIS, and the weights that they make of two layers.

Run by hand, with ``pip install lycoris-lora einops``; the file is what ``lycoris-lora`` 4.1.3 computes. Names say the
case, and then ``lycoris_….PART`` of the LoRA, or the weight of a layer with all of it (``whole``) or half (``half``).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FILE = Path(__file__).with_suffix(".safetensors")
LAYERS = {"time_embedding.linear_1": (32, 8), "conv_in": (8, 4, 3, 3)}
"""Of the SDXL pipeline of the tests."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("locon", {}),
    "lora tucker": ("locon", {"use_tucker": True}),
    "lora root": ("locon", {"rs_lora": True}),
    "lora dora": ("locon", {"weight_decompose": True}),
    "lora dora of inputs": ("locon", {"weight_decompose": True, "wd_on_out": False}),
    "loha": ("loha", {}),
    "loha tucker": ("loha", {"use_tucker": True}),
    "loha dora": ("loha", {"weight_decompose": True}),
    "loha dora of inputs": ("loha", {"weight_decompose": True, "wd_on_out": False}),
    "lokr": ("lokr", {"factor": 2}),
    "lokr full": ("lokr", {"factor": 2, "full_matrix": True}),
    "lokr both": ("lokr", {"factor": 4, "decompose_both": True, "lora_dim": 1}),
    "lokr tucker": ("lokr", {"factor": 2, "use_tucker": True, "lora_dim": 1}),
    "lokr unbalanced": ("lokr", {"factor": 2, "unbalanced_factorization": True, "lora_dim": 1}),
    "lokr dora": ("lokr", {"factor": 2, "weight_decompose": True}),
    "lokr dora of inputs": ("lokr", {"factor": 2, "weight_decompose": True, "wd_on_out": False}),
}


def layer(shape: tuple[int, ...]) -> torch.Tensor:
    """The weight of a layer before, always the same."""
    torch.manual_seed(7)
    return torch.randn(shape)


def weight_of(module: Any, multiplier: float) -> torch.Tensor:
    """The weight that the module's forward computes with, read from it column by column."""
    module.multiplier = multiplier
    base = module.org_module[0]
    inputs = torch.eye(base.weight[0].numel())
    if base.weight.ndim == 2:
        found: torch.Tensor = (module(inputs) - base.bias).T
        return found.contiguous()
    patches = inputs.reshape(-1, *base.weight.shape[1:])  # a kernel of the patch's size gives one value
    found = (module(patches) - base.bias[:, None, None]).squeeze().T
    return found.reshape(base.weight.shape).contiguous()


def main() -> None:
    modules = import_module("lycoris.modules")
    kinds = {"locon": modules.LoConModule, "loha": modules.LohaModule, "lokr": modules.LokrModule}
    found: dict[str, torch.Tensor] = {}
    for case, (kind, given) in CASES.items():
        for path, shape in LAYERS.items():
            linear = len(shape) == 2
            base = torch.nn.Linear(shape[1], shape[0]) if linear else torch.nn.Conv2d(shape[1], shape[0], shape[2])
            base.weight.data, name = layer(shape), f"lycoris_{path.replace('.', '_')}"
            module: Any = kinds[kind](name, base, 1.0, **{"lora_dim": 2, "alpha": 3.0, **given})
            module.org_forward = base.forward
            torch.manual_seed(8)
            for part, parameter in module.named_parameters():
                values = torch.randn(parameter.shape) * 0.3
                parameter.data = parameter.data * (1 + 0.3 * values) if part == "dora_scale" else values
            module.eval()
            found |= {f"{case}|{name}.{part}": value.contiguous() for part, value in module.custom_state_dict().items()}
            for what, multiplier in (("whole", 1.0), ("half", 0.5)):
                found[f"{case}|{path}|{what}"] = weight_of(module, multiplier)
    save_file({name: value.detach().clone() for name, value in found.items()}, FILE)


if __name__ == "__main__":
    main()
