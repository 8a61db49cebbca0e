"""Whether parts are those of one run, and all of them: what keeps them from being merged, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qz import MalformedInput, MissingInput, TryAgain
from qz.formats.output.resuming.difference import describe_difference
from qz.formats.output.shares import FinishedShare, Share, SharesFound
from qz.formats.output.staging import Staging
from qz.formats.output.storage.beside import PARTIAL, sibling

MOST_NAMED = 12
"""Parts that a message names."""


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


def require_equal(staging: Staging, made: Sequence[FinishedShare]) -> None:
    """Raise MalformedInput if what is staged already, by a merge or a run that was interrupted, is not of the parts."""
    for each in made:
        for name, file in each.own.items():
            if staging.finished.get(name, file) != file:
                raise MalformedInput(
                    f"{name} of part {each.receipt.share} differs from the one that an interrupted run of all left in "
                    f"{sibling(staging.output, PARTIAL)}. Remove that folder and its journal, and merge again."
                )


def again(share: Share) -> str:
    """What to do about a part that cannot be used."""
    return f"Make it again: the same command with --part {share} --no-resume."
