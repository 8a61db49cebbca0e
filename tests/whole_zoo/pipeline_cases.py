"""The pipelines of diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from whole_zoo.case import Case


def cases() -> Iterator[Case]:
    yield from ()
