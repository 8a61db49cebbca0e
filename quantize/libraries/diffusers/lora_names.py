"""Which weights of a diffusers pipeline a LoRA changes, learned from the library's own converters.

diffusers knows the names of a dozen trainers. Its converters are shown a LoRA of rank 1 whose values tell where they
come from: what comes out says which rows of which module of the file belong to which rows of which weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from qz import Unsupported
from qz.quantize.libraries.diffusers.internals import lora_converters, lora_mixins

TextEncoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
_CLASS = re.compile(r"^class (\w+)\(([^)]*)\):", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Rows:
    """``count`` rows of a module in the file, from ``first`` on, become those of a weight from ``start`` on."""

    module: str
    first: int
    start: int
    count: int


def lora_rows(
    modules: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], str, str]],
    mixin: Any,
    unet: Mapping[str, Any] | None,
) -> dict[str, list[Rows]]:
    """Dotted path of a module of the pipeline, its component first → the rows of the file that change its weight.

    ``modules``: name in the file → shapes of its two factors with a rank of 1, and the names of those.
    """
    coded: dict[str, torch.Tensor] = {}
    order = list(modules)
    for number, name in enumerate(order, start=1):
        down, up, down_name, up_name = modules[name]
        coded[down_name] = torch.full(down, float(number))
        coded[up_name] = torch.arange(1, up[0] + 1, dtype=torch.float32).reshape(up)
        if down_name.endswith(".lora_down.weight"):
            coded[f"{name}.alpha"] = torch.tensor(1.0)
    arguments = {"unet_config": SimpleNamespace(**unet)} if unet is not None else {}
    found = mixin.lora_state_dict(dict(coded), return_alphas=True, **arguments)
    state = found[0] if isinstance(found, tuple) else found
    rows: dict[str, list[Rows]] = {}
    for name, tensor in _as_peft(state).items():
        path, ending, _ = name.partition(".lora_A.weight")
        if ending:
            rows[path] = _decoded(tensor, _as_peft(state)[f"{path}.lora_B.weight"], order)
    return rows


def _as_peft(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every name in PEFT's way, the component first; as the loaders of denoisers and text encoders do it."""
    of_denoiser, to_diffusers, to_peft = lora_converters()
    by_component: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        component, _, rest = name.partition(".")
        by_component.setdefault(component, {})[rest] = tensor
    named: dict[str, torch.Tensor] = {}
    for component, tensors in by_component.items():
        if component in TextEncoders:
            tensors = to_peft(to_diffusers(tensors))
        elif "lora_A" not in next(iter(tensors)):
            tensors = of_denoiser(tensors)
        named |= {f"{component}.{name}": tensor for name, tensor in tensors.items()}
    return named


def _decoded(down: torch.Tensor, up: torch.Tensor, order: list[str]) -> list[Rows]:
    down, up = down.reshape(len(down), -1), up.reshape(len(up), -1)
    found: list[Rows] = []
    for column in range(up.shape[1]):
        module = order[round(float(down[column, 0])) - 1]
        values = up[:, column].round().to(torch.int64).tolist()
        start = 0
        while start < len(values):
            stop = start + 1
            while stop < len(values) and values[stop] == values[stop - 1] + 1 and values[start]:
                stop += 1
            if values[start]:
                found.append(Rows(module, values[start] - 1, start, stop - start))
            start = stop
    return found


def lora_mixin(pipeline_class: str | None, model_class: str) -> Any:
    """The class of diffusers that reads LoRAs of a pipeline, or of those pipelines that have a model of this class.

    Found in the text of the library's pipelines: importing them would import all that they need. Raises Unsupported if
    there is none.
    """
    return lora_mixins()[_mixin_name(pipeline_class, model_class)]


@cache
def _mixin_name(pipeline_class: str | None, model_class: str) -> str:
    known = lora_mixins()
    votes: dict[str, int] = {}
    needle = re.compile(rf"\b{re.escape(model_class)}\b")
    for path in sorted(Path(diffusers.__file__).parent.glob("pipelines/**/pipeline_*.py")):
        text = path.read_text(encoding="utf-8")
        if model_class not in text and (pipeline_class is None or pipeline_class not in text):
            continue
        for name, bases in _CLASS.findall(text):
            mixins: list[str] = [base.strip() for base in bases.split(",") if base.strip() in known]
            if mixins and name == pipeline_class:
                return mixins[-1]
            if mixins and needle.search(text):
                for mixin in mixins:
                    votes[mixin] = votes.get(mixin, 0) + 1
    if not votes or pipeline_class is not None:
        what = pipeline_class or model_class
        raise Unsupported(
            f"diffusers {diffusers.__version__} loads no LoRA into a {what}, so how to fuse one is not known."
        )
    return max(votes, key=lambda name: (votes[name], name))
