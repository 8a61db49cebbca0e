"""What was published on the Hub, or would be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.cli.output import facts, size

if TYPE_CHECKING:
    from qz.formats.publish.destination import PushResult


def pushed_text(pushed: PushResult | None) -> list[str]:
    """The report of the push that followed, if one did."""
    return [] if pushed is None else [facts(report(pushed))]


def report(result: PushResult) -> list[tuple[str, str]]:
    """The result as labels and values."""
    whole = sum(file.bytes for file in result.files)
    rows = [
        ("repository", result.url + (", new" if result.created else "")),
        ("visibility", "private" if result.private else "public"),
        ("branch", result.to.branch),
        ("files", f"{len(result.files):,}, {size(whole)}"),
    ]
    if result.to.folder:
        rows.append(("folder", result.to.folder))
    if result.removed:
        rows.append(("replaced", ", ".join(result.removed)))
    if result.left_out:
        rows.append(("not uploaded", ", ".join(result.left_out)))
    if result.dry_run:
        return [*rows, ("dry run", "nothing was sent")]
    rows.append(("uploaded", size(result.bytes_uploaded)))
    if result.pull_request:
        rows.append(("pull request", result.pull_request))
    return [*rows, ("commit", str(result.commit))]
