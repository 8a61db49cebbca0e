"""Which class of diffusers a checkpoint is of, wherever the library keeps it; a repository's own code is never run."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qz import Unsupported
from qz.formats.checkpoint.pipeline import Pipeline
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.class_search import classes_in_diffusers, shown
from qz.quantize.libraries.versions import requirement


def unknown_class(pipeline: Pipeline) -> tuple[str, ...]:
    """A note on a pipeline whose own class the library lacks; its components may be as they should.

    Read from the names that the library exports, for importing it takes seconds.
    """
    spec = find_spec("diffusers")
    exported = Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""
    if '"DiffusionPipeline"' not in exported or f'"{pipeline.class_name}"' in exported:
        return ()
    text = (
        f"diffusers {version('diffusers')} has no pipeline class {shown(pipeline.class_name)}, which model_index.json "
        "names: it loads the output only if a newer version has it, or with the code of the class: custom_pipeline=…, "
        "trust_remote_code=True"
    )
    return (text,)


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
