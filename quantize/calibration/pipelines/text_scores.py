"""How sensitive the linears of a pipeline's text encoders are: by what the denoisers make of the changed prompts.

The prompts go through the text encoders once more, one of these quantized, up to the first call of a denoiser. What it
is given there instead of what the original gave takes that one's place in all its calls; what its output then loses is
the encoder's loss, in the unit of the denoisers' scores. Within the encoder it is shared as in any model, by the errors
of its own output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from qz import Unsupported
from qz.progress import OnProgress, Progress
from qz.quantize.calibration.block_errors import states_of as text_states_of
from qz.quantize.calibration.pipelines import memory
from qz.quantize.calibration.pipelines.components import Models
from qz.quantize.calibration.pipelines.denoising import Call, Drawing, Drawn, until_denoising
from qz.quantize.calibration.pipelines.scores import CALLS, SOME, OutputJudge, in_float32, spread
from qz.quantize.calibration.rounded import rounded
from qz.quantize.calibration.running.blocks import BlockPass, parts_of
from qz.quantize.calibration.running.nested import changed
from qz.quantize.calibration.scores import is_conv1d, quantized_names, score
from qz.quantize.compute.arithmetic import Arithmetic
from qz.quantize.libraries.transformers.runnable import Runnable, running
from qz.quantize.methods import Method
from qz.quantize.planning.budget.sensitivity import Scores


def score_text_encoders(
    models: Models,
    drawing: Drawing,
    drawn: Drawn,
    only: str | None,
    method: Method,
    arithmetic: Arithmetic,
    progress: OnProgress,
) -> dict[str, Scores]:
    """By component. One that cannot be run block by block, or of which nothing is quantized, is left out, and all are
    where no denoiser was called. Raises what reading and running raise, and Unsupported where a denoiser is called
    otherwise for one of them, so that what it loses cannot be told."""
    names: dict[str, list[str]] = {}
    for name in drawn.calls:
        if only in (None, name) and not models.is_denoiser(name) and name not in drawn.whole:
            weights = models.weights[name]
            with suppress(Unsupported):  # then it stays unquantized
                names[name] = quantized_names(weights.checkpoint, weights.runnable, method)
    names = {name: own for name, own in names.items() if own}
    if not names or not any(models.is_denoiser(name) for name in drawn.calls):
        return {}
    replaced = {}
    for name, own in names.items():
        with _rounding(models.weights[name].runnable, own, method, arithmetic):
            changed_calls = until_denoising(models, drawing, drawn.whole, f"Reading prompts with {name}", progress)
        replaced[name] = exchanges(models, drawn, name, changed_calls)
    lost = _lost(models, drawn, replaced, progress)
    return {
        name: _shared(models, drawn, name, own, lost[name], method, arithmetic, progress) for name, own in names.items()
    }


@contextmanager
def _rounding(model: Runnable, names: Sequence[str], method: Method, arithmetic: Arithmetic) -> Iterator[None]:
    """Meanwhile these weights of a model become what a quantized checkpoint gives, whenever they are read."""

    def rounds(transposed: bool) -> Callable[..., None]:
        done: list[Any] = [None]

        def hook(linear: Any, _: Any) -> None:
            if linear.weight is not done[0]:
                instead = rounded(linear.weight, method, arithmetic, transposed=transposed)
                done[0] = linear.weight = torch.nn.Parameter(instead, requires_grad=False)

        return hook

    linears = {name: model.linears[name.removesuffix(".weight")] for name in names}
    handles = [each.register_forward_pre_hook(rounds(is_conv1d(model, name))) for name, each in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class Exchange:
    """A tensor that a denoiser was given, and what takes its place."""

    before: torch.Tensor
    after: torch.Tensor


def exchanges(
    models: Models, drawn: Drawn, encoder: str, others: Mapping[str, Sequence[Call]]
) -> dict[int, list[Exchange]]:
    """By prompt what its first call of a denoiser has otherwise in ``others``, where the ``encoder`` is quantized."""
    found: dict[int, list[Exchange]] = {}
    for name, calls in others.items():
        for other in calls if models.is_denoiser(name) else ():
            first = next((call for call in drawn.calls.get(name, ()) if call.prompt == other.prompt), None)
            before, after = (_tensors(call.arguments) if call is not None else [] for call in (first, other))
            if [each.shape for each in before] != [each.shape for each in after]:
                raise Unsupported(
                    f"{models.where}: {name} is given tensors of other shapes when {encoder} is quantized, so that "
                    "what is lost cannot be told. Name another component with --subfolder, or leave out --scores."
                )
            found[other.prompt] = [
                Exchange(*pair)
                for pair in zip(before, after, strict=True)
                if pair[0].is_floating_point() and not torch.equal(*pair)
            ]
    return found


def _tensors(value: Any) -> list[torch.Tensor]:
    """Those in nested values."""
    found: list[torch.Tensor] = []

    def note(each: torch.Tensor) -> torch.Tensor:
        found.append(each)
        return each

    changed(value, note)
    return found


Replaced = Mapping[str, Mapping[int, Sequence[Exchange]]]
"""By text encoder and prompt."""


def _lost(models: Models, drawn: Drawn, replaced: Replaced, progress: OnProgress) -> dict[str, float]:
    """By text encoder what the denoisers' outputs lose: the mean over some of their calls, in float32."""
    found: dict[str, list[float]] = {name: [] for name in replaced}
    for name in drawn.calls:
        if models.is_denoiser(name):
            for encoder, losses in _lost_of(models, drawn, name, replaced, progress).items():
                found[encoder] += losses
    return {name: sum(each) / len(each) for name, each in found.items()}


def _lost_of(
    models: Models, drawn: Drawn, name: str, replaced: Replaced, progress: OnProgress
) -> dict[str, list[float]]:
    """What a denoiser's output loses in each of some of its calls."""
    some, judge = spread(drawn.calls[name], CALLS), OutputJudge()
    found: dict[str, list[float]] = {encoder: [] for encoder in replaced}
    others = [_with(call, own.get(call.prompt, ())) for own in replaced.values() for call in some]
    weights = models.again(name)
    model = weights.runnable.model
    visited: list[str] = []

    def tell(part: str) -> None:
        visited.append(part)
        progress(Progress("Scoring text encoders", len(visited), len(steps.parts), unit="block"))

    def used(number: int, answer: Any) -> None:
        if number < len(some):
            judge.keep(number, answer)
        else:
            encoder = list(found)[number // len(some) - 1]
            found[encoder].append(judge.lost(number % len(some), answer))

    steps = BlockPass(model, weights, tell)
    if name in drawn.whole:
        steps.parts = {}
    memory.require(memory.at_once([model], steps.parts), models.device, f"{name} of {models.where}")
    with running(type(model).__name__, models.where):
        weights.load_rest(steps.parts)
        steps.run([changed(dict(call.arguments), in_float32) for call in (*some, *others)], used)
    weights.release("", model)
    return found


def _with(call: Call, instead: Sequence[Exchange]) -> Call:
    def exchanged(value: torch.Tensor) -> torch.Tensor:
        for each in instead:
            if (
                value.shape == each.before.shape
                and value.dtype == each.before.dtype
                and torch.equal(value, each.before)
            ):
                return each.after
        return value

    return replace(call, arguments=changed(dict(call.arguments), exchanged))


def _shared(
    models: Models,
    drawn: Drawn,
    name: str,
    names: Sequence[str],
    lost: float,
    method: Method,
    arithmetic: Arithmetic,
    progress: OnProgress,
) -> Scores:
    """What a text encoder loses, shared among its linears by what its own output loses."""
    weights = models.again(name)
    model = weights.runnable.model
    memory.require(memory.at_once([model], parts_of(model)), models.device, f"{name} of {models.where}")
    inputs = [changed(dict(call.arguments), in_float32) for call in spread(drawn.calls[name], CALLS)]
    some = spread(range(len(inputs)), SOME)
    own = score(weights, inputs, some, OutputJudge(), text_states_of, names, method, arithmetic, progress)
    of_all = sum(own.of.values())
    scale = lost / of_all if of_all else 0.0
    return replace(own, of={each: value * scale for each, value in own.of.items()}, total=lost)
