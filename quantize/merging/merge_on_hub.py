"""Put together parts whose weights were sent to the Hub: one commit from their receipts, and no output here."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qz import MalformedInput, TryAgain, UsageError
from qz.formats.output.recorded.record import RECORD, Record, WrittenFile, encode_record
from qz.formats.output.shards.checksums import hash_file
from qz.formats.output.shares import PARTS, FinishedShare, Share, find_shares, read_share
from qz.formats.output.storage.beside import sibling
from qz.formats.output.storage.directory import Directory
from qz.formats.publish.destination import Destination, UploadsLost
from qz.formats.publish.publication import Publication
from qz.formats.publish.verified_file import VerifiedFile
from qz.quantize.merging.checks import again, require_alike, require_all
from qz.quantize.merging.merge import Merged, nonfinite_of, remove

if TYPE_CHECKING:
    from qz.formats.output.storage.disk import Disk
    from qz.progress import OnProgress


def merge_on_hub(output: Path, to: Destination, disk: Disk, progress: OnProgress) -> Merged:
    """Publish what the parts beside ``output`` sent; the small files come from their receipts.

    Raises what ``merge`` raises, UsageError if they sent it elsewhere, and TryAgain if the Hub no longer has all of it.
    """
    begun = time.monotonic()
    place = sibling(output, PARTS)
    with Directory.at(disk, output.parent) as parent, parent.enter(place.name) as folder:
        found = find_shares(disk, folder)
        require_all(output, place, found)
        made = [read_share(place / Share(number, found.count).folder) for number in sorted(found.finished)]
        require_alike(place, made)
        _require_whole(folder, made)
        publication = Publication(to, source_private=made[0].receipt.restricted, progress=progress)
        _require_place(made[0], publication)
        sent = {name: file for each in made for name, file in each.own.items()}
        record = Record(tuple(sorted([*sent.values(), *made[0].shared.values()], key=_name)), made[0].record.about)
        publication.begin(name for name in sent if name.endswith(".safetensors"))
        with tempfile.TemporaryDirectory() as temporary:
            written = Path(temporary) / RECORD
            written.write_bytes(encode_record(record.files, record.about))
            first = place / made[0].receipt.share.folder
            here = {RECORD: VerifiedFile.of(written)} | {name: VerifiedFile.of(first / name) for name in made[0].shared}
            uploaded = {name: (file.bytes, file.sha256) for name, file in sent.items()}
            try:
                pushed = publication.publish(uploaded, here, record.about)
            except UploadsLost as lost:
                raise _lost(made[0], lost) from None
        remove(folder, parent, found)
    took = time.monotonic() - begun
    return Merged(output, record, len(made), nonfinite_of(made), pushed=pushed, here=False, seconds=took)


def _name(file: WrittenFile) -> str:
    return file.name


def _require_whole(folder: Directory, made: Sequence[FinishedShare]) -> None:
    """Raise MalformedInput unless the small files of every part are as it recorded them."""
    for each in made:
        share = each.receipt.share
        for file in each.shared.values():
            name = f"{share.folder}/{file.name}"
            if folder.kind(name) != "file" or hash_file(folder, name) != file.sha256:
                raise MalformedInput(f"{folder.path / name} is missing or damaged. {again(share)}")


def _require_place(part: FinishedShare, publication: Publication) -> None:
    told = part.receipt.fingerprint.get("push")
    if told != publication.place:
        raise UsageError(
            f"The parts were sent to {(told or {}).get('repository')} (folder {(told or {}).get('folder') or '/'!r}), "
            f"not to {publication.place['repository']} (folder {publication.place['folder'] or '/'!r}). Name that one."
        )


def _lost(part: FinishedShare, lost: UploadsLost) -> TryAgain:
    """What to say if the Hub has swept out what was sent and not committed for long."""
    numbers = sorted({part.receipt.owners[name] for name in lost.names})
    count = part.receipt.share.count
    which = ", ".join(f"--part {number}/{count}" for number in numbers)
    return TryAgain(
        f"The Hub no longer has {len(lost.names):,} of the files that were sent. Nothing was committed. Make them "
        f"again with --no-resume ({which}), and merge soon."
    )
