"""Which class of transformers a checkpoint is of; diffusers' pipelines have some, too. The installed libraries' only:
code in a repository is never run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
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
    names = list(dict.fromkeys([checkpoint.architecture, *names_listed(checkpoint)]))
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
    raise class_refused(checkpoint, known)


def names_listed(checkpoint: Checkpoint) -> list[str]:
    """The names in ``architectures``. Raises MalformedInput for more than any model has: each is looked for."""
    listed = checkpoint.config.get("architectures")
    names = [listed] if isinstance(listed, str) else listed if isinstance(listed, list) else []
    if len(names) > MOST_LISTED:
        raise MalformedInput(
            f"{checkpoint.folder.location}/config.json names {len(names):,} classes in `architectures`. Leave the one "
            "that the weights belong to."
        )
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def classes_to_choose_from(checkpoint: Checkpoint, wrong: ModelClass | None = None) -> list[ModelClass]:
    """The classes to choose from where config.json does not say which one: several that it names; one of another family
    than its model type, after the class of the type with the same head; or, where it names none that there is, nor code
    beside it that has one, all of the model type.

    Empty where it says which one, and for a component, whose class the pipeline names. If the one that it names is
    ``wrong``, those of the model type that have a head.
    """
    if checkpoint.class_module is not None:
        return []
    known, listed = auto_class_names(checkpoint.config.get("model_type")), names_listed(checkpoint)
    if wrong is not None:
        return _classes(checkpoint, [name for name in known if _has_head(name)]) if len(listed) < 2 else []
    named = _classes(checkpoint, [name for name in listed if name in known] or listed)
    if len(listed) > 1 and named:
        return named
    likes = [like for name in listed if (like := _like(name, known))]
    if named:
        return _classes(checkpoint, [*likes, *listed]) if _is_of_another_family(checkpoint, named[0].model) else []
    elsewhere = checkpoint.own_code or any(_class_of_a_pipeline(name, None) for name in listed)
    return [] if likes or elsewhere else _classes(checkpoint, known)


def _classes(checkpoint: Checkpoint, names: Iterable[str]) -> list[ModelClass]:
    """Those of that name that the library has without another package."""
    found: list[ModelClass] = []
    for name in dict.fromkeys(names):
        with suppress(Unsupported):
            if (model_class := _class_named(name)) is not None:
                found.append(ModelClass(model_class, _config_class(model_class, checkpoint.config.get("model_type"))))
    return found


def _has_head(name: str) -> bool:
    return "For" in name or "LMHead" in name


def _is_of_another_family(checkpoint: Checkpoint, named: Any) -> bool:
    """Whether a class has nothing to do with the model type, by which ``AutoModel`` goes: neither serves it, nor is its
    config that of the type, a part of that, or a whole with such a part."""
    from transformers import CONFIG_MAPPING

    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return False
    own, of_type = named.config_class, CONFIG_MAPPING[model_type]
    if named.__name__ in auto_class_names(model_type) or issubclass(own, of_type) or issubclass(of_type, own):
        return False
    return own not in of_type.sub_configs.values() and of_type not in own.sub_configs.values()


def class_refused(checkpoint: Checkpoint, known: list[str]) -> Unsupported:
    """The error for a config.json whose class cannot be told; ``known`` are those of its model type, the likeliest
    first."""
    import transformers

    where = f"{checkpoint.folder.location}/config.json"
    model_type = checkpoint.config.get("model_type")
    named = next(iter([*filter(None, [checkpoint.architecture]), *names_listed(checkpoint)]), None)
    if named is None and (known or not isinstance(model_type, str)):
        examples = known[:4] or ["BertModel"]
        return Unsupported(
            f"{where} names no class in `architectures`. Add the class that the weights belong to, e.g. "
            f'"architectures": ["{examples[0]}"]'
            + (f" (for this model type also {', '.join(examples[1:])})." if examples[1:] else ".")
        )
    lacks = (
        f"has no class {shown(named)}"
        if named is not None
        else f"does not know the model type {shown(f'{model_type}')}"
    )
    instead = f" Or name in `architectures` the class that the weights belong to: {' or '.join(known[:4])}."
    return Unsupported(
        f"transformers {transformers.__version__} {lacks}, which {where} asks for. Code inside a repository is never "
        f"run. Try a newer version: pip install -U '{requirement('transformers')}'." + (instead if known else "")
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
