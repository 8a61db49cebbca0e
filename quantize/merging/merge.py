"""Put together what ``--part`` runs made: all there, alike, every hash compared, and then one output with one name.

Weights are moved, not copied, so a merge takes the time to read them once. It needs neither the source nor the
libraries. One that was interrupted goes on; one that is repeated finds that there is nothing to do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import MalformedInput, MissingInput, OutputRefused, QzError, UsageError
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.preflight import check_output
from qz.formats.output.recorded.record import RECORD, Record, read_record
from qz.formats.output.shares import PART_FILE, PARTS, FinishedShare, Share, SharesFound, find_shares, read_share
from qz.formats.output.staging import Staging
from qz.formats.output.storage.beside import JOURNAL, in_real_folder, require_name, sibling
from qz.formats.output.storage.directory import Directory
from qz.formats.output.storage.disk import Disk
from qz.progress import OnProgress, ignore
from qz.quantize.compute.cores import usable_cores
from qz.quantize.merging.checks import require_alike, require_all, require_equal
from qz.quantize.merging.verification import Verification
from qz.quantize.reports.of_record import report_of_record
from qz.quantize.reports.summary import told_of_nonfinite
from qz.quantize.streaming.measuring.not_finite import NotFinite
from qz.quantize.streaming.output.readable import require_readable
from qz.quantize.streaming.output.shares import not_finite

if TYPE_CHECKING:
    from qz.formats.publish.destination import Destination, PushResult


@dataclass(frozen=True)
class Merged:
    """A complete output that was made in parts. ``parts``: how many; 0 if it is not known any more."""

    output: Path
    record: Record
    parts: int
    nonfinite: Mapping[str, Mapping[str, int]] | None
    """As in the report of a run; None if it is not known any more."""
    pushed: PushResult | None = None
    """What came of publishing it, if that was asked for."""
    here: bool = True
    """Whether the output is in its folder, and not on the Hub only."""
    up_to_date: bool = False
    """It was complete already."""
    seconds: float = 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of the plan, and of what the parts found."""
        counts = {name: NotFinite(**count) for name, count in (self.nonfinite or {}).items()}
        dtype = self.record.about.get("dtype") or "the output's"
        fused = bool(self.record.about.get("loras"))
        return (*self.record.about.get("warnings", ()), *told_of_nonfinite(counts, dtype, fused=fused))

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.record.files)

    def as_json(self) -> dict[str, Any]:
        """The report of a run that makes everything at once, and ``parts``."""
        report = {
            **report_of_record(self.record, self.output),
            "output": str(self.output) if self.here else None,
            "warnings": list(self.warnings),
            "nonfinite": None
            if self.nonfinite is None
            else [{"name": name, **count} for name, count in sorted(self.nonfinite.items())],
            "up_to_date": self.up_to_date,
            "resumed": False,
            "parts": self.parts,
            "seconds": round(self.seconds, 3),
        }
        return report if self.pushed is None else {**report, "push": self.pushed.as_json()}


def merge(
    output: Path,
    *,
    overwrite: bool = False,
    to: Destination | None = None,
    disk: Disk | None = None,
    threads: int = 0,
    progress: OnProgress = ignore,
) -> Merged:
    """Complete ``output`` from the parts beside it, and publish it if there is somewhere ``to`` do that.

    ``threads`` read and hash; 0 for one per CPU.

    Raises MissingInput (naming the parts that are missing), TryAgain (one is being made, or another merge is at work),
    MalformedInput (parts that differ, or are damaged), OutputRefused (the output exists and is another one).
    """
    disk = disk or Disk()
    require_name(output)
    output = in_real_folder(output)
    threads = threads or usable_cores()
    first = _first_part(output, disk)
    if first is not None and first.receipt.uploaded:
        if to is None:
            where = first.receipt.fingerprint["push"]["repository"]
            raise UsageError(f"The parts of {output} were sent to {where}. Merge them there: --push {where}.")
        from qz.quantize.merging.merge_on_hub import merge_on_hub

        return merge_on_hub(output, to, disk, progress)
    if to is not None:
        from qz.formats.publish.push import require_possible

        require_possible(to)
    try:
        done = _merge_here(output, overwrite, disk, threads, progress)
    except QzError:
        if (record := _made_meanwhile(output, first, disk)) is None:
            raise
        done = Merged(output, record, first.receipt.share.count if first else 0, None, up_to_date=True)
    if to is None:
        return done
    from qz.formats.publish.push import push as send

    return replace(done, pushed=send(output, to, progress=progress))


def are_parts_on_hub(output: Path, disk: Disk) -> bool:
    """Whether the parts of ``output`` sent their weights to the Hub; False also where no part can be read."""
    require_name(output)
    first = _first_part(in_real_folder(output), disk)
    return first is not None and first.receipt.uploaded


def _made_meanwhile(output: Path, part: FinishedShare | None, disk: Disk) -> Record | None:
    """The record of the output if another merge, at the same time, was faster and has finished."""
    record = _record_in(output)
    is_merged = part is not None and record is not None and record.about == part.record.about
    return record if is_merged and disk.status(sibling(output, PARTS)) is None else None


def _first_part(output: Path, disk: Disk) -> FinishedShare | None:
    """Any part that is finished and can be read."""
    place = sibling(output, PARTS)
    if disk.status(place) is None:
        return None
    with Directory.at(disk, place) as folder:
        found = find_shares(disk, folder)
    for number in sorted(found.finished):
        with suppress(QzError):
            return read_share(place / Share(number, found.count).folder)
    return None


def _merge_here(output: Path, overwrite: bool, disk: Disk, threads: int, progress: OnProgress) -> Merged:
    begun = time.monotonic()
    place = sibling(output, PARTS)
    if disk.status(place) is None:
        return _merged_before(output, place)
    check_nobody_writes(output, disk)
    with Directory.at(disk, output.parent) as parent, parent.enter(place.name) as folder:
        found = find_shares(disk, folder)
        if (record := _equal_output(output, place, found)) is not None:
            _finish_exchange(output, disk)
            remove(folder, parent, found)
            return Merged(output, record, found.count, None, up_to_date=True)
        require_all(output, place, found)
        first = read_share(place / Share(1, found.count).folder)
        files = dict.fromkeys(first.receipt.owners)
        with Staging(
            output,
            first.receipt.fingerprint,
            needed=sum(file.bytes for file in first.shared.values()),
            overwrite=overwrite,
            about=first.record.about,
            disk=disk,
            resumable=files,
        ) as staging:
            found = find_shares(disk, folder)  # from here on no part can start
            require_all(output, place, found)
            made = [read_share(place / Share(number, found.count).folder) for number in sorted(found.finished)]
            require_alike(place, made)
            require_equal(staging, made)
            checked = Verification(folder, staging, progress, threads)
            checked.verify(made)
            for each in made:
                with folder.enter(each.receipt.share.folder) as own:
                    checked.adopt(each, own, staging)
            for file in made[0].shared.values():
                staging.write_file(file.name, checked.shared[file.name])
            folders = {name: str(place) for name in made[0].receipt.folders}
            staging.commit(lambda staged: require_readable(staged, folders))
        remove(folder, parent, found)
    record = _record_in(output)
    if record is None:
        raise MalformedInput(
            f"{output} was complete, but its record is gone: someone changed it. Make the output again."
        )
    return Merged(output, record, len(made), nonfinite_of(made), seconds=time.monotonic() - begun)


def nonfinite_of(made: Sequence[FinishedShare]) -> dict[str, dict[str, int]]:
    """What the parts kept that is not finite, by its name in the output."""
    return {
        f"{inner}/{name}".lstrip("/"): {"stored": count.stored, "overflowed": count.overflowed}
        for each in made
        for inner, counts in not_finite(each.receipt).items()
        for name, count in counts.items()
    }


def check_nobody_writes(output: Path, disk: Disk) -> None:
    """Raise TryAgain if another process writes or merges the output now."""
    with suppress(OutputRefused):  # an existing output is checked later
        check_output(output, True, (), disk)


def _finish_exchange(output: Path, disk: Disk) -> None:
    """Remove what a merge left that was stopped just after the output got its name."""
    if disk.status(sibling(output, JOURNAL)) is not None:
        with suppress(OutputRefused), Staging(output, {}, needed=0, disk=disk):
            pass  # it finds the output there, tidies up, and refuses to make another


def _merged_before(output: Path, place: Path) -> Merged:
    """The output, if it is complete although there are no parts (any more)."""
    record = _record_in(output, allow_damaged=False)
    if record is None:
        raise MissingInput(
            f"{place} does not exist, so there is nothing to merge. Make the parts first: qz quantize SOURCE -o "
            f"{output} --part 1/N, and so on to N/N."
        )
    _require_whole(output, record)
    return Merged(output, record, 0, None, up_to_date=True)


def _require_whole(output: Path, record: Record) -> None:
    """Raise MalformedInput if a recorded file is not there, or has another size."""
    for file in record.files:
        path = output / file.name
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise MalformedInput(f"{output} is damaged: {file.name} is missing or has another size. Make it again.")


def _record_in(place: Path, *, allow_damaged: bool = True) -> Record | None:
    """The record of a checkpoint; None if there is none, or none that can be read, where that is allowed."""
    try:
        folder = LocalFolder(place)
    except QzError:
        return None
    try:
        return read_record(folder)
    except QzError:
        if not allow_damaged:
            raise
        return None
    finally:
        folder.close()


def _equal_output(output: Path, place: Path, found: SharesFound) -> Record | None:
    """The record of the output if it is what these parts made: an earlier merge got that far.

    It removes the record of each part last.
    """
    if found.running or found.interrupted:
        return None
    record = _record_in(output)
    if record is None:
        return None
    files = {file.name: file for file in record.files}
    for number in found.finished:
        part = _record_in(place / Share(number, found.count).folder)
        if part is None:
            continue
        told = {file.name: file for file in part.files if file.name != PART_FILE}
        if record.about != part.about or any(files.get(name) != file for name, file in told.items()):
            return None
    _require_whole(output, record)
    return record


def remove(folder: Directory, parent: Directory, found: SharesFound) -> None:
    """Remove what is left of the parts, and nothing else: a folder that holds more stays."""
    for number in sorted(found.finished):
        share = Share(number, found.count)
        record = _record_in(folder.path / share.folder)
        names = [file.name for file in record.files] if record is not None else []
        for name in (*names, RECORD) if names else ():
            with _ignore_missing_or_nonempty():
                folder.remove(f"{share.folder}/{name}")
        inside = {"/".join(name.split("/")[:depth]) for name in names for depth in range(1, name.count("/") + 1)}
        for inner in (*sorted(inside, reverse=True), ""):
            with _ignore_missing_or_nonempty():
                folder.remove_empty(f"{share.folder}/{inner}".rstrip("/"))
    with _ignore_missing_or_nonempty():
        parent.remove_empty(folder.path.name)


@contextmanager
def _ignore_missing_or_nonempty() -> Iterator[None]:
    """Another merge may remove the same at the same time; what holds something else stays."""
    try:
        yield
    except OutputRefused:
        pass
    except QzError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
