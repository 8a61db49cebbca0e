"""A part of the zoo that is another one every day, and in it no class that differs without a reason; and some kinds
of classes every day: those whose output did not load, or lacked a part, though it had the library's bytes."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from covering import in_turn
from whole_zoo import transformers_cases
from whole_zoo.case import METHODS

CLASSES = [
    ("CsmForConditionalGeneration", "identical"),  # hands a part of generation_config.json to an inner model
    ("MiniMaxM3VLModel", "the model's names"),  # only the prefix of the body is renamed when it loads
    ("UnlimitedOcrModel", "the model's names"),  # some names have to be as they were before renaming
    ("Qwen4ExpTextModel", "refused"),  # a layer whose name no parts of its own can follow
]


@pytest.mark.parametrize(("class_and_result", "method"), in_turn(CLASSES, METHODS), ids=str)
def test_a_class_whose_names_are_changed_when_it_loads_is_right_or_refused(
    class_and_result: tuple[str, str], method: str, tmp_path: Path
) -> None:
    architecture, result = class_and_result
    case = next(case for case in transformers_cases.cases() if case.architecture == architecture)
    (row,) = replace(case, methods=(method,)).rows(tmp_path)
    assert row.result == result
    assert row.faults == []


def test_the_part_of_today_has_no_fault(python_with_libraries: list[str], tmp_path: Path) -> None:
    tests = Path(__file__).parent
    alone = {"PYTHONPATH": str(tests), "QZ_CACHE": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = ["-m", "whole_zoo", "--slice", "--seconds", "2", "--jobs", "1", "--results", str(tmp_path / "none")]
    command = [*python_with_libraries, *arguments]
    done = subprocess.run(command, env={**os.environ, **alone}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert len(done.stdout.splitlines()) > 1, "no class was tried"
