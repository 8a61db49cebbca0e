"""How to convert: everything the user may choose that decides what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qz.quantize.methods import Method

DEFAULT_SHARD_BYTES = 5 * 10**9
IfExists = Literal["error", "skip", "overwrite"]
"""What to do where the output exists: refuse, leave one that is up to date, or replace it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to convert. ``threads`` 0 means one for each CPU that may be used."""

    method: Method | None
    dtype: str = "auto"
    skips: tuple[str, ...] = ()
    default_skips: bool = True
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    device: str = "auto"
    threads: int = 0
    keep_nonfinite: bool = False
    """Leave weights that hold NaN or infinite values unquantized, instead of refusing them."""
    weights_only: bool = False
    """Write the model alone, without tokenizer, processor, licence and the like."""
    components: tuple[str, ...] | None = None
    """Of a pipeline, what to quantize; None to choose what is worth it."""
    component_methods: Mapping[str, Method | None] = field(default_factory=dict)
    """Of a pipeline, components with a method of their own; None for one that stays as it is."""
