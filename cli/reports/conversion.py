"""What a conversion did, for people and for scripts: its report as tables, JSON, Markdown and an HTML page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qz import UsageError
from qz.cli.output import Column, markdown, plain, say, show, table, warn, write_step_summary
from qz.cli.reports.model import kept_sections, model_sections
from qz.cli.reports.new_file import require_new, store
from qz.cli.reports.next_step import after_output, after_part, after_push, command, tell
from qz.cli.reports.pipeline import pipeline_sections
from qz.cli.reports.push import pushed_text

if TYPE_CHECKING:
    from qz.quantize.provenance.up_to_date import UpToDate
    from qz.quantize.reports.pipeline_summary import PipelineSummary
    from qz.quantize.reports.summary import Summary

FILES = (Column("file", foldable=True), Column("bytes", right=True))


def require_place(page: Path | None, output: Path | None) -> None:
    """Raise for a --page that could not be written when all else is done. It may lie in the output, which comes."""
    if page is None:
        return
    made = os.path.abspath(output) if output is not None else None
    if made == os.path.abspath(page):
        raise UsageError(f"{page} cannot be the page and the output. Name another file with --page.")
    if made != os.path.dirname(os.path.abspath(page)):
        require_new(page, "--page")


def present(
    summary: Summary | PipelineSummary | UpToDate,
    *,
    as_json: bool,
    quiet: bool = False,
    page: Path | None = None,
    push: str | None = None,
) -> None:
    """The report of a conversion: a table or JSON on stdout, warnings and what is next on stderr, Markdown for a CI
    job's page.

    ``page``: the file to write it to as HTML as well. ``push``: the repository that was named.
    """
    from qz.quantize.provenance.up_to_date import UpToDate
    from qz.quantize.reports.pipeline_summary import PipelineSummary

    if summary.pushed is not None:
        for note in summary.pushed.notes:
            say(f"Note: {note}.", quiet=quiet)
    if isinstance(summary, UpToDate):
        for note in summary.notes:
            warn(note)
        if page is not None:
            warn(f"{page} was not written: nothing was done that it could report")
        present_existing(summary, as_json=as_json)
        if not quiet and not as_json:
            tell(*next_steps(summary, push))
        return
    if page is not None and summary.dry_run:
        say(f"Note: the run would write {page}; a dry run writes nothing.", quiet=quiet)
    elif page is not None:
        from qz.cli.reports.page import conversion_page

        store(page, conversion_page(summary), "--page")
        if summary.pushed is not None and summary.output and page.parent == Path(summary.output):
            again = command(
                "qz", "push", summary.output, summary.pushed.to.repo_id, *in_folder(summary.pushed.to.folder)
            )
            warn(f"{page} reports the whole run, so it was written after the push. `{again}` adds it")
    for warning in summary.warnings:
        warn(warning)
    sections = pipeline_sections(summary) if isinstance(summary, PipelineSummary) else model_sections(summary)
    sections += kept_sections(summary)
    texts = [*(section.text() for section in sections), *pushed_text(summary.pushed)]
    show(summary.as_json(), as_json=as_json, text="\n\n".join(texts), done=outcome(summary))
    if not summary.dry_run:
        shown = [section.markdown() for section in sections]
        write_step_summary("\n\n".join([f"### qz {summary.act}: {summary.method}", *shown]))
        if not quiet and not as_json:
            tell(*next_steps(summary, push))
    elif not quiet and not as_json:
        say(*table(FILES, [(shard.name, f"{shard.bytes:,}") for shard in summary.shards]).split("\n"))


def in_folder(folder: str) -> tuple[str, ...]:
    """The words that name a folder in a repository."""
    return ("--subfolder", folder) if folder else ()


def next_steps(summary: Summary | PipelineSummary | UpToDate, push: str | None) -> list[list[str]]:
    """What to do next with the output, the part of one, or what was pushed."""
    if summary.pushed is not None:
        return after_push(summary.pushed)
    if getattr(summary, "share", None) is not None:
        return after_part(Path(summary.output), push)
    return after_output(Path(summary.output))


def present_existing(found: UpToDate, *, as_json: bool) -> None:
    """A run with nothing to do: the report of the one that made the output."""
    text = (
        f"{found.output} is up to date: made from the same source with the same settings, and complete. Nothing to do."
    )
    say(text, quiet=not as_json)
    show(found.as_json(), as_json=as_json, text="\n\n".join([plain(text), *pushed_text(found.pushed)]), done=text)
    write_step_summary(f"### qz\n\n{markdown(text)}")


def outcome(summary: Summary | PipelineSummary) -> str:
    """What holds after the run, whether or not its report can be written."""
    if summary.dry_run:
        return ""
    made = f"{summary.output} is complete. " if summary.output else ""
    return made + (f"{summary.pushed.url} has it. " if summary.pushed else "") + "There is nothing to run again."
