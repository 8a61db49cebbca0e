"""What both conversions share: the request, the source that is opened for it, and publishing the output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, ParamSpec

from qz import TryAgain, UsageError
from qz.progress import OnProgress

if TYPE_CHECKING:
    from qz.api.effects import Asked
    from qz.formats.output.shares import Share
    from qz.formats.publish.destination import Destination
    from qz.formats.publish.publication import Publication
    from qz.formats.source import OpenedSource
    from qz.quantize.conversion import Conversion
    from qz.quantize.provenance.up_to_date import UpToDate
    from qz.quantize.reports.pipeline_summary import PipelineSummary
    from qz.quantize.reports.summary import Summary
    from qz.quantize.settings import IfExists, Settings

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


@dataclass(frozen=True, kw_only=True)
class ConversionRequest:
    """What both conversions are asked for besides their ``Settings``. ``measured``: the loss is asked for."""

    source: str
    subfolder: str | None
    revision: str | None
    lora: Sequence[str]
    output: Path | None
    if_exists: IfExists
    resume: bool
    fsync: bool
    download: bool
    push: str | None
    push_subfolder: str | None
    push_only: bool
    public: bool | None
    part: str | None
    measured: bool
    dry_run: bool
    on_progress: OnProgress

    @contextmanager
    def opened(self, asked: Asked, settings: Settings) -> Iterator[tuple[Conversion, Publishing | None]]:
        """The conversion of the opened source, and where its output is published.

        Raises what can be known without a plan, such as UsageError for options that would have no effect.
        """
        from qz.formats.files.folder import is_pipeline
        from qz.formats.output.storage.disk import Disk
        from qz.formats.source import local_path, opened, opened_loras
        from qz.quantize.conversion import Conversion

        share = _share_of(self.part, measured=self.measured)
        asked.require(hub=local_path(self.source) is None, shards=settings.layout != "single-file")
        asked.require(push=self.push is not None, published=self.part is None or self.push_only)
        asked.require(output_here=not self.push_only)
        cached = self.push is None
        with (
            opened_loras(self.lora, cached=cached) as loras,
            opened(
                self.source,
                self.subfolder,
                self.revision,
                cached=cached,
                allow_pickle=settings.allow_pickle,
                file=settings.file,
            ) as found,
        ):
            settings = replace(settings, loras=loras)
            pipeline, one_file = is_pipeline(found.folder), found.file is not None
            asked.require(one_file=one_file, folder=not one_file, model=not pipeline)
            if not one_file:
                asked.require(pipeline=pipeline)
            publishing = _possible_publishing(self, found, settings)
            conversion = Conversion(
                source=found,
                settings=settings,
                output=self.output,
                if_exists=self.if_exists,
                resume=self.resume,
                disk=Disk(durable=self.fsync),
                download=self.download,
                dry_run=self.dry_run,
                on_progress=self.on_progress,
                publication=_publication_for(publishing, found, self.on_progress) if self.push_only else None,
                share=share,
                measured=self.measured,
            )
            yield conversion, publishing


def _share_of(part: str | None, *, measured: bool) -> Share | None:
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


def _possible_publishing(request: ConversionRequest, source: OpenedSource, settings: Settings) -> Publishing | None:
    """Where the output is published, if it is. Raises now what would fail after the work."""
    to = destination(request.push, request.push_subfolder, request.public)
    if to is None:
        return None
    from qz.formats.publish.push import require_possible

    private = _is_source_restricted(source, settings)
    require_possible(to, source_private=private)
    return Publishing(to, private)


def _publication_for(
    publishing: Publishing | None, source: OpenedSource, on_progress: OnProgress
) -> Publication | None:
    """What publishes the output while it is made."""
    if publishing is None:
        return None
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


def _is_source_restricted(source: OpenedSource, settings: Settings) -> bool:
    """Whether something that the output is made of, such as a LoRA or a config that is named, is private or gated."""
    from qz.formats.source import is_restricted, open_source

    if any(map(is_restricted, [source.folder, *(lora.folder for lora in settings.loras)])):
        return True
    if settings.config is None:
        return False
    with closing(open_source(settings.config, cached=False)) as folder:
        return is_restricted(folder)
