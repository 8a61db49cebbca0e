"""The streaming pipeline: chunks of the source are read, cast, quantized and written, in bounded memory.

Every worker thread holds one chunk at a time: it reads the chunk by offset, computes with the GIL released, and writes
the results at their known offsets. A tensor is never in memory as a whole, except where its layout must change
(``Conv1D``, the library's own merges and splits).
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Container, Iterable, Iterator
from itertools import groupby, islice
from operator import attrgetter

import numpy as np

from qz.formats.files.folder import Folder, Range
from qz.formats.output.section import Section
from qz.formats.output.staging import Staging
from qz.formats.slots import Slots
from qz.formats.tensors.decoded import StoredTensor
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.compute.arithmetic import Arithmetic
from qz.quantize.compute.arrays import NUMPY, Buffers, Memory, count_nonfinite, values
from qz.quantize.decoding.open import Reader
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES
from qz.quantize.methods import BLOCK_SIZE, FourBit
from qz.quantize.planning.computable import cast_by_torch
from qz.quantize.planning.plan import Plan, Step
from qz.quantize.planning.sources import Packed, Stacked, packed_parts, stored_parts, unfused
from qz.quantize.streaming.discard import DiscardOutput
from qz.quantize.streaming.encoder import Encoder
from qz.quantize.streaming.measuring.not_finite import NotFinite, adapters_of, count_without_adapters
from qz.quantize.streaming.measuring.observer import Observer, Values
from qz.quantize.streaming.open_shards import Job, OpenShards
from qz.quantize.streaming.readers import assemble, reader
from qz.quantize.streaming.work import Chunk, Work, nonfinite_weight
from qz.quantize.streaming.workers import Workers

WHOLE_BYTES = 48 << 20
"""How many bytes of weights that cannot be cut are in memory at the same time, unless a single one is larger."""
MOST_JOBS = 8
"""Shards that are read back, hashed or stored at a time, beside the work on others."""


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
        """``allow_nonfinite``: weights to quantize with NaN or infinity are noted in ``nonfinite``, not refused.

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
        self.shards = OpenShards(plan, folder, staging, lambda file: self._report(file.name))
        self.encoder = Encoder(plan, arithmetic, self.shards, observer)
        self.lock = threading.Lock()
        self.workers = Workers()
        self.memory_freed = threading.Condition()
        self.in_memory = 0
        self.alone = True
        """One thread does everything, one after the other."""
        self.job_slots = Slots(MOST_JOBS)
        self.steps = [
            step
            for step in plan.steps
            if any(self.shards.wants(saved) for saved in step.outputs) and (only is None or step.weight.name in only)
        ]
        self.all_bytes = sum(source.nbytes for step in self.steps for source in step.sources)
        self.bytes_done = 0
        self.weights_done = 0

    def convert(self, threads: int, lanes: int = 1) -> None:
        """Write every unfinished shard, then check that the source did not change while it was read.

        ``lanes``: how many places of the source are read in turn, to fill as many shards.
        """
        self.folder.announce(
            [
                Range(part.file, part.offset, part.offset + part.nbytes)
                for step in self.steps
                for part in _streamed(step)
            ]
        )
        full = self.shards.open(self.steps)
        chunks = self._chunks(lanes)
        self.alone = threads <= 1
        try:
            self._start(full)
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
        for adapter in self.plan.adapters:
            adapter.check()

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
        buffers = Buffers(self.arithmetic.buffer)
        only = {step.weight.name for step in left if not self._finished_is_finite(step, buffers)}
        if only:
            again = Run(self.plan, self.folder, DiscardOutput(), self.arithmetic, only=only)
            again.convert(threads)
            self.kept_nonfinite |= again.kept_nonfinite

    def _is_elsewhere(self, step: Step, files: Container[str]) -> bool:
        """Whether all that a step writes lies in ``files``."""
        return all(self.plan.shards[self.plan.shard_of[saved.name]].file in files for saved in step.outputs)

    def _finished_is_finite(self, step: Step, buffers: Buffers) -> bool:
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
        """Release threads that wait for what is no longer wanted."""
        self.folder.give_up()
        self.staging.give_up()
        if self.observer is not None:
            self.observer.give_up()

    def _chunks(self, lanes: int) -> Iterator[Chunk]:
        shards = (tuple(steps) for _, steps in groupby(self.steps, key=attrgetter("shard")))
        filled = deque(self._chunks_of(steps) for steps in islice(shards, lanes))
        while filled:
            lane = filled.popleft()
            if (chunk := next(lane, None)) is not None:
                yield chunk
                filled.append(lane)
            elif (steps := next(shards, None)) is not None:
                filled.append(self._chunks_of(steps))

    def _chunks_of(self, steps: Iterable[Step]) -> Iterator[Chunk]:
        for step in steps:
            weight, source = step.weight, step.sources[0]
            if (
                weight.conversion is not None
                or weight.transposed
                or self.encoder.has_hessian(step)
                or cast_by_torch(step)
            ):
                yield Chunk(Work(step, 1), 0, 0, whole=True)
                continue
            count = weight.count
            opened = reader(self.folder, source, self.arithmetic)
            work = Work(step, 0, opened)
            unit = _unit(step, self.plan, opened)
            widest = max(source.nbytes, count * _itemsize(source.dtype))
            length = max(unit, self.arithmetic.chunk_bytes * count // max(widest, 1) // unit * unit)
            starts = range(0, count, length) if count else [0]
            work.chunks = len(starts)
            self.encoder.begin(work)
            for start in starts:
                yield Chunk(work, start, min(start + length, count))

    def _work(self, chunks: Iterator[Chunk]) -> None:
        buffers = Buffers(self.arithmetic.buffer)
        while not self.workers.stop.is_set():
            with self.lock:
                chunk = next(chunks, None)
            if chunk is None:
                return
            done = self._convert_whole(chunk.work) if chunk.whole else self._convert_chunk(chunk, buffers)
            self._count(chunk, done)

    def _convert_chunk(self, chunk: Chunk, buffers: Buffers) -> int:
        """Read, compute and write one chunk. Returns the bytes read."""
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
            self.encoder.quantize(chunk.work, values(raw, target), chunk.start, buffers, original)
        else:
            self._look_at_kept(step, original, (values(raw, target), target), buffers.get)
            self.shards.write(step.outputs[0], raw, chunk.start * raw.nbytes // max(count, 1))
            if self.observer is not None and step.act == "dequantize":
                self.observer.dequantized(step, chunk.start, (values(raw, target), target), buffers.get)
        return source.nbytes * chunk.stop // max(weight.count, 1) - source.nbytes * chunk.start // max(weight.count, 1)

    def _look_at_kept(self, step: Step, before: Values, after: Values, memory: Memory) -> None:
        """Note values that are not finite, or no longer after the cast. Dequantized ones can overflow float16 only."""
        computed = any(packed_parts(source) for source in step.sources)  # finite scales times finite codes
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

    def _tell_stored_from_made(self, step: Step) -> None:
        """Count the values of a weight that were not finite in the source, where only those made of it were seen."""
        name = step.outputs[0].name
        if (known := self.kept_nonfinite.get(name)) is not None:
            count = known.stored + known.overflowed
            stored = min(count, count_without_adapters(self.folder, step))
            with self.lock:
                self.kept_nonfinite[name] = NotFinite(stored, count - stored)

    def _convert_whole(self, work: Work) -> int:
        """Convert a weight uncut: it is merged, split or transposed, or torch casts it. Large ones take turns."""
        target = SAFETENSORS_NAMES[work.step.weight.dtype]
        done = sum(source.nbytes for source in work.step.sources)
        nbytes = max(done, work.step.weight.count * _itemsize(target))
        with self.memory_freed:
            self.memory_freed.wait_for(lambda: not self.in_memory or self.in_memory + nbytes <= WHOLE_BYTES)
            self.in_memory += nbytes
        try:
            self._at_once(work, target)
        finally:
            with self.memory_freed:
                self.in_memory -= nbytes
                self.memory_freed.notify_all()
        return done

    def _at_once(self, work: Work, target: str) -> None:
        step, weight = work.step, work.step.weight
        raw = assemble(self.folder, weight, step.sources)
        buffers, original = Buffers(self.arithmetic.buffer), (values(raw, target), target)
        if not weight.quantized:
            self._look_at_kept(step, original, original, buffers.get)
            self.shards.write(step.outputs[0], raw, 0)
            if self.observer is not None and step.act == "dequantize":
                self.observer.dequantized(step, 0, original, buffers.get)
        else:
            self.encoder.begin(work)
            self.encoder.quantize(work, original[0], 0, buffers, original)

    def _count(self, chunk: Chunk, nbytes: int) -> None:
        """Count a finished chunk; complete its weight and its shards when it was their last."""
        work = chunk.work
        with self.lock:
            work.chunks -= 1
            self.bytes_done += nbytes
            last = work.chunks == 0
        if last:
            self._complete(work)
        self._report(None)

    def _complete(self, work: Work) -> None:
        if work.nonfinite:
            if not self.allow_nonfinite:
                raise nonfinite_weight(work, self.plan, self.folder)
            self.nonfinite.add(work.step.weight.name)
        if work.step.weight.quantized:
            self.encoder.complete(work)
        elif work.reader is None or adapters_of(work.step):
            self._tell_stored_from_made(work.step)
        with self.lock:
            self.weights_done += 1
        self._start(self.shards.finish_step(work.step))

    def _start(self, jobs: Iterable[Job]) -> None:
        """Complete or keep shards, beside the work on others: reading back, hashing and storing takes a while."""
        for job in jobs:
            if self.alone:
                job()
                continue
            self.job_slots.acquire()
            try:
                self.workers.begin(self._run_job, job)
            except BaseException:
                self.job_slots.release()
                raise

    def _run_job(self, job: Job) -> None:
        try:
            job()
        finally:
            self.job_slots.release()

    def _report(self, shard: str | None) -> None:
        done, total = self.weights_done, len(self.steps)
        self.progress(Progress("Converting", done, total, self.bytes_done, self.all_bytes, file=shard))


def _streamed(step: Step) -> Iterator[StoredTensor]:
    """What a step reads from one end to the other; of weights that bitsandbytes quantized the codes."""
    for base in (base for source in step.sources for base in unfused(source)):
        for each in base.parts if isinstance(base, Stacked) else (base,):
            if isinstance(each, Packed):
                yield each.weight.parts["weight"]
            else:
                yield from stored_parts(each)


def _unit(step: Step, plan: Plan, source: Reader) -> int:
    """Values that must stay in one chunk: a row for int8, a double block (whole bytes) for 4 bit, one otherwise."""
    if not step.weight.quantized:
        return source.unit
    return math.lcm(source.unit, 2 * BLOCK_SIZE if isinstance(plan.method, FourBit) else step.weight.shape[1])


def _itemsize(dtype: str) -> int:
    return np.dtype(NUMPY[dtype]).itemsize if dtype in NUMPY else 1
