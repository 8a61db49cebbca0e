"""How transformers 5 loads, quantizes and saves a checkpoint, asked of its own code on the meta device.

Imported only when a transformers checkpoint is planned.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qz import MalformedInput, Unsupported, UsageError
from qz.formats.checkpoint.survey import MAX_CONFIG_BYTES, Checkpoint, read_file
from qz.quantize.libraries.architecture import (
    OF_QUANTIZATION,
    SAFETENSORS_NAMES,
    Architecture,
    Conversion,
    Footprint,
    LoadRequest,
    Saved,
    TensorSpec,
    Weight,
    checked,
    document,
    expand,
    skip_list,
)
from qz.quantize.libraries.transformers_internals import (
    MODULES_TO_PATCH_FOR_QUANTIZATION,
    Conv1D,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    get_keys_to_not_convert,
    get_model_conversion_mapping,
    no_init_weights,
    remove_tied_weights_from_state_dict,
    rename_source_key,
    revert_weight_conversion,
    should_convert_module,
)

Model = Any
"""A transformers model on the meta device."""


def examine(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorSpec],
    request: LoadRequest,
    equal: Callable[[str, str], bool] | None = None,
) -> Architecture:
    """See ``qz.quantize.libraries.architecture.examine``."""
    where = checkpoint.folder.location
    model_class = _model_class(checkpoint)
    model, missing, mismatched = _load(checkpoint, model_class, tensors, request)
    body_class = _body_class(model, missing)
    head_missing: tuple[str, ...] = ()
    if body_class is not None:
        model, missing, mismatched = _load(checkpoint, body_class, tensors, request)
        head_missing = (f"handled as a {body_class.__name__}: the weights lack the head of {model_class.__name__}",)
    class_name = type(model).__name__
    origins = _origins(model, tensors)
    transposed_weights = _transposed_weights(model, origins, tensors)
    checked(missing, [text for name, text in mismatched.items() if name not in transposed_weights], class_name, where)
    load_dtype = _name(model.config.dtype)
    linears, kept, skips = _select(model, request)
    origins = _tie(model, origins, equal)

    in_fp32 = list(model._get_dtype_plan(model.config.dtype))
    kept_in_fp32 = build_glob_alternation(in_fp32)[0].search if in_fp32 else re.compile(r"(?!)").search
    quantized: dict[str, Weight] = {}
    for path, transposed in linears.items():
        shape = tuple(model.get_submodule(path).weight.shape)
        dtype = "float32" if kept_in_fp32(f"{path}.weight") else load_dtype
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

    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in set(model._keys_to_ignore_on_save or ())
    }
    state = remove_tied_weights_from_state_dict(state, model)
    entries = expand(state, quantized, request.method)
    saved, notes = _saved(model, entries, quantized, origins, tensors, transposed_weights)

    used = {source for origin in origins.values() for source in origin.sources}
    parameters = dict(model.named_parameters())
    before = model.get_memory_footprint()
    return Architecture(
        class_name=class_name,
        saved=saved,
        kept_linears=kept,
        dropped=tuple(sorted(set(tensors) - used)),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        counted_parameters=sum(
            request.method.counted(parameter.numel())
            if request.method and name.removesuffix(".weight") in quantized
            else parameter.numel()
            for name, parameter in parameters.items()
        ),
        footprint=Footprint(
            before,
            before
            + sum(
                request.method.footprint(weight.count) - parameters[weight.name].nbytes
                for weight in quantized.values()
                if request.method
            ),
        ),
        dtype=load_dtype,
        documents=_documents(model, quantized, request, skips),
        notes=head_missing + notes,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _model_class(checkpoint: Checkpoint) -> Any:
    """The class that config.json names, from the installed library only: code in the repository is never run."""
    import transformers

    names = checkpoint.config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise Unsupported(
            f"{checkpoint.folder.location}/config.json names no class in `architectures`. Add the class that the "
            'weights belong to, e.g. "architectures": ["BertModel"].'
        )
    model_class = getattr(transformers, names[0], None) if names[0].isidentifier() else None
    if model_class is None or not hasattr(model_class, "from_pretrained") or not hasattr(model_class, "config_class"):
        hint = " Code inside a repository is never run." if "auto_map" in checkpoint.config else ""
        raise Unsupported(
            f"transformers {transformers.__version__} has no class {names[0]}, which config.json asks for.{hint} "
            "Try a newer version: pip install -U transformers."
        )
    return model_class


def _body_class(model: Model, missing: set[str]) -> Any:
    """The class of the model without its head, if all that is missing is the head; None otherwise.

    Sentence encoders are stored this way, under a config that names the class they were trained in. They are loaded
    with ``AutoModel``.
    """
    from transformers import MODEL_MAPPING

    body_class = MODEL_MAPPING.get(type(model.config), None)
    prefix = f"{model.base_model_prefix}."
    if not missing or not isinstance(body_class, type) or isinstance(model, body_class):
        return None
    return None if any(name.startswith(prefix) for name in missing) else body_class


def _load(
    checkpoint: Checkpoint, model_class: Any, tensors: Mapping[str, TensorSpec], request: LoadRequest
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
    logging.disable_progress_bar()
    try:
        # Without initial values for weights that have none: torch would import sympy for them.
        with tempfile.TemporaryDirectory(prefix="qz-") as folder, no_init_weights():
            config = {key: value for key, value in checkpoint.config.items() if key not in OF_QUANTIZATION}
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            model, info = model_class.from_pretrained(
                None,
                config=model_class.config_class.from_pretrained(folder),
                state_dict=state,
                device_map="meta",
                dtype=request.dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            if "generation_config.json" in checkpoint.folder.sizes() and model.can_generate():
                generation = read_file(checkpoint.folder, "generation_config.json", MAX_CONFIG_BYTES)
                (Path(folder) / "generation_config.json").write_bytes(generation)
                model.generation_config = GenerationConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, OSError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unsupported(
            f"transformers cannot build {model_class.__name__} from {checkpoint.folder.location}/config.json: "
            f"{first_line}. Check config.json, or try another version of transformers."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    mismatched = {
        key: f"{key} is {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]
    }
    return model, set(info["missing_keys"]) - mismatched.keys(), mismatched


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where one tensor of the model's state dict comes from."""

    sources: tuple[str, ...]
    conversion: Conversion | None = None


def _origins(model: Model, tensors: Mapping[str, TensorSpec]) -> dict[str, _Origin]:
    """State dict name → its sources, by the steps of ``convert_and_load_state_dict_in_model``.

    A source that matches a converter is collected with the others of its target; any other is only renamed, and the
    first one to arrive at a name wins, as there.
    """

    mapping = get_model_conversion_mapping(model, None, None)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    prefix = model.base_model_prefix
    origins: dict[str, _Origin] = {}
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for source in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, prefix, state)
        if name not in state and source in state:
            name, pattern = rename_source_key(source, [], [], prefix, state)
        if name not in state:
            continue
        if pattern is None:
            origins.setdefault(name, _Origin((source,)))
        else:
            groups[name].append((pattern, source))
    for first, members in groups.items():
        conversion = _Forward(model, by_pattern[members[0][0]], first, tuple(members))
        meta = {
            source: torch.empty(tensors[source].shape, dtype=getattr(torch, tensors[source].dtype), device="meta")
            for _, source in members
        }
        origin = _Origin(tuple(source for _, source in members), conversion)
        origins.update(dict.fromkeys(conversion(meta), origin))
    return origins


@dataclass(frozen=True, slots=True)
class _Forward:
    """transformers' own converter for one group of checkpoint tensors, run when their data is there."""

    model: Model
    converter: Any
    first: str
    members: tuple[tuple[str, str], ...]

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        from copy import deepcopy

        converter = deepcopy(self.converter)
        for pattern, source in self.members:
            converter.add_tensor(self.first, source, pattern, tensors[source])
        converted = converter.convert(self.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def _transposed_weights(model: Model, origins: Mapping[str, _Origin], tensors: Mapping[str, TensorSpec]) -> set[str]:
    """Weights of ``Conv1D`` modules that are given as (out, in)."""

    found = set()
    for path, module in model.named_modules():
        origin = origins.get(f"{path}.weight") if isinstance(module, Conv1D) else None
        given = tensors[origin.sources[0]] if origin else None
        if given is not None and given.linear and given.shape == tuple(reversed(module.weight.shape)):
            found.add(f"{path}.weight")
    return found


def _tie(model: Model, origins: dict[str, _Origin], equal: Callable[[str, str], bool] | None) -> dict[str, _Origin]:
    """Tie what ``tie_weights`` ties: on meta it leaves alone the pairs of which both sides are stored.

    Off meta it ties those whose data is equal; ``equal`` tells. Returns ``origins`` with an entry for every tied name.
    """
    for target, source in list(model.all_tied_weights_keys.items()):
        if target not in origins or source not in origins:
            continue
        mine, other = origins[target].sources, origins[source].sources
        if equal is not None and mine != other and not (len(mine) == len(other) == 1 and equal(mine[0], other[0])):
            del model.all_tied_weights_keys[target]
            continue
        path, _, attribute = target.rpartition(".")
        setattr(model.get_submodule(path), attribute, model.get_parameter(source))
    complete = dict(origins)
    by_parameter = {
        id(parameter): origins[name]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in origins
    }
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in complete and id(parameter) in by_parameter:
            complete[name] = by_parameter[id(parameter)]
    return complete


def _select(model: Model, request: LoadRequest) -> tuple[dict[str, bool], dict[str, str], list[str] | None]:
    """Linears to quantize (path → stored transposed), linears to keep (path → why), and the skip list to write."""

    if request.method is None:
        return {}, {}, None
    patched = {type(module).__name__ for module in model.modules()} & set(MODULES_TO_PATCH_FOR_QUANTIZATION)
    if patched:
        raise Unsupported(
            f"transformers replaces {', '.join(sorted(patched))} when it quantizes, and cannot load back what it then "
            f"saves ({type(model).__name__}). Use a quantization made for this family, such as compressed-tensors."
        )
    defaults = get_keys_to_not_convert(model)
    tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    if not request.default_skips and tied:
        raise UsageError(
            f"--no-default-skips would quantize the tied weights {', '.join(sorted(tied))}, and the result could not "
            "run. Leave it out, or untie the weights first."
        )
    fp32 = list(model._keep_in_fp32_modules or ())
    patterns = list(dict.fromkeys([*(defaults if request.default_skips else ()), *fp32, *request.skips]))
    for pattern in request.skips:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"--skip {pattern!r} is not a regular expression: {error}.") from error
    linears: dict[str, bool] = {}
    kept: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (Conv1D, torch.nn.Linear)):
            continue
        if type(module) is not torch.nn.Linear and not isinstance(module, Conv1D):
            kept[path] = f"a {type(module).__name__}, which transformers does not quantize"
        elif should_convert_module(path, patterns):
            linears[path] = isinstance(module, Conv1D)
        elif not should_convert_module(path, list(request.skips)):
            kept[path] = "skipped on request"
        elif not should_convert_module(path, fp32):
            kept[path] = "kept in float32 by the model"
        elif path in tied:
            kept[path] = "tied to another weight"
        else:
            kept[path] = "output layer"
    return linears, kept, skip_list(defaults, request)


def _saved(
    model: Model,
    entries: dict[str, tuple[str, str, bool, torch.Tensor]],
    quantized: Mapping[str, Weight],
    origins: Mapping[str, _Origin],
    tensors: Mapping[str, TensorSpec],
    transposed_weights: set[str],
) -> tuple[tuple[Saved, ...], tuple[str, ...]]:
    """The output's tensors in the order and under the names of ``save_pretrained``.

    A renamed tensor is the same object before and after ``revert_weight_conversion``. What else comes out of it was
    merged or split back: copied straight from the checkpoint when that has it under the same name and shape (fused
    experts), computed otherwise. Where quantized data itself would be merged, transformers writes what it cannot load
    (facts: one-to-many conversions onto linears); then the model's own names are used.
    """
    by_identity = {id(tensor): name for name, (_, _, _, tensor) in entries.items()}
    reverted = _revert(model, {name: tensor for name, (_, _, _, tensor) in entries.items()})
    notes: tuple[str, ...] = ()
    direct = {by_identity.get(id(tensor)) for tensor in reverted.values()}
    if any(part for name, (_, part, _, _) in entries.items() if name not in direct):
        notes = ("saved under the model's own parameter names: the checkpoint's names would merge quantized tensors",)
        reverted = {name: entries[name][3] for name in sorted(entries, key=dot_natural_key)}
        direct = set(entries)
    merged = _merged(model, {name: entries[name][3] for name in entries if name not in direct}, origins)
    saved = []
    for name, tensor in reverted.items():
        dtype, shape = _name(tensor.dtype), tuple(tensor.shape)
        storage = tensor.untyped_storage()._cdata
        state_name = by_identity.get(id(tensor))
        owner, part, variable, _ = entries[state_name] if state_name is not None else (name, "", False, None)
        if part:
            weight = quantized[owner.removesuffix(".weight")]
        elif state_name is not None:
            origin = origins[state_name]
            conversion = _Renamed(origin.conversion, state_name, name) if origin.conversion else None
            transposed = state_name in transposed_weights
            weight = Weight(name, origin.sources, dtype, shape, transposed=transposed, conversion=conversion)
        elif name in tensors and tensors[name].shape == shape:
            weight = Weight(name, (name,), dtype, shape)
        else:
            weight = Weight(name, merged[name].sources, dtype, shape, conversion=merged[name])
        saved.append(Saved(name, SAFETENSORS_NAMES[dtype], shape, weight, tensor.nbytes, part, variable, storage))
    return tuple(saved), notes


def _merged(model: Model, state: dict[str, torch.Tensor], origins: Mapping[str, _Origin]) -> dict[str, _Backward]:
    """For every tensor that saving computes from others: the group it is computed from."""
    reverse = [conversion.reverse_transform() for conversion in model._weight_conversions[::-1]]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    groups: dict[str, list[str]] = defaultdict(list)
    for name in state:
        groups[rename_source_key(name, [], converters)[0]].append(name)
    computed = {}
    for names in groups.values():
        backward = _Backward(model, {name: origins[name] for name in names})
        computed.update(dict.fromkeys(revert_weight_conversion(model, {n: state[n] for n in names}), backward))
    return computed


def _revert(model: Model, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``revert_weight_conversion`` on meta; empty where merging packed data fails there, as it would at save."""
    try:
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    except (ValueError, TypeError, KeyError, RuntimeError, IndexError) as error:
        if not any(tensor.dtype.itemsize == 1 for tensor in state.values()):
            raise Unsupported(
                f"transformers cannot save {type(model).__name__} under its checkpoint's names: {error}"
            ) from error
        reverted = {}
    return reverted


@dataclass(frozen=True, slots=True)
class _Renamed:
    """One result of a conversion, under the name it is saved by."""

    conversion: Conversion
    state_name: str
    name: str

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return {self.name: self.conversion(tensors)[self.state_name]}


@dataclass(frozen=True, slots=True)
class _Backward:
    """Load-time conversions of a group of tensors, then their reversal: what saving a loaded model does."""

    model: Model
    origins: Mapping[str, _Origin]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(source for origin in self.origins.values() for source in origin.sources))

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        for name, origin in self.origins.items():
            if name in state:
                continue
            if origin.conversion is None:
                state[name] = tensors[origin.sources[0]]
            else:
                state.update(origin.conversion(tensors))
        reverted: Mapping[str, torch.Tensor] = revert_weight_conversion(self.model, state)
        return reverted


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
    with tempfile.TemporaryDirectory(prefix="qz-") as folder:
        try:
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
        except (ValueError, TypeError, AssertionError) as error:
            raise MalformedInput(f"transformers refuses to save this configuration: {error}") from error
        for path in sorted(Path(folder).iterdir()):
            documents[path.name] = document(path.read_text(encoding="utf-8"))
    return documents
