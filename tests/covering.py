"""What ``make test`` sees of a product of parameters: every value of each side; ``make soak`` sees each with each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def in_turn(ones: Iterable[Any], *groups: Sequence[Any]) -> list[Any]:
    """Parameter sets of ``ones`` with all values of all ``groups``. What has no turn is marked soak.

    Each group takes turns: its first value goes with the first of ``ones``, the second with the second, and so on,
    around. A tuple in a group is the values of several parameters.
    """
    return [
        pytest.param(
            one,
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if place == number % len(group) else [pytest.mark.soak],
        )
        for number, one in enumerate(ones)
        for group in groups
        for place, value in enumerate(group)
    ]
