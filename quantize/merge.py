"""Put together what ``--part`` runs made: all there, alike, every hash compared, and then one output with one name.

Weights are moved, not copied, so a merge takes the time to read them once. It needs neither the source nor the
libraries. One that was interrupted goes on; one that is repeated finds that there is nothing to do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import MalformedInput, MissingInput, OutputRefused, QzError, TryAgain, UsageError
from qz.formats.folder import LocalFolder
from qz.formats.output.beside import JOURNAL, PARTIAL, in_real_folder, require_name, sibling
from qz.formats.output.checksums import hash_file
from qz.formats.output.difference import describe_difference
from qz.formats.output.directory import Directory
from qz.formats.output.disk import Disk
from qz.formats.output.preflight import check_output
from qz.formats.output.record import RECORD, Record, WrittenFile, read_record
from qz.formats.output.shares import PART_FILE, PARTS, FinishedShare, Share, SharesFound, find_shares, read_share
from qz.formats.output.staging import Staging
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.compute.cores import usable_cores
from qz.quantize.report_of_record import report_of_record
from qz.quantize.streaming.not_finite import NotFinite
from qz.quantize.streaming.readable import require_readable
from qz.quantize.streaming.shares import not_finite
from qz.quantize.summary import told_of_nonfinite

if TYPE_CHECKING:
    from qz.formats.publish.destination import Destination, PushResult

MOST_NAMED = 12
"""Parts that a message names."""


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
        return (*self.record.about.get("warnings", ()), *told_of_nonfinite(counts, dtype))

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
        from qz.quantize.merge_on_hub import merge_on_hub

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
            found = find_shares(disk, folder)  # now that no part begins any more
            require_all(output, place, found)
            made = [read_share(place / Share(number, found.count).folder) for number in sorted(found.finished)]
            require_alike(place, made)
            _require_equal(staging, made)
            checked = _Verification(folder, staging, progress, threads)
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
        raise MalformedInput(f"{output} was complete, and has no record any more: somebody changed it.")
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
    with suppress(OutputRefused):  # what is there is judged later
        check_output(output, True, (), disk)


def _finish_exchange(output: Path, disk: Disk) -> None:
    """Remove what a merge left that was stopped just after the output got its name."""
    if disk.status(sibling(output, JOURNAL)) is not None:
        with suppress(OutputRefused), Staging(output, {}, needed=0, disk=disk):
            pass  # it finds the output there, tidies up, and refuses to make another


def _merged_before(output: Path, place: Path) -> Merged:
    """The output, if it is complete although there are no parts (any more)."""
    record = _record_in(output)
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


def _record_in(place: Path) -> Record | None:
    """The record of a checkpoint; None if there is none that can be read."""
    try:
        folder = LocalFolder(place)
    except QzError:
        return None
    try:
        return read_record(folder)
    except QzError:
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


def require_all(output: Path, place: Path, found: SharesFound) -> None:
    """Raise MissingInput or TryAgain, naming what is missing, unless every part is finished and none is at work."""
    if len(found.counts) > 1:
        several = " and ".join(f"of {count}" for count in sorted(found.counts))
        raise MalformedInput(f"{place} holds parts {several}: those of several runs. Keep one run's, and merge again.")
    if not found.counts:
        raise MissingInput(f"{place} holds no part. Make them first, with --part 1/N to N/N.")
    if found.running:
        which = _numbers(sorted(found.running), found.count)
        raise TryAgain(f"{which} being made at this moment. Merge {output} when all are done.")
    if found.missing:
        which = _numbers(found.missing, found.count)
        broken = [number for number in found.missing if number in found.interrupted]
        interrupted = f" ({', '.join(map(str, broken[:MOST_NAMED]))} interrupted)" if broken else ""
        raise MissingInput(
            f"{which} missing in {place}{interrupted}. Run the command that made the others with "
            f"--part {found.missing[0]}/{found.count}"
            f"{', and so on' if len(found.missing) > 1 else ''}, then merge again."
        )


def _numbers(numbers: Sequence[int], count: int) -> str:
    """``Part 3 of 7 is``, ``Parts 3, 5 of 7 are``."""
    shown = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return f"Part {shown} of {count} is" if len(numbers) == 1 else f"Parts {shown}{more} of {count} are"


def require_alike(place: Path, made: Sequence[FinishedShare]) -> None:
    """Raise MalformedInput unless all parts are of one run, and each lists what is its to make."""
    first = made[0]
    for each in made:
        share = each.receipt.share
        if each.receipt.fingerprint != first.receipt.fingerprint:
            difference = describe_difference(first.receipt.fingerprint, each.receipt.fingerprint)
            raise MalformedInput(
                f"Parts {first.receipt.share} and {share} in {place} were made differently: {difference}. Make all "
                "parts of the same source, with the same settings, versions and device."
            )
        if each.receipt.owners != first.receipt.owners or each.record.about != first.record.about:
            difference = describe_difference(dict(first.record.about), dict(each.record.about)) or "what each makes"
            raise MalformedInput(
                f"Parts {first.receipt.share} and {share} in {place} are not of one plan: {difference}. "
                "Make them again, all with the same qz."
            )
        if each.shared != first.shared:
            names = sorted(
                name
                for name in each.shared.keys() | first.shared.keys()
                if each.shared.get(name) != first.shared.get(name)
            )
            raise MalformedInput(
                f"Parts {first.receipt.share} and {share} in {place} differ in {names[0]}, which each of them makes. "
                "Make them again, all with the same qz."
            )
        owned = {name for name, number in each.receipt.owners.items() if number == share.number}
        if each.own.keys() != owned or not each.files.keys() <= owned | each.shared.keys():
            raise MalformedInput(
                f"Part {share} in {place} does not list the files that are its to make. {again(share)}"
            )


def _require_equal(staging: Staging, made: Sequence[FinishedShare]) -> None:
    """Raise MalformedInput if what is staged already, by a merge or a run that was interrupted, is not of the parts."""
    for each in made:
        for name, file in each.own.items():
            if staging.finished.get(name, file) != file:
                raise MalformedInput(
                    f"{name} of part {each.receipt.share} differs from the one that an interrupted run of all left in "
                    f"{sibling(staging.output, PARTIAL)}. Remove that folder and its journal, and merge again."
                )


def again(share: Share) -> str:
    return f"Make it again: the same command with --part {share} --no-resume."


class _Verification:
    """Reads every file of every part once, in several threads, and remembers which file it was that it read."""

    def __init__(self, folder: Directory, staging: Staging, progress: OnProgress, threads: int) -> None:
        self._folder, self._staging, self._progress = folder, staging, progress
        self._threads = threads
        self._marks: dict[str, tuple[int, int, int]] = {}
        self._lock = threading.Lock()
        self.shared: dict[str, bytes] = {}
        """The content of the small files."""

    def verify(self, made: Sequence[FinishedShare]) -> None:
        """Raise MalformedInput for the first file that is missing or differs from what its part recorded."""
        todo = [(each, file) for each in made for file in each.record.files if not self._is_taken(file)]
        self._total = sum(file.bytes for _, file in todo)
        self._done = self._files = 0
        self._count = len(todo)
        with ThreadPoolExecutor(self._threads) as pool:
            work = [pool.submit(self._check, each, file) for each, file in todo]
            try:
                for each in work:
                    each.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _is_taken(self, file: WrittenFile) -> bool:
        """Whether an interrupted merge has it already."""
        return self._staging.finished.get(file.name) == file

    def _check(self, part: FinishedShare, file: WrittenFile) -> None:
        share, name = part.receipt.share, f"{part.receipt.share.folder}/{file.name}"
        where = self._folder.path / name
        mark = self._mark(name)
        if mark is None or mark[1] != file.bytes:
            raise MalformedInput(f"{where} is missing or has another size than when it was made. {again(share)}")
        found = hash_file(self._folder, name)
        if found != file.sha256:
            raise MalformedInput(
                f"{where} is damaged: its SHA-256 is {found}; it was made with {file.sha256}. {again(share)}"
            )
        if file.name in part.shared and file.name not in self.shared:
            self.shared[file.name] = self._read(name, file)
        if self._mark(name) != mark:
            raise _changed(where)
        with self._lock:
            self._marks[name] = mark
            self._done, self._files = self._done + file.bytes, self._files + 1
            self._progress(Progress("Verifying", self._files, self._count, self._done, self._total, unit="file"))

    def _read(self, name: str, file: WrittenFile) -> bytes:
        data = bytearray(file.bytes)
        descriptor, path = self._folder.open(name), self._folder.path / name
        try:
            self._folder.disk.read(descriptor, path, memoryview(data), 0)
        finally:
            self._folder.disk.close(descriptor, path)
        return bytes(data)

    def _mark(self, name: str) -> tuple[int, int, int] | None:
        """What tells a file from one put in its place; a move does not change it."""
        found = self._folder.status(name)
        return None if found is None else (found.st_ino, found.st_size, found.st_mtime_ns)

    def adopt(self, part: FinishedShare, folder: Directory, staging: Staging) -> None:
        """Move the weights of a part into the output."""
        for file in part.own.values():
            if self._is_taken(file):
                continue
            name = f"{part.receipt.share.folder}/{file.name}"
            if self._mark(name) != self._marks[name]:
                raise _changed(self._folder.path / name)
            staging.adopt(folder, file)


def _changed(path: Path) -> MalformedInput:
    return MalformedInput(f"{path} was changed by someone else meanwhile. Run the same command again.")


def remove(folder: Directory, parent: Directory, found: SharesFound) -> None:
    """Remove what is left of the parts, and nothing else: a folder that holds more stays."""
    for number in sorted(found.finished):
        share = Share(number, found.count)
        record = _record_in(folder.path / share.folder)
        names = [file.name for file in record.files] if record is not None else []
        for name in (*names, RECORD) if names else ():
            with _gone_or_in_use():
                folder.remove(f"{share.folder}/{name}")
        inside = {"/".join(name.split("/")[:depth]) for name in names for depth in range(1, name.count("/") + 1)}
        for inner in (*sorted(inside, reverse=True), ""):
            with _gone_or_in_use():
                folder.remove_empty(f"{share.folder}/{inner}".rstrip("/"))
    with _gone_or_in_use():
        parent.remove_empty(folder.path.name)


@contextmanager
def _gone_or_in_use() -> Iterator[None]:
    """Another merge may remove the same at the same time; what holds something else stays."""
    try:
        yield
    except OutputRefused:
        pass
    except QzError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
