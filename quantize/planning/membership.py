"""Which component of which pipeline a model is: LoRAs, importance and scores name their weights by it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Membership:
    """A model's place in a pipeline; by default it is a model of its own."""

    component: str = ""
    """The folder that it has in the pipeline, or the subfolder that it was read from."""
    pipeline_class: str | None = None
    """Class of the pipeline, where that is known: it tells how diffusers reads a LoRA."""
    whole_pipeline: bool = False
    """Whether the whole pipeline is planned, which then fuses LoRAs and looks for unmatched skips itself."""


ALONE = Membership()
