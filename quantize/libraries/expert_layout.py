"""Where the experts of an MoE model lie in a checkpoint whose experts are quantized, one by one.

transformers 5 holds the experts of a layer in 3-D parameters; most classes still save them one by one, and so do the
programs that read them quantized. gpt-oss has always been stored in 3-D: its experts get the names that unsloth gives
them (``unsloth_zoo.temporary_patches.gpt_oss.GptOssExpertsBnb4bit``), each (out, in) as a linear layer has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_EXPERT = re.compile(r"(.+\.experts)\.(\w+)s\.(\d+)\.(weight|bias)")
_ROUTER = re.compile(r"(.+\.router)\.linear\.(weight|bias)")


def router_name(name: str) -> str:
    """What a gpt-oss router's ``weight`` or ``bias`` is called beside experts in this layout."""
    path, _, part = name.rpartition(".")
    return f"{path}.linear.{part}"


def expert_name(parameter: str, number: int) -> str:
    """The name of one expert's part of a gpt-oss ``…experts.gate_up_proj`` or ``…experts.gate_up_proj_bias``."""
    part = "bias" if parameter.endswith("_bias") else "weight"
    return f"{parameter.removesuffix('_bias')}s.{number}.{part}"


@dataclass(frozen=True, slots=True)
class ExpertLists:
    """What a checkpoint in gpt-oss' layout holds, by transformers' names."""

    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameter of all experts → the names of the single ones, in order. Weights are transposed, biases are not."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Name of a router's tensor in the model → in the checkpoint."""


def expert_lists(names: Iterable[str]) -> ExpertLists:
    """Look for experts in gpt-oss' layout among the tensors of a checkpoint; there may be none."""
    names = list(names)
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            parameter = f"{match[1]}.{match[2]}" + ("_bias" if match[4] == "bias" else "")
            found.setdefault(parameter, {})[int(match[3])] = name
    stacked = {
        parameter: tuple(each[number] for number in sorted(each))
        for parameter, each in found.items()
        if sorted(each) == list(range(len(each)))
    }
    routers = (match for name in names if (match := _ROUTER.fullmatch(name))) if stacked else ()
    return ExpertLists(stacked, {f"{match[1]}.{match[2]}": match[0] for match in routers})
