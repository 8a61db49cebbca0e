"""Make an output once more from its source, and compare every tensor and file with what is there, streamed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import MalformedInput, MissingInput, Unsupported
from qz.formats.checkpoint.problems import require_none
from qz.formats.checkpoint.survey import open_checkpoint, survey_file
from qz.formats.files.folder import Folder, Range, in_pieces, place_of
from qz.formats.files.local_folder import LocalFolder
from qz.formats.files.promised import Promised
from qz.formats.output.recorded.record import Record
from qz.formats.tensors.decoded import StoredTensor
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.reports.of_record import kind_of_bytes
from qz.quantize.streaming.output.output_folders import OutputFolder, model_folder
from qz.quantize.streaming.quantizing_device import arithmetic_of_record
from qz.quantize.streaming.run import Run
from qz.quantize.verification.compared_output import ComparedOutput, TensorDifference
from qz.quantize.verification.journal import Journal

if TYPE_CHECKING:
    from qz.formats.checkpoint.pipeline import Pipeline
    from qz.formats.checkpoint.survey import Checkpoint
    from qz.formats.source import OpenedSource
    from qz.quantize.compute.arithmetic import Arithmetic
    from qz.quantize.planning.plan import Plan, Step
    from qz.quantize.settings import Settings

GO_ON = "What was equal need not be compared again: the same command goes on, with --no-resume it starts over."
LARGE = 1 << 20
"""Bytes of a copied file from which on it counts as a part of a sample."""


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What came of it. ``tensors``: of the output, compared and in all; ``bytes``: of the source that were read."""

    tensors: tuple[int, int]
    files: tuple[int, int]
    bytes: int
    differences: tuple[TensorDifference, ...]
    unlike_files: tuple[str, ...]
    """Files beside the weights that are missing or have other bytes, and recorded ones that it does not become."""
    tensors_before: int
    """Of the compared ones, those that an earlier, interrupted comparison found equal."""
    device: str
    bytes_of: str
    """The kind of device whose bytes it has computed."""
    notes: tuple[str, ...]
    seconds: float


def recompute(
    output: Folder,
    record: Record,
    source: OpenedSource,
    settings: Settings,
    *,
    sample: float | None = None,
    seed: int = 0,
    resume: bool = True,
    progress: OnProgress = ignore,
) -> Recomputed:
    """Plan as the run did that made ``output``, and compare. ``sample``: the share of the weights' bytes to look at.

    Without a sample, what an interrupted comparison of the same files found equal is not compared again, if it is to
    ``resume``.

    Raises what planning and reading raise; Unsupported where a library reads the source otherwise now.
    """
    begun, about = time.monotonic(), record.about
    progress(Progress("Planning"))
    folders, notes = _planned(source, about, settings)
    recorded = kind_of_bytes(about)
    plans = [expected.plan for expected in folders if expected.plan is not None]
    arithmetic = arithmetic_of_record(plans, settings, recorded)
    other_device = recorded != arithmetic.bytes_of
    chosen = _Sample(folders, sample, seed) if sample is not None else None
    threads = settings.threads or arithmetic.threads
    journal = None
    if sample is None:
        journal = Journal(_binding(output, record, folders, settings, arithmetic), resume=resume)
    found = _Comparison(output, arithmetic, threads, other_device, progress, chosen, journal)
    try:
        for expected in folders:
            found.compare(expected)
    except BaseException as error:
        if journal is not None and journal.keep():
            error.add_note(GO_ON)
        raise
    if journal is not None:
        journal.forget()
    found.unlike_files += sorted(file.name for file in record.files if file.name not in found.planned)
    return Recomputed(
        (found.tensors, found.all_tensors),
        (found.files, found.all_files),
        found.bytes,
        tuple(found.differences),
        tuple(found.unlike_files),
        found.tensors_before,
        arithmetic.name,
        arithmetic.bytes_of,
        (*notes, *arithmetic.notes),
        time.monotonic() - begun,
    )


def _planned(
    source: OpenedSource, about: Mapping[str, Any], settings: Settings
) -> tuple[Sequence[OutputFolder], tuple[str, ...]]:
    """The folders that the output should have, and notes on where a single file's config comes from."""
    from qz.formats.checkpoint.pipeline import Pipeline, open_pipeline
    from qz.formats.files.folder import is_pipeline
    from qz.quantize.conversion import companions_of, membership_of, open_file
    from qz.quantize.models.plan import plan_quantization
    from qz.quantize.planning.dequantization import plan_dequantization

    if about.get("act") not in ("quantize", "dequantize"):
        raise Unsupported(f"The record says {about.get('act')!r} of how it was made, which this qz cannot repeat.")
    back = about["act"] == "dequantize"
    opened: Checkpoint | Pipeline
    notes: tuple[str, ...] = ()
    if source.file is not None:
        opened, notes = open_file(source, settings)
    elif is_pipeline(source.folder):
        opened = open_pipeline(source.folder, settings.variant)
    else:
        opened = open_checkpoint(source.folder, settings.variant)
    if isinstance(opened, Pipeline):
        from qz.quantize.pipelines.plan import plan_pipeline, plan_way_back

        return (plan_way_back if back else plan_pipeline)(opened, settings).output_folders, notes
    checkpoint = opened
    plan = (plan_dequantization if back else plan_quantization)(checkpoint, settings, membership_of(source, settings))
    return [model_folder(plan, companions_of(source, checkpoint, settings))], notes


def _stored(folder: Folder, plan: Plan) -> Mapping[str, StoredTensor]:
    """The tensors of an output."""
    if "config.json" in plan.files:
        return open_checkpoint(folder).stored
    found: dict[str, StoredTensor] = {}
    for layout in plan.shards:  # single files, which no library loads
        tensors, _, problems = survey_file(folder, layout.file)
        require_none(folder.location, problems, but=("original-layout",))
        found |= {name: each for name, each in tensors.items() if isinstance(each, StoredTensor)}
    return found


def _binding(
    output: Folder, record: Record, folders: Sequence[OutputFolder], settings: Settings, arithmetic: Arithmetic
) -> dict[str, Any]:
    """What makes a comparison the same one, as JSON values."""
    from qz.quantize.provenance.fingerprints import fingerprint
    from qz.quantize.provenance.source_identity import identity

    sources = {expected.name: expected.plan.checkpoint.folder for expected in folders if expected.plan is not None}
    read = identity(sources, [each for expected in folders for each in expected.carried])
    return {
        **fingerprint(read, settings, arithmetic),
        "output": output.identity(),
        "stamps": _stamps(output.path, folders) if isinstance(output, LocalFolder) else {},
        "record": [asdict(file) for file in record.files],
    }


def _stamps(output: Path, folders: Iterable[OutputFolder]) -> dict[str, tuple[int, int] | None]:
    """Size, and time of the last change in nanoseconds, of all files that may be found equal, wherever they lie."""
    found: dict[str, tuple[int, int] | None] = {}
    for expected in folders:
        shards = expected.plan.shards if expected.plan is not None else ()
        for name in (*(shard.file for shard in shards), *(each.name for each in expected.carried)):
            try:
                status = (output / expected.name / name).stat()
                found[expected.prefix + name] = (status.st_size, status.st_mtime_ns)
            except OSError:
                found[expected.prefix + name] = None
    return found


class _Sample:
    """Weights and large files chosen at random until they make up a share of all bytes; at least one."""

    def __init__(self, folders: Iterable[OutputFolder], share: float, seed: int) -> None:
        things: list[tuple[str, str, int]] = []
        for expected in folders:
            steps = expected.plan.steps if expected.plan is not None else ()
            things += [(expected.name, step.weight.name, sum(s.nbytes for s in step.sources)) for step in steps]
            things += [(expected.name, f"/{each.name}", each.bytes) for each in expected.carried if each.bytes >= LARGE]
        random.Random(seed).shuffle(things)  # noqa: S311 - a sample, not a secret
        left = share * sum(nbytes for _, _, nbytes in things)
        self._chosen: set[tuple[str, str]] = set()
        for folder, name, nbytes in things:
            if left <= 0:
                break
            self._chosen.add((folder, name))
            left -= nbytes

    def weights(self, folder: str) -> set[str]:
        return {name for inner, name in self._chosen if inner == folder and not name.startswith("/")}

    def has_file(self, folder: str, name: str) -> bool:
        return (folder, f"/{name}") in self._chosen


class _Comparison:
    """Goes through the folders of an output and keeps count."""

    def __init__(
        self,
        output: Folder,
        arithmetic: Arithmetic,
        threads: int,
        other_device: bool,
        progress: OnProgress,
        sample: _Sample | None,
        journal: Journal | None,
    ) -> None:
        self._output, self._arithmetic, self._threads = output, arithmetic, threads
        self._other_device, self._progress, self._sample = other_device, progress, sample
        self._journal = journal
        self._equal = journal.equal if journal is not None else frozenset[tuple[str, str]]()
        self.tensors = self.all_tensors = self.files = self.all_files = self.bytes = 0
        self.differences: list[TensorDifference] = []
        self.unlike_files: list[str] = []
        self.tensors_before = 0
        self.planned: set[str] = set()
        """Names of all files that the output has to have."""

    def compare(self, expected: OutputFolder) -> None:
        """One folder: its model, the small files that are made with it, and what was copied."""
        try:
            folder = self._output.subfolder(expected.name) if expected.name else self._output
        except (MissingInput, MalformedInput) as error:
            raise MalformedInput(f"{self._output.location} lacks {expected.name}: {error}") from error
        prefix = expected.prefix
        if expected.plan is not None:
            self._compare_model(expected, folder, prefix)
        shards = expected.plan.shards if expected.plan is not None else ()
        self.planned |= {prefix + each.file for each in shards} | {prefix + each.name for each in expected.carried}
        made = {**(expected.plan.files if expected.plan is not None else {}), **expected.documents}
        self.planned |= {prefix + name for name in made}
        for name, data in made.items():
            self._note_file(prefix + name, _is_same(folder, name, len(data), _bytes_of(data)))
        for each in expected.carried:
            if self._sample is not None and each.bytes >= LARGE and not self._sample.has_file(expected.name, each.name):
                self.all_files += 1
                continue
            if (expected.name, f"/{each.name}") in self._equal:
                self._note_file(prefix + each.name, same=True)
                continue
            read = partial(each.folder.read_into, each.file)
            same = _is_same(folder, each.name, each.bytes, read)
            self._note_file(prefix + each.name, same)
            self.bytes += each.bytes
            if same and each.bytes >= LARGE:
                self._note_equal(expected.name, f"/{each.name}")

    def _note_file(self, name: str, same: bool) -> None:
        self.files, self.all_files = self.files + 1, self.all_files + 1
        if not same:
            self.unlike_files.append(name)

    def _compare_model(self, expected: OutputFolder, folder: Folder, prefix: str) -> None:
        plan = expected.plan
        assert plan is not None
        there = ComparedOutput(
            plan,
            folder,
            _stored(folder, plan),
            other_device=self._other_device,
            on_equal=partial(self._note_equal, expected.name),
        )
        only: Collection[str] | None = self._sample.weights(expected.name) if self._sample is not None else None
        before = [step for step in plan.steps if (expected.name, step.weight.name) in self._equal]
        if before:
            self._go_on(before, plan)
            done = {step.weight.name for step in before}
            only = [step.weight.name for step in plan.steps if step.weight.name not in done]
        source: Folder = plan.checkpoint.folder
        if only is not None and not isinstance(source, LocalFolder):
            source = _ByRanges(source)
        run = Run(plan, source, there, self._arithmetic, self._told, only=only)
        self.all_tensors += sum(len(layout.tensors) for layout in plan.shards)
        if run.steps:
            run.convert(self._threads)
        self.tensors += len(there.compared)
        self.bytes += run.all_bytes
        self.differences += [each.inside(prefix) for each in there.differences]

    def _note_equal(self, folder: str, name: str) -> None:
        if self._journal is not None:
            self._journal.note(folder, name)

    def _go_on(self, before: Sequence[Step], plan: Plan) -> None:
        """Count what an interrupted comparison found equal, and report it."""
        count = sum(len(step.outputs) for step in before)
        self.tensors_before += count
        self.tensors += count
        done = (len(before), len(plan.steps))
        self._progress(Progress("Comparing", *done, kept=done, unit="weight"))

    def _told(self, step: Progress) -> None:
        self._progress(Progress("Comparing", step.done, step.total, step.bytes, step.all_bytes))


def _bytes_of(data: bytes) -> Callable[[int, memoryview], None]:
    def read(offset: int, buffer: memoryview) -> None:
        buffer[:] = data[offset : offset + len(buffer)]

    return read


def _is_same(folder: Folder, name: str, size: int, read: Callable[[int, memoryview], None]) -> bool:
    """Whether a file of the output has these bytes."""
    try:
        inner, base = place_of(folder, name)
    except (MissingInput, MalformedInput):
        return False
    try:
        if inner.sizes().get(base) != size:
            return False
        there = partial(inner.read_into, base)
        return all(one == other for one, other in zip(in_pieces(read, size), in_pieces(there, size), strict=True))
    finally:
        if inner is not folder:
            inner.close()


class _ByRanges:
    """A folder of which only little is read: nothing is fetched ahead, so no file is fetched as a whole."""

    only: str | None = None
    promised: Promised | None = None

    def __init__(self, folder: Folder) -> None:
        self._folder, self.location, self.allow_pickle = folder, folder.location, folder.allow_pickle
        self.named_file = folder.named_file

    def sizes(self) -> Mapping[str, int]:
        return self._folder.sizes()

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        self._folder.read_into(file, offset, buffer)

    def announce(self, ranges: Sequence[Range]) -> None: ...

    def is_verified(self, file: str) -> bool:  # noqa: ARG002 - compared with what is there, it need not be
        return True

    def check(self) -> None: ...

    def identity(self) -> dict[str, Any]:
        return self._folder.identity()

    def include(self, name: str, files: Iterable[str]) -> None:
        self._folder.include(name, files)

    def subfolder(self, name: str) -> Folder:
        return self._folder.subfolder(name)

    def subfolders(self) -> Sequence[str]:
        return self._folder.subfolders()

    def give_up(self) -> None:
        self._folder.give_up()

    def close(self) -> None:
        self._folder.close()
