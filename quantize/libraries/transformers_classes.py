"""Which class of transformers a checkpoint is of. The installed library's only: code in a repository is never run."""

from __future__ import annotations

from typing import Any

from qz import Unsupported
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.origins import Model
from qz.quantize.libraries.versions import requirement


def model_class_of(checkpoint: Checkpoint) -> Any:
    """The class that config.json names, from the installed library only: code in the repository is never run."""
    import transformers

    names = checkpoint.config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise Unsupported(
            f"{checkpoint.folder.location}/config.json names no class in `architectures`. Add the class that the "
            'weights belong to, e.g. "architectures": ["BertModel"].'
        )
    model_class = getattr(transformers, names[0], None) if names[0].isidentifier() else None
    if model_class is None or not hasattr(model_class, "from_pretrained") or not hasattr(model_class, "config_class"):
        raise Unsupported(
            f"transformers {transformers.__version__} has no class {names[0]}, which config.json asks for. Code "
            f"inside a repository is never run. Try a newer version: pip install -U '{requirement('transformers')}'."
        )
    return model_class


def body_class_of(model: Model, missing: set[str]) -> Any:
    """The class of the model without its head, if all that is missing is the head; None otherwise.

    Sentence encoders are stored this way, under a config that names the class they were trained in. They are loaded
    with ``AutoModel``.
    """
    from transformers import MODEL_MAPPING

    body_class = MODEL_MAPPING.get(type(model.config), None)
    prefix = f"{model.base_model_prefix}."
    if not missing or not isinstance(body_class, type) or isinstance(model, body_class):
        return None
    return None if any(name.startswith(prefix) for name in missing) else body_class
