"""How much of a model's loss each linear is to blame for, when all of them are quantized.

A block's share is the loss of the answers when only this block is quantized. Its linears share that by the error of the
block's output when only one of them is quantized: the mean over tokens of |Δ|² / |y|², y the output, Δ its change.
Forward passes only, in float32, in one reading of the weights: the original, the model with one block quantized for
each block, and the quantized model go through block after block together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qz.formats.checkpoint.survey import Checkpoint
from qz.progress import OnProgress, Progress
from qz.quantize.calibration.answers import Divergence, add, answered, keep
from qz.quantize.calibration.block_errors import RelativeError, states_of
from qz.quantize.calibration.blocks import BlockPass, parts_of
from qz.quantize.calibration.rounded import rounded
from qz.quantize.calibration.weights import Weights
from qz.quantize.compute.arithmetic import Arithmetic
from qz.quantize.libraries.transformers.runnable import Runnable, running
from qz.quantize.methods import Method
from qz.quantize.planning.sensitivity import Scores

TOKENS = 2048
"""As many are enough: the scores of several texts agree."""


@dataclass(frozen=True, slots=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(slots=True)
class _Scorer:
    """Quantizes what each batch wants quantized, and scores the linears of a block when all have gone through it.

    Batches: ``rows`` by the original, the first of ``rows`` with each block quantized, ``rows`` by the quantized model.
    """

    model: Runnable
    rows: Sequence[list[int]]
    quantized: Callable[[str, torch.Tensor], torch.Tensor]
    blocks: Mapping[str, tuple[str, ...]]
    """Path → the weights in it that are quantized."""
    outside: tuple[str, ...]
    """Those in no block."""
    errors: dict[str, RelativeError] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    both: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)
    """Of the part that is running, and of those outside: weight → its module, as it is, and quantized."""
    batch: int = 0
    paused: bool = False

    @property
    def batches(self) -> list[list[int]]:
        return [*self.rows, *([self.rows[0]] * len(self.blocks)), *self.rows]

    @property
    def block_of_batch(self) -> str | None:
        """The block that the batch under way has quantized; None for the original and the quantized model."""
        number = self.batch - len(self.rows)
        return list(self.blocks)[number] if 0 <= number < len(self.blocks) else None

    @property
    def is_quantized(self) -> bool:
        """Whether the batch under way is of the quantized model."""
        return self.batch >= len(self.rows) + len(self.blocks)

    def watch(self) -> None:
        """Begin to listen to the model."""
        self.errors = {name: RelativeError() for names in (*self.blocks.values(), self.outside) for name in names}
        for path in self.blocks:
            block = self.model.model.get_submodule(path)
            self.handles.append(block.register_forward_pre_hook(self._note, with_kwargs=True))
        for name in self.outside:
            linear = self.model.linears[name.removesuffix(".weight")]
            self.handles.append(linear.register_forward_pre_hook(self._before_outside(name)))
            self.handles.append(linear.register_forward_hook(self._after_outside(name)))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def entering(self, part: str, block: Any, batch: int) -> None:
        self.batch = batch
        names = self.blocks.get(part, ())
        for name in names:
            if name not in self.both:
                linear = block.get_submodule(name.removesuffix(".weight").removeprefix(f"{part}."))
                self._know(name, linear)
            self._set(name, quantized=self.is_quantized or self.block_of_batch == part)

    def leaving(self, part: str, block: Any) -> None:
        """Score the linears of a block."""
        calls, self.calls = self.calls, []
        names = self.blocks.get(part, ())
        self.paused = True
        with torch.inference_mode():
            for name in names:
                self._set(name, quantized=False)
            before = [_run(block, call) for call in calls] if names else []
            for name in names:
                self._set(name, quantized=True)
                for call, expected in zip(calls, before, strict=True):
                    self.errors[name].add(expected, _run(block, call))
                self._set(name, quantized=False)
                del self.both[name]
        self.paused = False

    def _know(self, name: str, linear: Any) -> None:
        instead = torch.nn.Parameter(self.quantized(name, linear.weight), requires_grad=False)
        self.both[name] = linear, linear.weight, instead

    def _set(self, name: str, *, quantized: bool) -> None:
        linear, original, instead = self.both[name]
        linear.weight = instead if quantized else original

    def _note(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.paused and self.batch < len(self.rows):
            self.calls.append(_Call(_copied(args), _copied(kwargs)))

    def _before_outside(self, name: str) -> Callable[..., None]:
        def hook(linear: Any, _: Any) -> None:
            if not self.paused:
                if name not in self.both:
                    self._know(name, linear)
                self._set(name, quantized=self.is_quantized)

        return hook

    def _after_outside(self, name: str) -> Callable[..., None]:
        """Linears in no block are scored by their own output."""

        def hook(linear: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if self.paused or self.batch >= len(self.rows):
                return
            self.paused = True
            self._set(name, quantized=True)
            self.errors[name].add(output.flatten(0, -2), linear(*args).flatten(0, -2))
            self._set(name, quantized=False)
            self.paused = False

        return hook

    def shares(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Weight → its share of the loss of its block; outside of blocks, as much for its error as in them."""
        of_blocks = {path: sum(self.errors[name].mean for name in names) for path, names in self.blocks.items()}
        found = {}
        for path, names in self.blocks.items():
            for name in names:
                found[name] = max(losses[path], 0.0) * self.errors[name].mean / (of_blocks[path] or 1.0)
        each = sum(max(loss, 0.0) for loss in losses.values()) / (sum(of_blocks.values()) or 1.0)
        return found | {name: each * self.errors[name].mean for name in self.outside}


def score(
    checkpoint: Checkpoint,
    model: Runnable,
    rows: Sequence[list[int]],
    names: Sequence[str],
    method: Method,
    arithmetic: Arithmetic,
    progress: OnProgress,
) -> Scores:
    """Scores of the weights ``names``, and what is lost when all of them are quantized by ``method``.

    ``rows``: sequences of token ids. Raises what reading and running raise.
    """
    transposed = {name for name in names if _is_conv1d(model, name)}

    def quantized(name: str, weight: torch.Tensor) -> torch.Tensor:
        return rounded(weight, method, arithmetic, transposed=name in transposed)

    inside = {part: tuple(name for name in names if name.startswith(f"{part}.")) for part in parts_of(model.model)}
    blocks = {part: own for part, own in inside.items() if own}
    in_blocks = {name for own in blocks.values() for name in own}
    scorer = _Scorer(model, rows, quantized, blocks, tuple(name for name in names if name not in in_blocks))
    whole, alone = Divergence(), {path: Divergence() for path in blocks}
    where = checkpoint.folder.location
    visited: list[str] = []

    def tell(part: str) -> None:
        visited.append(part)
        progress(Progress("Scoring", len(visited), len(steps.parts), unit="block"))

    def used(number: int, answer: Any) -> None:
        scorer.batch = number
        values = answered(model, answer, where)
        if number < len(rows):
            keep(place, number, values)
        elif scorer.is_quantized:
            number -= len(rows) + len(blocks)
            add(whole, model, place, number, values, rows[number])
        else:
            add(alone[str(scorer.block_of_batch)], model, place, 0, values, rows[0])

    weights = Weights(checkpoint, model)
    steps = BlockPass(model.model, weights, tell, model.head, scorer.entering, scorer.leaving)
    with tempfile.TemporaryDirectory(prefix="qz-") as name, running(type(model.model).__name__, where):
        place = Path(name)
        scorer.watch()
        try:
            weights.load_rest(steps.parts)
            steps.run((model.arguments(torch.tensor([row])) for row in scorer.batches), used)
        finally:
            scorer.close()
    losses = {path: _loss(found) for path, found in alone.items()}
    return Scores(
        scorer.shares(losses),
        method.name,
        "kl" if whole.kl else "cosine",
        _loss(whole),
        sum(map(len, rows)),
    )


def _loss(divergence: Divergence) -> float:
    found = divergence.kl or divergence.cosine
    return max(sum(found) / len(found), 0.0)


def _is_conv1d(model: Runnable, weight: str) -> bool:
    return not isinstance(model.linears[weight.removesuffix(".weight")], torch.nn.Linear)


def _run(block: Any, call: _Call) -> torch.Tensor:
    """What a block makes of its hidden states, [tokens, features]."""
    return states_of(block(*_copied(call.args), **_copied(call.kwargs)))


def _copied(value: Any) -> Any:
    """Tensors of their own, as blocks may write into what they are given."""
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, tuple | list):
        return type(value)(_copied(each) for each in value)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return value
