"""An untrusted config.json, made safe for a library: it names no code, and counts no more than there is.

The keys that can name code were found by following the values of configs through the sources of transformers 5.23 and
diffusers 0.42.1 to where modules are loaded; ``tests/test_isolation.py`` does it again with what is installed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qz import MalformedInput
from qz.counted import counted
from qz.formats.malformed import quoted, quoted_names

CODE = re.compile(
    r"\w*(?:attn|attention|experts)_implementation(?:_internal)?|_?use_kernels?|use_local_kernel|allow_all_kernels"
    r"|\w*kernel_config|kernel_mapping|auto_map|attribute_map|custom_generate|custom_pipelines?|trust_remote_code"
    r"|code_revision|_auto_class"
)
"""Keys whose values can name code, or, as ``attribute_map`` does, give such a key another name."""
INERT = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "grouped_mm", "batched_mm")
"""Implementations that the libraries have themselves: they leave no trace in what is saved."""
COUNTS = re.compile(r"(?:.*_)?(?:layers?|depths?|blocks?|labels|classes|experts|stages|heads|groups|repeats?|stacks?)")
USUAL_COUNT = 100_000
"""What a count may be in any model; beyond it, four times the tensors, or twice their largest extent."""
PARTS, PARTS_PER_TENSOR = 4_000, 32
"""How many parameters and modules a class may have, and how many more for each stored tensor."""


def without_code(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config`` without what can name code, also in configs inside it; and what was taken out, by its path."""
    removed: dict[str, Any] = {}

    def cleaned(value: Any, path: str) -> Any:
        if isinstance(value, list):
            return [cleaned(each, path) for each in value]
        if not isinstance(value, Mapping):
            return value
        kept = {}
        for key, inner in value.items():
            where = f"{path}.{key}" if path else key
            if CODE.fullmatch(key) and not _is_number(inner):  # a vocabulary may contain such a word
                removed[where] = inner
            else:
                kept[key] = cleaned(inner, where)
        return kept

    return cleaned(config, ""), removed


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def note_removed(removed: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on keys that were removed, except those that the libraries do not save either."""
    told = [path for path, value in removed.items() if path != "auto_map" and not _is_inert(value)]
    if not told:
        return ()
    return (f"left out of config.json, because it could name code to run: {quoted_names(told, 3)}",)


def without_own_code(auto_map: Any) -> tuple[dict[str, Any], bool]:
    """The entries of an ``auto_map`` that name code of another repository (``REPO--MODULE.CLASS``); whether others do
    not. A value is a name, or for a tokenizer a list of two."""
    entries = auto_map if isinstance(auto_map, dict) else {}

    def is_elsewhere(value: Any) -> bool:
        names = [name for name in (value if isinstance(value, list) else [value]) if name is not None]
        return bool(names) and all(isinstance(name, str) and "--" in name for name in names)

    elsewhere = {key: value for key, value in entries.items() if is_elsewhere(value)}
    return elsewhere, len(elsewhere) < len(entries) or not isinstance(auto_map, dict)


def _is_inert(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str) and value in INERT)


def require_plausible(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise MalformedInput for a count in ``config`` that no model with tensors of these shapes can have.

    Lists as long as such a count are made before the library compares anything with the tensors.
    """
    extent = max((length for shape in shapes.values() for length in shape), default=0)
    most = max(USUAL_COUNT, 4 * len(shapes), 2 * extent)

    def check(value: Any, path: str, counts: bool) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                check(inner, f"{path}.{key}" if path else key, COUNTS.fullmatch(key) is not None)
        elif isinstance(value, list):
            for inner in value:
                check(inner, path, counts)
        elif counts and _is_number(value) and value > most:
            raise MalformedInput(
                f"{where}/config.json says {quoted(path)} = {value}, but the checkpoint holds "
                f"{counted(len(shapes), 'tensor')}, none longer than {extent} in any dimension. Use the config.json "
                "that belongs to these weights."
            )

    check(config, "", counts=False)


@contextmanager
def parts_bounded(tensors: int, where: str) -> Iterator[None]:
    """Raise MalformedInput as soon as this thread has built far more modules and parameters than there are tensors."""
    from torch.nn.modules.module import (
        register_module_module_registration_hook,
        register_module_parameter_registration_hook,
    )

    thread, most, built = threading.get_ident(), PARTS + PARTS_PER_TENSOR * tensors, 0

    def count(*_: object) -> None:
        nonlocal built
        if threading.get_ident() != thread:
            return
        built += 1
        if built > most:
            raise MalformedInput(
                f"{where}/config.json describes a model of more than {most} parts, but the checkpoint holds only "
                f"{tensors} tensors. Use the config.json that belongs to these weights."
            )

    hooks = [register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
