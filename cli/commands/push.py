"""``qz push``: a finished checkpoint to the Hub, in one commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.cli.options import arguments, hub, reports
from qz.cli.output import facts, say, show
from qz.cli.progress import Display
from qz.cli.reports.next_step import after_push, tell
from qz.cli.reports.push import report

if TYPE_CHECKING:
    from qz.formats.publish.destination import PushResult


def push(
    folder: arguments.FolderArg,
    repo_id: arguments.RepoArg,
    subfolder: hub.PushSubfolderOpt = None,
    public: hub.PublicOpt = None,
    branch: hub.BranchOpt = "main",
    create_pr: hub.CreatePrOpt = False,
    replace: hub.ReplaceOpt = False,
    message: hub.MessageOpt = None,
    dry_run: reports.DryRunOpt = False,
    as_json: reports.JsonOpt = False,
    quiet: reports.QuietOpt = False,
) -> None:
    """Publish a checkpoint on the Hub: verified first, then weights and config in one commit, with a model card."""
    from qz import api

    with Display(quiet=quiet) as display:
        result = api.push(
            folder,
            repo_id,
            subfolder=subfolder,
            public=public,
            branch=branch,
            create_pr=create_pr,
            replace=replace,
            message=message,
            dry_run=dry_run,
            on_progress=display,
        )
    for note in result.notes:
        say(f"Note: {note}.", quiet=quiet)
    show(result.as_json(), as_json=as_json, text=facts(report(result)), done=outcome(result))
    if not result.dry_run and not quiet and not as_json:
        tell(*after_push(result))


def outcome(result: PushResult) -> str:
    """What holds after the push, whether or not its report can be written."""
    return "" if result.dry_run else f"{result.url} has the checkpoint. There is nothing to run again."
