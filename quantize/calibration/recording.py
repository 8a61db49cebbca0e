"""What is recorded of a model that runs block by block; kept after each block, for a run that goes on from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qz.quantize.calibration.hessian_files import HessianFiles
from qz.quantize.calibration.running.recorder import Recorder
from qz.quantize.calibration.running.resume import BlockStore

if TYPE_CHECKING:
    from qz.quantize.importance.hessian_reader import HessianPlace
    from qz.quantize.importance.statistics import InputSums


class Recording:
    """Goes on from what ``files.kept`` has of the model."""

    def __init__(
        self, recorder: Recorder, files: HessianFiles, blocks: Mapping[str, Any], device: torch.device, model: str = ""
    ) -> None:
        """``model``: with what the names of its weights and blocks begin, where there are several models."""
        self.recorder, self.files, self.blocks, self.device, self._model = recorder, files, blocks, device, model
        self._kept, self._store = files.kept, BlockStore(files.kept, model)
        self.entering = self._store.entering
        sums = self._kept.sums
        recorder.restore(*(of_model(model, each) for each in (self._kept.values, sums.tokens, sums.first)))
        self._hooks = self._store.watch(blocks)

    def known(self, part: str) -> list[list[Any]] | None:
        """What an interrupted run kept of a part, as ``BlockPass`` replays it."""
        return self._store.replay(part, self.device) if part in self.blocks else None

    def visited(self, part: str) -> None:
        """All batches went through a part."""
        self.write_hessians()
        if part in self.blocks:
            inside = {name: each for name, each in self.recorder.sums.items() if name.startswith(f"{part}.")}
            before = self._kept.sums
            tokens = before.tokens | self._named(self.recorder.tokens)
            first = before.first | self._named(self.recorder.first)
            sums = replace(before, tokens=tokens, first=first, **self.files.as_json())
            self._store.finished(part, self._named(inside), sums)

    def write_hessians(self) -> None:
        """Those that are whole; none where none are recorded."""
        self.files.write(self._named(self.recorder.take_hessians()))

    def input_sums(self) -> dict[str, InputSums]:
        return self._named(self.recorder.input_sums())

    def places(self) -> dict[str, HessianPlace]:
        """Of all weights whose Hessians are written."""
        return self.files.places(
            {f"{self._model}{name}": f"{self._model}{one}" for name, one in self.recorder.first.items()}
        )

    def close(self) -> None:
        self.recorder.close()
        for hook in self._hooks:
            hook.remove()

    def _named(self, by_weight: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{self._model}{weight}": each for weight, each in by_weight.items()}


def of_model(model: str, by_weight: Mapping[str, Any]) -> dict[str, Any]:
    """Those whose names begin with ``model``, by the names that weights have in it."""
    return {name.removeprefix(model): each for name, each in by_weight.items() if name.startswith(model)}
