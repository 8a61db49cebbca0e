"""Whatever a config, index, quant state, record or journal says: it is read, or refused with a reason."""

from __future__ import annotations

import pytest

from fuzz_files import TARGETS, fuzz

BUILD = ("classes", "GGUF headers")
"""Take a library and tens of milliseconds each time."""


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in BUILD])
@pytest.mark.parametrize("count", [75, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_mutated_files_of_each_kind_are_read_or_refused(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("QZ_CACHE", "")
    assert fuzz(name, seed=20, count=count) == count


@pytest.mark.parametrize("name", BUILD)
def test_mutated_descriptions_of_models_are_built_from_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ_CACHE", "")
    assert fuzz(name, seed=20, count=25) == 25


@pytest.mark.fuzz
@pytest.mark.parametrize("name", BUILD)
def test_1000_mutated_descriptions_are_built_from_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ_CACHE", "")
    assert fuzz(name, seed=21, count=1000) == 1000
