"""Linear layers that a library would quantize and that must stay as they are, and how its skip list says so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

Matches = Callable[[Iterable[str], str], bool]
"""A library's rule for its skip list: whether one of the keys means the module of a path."""


@dataclass(frozen=True, slots=True)
class Exemptions:
    """Layers that stay as they are, path → why; keys for the skip list that match them; what to tell the user."""

    kept: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def exempt(reasons: Mapping[str, str], linears: Iterable[str], matches: Matches, *, wanted: bool) -> Exemptions:
    """Keep the layers in ``reasons``, of all ``linears`` that would be quantized.

    If that is not ``wanted`` none is kept, as in the library, and the notes say what that means.
    """
    if not reasons:
        return Exemptions()
    linears = list(linears)
    keys = _keys(list(reasons), linears, matches)
    kept = {path: reasons.get(path, "named as a layer that must stay") for path in linears if matches(keys, path)}
    notes = []
    for reason, count in Counter(reasons.values()).items():
        paths = [path for path, each in reasons.items() if each == reason]
        named = ", ".join(_keys(paths, [path for path in linears if path not in reasons] + paths, matches)[:4])
        what = f"the linear layer {paths[0]}" if count == 1 else f"{count} linear layers ({named})"
        stays, is_packed = ("stays", "is") if count == 1 else ("stay", "are")
        if wanted:
            notes.append(f"{what} {stays} unquantized: {reason}")
        else:
            notes.append(f"{what} {is_packed} quantized, and the output may fail or be wrong: {reason}")
    return Exemptions(kept if wanted else {}, keys if wanted else (), tuple(notes))


def _keys(paths: list[str], linears: list[str], matches: Matches) -> tuple[str, ...]:
    """Keys for the skip list that match ``paths``, as short as can be, and no other of ``linears`` if there are such.

    transformers takes a key for a regular expression; diffusers has none that names a layer of the model's root alone.
    """
    wanted = set(paths)
    others = [path for path in linears if path not in wanted]
    keys: list[str] = []
    for path in paths:
        if matches(keys, path):
            continue
        steps = path.split(".")
        endings = [".".join(steps[-count:]) for count in range(1, len(steps) + 1)]
        forms = [form for form in (*endings, f"{re.escape(path)}$") if matches([form], path)]
        own = (form for form in forms if not any(matches([form], other) for other in others))
        keys.append(next(own, path))
    return tuple(keys)
