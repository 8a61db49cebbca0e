"""How much of a model's loss each linear is responsible for, when all of them are quantized.

A block's share is the loss of the answers when only this block is quantized. Its linears share that by the error of the
block's output when only one of them is quantized: the mean over tokens of |Δ|² / |y|², y the output, Δ its change. A
linear in no block is quantized alone like a block.
Forward passes only, in float32, in one reading of the weights: the original, the models with one block quantized, and
the quantized model go through block after block together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from qz.formats.checkpoint.survey import Checkpoint
from qz.progress import OnProgress, Progress
from qz.quantize.calibration.answers import Divergence, add, answered, arguments, keep
from qz.quantize.calibration.block_errors import RelativeError, states_of
from qz.quantize.calibration.rounded import rounded
from qz.quantize.calibration.running.blocks import BlockPass, parts_of
from qz.quantize.calibration.running.nested import changed
from qz.quantize.calibration.running.weights import Weights
from qz.quantize.compute.arithmetic import Arithmetic
from qz.quantize.libraries.architecture import LoadRequest
from qz.quantize.libraries.examine import examine
from qz.quantize.libraries.transformers.runnable import Runnable, running
from qz.quantize.methods import Method
from qz.quantize.planning.budget.sensitivity import LossName, Scores
from qz.quantize.planning.unquantized import equal_tensors

TOKENS = 2048
"""As many are enough: the scores of several texts agree."""


@dataclass(frozen=True, slots=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(slots=True)
class _Scorer:
    """Quantizes what each batch wants quantized, and scores the linears of a block when all have gone through it.

    Batches: ``count`` inputs by the original, some of them with each unit quantized, all by the quantized model.
    """

    model: Runnable
    count: int
    some: Sequence[int]
    """Numbers of the inputs that are tried with one unit quantized."""
    states_of: Callable[[Any], torch.Tensor]
    """What is compared of a block's output: [tokens, features]."""
    quantized: Callable[[str, torch.Tensor], torch.Tensor]
    blocks: Mapping[str, tuple[str, ...]]
    """Path → the weights in it that are quantized."""
    outside: tuple[str, ...]
    """Those in no block."""
    units: Mapping[str, tuple[str, ...]] = field(init=False)
    """What is quantized alone, by its path: blocks, and linears in no block."""
    inputs: Sequence[int] = field(init=False)
    """Of each batch."""
    alone: Sequence[str | None] = field(init=False)
    """The unit that each batch has quantized; None for the original and the quantized model."""
    errors: dict[str, RelativeError] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    batch: Callable[[], int] = lambda: 0
    both: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)
    """Of the part that is running, and of those outside: weight → its module, as it is, and quantized."""
    paused: bool = False

    def __post_init__(self) -> None:
        self.units = {**self.blocks, **{_path(name): (name,) for name in self.outside}}
        self.inputs = [*range(self.count), *(list(self.some) * len(self.units)), *range(self.count)]
        whole: list[str | None] = [None] * self.count
        self.alone = [*whole, *(path for path in self.units for _ in self.some), *whole]

    def is_quantized(self, batch: int) -> bool:
        """Whether a batch is of the quantized model."""
        return batch >= len(self.inputs) - self.count

    def has_quantized(self, unit: str, batch: int) -> bool:
        return self.is_quantized(batch) or self.alone[batch] == unit

    def watch(self, batch: Callable[[], int]) -> None:
        """Begin to listen to the model. ``batch``: the number of the one whose forward asks."""
        self.batch = batch
        self.errors = {name: RelativeError() for names in self.blocks.values() for name in names}
        for path in self.blocks:
            block = self.model.model.get_submodule(path)
            self.handles.append(block.register_forward_pre_hook(self._note, with_kwargs=True))
        for name in self.outside:
            linear = self.model.linears[_path(name)]
            self.handles.append(linear.register_forward_pre_hook(self._before_outside(_path(name), name)))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def entering(self, part: str, block: Any, batch: int) -> None:
        quantized = self.has_quantized(part, batch)
        for name in self.blocks.get(part, ()):
            if name not in self.both:
                linear = block.get_submodule(_path(name).removeprefix(f"{part}."))
                self._know(name, linear)
            self._set(name, quantized=quantized)

    def leaving(self, part: str, block: Any) -> None:
        """Score the linears of a block."""
        calls, self.calls = self.calls, []
        names = self.blocks.get(part, ())
        self.paused = True
        with torch.inference_mode():
            for name in names:
                self._set(name, quantized=False)
            before = [self._run(block, call) for call in calls] if names else []
            for name in names:
                self._set(name, quantized=True)
                for call, expected in zip(calls, before, strict=True):
                    self.errors[name].add(expected, self._run(block, call))
                self._set(name, quantized=False)
                del self.both[name]
        self.paused = False

    def _run(self, block: Any, call: _Call) -> torch.Tensor:
        return self.states_of(block(*copies(call.args), **copies(call.kwargs)))

    def _know(self, name: str, linear: Any) -> None:
        instead = torch.nn.Parameter(self.quantized(name, linear.weight), requires_grad=False)
        self.both[name] = linear, linear.weight, instead

    def _set(self, name: str, *, quantized: bool) -> None:
        linear, original, instead = self.both[name]
        linear.weight = instead if quantized else original

    def _note(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.paused and self.batch() < self.count:
            self.calls.append(_Call(copies(args), copies(kwargs)))

    def _before_outside(self, path: str, name: str) -> Callable[..., None]:
        def hook(linear: Any, _: Any) -> None:
            if name not in self.both:
                self._know(name, linear)
            self._set(name, quantized=self.has_quantized(path, self.batch()))

        return hook

    def shares(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Weight → its share of the loss of its block; of a linear in no block all of its own."""
        found: dict[str, float] = {}
        for path, names in self.units.items():
            errors = {name: self.errors[name].mean if path in self.blocks else 1.0 for name in names}
            of_all = sum(errors.values()) or 1.0
            found |= {name: max(losses[path], 0.0) * error / of_all for name, error in errors.items()}
        return found


class Judge(Protocol):
    """Keeps what the original makes of each input, by its number, and tells how much another loses of it."""

    loss: LossName
    tokens: int
    """Of all that the original made."""

    def keep(self, number: int, answer: Any) -> None: ...
    def lost(self, number: int, answer: Any) -> float: ...


class TextJudge:
    """The KL divergence of predictions, or 1 − cosine of mean states; answers wait in the folder ``place``."""

    def __init__(self, model: Runnable, rows: Sequence[list[int]], place: Path, where: str) -> None:
        self.model, self.rows, self.place, self.where = model, rows, place, where
        self.tokens = sum(map(len, rows))
        self.loss: LossName = "kl" if model.head is not None else "cosine"

    def keep(self, number: int, answer: Any) -> None:
        keep(self.place, number, answered(self.model, answer, self.where))

    def lost(self, number: int, answer: Any) -> float:
        found = Divergence()
        add(found, self.model, self.place, number, answered(self.model, answer, self.where), self.rows[number])
        return (found.kl or found.cosine)[0]


def score_text(
    weights: Weights,
    rows: Sequence[list[int]],
    names: Sequence[str],
    method: Method,
    arithmetic: Arithmetic,
    progress: OnProgress,
) -> Scores:
    """Scores of the weights ``names`` of a model that reads ``rows`` of token ids. Raises what reading and running
    raise."""
    with tempfile.TemporaryDirectory(prefix="qz-") as place:
        model = weights.runnable
        judge = TextJudge(model, rows, Path(place), weights.checkpoint.folder.location)
        inputs = [arguments(model, row) for row in rows]
        return score(weights, inputs, (0,), judge, states_of, names, method, arithmetic, progress)


def quantized_names(checkpoint: Checkpoint, model: Runnable, method: Method) -> list[str]:
    """The linears' weights that ``method`` quantizes."""
    found = examine(checkpoint, LoadRequest(method), equal=lambda one, other: equal_tensors(checkpoint, one, other))
    there = {f"{path}.weight" for path in model.linears}
    names = dict.fromkeys(saved.weight.name for saved in found.saved if saved.weight.quantized)
    return [name for name in names if name in there]


def score(
    weights: Weights,
    inputs: Sequence[Mapping[str, Any]],
    some: Sequence[int],
    judge: Judge,
    states: Callable[[Any], torch.Tensor],
    names: Sequence[str],
    method: Method,
    arithmetic: Arithmetic,
    progress: OnProgress,
) -> Scores:
    """Scores of the weights ``names``, and what is lost when all of them are quantized by ``method``.

    ``inputs``: arguments of the model's forward; ``some``: numbers of those that each block is tried alone on.
    ``states``: what is compared of a block's output, [tokens, features]. Raises what reading and running raise.
    """
    model, where = weights.runnable, weights.checkpoint.folder.location
    transposed = {name for name in names if is_conv1d(model, name)}

    def quantized(name: str, weight: torch.Tensor) -> torch.Tensor:
        return rounded(weight, method, arithmetic, transposed=name in transposed)

    inside = {part: tuple(name for name in names if name.startswith(f"{part}.")) for part in parts_of(model.model)}
    blocks = {part: own for part, own in inside.items() if own}
    in_blocks = {name for own in blocks.values() for name in own}
    outside = tuple(name for name in names if name not in in_blocks)
    scorer = _Scorer(model, len(inputs), some, states, quantized, blocks, outside)
    whole: list[float] = []
    alone: dict[str, list[float]] = {path: [] for path in scorer.units}
    visited: list[str] = []

    def tell(part: str) -> None:
        visited.append(part)
        progress(Progress("Scoring", len(visited), len(steps.parts), unit="block"))

    def used(number: int, answer: Any) -> None:
        which = scorer.inputs[number]
        if number < len(inputs):
            judge.keep(which, answer)
        elif scorer.is_quantized(number):
            whole.append(judge.lost(which, answer))
        else:
            alone[str(scorer.alone[number])].append(judge.lost(which, answer))

    steps = BlockPass(model.model, weights, tell, model.head, scorer.entering, scorer.leaving)
    with running(type(model.model).__name__, where):
        scorer.watch(lambda: steps.number)
        try:
            weights.load_rest(steps.parts)
            steps.run((copies(inputs[each]) for each in scorer.inputs), used)
        finally:
            scorer.close()
    shares = scorer.shares({path: _mean(found) for path, found in alone.items()})
    return Scores(shares, method.name, judge.loss, max(_mean(whole), 0.0), judge.tokens)


def _mean(found: Sequence[float]) -> float:
    return sum(found) / len(found)


def is_conv1d(model: Runnable, weight: str) -> bool:
    """Whether a weight is that of a ``Conv1D``, which holds (in, out)."""
    return not isinstance(model.linears[_path(weight)], torch.nn.Linear)


def _path(weight: str) -> str:
    return weight.removesuffix(".weight")


def copies(value: Any) -> Any:
    """Tensors of their own, as models and blocks may write into what they are given."""
    return changed(value, torch.Tensor.clone)
