"""How far a block's output is from the same block's in another model: relative squared errors of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qz import MalformedInput, Unsupported
from qz.quantize.calibration.running.blocks import blocks_of


@dataclass(slots=True)
class RelativeError:
    """The mean over tokens of |Δ|² / |y|²: y the original's values of a token, Δ their change."""

    total: float = 0.0
    tokens: int = 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Both [tokens, features]."""
        size = before.double().square().sum(-1)
        error = (after.double() - before.double()).square().sum(-1)
        self.total += float((error / size.clamp_min(torch.finfo(torch.float64).tiny)).sum())
        self.tokens += len(before)

    @property
    def mean(self) -> float:
        return self.total / self.tokens if self.tokens else 0.0


def states_of(output: Any) -> torch.Tensor:
    """The hidden states [tokens, features] in what a block returns: a tensor, or a collection whose first they are.

    Raises Unsupported where there are none.
    """
    values = (output,) if torch.is_tensor(output) else output.values() if hasattr(output, "values") else output or ()
    states = next(
        (each for each in values if torch.is_tensor(each) and each.is_floating_point() and each.ndim > 1), None
    )
    if states is None:
        raise Unsupported(f"a block returns no hidden states, but {type(output).__name__}")
    found: torch.Tensor = states.flatten(0, -2)
    return found


class BlockErrors:
    """Listens to two models, one after the other; in between, the first one's states are in files."""

    def __init__(
        self,
        place: Path,
        states: Callable[[Any], torch.Tensor] = states_of,
        batches: frozenset[int] | None = None,
    ) -> None:
        """``states``: what is compared of an output; ``batches``: of these only."""
        place.mkdir(exist_ok=True)
        self.place, self.batch, self.batches = place, 0, batches
        self.states = states
        self.errors: dict[str, RelativeError] = {}
        self._calls: dict[tuple[int, int], int] = {}
        """Block and batch → how often it was called."""

    def watch(self, model: Any, *, compare: bool) -> list[Any]:
        """Hooks, to be removed by the caller. ``compare``: with what the model before returned."""
        self._calls = {}
        return [
            block.register_forward_hook(self._hook(number, path, compare=compare))
            for number, (path, block) in enumerate(blocks_of(model).items())
        ]

    def entering(self, _: str, __: Any, batch: int) -> None:
        self.batch = batch

    def means(self) -> Mapping[str, float]:
        return {path: error.mean for path, error in self.errors.items()}

    def _hook(self, number: int, path: str, *, compare: bool) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            if self.batches is not None and self.batch not in self.batches:
                return
            call = self._calls[number, self.batch] = self._calls.get((number, self.batch), 0) + 1
            file = self.place / f"block-{number}-{self.batch}-{call}.npy"
            states = self.states(output).float().cpu()
            if not compare:
                np.save(file, states.numpy())
                return
            before = torch.from_numpy(np.load(file)) if file.exists() else torch.empty(0)
            if before.shape != states.shape:
                raise MalformedInput(
                    f"{path} returns other shapes than the original's: these are two different models. Name the "
                    "original that was quantized."
                )
            self.errors.setdefault(path, RelativeError()).add(before, states)
            file.unlink()

        return hook
