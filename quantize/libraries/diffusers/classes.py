"""Which class of diffusers a checkpoint is of, wherever the library keeps it; a repository's own code is never run."""

from __future__ import annotations

from typing import Any

from qz import Unsupported
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.class_search import classes_in_diffusers, shown
from qz.quantize.libraries.versions import requirement


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
