"""No driver, no such device, no memory, a GPU lost in mid-run: a documented exit, and never a damaged output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from converted import quantized
from reference import differing_tensors
from zoo import build

SHARD = "40KB"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures") / "flux"
    build("flux").save_pretrained(folder)
    return folder


def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """``qz ARGUMENTS`` in a process that runs ``code`` first."""
    program = f"import sys\nfrom qz.cli.entry import main\n{code}\nsys.argv[0] = 'qz'\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("Error", "Warning", "  ")) or "qz" in line]


@pytest.mark.parametrize(
    ("device", "environment", "says"),
    [
        ("cuda", {"CUDA_VISIBLE_DEVICES": ""}, "no NVIDIA driver works here"),
        ("cuda:99", {}, "There is no cuda:99 here"),
        ("xpu", {}, "torch"),
        ("mps", {}, "Apple silicon"),
    ],
)
def test_a_device_that_is_not_there_is_a_usage_error(
    source: Path, device: str, environment: dict[str, str], says: str, tmp_path: Path
) -> None:
    done = run("", "quantize", source, "--device", device, "-o", tmp_path / "out", **environment)
    assert done.returncode == 2, done.stderr
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_driver_auto_is_the_cpu(source: Path, tmp_path: Path) -> None:
    done = run("", "quantize", source, "--json", "-o", tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["device"] == "cpu"


LITTLE = """
import torch
from qz.quantize.compute.gpu import gpu_arithmetic
made = gpu_arithmetic.Accelerator.__init__
def init(self, *a, **k):
    made(self, *a, **k)
    self._piece_bytes = self.chunk_bytes
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction({bytes} / torch.cuda.mem_get_info(0)[1], 0)
gpu_arithmetic.Accelerator.__init__ = init
ended = gpu_arithmetic.Accelerator._in_pieces
def in_pieces(self, *a):
    try: return ended(self, *a)
    finally: print("piece", self._piece_bytes, file=sys.stderr)
gpu_arithmetic.Accelerator._in_pieces = in_pieces
"""


def large(folder: Path) -> Path:
    """One linear of 32 MB, so that a chunk is as large as they get."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=16384, num_hidden_layers=1, num_attention_heads=8
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def test_with_little_memory_left_the_pieces_get_smaller_and_the_bytes_stay(tmp_path: Path) -> None:
    source = large(tmp_path / "source")
    done = run(LITTLE.format(bytes=60 << 20), "quantize", source, "--device", "cuda", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    sizes = [int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("piece")]
    print("\npieces with 60 MB of GPU memory:", sorted(set(sizes)))
    assert min(sizes) < max(sizes) or min(sizes) < 32 << 20
    quantized(source, tmp_path / "reference", "nf4", device="cuda")
    assert differing_tensors(tmp_path / "reference", tmp_path / "out") == []


def test_with_no_memory_left_it_says_so_and_can_be_repeated(tmp_path: Path) -> None:
    source = large(tmp_path / "source")
    done = run(LITTLE.format(bytes=1 << 20), "quantize", source, "--device", "cuda", "-o", tmp_path / "out")
    assert done.returncode == 75, done.stderr
    assert "no memory left" in done.stderr
    assert "--device cpu" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    done = run("", "quantize", source, "--device", "cuda", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr


HOLD = """
import torch, sys
held = []
for size in (1 << 30, 64 << 20, 4 << 20):
    while torch.cuda.mem_get_info(0)[0] > size + (40 << 20):
        try: held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError: break
print(torch.cuda.mem_get_info(0)[0], flush=True)
sys.stdin.read()
"""


def test_when_others_hold_all_memory_auto_takes_the_cpu_and_says_so(source: Path, tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        free = int(holder.stdout.readline())
        done = run("", "quantize", source, "--device", "cuda", "-o", tmp_path / "cuda")
        print(f"\n{free:,} bytes left by others: exit {done.returncode}: {' '.join(done.stderr.split())}")
        assert done.returncode == 75, done.stderr
        assert not (tmp_path / "cuda").exists()
        # Double quantization, whose sums are the GPU's: the cores do not take it over where there are many.
        done = run("", "quantize", source, "--nf4", "--double-quant", "--json", "-o", tmp_path / "auto")
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert summary["device"] == "cpu"
        assert any("computed on the CPU" in warning for warning in summary["warnings"])
    finally:
        holder.communicate("")


LOST = """
import torch
from qz.quantize.compute.gpu import gpu_arithmetic
count = 0
ended = gpu_arithmetic.Accelerator._in_pieces
def in_pieces(self, *a):
    global count
    count += 1
    if count == 20:  # a device-side assertion: from here on every call fails, as when the device falls off the bus
        torch.zeros(2, device="cuda")[torch.tensor([9], device="cuda")]
    return ended(self, *a)
gpu_arithmetic.Accelerator._in_pieces = in_pieces
"""


def test_a_gpu_lost_in_mid_run_leaves_no_output_and_the_next_run_goes_on(source: Path, tmp_path: Path) -> None:
    common = ("quantize", source, "--device", "cuda", "--threads", "1", "--max-shard-size", SHARD)
    done = run(LOST, *common, "-o", tmp_path / "out")
    print(f"\nlost GPU: exit {done.returncode}:", " ".join(done.stderr.split())[-600:])
    assert done.returncode == 75, done.stderr
    assert "stopped working" in done.stderr
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.partial").glob("*.safetensors"))
    done = run("", *common, "--json", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"]
    quantized(source, tmp_path / "reference", "nf4", device="cuda", max_shard_bytes=40_000)
    assert differing_tensors(tmp_path / "reference", tmp_path / "out") == []
