"""How diffusers loads, quantizes and saves a model, asked of its own classes on the meta device.

diffusers' ``from_pretrained`` refuses to quantize without a GPU, so the model is built by ``from_config`` and the
choice of linears follows ``quantizers/bitsandbytes/utils.py:_replace_with_bnb_linear`` (0.42.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.architecture import (
    FLOATS,
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
from qz.quantize.libraries.diffusers_classes import model_class_of
from qz.quantize.libraries.weight_readers import read_by_others


def examine(checkpoint: Checkpoint, tensors: Mapping[str, TensorSpec], request: LoadRequest) -> Architecture:
    """See ``qz.quantize.libraries.architecture.examine``."""

    load_dtype = _load_dtype(tensors, request)
    model, class_name = _build(checkpoint, getattr(torch, load_dtype))
    sources = _sources(model, tensors)
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
    )
    fp32 = _listed(model._keep_in_fp32_modules)
    selection = _select(model, request, fp32)

    def dtype_of(name: str) -> str:
        given = found[name].dtype
        if given not in FLOATS:
            return given
        return "float32" if any(segment in fp32 for segment in name.split(".")) else load_dtype

    weights = {
        name: Weight(name, (sources[name],), dtype_of(name), tuple(tensor.shape)) for name, tensor in state.items()
    }
    quantized = {
        path: Weight(f"{path}.weight", weight.sources, weight.dtype, weight.shape, quantized=True)
        for path in selection.linears
        for weight in [weights[f"{path}.weight"]]
    }
    saved = []
    for name, (owner, part, variable, tensor) in expand(state, quantized, request.method).items():
        weight = quantized[owner.removesuffix(".weight")] if part else weights[owner]
        dtype = str(tensor.dtype).removeprefix("torch.") if part else weight.dtype
        nbytes = tensor.numel() * getattr(torch, dtype).itemsize
        saved.append(Saved(name, SAFETENSORS_NAMES[dtype], tuple(tensor.shape), weight, nbytes, part, variable))

    parameters = dict(model.named_parameters())
    sizes = {
        name: parameter.numel() * getattr(torch, dtype_of(name)).itemsize for name, parameter in parameters.items()
    }
    buffers = sum(
        buffer.numel() * getattr(torch, dtype_of(name)).itemsize if name in state else buffer.nbytes
        for name, buffer in model.named_buffers()
    )
    before = sum(sizes.values()) + buffers
    packed = sum(request.method.footprint(w.count) - sizes[w.name] for w in quantized.values() if request.method)
    return Architecture(
        class_name=class_name,
        saved=tuple(saved),
        kept_linears=selection.kept,
        dropped=tuple(sorted(source for name, source in sources.items() if name not in state)),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        counted_parameters=sum(parameter.numel() for parameter in parameters.values()),
        footprint=Footprint(before, before + packed),
        dtype=load_dtype,
        documents=_documents(model, request, selection.skips),
        notes=selection.notes,
        unmatched_skips=unmatched(
            request.skips, (path for path, _ in model.named_modules()), lambda skip, path: _matches([skip], path)
        ),
    )


def _sources(model: Any, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Model name → checkpoint name; attention layers had other names before diffusers 0.17."""
    names = {name: name for name in tensors}
    model._fix_state_dict_keys_on_load(names)
    return names


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _load_dtype(tensors: Mapping[str, TensorSpec], request: LoadRequest) -> str:
    """``auto`` keeps the checkpoint's own dtype, the one most of its values have; diffusers would force float16."""
    if request.dtype != "auto":
        return request.dtype
    counts: dict[str, int] = {}
    for given in tensors.values():
        if given.dtype in FLOATS:
            count = 1
            for length in given.shape:
                count *= length
            counts[given.dtype] = counts.get(given.dtype, 0) + count
    return max(counts, key=lambda dtype: counts[dtype], default="float32")


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[Any, str]:
    """The model on meta, by the class that config.json names, from the installed library only."""
    import logging as standard

    # diffusers imports bitsandbytes, which advises to install kernels that qz has no use for.
    standard.getLogger("bitsandbytes.backends").setLevel(standard.ERROR)
    from accelerate import init_empty_weights
    from diffusers.utils import logging

    model_class = model_class_of(checkpoint)
    name = model_class.__name__
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            config = {key: value for key, value in checkpoint.config.items() if key not in OF_QUANTIZATION}
            model = model_class.from_config(config)
    finally:
        torch.set_default_dtype(default)
        logging.set_verbosity(verbosity)
    return model, name


@dataclass(frozen=True, slots=True)
class _Selection:
    """Linear layers to quantize; those to keep → why; keys for the skip list that say so; what to tell the user."""

    linears: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    skips: Skips = field(default_factory=Skips)
    notes: tuple[str, ...] = ()


def _select(model: Any, request: LoadRequest, fp32: list[str]) -> _Selection:
    """Linears to quantize, and those to keep with the reason.

    Without user skips only ``_keep_in_fp32_modules`` count in the library; here also layers whose weight other code
    reads.
    """
    if request.method is None:
        return _Selection()
    linears: list[str] = []
    kept: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if _matches(request.skips, path):
            kept[path] = "skipped on request"
        elif _matches(fp32, path):
            kept[path] = "kept in float32 by the model"
        else:
            linears.append(path)
    read = read_by_others(model, linears, request, _matches)
    chosen = tuple(path for path in linears if path not in read.kept)
    return _Selection(chosen, kept | dict(read.kept), Skips((), read.keys), read.notes)


def _matches(keys: Iterable[str], path: str) -> bool:
    """The library's rule: a key matches a leaf's name, a whole path, or ``key.`` anywhere in the path."""
    leaf = path.rpartition(".")[2]
    return any(key in (leaf, path) or f"{key}." in path for key in keys)


def _documents(model: Any, request: LoadRequest, keys: Skips) -> dict[str, bytes]:
    """config.json as ``save_pretrained`` writes it, without ``_name_or_path``, which would leak a local path."""
    from diffusers import BitsAndBytesConfig

    if request.method is not None:
        skips = skip_list(keys, request)
        if skips is not None:  # the library extends the user's list in place
            skips += _listed(model._keep_in_fp32_modules)
        config = BitsAndBytesConfig(**request.method.config(), llm_int8_skip_modules=skips)
        model.register_to_config(quantization_config=config)
    return {"config.json": document(model.to_json_string())}
