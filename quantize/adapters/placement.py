"""Where the modules of a LoRA belong: which component of a pipeline, which module, which rows of its weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qz import MalformedInput, MissingInput, Unsupported
from qz.counted import shown
from qz.formats.checkpoint.adapter_file import CONFIG, AdapterFile
from qz.formats.checkpoint.other_contents.adapters import MERGE
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.malformed import quoted
from qz.quantize.adapters.changes import Expert, Piece, delta_shape, read_alpha
from qz.quantize.adapters.modules import AdapterModule, modules_of
from qz.quantize.adapters.peft_config import PeftConfig, head_config, peft_config
from qz.quantize.libraries.importing import lean_imports
from qz.quantize.libraries.importing.boundary import describe, library_errors
from qz.quantize.libraries.importing.isolation import isolated
from qz.quantize.libraries.importing.optional_packages import needed_by
from qz.quantize.libraries.importing.untrusted_config import without_code

if TYPE_CHECKING:
    from qz.quantize.libraries.transformers.expert_rows import ExpertParameter

DENOISERS = ("transformer", "unet", "transformer_2", "prior", "decoder")
_PEFT = "base_model.model."
_UNREADABLE = (
    ValueError, KeyError, IndexError, RuntimeError, TypeError, AttributeError, NotImplementedError,
)  # fmt: skip
"""What diffusers' converters raise for names that they do not know."""
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
_KOHYA = re.compile(r"(?P<of>lora_unet|lora_transformer|lycoris|lora_te\d?|lora_prior_\w+?)_(?P<path>\w+)", re.ASCII)


@dataclass(frozen=True)
class Placement:
    """A module's change of one module of a component. ``pieces`` None: all rows, as they come."""

    component: str
    path: str
    """Of the module, or of the parameter that a whole tensor replaces."""
    module: AdapterModule
    scale: float
    pieces: tuple[Piece, ...] | None = None
    expert: Expert | None = None
    """Of a module that changes all experts of a layer; ``path`` is then the name of a stored tensor."""


def placements(adapter: AdapterFile, models: Mapping[str, Checkpoint], pipeline_class: str | None) -> list[Placement]:
    """Every change that a LoRA makes in ``models``, by component; the one model under its component's name, or "".

    ``pipeline_class``: of the pipeline that the models are of, if that is known. Raises MalformedInput for tensors
    that belong nowhere, MissingInput where PEFT's config is missing, and Unsupported for what cannot be fused.
    """
    config = peft_config(adapter) if "peft_type" in (adapter.config or {}) else None
    modules, others = modules_of(adapter)
    if not modules:
        first = next(iter(adapter.tensors))
        raise Unsupported(
            f"{adapter.where} is not a LoRA: its tensors are named as {quoted(first)}. Name the file of a LoRA with "
            "--lora; a model to quantize comes first on the line."
        )
    if config is not None:
        return _of_peft(adapter, config, modules, others, models)
    if others:
        raise _belongs_nowhere(adapter, others)
    if all(model.library == "transformers" for model in models.values()):
        raise MissingInput(
            f"{adapter.folder.location} has no {CONFIG}, without which the scale of {adapter.file} is not known. Name "
            "the adapter's folder or repository, with both files of one revision."
        )
    return _of_diffusers(adapter, modules, models, pipeline_class)


def _belongs_nowhere(adapter: AdapterFile, names: Iterable[str], more: str = "") -> MalformedInput:
    what = shown(map(quoted, sorted(names)), 5)
    return MalformedInput(
        f"{adapter.where} changes what this model does not have: {what}.{more} Is it a LoRA for another model? "
        "qz does not fuse a part of a LoRA, so nothing was written."
    )


def _of_peft(
    adapter: AdapterFile,
    config: PeftConfig,
    modules: Mapping[str, AdapterModule],
    others: Mapping[str, object],
    models: Mapping[str, Checkpoint],
) -> list[Placement]:
    """An adapter that PEFT saved: names are paths of the model it was trained on."""
    component = next((name for name in DENOISERS if name in models), next(iter(models)))
    found = []
    for name in others:  # replacements come first: later changes are added to them
        path = _WRAPPED.sub("", name.removeprefix(_PEFT))
        whole = AdapterModule(adapter, path, {"replacement": adapter.tensors[name]})
        found.append(Placement(component, path, whole, 1.0))
    experts = _experts(config, modules, models[component])
    for stem, module in modules.items():
        path = stem.removeprefix(_PEFT)
        if path in experts:
            found += _of_experts(config, module, component, experts[path])
            continue
        if "embedding_down" in module.parts and "magnitude" in module.parts:
            raise Unsupported(f"{adapter.where}: a DoRA of an embedding ({quoted(stem)}) cannot be fused. {MERGE}")
        if module.kind == "LoRA" and config.dora != ("magnitude" in module.parts):
            has = "has no magnitudes" if config.dora else "has magnitudes"
            raise MalformedInput(
                f"{config.where} says use_dora: {str(config.dora).lower()}, but {quoted(stem)} {has}. Download the "
                "adapter again, config and weights of one revision."
            )
        scale = config.scale_of(path, module.rank) * adapter.scale
        found.append(Placement(component, path, module, scale))
    return found


def _experts(
    config: PeftConfig, modules: Mapping[str, AdapterModule], checkpoint: Checkpoint
) -> Mapping[str, ExpertParameter]:
    """The modules that change all experts of a layer at once, by their paths."""
    if not config.parameters or checkpoint.library != "transformers":
        return {}
    lean_imports.keep(needed_by(checkpoint))  # needed even if the answer about the model came from the cache
    built, where = str(checkpoint.architecture), checkpoint.folder.location
    with lean_imports.lean_imports(), library_errors("transformers", built, where), isolated():
        from qz.quantize.libraries.transformers.expert_rows import expert_parameters

        plain = replace(checkpoint, config=without_code(checkpoint.config)[0])
        return expert_parameters(plain, [stem.removeprefix(_PEFT) for stem in modules], config.parameters)


def _of_experts(
    config: PeftConfig, module: AdapterModule, component: str, parameter: ExpertParameter
) -> list[Placement]:
    """The change of every expert's matrix, as it is stored."""
    where, (count, *matrix) = module.adapter.where, parameter.shape
    rank, uneven = divmod(module.rank, count)
    if module.parts.keys() != {"down", "up"} or uneven:
        raise Unsupported(
            f"{where}: {quoted(module.stem)} changes the {count} experts of {parameter.name} in another way than PEFT "
            "does with target_parameters. Merge it with the program that trained it, then quantize that."
        )
    if delta_shape(module) != (tuple(matrix[::-1]) if parameter.transposed else tuple(matrix)):
        raise MalformedInput(
            f"{where}: {quoted(module.stem)} has a change of the shape {list(delta_shape(module))} for each expert, "
            f"but {parameter.name} of the model is {list(parameter.shape)}. Is it a LoRA for another model?"
        )
    if not parameter.stored or any(each.turned and each.first for each in parameter.stored):
        raise Unsupported(
            f"{where}: how {parameter.name}, which {quoted(module.stem)} changes, is stored is not known. Merge it "
            "with PEFT: merge_and_unload(), then save_pretrained(), and quantize that."
        )
    scale = config.scale_of(parameter.name, rank) * module.adapter.scale
    return [
        Placement(
            component,
            each.name,
            module,
            scale,
            (Piece(0, each.first, matrix[1] if each.turned else each.count),),
            Expert(each.expert, count, parameter.transposed != each.turned),
        )
        for each in parameter.stored
    ]


def _of_diffusers(
    adapter: AdapterFile,
    modules: Mapping[str, AdapterModule],
    models: Mapping[str, Checkpoint],
    pipeline_class: str | None,
) -> list[Placement]:
    """A LoRA in the names of diffusers, kohya, another trainer or the model's own code, as diffusers reads them."""
    from qz.quantize.libraries.diffusers import lora_names

    denoiser = next((name for name in DENOISERS if name in models), next(iter(models)))
    checkpoint = models[denoiser]
    low_rank = {module.stem: module for module in _low_rank(modules)}
    with lean_imports.lean_imports(), isolated():
        mixin = lora_names.lora_mixin(pipeline_class, checkpoint.architecture or "")
        unet = checkpoint.config if "XL" in mixin.__name__ else None
        rows, why = {}, ""
        for asked in (modules, low_rank):  # diffusers may know only the low-rank ones
            try:
                rows = lora_names.lora_rows(_factors(asked), mixin, unet)
                break
            except _UNREADABLE as error:
                why = why or f" diffusers cannot read it ({describe(error)})."
    found = []
    for path, runs in rows.items():
        component, _, inner = path.partition(".")
        if component not in models and component in (*DENOISERS, "") and len(models) == 1:
            component = denoiser
        elif component not in models and f"{path}.weight" in checkpoint.tensors:
            component, inner = denoiser, path
        by_module: dict[str, list[Piece]] = {}
        for each in runs:
            by_module.setdefault(each.module, []).append(Piece(each.start, each.first, each.count))
        found += [
            Placement(component, inner, modules[stem], _stated_scale(modules[stem], path), tuple(pieces))
            for stem, pieces in by_module.items()
        ]
    unplaced = modules.keys() - {each.module.stem for each in found}
    lost = {each.module.stem for each in found if each.component in models and not _is_there(each, models)}
    for stem in sorted(unplaced | lost):
        if (place := _by_underscores(stem, models)) is not None:
            found = [each for each in found if each.module.stem != stem]
            found.append(Placement(*place, modules[stem], _stated_scale(modules[stem], ".".join(place))))
            unplaced -= {stem}
    if left := {stem: modules[stem] for stem in unplaced}:
        raise _belongs_nowhere(adapter, left, why)
    elsewhere = {each.module.stem: each.component for each in found if each.component not in models}
    if elsewhere:
        known = {name for name in elsewhere.values() if name in (*DENOISERS, *lora_names.TextEncoders)}
        raise _belongs_nowhere(adapter, elsewhere, _other_components(known, models) if known else "")
    return found


def _other_components(components: Iterable[str], models: Mapping[str, Checkpoint]) -> str:
    names = ", ".join(sorted(set(components)))
    return f" They belong to {names}; what is converted here is {', '.join(models) or 'one model'}."


def _low_rank(modules: Mapping[str, AdapterModule]) -> list[AdapterModule]:
    return [module for module in modules.values() if "down" in module.parts]


def _factors(
    modules: Mapping[str, AdapterModule],
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], str, str]]:
    """The shapes and names of each module's factors, were it a LoRA of rank 1."""
    kohya = any(module.parts["down"].name.endswith("lora_down.weight") for module in _low_rank(modules))
    found = {}
    for stem, module in modules.items():
        parts = module.parts
        if "down" in parts:
            down, up = parts["down"], parts["up"]
            delta_shape(module)
            found[stem] = (1, *down.shape[1:]), (up.shape[0], 1, *(1 for _ in up.shape[2:])), down.name, up.name
            continue
        if module.kind is None:
            rows, columns = parts["bias_difference"].shape[0] if parts["bias_difference"].shape else 1, 1
        else:
            rows, columns = delta_shape(module)
        down_name, up_name = ("lora_down", "lora_up") if kohya or _KOHYA.fullmatch(stem) else ("lora_A", "lora_B")
        found[stem] = (1, columns), (rows, 1), f"{stem}.{down_name}.weight", f"{stem}.{up_name}.weight"
    return found


def _stated_scale(module: AdapterModule, path: str) -> float:
    """What the file states of a module's scale: alpha by rank, or what diffusers puts into the file's header."""
    alpha = read_alpha(module)
    ranks_known = module.kind != "LoKr" or not {"lokr_w1", "lokr_w2"} <= module.parts.keys()
    if alpha is not None and module.rank and ranks_known:
        return alpha / module.rank * module.adapter.scale
    component, _, inner = path.partition(".")
    if alpha is None and (config := head_config(module.adapter, component)) is not None:
        return config.scale_of(inner, module.rank) * module.adapter.scale
    return module.adapter.scale


def _is_there(placement: Placement, models: Mapping[str, Checkpoint]) -> bool:
    """Whether the checkpoint has a tensor of the module, under the name that diffusers gives it."""
    tensors = models[placement.component].tensors
    return any(f"{path}.{part}" in tensors for path in spellings(placement.path) for part in ("weight", "bias"))


def spellings(name: str) -> tuple[str, str]:
    """What a LoRA's name may be in the checkpoint: transformers 5 took a prefix of CLIP's text encoder away that LoRAs
    still have, as diffusers' ``_load_lora_into_text_encoder`` knows."""
    return name, name.removeprefix("text_model.")


def _by_underscores(stem: str, models: Mapping[str, Checkpoint]) -> tuple[str, str] | None:
    """The module whose path, with underscores for its dots, is the name that kohya and LyCORIS give it."""
    match = _KOHYA.fullmatch(stem)
    if match is None:
        return None
    number = match["of"].removeprefix("lora_te") if match["of"].startswith("lora_te") else None
    encoder = None if number is None else "text_encoder" + ("" if number in ("", "1") else f"_{number}")
    for component, checkpoint in models.items():
        if (component != encoder) if encoder else (checkpoint.library == "transformers"):
            continue
        for name in checkpoint.tensors:
            path = name.removesuffix(".weight")
            if path.replace(".", "_") in (match["path"], match["path"].removeprefix("text_model_")):
                return component, path
    return None
