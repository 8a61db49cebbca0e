"""The CPU kernels against bitsandbytes' own operations: same data, same process, one torch thread each.

Every pair runs the two right after one another and compares their bytes; the figures are medians over the pairs. qz's
kernels write into buffers that are reused, as the pipeline does; bitsandbytes' operations allocate their results.

    python benchmarks/kernels.py [--rows 12288] [--cols 3072] [--pairs 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import numpy as np
import numpy.typing as npt
import torch

from qz.quantize.compute import backends, kernels

Array = npt.NDArray[Any]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TARGETS = {"nf4 BF16": 25.0, "int8 BF16": 7.0}
"""Ratios that docs promise."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One kernel. Speeds in GB/s of the wide side: input when quantizing, output when dequantizing."""

    kernel: str
    qz: float
    bitsandbytes: float
    ratio: float
    target: float | None
    identical: bool
    but_for_zeros: bool = False
    """Whether all but the signs of zeros is the same, of which bitsandbytes' portable code has others in FP4."""


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(
    name: str,
    size: int,
    pairs: int,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    same: bool,
    but_for_zeros: bool = False,
) -> Figure:
    times = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    return Figure(
        kernel=name,
        qz=size / statistics.median(mine for mine, _ in times) / 1e9,
        bitsandbytes=size / statistics.median(other for _, other in times) / 1e9,
        ratio=statistics.median(other / mine for mine, other in times),
        target=TARGETS.get(name),
        identical=same,
        but_for_zeros=but_for_zeros,
    )


def to_numpy(values: torch.Tensor) -> Array:
    plain: Array = values.view(torch.uint16).numpy() if values.dtype.itemsize == 2 else values.numpy()
    return plain


def four_bit(weight: torch.Tensor, dtype: str, quant_type: Literal["nf4", "fp4"], pairs: int) -> list[Figure]:
    values = to_numpy(weight).reshape(-1)
    packed, absmax = np.empty(values.size // 2, np.uint8), np.empty(values.size // 64, np.float32)
    out = np.empty_like(values)

    def ours() -> None:
        kernels.quantize_4bit(values, dtype, quant_type, packed, absmax)

    def theirs() -> Any:
        return torch.ops.bitsandbytes.quantize_4bit(weight, 64, quant_type, torch.uint8)

    def ours_back() -> None:
        kernels.dequantize_4bit(packed, absmax, quant_type, 64, dtype, out)

    reference_packed, reference_absmax = theirs()

    def theirs_back() -> Any:
        return torch.ops.bitsandbytes.dequantize_4bit(
            reference_packed, reference_absmax, 64, quant_type, weight.shape, weight.dtype
        )

    ours()
    ours_back()
    same = bool((packed == reference_packed.numpy().reshape(-1)).all() and (absmax == reference_absmax.numpy()).all())
    reference = to_numpy(theirs_back()).reshape(-1)
    same_back = out.tobytes() == reference.tobytes()
    of_zeros = not same_back and bool((unsigned_zeros(out) == unsigned_zeros(reference)).all())
    name = f"{quant_type} {dtype}"
    return [
        compare(name, values.nbytes, pairs, ours, theirs, same),
        compare(f"{name} back", values.nbytes, pairs, ours_back, theirs_back, same_back, of_zeros),
    ]


def unsigned_zeros(values: Array) -> Array:
    """Floats, or the bits of 16-bit ones, with +0.0 in the place of -0.0."""
    return np.where(values == 0x8000, 0, values) if values.dtype == np.uint16 else values + 0


def eight_bit(weight: torch.Tensor, dtype: str, pairs: int) -> list[Figure]:
    values = to_numpy(weight)
    quantized, scb = np.empty(values.shape, np.int8), np.empty(len(values), np.float32)
    out = np.empty_like(values)

    def ours() -> None:
        kernels.quantize_int8(values, dtype, quantized, scb)

    def theirs() -> Any:
        return bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")

    def ours_back() -> None:
        kernels.dequantize_int8(quantized, scb, dtype, out)

    reference = theirs()

    def theirs_back() -> torch.Tensor:
        values: torch.Tensor = bnb_functional.int8_vectorwise_dequant(reference.data, reference.SCB)
        return values.to(weight.dtype)

    ours()
    ours_back()
    same = bool((quantized == reference.data.numpy()).all() and (scb == reference.SCB.numpy()).all())
    same_back = bool((out == to_numpy(theirs_back())).all())
    return [
        compare(f"int8 {dtype}", values.nbytes, pairs, ours, theirs, same),
        compare(f"int8 {dtype} back", values.nbytes, pairs, ours_back, theirs_back, same_back),
    ]


def double_quant(weight: torch.Tensor, pairs: int) -> Figure:
    absmax = weight.float().reshape(-1, 64).abs().amax(dim=1)
    values = absmax.numpy()

    def theirs() -> Any:
        offset = absmax.mean()
        return *bnb_functional.quantize_blockwise(absmax - offset, blocksize=256), offset

    quantized, nested, offset = kernels.quantize_absmax(values)
    codes, state, reference_offset = theirs()
    same = bool((quantized == codes.numpy()).all() and (nested == state.absmax.numpy()).all())
    same = same and offset == reference_offset.item()
    return compare("absmax", values.nbytes, pairs, lambda: kernels.quantize_absmax(values), theirs, same)


def measure(rows: int, cols: int, pairs: int) -> list[Figure]:
    """All kernels on a normal weight of this shape. Prints nothing."""
    torch.set_num_threads(1)
    normal = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.02
    figures: list[Figure] = []
    for dtype, torch_dtype in DTYPES.items():
        weight = normal.to(torch_dtype)
        for quant_type in ("nf4", "fp4") if dtype == "BF16" else ("nf4",):
            figures += four_bit(weight, dtype, quant_type, pairs)
        figures += eight_bit(weight, dtype, pairs)
    figures.append(double_quant(normal, pairs))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12288)
    parser.add_argument("--cols", type=int, default=3072)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = measure(options.rows, options.cols, options.pairs)
    if options.json:
        print(json.dumps([asdict(figure) for figure in figures], indent=2))
        return
    backend = backends.backend().__name__.rpartition("_")[2]
    print(f"({options.rows}, {options.cols}), one thread, {backend}; GB/s of input (back: of output)\n")
    print(f"{'kernel':<16}{'qz':>8}{'bnb':>8}{'ratio':>8}{'target':>8}  bytes")
    for figure in figures:
        target = "" if figure.target is None else f"{figure.target:.0f}×"
        same = "identical" if figure.identical else "all but -0.0" if figure.but_for_zeros else "DIFFERENT"
        print(
            f"{figure.kernel:<16}{figure.qz:>8.2f}{figure.bitsandbytes:>8.2f}{figure.ratio:>7.1f}×{target:>8}  {same}"
        )


if __name__ == "__main__":
    main()
