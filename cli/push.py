"""``qz push``: a finished checkpoint to the Hub, in one commit."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qz.cli import options
from qz.cli.output import facts, say, show, size
from qz.cli.progress import Display

if TYPE_CHECKING:
    from qz.formats.publish.destination import Destination, PushResult
    from qz.formats.publish.upload import PushProgress


def push(
    folder: options.FolderArg,
    repo_id: options.RepoArg,
    subfolder: options.PushSubfolderOpt = None,
    public: options.PublicOpt = None,
    branch: options.BranchOpt = "main",
    create_pr: options.CreatePrOpt = False,
    replace: options.ReplaceOpt = False,
    message: options.MessageOpt = None,
    dry_run: options.DryRunOpt = False,
    as_json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
) -> None:
    """Publish a checkpoint on the Hub: verified first, then weights and config in one commit, with a model card."""
    from qz.formats.publish.destination import Destination

    private = None if public is None else not public
    to = Destination(repo_id, subfolder or "", branch, create_pr, private, message, replace)
    result = publish(folder, to, dry_run=dry_run, quiet=quiet)
    show(result.as_json(), as_json=as_json, text=facts(report(result)))


def publish(
    folder: Path, to: Destination, *, dry_run: bool = False, quiet: bool = False, source_private: bool | None = None
) -> PushResult:
    """Push with its progress and notes on stderr. Raises what ``qz.formats.publish.push`` raises."""
    from qz.formats.publish import push as hub

    with ExitStack() as stack:
        displays: dict[str, Display] = {}

        def progress(now: PushProgress) -> None:
            if now.doing not in displays:
                stack.close()
                displays[now.doing] = stack.enter_context(Display(now.doing, unit="file", quiet=quiet))
            displays[now.doing](Step(now.files, now.all_files, now.bytes, now.all_bytes))

        result = hub.push(folder, to, dry_run=dry_run, source_private=source_private, progress=progress)
    for note in result.notes:
        say(f"Note: {note}.", quiet=quiet)
    return result


@dataclass(frozen=True, slots=True)
class Step:
    """Files of a push, counted where the display counts tensors."""

    weights: int
    all_weights: int
    bytes: int
    all_bytes: int
    shard: str | None = None
    kept: tuple[int, int] | None = None


def report(result: PushResult) -> list[tuple[str, str]]:
    """The result as labels and values."""
    whole = sum(file.bytes for file in result.files)
    rows = [
        ("repository", result.url + (", new" if result.created else "")),
        ("visible to", "you and those you let in" if result.private else "everyone"),
        ("branch", result.to.branch),
        ("files", f"{len(result.files)}, {size(whole)}"),
    ]
    if result.to.folder:
        rows.append(("folder", result.to.folder))
    if result.removed:
        rows.append(("replaced", ", ".join(result.removed)))
    if result.left_out:
        rows.append(("left here", ", ".join(result.left_out)))
    if result.dry_run:
        return [*rows, ("dry run", "nothing was sent")]
    rows.append(("uploaded", size(result.bytes_uploaded)))
    if result.pull_request:
        rows.append(("pull request", result.pull_request))
    return [*rows, ("commit", str(result.commit))]
