"""Go on where an interrupted run was: the model's forward runs again, and where it comes to a block that all batches
went through, its outputs are given instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qz.quantize.calibration.running.nested import changed
from qz.quantize.calibration.running.unfinished import Sums, Unfinished


class BlockStore:
    """Keeps the outputs of a model's blocks in ``kept``, each time that all batches went through one."""

    def __init__(self, kept: Unfinished, model: str = "") -> None:
        """``model``: with what the names of its blocks begin, where there are several models."""
        self.kept, self._model = kept, model
        self._outputs: dict[int, list[Any]] = {}
        """Of the block that is gone through, by batch: one for each call of it."""
        self._batch = 0
        self._visits: Counter[str] = Counter()
        self._known = False

    def watch(self, blocks: Mapping[str, Any]) -> list[Any]:
        """Hooks on all parts that are kept; to be removed by the caller."""
        return [block.register_forward_hook(self._note) for block in blocks.values()]

    def entering(self, _: str, __: Any, batch: int) -> None:
        self._batch = batch

    def replay(self, part: str, device: torch.device) -> list[list[Any]] | None:
        """For each batch the outputs of a block, one for each call; None for one that is to be run."""
        found = self.kept.find(self._name(part), device)
        self._known = found is not None
        return found

    def finished(self, part: str, values: Mapping[str, NDArray[np.float64]], sums: Sums) -> None:
        """Keep a block that all batches went through, and what was recorded of the weights in it."""
        outputs, self._outputs = self._outputs, {}
        if not self._known:
            self.kept.keep(self._name(part), [outputs[batch] for batch in sorted(outputs)], values, sums)
        self._visits[part] += 1
        self._known = False

    def _name(self, part: str) -> str:
        """A block that several places of a model share is gone through more than once."""
        visit = self._visits[part]
        return f"{self._model}{part}" + (f" {visit}" if visit else "")

    def _note(self, _: Any, __: Any, output: Any) -> None:
        if self.kept.keeping and not self._known:
            self._outputs.setdefault(self._batch, []).append(copied(output))


def copied(value: Any) -> Any:
    """On the CPU: later blocks may write into what they are given."""
    return changed(value, lambda tensor: tensor.detach().to("cpu", copy=True))
