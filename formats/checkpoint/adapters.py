"""Weights that are an adapter to a model, or a model with an adapter still attached, by the names of their tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from qz.formats.malformed import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FUSED = ("LORA", "LOHA", "LOKR")
"""Types of PEFT's adapters that qz fuses into a model."""
_BESIDE = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"),
    *("BEFT", "LILY", "POLY", "SHADOW", "XLORA"),
)
"""Those that PEFT (0.21) cannot merge: they add to what a model reads, or change what a layer gives by its input."""

MERGE = "Merge it with PEFT, `model.merge_and_unload().save_pretrained('MERGED')`, and quantize that."
LOAD_BESIDE = (
    "Quantize the model that it was made for, and load the adapter beside that with PEFT: "
    "`PeftModel.from_pretrained(model, ADAPTER)`."
)

HOW_UNMERGED = {
    "diffusers": "after `pipe.fuse_lora()`, `pipe.unload_lora_weights()`; then `pipe.save_pretrained('MERGED')`.",
    "transformers": (
        "`model.merge_and_unload().save_pretrained('MERGED')` of a PEFT model. Of one with `add_adapter()`, "
        "`model.save_pretrained('LORA')` saves the LoRA alone, for `qz quantize BASE --lora LORA`."
    ),
}

# Of one low-rank pair, the names that PEFT, diffusers, kohya and LyCORIS give to its parts.
_PART = (
    r"(?:^|[._])(?:lora[._](?:A|B|up|down|mid|te\d?|unet)\b|lora_(?:A|B|up|down|mid|magnitude_vector)[._]"
    r"|lora_linear_layer|hada_w[12]_[ab]|lokr_w[12]|oft_(?:blocks|diag|R)|dora_scale|diff_b\b|lora_embedding_[AB])"
)
_MARKS = ("lora", "hada_w", "lokr_w", "oft_", "dora_scale", "diff_b")
"""One of them is in whatever ``_PART`` finds: to look for them in all names at once takes next to nothing."""
_SCALE = re.compile(r"\.(?:alpha|network_alpha|scale|dora_scale)\Z")


def is_adapter(names: Iterable[str]) -> bool:
    """Whether all of these tensors are parts of an adapter, none a weight of a model."""
    names = list(names)
    every = "\n".join(names)
    if not any(mark in every for mark in _MARKS):
        return False
    part = re.compile(_PART)
    parts = [name for name in names if part.search(name)]
    return bool(parts) and len(parts) + sum(_SCALE.search(name) is not None for name in names) >= len(names)


def how_to_use(location: str, config: Mapping[str, Any]) -> str:
    """What to do with an adapter that was taken for a model; ``config``: its adapter_config.json, empty if none."""
    kind = config.get("peft_type", FUSED[0])
    if kind in _BESIDE:
        return f"Its type, {kind}, cannot be merged into weights. {LOAD_BESIDE}"
    if kind not in FUSED:
        return f"Its type, {quoted(str(kind), 40)}, is none that qz fuses. {MERGE}"
    remote = re.fullmatch(r"(.+)@[0-9a-f]{12,40}", location)
    return (
        "Name the model that it was made for, and fuse it on the way: "
        f"`qz quantize BASE --lora {remote[1] if remote else location}`."
    )


def unmerged(names: Iterable[str]) -> str | None:
    """A weight that an adapter still wraps, as a model is saved with it."""
    return next((name for name in names if ".base_layer." in name), None)
