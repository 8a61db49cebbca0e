"""Kernels may be called by many threads from the first call on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("first_calls.py")


def race(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_eight_threads_that_begin_at_once_get_what_one_gets() -> None:
    race("--runs", "3")


@pytest.mark.soak
def test_500_times_eight_threads_that_begin_at_once_and_compile_anew() -> None:
    race("--runs", "500", "--fresh")
