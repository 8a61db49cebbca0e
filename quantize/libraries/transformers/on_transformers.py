"""How transformers 5 loads, quantizes and saves a checkpoint, asked of its own code on the meta device.

Imported only when a transformers checkpoint is planned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from qz import MalformedInput
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.architecture import (
    OF_A_COMPONENT,
    Architecture,
    Footprint,
    LoadRequest,
    Saved,
    TensorSpec,
    Weight,
    checked,
    document,
    expand,
    unmatched,
)
from qz.quantize.libraries.class_search import module_of
from qz.quantize.libraries.transformers.classes import ModelClass, body_class_of
from qz.quantize.libraries.transformers.experts import find_experts, quantize_experts
from qz.quantize.libraries.transformers.fitting import advice_on_missing, chosen_class, other_classes
from qz.quantize.libraries.transformers.footprint import footprint, kept_as_stored
from qz.quantize.libraries.transformers.internals import (
    Conv1D,
    holds_experts,
    ignored_on_save,
    kept_in_float32,
    remove_tied_weights_from_state_dict,
    saving_documents_only,
    should_convert_module,
    tied_weights,
)
from qz.quantize.libraries.transformers.meta_loading import load, no_room, temporary_folder
from qz.quantize.libraries.transformers.meta_stacks import meta_stacks
from qz.quantize.libraries.transformers.origins import (
    Model,
    Origin,
    find_origins,
    find_transposed,
    packed_elsewhere,
    tie,
)
from qz.quantize.libraries.transformers.saved_names import saved_tensors
from qz.quantize.libraries.transformers.selection import select
from qz.quantize.methods import Method

EXPERTS_NOTE = (
    "the experts are quantized: plain from_pretrained of transformers cannot load this, qz.load can; "
    "`qz inspect --for` says who else"
)


def examine(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorSpec],
    request: LoadRequest,
    equal: Callable[[str, str], bool] | None = None,
) -> Architecture:
    """See ``qz.quantize.libraries.examine.examine``."""
    import transformers

    model, missing, mismatched, class_notes, fitting = _loaded(checkpoint, tensors, request)
    class_name = type(model).__name__
    with meta_stacks():
        origins = find_origins(model, tensors)
    transposed_weights = find_transposed(model, origins, tensors)
    others = [text for name, text in mismatched.items() if name not in transposed_weights]
    where = checkpoint.folder.location
    advice = advice_on_missing(model, where, missing, fitting) if missing and not others else None
    in_pipeline = OF_A_COMPONENT if checkpoint.class_module is not None else None
    checked(missing, others, class_name, where, tensors, advice or in_pipeline)
    elsewhere = packed_elsewhere(model, origins, tensors)
    load_dtype = _name(model.config.dtype)
    selection = select(model, request)
    origins = tie(model, origins, equal)
    quantized = _quantized(model, selection.linears, origins, request)

    ignored = ignored_on_save(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    state = remove_tied_weights_from_state_dict(state, model)
    entries = expand(state, quantized, request.method)
    saved, notes = saved_tensors(model, entries, quantized, origins, tensors, transposed_weights, request.method)
    saved, packed, expert_notes = _experts(model, saved, origins, request, load_dtype)

    used = {source for origin in origins.values() for source in origin.sources}
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    documents = _documents(model, quantized, request, selection.skips)
    loaded, uncast = model, 0
    if request.method is not None and _name(model.config.dtype) != load_dtype:
        loaded = _as_written(model, checkpoint, documents, tensors, request)
        uncast = kept_as_stored(loaded, saved, request)
    in_bits = [*(weight.name for weight in quantized.values()), *packed]
    return Architecture(
        class_name=class_name,
        class_module=module_of(type(model), transformers),
        saved=saved,
        kept_linears=selection.kept,
        dropped=tuple(sorted(set(tensors) - used)),
        parameters=sum(counts.values()),
        counted_parameters=_counted(counts, quantized, request.method),
        footprint=Footprint(model.get_memory_footprint(), footprint(loaded, in_bits, request) + uncast),
        dtype=load_dtype,
        documents=documents,
        notes=class_notes + selection.notes + notes + expert_notes,
        packed_elsewhere=elsewhere,
        tied={name: kept for name, kept in tied_weights(model).items() if name in origins and kept in origins},
        conv1d=tuple(f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)),
        unmatched_skips=unmatched(
            request.skips,
            (path for path, _ in model.named_modules()),
            (*selection.linears, *selection.kept),
            lambda skip, path: not should_convert_module(path, [skip]),
        ),
    )


def _loaded(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorSpec], request: LoadRequest
) -> tuple[Model, set[str], dict[str, str], tuple[str, ...], list[ModelClass]]:
    """What ``load`` returns for the class that fits, what is to be told of how that was chosen, and the classes that
    might be it, if that one is not."""
    model_class = chosen_class(checkpoint, tensors, request)
    found = load(checkpoint, model_class, tensors, request)
    fitting = other_classes(checkpoint, model_class, tensors, request) if found[1] else []
    if len(fitting) == 1:
        model_class = fitting[0]
        found = load(checkpoint, model_class, tensors, request)
    notes = model_class.notes
    body_class = body_class_of(checkpoint, found[0], found[1])
    if body_class is not None:
        body = load(checkpoint, replace(model_class, model=body_class), tensors, request)
        if not body[1]:
            found = body
            head = model_class.model.__name__
            notes += (f"handled as a {body_class.__name__}: the weights lack the head of {head}",)
    return *found, notes, fitting


def _quantized(
    model: Model, linears: Mapping[str, bool], origins: Mapping[str, Origin], request: LoadRequest
) -> dict[str, Weight]:
    """The weights to quantize, by the paths of their modules. ``linears``: these paths, and which are transposed.

    Biases get the dtype of the modules that the library makes anew.
    """
    in_float32 = kept_in_float32(model)
    load_dtype = _name(model.config.dtype)
    quantized: dict[str, Weight] = {}
    for path, transposed in linears.items():
        shape = tuple(model.get_submodule(path).weight.shape)
        origin = origins[f"{path}.weight"]
        quantized[path] = Weight(
            f"{path}.weight",
            origin.sources,
            "float32" if in_float32(f"{path}.weight") else load_dtype,
            (shape[1], shape[0]) if transposed else shape,
            quantized=True,
            transposed=transposed,
            conversion=origin.conversion,
        )
        bias = model.get_submodule(path).bias
        if request.method is not None and bias is not None and not in_float32(f"{path}.bias"):
            # The library makes this module anew, even inside one that its class keeps in float32.
            bias.data = bias.data.to(model.config.dtype)
    return quantized


def _experts(
    model: Model, saved: tuple[Saved, ...], origins: Mapping[str, Origin], request: LoadRequest, load_dtype: str
) -> tuple[tuple[Saved, ...], tuple[str, ...], tuple[str, ...]]:
    """What is ``saved`` with the experts quantized if that is asked for, the parameters that hold them, and what is to
    be told of them."""
    method = request.method
    if request.experts and method is not None:
        experts = find_experts(model, request.skips)
        return quantize_experts(model, saved, origins, experts, method, load_dtype), experts.parameters, (EXPERTS_NOTE,)
    if method is not None and method.bits == 4 and any(map(holds_experts, model.modules())):
        return saved, (), (f"the experts stay in {load_dtype}, as in the library; --experts quantizes them, too",)
    return saved, (), ()


def _counted(counts: Mapping[str, int], quantized: Mapping[str, Weight], method: Method | None) -> int:
    """What transformers' ``num_parameters()`` counts. ``counts``: of values, by parameter; ``quantized``: by module."""
    if method is None:
        return sum(counts.values())
    return sum(
        method.counted(count) if name.removesuffix(".weight") in quantized else count for name, count in counts.items()
    )


def _as_written(
    model: Model,
    checkpoint: Checkpoint,
    documents: Mapping[str, bytes],
    tensors: Mapping[str, TensorSpec],
    request: LoadRequest,
) -> Model:
    """The model as the config that is written has it loaded.

    That config has the dtype of the first unquantized parameter; where a class keeps this one in float32, the output is
    loaded otherwise than the model that it is made from.
    """
    written = replace(checkpoint, config=json.loads(documents["config.json"]))
    loaded, _, _ = load(written, ModelClass(type(model), type(model.config)), tensors, replace(request, dtype="auto"))
    return loaded


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _documents(
    model: Model, quantized: Mapping[str, Weight], request: LoadRequest, skips: list[str] | None
) -> dict[str, bytes]:
    """config.json and generation_config.json as ``save_pretrained`` writes them."""
    from transformers import BitsAndBytesConfig

    floats = [
        parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and name.removesuffix(".weight") not in quantized
    ]
    model.config.dtype = _name(floats[0] if floats else model.config.dtype)
    model.config.architectures = [type(model).__name__]
    if request.method is not None:
        model.config.quantization_config = BitsAndBytesConfig(**request.method.config(), llm_int8_skip_modules=skips)
    documents = {}
    with temporary_folder() as folder:
        try:
            with saving_documents_only():
                model.save_pretrained(folder)
        except (ValueError, TypeError, AssertionError) as error:
            raise MalformedInput(f"transformers refuses to save this configuration: {error}") from error
        except OSError as error:
            raise no_room(error) from error
        for path in sorted(folder.iterdir()):
            documents[path.name] = document(path.read_text(encoding="utf-8"))
    return documents
