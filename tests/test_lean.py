"""The command imports the libraries without their compilers, and nothing in its output tells."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from converted import quantized
from qz.quantize.libraries.examine import OF_TRANSFORMERS
from reference import differing_files
from zoo import build

pytestmark = pytest.mark.usefixtures("no_memory")

Qz = Callable[..., subprocess.CompletedProcess[str]]

SHOWS_MODULES = """
import sys
from qz.cli.app import run
from qz.quantize.libraries import lean_imports
lean_imports.allow()
assert run(sys.argv[1:]) == 0
unused = "diffusers" if "transformers" in sys.modules else "transformers"
unwanted = (unused, "torch._dynamo", "torch._inductor", "torch.distributed.tensor")
real = {name for name in unwanted if name in sys.modules}
assert not real, real
import torch
assert torch.compile is not lean_imports._unchanged and torch.distributed.is_available()
import torch._dynamo
assert hasattr(torch._dynamo, "optimize")
"""


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ_CACHE", "")


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe", "gpt2", "whisper", "flux", "unet"])
def test_a_lean_process_writes_the_same_folder(qz: Qz, name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "source")
    quantized(tmp_path / "source", tmp_path / "here", "nf4")
    done = qz("quantize", "source", "-o", "there", "--quiet")
    assert done.returncode == 0, done.stderr
    assert differing_files(tmp_path / "here", tmp_path / "there") == []


def test_a_model_of_diffusers_that_contains_one_of_transformers_gets_it(qz: Qz, tmp_path: Path) -> None:
    """Planning another one leaves transformers out: half of diffusers' import time."""
    from diffusers import AutoencoderRAE

    AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
        encoder_input_size=28,
    ).save_pretrained(tmp_path / "source")
    quantized(tmp_path / "source", tmp_path / "here", "nf4")
    done = qz("quantize", "source", "-o", "there", "--quiet")
    assert done.returncode == 0, done.stderr
    assert differing_files(tmp_path / "here", tmp_path / "there") == []


def test_no_other_model_of_diffusers_needs_transformers() -> None:
    import diffusers

    needy = set()
    for path in (Path(diffusers.__file__).parent / "models").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if re.search(r"^\s*(from|import) transformers\b", text, re.MULTILINE):
            needy |= set(re.findall(r"^class (\w+)\(.*ModelMixin", text, re.MULTILINE))
    assert needy == set(OF_TRANSFORMERS)


@pytest.mark.parametrize("name", ["llama-tied", "flux"])
def test_planning_leaves_the_compiler_out_and_puts_everything_back(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "source")
    arguments = ["quantize", str(tmp_path / "source"), "--dry-run", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", SHOWS_MODULES, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
