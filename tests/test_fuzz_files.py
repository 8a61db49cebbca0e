"""Whatever a config, index, quant state, record or journal says: it is read, or refused with a reason."""

from __future__ import annotations

import pytest

from fuzz_files import TARGETS, fuzz

BUILDS = "classes"
"""Takes a library and tens of milliseconds each time; seconds where a number is so large that a process is started."""


@pytest.mark.parametrize("name", [name for name in TARGETS if name != BUILDS])
def test_1000_mutated_files_of_each_kind_are_read_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fuzz(name, seed=20, count=1000) == 1000


def test_mutated_configs_are_built_from_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ_CACHE", "")
    assert fuzz(BUILDS, seed=20, count=50) == 50


@pytest.mark.fuzz
def test_1000_mutated_configs_are_built_from_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ_CACHE", "")
    assert fuzz(BUILDS, seed=21, count=1000) == 1000
