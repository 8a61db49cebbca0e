"""The part of a command line that decides the bytes of the output, in one spelling, for the record and the card."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

DECIDING = (
    "double_quant",
    "compute_dtype",
    "threshold",
    "scales",
    "importance",
    "rounding",
    "variant",
    "skip",
    "no_default_skips",
    "components",
    "component",
    "keep_nonfinite",
    "dtype",
    "max_shard_size",
    "weights_only",
)
"""Parameters of commands, named as their options. The method and the source are said in their own ways."""


def recorded(command: Callable[..., None], given: Mapping[str, Any]) -> tuple[str, ...]:
    """The words for what was ``given`` to ``command`` and is not its default; of a path only the name."""
    words: list[str] = []
    for name, parameter in inspect.signature(command).parameters.items():
        value = given[name]
        if name not in DECIDING or value in (parameter.default, None, []):
            continue
        option = "--" + name.replace("_", "-")
        for each in value if isinstance(value, list | tuple) else [value]:
            told = PurePath(each).name if name == "importance" else str(each)
            words += [option] if each is True else [option, told]
    return tuple(words)
