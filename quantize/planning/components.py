"""Which components of a pipeline are worth quantizing, and why: decided from names, configs and headers alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from qz import MissingInput, Unsupported, UsageError
from qz.formats.checkpoint.pipeline import Component, Pipeline
from qz.quantize.methods import Method
from qz.quantize.planning.nearest import nearest
from qz.quantize.planning.unreadable import KEPT

if TYPE_CHECKING:
    from qz.quantize.planning.plan import Plan

LARGE = 0.1
"""Share of the pipeline's weights from which a text encoder is worth it: a T5, not a CLIP."""
CONVOLUTIONAL = 0.5
"""Share of a component's weights in convolutions, which stay as they are, from which it is hardly worth it."""

Kind = Literal["denoiser", "text encoder", "CLIP encoder", "VAE", "other model", "no model"]

_AUTOENCODER = re.compile(r"Autoencoder|VQModel|ConsistencyDecoder|VQGAN|MoVQ")
_DENOISER = re.compile(r"transformer|unet|prior|decoder|dit")
_DENOISER_CLASS = re.compile(r"Transformer|UNet|Prior|DiT")
_CLIP = re.compile(r"(?:chinese_|alt)?clip|siglip|clap|align|blip", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Choice:
    """What happens to a component: quantized by ``method``, or kept as it is where that is None, and why."""

    component: Component
    method: Method | None
    reason: str
    share: float
    """Of the pipeline's weights, 0 to 1."""

    asked_for: bool = False
    """By name, to be quantized."""

    @property
    def name(self) -> str:
        return self.component.name


def kind_of(component: Component) -> Kind:
    """What a component is for."""
    checkpoint = component.checkpoint
    if checkpoint is None:
        return "no model"
    name = checkpoint.architecture or component.class_name
    if checkpoint.library == "diffusers":
        if _AUTOENCODER.search(name) or component.name.startswith(("vae", "vqvae", "movq", "vqgan")):
            return "VAE"
        return "denoiser" if _DENOISER.match(component.name) or _DENOISER_CLASS.search(name) else "other model"
    if _CLIP.match(str(checkpoint.config.get("model_type", ""))) or _CLIP.match(name):
        return "CLIP encoder"
    return "text encoder"


def choose(
    pipeline: Pipeline,
    method: Method,
    only: tuple[str, ...] | None = None,
    methods: Mapping[str, Method | None] | None = None,
) -> tuple[Choice, ...]:
    """What to do with each component, in the pipeline's order.

    ``only`` names those to quantize with ``method``, instead of the ones that are worth it; ``methods`` gives some a
    method of their own, or None to keep them. Raises MissingInput where no component has weights, UsageError for a name
    that is no component with weights, and Unsupported where nothing is worth quantizing.
    """
    if not any(component.checkpoint for component in pipeline.components):
        where = pipeline.folder.location
        if any(component.is_of_onnx for component in pipeline.components):
            raise Unsupported(
                f"{where} is a pipeline of ONNX files, which bitsandbytes does not quantize. Get the one that it was "
                "exported from, whose weights are .safetensors."
            )
        raise MissingInput(f"{where} has no component with weights to quantize. Get a complete copy of the pipeline.")
    methods = dict(methods or {})
    _require_models(pipeline, (*(only or ()), *(name for name, own in methods.items() if own is not None)))
    _require_known(pipeline, methods)
    total = sum(component.parameters for component in pipeline.components)
    by_name = {component.name: component for component in pipeline.components}
    choices = []
    for component in pipeline.components:
        share = component.parameters / max(total, 1)
        first, name = component, component.name
        if component.first is not None:  # later models of a component follow the choice for its first
            first = by_name[component.first]
            name = name if name in methods or name in (only or ()) else first.name
        if name in methods:
            own = methods[name]
            reason = "as asked" if own is not None else "left alone as asked"
            choices.append(Choice(component, own, reason, share, asked_for=own is not None))
        elif only is not None:
            wanted = name in only
            reason = "as asked" if wanted else "not asked for" if component.checkpoint else _reason(component, share)[1]
            choices.append(Choice(component, method if wanted else None, reason, share, asked_for=wanted))
        else:
            worth, reason = _reason(first, first.parameters / max(total, 1))
            choices.append(Choice(component, method if worth else None, reason, share))
    if any(choice.method is not None for choice in choices):
        return tuple(choices)
    return _despite_convolutions(pipeline, method, choices)


def plan_each(
    choices: Sequence[Choice], planned: Callable[[Choice], Plan]
) -> tuple[tuple[Choice, ...], dict[str, Plan]]:
    """The plans of those that have a method, by name. One that was not asked for by name, and that ``planned`` refuses
    as Unsupported, is kept, and its reason says why. Raises that where none is left, and what else ``planned`` raises.
    """
    made: list[Choice] = []
    plans: dict[str, Plan] = {}
    refused: list[Unsupported] = []
    for choice in choices:
        try:
            if choice.method is not None:
                plans[choice.name] = planned(choice)
            made.append(choice)
        except Unsupported as error:
            if choice.asked_for:
                raise
            refused.append(error)
            made.append(replace(choice, method=None, reason=f"{KEPT}: {error}"))
    if not plans and refused:
        raise refused[0]
    return tuple(made), plans


def without_weights(component: Component) -> str:
    """What is said of a component that has no weights which qz reads."""
    return "weights of ONNX Runtime, which bitsandbytes does not quantize" if component.is_of_onnx else "has no weights"


def _reason(component: Component, share: float) -> tuple[bool, str]:
    """Whether a component is worth quantizing, and why, or why not."""
    kind = kind_of(component)
    if kind == "no model":
        return False, without_weights(component)
    if component.quantization is not None:
        return False, f"already quantized with {component.quantization.get('quant_method', 'another method')}"
    if kind == "VAE":
        return False, "VAE: mostly convolutions, and every error in it is seen in the picture"
    if kind == "CLIP encoder":
        return False, f"CLIP encoder: {share:.0%} of the weights, little to gain"
    if component.convolutional_share >= CONVOLUTIONAL:
        return False, f"mostly convolutional: {component.convolutional_share:.0%} of its weights"
    if kind != "denoiser" and share < LARGE:
        return False, f"small: {share:.0%} of the weights"
    return True, f"{'large ' if kind == 'text encoder' else ''}{kind}: {share:.0%} of the weights"


def _despite_convolutions(pipeline: Pipeline, method: Method, choices: list[Choice]) -> tuple[Choice, ...]:
    """Nothing is worth it by the rules: then at least the denoisers, unless the user has decided otherwise."""
    open_ones = [
        choice
        for choice in choices
        if kind_of(choice.component) == "denoiser" and choice.reason.startswith("mostly convolutional")
    ]
    if not open_ones:
        quantized = [choice.name for choice in choices if choice.component.quantization is not None]
        where = pipeline.folder.location
        if quantized:
            # With numpy, which `qz inspect` does not need.
            from qz.quantize.planning.unquantized import contradiction, is_bitsandbytes

            checkpoints = [choice.component.checkpoint for choice in choices if choice.component.checkpoint is not None]
            if faults := [str(fault) for each in checkpoints if (fault := contradiction(each)) is not None]:
                raise Unsupported(f"{where}: nothing can be quantized as it is:", *faults)
            known = any(map(is_bitsandbytes, checkpoints))
            start = f"Run `qz dequantize {where}` first" if known else "Start from the original weights"
            raise Unsupported(
                f"{where}: {', '.join(quantized)} is already quantized, and nothing else is worth it. {start}, or name "
                "a component with --components."
            )
        names = ", ".join(component.name for component in pipeline.components if component.checkpoint)
        raise UsageError(f"{where}: nothing to quantize. Name components with --components (there are: {names}).")
    return tuple(
        Choice(choice.component, method, f"denoiser, {choice.reason}", choice.share) if choice in open_ones else choice
        for choice in choices
    )


def _require_known(pipeline: Pipeline, names: Mapping[str, object]) -> None:
    there = [component.name for component in pipeline.components]
    unknown = sorted(names.keys() - set(there))
    if unknown:
        raise UsageError(
            f"{pipeline.folder.location} has no component {unknown[0]}. {nearest(unknown[0], there)} "
            f"Components there: {', '.join(there)}."
        )


def _require_models(pipeline: Pipeline, names: tuple[str, ...]) -> None:
    _require_known(pipeline, dict.fromkeys(names))
    models = [component.name for component in pipeline.components if component.checkpoint is not None]
    without = [name for name in names if name not in models]
    if without:
        raise UsageError(
            f"{without[0]} of {pipeline.folder.location} has no weights to quantize. "
            f"Components with weights: {', '.join(models)}."
        )
