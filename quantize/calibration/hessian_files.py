"""Hessians beside the file of statistics: a file for each part of a model that has some."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import OutputRefused
from qz.quantize.importance.hessian_reader import HessianPlace
from qz.quantize.importance.statistics import HESSIAN, write_hessians

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qz.quantize.calibration.running.unfinished import Unfinished


def refuse_existing(output: Path) -> None:
    """Raise OutputRefused for an output that is there, or has no folder to be in."""
    if output.exists() or output.is_symlink():
        raise OutputRefused(f"{output} exists. Move it away, or choose another file with -o/--output.")
    if not output.parent.is_dir():
        raise OutputRefused(f"{output.parent} is not a folder. Make it, or choose another file with -o/--output.")


class HessianFiles:
    """Those of ``output``, also those that the run that was interrupted has written."""

    def __init__(self, output: Path, kept: Unfinished) -> None:
        self.output, self.kept = output, kept
        self.hashes: dict[str, str] = dict(kept.sums.files)
        self.first_places: dict[str, str] = dict(kept.sums.places)
        """First weight that a Hessian belongs to → its file."""

    def write(self, hessians: Mapping[str, NDArray[np.float32]]) -> None:
        """One file of those that are in none yet, by their first weight's name."""
        new = {name: each for name, each in hessians.items() if name not in self.first_places}
        if not new:
            return
        file = f"{self.output.stem}.hessians-{len(self.hashes) + 1:05}.safetensors"
        path = self.output.with_name(file)
        refuse_existing(path)
        self.kept.claim(file)
        self.hashes[file] = write_hessians(path, new)
        self.first_places |= dict.fromkeys(new, file)

    def places(self, first: Mapping[str, str]) -> dict[str, HessianPlace]:
        """Of weights, each with the first one of its Hessian."""
        found = {name: (each, self.first_places.get(each)) for name, each in first.items()}
        return {name: HessianPlace(file, each + HESSIAN) for name, (each, file) in found.items() if file is not None}

    @property
    def nbytes(self) -> int:
        return sum(self.output.with_name(file).stat().st_size for file in self.hashes)

    def as_json(self) -> dict[str, Any]:
        """What ``Sums`` keeps of them."""
        return {"files": dict(self.hashes), "places": dict(self.first_places)}
