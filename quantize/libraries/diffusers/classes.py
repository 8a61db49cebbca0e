"""Which class of diffusers a checkpoint is of, wherever the library keeps it; a repository's own code is never run."""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qz import Unsupported
from qz.formats.checkpoint.pipeline import Pipeline
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.class_search import classes_in_diffusers, shown
from qz.quantize.libraries.versions import requirement

_LIBRARIES = ("diffusers", "transformers", "onnxruntime.training")
"""Where diffusers looks for classes of components, beside the folders of its pipelines."""


def unknown_classes(pipeline: Pipeline) -> tuple[str, ...]:
    """Notes on a pipeline whose own class the library lacks, or does not look for where its components' classes are.

    Read from the names that the library exports, and from its folders, for importing it takes seconds.
    """
    spec = find_spec("diffusers")
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    exported = origin.read_text(encoding="utf-8") if origin is not None else ""
    if origin is None or '"DiffusionPipeline"' not in exported:
        return ()
    notes = []
    if f'"{pipeline.class_name}"' not in exported:
        notes.append(
            f"diffusers {version('diffusers')} has no pipeline class {shown(pipeline.class_name)}, which "
            "model_index.json names: it loads the output only if a newer version has it, or with the code of the "
            "class: custom_pipeline=…, trust_remote_code=True"
        )
    libraries = {*_LIBRARIES, *os.listdir(origin.parent / "pipelines")}
    lost = [
        each
        for each in pipeline.components
        if each.library not in libraries or (each.library == "diffusers" and f'"{each.class_name}"' not in exported)
    ]
    if lost:
        names = ", ".join(f"{shown(each.class_name)} ({each.name})" for each in lost)
        notes.append(
            f"diffusers {version('diffusers')} no longer finds {names} where model_index.json says, so that "
            "from_pretrained loads neither the source nor the output: load each component by its class, and make "
            f"{pipeline.class_name}(…) of them"
        )
    return tuple(notes)


def model_class_of(checkpoint: Checkpoint) -> Any:
    """The class that the checkpoint names."""
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin

    name, where = checkpoint.architecture, f"{checkpoint.folder.location}/config.json"
    for found in classes_in_diffusers(name, checkpoint.class_module):
        if issubclass(found, ModelMixin) and hasattr(found, "from_config"):
            return found
    raise Unsupported(
        f"diffusers {diffusers.__version__} has no model class {shown(str(name))}, which {where} asks for. "
        f"Try a newer version: pip install -U '{requirement('diffusers')}'."
    )
