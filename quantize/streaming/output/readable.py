"""What a run wrote, read as its readers will, before it gets its name: by the code that inspects and dequantizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qz import IOFailed, PermissionRefused, QzError, Unsupported
from qz.formats.checkpoint.problems import Problem
from qz.formats.checkpoint.quantization.quantized import read_quantized
from qz.formats.checkpoint.survey import Checkpoint, survey, survey_file
from qz.formats.files.folder import Folder
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.recorded.record import read_record

if TYPE_CHECKING:
    from qz.quantize.streaming.output.output_folders import OutputFolder


_NOT_THE_OUTPUTS = ("io-failed", "permission")
"""Kinds of problems that say nothing about what was written: the system did not let it be read."""


class UnreadableOutput(Unsupported):
    """Raised where qz itself cannot read what was written: it is neither kept nor used by a later run."""


def converted(folders: Iterable[OutputFolder]) -> dict[str, str]:
    """The folders in which a converted model lies, and where it comes from."""
    return {folder.name: folder.plan.checkpoint.folder.location for folder in folders if folder.plan is not None}


def require_readable(folder: Path, models: Mapping[str, str]) -> None:
    """Raise UnreadableOutput unless the record and every converted model in ``folder`` can be read without an error,
    and IOFailed or PermissionRefused where the system refuses to read them.

    ``models``: folders in it, and where what is in them comes from. Reads headers and quant states, some milliseconds'
    worth: what the tensors hold was compared when it was written.
    """
    root = LocalFolder(folder)
    try:
        for name, source in models.items():
            inner = root.subfolder(name) if name else root
            _require_no_errors(inner, source)
            inner.close()
        read_record(root)
    except (UnreadableOutput, IOFailed, PermissionRefused):
        raise
    except QzError as error:
        raise UnreadableOutput(f"{folder} cannot be read back, so it was not kept: {error}") from error
    finally:
        root.close()


def _require_no_errors(folder: Folder, source: str) -> None:
    checkpoint, problems = survey(folder)
    alone = [name for name in folder.sizes() if name.endswith(".safetensors")]
    if checkpoint is None and len(alone) == 1 and "config.json" not in folder.sizes():
        checkpoint, problems = _single_file(folder, alone[0])
    elif checkpoint is not None:
        problems += read_quantized(checkpoint)[1]
    refused = next((problem for problem in problems if problem.kind in _NOT_THE_OUTPUTS), None)
    if refused is not None:
        raise IOFailed(refused.message)
    errors = [problem.message for problem in problems if problem.severity == "error"]
    if errors or checkpoint is None:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        why = f"{errors[0]}{more}" if errors else "there is no model in it."
        raise UnreadableOutput(f"What {source} becomes could not be read back, so it was not kept: {why}")


def _single_file(folder: Folder, file: str) -> tuple[Checkpoint, tuple[Problem, ...]]:
    """A file for other tools, which has no config: its quant states say all."""
    tensors, _, problems = survey_file(folder, file)
    checkpoint = Checkpoint(folder, {}, "diffusers", None, None, (file,), {file: folder.sizes()[file]}, tensors)
    problems += read_quantized(checkpoint)[1]
    expected = ("original-layout", "quantization-config-missing")
    return checkpoint, tuple(each for each in problems if each.kind not in expected)
