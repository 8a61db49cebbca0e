"""``qz inspect``: what a checkpoint holds, from its headers; and whether it can work, as the exit code says."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from qz.cli import options

if TYPE_CHECKING:
    from qz import QzError
    from qz.formats.checkpoint.problems import Problem
    from qz.formats.folder import Folder
    from qz.quantize.inspection.pipeline import PipelineInspection
    from qz.quantize.inspection.report import Inspection, Verified


def inspect(
    source: options.SourceArg,
    subfolder: options.SubfolderOpt = None,
    revision: options.RevisionOpt = None,
    variant: options.VariantOpt = None,
    tensors: options.TensorsOpt = False,
    pattern: options.FilterOpt = None,
    plan: options.PlanOpt = False,
    verify: options.VerifyOpt = False,
    as_json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
) -> None:
    """Show what a model, pipeline or .safetensors file is, what quantizing would give, and what is wrong with it."""
    from qz.cli.inspection import present

    path = Path(source).expanduser()
    found: Inspection | PipelineInspection
    if path.exists() and not path.is_dir():
        found = single_file(path, source, subfolder, verify=verify)
    else:
        found = folder_or_repository(source, subfolder, revision, variant, plan=plan, verify=verify, quiet=quiet)
    present(found, as_json=as_json, listed=tensors or pattern is not None, pattern=pattern, quiet=quiet)
    if found.errors:
        raise unusable(source, found.errors)


def single_file(path: Path, source: str, subfolder: str | None, *, verify: bool) -> Inspection:
    """One file that was named itself."""
    from qz import UsageError
    from qz.formats.folder import LocalFolder
    from qz.quantize.inspection.model import inspect_file
    from qz.quantize.inspection.report import Origin

    if subfolder is not None or verify:
        raise UsageError(f"{source} is a file: --subfolder and --verify need the folder that it lies in.")
    folder = LocalFolder(path.parent)
    try:
        return inspect_file(folder, path.name, Origin(source, None, None))
    finally:
        folder.close()


def folder_or_repository(
    source: str,
    subfolder: str | None,
    revision: str | None,
    variant: str | None,
    *,
    plan: bool,
    verify: bool,
    quiet: bool,
) -> Inspection | PipelineInspection:
    """A model or a whole pipeline, here or on the Hub."""
    from qz.formats.checkpoint.pipeline import is_pipeline
    from qz.formats.source import enter, open_source
    from qz.quantize.inspection.model import inspect_model, read_folder
    from qz.quantize.inspection.report import Origin

    root = open_source(source, None, revision)
    folders = [root]
    found: Inspection | PipelineInspection
    try:
        folder = enter(root, subfolder)
        folders.append(folder)
        origin = Origin(source, folder.identity().get("commit"), subfolder)
        if is_pipeline(folder):
            from qz.quantize.inspection.pipeline import inspect_pipeline

            found = inspect_pipeline(folder, origin, variant, plan=plan)
        else:
            found = inspect_model(read_folder(folder, variant), origin, plan=plan)
        if verify:
            found = found.with_verified(*verified(folder, root, quiet=quiet))
        return found
    finally:
        for opened in folders:
            opened.close()


def verified(folder: Folder, root: Folder, *, quiet: bool) -> tuple[Verified, tuple[Problem, ...]]:
    """Every byte against the record of the folder, or of the repository that it lies in, if only that has one."""
    from qz.cli.progress import Display
    from qz.formats.output.record import RECORD
    from qz.quantize.inspection.model import recorded_bytes, verify

    if RECORD not in folder.sizes() and RECORD in root.sizes():
        folder = root
    step = Reading(recorded_bytes(folder))
    with Display("Verifying", unit="file", quiet=quiet) as display:

        def progress(nbytes: int) -> None:
            step.bytes += nbytes
            display(step)

        return verify(folder, progress)


@dataclass
class Reading:
    """How far verification is, as the display wants it: bytes, and files of known sizes."""

    sizes: tuple[int, ...]
    bytes: int = 0
    shard: str | None = None
    kept: tuple[int, int] | None = None

    @property
    def all_bytes(self) -> int:
        return sum(self.sizes)

    @property
    def weights(self) -> int:
        return bisect_right(list(accumulate(self.sizes)), self.bytes)

    @property
    def all_weights(self) -> int:
        return len(self.sizes)


def unusable(source: str, errors: tuple[Problem, ...]) -> QzError:
    """What the command ends with after its report: 65, but 77 and 74 where the checkpoint could not be looked at."""
    from qz import IOFailed, MalformedInput, PermissionRefused

    kinds = Counter(error.kind for error in errors)
    listed = ", ".join(kind if count == 1 else f"{kind} ({count})" for kind, count in list(kinds.items())[:6])
    more = f" and {len(kinds) - 6} more kinds" if len(kinds) > 6 else ""
    first = errors[0].kind
    error = PermissionRefused if first == "permission" else IOFailed if first == "io-failed" else MalformedInput
    return error(f"{source} cannot be used as it is: {listed}{more}. The report says what to do.")
