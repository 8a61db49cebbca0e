"""The command imports the libraries without their compilers, and nothing in its output tells."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from converted import quantized
from reference import differing_files
from zoo import build

Qz = Callable[..., subprocess.CompletedProcess[str]]

SHOWS_MODULES = """
import sys
from qz.cli.app import run
from qz.quantize import lean
lean.allow()
assert run(sys.argv[1:]) == 0
real = {name for name in ("torch._dynamo", "torch._inductor", "torch.distributed.tensor") if name in sys.modules}
assert not real, real
import torch
assert torch.compile is not lean._unchanged and torch.distributed.is_available()
import torch._dynamo
assert hasattr(torch._dynamo, "optimize")
"""


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe", "gpt2", "whisper", "flux", "unet"])
def test_a_lean_process_writes_the_same_folder(qz: Qz, name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "source")
    quantized(tmp_path / "source", tmp_path / "here", "nf4")
    done = qz("quantize", "source", "-o", "there", "--quiet")
    assert done.returncode == 0, done.stderr
    assert differing_files(tmp_path / "here", tmp_path / "there") == []


@pytest.mark.parametrize("name", ["llama-tied", "flux"])
def test_planning_leaves_the_compiler_out_and_puts_everything_back(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "source")
    arguments = ["quantize", str(tmp_path / "source"), "--dry-run", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", SHOWS_MODULES, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
