"""What the rules of a consumer look at: a checkpoint's tensors and config, read or planned."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qz.formats.checkpoint.problems import Problems
from qz.formats.checkpoint.quantization.quantization_config import Kind, Settings, read_settings

EXPERT = re.compile(r"(.+\.experts)\.(?:\d+\.(\w+)|(\w+)\.\d+)\.weight")
"""One expert's weight: ``experts.7.up_proj.weight``, or ``experts.up_projs.7.weight``."""
FUSED_EXPERTS = re.compile(r"(.+\.experts)\.(\w+)")
"""All experts' weights in one tensor: ``experts.gate_up_proj``."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight that bitsandbytes quantized: its ``shape`` before (None if unknown), and the dtype of its codes."""

    kind: Kind
    shape: tuple[int, ...] | None
    stored: str = "U8"

    @property
    def elements(self) -> int | None:
        return None if self.shape is None else math.prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """One model's checkpoint. ``library`` is None for a single file, which no config describes."""

    library: str | None
    architecture: str | None
    config: Mapping[str, Any]
    packed: Mapping[str, Packed]
    """Quantized weights by name."""
    plain: Mapping[str, tuple[int, ...]]
    """Shapes of all other tensors by name, without those that belong to quantized weights."""
    kept_linears: tuple[str, ...] = ()
    """Paths of linear layers that are not quantized, as far as that is known."""
    files: tuple[str, ...] = ()
    """Weight files that make the checkpoint."""
    others: tuple[str, ...] = ()
    """Further .safetensors files in its folder."""
    has_index: bool = False
    errors: tuple[str, ...] = ()
    """Kinds of problems for which nothing loads it."""

    @cached_property
    def settings(self) -> Settings:
        return read_settings(self.config, Problems(""))

    @cached_property
    def kinds(self) -> frozenset[Kind]:
        return frozenset(each.kind for each in self.packed.values())

    @property
    def is_int8(self) -> bool:
        return "int8" in self.kinds

    @cached_property
    def packed_experts(self) -> dict[str, Packed]:
        """Quantized weights of single experts."""
        return {name: each for name, each in self.packed.items() if EXPERT.fullmatch(name)}

    @cached_property
    def fused_experts(self) -> dict[str, Packed]:
        """Quantized tensors that hold all experts of a layer."""
        return {name: each for name, each in self.packed.items() if each.shape is not None and len(each.shape) == 3}

    @cached_property
    def plain_experts(self) -> tuple[str, ...]:
        """Experts' weights that are not quantized."""
        return tuple(
            name
            for name, shape in self.plain.items()
            if (len(shape) == 2 and EXPERT.fullmatch(name)) or (len(shape) == 3 and FUSED_EXPERTS.fullmatch(name))
        )
