"""A part of the zoo that is another one every day, and in it no class that differs without a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_part_of_today_has_no_fault(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    alone = {"PYTHONPATH": str(tests), "QZ_CACHE": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "whole_zoo", "--slice", "--seconds", "20", "--results", str(tmp_path / "none")]
    done = subprocess.run(command, env={**os.environ, **alone}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert len(done.stdout.splitlines()) > 1, "no class was tried"
