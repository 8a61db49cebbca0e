"""The way back and the report of the loss, as whole processes on the CPU, in pairs.

    python -m benchmarks.dequantize library   a 1.1 B Llama from NF4 and INT8, against model.dequantize() and its save
    python -m benchmarks.dequantize report    what ``qz quantize --report`` costs beyond ``qz quantize``
    python -m benchmarks.dequantize memory    peak anonymous memory on FLUX.1-dev's transformer (6.7 GB to 23.8 GB)

Inputs are made under --place and kept for the next run: 10 GB of free space, 40 GB for ``memory``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from benchmarks.checkpoints import LLAMA_1B, flux, llama
from benchmarks.whole import QZ, any_of, rounds, run

REFERENCE = """
import sys, torch
from transformers import LlamaForCausalLM
source, output = sys.argv[1:]
model = LlamaForCausalLM.from_pretrained(source, device_map="cpu").dequantize(dtype=torch.bfloat16)
model.save_pretrained(output, max_shard_size="5GB", save_original_format=False)
"""
"""In bfloat16 throughout: without a dtype, what it saves from INT8 is a mix of float32 and bfloat16. With the original
format, transformers 5.23 cannot save a model that it loaded quantized: NotImplementedError."""

METHODS = {"nf4": ["--nf4"], "nf4 + double quant": ["--nf4", "--double-quant"], "int8": ["--int8"]}


def packed(source: Path, method: str) -> Path:
    """``source`` quantized; kept if it is there already."""
    output = source.with_name(f"{source.name}-{method.replace(' ', '')}")
    if not output.exists():
        run([*QZ, "quantize", str(source), *METHODS[method], "-o", str(output), "-q"])
    return output


def against_the_library(place: Path, count: int) -> None:
    original, output = llama(place / "llama-1b", LLAMA_1B), place / "out"
    for method in METHODS:
        source = packed(original, method)
        ours = [*QZ, "dequantize", str(source), "-o", str(output), "-q"]
        theirs = [sys.executable, "-c", REFERENCE, str(source), str(output)]
        rounds(f"1.1 B Llama, {method}", count, output, {"qz": ours, "transformers": theirs})


def cost_of_the_report(place: Path, count: int) -> None:
    source, output = llama(place / "llama-1b", LLAMA_1B), place / "out"
    for method, flags in METHODS.items():
        command = [*QZ, "quantize", str(source), *flags, "-o", str(output), "-q"]
        rounds(f"--report, {method}", count, output, {"without": command, "with --report": [*command, "--report"]})


def memory(place: Path) -> None:
    source, output = packed(flux(place / "flux-holes", holes=True), "nf4"), place / "out"
    imports = "import numba, torch, accelerate\nfrom diffusers import FluxTransformer2DModel"
    baseline = run([sys.executable, "-c", imports])
    largest = 3072 * 18432 * 2
    figure = run([*QZ, "dequantize", str(source), "-o", str(output), "-q"], output)
    print(
        f"FLUX.1-dev from nf4: {figure.wall:6.1f} s, peak {figure.anonymous / 1e6:5.0f} MB anonymous; allowed: "
        f"{baseline.anonymous / 1e6:.0f} MB imports + 3 × {largest / 1e6:.0f} MB + 256 MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", **any_of("library", "report", "memory"), default=["library", "report"])
    parser.add_argument("--place", type=Path, default=Path(".bench"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}", flush=True)
    arguments.place.mkdir(parents=True, exist_ok=True)
    for what in arguments.what:
        if what == "library":
            against_the_library(arguments.place, arguments.rounds)
        elif what == "report":
            cost_of_the_report(arguments.place, arguments.rounds)
        else:
            memory(arguments.place)
        shutil.rmtree(arguments.place / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
