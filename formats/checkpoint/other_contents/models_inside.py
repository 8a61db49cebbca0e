"""The models in the subfolders of a folder that is not a model itself."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qz.formats.checkpoint.other_contents.other_forms import folders_inside
from qz.formats.files.folder import PIPELINE_INDEX
from qz.formats.tensors.weight_names import is_weights

if TYPE_CHECKING:
    from qz.formats.files.folder import Folder

_TRANSFORMER = re.compile(r"sentence_\w+_config\.json|tokenizer_config\.json|vocab\.\w+")
"""Beside the model that sentence-transformers puts other modules after."""


def models_inside(folder: Folder) -> list[str]:
    """Folders in ``folder``, or in those, that are a model or a pipeline: those with weights, if any has some."""
    found: dict[str, bool] = {}
    modules = "modules.json" in folder.sizes()
    for path, inner in folders_inside(folder):
        sizes = inner.sizes()
        if path.partition("/")[0] in found or (modules and not any(map(_TRANSFORMER.fullmatch, sizes))):
            continue
        if not {"config.json", PIPELINE_INDEX}.isdisjoint(sizes):
            found[path] = PIPELINE_INDEX in sizes or any(map(is_weights, sizes))
        elif any(name.endswith(".gguf") for name in sizes):
            found[path] = True
    return [path for path, whole in found.items() if whole] or list(found)
