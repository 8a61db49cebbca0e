"""The class that a checkpoint's weights are of, where config.json does not tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import transformers

from qz import QzError
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.architecture import LoadRequest, TensorSpec
from qz.quantize.libraries.class_search import module_of, shown
from qz.quantize.libraries.transformers.classes import (
    ModelClass,
    class_refused,
    classes_to_choose_from,
    model_class_of,
    names_listed,
)
from qz.quantize.libraries.transformers.meta_loading import load
from qz.quantize.libraries.transformers.meta_stacks import meta_stacks
from qz.quantize.libraries.transformers.origins import Model, find_origins


def chosen_class(checkpoint: Checkpoint, tensors: Mapping[str, TensorSpec], request: LoadRequest) -> ModelClass:
    """The class that config.json names; of several, or where the model type stands for another one, the first of those
    that miss least and leave out least.

    Where it names none that there is, the only class of the model type that neither misses a tensor nor leaves one out,
    which is the one that the fitting Auto class would load. Raises Unsupported if there is no such class, or more than
    one.
    """
    candidates = classes_to_choose_from(checkpoint)
    if not candidates:
        return model_class_of(checkpoint)
    misfits = [_misfits(checkpoint, candidate, tensors, request) for candidate in candidates]
    best = candidates[misfits.index(min(misfits))]
    name = best.model.__name__
    names = [each.model.__name__ for each in candidates]
    listed = names_listed(checkpoint)
    if named := [each for each in names if each in listed]:
        others = ", ".join(each for each in names if each != name)
        says = f"`architectures` in config.json also names {others}"
        if len(named) < len(names):
            model_type = checkpoint.config["model_type"]
            says = f"config.json names {named[0]}, but the model type {model_type}"
        return replace(best, notes=(f"taken as a {name}, whose weights these are: {says}",)) if others else best
    if misfits.count((0, 0)) != 1:
        raise class_refused(checkpoint, [name for _, name in sorted(zip(misfits, names, strict=True))])
    says = f"transformers has no class {shown(listed[0])}" if listed else "config.json names none in `architectures`"
    return replace(best, notes=(f"taken as a {name}, the only class of its model type that fits: {says}",))


def other_classes(
    checkpoint: Checkpoint, named: ModelClass, tensors: Mapping[str, TensorSpec], request: LoadRequest
) -> list[ModelClass]:
    """The classes with a head, of those of the model type, that the weights fit, if they lack some of ``named``."""
    wrong = named.model.__name__
    fitting = []
    for each in classes_to_choose_from(checkpoint, named):
        if each.model is not named.model and _misfits(checkpoint, each, tensors, request) == (0, 0):
            name = each.model.__name__
            note = f"taken as a {name}, whose weights these are: config.json names {wrong}, which has others"
            fitting.append(replace(each, notes=(note,)))
    return fitting


def advice_on_missing(model: Model, location: str, missing: set[str], fitting: Sequence[ModelClass]) -> str | None:
    """What to do where a checkpoint lacks weights of a model's class, if more is known than that.

    ``fitting``: the classes that it lacks nothing of. A part of the model that is missing as a whole, such as a pooler,
    is one that transformers makes of random numbers where it loads the checkpoint.
    """
    if fitting:
        names = " or ".join(each.model.__name__ for each in fitting)
        first = fitting[0].model.__name__
        return (
            f'The weights fit {names}: name the one they are of in config.json, such as "architectures": ["{first}"].'
        )

    def part(name: str) -> str:
        return name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]

    lacking = {part(name) for name in missing}
    class_name, repository = type(model).__name__, re.sub(r"@[0-9a-f]{12,40}\Z", "", location)
    exported = module_of(type(model), transformers) is None and re.fullmatch(r"[A-Za-z0-9_./@ -]+", repository)
    if not exported or lacking & {part(name) for name in model.state_dict() if name not in missing}:
        return None
    return (
        "transformers makes such weights of random numbers. Where nothing uses them, save the model with them, put the "
        f'tokenizer beside it, and quantize NEW: python -c "from transformers import {class_name}; '
        f"{class_name}.from_pretrained('{repository}').save_pretrained('NEW')\""
    )


def _misfits(
    checkpoint: Checkpoint, candidate: ModelClass, tensors: Mapping[str, TensorSpec], request: LoadRequest
) -> tuple[int, int]:
    """How many tensors the class misses or has in another shape, and how many of the checkpoint's it does not use."""
    try:
        model, missing, mismatched = load(checkpoint, candidate, tensors, request)
    except (QzError, MemoryError, OSError, ImportError):
        raise
    except Exception:  # noqa: BLE001 - a class may raise anything for a config that is not meant for it
        return len(tensors) + 1, len(tensors)
    with meta_stacks():
        origins = find_origins(model, tensors)
    used = {source for origin in origins.values() for source in origin.sources}
    return len(missing) + len(mismatched), len(tensors.keys() - used)
