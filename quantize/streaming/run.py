"""The streaming pipeline: chunks of the source are read, cast, quantized and written, in bounded memory.

Every worker thread holds one chunk at a time: it reads the chunk by offset, computes with the GIL released, and writes
the results at their known offsets. A tensor is never in memory as a whole, except where its layout must change
(``Conv1D``, the library's own merges and splits).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qz import MalformedInput
from qz.formats.checkpoint.survey import StoredTensor
from qz.formats.folder import Folder, Range
from qz.formats.output.staging import IsVerified, Section, ShardLayout, ShardWriter, Staging, WrittenFile
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.compute.arithmetic import Arithmetic
from qz.quantize.compute.arrays import NUMPY, Bytes, Memory, count_nonfinite, values
from qz.quantize.compute.kernels import QUANT_MAPS, NonFinite, dequantize_absmax, nested_quant_map
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES, Saved
from qz.quantize.methods import BLOCK_SIZE, NESTED_BLOCK_SIZE, FourBit
from qz.quantize.planning.computable import cast_by_torch
from qz.quantize.planning.plan import Plan, Step
from qz.quantize.planning.sources import Packed, stored_parts
from qz.quantize.streaming.deferred import Deferred, deferred
from qz.quantize.streaming.not_finite import NotFinite
from qz.quantize.streaming.observer import Observer, Values
from qz.quantize.streaming.readers import Reader, assemble, reader
from qz.quantize.streaming.workers import Workers

WHOLE_BYTES = 48 << 20
"""How many bytes of weights that cannot be cut are in memory at the same time, unless a single one is larger."""
FINISHING = 8
"""Shards that are read back, hashed and stored at a time, beside the work on others."""


@dataclass(slots=True)
class _Work:
    """A step under way."""

    step: Step
    chunks: int
    reader: Reader | None = None
    """Of the one source; None where there are several, or the whole is read at once."""
    nonfinite: int = 0
    first: int = -1
    absmax: NDArray[np.float32] | None = None
    """All of the weight's scales, kept where they are quantized too, or codes are chosen for them afterwards."""
    deferred: list[Deferred] = field(default_factory=list)
    """Values that get their codes when the scales are known as a loader will see them."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Values ``[start, stop)`` of a work's one source tensor, or the whole of a work that cannot be cut."""

    work: _Work
    start: int
    stop: int
    whole: bool = False


class DiscardOutput:
    """A staging area that keeps nothing: the pipeline as a reading of the source."""

    finished: Mapping[str, WrittenFile] = MappingProxyType({})

    def open_shard(self, layout: ShardLayout, is_verified: IsVerified) -> _DiscardedShard:  # noqa: ARG002 - as a staging area has it
        return _DiscardedShard(layout.file)

    def read_staged(self, name: str, offset: int, buffer: memoryview) -> bool:  # noqa: ARG002
        return False

    def give_up(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _DiscardedShard:
    file: str

    def write(self, tensor: str, data: Any, offset: int = 0) -> None: ...

    def write_variable(self, tensor: str, data: bytes) -> None: ...

    def finish(self) -> WrittenFile:
        return WrittenFile(self.file, 0, "")


class Run:
    """One conversion of a plan into a staging area, by several threads."""

    def __init__(
        self,
        plan: Plan,
        folder: Folder,
        staging: Staging | Section | DiscardOutput,
        arithmetic: Arithmetic,
        progress: OnProgress = ignore,
        *,
        allow_nonfinite: bool = False,
        observer: Observer | None = None,
        only: Container[str] | None = None,
    ) -> None:
        """``allow_nonfinite``: weights with values that are not finite are noted in ``nonfinite``, not refused.

        ``observer`` sees what is computed. ``only`` names the weights to convert, into ``DiscardOutput``: no shard is
        complete.
        """
        self.plan = plan
        self.folder = folder
        self.staging = staging
        self.arithmetic = arithmetic
        self.progress = progress
        self.allow_nonfinite = allow_nonfinite
        self.observer = observer
        self.nonfinite: set[str] = set()
        self.kept_nonfinite: dict[str, NotFinite] = {}
        """Of tensors that are not quantized, by their name in the output: what is not finite in it."""
        self.writers: dict[int, ShardWriter | _DiscardedShard] = {}
        self.written: dict[str, WrittenFile] = dict(staging.finished)
        self.lock = threading.Lock()
        self.workers = Workers()
        self.room = threading.Condition()
        self.in_memory = 0
        self.alone = True
        """One thread does everything, one after the other."""
        self.finishers = threading.Semaphore(FINISHING)
        self.left: dict[int, int] = {}
        for home in plan.shard_of.values():
            if plan.shards[home].file not in self.written:
                self.left[home] = self.left.get(home, 0) + 1
        self.steps = [
            step
            for step in plan.steps
            if any(self._open(saved) for saved in step.outputs) and (only is None or step.weight.name in only)
        ]
        self.all_bytes = sum(source.nbytes for step in self.steps for source in step.sources)
        self.bytes_done = 0
        self.weights_done = 0

    def convert(self, threads: int) -> None:
        """Write every unfinished shard, then check that the source did not change while it was read."""
        self.folder.announce(
            [
                Range(part.file, part.offset, part.offset + part.nbytes)
                for step in self.steps
                for part in _streamed(step)
            ]
        )
        sources = self._sources()
        for home in self.left:
            self.writers[home] = self.staging.open_shard(self.plan.shards[home], self._settled(sources[home]))
        chunks = self._chunks()
        self.alone = threads <= 1
        try:
            for _ in range(max(1, threads)):
                self.workers.begin(self._work, chunks)
            self.workers.wait(on_error=self._give_up)
        except BaseException:
            self.workers.stop.set()
            self._give_up()
            raise
        finally:
            self.workers.stop.set()
            self.workers.wait(on_error=self._give_up)
        if self.workers.errors:
            raise self.workers.errors[0]
        self.folder.check()

    def look_again(self, threads: int, elsewhere: Container[str] = ()) -> None:
        """Read what an earlier run had finished and did not quantize, for values in it that are not finite.

        ``elsewhere``: shards that others make and look at.
        """
        done_now = {step.weight.name for step in self.steps}
        left = [
            step
            for step in self.plan.steps
            if step.act == "keep" and step.weight.name not in done_now and not self._is_elsewhere(step, elsewhere)
        ]
        buffers = _Buffers(self.arithmetic)
        only = {step.weight.name for step in left if not self._finished_is_finite(step, buffers)}
        if only:
            again = Run(self.plan, self.folder, DiscardOutput(), self.arithmetic, only=only)
            again.convert(threads)
            self.kept_nonfinite |= again.kept_nonfinite

    def _is_elsewhere(self, step: Step, files: Container[str]) -> bool:
        """Whether all that a step writes lies in ``files``."""
        return all(self.plan.shards[self.plan.shard_of[saved.name]].file in files for saved in step.outputs)

    def _finished_is_finite(self, step: Step, buffers: _Buffers) -> bool:
        """Whether the output of an earlier run has finite values only: it is nearer than a source on the Hub."""
        for saved in step.outputs:
            layout = self.plan.shards[self.plan.shard_of[saved.name]]
            [place] = [tensor for tensor in layout.tensors if tensor.name == saved.name]
            for start in range(place.start, place.stop, self.arithmetic.chunk_bytes):
                raw = buffers.get("raw", min(self.arithmetic.chunk_bytes, place.stop - start))
                if not self.staging.read_staged(layout.file, layout.header_size + start, raw.data):
                    return False
                if count_nonfinite(values(raw, place.dtype), place.dtype, buffers.get):
                    return False
        return True

    def _give_up(self) -> None:
        """Let no thread wait for what is no longer wanted."""
        self.folder.give_up()
        self.staging.give_up()
        if self.observer is not None:
            self.observer.give_up()

    def _sources(self) -> dict[int, set[str]]:
        """Of each unfinished shard the files that it is made of."""
        found: dict[int, set[str]] = {home: set() for home in self.left}
        for step in self.steps:
            for home in {self.plan.shard_of[saved.name] for saved in step.outputs} & found.keys():
                for source in step.sources:
                    found[home] |= {part.file for part in stored_parts(source)}
        return found

    def _settled(self, files: set[str]) -> Callable[[], bool]:
        return lambda: all(self.folder.is_verified(file) for file in files)

    def _open(self, saved: Saved) -> bool:
        """Whether an output still has to be written."""
        return self.plan.shard_of[saved.name] in self.left

    def _chunks(self) -> Iterator[_Chunk]:
        for step in self.steps:
            weight, source = step.weight, step.sources[0]
            if weight.conversion is not None or weight.transposed or self._has_hessian(step) or cast_by_torch(step):
                yield _Chunk(_Work(step, 1), 0, 0, whole=True)
                continue
            count = weight.count
            opened = reader(self.folder, source, self.arithmetic)
            work = _Work(step, 0, opened)
            unit = _unit(step, self.plan, opened)
            widest = max(source.nbytes, count * _itemsize(source.dtype))
            length = max(unit, self.arithmetic.chunk_bytes * count // max(widest, 1) // unit * unit)
            starts = range(0, count, length) if count else [0]
            work.chunks = len(starts)
            if self._keeps_scales(step):
                work.absmax = np.empty(-(-count // BLOCK_SIZE), np.float32)
            for start in starts:
                yield _Chunk(work, start, min(start + length, count))

    def _has_hessian(self, step: Step) -> bool:
        """Whether a weight's codes are found by GPTQ, which needs all of it at once."""
        refined = self.plan.refinement
        return refined is not None and step.weight.quantized and step.weight.name in refined.hessians

    def _keeps_scales(self, step: Step) -> bool:
        method = self.plan.method
        return step.weight.quantized and method is not None and (method.double_quant or self._has_hessian(step))

    def _work(self, chunks: Iterator[_Chunk]) -> None:
        buffers = _Buffers(self.arithmetic)
        while not self.workers.stop.is_set():
            with self.lock:
                chunk = next(chunks, None)
            if chunk is None:
                return
            done = self._whole(chunk.work) if chunk.whole else self._part(chunk, buffers)
            self._count(chunk, done)

    def _part(self, chunk: _Chunk, buffers: _Buffers) -> int:
        """Read, compute and write one chunk; the bytes read."""
        step, weight, source = chunk.work.step, chunk.work.step.weight, chunk.work.step.sources[0]
        count = chunk.stop - chunk.start
        target = SAFETENSORS_NAMES[weight.dtype]
        assert chunk.work.reader is not None
        raw, dtype = chunk.work.reader.read(chunk.start, chunk.stop, target, buffers.get)
        original = (values(raw, dtype), dtype)
        if dtype != target:
            cast = buffers.get("cast", count * _itemsize(target))
            self.arithmetic.cast(values(raw, dtype), dtype, target, cast.view(NUMPY[target]))
            raw = cast
        if weight.quantized:
            self._quantize(chunk.work, values(raw, target), chunk.start, buffers, original)
        else:
            self._look_at_kept(step, original, (values(raw, target), target), buffers.get)
            self._write(step.outputs[0], raw, chunk.start * raw.nbytes // max(count, 1))
            if self.observer is not None and step.act == "dequantize":
                self.observer.dequantized(step, chunk.start, (values(raw, target), target), buffers.get)
        return source.nbytes * chunk.stop // max(weight.count, 1) - source.nbytes * chunk.start // max(weight.count, 1)

    def _look_at_kept(self, step: Step, before: Values, after: Values, memory: Memory) -> None:
        """Note values that are not finite, or no more after the cast. Dequantized ones can overflow float16 only."""
        computed = any(isinstance(source, Packed) for source in step.sources)  # from finite scales, by finite codes
        if computed and after[1] != "F16":
            return
        count = count_nonfinite(*after, memory)
        if count:
            stored = count_nonfinite(*before, memory) if before[1] != after[1] else count
            if computed:
                stored = 0
            name = step.outputs[0].name
            with self.lock:
                known = self.kept_nonfinite.get(name, NotFinite(0, 0))
                self.kept_nonfinite[name] = NotFinite(known.stored + stored, known.overflowed + count - stored)

    def _whole(self, work: _Work) -> int:
        """A weight that is not cut: it is merged, split or transposed, or torch casts it. Large ones take turns."""
        target = SAFETENSORS_NAMES[work.step.weight.dtype]
        done = sum(source.nbytes for source in work.step.sources)
        nbytes = max(done, work.step.weight.count * _itemsize(target))
        with self.room:
            self.room.wait_for(lambda: not self.in_memory or self.in_memory + nbytes <= WHOLE_BYTES)
            self.in_memory += nbytes
        try:
            self._at_once(work, target)
        finally:
            with self.room:
                self.in_memory -= nbytes
                self.room.notify_all()
        return done

    def _at_once(self, work: _Work, target: str) -> None:
        step, weight = work.step, work.step.weight
        raw = assemble(self.folder, weight, step.sources)
        buffers, original = _Buffers(self.arithmetic), (values(raw, target), target)
        if not weight.quantized:
            self._look_at_kept(step, original, original, buffers.get)
            self._write(step.outputs[0], raw, 0)
            if self.observer is not None and step.act == "dequantize":
                self.observer.dequantized(step, 0, original, buffers.get)
        else:
            if self._keeps_scales(step):
                work.absmax = np.empty(-(-weight.count // BLOCK_SIZE), np.float32)
            self._quantize(work, original[0], 0, buffers, original)

    def _quantize(
        self, work: _Work, values: NDArray[Any], start: int, buffers: _Buffers, original: tuple[NDArray[Any], str]
    ) -> None:
        """Quantize ``values`` of the dtype of the weight, which were ``original`` before the cast, and write them."""
        weight, method = work.step.weight, self.plan.method
        dtype = SAFETENSORS_NAMES[weight.dtype]
        outputs = {saved.part: saved for saved in work.step.outputs}
        if isinstance(method, FourBit):
            packed = buffers.get("packed", -(-len(values) // 2))
            blocks = -(-len(values) // BLOCK_SIZE)
            first_block = start // BLOCK_SIZE
            absmax = (
                work.absmax[first_block : first_block + blocks]
                if work.absmax is not None
                else buffers.get("absmax", blocks * 4).view(np.float32)
            )
            refined = self.plan.refinement
            if refined is None:
                found = self.arithmetic.quantize_4bit(values, dtype, method.quant_type, packed, absmax)
            else:
                weights, column = refined.weights.get(weight.name), start % max(weight.shape[1], 1)
                found = self.arithmetic.search_4bit(values, dtype, method.quant_type, weights, column, packed, absmax)
                if work.absmax is not None:
                    work.deferred.append(deferred(start, (values, dtype), original, observed=self.observer is not None))
                    self._note_nonfinite(work, start, found)
                    return
            self._write(outputs["weight"], packed, start // 2)
            if work.absmax is None:
                self._write(outputs["weight.absmax"], absmax, first_block * 4)
            if self.observer is not None:
                self.observer.quantized(work.step, method, start, original, packed, absmax, buffers.get)
        else:
            columns = weight.shape[1]
            rows = len(values) // columns
            codes = buffers.get("codes", len(values)).view(np.int8).reshape(rows, columns)
            scb = buffers.get("scb", rows * 4).view(np.float32)
            found = self.arithmetic.quantize_int8(values.reshape(rows, columns), dtype, codes, scb)
            self._write(outputs["weight"], codes, start)
            self._write(outputs["SCB"], scb, start // columns * 4)
            if self.observer is not None and method is not None:
                self.observer.quantized(work.step, method, start, original, codes, scb, buffers.get)
        self._note_nonfinite(work, start, found)

    def _note_nonfinite(self, work: _Work, start: int, found: NonFinite) -> None:
        if found.count:
            with self.lock:
                first = start + found.first
                work.first = first if work.first < 0 else min(work.first, first)
                work.nonfinite += found.count

    def _count(self, chunk: _Chunk, nbytes: int) -> None:
        """Book a finished chunk; complete its weight and its shards when it was their last."""
        work = chunk.work
        with self.lock:
            work.chunks -= 1
            self.bytes_done += nbytes
            last = work.chunks == 0
        if last:
            self._complete(work)
        self._report(None)

    def _complete(self, work: _Work) -> None:
        if work.nonfinite:
            if not self.allow_nonfinite:
                raise _nonfinite(work, self.plan)
            self.nonfinite.add(work.step.weight.name)
        if work.step.weight.quantized:
            self._companions(work)
        ready = []
        with self.lock:
            self.weights_done += 1
            for saved in work.step.outputs:
                home = self.plan.shard_of[saved.name]
                if home in self.left:
                    self.left[home] -= 1
                    if self.left[home] == 0:
                        ready.append(home)
        for home in ready:
            writer = self.writers.pop(home)
            if self.alone:
                self._finish(writer)
                continue
            self.finishers.acquire()
            try:
                self.workers.begin(self._finish_beside, writer)
            except BaseException:
                self.finishers.release()
                raise

    def _finish(self, writer: ShardWriter | _DiscardedShard) -> None:
        written = writer.finish()
        self.written[written.name] = written
        self._report(written.name)

    def _finish_beside(self, writer: ShardWriter | _DiscardedShard) -> None:
        """Complete a shard while others are worked on: reading it back, hashing and storing it takes a while."""
        try:
            self._finish(writer)
        finally:
            self.finishers.release()

    def _companions(self, work: _Work) -> None:
        """The small tensors beside a weight: maps, nested statistics, quant state, weight format."""
        weight, method = work.step.weight, self.plan.method
        outputs = {saved.part: saved for saved in work.step.outputs}
        if not isinstance(method, FourBit):
            self._write(outputs["weight_format"], np.zeros(1, np.uint8), 0)
            return
        self._write(outputs["weight.quant_map"], QUANT_MAPS[method.quant_type], 0)
        state = outputs[f"weight.quant_state.bitsandbytes__{method.quant_type}"]
        if work.absmax is not None and not method.double_quant:
            self._encode_deferred(work, method, work.absmax)
            self._write(outputs["weight.absmax"], work.absmax, 0)
            work.absmax = None
        if work.absmax is None:
            self._write(state, np.frombuffer(method.quant_state(weight.shape, weight.dtype), np.uint8), 0)
            return
        absmax, nested_absmax, offset = self.arithmetic.quantize_absmax(work.absmax)
        work.absmax = None
        if self.observer is not None or work.deferred:
            again = dequantize_absmax(absmax, nested_absmax, nested_quant_map(), offset, NESTED_BLOCK_SIZE)
            self._encode_deferred(work, method, again)
            if self.observer is not None:
                self.observer.absmax_known(work.step, method, again)
        self._write(outputs["weight.absmax"], absmax, 0)
        self._write(outputs["weight.nested_absmax"], nested_absmax, 0)
        self._write(outputs["weight.nested_quant_map"], nested_quant_map(), 0)
        if self._open(state):
            writer = self.writers[self.plan.shard_of[state.name]]
            writer.write_variable(state.name, method.quant_state(weight.shape, weight.dtype, offset))

    def _encode_deferred(self, work: _Work, method: FourBit, absmax: NDArray[np.float32]) -> None:
        """Choose and write the codes of values that waited for their scales: those scales decide what is nearest."""
        saved = next(saved for saved in work.step.outputs if saved.part == "weight")
        buffers, dtype = _Buffers(self.arithmetic), SAFETENSORS_NAMES[work.step.weight.dtype]
        refined, name = self.plan.refinement, work.step.weight.name
        for each in sorted(work.deferred, key=lambda each: each.start):
            count, first = len(each.values), each.start // BLOCK_SIZE
            scales = absmax[first : first - (-count // BLOCK_SIZE)]
            packed = buffers.get("packed", -(-count // 2))
            if refined is not None and name in refined.hessians:
                values = each.values.reshape(work.step.weight.shape)
                hessian = refined.hessian(name)
                self.arithmetic.gptq_4bit(values, dtype, method.quant_type, scales, hessian, packed)
            else:
                self.arithmetic.encode_4bit(each.values, dtype, method.quant_type, scales, packed)
            self._write(saved, packed, each.start // 2)
            if self.observer is not None and each.original is not None:
                self.observer.quantized(work.step, method, each.start, each.original, packed, scales, buffers.get)
        work.deferred.clear()

    def _write(self, saved: Saved, data: NDArray[Any], offset: int) -> None:
        """Write bytes of an output tensor, unless an earlier run finished its shard."""
        if self._open(saved):
            self.writers[self.plan.shard_of[saved.name]].write(saved.name, memoryview(data).cast("B"), offset)

    def _report(self, shard: str | None) -> None:
        doing = "Dequantizing" if self.plan.method is None else "Quantizing"
        total = len(self.steps)
        self.progress(Progress(doing, self.weights_done, total, self.bytes_done, self.all_bytes, file=shard))


class _Buffers:
    """One thread's reusable memory, by use."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.arithmetic = arithmetic
        self.held: dict[str, Bytes] = {}

    def get(self, use: str, nbytes: int) -> Bytes:
        held = self.held.get(use)
        if held is None or held.nbytes < nbytes:
            held = self.held[use] = self.arithmetic.buffer(nbytes)
        return held[:nbytes]


def _streamed(step: Step) -> Iterator[StoredTensor]:
    """What a step reads from one end to the other; of weights that bitsandbytes quantized the codes."""
    for source in step.sources:
        if isinstance(source, Packed):
            yield source.weight.parts["weight"]
        else:
            yield from stored_parts(source)


def _unit(step: Step, plan: Plan, source: Reader) -> int:
    """Values that must stay in one chunk: a row for int8, a double block (whole bytes) for 4 bit, one otherwise."""
    if not step.weight.quantized:
        return source.unit
    return math.lcm(source.unit, 2 * BLOCK_SIZE if isinstance(plan.method, FourBit) else step.weight.shape[1])


def _itemsize(dtype: str) -> int:
    return np.dtype(NUMPY[dtype]).itemsize if dtype in NUMPY else 1


def _nonfinite(work: _Work, plan: Plan) -> MalformedInput:
    weight = work.step.weight
    position = [int(i) for i in np.unravel_index(work.first, weight.shape)]
    beyond = " (or beyond float16's range)" if plan.method is not None and plan.method.bits == 8 else ""
    values = "value" if work.nonfinite == 1 else "values"
    return MalformedInput(
        f"{weight.sources[0]} contains {work.nonfinite} NaN or infinite {values}{beyond}, first at {position}, "
        "which would corrupt its quantization block. Repair the weights, or use --keep-nonfinite to leave such tensors "
        "unquantized."
    )
