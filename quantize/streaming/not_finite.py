"""How many values of a kept tensor are NaN or infinite, and since when."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NotFinite:
    """Values that were not finite as they were ``stored``, and those that ``overflowed`` the output's dtype."""

    stored: int
    overflowed: int
