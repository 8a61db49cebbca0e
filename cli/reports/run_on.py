"""What a model was run on, for ``qz calibrate`` and ``qz compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.counted import counted

if TYPE_CHECKING:
    from qz.quantize.calibration.compare import Comparison
    from qz.quantize.calibration.run import Calibration


def read(found: Calibration | Comparison) -> str:
    """The text that a model read."""
    return f"{found.tokens:,} tokens in {counted(found.sequences, 'sequence')}"


def prompts(found: Calibration | Comparison) -> str:
    """The prompts that a pipeline was given, and how it was run on them."""
    at = f" at {found.resolution} × {found.resolution}" if found.resolution is not None else ""
    return f"{counted(found.sequences, 'prompt')}, {counted(found.steps or 0, 'step')} each{at}, seed {found.seed}"
