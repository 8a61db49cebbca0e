"""Suggests names for one that matches nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING

from qz import UsageError
from qz.formats.malformed import quoted
from qz.formats.patterns import INVALID

if TYPE_CHECKING:
    from qz.quantize.planning.plan import Plan

MOST_COMPARED = 2000
LONGEST_SHOWN = 200


def nearest(text: str, names: Iterable[str], typed: Mapping[str, str] | None = None) -> str:
    """``Did you mean q_proj?``; where nothing is near, some of the names there are. Layers alike count once.

    ``typed``: how a name, or a part of one, has to be written where it is not as it is.
    """
    once = list(dict.fromkeys(map(_alike, names)))[:MOST_COMPARED]
    parts = list(dict.fromkeys(part for name in once for part in name.split(".") if part != "*" and not part.isdigit()))
    pool = once if "." in text or "/" in text else list(dict.fromkeys(parts + once))
    close = get_close_matches(text, pool, 3, 0.6) or get_close_matches(text.rpartition(".")[2], parts, 3, 0.6)

    def written(found: list[str]) -> list[str]:
        return list(dict.fromkeys((typed or {}).get(each, each) for each in found))

    if close:
        return f"Did you mean {' or '.join(written(close))}?"
    return f"Names there: {', '.join(written(parts[-6:] if pool is not once else once[:3]))}." if once else ""


def _alike(name: str) -> str:
    """The same for all layers that differ by a number."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _linears(plan: Plan) -> list[str]:
    """The paths of a model's linears."""
    return [*(weight.name.removesuffix(".weight") for weight in plan.quantized), *plan.architecture.kept_linears]


def _skips_by_name(plans: Iterable[Plan], component: str) -> dict[str, str]:
    """Names that ``nearest`` proposes → what ``--skip`` takes for them, which each library matches in its own way.

    transformers: a pattern of the whole path, or the end of one. diffusers: a whole path, the last name of one, or what
    is in one with a dot behind it.
    """
    typed: dict[str, str] = {}
    for plan in plans:
        is_pattern = plan.checkpoint.library == "transformers"
        for name in _linears(plan):
            *parts, last = _alike(name).split(".")
            typed.setdefault(_alike(name), component + (_alike(name) if is_pattern else name))
            typed[last] = component + last
            for part in parts:
                typed.setdefault(part, f"'{component}.*{part}.*'" if is_pattern else component + part)
    return typed


def _is_pattern(skip: str) -> bool:
    try:
        re.compile(skip)
    except INVALID:
        return False
    return True


def refuse_unmatched(skips: Iterable[str], where: str, plans: Collection[Plan], component: str = "") -> None:
    """Raise UsageError for the first of ``skips``, which match nothing in the models of ``plans``.

    ``component``: with a slash, what was written before the pattern.
    """
    for skip in skips:
        names = [name for plan in plans for name in _linears(plan)]
        known = [name for plan in plans if plan.checkpoint.library == "transformers" for name in _linears(plan)]
        inside = re.compile(rf"(?:.*\.)?(?:{skip})\.") if _is_pattern(skip) else None
        if inside is not None and any(map(inside.match, known)):
            raise UsageError(
                f"--skip {quoted(component + skip, LONGEST_SHOWN)} names a module of {where}, but transformers matches "
                "a name with the end of a linear layer's path, or as a pattern with its beginning. Name the layers "
                f"inside: --skip {quoted(f'{component}.*{skip}.*', LONGEST_SHOWN)}."
            )
        shown = component + skip if len(skip) <= LONGEST_SHOWN else quoted(component + skip, LONGEST_SHOWN)
        advice = nearest(skip, names, _skips_by_name(plans, component))
        raise UsageError(f"--skip {shown} matches no module of {where}. {advice}".rstrip())
