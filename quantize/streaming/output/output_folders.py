"""Carry plans out: one or several, each into its folder of one output, together with what is copied."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qz.formats.files.local_folder import LocalFolder
from qz.formats.malformed import Malformed
from qz.formats.output.companions import Companion
from qz.formats.output.copying import copy
from qz.formats.output.recorded.record import WrittenFile
from qz.formats.output.refusals import refuse_overlap
from qz.formats.output.section import Section
from qz.formats.output.shards.shard_layout import ShardLayout
from qz.formats.output.shares import PART_FILE, SectionOfShare, Share, refuse_linked
from qz.formats.output.staging import RESUMABLE, Staging
from qz.formats.output.storage.beside import sibling
from qz.formats.output.storage.disk import Disk
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.planning.plan import Plan
from qz.quantize.streaming.measuring.measure import Measure
from qz.quantize.streaming.measuring.not_finite import NotFinite
from qz.quantize.streaming.output import shares
from qz.quantize.streaming.output.readable import UnreadableOutput, converted, require_readable
from qz.quantize.streaming.output.shard_order import ShardOrder, by_shard, joined, shard_order
from qz.quantize.streaming.run import Run

if TYPE_CHECKING:
    from qz.formats.files.folder import Folder
    from qz.formats.publish.destination import PushResult
    from qz.formats.publish.publication import Publication
    from qz.quantize.compute.arithmetic import Arithmetic


MANY_THREADS = 8
LANES = 4
"""A file takes one writer at a time: many threads wait for each other where they fill one, at 2 to 4 GB/s."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to put the result, how, and what to do with what is there."""

    output: Path
    overwrite: bool = False
    resume: bool = True
    disk: Disk = field(default_factory=Disk)
    publication: Publication | None = None
    """Where finished files go at once, so that none stays here."""
    share: Share | None = None
    """Which part of the output is made, if not all of it."""

    @property
    def folder(self) -> Path:
        """The folder that is made."""
        return self.output if self.share is None else self.share.place(self.output)

    @property
    def staged(self) -> Path:
        """What the staging area is named after: no output of this name is made, or in the way, where none stays."""
        return self.folder if self.publication is None or self.share is not None else sibling(self.folder, ".push")

    @property
    def place(self) -> str:
        """The folder that is written, empty where there is none in the end."""
        return "" if self.publication is not None and self.share is None else str(self.folder)


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """One folder of the output, or the output itself where ``name`` is empty: what is converted into it, and copied."""

    name: str = ""
    plan: Plan | None = None
    carried: tuple[Companion, ...] = ()
    documents: Mapping[str, bytes] = field(default_factory=dict)
    """Small files to write beside those of the plan."""
    measure: Measure | None = None
    """Measures what the conversion loses, while it is under way."""

    @property
    def prefix(self) -> str:
        """What stands before the names of its files in the output."""
        return f"{self.name}/" if self.name else ""

    @property
    def bytes_output(self) -> int:
        planned = self.plan.bytes_output if self.plan is not None else 0
        return planned + sum(each.bytes for each in self.carried) + sum(map(len, self.documents.values()))

    @property
    def resumable(self) -> dict[str, ShardLayout | None]:
        """The files that a resumed run need not make again, by their names in the output; layouts of shards."""
        prefix = self.prefix
        shards = self.plan.shards if self.plan is not None else ()
        layouts = {prefix + each.file: replace(each, file=prefix + each.file) for each in shards}
        return {**layouts, **{prefix + each.name: None for each in self.carried if each.bytes >= RESUMABLE}}


@dataclass(frozen=True, slots=True)
class Written:
    """What a run wrote. ``resumed``: it went on where an earlier one had stopped."""

    files: tuple[WrittenFile, ...]
    resumed: bool
    nonfinite: Mapping[str, Mapping[str, NotFinite]]
    """Of each converted model, by its folder, the tensors that were kept and hold values that are not finite."""
    pushed: PushResult | None = None
    bytes_read: int = 0
    """Of the source, in this run: not what an earlier one had finished."""
    notes: tuple[str, ...] = ()


def lanes_of(folder: Folder, threads: int) -> int:
    """How many shards are filled at a time: several, for many threads, where any place can be read at any time."""
    return LANES if threads >= MANY_THREADS and isinstance(folder, LocalFolder) else 1


def model_folder(
    plan: Plan, carried: Iterable[Companion] = (), name: str = "", measure: Measure | None = None
) -> OutputFolder:
    """A converted model and the files copied with it, except those that the plan writes itself."""
    return OutputFolder(name, plan, tuple(each for each in carried if each.name not in plan.files), measure=measure)


def write_folders(
    folders: Sequence[OutputFolder],
    sources: Iterable[Folder],
    target: Target,
    arithmetic: Arithmetic,
    threads: int,
    *,
    fingerprint: Mapping[str, Any],
    about: Mapping[str, Any],
    measured: Callable[[], Mapping[str, Any]] = dict,
    progress: OnProgress = ignore,
) -> Written:
    """Write all folders under one commit: afterwards the output is complete and checked, or absent.

    ``sources`` must not overlap the output. ``fingerprint`` and ``about``: see ``Staging``. ``measured`` tells, when
    all is computed, what else belongs into the record. Raises what reading, computing and writing raise; finished
    shards stay for the next run with the same fingerprint.
    """
    local = [each for each in sources if isinstance(each, LocalFolder)]
    _refuse_overlaps(local, target)
    fingerprint = asked_for(target, fingerprint)
    if (made := shares.made_before(target, fingerprint)) is not None:
        return Written(tuple(made.files.values()), True, shares.not_finite(made.receipt))
    owners = shares.owners_of(folders, target.share)
    elsewhere = shares.elsewhere(owners, target.share)
    publication = target.publication
    if publication is not None:
        folders = [
            replace(folder, plan=by_shard(folder.plan)) if folder.plan is not None else folder for folder in folders
        ]
        publication.begin(weights_of(folders))
        progress = publication.converting
    with (
        _staging(folders, target, elsewhere, fingerprint, about) as staging,
        _trust(staging, local),
    ):
        shares.require_alone(target, fingerprint)
        resumed = staging.resumed
        meter = _Meter(progress, _doing(folders))
        jobs = [_job(folder, staging, elsewhere, arithmetic, meter) for folder in folders]
        if resumed:
            begun = sum(each.bytes for each in staging.begun.values())
            meter.go_on((len(staging.finished), len(resumable(folders, elsewhere))), begun)
        for number, job in enumerate(jobs):
            lanes = 1 if job.run is None or publication is not None else lanes_of(job.run.folder, threads)
            _write_folder(job, meter, arithmetic, threads, lanes)
            if job.folder.name:  # its buffers for reading ahead are no longer needed
                _close(_sources(job.folder), folders[number + 1 :])
        staging.record(measured())
        found = {job.folder.name: job.run.kept_nonfinite for job in jobs if job.run is not None}
        if target.share is not None:
            staging.write_file(
                PART_FILE, shares.receipt(target.share, fingerprint, owners, folders, found, publication)
            )
            written = staging.commit()  # the merge reads the whole output back
        else:
            written = staging.commit(lambda staged: require_readable(staged, converted(folders)))
    return Written(written, resumed, found, getattr(staging, "pushed", None), meter.all_bytes, staging.notes)


def _refuse_overlaps(sources: Iterable[LocalFolder], target: Target) -> None:
    """Raise OutputRefused for an output, or the folder of its parts, that lies in a source, or a source in it."""
    for place in (place for each in sources for place in each.places()):
        refuse_overlap(place, target.output, target.disk)
        if target.share is not None:
            refuse_overlap(place, target.folder.parent, target.disk)
    if target.share is not None:
        refuse_linked(target.output, target.disk)


class _Job(NamedTuple):
    """A folder, where it is written, and what converts its model, if it is not only copied."""

    folder: OutputFolder
    section: Section
    run: Run | None


def _job(
    folder: OutputFolder, staging: Staging, elsewhere: frozenset[str], arithmetic: Arithmetic, meter: _Meter
) -> _Job:
    section = SectionOfShare(staging, folder.name, elsewhere) if elsewhere else Section(staging, folder.name)
    run = None
    if folder.plan is not None:
        run = Run(folder.plan, folder.plan.checkpoint.folder, section, arithmetic, meter.show, observer=folder.measure)
    meter.expect(run, folder.carried, section)
    return _Job(folder, section, run)


def _write_folder(job: _Job, meter: _Meter, arithmetic: Arithmetic, threads: int, lanes: int) -> None:
    """Everything that one folder of the output gets: what is copied, what is converted, and small files."""
    folder, section, run = job
    copy(folder.carried, section, meter.copied)
    if run is not None:
        run.convert(threads, lanes)
        run.look_again(threads, section.elsewhere)
        meter.finish(run)
    if folder.plan is not None and folder.measure is not None:
        folder.measure.finish(folder.plan, arithmetic, threads)
    for name, data in {**(folder.plan.files if folder.plan else {}), **folder.documents}.items():
        section.write_file(name, data)


def _staging(
    folders: Sequence[OutputFolder],
    target: Target,
    elsewhere: frozenset[str],
    fingerprint: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Staging:
    """The staging area of a folder, or of an output that is published as it is made. ``elsewhere``: made by others."""
    needed = staged_bytes(folders, target)
    if target.publication is None:
        return Staging(
            target.folder,
            fingerprint,
            needed=needed,
            overwrite=target.overwrite or target.share is not None,  # a damaged part is made again
            resume=target.resume,
            about=about,
            disk=target.disk,
            resumable=resumable(folders, elsewhere),
        )
    from qz.formats.publish.uploaded_output import UploadedOutput
    from qz.formats.publish.uploaded_share import UploadedShare

    order = _order(folders)
    kind = UploadedOutput if target.share is None else UploadedShare
    return kind(
        target.publication,
        target.staged,
        fingerprint,
        needed=needed,
        order=[name for name in order.names if name not in elsewhere],
        at_once=order.at_once,
        resume=target.resume,
        about=about,
        disk=target.disk,
        resumable=resumable(folders, elsewhere),
    )


def resumable(folders: Sequence[OutputFolder], elsewhere: Collection[str] = ()) -> dict[str, ShardLayout | None]:
    """As ``OutputFolder.resumable``, of all folders, without what is made ``elsewhere``."""
    return {name: layout for folder in folders for name, layout in folder.resumable.items() if name not in elsewhere}


def asked_for(target: Target, fingerprint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fingerprint of a run, with the place that its files are sent to at once, if they are."""
    return fingerprint if target.publication is None else {**fingerprint, "push": target.publication.place}


def staged_bytes(folders: Sequence[OutputFolder], target: Target) -> int:
    """Bytes on the disk, at most, while the folders are written."""
    needed = sum(folder.bytes_output for folder in folders)
    if target.publication is None:
        return needed - shares.bytes_elsewhere(folders, target.share)
    sent = sum(shard.size for folder in folders if folder.plan is not None for shard in folder.plan.shards)
    copied = [each.bytes for folder in folders for each in folder.carried if each.bytes >= RESUMABLE]
    return needed - sent - sum(copied) + max([_order(folders).bytes, *copied])


def _order(folders: Sequence[OutputFolder]) -> ShardOrder:
    return joined([shard_order(by_shard(folder.plan), folder.name) for folder in folders if folder.plan is not None])


def weights_of(folders: Sequence[OutputFolder]) -> list[str]:
    """Names of the weight files that the folders will have."""
    names = [
        folder.prefix + shard.file for folder in folders if folder.plan is not None for shard in folder.plan.shards
    ]
    names += [folder.prefix + each.name for folder in folders for each in folder.carried]
    return [name for name in names if name.endswith(".safetensors")]


@contextmanager
def _trust(staging: Staging, local: Sequence[LocalFolder]) -> Iterator[None]:
    """Let no later run use what was made of a local source that has changed, or what could not be read back."""
    try:
        yield
    except UnreadableOutput:
        staging.distrust()
        raise
    except Malformed as error:
        if local and error.kind == "changed":
            staging.distrust()
        raise


def _sources(folder: OutputFolder) -> list[Folder]:
    model = [folder.plan.checkpoint.folder] if folder.plan is not None else []
    return [*model, *(each.folder for each in folder.carried)]


def _close(sources: Iterable[Folder], before: Iterable[OutputFolder]) -> None:
    """Close those of ``sources`` that nothing is read from ``before`` these folders are written."""
    later = {id(source) for folder in before for source in _sources(folder)}
    for source in sources:
        if id(source) not in later:
            source.close()


def _doing(folders: Sequence[OutputFolder]) -> str:
    return "Quantizing" if any(folder.plan and folder.plan.method for folder in folders) else "Dequantizing"


class _Meter:
    """Reports several runs and copies as one progress."""

    def __init__(self, progress: OnProgress, doing: str) -> None:
        self.progress = progress
        self.doing = doing
        self.weights = self.all_weights = self.bytes = self.all_bytes = 0

    def expect(self, run: Run | None, carried: Iterable[Companion], section: Section) -> None:
        finished = section.finished
        self.all_bytes += sum(each.bytes for each in carried if each.name not in finished)
        if run is not None:
            self.all_weights += len(run.steps)
            self.all_bytes += run.all_bytes

    def show(self, step: Progress) -> None:
        weights, done = self.weights + step.done, self.bytes + step.bytes
        whole = Progress(self.doing, weights, self.all_weights, done, self.all_bytes)
        self.progress(replace(whole, file=step.file))

    def copied(self, nbytes: int) -> None:
        self.bytes += nbytes
        self.show(Progress(self.doing))

    def go_on(self, kept: tuple[int, int], kept_bytes: int) -> None:
        whole = Progress(self.doing, 0, self.all_weights, 0, self.all_bytes)
        self.progress(replace(whole, kept=kept, kept_bytes=kept_bytes))

    def finish(self, run: Run) -> None:
        self.weights += len(run.steps)
        self.bytes += run.all_bytes
