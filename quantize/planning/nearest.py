"""Suggests names for one that matches nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

from qz import UsageError
from qz.formats.malformed import quoted
from qz.formats.patterns import INVALID

if TYPE_CHECKING:
    from qz.quantize.planning.plan import Plan

MOST_COMPARED = 2000
LONGEST_SHOWN = 200


def nearest(text: str, names: Iterable[str], around: str = "{}") -> str:
    """``Did you mean q_proj?``; where nothing is near, some of the names there are. Layers alike count once.

    ``around``: how a part that is the last of no name is written.
    """
    once = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))[:MOST_COMPARED]
    parts = list(dict.fromkeys(part for name in once for part in name.split(".") if part != "*" and not part.isdigit()))
    pool = once if "." in text or "/" in text else list(dict.fromkeys(parts + once))
    close = get_close_matches(text, pool, 3, 0.6) or get_close_matches(text.rpartition(".")[2], parts, 3, 0.6)
    whole = {*once, *(name.rpartition(".")[2] for name in once)}

    def written(found: list[str]) -> list[str]:
        return [each if each in whole else around.format(each) for each in found]

    if close:
        return f"Did you mean {' or '.join(written(close))}?"
    return f"Names there: {', '.join(written(parts[-6:] if pool is not once else once[:3]))}." if once else ""


def _linears(plan: Plan) -> list[str]:
    """The paths of a model's linears."""
    return [*(weight.name.removesuffix(".weight") for weight in plan.quantized), *plan.architecture.kept_linears]


def _is_pattern(skip: str) -> bool:
    try:
        re.compile(skip)
    except INVALID:
        return False
    return True


def refuse_unmatched(skips: Iterable[str], where: str, plans: Collection[Plan]) -> None:
    """Raise UsageError for the first of ``skips``, which match nothing in the models of ``plans``."""
    for skip in skips:
        names = [name for plan in plans for name in _linears(plan)]
        around = "'.*{}.*'" if all(plan.checkpoint.library == "transformers" for plan in plans) else "{}"
        inside = re.compile(rf"(?:.*\.)?(?:{skip})\.") if _is_pattern(skip) else None
        if inside is not None and any(map(inside.match, names)):
            raise UsageError(
                f"--skip {quoted(skip, LONGEST_SHOWN)} names a module of {where}, but transformers matches a name with "
                "the end of a linear layer's path, or as a pattern with its beginning. Name the layers inside: "
                f"--skip {quoted(f'.*{skip}.*', LONGEST_SHOWN)}."
            )
        shown = skip if len(skip) <= LONGEST_SHOWN else quoted(skip, LONGEST_SHOWN)
        advice = nearest(skip, names, around)
        raise UsageError(f"--skip {shown} matches no module of {where}. {advice}".rstrip())
