"""A checkpoint whose data are one pattern, repeated: what bitsandbytes makes of that says what is to be written.

The pattern's length is a multiple of a block, and of nothing that a transport cuts files into.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

VALUES = (1 << 25) - 64
BLOCK = 64
"""Values with a scale in common."""


def values() -> Any:
    import torch

    return torch.randn(VALUES, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


def write(path: Path) -> Path:
    """The pattern as bytes."""
    import torch

    path.write_bytes(values().view(torch.uint8).numpy().tobytes())
    return path


def differing(source: Path, output: Path) -> list[str]:
    """What in ``output``, which is NF4 without double quantization, bitsandbytes would not have written, by name.

    ``source``: the checkpoint, of which only the headers are read.
    """
    import bitsandbytes.functional as bnb
    import torch

    pattern = values()
    packed, state = bnb.quantize_4bit(pattern, blocksize=BLOCK, quant_type="nf4")
    stored, scales, numbers = packed.numpy().ravel(), state.absmax.numpy(), pattern.view(torch.uint8).numpy()
    written = {name: data for file in output.glob("*.safetensors") for name, data in _tensors(file)}
    wrong: list[str] = []

    def compare(name: str, place: int, count: int, of: Any) -> None:
        """``place`` and ``count`` in items of ``of``."""
        data = written.pop(name, b"")
        if len(data) != count * of.itemsize:
            wrong.append(name)
            return
        found, start = np.frombuffer(data, of.dtype), 0
        while start < count:
            at = (place + start) % len(of)
            part = of[at : at + count - start]
            if not np.array_equal(found[start : start + len(part)], part):
                wrong.append(name)
                return
            start += len(part)

    for file in sorted(source.glob("*.safetensors")):
        for name, (start, stop), shape in _layout(file)[1]:
            if f"{name}.absmax" not in written:
                compare(name, start, stop - start, numbers)
                continue
            assert start % (2 * BLOCK) == (stop - start) % (2 * BLOCK) == 0, f"{name} is not made of whole blocks"
            compare(name, start // 4, (stop - start) // 4, stored)
            compare(f"{name}.absmax", start // (2 * BLOCK), (stop - start) // (2 * BLOCK), scales)
            state.shape = torch.Size(shape)
            for key, value in state.as_dict(packed=True).items():
                if key != "absmax":
                    compare(f"{name}.{key}", 0, value.numel(), value.numpy())
    return wrong + sorted(written)


def _layout(file: Path) -> tuple[int, list[tuple[str, tuple[int, int], list[int]]]]:
    """Where the data begin; each tensor's name, its bytes from there, and its shape."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return 8 + size, [(name, tuple(each["data_offsets"]), each["shape"]) for name, each in header.items()]


def _tensors(file: Path) -> list[tuple[str, Any]]:
    start, tensors = _layout(file)
    data = np.memmap(file, np.uint8, "r", start)
    return [(name, data[first:last]) for name, (first, last), _ in tensors]
