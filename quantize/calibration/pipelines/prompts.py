"""What a pipeline draws when it is calibrated or compared: prompts, one a line."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from qz import UsageError
from qz.quantize.calibration.running.text import read_text_file

MOST_CALLS = 1024
"""Prompts times steps: each is a forward of its own that waits in memory."""


def prompts_of(path: Path | None, steps: int) -> tuple[str, ...]:
    """The lines of a file that are not empty; without a file, a few prompts of our own.

    Raises as ``read_text_file``, and UsageError for a file without a prompt, or with too many of them.
    """
    text = default_prompts() if path is None else read_text_file(path)
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise UsageError(f"{path} has no prompts. A pipeline reads one from each line that is not empty.")
    if len(prompts) * steps > MOST_CALLS:
        raise UsageError(
            f"{len(prompts):,} prompts of {steps} steps each are more than {MOST_CALLS:,} forwards. Give fewer lines, "
            "or fewer --steps: a few dozen are enough."
        )
    return prompts


def default_prompts() -> str:
    """The prompts that come with qz."""
    return files("qz.quantize.calibration.pipelines").joinpath("default_prompts.txt").read_text(encoding="utf-8")
