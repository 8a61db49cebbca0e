"""Weights that are an adapter to a model, or a model with an adapter still attached, by the names of their tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

HOW_PEFT = (
    "in Python, `from peft import AutoPeftModelForCausalLM as M; "
    "M.from_pretrained('ADAPTER').merge_and_unload().save_pretrained('MERGED')` (with the class of its task)."
)
HOW_DIFFUSERS = (
    "in Python, with `pipe` loaded from the base model, `pipe.load_lora_weights('ADAPTER'); pipe.fuse_lora(); "
    "pipe.unload_lora_weights(); pipe.save_pretrained('MERGED')`."
)
HOW_UNMERGED = {
    "diffusers": "after `pipe.fuse_lora()`, `pipe.unload_lora_weights()`; then `pipe.save_pretrained('MERGED')`.",
    "transformers": (
        "`model.merge_and_unload().save_pretrained('MERGED')` of a PEFT model, or `model.delete_adapter(NAME)` of one "
        "with `add_adapter()`, which drops the LoRA."
    ),
}

# Of one low-rank pair, the names that PEFT, diffusers, kohya and LyCORIS give to its parts.
_PART = re.compile(
    r"(?:^|[._])(?:lora[._](?:A|B|up|down|mid|te\d?|unet)\b|lora_(?:A|B|up|down|mid|magnitude_vector)[._]"
    r"|lora_linear_layer|hada_w[12]_[ab]|lokr_w[12]|oft_(?:blocks|diag|R)|dora_scale|diff_b\b|lora_embedding_[AB])"
)
_SCALE = re.compile(r"\.(?:alpha|network_alpha|scale|dora_scale)\Z")
_WRAPPED = re.compile(r"\.base_layer\.")
_OF_DIFFUSERS = re.compile(
    r"(?:(?:transformer|unet|prior|text_encoder(?:_\d)?|te\d?|diffusion_model)\.|lora_(?:unet|te\d?|transformer)_"
    r"|base_model\.model\.transformer)"
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What weights are that belong to a base model, and how they get into it."""

    what: str
    how: str


def adapter_in(names: Iterable[str]) -> Adapter | None:
    """The adapter that all of these tensors are; None if some are weights of a model."""
    names = list(names)
    parts = [name for name in names if _PART.search(name)]
    if not parts or len(parts) + sum(_SCALE.search(name) is not None for name in names) < len(names):
        return None
    if any(name.startswith("base_model.model.") for name in parts) and not _OF_DIFFUSERS.match(parts[0]):
        return Adapter("a LoRA adapter", HOW_PEFT)
    return Adapter("a LoRA adapter", HOW_DIFFUSERS)


def unmerged(names: Iterable[str]) -> str | None:
    """A weight that an adapter still wraps, as a model is saved with it."""
    return next((name for name in names if _WRAPPED.search(name)), None)
