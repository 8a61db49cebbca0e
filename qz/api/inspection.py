"""``inspect``: what a checkpoint holds, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from qz import UsageError
from qz.api.effects import Asked
from qz.api.paths import AnyPath
from qz.formats.global_settings import settings_restored
from qz.progress import OnProgress, Progress, ignore

if TYPE_CHECKING:
    from qz.quantize.inspection.pipeline import PipelineInspection
    from qz.quantize.inspection.report import Inspection, Origin

LARGE_INDEX = 1 << 20
"""Bytes of an index that lists so many tensors that reading their headers takes a while, even here."""


@settings_restored()
def inspect(
    source: AnyPath,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    plan: bool = False,
    verify: bool = False,
    consumers: Sequence[str] = (),
    on_progress: OnProgress = ignore,
) -> Inspection | PipelineInspection:
    """What a model, pipeline or single .safetensors file holds, from its headers, and what is wrong with it.

    ``plan`` asks the model's library for exact figures. ``verify`` compares every byte with the hashes that qz
    recorded. ``consumers`` names programs (``vllm``, ``sglang`` …, see ``qz inspect --for``) to judge it for. Problems
    are part of the value (``problems``, ``errors``, ``consumers``), not raised.
    """
    asked = Asked.of(inspect, locals())
    from qz.formats.source import local_path
    from qz.quantize.inspection.model import inspect_model, read_folder
    from qz.quantize.inspection.report import Origin

    if consumers:
        from qz.quantize.consumers.registry import CONSUMERS

        if unknown := [name for name in consumers if name not in CONSUMERS]:
            raise UsageError(f"--for {unknown[0]} is none of {', '.join(CONSUMERS)}.")
    location = str(source)
    path = local_path(location)
    asked.require(hub=path is None)
    if path is not None and path.exists() and not path.is_dir() and path.suffix.lower() != ".gguf":
        asked.require(folder=False)
        return _inspect_file(path, Origin(location, None, None), allow_pickle, consumers)
    from qz.formats.checkpoint.problems import Problem
    from qz.formats.files.folder import is_pipeline
    from qz.formats.output.recorded.record import damaged_record
    from qz.formats.source import opened

    if path is None or plan:
        on_progress(Progress("Reading headers"))
    with opened(location, subfolder, revision, allow_pickle=allow_pickle, held=False) as opened_source:
        folder = opened_source.folder
        if any(size > LARGE_INDEX for name, size in folder.sizes().items() if name.endswith(".index.json")):
            on_progress(Progress("Reading headers"))
        origin = Origin(location, folder.identity().get("commit"), subfolder)
        found: Inspection | PipelineInspection
        if plan:
            on_progress(Progress("Planning"))
        if is_pipeline(folder):
            from qz.quantize.inspection.pipeline import inspect_pipeline

            found = inspect_pipeline(folder, origin, variant, plan=plan, consumers=consumers)
        else:
            found = inspect_model(read_folder(folder, variant), origin, plan=plan, consumers=consumers)
        if verify:
            from qz.quantize.inspection.verification import verify as compare

            found = found.with_verified(*compare(folder, opened_source.root, on_progress))
        else:
            found = found.with_problems(damaged_record(folder))
        return found.with_problems(
            Problem("warning", "hub-cache", location, f"{note}.") for note in opened_source.notes
        )


def _inspect_file(path: Path, origin: Origin, allow_pickle: bool, consumers: Sequence[str]) -> Inspection:
    from qz.formats.files.links import followed
    from qz.formats.files.local_folder import LocalFolder
    from qz.quantize.inspection.model import inspect_file

    path = followed(path)
    with closing(LocalFolder(path.parent)) as parent:
        parent.allow_pickle = allow_pickle
        return inspect_file(parent, path.name, origin, consumers=consumers)
