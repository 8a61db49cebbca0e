"""The output of one of N runs that together make a checkpoint: a folder of its own in ``<output>.parts/``.

``<output>.parts/3-of-7`` is made as any output is: staged, under a lock and a journal of its own, and complete once it
has its name. It holds the weight files that are its to make, all small files of the whole, ``part.json``, and a record
of them all.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import MalformedInput, OutputRefused, QzError, TryAgain, UsageError
from qz.formats.files.folder import read_file
from qz.formats.files.local_folder import LocalFolder
from qz.formats.json_files import MAX_BYTES, read_json
from qz.formats.malformed import Malformed
from qz.formats.output.recorded.record import (
    RECORD,
    Record,
    WrittenFile,
    as_text,
    hash_of,
    read_record,
    require_safe_name,
)
from qz.formats.output.resuming.difference import describe_difference
from qz.formats.output.resuming.journal import as_fingerprint, look_into
from qz.formats.output.section import Section
from qz.formats.output.staging import Staging
from qz.formats.output.storage.beside import JOURNAL, sibling
from qz.formats.output.storage.directory import Directory
from qz.formats.output.storage.disk import Disk

if TYPE_CHECKING:
    from collections.abc import Iterator

PARTS = ".parts"
PART_FILE = "part.json"
MOST_PARTS = 10_000
"""Parts of one output."""
_NAME = re.compile(r"(\d+)-of-(\d+)", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Share:
    """Part ``number``, from 1, of ``count``."""

    number: int
    count: int

    def __post_init__(self) -> None:
        """Raises UsageError for a part that cannot be."""
        if not 1 <= self.number <= self.count <= MOST_PARTS:
            raise UsageError(
                f"--part {self.number}/{self.count} is not one of 1/N to N/N, where N is at most {MOST_PARTS:,}."
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{self.number}-of-{self.count}"

    @classmethod
    def named(cls, name: str, place: Path) -> Share | None:
        """The part whose folder in ``place`` has this name; None for a name of another kind.

        Raises MalformedInput for one that no part can have, such as 5-of-3.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        number, count = int(match[1]), int(match[2])
        if not 1 <= number <= count <= MOST_PARTS or name != f"{number}-of-{count}":
            raise MalformedInput(
                f"{place / name} is named like a part, but parts are 1-of-N to N-of-N, where N is at most "
                f"{MOST_PARTS:,}. Give it its right name, or move it away."
            )
        return cls(number, count)

    def place(self, output: Path) -> Path:
        """Where it is made."""
        return sibling(output, PARTS) / self.folder

    def as_json(self) -> dict[str, int]:
        return {"number": self.number, "of": self.count}


@dataclass(frozen=True)
class ShareReceipt:
    """What a finished part says of itself and of the whole. ``fingerprint``: see ``Staging``."""

    share: Share
    fingerprint: Mapping[str, Any]
    owners: Mapping[str, int]
    """The number of the part that makes it, for each file of the whole that only one part makes."""
    folders: tuple[str, ...] = ()
    """Those of the output that a converted model lies in; the output itself is the empty name."""
    nonfinite: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    """By folder, tensors that were kept and are not finite: how many values are ``stored`` so, and ``overflowed``."""
    uploaded: bool = False
    """Its own files were sent to the Hub, where the fingerprint says, and are not here."""
    restricted: bool = False
    """Then: whether not everyone may see the source."""

    def encode(self) -> bytes:
        value = {**asdict(self), "share": self.share.as_json()}
        return (json.dumps({"version": 1, **as_text(value)}, indent=2) + "\n").encode()

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> ShareReceipt:
        """From its JSON; ValueError, TypeError, LookupError or AttributeError if it is not one."""
        if value["version"] != 1:
            raise ValueError("its version is not 1; a newer qz may read it")
        share = Share(int(value["share"]["number"]), int(value["share"]["of"]))
        owners = {str(name): int(number) for name, number in value["owners"].items()}
        nonfinite = {
            str(folder): {
                str(name): {"stored": int(count["stored"]), "overflowed": int(count["overflowed"])}
                for name, count in counts.items()
            }
            for folder, counts in value["nonfinite"].items()
        }
        if not isinstance(value["fingerprint"], dict) or not all(1 <= each <= share.count for each in owners.values()):
            raise ValueError("its fingerprint or its owners are damaged")
        folders, sent = tuple(map(str, value["folders"])), value["uploaded"] is True
        for name in (*owners, *filter(None, folders)):
            require_safe_name(name)
        return cls(share, value["fingerprint"], owners, folders, nonfinite, sent, value["restricted"] is not False)


class SectionOfShare(Section):
    """A ``Section`` in which the files of ``elsewhere``, named as in the output, count as finished: others make them.

    A part has the small files of the whole.
    """

    def __init__(self, staging: Staging, name: str, elsewhere: frozenset[str]) -> None:
        super().__init__(staging, name)
        inside = (file for file in elsewhere if file.startswith(self._prefix))
        self._elsewhere = {file.removeprefix(self._prefix): WrittenFile(file, 0, "") for file in inside}
        self.elsewhere = frozenset(self._elsewhere)

    @property
    def finished(self) -> Mapping[str, WrittenFile]:
        return {**self._elsewhere, **super().finished}

    def read_staged(self, name: str, offset: int, buffer: memoryview) -> bool:
        return name not in self._elsewhere and super().read_staged(name, offset, buffer)


@dataclass(frozen=True)
class FinishedShare:
    """A finished part as it was read. The files it lists need not be there any more."""

    receipt: ShareReceipt
    record: Record

    @property
    def files(self) -> dict[str, WrittenFile]:
        """Of the output: all but ``part.json``."""
        return {file.name: file for file in self.record.files if file.name != PART_FILE}

    @property
    def own(self) -> dict[str, WrittenFile]:
        """Those that only this part makes."""
        owners, number = self.receipt.owners, self.receipt.share.number
        return {name: file for name, file in self.files.items() if owners.get(name) == number}

    @property
    def shared(self) -> dict[str, WrittenFile]:
        """Those that every part makes."""
        return {name: file for name, file in self.files.items() if name not in self.receipt.owners}


def read_share(place: Path) -> FinishedShare:
    """The part that lies at ``place``. MalformedInput if it cannot be read as one."""
    folder = LocalFolder(place)
    try:
        record = read_record(folder)
        if record is None or PART_FILE not in folder.sizes():
            raise MalformedInput(f"{place} is not a part that qz made. Move it away, and run its --part again.")
        where = f"{place}/{PART_FILE}"
        data = read_file(folder, PART_FILE, MAX_BYTES)
        value = read_json(data, where)
        try:
            if hash_of(data) not in {file.sha256 for file in record.files if file.name == PART_FILE}:
                raise ValueError(f"its SHA-256 is not the one in {RECORD}")
            receipt = ShareReceipt.of(value)
            if receipt.share.folder != place.name:
                raise ValueError(f"it is that of part {receipt.share}")
            return FinishedShare(receipt, record)
        except (ValueError, TypeError, LookupError, AttributeError, QzError) as error:
            raise Malformed("record-malformed", f"{where} is damaged ({error}). Run this --part again.") from None
    finally:
        folder.close()


@dataclass(frozen=True, slots=True)
class SharesFound:
    """What lies in ``<output>.parts/``, by the number of the part."""

    counts: frozenset[int]
    """How many parts there are to be, by the names; one, unless the parts of several runs are mixed."""
    finished: frozenset[int]
    running: frozenset[int]
    """Those that another process makes now."""
    interrupted: frozenset[int]

    @property
    def count(self) -> int:
        return max(self.counts, default=0)

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(number for number in range(1, self.count + 1) if number not in self.finished)


def find_shares(disk: Disk, folder: Directory) -> SharesFound:
    """What is in the opened ``<output>.parts/``."""
    finished: set[int] = set()
    running: set[int] = set()
    begun: set[int] = set()
    counts: set[int] = set()
    for name in folder.names():
        share = Share.named(name.removesuffix(JOURNAL), folder.path)
        if share is None:
            continue
        if name.endswith(JOURNAL):
            (running if _is_held(disk, folder, name) else begun).add(share.number)
            counts.add(share.count)
        elif folder.kind(name) == "folder":
            finished.add(share.number)
            counts.add(share.count)
    return SharesFound(frozenset(counts), frozenset(finished), frozenset(running), frozenset(begun - finished))


def _is_held(disk: Disk, folder: Directory, name: str) -> bool:
    """Whether another process holds the lock of a journal."""
    descriptor = folder.open_existing(name)
    if descriptor is None:
        return False
    try:
        return not disk.try_lock(descriptor, folder.path / name)
    finally:
        disk.close(descriptor, folder.path / name)


def refuse_linked(output: Path, disk: Disk) -> None:
    """Raise OutputRefused for a link where the folder of the parts would be: a merge does not follow it either."""
    place = sibling(output, PARTS)
    found = disk.status(place)
    if found is not None and stat.S_ISLNK(found.st_mode):
        raise OutputRefused(f"{place} is a symbolic link, not a folder of parts. Move it away, or choose -o/--output.")


def refuse_others(output: Path, share: Share, fingerprint: Mapping[str, Any], disk: Disk) -> None:
    """Raise OutputRefused if other parts lie there that are not of the same run: settings, versions, source, number."""
    wanted, place = as_fingerprint(fingerprint), sibling(output, PARTS)
    for other, found in _fingerprints(place, disk):
        if other == share:
            continue
        if other.count != share.count:
            raise OutputRefused(
                f"{place} holds a part of {other.count}, and this is one of {share.count}. Make all parts with the "
                f"same N, or remove {place}."
            )
        if found is not None and found != wanted:
            raise OutputRefused(
                f"Part {other} in {place} differs from this one: {describe_difference(found, wanted)}. All parts have "
                f"to be made of the same source with the same settings and versions. Correct this one, or remove "
                f"{place}."
            )


def _fingerprints(place: Path, disk: Disk) -> Iterator[tuple[Share, Mapping[str, Any] | None]]:
    """Of all parts that are finished or begun; None where it cannot be read, as of one that is just beginning."""
    if disk.status(place) is None:
        return
    with Directory.at(disk, place) as folder:
        for name in folder.names():
            share = Share.named(name.removesuffix(JOURNAL), place)
            if share is None:
                continue
            if name.endswith(JOURNAL):
                begun = look_into(folder, name, None)
                yield share, begun.fingerprint if begun is not None else None
                continue
            try:
                yield share, read_share(place / name).receipt.fingerprint
            except QzError:  # damaged or gone by now: the merge reports it
                yield share, None


def finished_share(output: Path, share: Share, fingerprint: Mapping[str, Any], disk: Disk) -> FinishedShare | None:
    """The part, if an earlier run has made it and it is what this one would make; None if it is to be made.

    Raises OutputRefused if it was made of something else, and TryAgain if a merge has begun to take its files.
    """
    place = share.place(output)
    if disk.status(place) is None:
        return None
    try:
        found = read_share(place)
    except MalformedInput:
        return None
    wanted = as_fingerprint(fingerprint)
    if found.receipt.fingerprint != wanted:
        raise OutputRefused(
            f"{place} was made of a different source or with different settings "
            f"({describe_difference(found.receipt.fingerprint, wanted)}). Remove {place.parent} to start over, or "
            "write elsewhere with -o/--output."
        )
    with Directory.at(disk, place) as folder:
        own = found.own if found.receipt.uploaded else {}
        for file in found.record.files:
            if file.name in own:
                continue
            status = folder.status(file.name)
            if status is None or status.st_size != file.bytes:
                if disk.status(sibling(output, JOURNAL)) is not None:
                    raise TryAgain(
                        f"A merge of {output} was interrupted. Run `qz merge` for it again: part {share} is made."
                    )
                return None
    return found
