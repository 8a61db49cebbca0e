"""How diffusers loads, quantizes and saves a model, asked of its own classes on the meta device.

diffusers' ``from_pretrained`` refuses to quantize without a GPU, so the model is built by ``from_config`` and the
choice of linears follows ``quantizers/bitsandbytes/utils.py:_replace_with_bnb_linear`` (0.42.1).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.architecture import (
    FLOATS,
    OF_A_COMPONENT,
    OF_QUANTIZATION,
    SAFETENSORS_NAMES,
    Architecture,
    Footprint,
    LoadRequest,
    Saved,
    Skips,
    TensorSpec,
    Weight,
    checked,
    document,
    expand,
    skip_list,
    unmatched,
)
from qz.quantize.libraries.class_search import module_of
from qz.quantize.libraries.diffusers.classes import model_class_of
from qz.quantize.libraries.diffusers.internals import empty_model, float32_modules, rename_old_keys
from qz.quantize.libraries.diffusers.selection import matches, select
from qz.quantize.methods import Method


def examine(checkpoint: Checkpoint, tensors: Mapping[str, TensorSpec], request: LoadRequest) -> Architecture:
    """See ``qz.quantize.libraries.examine.examine``."""
    import diffusers

    model_class = model_class_of(checkpoint)
    class_name = model_class.__name__
    load_dtype = _load_dtype(tensors, request, float32_modules(model_class))
    model = build(checkpoint, model_class, getattr(torch, load_dtype))
    fp32 = float32_modules(model)
    sources = sources_of(model, tensors)
    state = model.state_dict()
    found = {name: tensors[source] for name, source in sources.items()}
    checked(
        set(state) - set(found),
        [
            f"{name} is {found[name].shape}, not {tuple(tensor.shape)}"
            for name, tensor in state.items()
            if name in found and found[name].shape != tuple(tensor.shape)
        ],
        class_name,
        checkpoint.folder.location,
        tensors,
        OF_A_COMPONENT if checkpoint.class_module is not None else None,
    )
    selection = select(model, request, fp32)

    def dtype_of(name: str) -> str:
        given = found[name].dtype
        if given not in FLOATS:
            return given
        return "float32" if any(segment in fp32 for segment in name.split(".")) else load_dtype

    weights = {
        name: Weight(name, (sources[name],), dtype_of(name), tuple(tensor.shape)) for name, tensor in state.items()
    }
    quantized = {path: replace(weights[f"{path}.weight"], quantized=True) for path in selection.linears}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Architecture(
        class_name=class_name,
        class_module=module_of(type(model), diffusers),
        saved=tuple(_saved(state, weights, quantized, request.method)),
        kept_linears=selection.kept,
        dropped=tuple(sorted(source for name, source in sources.items() if name not in state)),
        parameters=parameters,
        counted_parameters=parameters,
        footprint=_footprint(model, state, dtype_of, list(quantized.values()), request),
        dtype=load_dtype,
        documents=_documents(model, request, selection.skips),
        notes=selection.notes,
        unmatched_skips=unmatched(
            request.skips,
            (path for path, _ in model.named_modules()),
            (*selection.linears, *selection.kept),
            lambda skip, path: matches([skip], path),
        ),
    )


def _saved(
    state: Mapping[str, torch.Tensor],
    weights: Mapping[str, Weight],
    quantized: Mapping[str, Weight],
    method: Method | None,
) -> Iterator[Saved]:
    """Each tensor that ``save_pretrained`` writes. ``weights``: by the names in ``state``; ``quantized``: by module."""
    for name, (owner, part, variable, tensor) in expand(state, quantized, method).items():
        weight = quantized[owner.removesuffix(".weight")] if part else weights[owner]
        dtype = str(tensor.dtype).removeprefix("torch.") if part else weight.dtype
        nbytes = tensor.numel() * getattr(torch, dtype).itemsize
        yield Saved(name, SAFETENSORS_NAMES[dtype], tuple(tensor.shape), weight, nbytes, part, variable)


def _footprint(
    model: Any,
    state: Container[str],
    dtype_of: Callable[[str], str],
    quantized: Iterable[Weight],
    request: LoadRequest,
) -> Footprint:
    """Bytes of parameters and buffers; buffers that are not in the ``state`` dict keep their dtype."""

    def nbytes(name: str, tensor: torch.Tensor) -> int:
        dtype: torch.dtype = getattr(torch, dtype_of(name))
        return tensor.numel() * dtype.itemsize

    sizes = {name: nbytes(name, parameter) for name, parameter in model.named_parameters()}
    buffers = (nbytes(name, buffer) if name in state else int(buffer.nbytes) for name, buffer in model.named_buffers())
    before = sum(sizes.values()) + sum(buffers)
    packed = sum(request.method.footprint(w.count) - sizes[w.name] for w in quantized if request.method)
    return Footprint(before, before + packed)


def sources_of(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """Model name → checkpoint name; attention layers had other names before diffusers 0.17."""
    names = {name: name for name in tensors}
    rename_old_keys(model, names)
    return names


def _load_dtype(tensors: Mapping[str, TensorSpec], request: LoadRequest, fp32: list[str]) -> str:
    """``auto`` keeps the checkpoint's own dtype, the one most of its values have; diffusers would force float16.

    What the class keeps in float32 says nothing of the others, unless there are none.
    """
    if request.dtype != "auto":
        return request.dtype
    counts: Counter[str] = Counter()
    in_fp32: Counter[str] = Counter()
    for name, given in tensors.items():
        if given.dtype in FLOATS:
            votes = in_fp32 if any(segment in fp32 for segment in name.split(".")) else counts
            votes[given.dtype] += math.prod(given.shape)
    return next((dtype for dtype, _ in (counts or in_fp32).most_common(1)), "float32")


def build(checkpoint: Checkpoint, model_class: Any, dtype: torch.dtype) -> Any:
    """The model on meta."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        config = {key: value for key, value in checkpoint.config.items() if key not in OF_QUANTIZATION}
        return empty_model(model_class, config)
    finally:
        torch.set_default_dtype(default)
        logging.set_verbosity(verbosity)


def _documents(model: Any, request: LoadRequest, keys: Skips) -> dict[str, bytes]:
    """config.json as ``save_pretrained`` writes it, without ``_name_or_path``, which would leak a local path."""
    from diffusers import BitsAndBytesConfig

    if request.method is not None:
        skips = skip_list(keys, request)
        if skips is not None:  # the library extends the user's list in place
            skips += float32_modules(model)
        config = BitsAndBytesConfig(**request.method.config(), llm_int8_skip_modules=skips)
        model.register_to_config(quantization_config=config)
    return {"config.json": document(model.to_json_string())}
