"""``qz merge``: what the runs of ``--part`` made becomes one output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.cli.options import arguments, hub, machine, outputs, reports
from qz.cli.output import duration, facts, show, size, warn
from qz.cli.progress import Display
from qz.cli.reports.next_step import after_output, after_push, tell
from qz.cli.reports.push import pushed_text

if TYPE_CHECKING:
    from pathlib import Path

    from qz.quantize.merging.merge import Merged


def merge(
    output: arguments.MergedArg,
    overwrite: outputs.ReplaceOutputOpt = False,
    push: hub.PushOpt = None,
    push_subfolder: hub.IntoSubfolderOpt = None,
    public: hub.PublicOpt = None,
    fsync: outputs.FsyncOpt = True,
    threads: machine.ThreadsOpt = None,
    as_json: reports.JsonOpt = False,
    quiet: reports.QuietOpt = False,
) -> None:
    """Complete an output from its parts: all there, alike, every hash compared, then moved into place at once."""
    from qz import api

    with Display(quiet=quiet) as display:
        done = api.merge(
            output,
            overwrite=overwrite,
            push=push,
            push_subfolder=push_subfolder,
            public=public,
            fsync=fsync,
            threads=threads,
            on_progress=display,
        )
    for warning in done.warnings if not done.up_to_date else ():
        warn(warning)
    text = "\n\n".join([facts(report(done, output)), *pushed_text(done.pushed)])
    place = str(output) if done.here or done.pushed is None else done.pushed.url
    show(done.as_json(), as_json=as_json, text=text, done=f"{place} is complete. There is nothing to run again.")
    if not quiet and not as_json:
        tell(*(after_output(output) if done.pushed is None else after_push(done.pushed)))


def report(done: Merged, output: Path) -> list[tuple[str, str]]:
    """The result as labels and values, with the output as it was named."""
    rows = [("output", str(output) if done.here else "on the Hub only")]
    if done.up_to_date:
        return [*rows, ("merged", "before this run, and complete: nothing to do")]
    return [
        *rows,
        ("parts", f"{done.parts:,}, every hash compared"),
        ("files", f"{len(done.record.files):,}, {size(done.bytes)}"),
        ("took", duration(done.seconds)),
    ]
