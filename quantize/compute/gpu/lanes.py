"""One chunk at a time on a device: copied there, computed, copied back; on CUDA on streams of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch  # noqa: TID253 (this module is imported lazily)

from qz.quantize.compute.gpu.torch_kernels import DTYPES

Tensors = Sequence[torch.Tensor]
Computed = tuple[torch.Tensor | None, Tensors]
"""At most two numbers that are finite if all are that must be, and the results, each of one dimension and at least as
long as asked for."""


class Lane:
    """One chunk at a time on a device: copied there, computed, copied back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def run(self, inputs: Tensors, compute: Callable[..., Computed], outs: Tensors) -> bool:
        """Fill ``outs``, in host memory, with what ``compute`` makes of ``inputs``; whether all it checks is finite."""
        checked, results = compute(*(each.to(self.device) for each in inputs))
        for out, result in zip(outs, results, strict=True):
            out.copy_(result[: out.numel()])
        return checked is None or _are_finite(checked)


class CudaLane(Lane):
    """A lane with a stream for its copies, so that they overlap with the kernels and copies of other lanes.

    bitsandbytes launches its quantizing kernels on the default stream, whatever stream is current (0.50.2,
    backends/cuda/ops.py), and torch's streams do not wait for that one by themselves. So all kernels go there, between
    two events. They take microseconds a chunk; the copies take the time.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.kernels = torch.cuda.default_stream(device)
        self.computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.checked = {dtype: torch.empty(2, dtype=dtype, pin_memory=True) for dtype in DTYPES.values()}

    def run(self, inputs: Tensors, compute: Callable[..., Computed], outs: Tensors) -> bool:
        with torch.cuda.stream(self.stream):
            there = [each.to(self.device, non_blocking=True) for each in inputs]
            # A device that was lost is noticed here, by torch: bitsandbytes' own check ends the process.
            self.stream.synchronize()
        with torch.cuda.stream(self.kernels):
            checked, results = compute(*there)
            self.computed.record(self.kernels)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.computed)
            for out, result in zip(outs, results, strict=True):
                out.copy_(result[: out.numel()], non_blocking=True)
            if checked is not None:
                self.checked[checked.dtype].copy_(checked, non_blocking=True)
            self.stream.synchronize()
        return checked is None or _are_finite(self.checked[checked.dtype])


def lane(device: torch.device) -> Lane:
    """A lane of the kind that ``device`` needs."""
    return CudaLane(device) if device.type == "cuda" else Lane(device)


def extremes(values: torch.Tensor) -> torch.Tensor:
    """The least and the greatest value, in their dtype [2]; NaN, if there is one. One pass, no memory."""
    found = values.new_empty(2)
    torch.aminmax(values, out=(found[0], found[1]))
    return found


def _are_finite(values: torch.Tensor) -> bool:
    return all(map(math.isfinite, values.tolist()))
