"""The parts of transformers that are not public API, in one place; refused clearly where a version lacks them.

Names at save, and the steps of loading that renames and merges take, have no public form in transformers 5; neither
have the lists of a model's class that say what is kept in float32, tied, or not saved.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import transformers

from qz import Unsupported
from qz.quantize.libraries.versions import requirement


def _unknown(error: Exception) -> Unsupported:
    return Unsupported(
        f"transformers {transformers.__version__} is laid out differently from the versions qz knows ({error}). "
        f"Install one that it knows: pip install '{requirement('transformers')}', or a newer qz."
    )


try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        build_glob_alternation,
        dot_natural_key,
        rename_source_key,
        revert_weight_conversion,
    )
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import remove_tied_weights_from_state_dict
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION, get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module
except ImportError as error:
    raise _unknown(error) from error

__all__ = [
    "MODULES_TO_PATCH_FOR_QUANTIZATION",
    "Conv1D",
    "WeightConverter",
    "WeightRenaming",
    "auto_class_names",
    "cheap_converters",
    "could_be_tied",
    "default_skips",
    "dot_natural_key",
    "float32_modules",
    "from_config",
    "get_model_conversion_mapping",
    "holds_experts",
    "ignored_on_save",
    "kept_in_float32",
    "loading_quantizer",
    "model_on_meta",
    "no_init_weights",
    "packages_missing",
    "remove_tied_weights_from_state_dict",
    "rename_source_key",
    "revert_weight_conversion",
    "saving_documents_only",
    "shares_generation_config",
    "should_convert_module",
    "storage_of",
    "tied_weights",
    "weight_conversions",
]


@contextmanager
def _known_layout() -> Iterator[None]:
    """Inside, an attribute or argument that a version lacks becomes a refusal that names it."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        raise _unknown(error) from error


def default_skips(model: Any) -> list[str]:
    """The modules that the library leaves alone where a config names none.

    They are asked of a model whose weights are not tied yet, as ``from_pretrained`` does: a tied head is not among the
    parameters, and then another one is the last, which stays as it is.
    """
    with _known_layout(), ExitStack() as stack:
        stack.enter_context(no_init_weights())
        for context in type(model).get_init_context(model.config.dtype, False, False, None):
            stack.enter_context(context)
        untied = type(model)(copy.deepcopy(model.config))
        keys: list[str] = get_keys_to_not_convert(untied)
        return keys


def model_on_meta(model_class: Any, config: Any) -> Any:
    """A model of the class without data, as it is before it is quantized."""
    plain = copy.deepcopy(config)
    plain.__dict__.pop("quantization_config", None)
    with _known_layout(), ExitStack() as stack:
        stack.enter_context(no_init_weights())
        for context in model_class.get_init_context(plain.dtype or torch.float32, False, False, None):
            stack.enter_context(context)
        return model_class(plain)


def from_config(model_class: Any, config: Any, **options: Any) -> Any:
    """A model of the class, built from a config alone; ``options`` as of ``PreTrainedModel._from_config``."""
    with _known_layout():
        build = model_class._from_config
    return build(config, **options)


def float32_modules(model: Any) -> list[str]:
    """Patterns of the modules that are never quantized, and float32 in a float16 model."""
    with _known_layout():
        return list(model._keep_in_fp32_modules or ())


def kept_in_float32(model: Any) -> Callable[[str], Any]:
    """Whether a parameter of this name is loaded as float32, whatever the model's dtype."""
    with _known_layout():
        patterns = list(model._get_dtype_plan(model.config.dtype))
    return build_glob_alternation(patterns)[0].search if patterns else re.compile(r"(?!)").search


def auto_class_names(model_type: Any) -> list[str]:
    """Names of the classes that the Auto classes take for a model type: with a head first, then the body."""
    from transformers.models.auto import modeling_auto

    mappings = [name for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")]
    found: list[str] = []
    for mapping in sorted(mappings, key=lambda name: not name.startswith("MODEL_FOR_")):
        with _known_layout():
            names = getattr(modeling_auto, mapping).get(model_type, ()) if isinstance(model_type, str) else ()
        found += [names] if isinstance(names, str) else names
    return list(dict.fromkeys(found))


def packages_missing(found: Any) -> str | None:
    """Of a name that stands for a class that other packages keep the library from having: those packages."""
    return ", ".join(found._backends) if type(found).__name__ == "DummyObject" else None


def could_be_tied(model: Any) -> set[str]:
    """Names of the weights that the model's classes tie to another one where a config asks for it."""
    found: set[str] = set()
    for path, module in model.named_modules():
        found |= {f"{path}.{name}".lstrip(".") for name in getattr(module, "_tied_weights_keys", None) or ()}
    return found


def holds_experts(module: Any) -> bool:
    """Whether a module's parameters hold all experts of a layer: ``use_experts_implementation`` marks its class."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def ignored_on_save(model: Any) -> set[str]:
    """Names of the state dict that ``save_pretrained`` leaves out."""
    with _known_layout():
        return set(model._keys_to_ignore_on_save or ())


def tied_weights(model: Any) -> dict[str, str]:
    """Tied name → the name that it is tied to; the model's own mapping, which ``tie`` changes."""
    with _known_layout():
        tied: dict[str, str] = model.all_tied_weights_keys
        return tied


def weight_conversions(model: Any) -> list[Any]:
    """Renamings and converters that were at work when the model was loaded, and are undone when it is saved."""
    with _known_layout():
        return list(model._weight_conversions)


def loading_quantizer(config: dict[str, Any]) -> Any:
    """What the library loads a quantized checkpoint with, for the arguments of a ``BitsAndBytesConfig``."""
    from transformers.quantizers.auto import AutoHfQuantizer

    with _known_layout():
        return AutoHfQuantizer.from_config(transformers.BitsAndBytesConfig(**config), pre_quantized=True)


def shares_generation_config(model_class: Any) -> bool:
    """Whether a class hands parts of generation_config.json to its inner models when it is loaded."""
    own, general = (
        getattr(each.from_pretrained, "__func__", None) for each in (model_class, transformers.PreTrainedModel)
    )
    return own is not general


def loader_of_weights(model_class: Any) -> Any:
    """``from_pretrained`` of a class; the general one where the class's own looks for more files than weights, of which
    there are none on the meta device: Qwen2.5-Omni's for its voices.
    """
    own = model_class.from_pretrained
    if not shares_generation_config(model_class) or "cached_file" not in own.__code__.co_names:
        return own
    return partial(transformers.PreTrainedModel.from_pretrained.__func__, model_class)


@contextmanager
def saving_documents_only() -> Iterator[None]:
    """Inside, ``save_pretrained`` of a model writes config.json and generation_config.json, and no weights. A class may
    do something before it, as to gather what its inner models have of a generation config."""

    def save_documents(model: Any, folder: Any) -> None:
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)

    whole = transformers.PreTrainedModel.save_pretrained
    transformers.PreTrainedModel.save_pretrained = save_documents
    try:
        yield
    finally:
        transformers.PreTrainedModel.save_pretrained = whole


@contextmanager
def cheap_converters() -> Iterator[None]:
    """Inside, copies of a converter share its patterns, which never change: loading copies one for each source, and
    uses that for the first source of each target. So a copy in which nothing was collected yet will do once more."""
    copies: dict[int, tuple[Any, Any]] = {}

    def copied(converter: Any, memo: dict[int, Any]) -> Any:
        with _known_layout():
            at_once = not memo  # copied alone, as loading does; in a copied list every converter must stay distinct
            known, made = copies.get(id(converter), (None, None))
            if at_once and known is converter and not (made.collected_tensors or made.layer_targets):
                return made
            made = copy.copy(converter)
            made.operations = [copy.copy(operation) for operation in converter.operations]
            for name in ("collected_tensors", "layer_targets"):
                held = getattr(converter, name)  # empty, but for a converter that has begun to collect
                setattr(made, name, copy.deepcopy(held, memo) if held else copy.copy(held))
            if at_once:
                copies[id(converter)] = converter, made
        return made

    if "__deepcopy__" in vars(WeightConverter):  # set by another thread, or defined by a later version
        yield
        return
    WeightConverter.__deepcopy__ = copied
    try:
        yield
    finally:
        del WeightConverter.__deepcopy__


def storage_of(tensor: torch.Tensor) -> int:
    """What tensors have in common that share memory; meta tensors have no address."""
    with _known_layout():
        return int(tensor.untyped_storage()._cdata)
