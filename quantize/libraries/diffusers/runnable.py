"""A diffusers model that can be run, its parameters still on the meta device, and where each of them comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.architecture import TensorSpec
from qz.quantize.libraries.diffusers.classes import model_class_of
from qz.quantize.libraries.diffusers.internals import float32_modules
from qz.quantize.libraries.diffusers.on_diffusers import build, sources_of
from qz.quantize.libraries.importing.boundary import library_errors
from qz.quantize.libraries.importing.isolation import isolated
from qz.quantize.libraries.importing.untrusted_config import without_code
from qz.quantize.libraries.importing.work_bounds import work_bounded
from qz.quantize.libraries.transformers.origins import Origin
from qz.quantize.libraries.transformers.runnable import Runnable, move_buffers


def runnable(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, given: Mapping[str, TensorSpec] | None = None
) -> Runnable:
    """The model of the class that the checkpoint names, computing in ``dtype`` but for what its class keeps in float32.

    ``given`` replaces the checkpoint's own names and shapes. Raises Unsupported as ``examine`` does.
    """
    where = checkpoint.folder.location
    harmless, _ = without_code(checkpoint.config)
    asked = replace(checkpoint, config=harmless)
    model_class = model_class_of(asked)
    shapes = {name: tensor.shape for name, tensor in (given or checkpoint.tensors).items()}
    with library_errors("diffusers", model_class.__name__, where), isolated(), work_bounded(shapes, where):
        model = build(asked, model_class, dtype).eval()
        sources = sources_of(model, shapes)
    origins = {name: Origin((source,)) for name, source in sources.items()}
    move_buffers(model, device)
    return Runnable(model, origins, frozenset(), dtype, device, tuple(float32_modules(model)))
