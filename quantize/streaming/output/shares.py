"""Which part of N makes which file of an output: a function of the plan alone, so that all parts agree without talking.

Files stay in the order in which the source holds what they are made of, and each part gets a stretch of them: a source
file that is read from the Hub is fetched, and its hash checked, as a whole, so parts should not share many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qz.formats.output.preflight import check_output
from qz.formats.output.shares import FinishedShare, Share, ShareReceipt, finished_share, refuse_others
from qz.formats.output.staging import RESUMABLE
from qz.quantize.streaming.measuring.not_finite import NotFinite

if TYPE_CHECKING:
    from qz.formats.publish.publication import Publication
    from qz.quantize.planning.plan import Plan
    from qz.quantize.streaming.output.output_folders import OutputFolder, Target


def owners_of(folders: Sequence[OutputFolder], share: Share | None) -> dict[str, int]:
    """For every weight file and every large file that is copied, the number of the part that makes it."""
    if share is None:
        return {}
    return divided([(name, read + written) for name, read, written in _files(folders)], share.count)


def divided(files: Sequence[tuple[str, int]], count: int) -> dict[str, int]:
    """The number of each file's part, from 1: ``count`` stretches, of which the largest is as small as can be.

    ``files``: name, and bytes to read and write. The others are as even as that allows; with more parts than files some
    get none.
    """
    least = max((nbytes for _, nbytes in files), default=0)
    most = sum(nbytes for _, nbytes in files)
    while least < most:
        middle = (least + most) // 2
        if _stretches(files, middle)[0] <= count:
            most = middle
        else:
            least = middle + 1
    needed = _stretches(files, least)
    numbers: dict[str, int] = {}
    number, filled, left = 1, 0, sum(nbytes for _, nbytes in files)
    for position, (name, nbytes) in enumerate(files):
        parts = count - number + 1  # including this one
        enough = filled and 2 * (filled * parts) + nbytes * parts > 2 * (left + filled)
        if filled + nbytes > least or (enough and needed[position] < parts):
            number, filled = number + 1, 0
        numbers[name] = number
        filled, left = filled + nbytes, left - nbytes
    return numbers


def _stretches(files: Sequence[tuple[str, int]], room: int) -> list[int]:
    """How many stretches of at most ``room`` bytes the files from each position on need; 0 after the last one."""
    needed = [0] * (len(files) + 1)
    stop, filled = len(files), 0
    for start in range(len(files) - 1, -1, -1):
        filled += files[start][1]
        while filled > room:
            stop -= 1
            filled -= files[stop][1]
        needed[start] = 1 + needed[stop]
    return needed


def shards_of(folders: Sequence[OutputFolder], share: Share | None) -> set[str] | None:
    """The files that the part makes; None for a run that makes all."""
    if share is None:
        return None
    return {name for name, number in owners_of(folders, share).items() if number == share.number}


def elsewhere(owners: Mapping[str, int], share: Share | None) -> frozenset[str]:
    """The files that other parts make."""
    return frozenset(name for name, number in owners.items() if share is not None and number != share.number)


def bytes_elsewhere(folders: Sequence[OutputFolder], share: Share | None) -> int:
    """Bytes of the output that other parts write."""
    others = elsewhere(owners_of(folders, share), share)
    return sum(written for name, _, written in _files(folders) if name in others)


def _files(folders: Sequence[OutputFolder]) -> Iterator[tuple[str, int, int]]:
    """Name, bytes read for it and bytes of it, in the order of the source."""
    for folder in folders:
        if folder.plan is not None:
            read, first = _read_for(folder.plan)
            for home in sorted(range(len(folder.plan.shards)), key=lambda home: (first.get(home, 0), home)):
                layout = folder.plan.shards[home]
                yield folder.prefix + layout.file, read.get(home, 0), layout.size
        for each in folder.carried:
            if each.bytes >= RESUMABLE:
                yield folder.prefix + each.name, each.bytes, each.bytes


def _read_for(plan: Plan) -> tuple[dict[int, int], dict[int, int]]:
    """By shard, the bytes that are read for it, and the position of the first step that writes into it."""
    read: dict[int, int] = {}
    first: dict[int, int] = {}
    for number, step in enumerate(plan.steps):
        nbytes = sum(source.nbytes for source in step.sources)
        for home in [step.shard] if step.shard >= 0 else {plan.shard_of[saved.name] for saved in step.outputs}:
            read[home] = read.get(home, 0) + nbytes
            first.setdefault(home, number)
    return read, first


def made_before(target: Target, fingerprint: Mapping[str, Any]) -> FinishedShare | None:
    """The part of the output that is to be made, if it is finished."""
    if target.share is None or not target.resume:
        return None
    found = finished_share(target.output, target.share, fingerprint, target.disk)
    if found is not None:
        refuse_others(target.output, target.share, fingerprint, target.disk)
    return found


def require_alone(target: Target, fingerprint: Mapping[str, Any]) -> None:
    """Once this part holds its lock: raise what keeps it from being one of those that lie beside it.

    OutputRefused: they are of another run, or the output is there by now. TryAgain: they are being merged.
    """
    if target.share is not None:
        refuse_others(target.output, target.share, fingerprint, target.disk)
    if target.share is not None and target.publication is None:
        check_output(target.output, target.overwrite, (), target.disk)


def receipt(
    share: Share,
    fingerprint: Mapping[str, Any],
    owners: Mapping[str, int],
    folders: Sequence[OutputFolder],
    nonfinite: Mapping[str, Mapping[str, NotFinite]],
    publication: Publication | None,
) -> bytes:
    """``part.json``."""
    counts = {
        folder: {name: asdict(count) for name, count in found.items()} for folder, found in nonfinite.items() if found
    }
    models = tuple(folder.name for folder in folders if folder.plan is not None)
    uploaded = publication is not None
    restricted = publication is not None and publication.is_restricted
    return ShareReceipt(share, fingerprint, owners, models, counts, uploaded, restricted).encode()


def not_finite(found: ShareReceipt) -> dict[str, dict[str, NotFinite]]:
    """By folder of the output, the tensors that are not finite in it."""
    known = {
        folder: {name: NotFinite(**count) for name, count in counts.items()}
        for folder, counts in found.nonfinite.items()
    }
    return {folder: known.get(folder, {}) for folder in found.folders}
