"""The class that a checkpoint's weights are of, where config.json does not tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qz import QzError
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.architecture import LoadRequest, TensorSpec
from qz.quantize.libraries.transformers.classes import (
    ModelClass,
    classes_to_choose_from,
    model_class_of,
    no_class_named,
)
from qz.quantize.libraries.transformers.meta_loading import load
from qz.quantize.libraries.transformers.meta_stacks import meta_stacks
from qz.quantize.libraries.transformers.origins import find_origins


def chosen_class(checkpoint: Checkpoint, tensors: Mapping[str, TensorSpec], request: LoadRequest) -> ModelClass:
    """The class that config.json names; of several, the first of those that miss least and leave out least.

    Where it names none, the only class of the model type that neither misses a tensor nor leaves one out, which is the
    one that the fitting Auto class would load. Raises Unsupported if there is no such class, or more than one.
    """
    candidates = classes_to_choose_from(checkpoint)
    if not candidates:
        return model_class_of(checkpoint)
    misfits = [_misfits(checkpoint, candidate, tensors, request) for candidate in candidates]
    best = candidates[misfits.index(min(misfits))]
    name = best.model.__name__
    if checkpoint.config.get("architectures"):
        others = ", ".join(each.model.__name__ for each in candidates if each is not best)
        note = f"taken as a {name}, whose weights these are: `architectures` in config.json also names {others}"
        return replace(best, notes=(note,)) if others else best
    if misfits.count((0, 0)) != 1:
        ranked = sorted(zip(misfits, [each.model.__name__ for each in candidates], strict=True))
        raise no_class_named(checkpoint, [name for _, name in ranked])
    note = f"taken as a {name}, the only class of its model type that fits: config.json names none in `architectures`"
    return replace(best, notes=(note,))


def other_class(
    checkpoint: Checkpoint, named: ModelClass, tensors: Mapping[str, TensorSpec], request: LoadRequest
) -> ModelClass | None:
    """The only class with a head, of those of the model type, that the weights fit, if they lack some of ``named``."""
    candidates = [each for each in classes_to_choose_from(checkpoint, named) if each.model is not named.model]
    fitting = [each for each in candidates if _misfits(checkpoint, each, tensors, request) == (0, 0)]
    if len(fitting) != 1:
        return None
    wrong = named.model.__name__
    note = (
        f"taken as a {fitting[0].model.__name__}, whose weights these are: config.json names {wrong}, which has others"
    )
    return replace(fitting[0], notes=(note,))


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
