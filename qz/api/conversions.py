"""What both conversions share: making only a part of the output, and publishing it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, ParamSpec

from qz import TryAgain, UsageError
from qz.progress import OnProgress

if TYPE_CHECKING:
    from qz.formats.output.shares import Share
    from qz.formats.publish.destination import Destination
    from qz.formats.publish.publication import Publication
    from qz.formats.source import OpenedSource
    from qz.quantize.conversion import Conversion
    from qz.quantize.provenance.up_to_date import UpToDate
    from qz.quantize.reports.pipeline_summary import PipelineSummary
    from qz.quantize.reports.summary import Summary
    from qz.quantize.settings import Settings

    Converted = Summary | PipelineSummary | UpToDate

P = ParamSpec("P")


def once_more_if_lost(convert: Callable[P, Converted]) -> Callable[P, Converted]:
    """Convert again if the Hub has lost files that were sent to it; what it still has is not made again."""

    @wraps(convert)
    def converted(*arguments: P.args, **named: P.kwargs) -> Converted:
        try:
            return convert(*arguments, **named)
        except TryAgain as error:
            from qz.formats.publish.destination import UploadsLost

            if not isinstance(error, UploadsLost):
                raise
            return convert(*arguments, **named)

    return converted


def share_of(part: str | None, *, measured: bool) -> Share | None:
    """The part that is asked for, in words or by the environment; None for all."""
    if part is None:
        return None
    from qz.quantize.array_task import parse_part

    if measured:
        raise UsageError("A part does not see the whole model: measure the loss with `qz compare` after the merge.")
    return parse_part(part, os.environ)


def destination(push: str | None, subfolder: str | None, public: bool | None) -> Destination | None:
    """Where the output is published, if it is."""
    if push is None:
        return None
    from qz.formats.publish.destination import Destination

    return Destination(push, subfolder or "", private=None if public is None else not public)


class Publishing(NamedTuple):
    """Where an output is published. ``source_private``: something that it is made of is private or gated."""

    to: Destination
    source_private: bool


def possible_publishing(
    push: str | None,
    subfolder: str | None,
    public: bool | None,
    source: OpenedSource,
    settings: Settings,
) -> Publishing | None:
    """Where the output is published, if it is. Raises now what would fail after the work."""
    to = destination(push, subfolder, public)
    if to is None:
        return None
    from qz.formats.publish.push import require_possible

    private = is_source_restricted(source, settings)
    require_possible(to, source_private=private)
    return Publishing(to, private)


def publication_for(publishing: Publishing, source: OpenedSource, on_progress: OnProgress) -> Publication:
    """What publishes the output while it is made."""
    from qz.formats.publish.publication import Publication
    from qz.formats.source import save_memory

    for folder in (source.root, source.folder):
        save_memory(folder)
    return Publication(publishing.to, source_private=publishing.source_private, progress=on_progress)


def published(
    done: Converted, conversion: Conversion, publishing: Publishing | None, original: OpenedSource | None = None
) -> Converted:
    """The report of a conversion, with notes on what it read, and the result of the push, if one was asked for.

    ``original``: what it was compared with.
    """
    from qz.formats.source import notes_of

    loras = (lora.folder for lora in conversion.settings.loras)
    read = (*conversion.source.notes, *notes_of(*loras), *(original.notes if original is not None else ()))
    done = replace(done, notes=(*done.notes, *read))
    if publishing is None or conversion.dry_run or conversion.publication is not None:
        return done
    from qz.formats.publish.push import push as send

    to, private = publishing
    pushed = send(Path(done.output), to, source_private=private, progress=conversion.on_progress)
    return replace(done, pushed=pushed)


def is_source_restricted(source: OpenedSource, settings: Settings) -> bool:
    """Whether something that the output is made of, such as a LoRA or a config that is named, is private or gated."""
    from qz.formats.source import is_restricted, open_source

    if any(map(is_restricted, [source.folder, *(lora.folder for lora in settings.loras)])):
        return True
    if settings.config is None:
        return False
    with closing(open_source(settings.config, cached=False)) as folder:
        return is_restricted(folder)
