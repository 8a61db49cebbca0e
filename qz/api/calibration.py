"""``calibrate`` and ``compare``: what running a model shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qz import UsageError
from qz.api.effects import Asked
from qz.api.paths import AnyPath
from qz.formats.borrowed import settings_given_back
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.methods import Method, Nf4

if TYPE_CHECKING:
    from qz.formats.folder import Folder
    from qz.formats.source import OpenedSource
    from qz.quantize.calibration.compare import Comparison
    from qz.quantize.calibration.run import Calibration


@settings_given_back()
def calibrate(
    source: AnyPath,
    output: AnyPath,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    text: AnyPath | None = None,
    tokens: int | None = None,
    hessians: bool = False,
    scores: bool = False,
    method: Method | None = None,
    generate: bool = False,
    resume: bool = True,
    device: str = "auto",
    on_progress: OnProgress = ignore,
) -> Calibration:
    """Run a 16-bit transformers model on a text and write the statistics of its linears' inputs to ``output``.

    One block of the model and the hidden states are in memory at a time. ``text`` is a file, by default qz's own text;
    ``tokens`` of it are read. With ``generate`` the model writes the text itself, for which all of it is in memory.
    ``hessians`` adds what ``quantize(…, rounding="gptq")`` needs, in files beside it; ``scores`` how sensitive each
    linear is to being quantized by ``method`` (default: ``Nf4()``), for ``quantize(…, target_size=…)``.
    An interrupted run goes on at the last block that it finished. Raises ``qz.QzError``; then there is no output.
    """
    asked = Asked.of(calibrate, locals())
    on_progress(Progress("Reading headers"))
    from qz.formats.checkpoint.survey import open_checkpoint
    from qz.formats.folder import is_pipeline
    from qz.formats.source import local_path, opened
    from qz.quantize.calibration.run import CalibrationRequest
    from qz.quantize.calibration.run import calibrate as run

    asked.require(scores=scores, hub=local_path(str(source)) is None)
    chosen = (method or Nf4()) if scores else None
    own = Path(text) if text is not None else None
    request = CalibrationRequest(Path(output), own, tokens, hessians, device, chosen, generate, resume)
    with opened(str(source), subfolder, revision, allow_pickle=allow_pickle) as found:
        asked.require(folder=found.file is None)
        if is_pipeline(found.folder):
            raise UsageError(f"{found.folder.location} is a pipeline. Name a text encoder of it with --subfolder.")
        tokenizer = tokenizer_of(found, subfolder)
        return run(open_checkpoint(found.folder, variant), tokenizer, str(source), request, on_progress)


@settings_given_back()
def compare(
    original: AnyPath,
    other: AnyPath,
    *,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    text: AnyPath | None = None,
    tokens: int | None = None,
    device: str = "auto",
    on_progress: OnProgress = ignore,
) -> Comparison:
    """What quantizing ``original`` to ``other`` changed in its weights, and in what it makes of a text.

    Both run block by block, one after the other. ``subfolder`` is the component of a pipeline in both, where they have
    it. Raises ``qz.QzError``.
    """
    on_progress(Progress("Reading headers"))
    from qz.formats.checkpoint.survey import open_checkpoint
    from qz.formats.source import opened
    from qz.quantize.calibration.compare import compare as run

    with (
        opened(str(original), subfolder, allow_pickle=allow_pickle) as first,
        opened(str(other), subfolder, allow_pickle=allow_pickle) as second,
    ):
        checkpoints = open_checkpoint(first.folder), open_checkpoint(second.folder)
        chosen = Path(text) if text is not None else None
        names = str(original), str(other)
        return run(*checkpoints, names, tokenizer_of(first, subfolder), chosen, tokens, device, on_progress)


def tokenizer_of(source: OpenedSource, subfolder: str | None) -> Folder:
    """Where the tokenizer of a model lies: with it, or in a folder of its own in a pipeline."""
    from qz.formats.folder import is_pipeline
    from qz.formats.source import enter

    beside = (subfolder or "").strip("/").replace("text_encoder", "tokenizer")
    in_pipeline = is_pipeline(source.root) and beside in source.root.subfolders()
    return enter(source.root, beside) if in_pipeline else source.folder
