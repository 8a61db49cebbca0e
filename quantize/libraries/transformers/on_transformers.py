"""How transformers 5 loads, quantizes and saves a checkpoint, asked of its own code on the meta device.

Imported only when a transformers checkpoint is planned.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qz import IOFailed, MalformedInput
from qz.formats.checkpoint.survey import MAX_CONFIG_BYTES, Checkpoint, read_file
from qz.formats.hub.bars import bars_as_found
from qz.formats.json_files import read_json
from qz.quantize.libraries.architecture import (
    OF_QUANTIZATION,
    Architecture,
    Footprint,
    LoadRequest,
    TensorSpec,
    Weight,
    checked,
    document,
    expand,
    unmatched,
)
from qz.quantize.libraries.class_search import module_of
from qz.quantize.libraries.transformers.classes import ModelClass, body_class_of, model_class_of
from qz.quantize.libraries.transformers.experts import find_experts, quantize_experts
from qz.quantize.libraries.transformers.footprint import footprint, kept_as_stored
from qz.quantize.libraries.transformers.internals import (
    Conv1D,
    cheap_converters,
    holds_experts,
    ignored_on_save,
    kept_in_float32,
    no_init_weights,
    remove_tied_weights_from_state_dict,
    saving_documents_only,
    shares_generation_config,
    should_convert_module,
    tied_weights,
)
from qz.quantize.libraries.transformers.meta_stacks import MetaStacks
from qz.quantize.libraries.transformers.origins import Model, find_origins, find_transposed, packed_elsewhere, tie
from qz.quantize.libraries.transformers.saved_names import saved_tensors
from qz.quantize.libraries.transformers.selection import select

GENERATION_CONFIG = "generation_config.json"
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
    """See ``qz.quantize.libraries.architecture.examine``."""
    import transformers

    where = checkpoint.folder.location
    model_class = model_class_of(checkpoint)
    model, missing, mismatched = _load(checkpoint, model_class, tensors, request)
    class_notes = model_class.notes
    body_class = body_class_of(checkpoint, model, missing)
    if body_class is not None:
        found = _load(checkpoint, replace(model_class, model=body_class), tensors, request)
        if not found[1]:
            model, missing, mismatched = found
            head = model_class.model.__name__
            class_notes += (f"handled as a {body_class.__name__}: the weights lack the head of {head}",)
    class_name = type(model).__name__
    with MetaStacks():
        origins = find_origins(model, tensors)
    transposed_weights = find_transposed(model, origins, tensors)
    others = [text for name, text in mismatched.items() if name not in transposed_weights]
    checked(missing, others, class_name, where, tensors)
    elsewhere = packed_elsewhere(model, origins, tensors)
    load_dtype = _name(model.config.dtype)
    selection = select(model, request)
    origins = tie(model, origins, equal)

    in_float32 = kept_in_float32(model)
    quantized: dict[str, Weight] = {}
    for path, transposed in selection.linears.items():
        shape = tuple(model.get_submodule(path).weight.shape)
        dtype = "float32" if in_float32(f"{path}.weight") else load_dtype
        origin = origins[f"{path}.weight"]
        quantized[path] = Weight(
            f"{path}.weight",
            origin.sources,
            dtype,
            (shape[1], shape[0]) if transposed else shape,
            quantized=True,
            transposed=transposed,
            conversion=origin.conversion,
        )

    ignored = ignored_on_save(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    state = remove_tied_weights_from_state_dict(state, model)
    entries = expand(state, quantized, request.method)
    saved, notes = saved_tensors(model, entries, quantized, origins, tensors, transposed_weights, request.method)
    packed_experts: tuple[str, ...] = ()
    if request.experts and request.method is not None:
        experts = find_experts(model, request.skips)
        saved = quantize_experts(model, saved, origins, experts, request.method, load_dtype)
        packed_experts = experts.parameters
        notes += (EXPERTS_NOTE,)
    elif request.method is not None and request.method.bits == 4 and any(map(holds_experts, model.modules())):
        notes += (f"the experts stay in {load_dtype}, as in the library; --experts quantizes them, too",)

    used = {source for origin in origins.values() for source in origin.sources}
    parameters = dict(model.named_parameters())
    documents = _documents(model, quantized, request, selection.skips)
    loaded, uncast = model, 0
    if request.method is not None and _name(model.config.dtype) != load_dtype:
        # The config gets the dtype of the first unquantized parameter; where a class keeps that in float32, the output
        # is loaded otherwise than the model was that it is made from.
        written = replace(checkpoint, config=json.loads(documents["config.json"]))
        as_written = ModelClass(type(model), type(model.config))
        loaded, _, _ = _load(written, as_written, tensors, replace(request, dtype="auto"))
        uncast = kept_as_stored(loaded, saved, request)
    return Architecture(
        class_name=class_name,
        class_module=module_of(type(model), transformers),
        saved=saved,
        kept_linears=selection.kept,
        dropped=tuple(sorted(set(tensors) - used)),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        counted_parameters=sum(
            request.method.counted(parameter.numel())
            if request.method and name.removesuffix(".weight") in quantized
            else parameter.numel()
            for name, parameter in parameters.items()
        ),
        footprint=Footprint(
            model.get_memory_footprint(),
            footprint(loaded, [*(weight.name for weight in quantized.values()), *packed_experts], request) + uncast,
        ),
        dtype=load_dtype,
        documents=documents,
        notes=class_notes + selection.notes + notes,
        packed_elsewhere=elsewhere,
        tied={name: kept for name, kept in tied_weights(model).items() if name in origins and kept in origins},
        conv1d=tuple(f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)),
        unmatched_skips=unmatched(
            request.skips,
            (path for path, _ in model.named_modules()),
            lambda skip, path: not should_convert_module(path, [skip]),
        ),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _load(
    checkpoint: Checkpoint, model_class: ModelClass, tensors: Mapping[str, TensorSpec], request: LoadRequest
) -> tuple[Model, set[str], dict[str, str]]:
    """The model on meta, with the names that its loader missed, and those it found in another shape, with that."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    state = {
        name: torch.empty(given.shape, dtype=getattr(torch, given.dtype), device="meta")
        for name, given in tensors.items()
    }
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    try:
        # Without initial values for weights that have none: torch would import sympy for them.
        with bars_as_found(), _temporary_folder() as folder, no_init_weights(), MetaStacks(), cheap_converters():
            logging.disable_progress_bar()
            generation = None
            if GENERATION_CONFIG in checkpoint.folder.sizes() and model_class.model.can_generate():
                data = read_file(checkpoint.folder, GENERATION_CONFIG, MAX_CONFIG_BYTES)
                read_json(data, f"{checkpoint.folder.location}/{GENERATION_CONFIG}")  # refuses what is none
                _store(folder / GENERATION_CONFIG, data)
                generation = GenerationConfig.from_pretrained(folder)
            shared = generation if shares_generation_config(model_class.model) else None
            model, info = model_class.model.from_pretrained(
                None,
                config=config_in_folder(checkpoint, model_class.config),
                state_dict=state,
                device_map="meta",
                dtype=request.dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **({} if shared is None else {"generation_config": shared}),
            )
            if generation is not None and shared is None:
                model.generation_config = generation
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            with bars_as_found():  # it enables all of huggingface_hub's, too
                logging.enable_progress_bar()
    mismatched = {
        key: f"{key} is {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]
    }
    return model, set(info["missing_keys"]) - mismatched.keys(), mismatched


def config_in_folder(checkpoint: Checkpoint, config_class: Any) -> Any:
    """The checkpoint's config as an object of the library, which reads it from a folder."""
    with _temporary_folder() as folder:
        config = {key: value for key, value in checkpoint.config.items() if key not in OF_QUANTIZATION}
        _store(folder / "config.json", json.dumps(config).encode())
        return config_class.from_pretrained(folder)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """The library takes configs from a folder only."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="qz-")
    except OSError as error:
        raise _no_room(error) from error
    with folder as path:
        yield Path(path)


def _store(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise _no_room(error) from error


def _no_room(error: OSError) -> IOFailed:
    return IOFailed(
        f"A small file cannot be kept in the folder for temporary files: {error.strerror or error}. "
        "Free some space there, or name another folder with TMPDIR."
    )


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
    with _temporary_folder() as folder:
        try:
            with saving_documents_only():
                model.save_pretrained(folder)
        except (ValueError, TypeError, AssertionError) as error:
            raise MalformedInput(f"transformers refuses to save this configuration: {error}") from error
        except OSError as error:
            raise _no_room(error) from error
        for path in sorted(folder.iterdir()):
            documents[path.name] = document(path.read_text(encoding="utf-8"))
    return documents
