"""Which class of transformers a checkpoint is of; diffusers' pipelines have some, too. The installed libraries' only:
code in a repository is never run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qz import MalformedInput, Unsupported
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.class_search import classes_in_diffusers, shown
from qz.quantize.libraries.transformers.internals import auto_class_names, could_be_tied, packages_missing
from qz.quantize.libraries.transformers.origins import Model, names_after_renaming
from qz.quantize.libraries.versions import requirement

MOST_LISTED = 16
"""Classes that `architectures` may name; those on the Hub name one, some two."""
_HEAD = re.compile(r"For[A-Z]\w*|LMHeadModel|Model")
_HEAD_TODAY = {"LMHeadModel": "ForCausalLM"}
"""Endings of class names that transformers has given up → what it calls such a class today."""


@dataclass(frozen=True, slots=True)
class ModelClass:
    """A class of the library, and the class of its config: the one of ``model_type``, as ``AutoModel`` takes it."""

    model: Any
    config: Any
    notes: tuple[str, ...] = ()


def model_class_of(checkpoint: Checkpoint) -> ModelClass:
    """The class that the checkpoint names; where the library has none of that name, the one of its model type.

    A pipeline names the class of a component; otherwise config.json does, in ``architectures``. Several model types are
    served by the class of another family, under a config of their own.
    """
    model_type = checkpoint.config.get("model_type")
    names = list(dict.fromkeys([checkpoint.architecture, *_listed(checkpoint)]))
    for name in names:
        if (model_class := _class_named(name)) is not None:
            return ModelClass(model_class, _config_class(model_class, model_type))
    for name in names:
        if (model_class := _class_of_a_pipeline(name, checkpoint.class_module)) is not None:
            return ModelClass(model_class, model_class.config_class)
    named = next((name for name in names if name is not None), None)
    known = auto_class_names(model_type)
    if named is not None and (model_class := _class_named(_like(named, known))) is not None:
        taken = f"{model_class.__name__} is its class for the model type {model_type}"
        note = f"transformers has no class {shown(named)}; {taken}"
        return ModelClass(model_class, _config_class(model_class, model_type), (note,))
    raise _refusal(checkpoint, named, known)


def _listed(checkpoint: Checkpoint) -> list[str]:
    """The names in ``architectures``. Raises MalformedInput for more than any model has: each is looked for."""
    listed = checkpoint.config.get("architectures")
    if isinstance(listed, list) and len(listed) > MOST_LISTED:
        raise MalformedInput(
            f"{checkpoint.folder.location}/config.json names {len(listed):,} classes in `architectures`. Leave the one "
            "that the weights belong to."
        )
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def classes_to_choose_from(checkpoint: Checkpoint, wrong: ModelClass | None = None) -> list[ModelClass]:
    """The classes to choose from where config.json does not name one: several that it names, or all of the model type.

    Empty where it names one, and for a component, whose class the pipeline names. If the one that it names is
    ``wrong``, those of the model type that have a head.
    """
    model_type = checkpoint.config.get("model_type")
    listed = checkpoint.config.get("architectures")
    known = auto_class_names(model_type)
    names = _listed(checkpoint)
    if wrong is not None:
        listed, known = None, [name for name in known if "For" in name or "LMHead" in name]
    if checkpoint.class_module is not None or (listed and (not isinstance(listed, list) or len(listed) < 2)):
        return []
    names = names if listed else known
    names = [name for name in names if name in known] or names
    found: list[ModelClass] = []
    for name in dict.fromkeys(names):
        with suppress(Unsupported):  # a class that needs another package
            if (model_class := _class_named(name)) is not None:
                found.append(ModelClass(model_class, _config_class(model_class, model_type)))
    return found


def _refusal(checkpoint: Checkpoint, named: str | None, known: list[str]) -> Unsupported:
    import transformers

    where = f"{checkpoint.folder.location}/config.json"
    if named is None:
        return no_class_named(checkpoint, known)
    return Unsupported(
        f"transformers {transformers.__version__} has no class {shown(named)}, which {where} asks for. Code "
        f"inside a repository is never run. Try a newer version: pip install -U '{requirement('transformers')}'."
    )


def no_class_named(checkpoint: Checkpoint, known: list[str]) -> Unsupported:
    """The error for a config.json without a class; ``known`` are those of its model type, the likeliest first."""
    examples = known[:4] or ["BertModel"]
    return Unsupported(
        f"{checkpoint.folder.location}/config.json names no class in `architectures`. Add the class that the weights "
        f'belong to, e.g. "architectures": ["{examples[0]}"]'
        + (f" (for this model type also {', '.join(examples[1:])})." if examples[1:] else ".")
    )


def _class_named(name: Any) -> Any:
    """The model class of that name, if the library has one; an ``Auto`` class is none.

    Raises Unsupported if the library has it, but not without another package.
    """
    import transformers

    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if (packages := packages_missing(found)) is not None:
        raise Unsupported(f"transformers has the class {name} only where {packages} can be imported. Install that too.")
    return found if _is_model_class(found) else None


def _class_of_a_pipeline(name: Any, module: str | None) -> Any:
    """The class of that name that a pipeline of diffusers has for itself: Kolors' text encoder, a safety checker."""
    return next(filter(_is_model_class, classes_in_diffusers(name, module)), None)


def _is_model_class(found: Any) -> bool:
    import transformers

    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return is_model and getattr(found, "config_class", None) is not None


def _config_class(model_class: Any, model_type: Any) -> Any:
    """The config class of the model type, if the model class serves that type; otherwise the model class's own.

    A text model inside a larger type has a config of its own, a part of that of the type: as ``AutoModel``.
    """
    from transformers import CONFIG_MAPPING

    own = model_class.config_class
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return own
    of_type = CONFIG_MAPPING[model_type]
    served = model_class.__name__ in auto_class_names(model_type) and own not in of_type.sub_configs.values()
    return of_type if served else own


def _like(named: str, known: list[str]) -> str | None:
    """Of the classes of a model type, the one with the same head as the class that is named."""

    def head(name: str) -> str | None:
        found = next((match[0] for match in _endings(name)), None)
        return _HEAD_TODAY.get(found, found) if found else None

    wanted = head(named)
    alike = [name for name in known if wanted is not None and head(name) == wanted]
    return alike[0] if len(alike) == 1 else None


def _endings(name: str) -> Iterator[re.Match[str]]:
    for start in range(1, len(name)):
        if match := _HEAD.fullmatch(name, start):
            yield match


def body_class_of(checkpoint: Checkpoint, model: Model, missing: set[str]) -> Any:
    """The class of the model without its head, if all that is missing is the head; None otherwise.

    Sentence encoders are stored this way, under a config that names the class they were trained in. They are loaded
    with ``AutoModel``. A model that generates, stored with its head's class but without its output layer, is another
    case: its config does not tie what was tied. Raises MalformedInput for that.
    """
    from transformers import MODEL_MAPPING

    body_class = MODEL_MAPPING.get(type(model.config), None)
    prefix = f"{model.base_model_prefix}."
    if not missing or not isinstance(body_class, type) or isinstance(model, body_class):
        return None
    if any(name.startswith(prefix) for name in missing):
        return None
    if missing <= could_be_tied(model) and any(
        name.startswith(prefix) for name in names_after_renaming(model, checkpoint.tensors)
    ):
        raise MalformedInput(
            f"{checkpoint.folder.location} lacks {', '.join(sorted(missing))}, and config.json does not tie it to "
            'another weight. If the model ties its output layer to the embeddings, set "tie_word_embeddings": true in '
            f'config.json; if it has none, set "architectures": ["{body_class.__name__}"].'
        )
    return body_class
