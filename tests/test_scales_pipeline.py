"""Searched scales in whole pipelines: each component by its own statistics."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import pipelines
from commands import run
from conftest import Qz
from converted import plan_of
from qz import MalformedInput
from qz.cli.commands.quantize import quantize
from qz.quantize.importance.statistics import InputSums, write_statistics
from reference import differing_tensors


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.flux(tmp_path_factory.mktemp("pipeline") / "flux")


def statistics(component: Path, prefix: str) -> dict[str, InputSums]:
    return {
        prefix + weight.name: InputSums(np.random.default_rng(0).random(weight.shape[1]).astype(np.float32), 4)
        for weight in plan_of(component, "nf4").quantized
    }


def test_each_component_is_searched_with_the_statistics_that_are_named_after_it(flux: Path, tmp_path: Path) -> None:
    both = ["transformer", "text_encoder"]
    known = tmp_path / "s.safetensors"
    write_statistics(known, statistics(flux / "transformer", "transformer/"), {})
    with pytest.raises(MalformedInput, match="none of the weights"):
        run(quantize, flux, output=tmp_path / "out", components=",".join(both), importance=known)
    sums = {name: each for part in both for name, each in statistics(flux / part, f"{part}/").items()}
    write_statistics(known, sums, {})
    report = run(quantize, flux, output=tmp_path / "out", components=",".join(both), importance=known)
    assert report["scales"] == "search"
    told = {each["name"]: each for each in report["components"]}
    assert [told[part]["importance"]["missing"] for part in both] == [[], []]
    assert sum(told[part]["importance"]["weights"] for part in both) == len(sums)
    for part in both:
        run(quantize, flux, subfolder=part, output=tmp_path / part, importance=known)
        assert differing_tensors(tmp_path / part, tmp_path / "out" / part) == []


def test_a_component_of_another_method_keeps_that(flux: Path, tmp_path: Path, forked_qz: Qz) -> None:
    report = run(
        quantize,
        flux,
        output=tmp_path / "out",
        scales="search",
        components="transformer,text_encoder",
        component=["text_encoder=int8"],
    )
    told = {each["name"]: each for each in report["components"]}
    assert (told["transformer"]["scales"], told["text_encoder"]["scales"]) == ("search", "absmax")
    assert told["text_encoder"]["method"] == "int8"
    command = ["quantize", str(flux), "-o", str(tmp_path / "new"), "--scales", "search", "--dry-run"]
    assert re.search(r"^scales +searched$", forked_qz(*command).stdout, re.MULTILINE)
