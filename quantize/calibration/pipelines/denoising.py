"""A pipeline draws from prompts, block by block, and what its models are given on the way is kept.

Each prompt is drawn by a copy of the pipeline with a scheduler of its own, in a thread of ``BlockPass``: text encoders
and denoiser wait wherever a block begins whose weights are not there, so that all prompts go through it together. The
weights of the denoiser are read once for each step, those for which a GPU has room once.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qz import MalformedInput, Unsupported, UsageError
from qz.progress import OnProgress, Progress
from qz.quantize.calibration.pipelines import memory
from qz.quantize.calibration.pipelines.components import Models
from qz.quantize.calibration.running.blocks import BlockPass, Finished
from qz.quantize.libraries.transformers.runnable import running

if TYPE_CHECKING:
    from qz.quantize.calibration.pipelines.resume import CallStore

RESOLUTION = 256
"""Pixels of either side, where the pipeline is not made for fewer."""
FRAMES = 9
"""Of a video: one more than a multiple of 4 and of 8, as the models want it."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """What is drawn, and how. ``resolution``: pixels of either side, None for the default."""

    prompts: tuple[str, ...]
    steps: int
    seed: int
    resolution: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One forward of a component: for which prompt, its arguments by name, and the timestep if one is among them."""

    prompt: int
    arguments: Mapping[str, Any]
    timestep: float | None


@dataclass(slots=True)
class Drawn:
    """What came of it: by component its calls in their order, and by prompt the last latents."""

    resolution: int | None = None
    """Pixels of either side; None if the pipeline cannot be asked for a size."""
    calls: dict[str, list[Call]] = field(default_factory=dict)
    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    """Components that cannot be run block by block, whose weights are all in memory while they run."""
    at_once: int = 0
    """Bytes of weights that were in memory together."""


def draw(models: Models, drawing: Drawing, task: str, progress: OnProgress, calls: CallStore | None = None) -> Drawn:
    """Draw all prompts. A component that needs weights of a block before that is called is loaded whole.

    ``calls`` knows what an interrupted run has drawn, and is told of what is drawn now. Raises Unsupported for a
    pipeline that cannot draw from a prompt alone, MalformedInput for NaN, and TryAgain where the weights that must be
    in memory together do not fit.
    """
    whole = frozenset(calls.kept.sums.whole) if calls is not None else frozenset()
    while True:
        module = _Pipeline(models, drawing, calls)
        try:
            return _draw(models, module, whole, task, progress)
        except Unsupported as error:
            failed = module.failed
            if failed is None or failed in whole or "meta" not in str(error.__cause__):
                raise
            whole |= {failed}
            if calls is not None:
                calls.restart(whole)
            progress(Progress(f"Loading {failed} whole, which cannot be run block by block"))
        finally:
            module.close()
            models.release_all()


def _draw(models: Models, module: _Pipeline, whole: frozenset[str], task: str, progress: OnProgress) -> Drawn:
    visited = 0

    def tell(_: str) -> None:
        nonlocal visited
        visited += 1
        progress(Progress(task, visited, unit="block"))

    def used(number: int, latents: torch.Tensor) -> None:
        if latents.isnan().any():
            raise MalformedInput(
                f"{models.where} generates NaN: check its weights, and whether its dtype has the range for them."
            )
        drawn.latents[number] = latents

    steps = _steps(models, module, whole, tell)
    drawn = module.drawn
    drawn.whole, drawn.at_once = whole, memory.at_once([module], steps.parts)
    memory.require(drawn.at_once, models.device, f"{models.class_name} in {models.where}")
    with running(models.class_name, models.where, "calibrated: it cannot generate from a prompt alone"):
        _load_rest(models, steps)
        steps.run(({"number": number} for number in range(len(module.drawing.prompts))), used)
    drawn.calls = {name: in_order(each) for name, each in drawn.calls.items()}
    drawn.at_once = min(drawn.at_once + sum(models.room.kept.values()), memory.weights_in(module))
    return drawn


def in_order(calls: list[Call]) -> list[Call]:
    """The first call of every prompt, then the second, and so on. A run that goes on makes the calls that it knows one
    prompt after another, and sums over inputs round by their order."""
    made: Counter[int] = Counter()
    numbered = []
    for call in calls:
        made[call.prompt] += 1
        numbered.append((made[call.prompt], call.prompt, call))
    return [call for *_, call in sorted(numbered, key=lambda each: each[:2])]


def until_denoising(
    models: Models, drawing: Drawing, whole: frozenset[str], task: str, progress: OnProgress
) -> Mapping[str, list[Call]]:
    """The calls by component when each prompt is drawn up to the first call of a denoiser, which is among them."""
    module = _Pipeline(models, drawing, None)

    def finish(*_: Any) -> None:
        raise Finished

    denoisers = [models.model(name) for name in models.weights if models.is_denoiser(name)]
    handles = [each.register_forward_pre_hook(finish) for each in denoisers]
    try:
        steps = _steps(models, module, whole, lambda _: progress(Progress(task, unit="block")))
        with running(models.class_name, models.where, "calibrated: it cannot generate from a prompt alone"):
            _load_rest(models, steps)
            steps.run({"number": number} for number in range(len(drawing.prompts)))
        return module.drawn.calls
    finally:
        for handle in handles:
            handle.remove()
        module.close()
        models.release_all()


def _steps(models: Models, module: _Pipeline, whole: frozenset[str], tell: Callable[[str], None]) -> BlockPass:
    """Through all that is run block by block."""
    steps = BlockPass(module, models, tell)
    steps.parts = {path: part for path, part in steps.parts.items() if path.partition(".")[0] not in whole}
    return steps


def _load_rest(models: Models, steps: BlockPass) -> None:
    """What belongs to no block."""
    for name, weights in models.weights.items():
        weights.load_rest({path: part for path, part in steps.parts.items() if path.startswith(f"{name}.")})


class _Pipeline(torch.nn.Module):
    """All models of a pipeline as one, whose forward draws one of the prompts and returns its last latents."""

    def __init__(self, models: Models, drawing: Drawing, calls: CallStore | None) -> None:
        super().__init__()
        self.pipeline, self.drawing = models.pipeline, drawing
        self._asked = _arguments(models.pipeline, models.where, drawing)
        self.drawn = Drawn(self._asked.get("height"))
        self.here = threading.local()
        self.failed: str | None = None
        """The component in which a forward failed."""
        self._handles: list[Any] = []
        self._replaced: list[Any] = []
        for name in models.weights:
            model = models.model(name)
            self.add_module(name, model)
            self._handles += [
                model.register_forward_pre_hook(self._entered(name, model), with_kwargs=True),
                model.register_forward_hook(self._left),
            ]
            if calls is not None:
                model.forward = calls.known_or(name, model.forward, self.here)
                self._replaced.append(model)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for model in self._replaced:
            del model.forward  # uncovers the method of the class

    def forward(self, number: int) -> torch.Tensor:
        self.here.number, self.here.inside, self.here.counts = number, None, Counter()
        pipeline = copy.copy(self.pipeline)
        for name, component in self.pipeline.components.items():
            if hasattr(component, "set_timesteps"):
                setattr(pipeline, name, copy.deepcopy(component))
        generator = torch.Generator("cpu").manual_seed(self.drawing.seed + number)
        try:
            answer = pipeline(prompt=self.drawing.prompts[number], generator=generator, **self._asked)
        except Exception:
            self.failed = self.here.inside
            raise
        latents = answer[0]
        if not torch.is_tensor(latents):
            raise Unsupported(f"{type(pipeline).__name__} gives no latents, but {type(latents).__name__}.")
        return latents.float().cpu()

    def _entered(self, name: str, model: Any) -> Callable[..., None]:
        signature = inspect.signature(model.forward)

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.here.inside = name
            self.here.counts[name] += 1
            arguments = _named(signature, args, kwargs)
            calls = self.drawn.calls.setdefault(name, [])
            before = next((call for call in reversed(calls) if call.prompt == self.here.number), None)
            kept = {key: _kept(value, before and before.arguments.get(key)) for key, value in arguments.items()}
            calls.append(Call(self.here.number, kept, _timestep(arguments)))

        return hook

    def _left(self, *_: Any) -> None:
        self.here.inside = None


def _arguments(pipeline: Any, where: str, drawing: Drawing) -> dict[str, Any]:
    """How the pipeline is called, beside the prompt. Raises Unsupported for one that is not made for prompts alone, and
    UsageError where a resolution is asked for that it takes none of."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    size = drawing.resolution or default_resolution(pipeline)
    known = {
        "num_inference_steps": drawing.steps,
        "height": size,
        "width": size,
        "num_frames": FRAMES,
        "output_type": "latent",
    }
    needed = {"self", "prompt", *known, "generator"}
    others = [
        name
        for name, each in parameters.items()
        if name not in needed
        and each.default is each.empty
        and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    missing = [name for name in ("prompt", "num_inference_steps", "generator", "output_type") if name not in parameters]
    if others or missing:
        why = f"needs {', '.join(others)}" if others else f"takes no {', '.join(missing)}"
        raise Unsupported(
            f"{where}: {type(pipeline).__name__} {why}, and calibration has nothing but prompts. Quantize it "
            "with --scales search, which needs no calibration."
        )
    if drawing.resolution is not None and not {"height", "width"} <= parameters.keys():
        raise UsageError(f"{where}: {type(pipeline).__name__} takes no height and width. Leave out --resolution.")
    return {name: value for name, value in known.items() if name in parameters}


def default_resolution(pipeline: Any) -> int:
    """The one that the pipeline is made for, where it says so, but no more than ``RESOLUTION``."""
    units, scale = getattr(pipeline, "default_sample_size", None), getattr(pipeline, "vae_scale_factor", None)
    if isinstance(units, int) and isinstance(scale, int):
        return min(RESOLUTION, units * scale)
    height = inspect.signature(type(pipeline).__call__).parameters.get("height")
    stated = height.default if height is not None else None
    return min(RESOLUTION, stated) if isinstance(stated, int) else RESOLUTION


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name. Raises Unsupported where some have none."""
    named = dict(signature.bind(*args, **kwargs).arguments)
    for name, each in signature.parameters.items():
        if each.kind is each.VAR_KEYWORD:
            named |= named.pop(name, {})
        elif each.kind is each.VAR_POSITIONAL and named.pop(name, ()):
            raise Unsupported("a model is called with arguments that have no names")
    return named


def _kept(value: Any, before: Any) -> Any:
    """A copy, as what is given may be written into later; what was given the time before is not held twice."""
    if torch.is_tensor(value):
        same = torch.is_tensor(before) and before.shape == value.shape and before.dtype == value.dtype
        return before if same and torch.equal(before, value) else value.detach().clone()
    if isinstance(value, dict):
        old = before if isinstance(before, dict) else {}
        return {key: _kept(each, old.get(key)) for key, each in value.items()}
    if type(value) in (list, tuple):
        olds = before if type(before) is type(value) and len(before) == len(value) else (None,) * len(value)
        return type(value)(_kept(each, old) for each, old in zip(value, olds, strict=True))
    return value


def _timestep(arguments: Mapping[str, Any]) -> float | None:
    value = next((each for name, each in arguments.items() if "timestep" in name and each is not None), None)
    if torch.is_tensor(value):
        return float(value.flatten()[0]) if value.numel() else None
    return float(value) if isinstance(value, int | float) else None
