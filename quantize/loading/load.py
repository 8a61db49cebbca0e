"""Load a model or a pipeline from a folder: see ``qz.load``."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import MissingInput, UsageError
from qz.formats.checkpoint.pipeline import open_pipeline
from qz.formats.checkpoint.problems import require_none
from qz.formats.checkpoint.quantization.quantized import QuantizedWeight, read_quantized
from qz.formats.checkpoint.survey import Checkpoint, open_checkpoint
from qz.formats.files.folder import is_pipeline
from qz.formats.files.local_folder import LocalFolder
from qz.formats.source import enter, local_path

if TYPE_CHECKING:
    from collections.abc import Mapping


def load(
    source: str, subfolder: str | None, variant: str | None, device: str, components: Mapping[str, Any] | None = None
) -> Any:
    """A model or pipeline of transformers or diffusers, in evaluation mode. ``components``: see ``qz.api.load``."""
    path = local_path(source)
    if path is None or not path.is_dir():
        raise MissingInput(
            f"{source} is no folder here. Download a repository first: hf download {source} --local-dir FOLDER."
        )
    place = device_of(device)
    with closing(enter(LocalFolder(path, shared_links=True), subfolder)) as folder:
        root = path / subfolder if subfolder else path
        if is_pipeline(folder):
            from qz.quantize.loading.pipelines import load_pipeline

            return load_pipeline(open_pipeline(folder, variant), root, place, components or {})
        if components:
            raise UsageError(f"{source} is one model, not a pipeline: it takes no {', '.join(components)}.")
        return load_model(open_checkpoint(folder, variant), root, place)


def load_model(checkpoint: Checkpoint, root: Path, device: str) -> Any:
    """One model. Raises what is wrong with its checkpoint, or with the quantized weights in it."""
    weights = quantized(checkpoint)
    if checkpoint.library == "diffusers":
        from qz.quantize.loading.diffusers_models import load_diffusers_model

        model = load_diffusers_model(checkpoint, root, weights, device)
    else:
        from qz.quantize.loading.transformers_models import load_transformers_model

        model = load_transformers_model(checkpoint, root, weights, device)
    if weights and device == "cpu":
        from qz.quantize.loading.cpu_kernels import fit_for_cpu

        model = fit_for_cpu(model)
    return model


def quantized(checkpoint: Checkpoint) -> Mapping[str, QuantizedWeight]:
    """What bitsandbytes quantized in a checkpoint; raises for what is wrong with it."""
    weights, problems = read_quantized(checkpoint)
    require_none(checkpoint.folder.location, problems)
    return weights


def device_of(device: str) -> str:
    """The torch device: of ``auto``, the first GPU if there is one. Raises UsageError for one that is not there."""
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).split("\n", 1)[0]
        raise UsageError(f"device {device!r} cannot be used: {first}. Choose auto, cpu, or cuda:0.") from error
    return device
