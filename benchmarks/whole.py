"""Whole processes on the CPU, in turn: qz against the libraries and against ``cp``, and its peak memory.

    python -m benchmarks.whole llama     a 1.1 B bf16 Llama to NF4 and INT8, against transformers' load and save
    python -m benchmarks.whole cp        8.6 GB of bf16 to NF4, against ``cp`` of the source, both with a warm cache
    python -m benchmarks.whole memory    peak anonymous memory on FLUX.1-dev's transformer (23.8 GB of holes)

Inputs are made under --place (20 GB of free space) and kept for the next run.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import LLAMA_1B, LLAMA_4B, flux, llama

QZ = [sys.executable, "-m", "qz"]
REFERENCE = """
import sys, torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM
source, output, method = sys.argv[1:]
wanted = {"load_in_8bit": True} if method == "int8" else {
    "load_in_4bit": True, "bnb_4bit_quant_type": method, "bnb_4bit_compute_dtype": torch.bfloat16}
model = LlamaForCausalLM.from_pretrained(source, quantization_config=BitsAndBytesConfig(**wanted), device_map="cpu")
model.save_pretrained(output, max_shard_size="5GB")
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """One finished process: seconds of wall time and of CPU, and the peak of its anonymous memory in bytes."""

    wall: float
    cpu: float
    anonymous: int


def run(command: list[str], output: Path | None = None) -> Figure:
    """Run a command to its end; what it would write is removed first."""
    if output is not None:
        shutil.rmtree(output, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = [0]
    watcher = threading.Thread(target=watch, args=(process.pid, peak))
    watcher.start()
    _, errors = process.communicate()
    wall = time.monotonic() - begun
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Figure(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak[0])


def watch(pid: int, peak: list[int]) -> None:
    """RssAnon every 5 ms: ``ru_maxrss`` would count the page cache of mapped files."""
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        if "RssAnon" not in status:
            return
        peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) * 1024)
        time.sleep(0.005)


def rounds(name: str, count: int, output: Path, commands: dict[str, list[str]]) -> None:
    """Every command in turn, after a warm-up of the first; print medians, and ratios of the last to each in a round."""
    *_, other = commands
    run(next(iter(commands.values())), output)
    results = [{who: run(command, output) for who, command in commands.items()} for _ in range(count)]
    for who in commands:
        wall, used = (statistics.median(getattr(each[who], key) for each in results) for key in ("wall", "cpu"))
        peak = max(each[who].anonymous for each in results)
        line = f"{name:20} {who:22} {wall:7.2f} s wall {used:7.2f} s CPU {peak / 1e9:6.2f} GB anonymous"
        if who != other:
            slower, busier = (
                statistics.median(getattr(each[other], key) / getattr(each[who], key) for each in results)
                for key in ("wall", "cpu")
            )
            line += f"; {other} ÷ this: {slower:.2f}× wall, {busier:.2f}× CPU"
        print(line, flush=True)


def against_transformers(place: Path, count: int) -> None:
    source, output = llama(place / "llama-1b", LLAMA_1B), place / "out"
    for method in ("nf4", "int8"):
        ours = [*QZ, "quantize", str(source), f"--{method}", "-o", str(output), "-q"]
        theirs = [sys.executable, "-c", REFERENCE, str(source), str(output), method]
        rounds(
            f"1.1 B Llama, {method}",
            count,
            output,
            {"qz": ours, "qz, the first time": ["env", "QZ_CACHE=", *ours], "transformers": theirs},
        )


def against_cp(place: Path, count: int) -> None:
    source, output = llama(place / "llama-4b", LLAMA_4B), place / "out"
    for file in source.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:  # into the page cache
            while stream.read(1 << 24):
                pass
    ours = [*QZ, "quantize", str(source), "-o", str(output), "-q"]
    cp = ["cp", "-r", str(source), str(output)]
    rounds("8.6 GB bf16, nf4", count, output, {"qz": ours, "qz, no fsync": [*ours, "--no-fsync"], "cp": cp})


def memory(place: Path) -> None:
    source, output = flux(place / "flux-holes", holes=True), place / "out"
    baseline = run(
        [sys.executable, "-c", "import numba, torch, accelerate\nfrom diffusers import FluxTransformer2DModel"]
    )
    largest = 3072 * 18432 * 2
    for method in ("--nf4", "--int8", "--nf4 --double-quant"):
        figure = run([*QZ, "quantize", str(source), *method.split(), "-o", str(output), "-q"], output)
        print(
            f"FLUX.1-dev, {method:20} {figure.wall:6.1f} s, peak {figure.anonymous / 1e6:5.0f} MB anonymous; allowed: "
            f"{baseline.anonymous / 1e6:.0f} MB imports + 3 × {largest / 1e6:.0f} MB + 256 MB",
            flush=True,
        )
    shutil.rmtree(output, ignore_errors=True)


def any_of(*names: str) -> dict[str, Any]:
    """For an argument that takes any number of these. Python 3.11 looks for a default that is a list in ``choices``."""

    def name(given: str) -> str:
        if given not in names:
            raise argparse.ArgumentTypeError(f"{given!r} is none of {', '.join(names)}")
        return given

    return {"nargs": "*", "type": name, "metavar": f"{{{','.join(names)}}}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", **any_of("llama", "cp", "memory"), default=["llama", "cp", "memory"])
    parser.add_argument("--place", type=Path, default=Path(".bench"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}", flush=True)
    arguments.place.mkdir(parents=True, exist_ok=True)
    for what in arguments.what:
        if what == "llama":
            against_transformers(arguments.place, arguments.rounds)
        elif what == "cp":
            against_cp(arguments.place, arguments.rounds)
        else:
            memory(arguments.place)


if __name__ == "__main__":
    main()
