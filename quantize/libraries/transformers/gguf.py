"""What transformers makes of a GGUF file: its config, the names of its tensors, and how it arranges their values.

Asked of the library's own loader (5.23, ``modeling_gguf_pytorch_utils``, which is not public), with the file's header
alone. Where each row of a weight comes from is found by giving the loader numbers of rows instead of values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers

from qz import Unsupported
from qz.formats.checkpoint.gguf import in_blocks
from qz.formats.checkpoint.survey import GGUF, Checkpoint
from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import CODES, Decoded, StoredTensor
from qz.formats.tensors.gguf_header import read_gguf_header
from qz.quantize.libraries.gguf_names import untouched
from qz.quantize.libraries.importing.untrusted_config import require_plausible
from qz.quantize.libraries.transformers.expert_rows import stored_rows
from qz.quantize.libraries.transformers.internals import from_config
from qz.quantize.libraries.transformers.meta_loading import store, temporary_folder
from qz.quantize.libraries.versions import requirement

try:
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
except ImportError as error:
    raise Unsupported(
        f"transformers {transformers.__version__} reads GGUF files in another way than qz knows ({error}). Install one "
        f"that it knows: pip install '{requirement('transformers')}', or a newer qz."
    ) from error

_EXPERT_SIZES = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
_MOST_ROWS = 1 << 22
"""Of a tensor, or experts: where each one goes is found by numbers of them, whatever the file holds."""
_EXPERTS = re.compile(r"\.ffn_\w+_exps\.")

Process = Callable[[Any, str], tuple[Any, str | None]]
"""What a loader makes of the values of a tensor of a name, None if nothing, and their name in the model, None if none.
"""
Place = Callable[[Any, str], tuple[str, Any]]
"""The parameter that a loader puts a tensor of all experts into, and what it has there of the values of a small one."""


def plain_gguf(checkpoint: Checkpoint, header: bytes, vocabulary: int | None) -> Checkpoint:
    """The checkpoint under transformers' names and with its config. ``header``: that of all its tensors, without the
    tokens, of which there are ``vocabulary``.

    Raises Unsupported for an architecture that the library does not read, or reads by merging tensors.
    """
    where, architecture = checkpoint.folder.location, str(checkpoint.config.get("gguf"))
    with header_file(header, len(header) + max(tensor.nbytes for tensor in checkpoint.tensors.values())) as path:
        try:
            found = load_gguf_checkpoint(path, return_tensors=False)["config"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError) as error:
            raise Unsupported(
                f"{where}: transformers does not read GGUF files of {architecture} ({error}). Use the model's original "
                "checkpoint, or of a diffusion model a .safetensors file."
            ) from error
    if vocabulary is not None:
        found.setdefault("vocab_size", vocabulary)  # as the loader does without tokens
    config = plain_config(found) | _sizes_of_experts(header, where)
    model_type = str(config.get("model_type"))
    classes = {**MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    if "architectures" not in config and model_type in classes:
        named = classes[model_type]
        config["architectures"] = [named if isinstance(named, str) else named[0]]
    if "architectures" not in config:
        raise Unsupported(
            f"{where}: qz does not read GGUF files of {architecture} yet. Use the model's original checkpoint."
        )
    require_plausible(config, {name: tensor.shape for name, tensor in checkpoint.tensors.items()}, where)
    model = meta_model(config)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=found)
    with untouched():
        names = get_gguf_hf_weights_map(model, processor)

    def process(values: Any, name: str) -> tuple[Any, str | None]:
        return _processed(processor, values, name, names, where)

    def place(small: Any, name: str) -> tuple[str, Any]:
        kept: dict[str, dict[str, Any]] = {"tensors": {}}
        processor.process(weights=small, name=name, tensor_key_mapping=names, parsed_parameters=kept)
        [(parameter, made)] = kept["tensors"].items()
        return parameter, made

    return as_model(checkpoint, config, model, process, place)


def as_model(checkpoint: Checkpoint, config: dict[str, Any], model: Any, process: Process, place: Place) -> Checkpoint:
    """The checkpoint with a loader's config, and its tensors as the loader arranges them for the model."""
    where = checkpoint.folder.location
    tensors: dict[str, StoredTensor | Decoded] = {}
    left_out: list[str] = []
    for name, tensor in checkpoint.tensors.items():
        _require_rows(tensor.shape, name, where)
        if _EXPERTS.search(name):
            tensors |= _experts_as(place, model, name, tensor, where)
            continue
        arranged, new_name = _arranged_as(process, name, tensor)
        if new_name is None:
            left_out.append(name)
        else:
            tensors[new_name] = arranged
    return replace(
        checkpoint,
        config=config,
        architecture=config["architectures"][0],
        tensors=tensors,
        encoded_as=GGUF,
        left_out=tuple(left_out),
    )


def _require_rows(shape: tuple[int, ...], name: str, where: str) -> None:
    """Raise Unsupported for a tensor of more rows than any model has."""
    if max(shape[:-1], default=0) > _MOST_ROWS:
        raise Unsupported(f"{where}: {quoted(name)} is {list(shape)}. No model has that many rows.")


def _sizes_of_experts(header: bytes, where: str) -> dict[str, int]:
    """What the library's table of names (5.23) lacks: it would take the sizes of one model for those of all."""
    metadata = read_gguf_header(lambda offset, length: header[offset : offset + length], len(header), where).metadata
    architecture = metadata.get("general.architecture")
    found = {key: metadata.get(f"{architecture}.{name}") for key, name in _EXPERT_SIZES.items()}
    return {key: value for key, value in found.items() if isinstance(value, int) and value}


def meta_model(config: Mapping[str, Any]) -> Any:
    """The model of a config on the meta device."""
    model_class = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        return from_config(model_class, model_class.config_class.from_dict(dict(config)))


def _arranged_as(
    process: Process, name: str, tensor: StoredTensor | Decoded
) -> tuple[StoredTensor | Decoded, str | None]:
    """The tensor under its name in the model, None if it has none there, with what the loader does to its values."""
    shape = tensor.shape
    same, new_name = process(np.broadcast_to(np.float32(0), shape), name)
    if new_name is None:
        return tensor, None
    if same is None:
        return replace_name(tensor, new_name), new_name
    if len(shape) == 2 and (rows := _permutation(process, name, shape)) is not None:
        return _blocks(tensor, new_name, shape, rows=rows), new_name

    def arrange(values: Any) -> Any:
        made, _ = process(values, name)
        return values if made is None else made

    return _blocks(tensor, new_name, tuple(same.shape), arrange=arrange), new_name


def _experts_as(
    place: Place, model: Any, name: str, tensor: StoredTensor | Decoded, where: str
) -> dict[str, StoredTensor | Decoded]:
    """The matrices of the experts in a tensor that holds all of a layer, under the names that the library saves.

    The loader puts several such tensors into one parameter; where this one belongs in it, it shows for a small one.
    """
    count, rows, columns = tensor.shape if len(tensor.shape) == 3 else (0, 0, 0)
    try:
        parameter, made = place(np.ones((count, 2, 1), np.float32), name)
        shape = tuple(model.get_parameter(parameter).shape)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError):
        raise Unsupported(
            f"{where}: transformers has no place for {name} in the {type(model).__name__} that it makes of this file. "
            "Use the model's original checkpoint."
        ) from None
    taken = made[0, :, 0].nonzero().reshape(-1).tolist() if made.ndim == 3 else []
    first = taken[0] // 2 * rows if taken else 0
    stored = stored_rows(model, parameter, shape)
    own = {each.expert: each for each in stored if (each.first, each.count, each.turned) == (first, rows, False)}
    if shape != (count, rows * made.shape[1] // 2, columns) or sorted(own) != list(range(count)):
        raise _merged(name, where)
    return {own[number].name: _matrix(tensor, number, own[number].name) for number in range(count)}


def _matrix(tensor: StoredTensor | Decoded, index: int, name: str) -> StoredTensor | Decoded:
    """One matrix of a 3-D tensor, by its new name."""
    whole = tensor.parts[CODES] if isinstance(tensor, Decoded) else tensor
    nbytes = whole.nbytes // whole.shape[0]
    part = whole._replace(name=name, shape=whole.shape[1:], offset=whole.offset + index * nbytes, nbytes=nbytes)
    return replace(tensor, name=name, shape=part.shape, parts={CODES: part}) if isinstance(tensor, Decoded) else part


def _processed(processor: Any, values: Any, name: str, names: Mapping[str, str], where: str) -> tuple[Any, str | None]:
    """What the loader makes of values (None if nothing), and their name in the model (None if they have none there)."""
    kept: dict[str, dict[str, Any]] = {"tensors": {}}
    try:
        result = processor.process(weights=values, name=name, tensor_key_mapping=names, parsed_parameters=kept)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Unsupported(
            f"{where}: transformers cannot arrange {name} ({type(error).__name__}). Use the model's original "
            "checkpoint."
        ) from error
    if result.name is None and len(kept["tensors"]) == 1:  # put there by its name in the model
        [(new_name, own)] = kept["tensors"].items()
        if tuple(own.shape) == values.shape and np.array_equal(own.numpy(), values, equal_nan=True):
            return None, new_name
    if kept["tensors"] or result.name is None:
        raise _merged(name, where)
    made = None if result.weights is values else result.weights
    return made, names.get(result.name)


def _merged(name: str, where: str) -> Unsupported:
    return Unsupported(
        f"{where}: transformers merges or splits {name} while it reads a GGUF file, which qz does not yet. Use the "
        "model's original checkpoint."
    )


def _permutation(process: Process, name: str, shape: tuple[int, ...]) -> bytes | None:
    """Where each row comes from, if the loader does no more than to move rows; None otherwise."""
    rows = np.arange(shape[0], dtype=np.float64).reshape(-1, 1)
    try:
        made, _ = process(rows, name)
    except Unsupported:
        return None
    if made is None or made.shape != rows.shape or not np.array_equal(np.sort(made, axis=0), rows):
        return None
    return np.ascontiguousarray(made.reshape(-1).astype(np.int64)).tobytes()


def _blocks(
    tensor: StoredTensor | Decoded,
    name: str,
    shape: tuple[int, ...],
    rows: bytes | None = None,
    arrange: Callable[[Any], Any] | None = None,
) -> Decoded:
    stored, blocks = in_blocks(tensor)
    return Decoded(name, "F32", shape, {CODES: stored}, replace(blocks, rows=rows, arrange=arrange))


def replace_name(tensor: StoredTensor | Decoded, name: str) -> StoredTensor | Decoded:
    """The tensor under another name."""
    return tensor._replace(name=name) if isinstance(tensor, StoredTensor) else replace(tensor, name=name)


def plain_config(found: Mapping[str, Any]) -> dict[str, Any]:
    """A config that a loader made, of JSON's values alone."""
    config: dict[str, Any] = json.loads(json.dumps(found, default=_plain_value))
    return config


def _plain_value(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


@contextmanager
def header_file(header: bytes, size: int) -> Iterator[str]:
    """A file of ``size`` bytes that begins with the header: the library maps what it reads."""
    with temporary_folder() as folder:
        path = folder / "model.gguf"
        store(path, header, size)
        yield str(path)
