"""The arithmetic on GPUs: bitsandbytes' own operations there, fed from page-locked memory on streams of their own.

Copies in, kernels and copies out of several chunks overlap, and with them the reading and writing of the threads that
bring the chunks. Any number of like GPUs of one host share the work; what they write is what the libraries write there.
"""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch  # noqa: TID253 (this module is imported lazily)
from numpy.typing import NDArray

from qz import TryAgain
from qz.out_of_memory import is_out_of_memory
from qz.quantize.compute.cores import usable_cores
from qz.quantize.compute.gpu import gptq
from qz.quantize.compute.gpu.lanes import Computed, Lane, extremes, lane
from qz.quantize.compute.gpu.torch_kernels import DTYPES, tensor
from qz.quantize.compute.gpu.torch_search import BlockWeights, encode, improve, packed_codes
from qz.quantize.compute.kernels import NonFinite
from qz.quantize.libraries.importing.lean_imports import lean_imports
from qz.quantize.methods import BLOCK_SIZE, NESTED_BLOCK_SIZE

if TYPE_CHECKING:
    from qz.quantize.compute.arrays import Bytes
    from qz.quantize.methods import QuantType

CHUNK_BYTES = 32 << 20
"""Source bytes of a chunk: enough for full speed over PCIe, and a power of two, to which torch rounds pinned memory."""
WHOLE = 0
"""Of an input that is not cut into pieces."""
LEAST_BYTES = 1 << 20
"""The smallest piece of a chunk that is tried when the device runs out of memory."""
LANES = 3
"""Chunks on one GPU at a time: one copied in, one computed, one copied out. Bounds the memory used there."""
THREADS = 8
"""Threads that read and write for one GPU; each holds about 1.3 chunks of page-locked memory."""

EXPERIMENTAL = ("xpu", "mps")
"""Kinds of devices that qz was never run on."""

_of_lost: list[object] = []
"""Memory of a GPU that stopped working: to free it throws where nothing can catch. The command ends without that."""


class Accelerator:
    """An ``Arithmetic`` on devices of one kind; results do not depend on how many there are, nor on the chunks.

    ``name`` is the device as the user names it, ``model`` what it calls itself. Every operation may be called from many
    threads, and raises TryAgain when the device lacks memory even for small pieces, or stops working.
    """

    def __init__(self, devices: Sequence[torch.device], name: str, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Tries an operation of bitsandbytes on each device, and raises what that raises."""
        self.devices, self.name, self.chunk_bytes = tuple(devices), name, chunk_bytes
        self.bytes_of = name.partition(":")[0]
        self.model = model_of(self.devices[0])
        self.notes: tuple[str, ...] = _notes(self.devices[0].type)
        self._piece_bytes = chunk_bytes
        self._whole = threading.Lock()
        self._factors = gptq.Factors()
        self._buffers: list[weakref.ref[NDArray[np.uint8]]] = []
        self._lanes: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        with lean_imports():  # at its first call, each operation looks for a compiler
            _import_bitsandbytes()
            for device in self.devices:
                _try_operations(device)
        for _ in range(LANES):
            for device in self.devices:
                self._lanes.put(lane(device))

    @property
    def threads(self) -> int:
        return max(2, min(usable_cores(), THREADS * len(self.devices)))

    def buffer(self, nbytes: int) -> Bytes:
        """Page-locked memory, which a GPU copies from and to by itself; ordinary memory where that is refused."""
        if self.devices[0].type == "cuda":
            try:
                pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
            except RuntimeError:  # the system limits page-locked memory; slower, but correct
                return np.empty(nbytes, np.uint8)
            self._buffers = [each for each in self._buffers if each() is not None] + [weakref.ref(pinned)]
            return pinned
        return np.empty(nbytes, np.uint8)

    def cast(self, values: NDArray[Any], source: str, target: str, out: NDArray[Any]) -> None:
        """As ``torch.Tensor.to``. The libraries cast on the CPU, which differs in the bits it gives to NaN."""
        dtype = DTYPES[target]

        def compute(_: int, part: torch.Tensor) -> Computed:
            return extremes(part), (part.to(dtype),)

        if self._in_pieces(1, [(tensor(values, source), 1)], compute, [(tensor(out, target), 1)]):
            from qz.quantize.compute import kernels

            kernels.cast(values, source, target, out)

    def quantize_4bit(
        self, values: NDArray[Any], dtype: str, quant_type: QuantType, packed: Bytes, absmax: NDArray[np.float32]
    ) -> NonFinite:
        def compute(_: int, part: torch.Tensor) -> Computed:
            codes, scales = torch.ops.bitsandbytes.quantize_4bit(part, BLOCK_SIZE, quant_type, torch.uint8)
            return extremes(part), (codes.view(-1), scales)

        given = tensor(values, dtype)
        outs = [(torch.from_numpy(packed), 2), (torch.from_numpy(absmax), BLOCK_SIZE)]
        return count(given) if self._in_pieces(2 * BLOCK_SIZE, [(given, 1)], compute, outs) else NonFinite(0, -1)

    def search_4bit(
        self,
        values: NDArray[Any],
        dtype: str,
        quant_type: QuantType,
        weights: NDArray[np.float32] | None,
        column: int,
        packed: Bytes,
        absmax: NDArray[np.float32],
    ) -> NonFinite:
        """``quantize_4bit``, then better scales and codes; see ``qz.quantize.compute.scale_search``."""
        given = tensor(values, dtype)
        inputs = [(given, 1)] if weights is None else [(given, 1), (tensor(weights, "F32"), WHOLE)]

        def compute(start: int, part: torch.Tensor, *tiled: torch.Tensor) -> Computed:
            codes, scales = torch.ops.bitsandbytes.quantize_4bit(part, BLOCK_SIZE, quant_type, torch.uint8)
            codes = codes.view(-1)
            of_blocks = BlockWeights(tiled[0], column + start) if tiled else None
            seen = improve(part, of_blocks, quant_type, codes, scales)
            return extremes(part) if seen is None else seen, (codes, scales)

        outs = [(torch.from_numpy(packed), 2), (torch.from_numpy(absmax), BLOCK_SIZE)]
        return count(given) if self._in_pieces(2 * BLOCK_SIZE, inputs, compute, outs) else NonFinite(0, -1)

    def encode_4bit(
        self, values: NDArray[Any], dtype: str, quant_type: QuantType, scales: NDArray[np.float32], packed: Bytes
    ) -> None:
        def compute(_: int, part: torch.Tensor, given: torch.Tensor) -> Computed:
            codes = torch.empty(-(-part.numel() // 2), dtype=torch.uint8, device=part.device)
            encode(part, quant_type, given, codes)
            return None, (codes,)

        inputs = [(tensor(values, dtype), 1), (tensor(scales, "F32"), BLOCK_SIZE)]
        self._in_pieces(2 * BLOCK_SIZE, inputs, compute, [(torch.from_numpy(packed), 2)])

    def gptq_4bit(
        self,
        values: NDArray[Any],
        dtype: str,
        quant_type: QuantType,
        scales: NDArray[np.float32],
        hessian: NDArray[np.float32],
        packed: Bytes,
    ) -> None:
        """One weight at a time, on the first device; see ``qz.quantize.compute.gpu.gptq``."""
        device = self.devices[0]
        given = tensor(values, dtype), tensor(scales, "F32")
        try:
            with self._whole, self._device_errors():
                factor = self._factors.of(hessian, device)
                weight, its_scales = (each.to(device) for each in given)
                codes = gptq.codes(weight, quant_type, its_scales, factor).view(-1)
                packed[:] = packed_codes(codes, quant_type).cpu().numpy()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory() from None

    def quantize_int8(
        self, values: NDArray[Any], dtype: str, weight: NDArray[np.int8], scb: NDArray[np.float32]
    ) -> NonFinite:
        columns = values.shape[1]

        def compute(_: int, part: torch.Tensor) -> Computed:
            half = part.view(-1, columns).to(torch.float16)
            codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(half, 0.0)
            return extremes(half), (codes.view(-1), scales)

        given = tensor(values.reshape(-1), dtype)
        outs = [(torch.from_numpy(weight.reshape(-1)), 1), (torch.from_numpy(scb), columns)]
        found = self._in_pieces(columns, [(given, 1)], compute, outs)
        return count(given.to(torch.float16)) if found else NonFinite(0, -1)

    def quantize_absmax(self, absmax: NDArray[np.float32]) -> tuple[Bytes, NDArray[np.float32], float]:
        """As ``functional.quantize_4bit(compress_statistics=True)``, on the first device, whichever the others are."""
        from bitsandbytes.functional import quantize_blockwise

        def compute(whole: torch.Tensor) -> Computed:
            offset = whole.mean()
            codes, state = quantize_blockwise(whole - offset, blocksize=NESTED_BLOCK_SIZE)
            return None, (codes, state.absmax, offset.view(1))

        nested = torch.empty(-(-absmax.size // NESTED_BLOCK_SIZE))
        codes, offset = torch.empty(absmax.size, dtype=torch.uint8), torch.empty(1)
        try:
            with self._whole, self._device_errors():
                lane(self.devices[0]).run([torch.from_numpy(absmax)], compute, [codes, nested, offset])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory() from None
        return codes.numpy(), nested.numpy(), float(offset)

    def dequantize_4bit(
        self,
        packed: Bytes,
        absmax: NDArray[np.float32],
        quant_type: QuantType,
        blocksize: int,
        dtype: str,
        out: NDArray[Any],
    ) -> None:
        def compute(_: int, codes: torch.Tensor, scales: torch.Tensor) -> Computed:
            length = 2 * codes.numel()  # one more than there are, if the last byte holds one value
            operation = torch.ops.bitsandbytes.dequantize_4bit
            return None, (operation(codes, scales, blocksize, quant_type, [length], DTYPES[dtype]).view(-1),)

        inputs = [(torch.from_numpy(packed), 2), (torch.from_numpy(absmax), blocksize)]
        self._in_pieces(blocksize, inputs, compute, [(tensor(out, dtype), 1)])

    def dequantize_int8(
        self, weight: NDArray[np.int8], scb: NDArray[np.float32], dtype: str, out: NDArray[Any]
    ) -> None:
        columns = weight.shape[1]

        def compute(_: int, codes: torch.Tensor, scales: torch.Tensor) -> Computed:
            values = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes.view(-1, columns), scales)
            return None, (values.view(-1).to(DTYPES[dtype]),)

        inputs = [(torch.from_numpy(weight.reshape(-1)), 1), (torch.from_numpy(scb), columns)]
        self._in_pieces(columns, inputs, compute, [(tensor(out.reshape(-1), dtype), 1)])

    def _in_pieces(
        self,
        unit: int,
        inputs: Sequence[tuple[torch.Tensor, int]],
        compute: Callable[..., Computed],
        outs: Sequence[tuple[torch.Tensor, int]],
    ) -> bool:
        """Compute ``outs`` from ``inputs`` in pieces of whole units of values; whether one that counts is not finite.

        Each tensor comes with the number of values that make one of its elements, or with WHOLE if each piece needs all
        of it. A piece is everything, unless that is long or memory is short. ``compute`` is told its first value, too.
        """
        wide = next(each for each, ratio in (*inputs, *outs) if ratio == 1)
        total, itemsize = wide.numel(), wide.element_size()
        finite, start = True, 0
        while start < total:
            length = max(unit, self._piece_bytes // itemsize // unit * unit)
            stop = min(start + length, total)
            given = [each if ratio == WHOLE else each[start // ratio : -(-stop // ratio)] for each, ratio in inputs]
            parts = [each[start // ratio : -(-stop // ratio)] for each, ratio in outs]
            free = self._lanes.get()
            try:
                with self._device_errors():
                    finite = free.run(given, partial(compute, start), parts) and finite
                start = stop
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                smaller = length * itemsize // 2
                if smaller < LEAST_BYTES:
                    raise self._out_of_memory() from None
                self._piece_bytes = min(self._piece_bytes, smaller)
                _empty_cache(self.devices[0].type)
            finally:
                self._lanes.put(free)
        return not finite

    @contextmanager
    def _device_errors(self) -> Iterator[None]:
        """Turn a device that stopped working into TryAgain."""
        try:
            yield
        except torch.AcceleratorError as error:
            _of_lost.extend([self, *(each() for each in self._buffers)])
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TryAgain(
                f"{self.name} ({self.model}) stopped working: {first_line}. What is finished is kept: run the same "
                "command again to continue, or start over on the CPU with --device cpu --no-resume."
            ) from error

    def _out_of_memory(self) -> TryAgain:
        return TryAgain(
            f"{self.name} ({self.model}) has no memory left{_memory_left(self.devices[0])} for {LEAST_BYTES:,} bytes "
            "of weights. Free GPU memory (close other processes) and run the same command again to continue, or start "
            "over on the CPU with --device cpu --no-resume."
        )


def _empty_cache(kind: str) -> None:
    getattr(torch.get_device_module(kind), "empty_cache", lambda: None)()


def _memory_left(device: torch.device) -> str:
    """How much of its memory is free, where the device tells: not on MPS."""
    ask = getattr(torch.get_device_module(device.type), "mem_get_info", None)
    if ask is None:
        return ""
    free, total = ask(device)
    return f": {free:,} of {total:,} bytes are free, too few"


def _notes(kind: str) -> tuple[str, ...]:
    if kind not in EXPERIMENTAL:
        return ()
    return (f"{kind} is experimental: qz was not tested on such a device. Compare with --device cpu.",)


def _import_bitsandbytes() -> None:
    """Register its operations; its log message about a CPU kernel is not shown."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401


def _try_operations(device: torch.device) -> None:
    """Run everything once, so that what does not work shows before anything is written."""
    from bitsandbytes.functional import quantize_blockwise

    operations = torch.ops.bitsandbytes
    ones = torch.ones(1, BLOCK_SIZE, device=device)
    codes, scales = operations.quantize_4bit(ones, BLOCK_SIZE, "nf4", torch.uint8)
    operations.dequantize_4bit(codes, scales, BLOCK_SIZE, "nf4", [BLOCK_SIZE], torch.float32)
    quantize_blockwise(scales, blocksize=NESTED_BLOCK_SIZE)
    rows, statistics, _ = operations.int8_vectorwise_quant(ones.half(), 0.0)
    operations.int8_vectorwise_dequant(rows, statistics).cpu()


def model_of(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def count(values: torch.Tensor) -> NonFinite:
    """Count the values that are not finite, on the CPU: it is rare, and ends the run."""
    bad = ~torch.isfinite(values.reshape(-1))
    return NonFinite(int(bad.sum()), int(bad.to(torch.uint8).argmax()))
