"""Regular expressions of other people: what Python raises for them, and which can be matched without hanging."""

from __future__ import annotations

import re

INVALID = (re.error, OverflowError, RecursionError)
"""Raised by ``re`` for a pattern: also for counts of too many digits, and for too many brackets."""
_LONGEST, _MOST_REPEATS = 500, 2


def is_simple(pattern: str) -> bool:
    """Whether a match takes the square of a name's length at most: a file may name a pattern that takes for ever."""
    repeats = sum(pattern.removesuffix(".*").count(sign) for sign in "*+{?")
    return len(pattern) <= _LONGEST and repeats <= _MOST_REPEATS and not re.search(r"\)[*+{]", pattern)
