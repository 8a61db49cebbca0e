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

MERGE_ELSEWHERE = "Merge it into the model with the program that trained it, and quantize that."
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

# Names that PEFT, diffusers, kohya and LyCORIS give to the parts of a low-rank pair.
_PART = (
    r"(?:^|[._])(?:lora[._](?:A|B|up|down|mid|te\d?|unet)\b|lora_(?:A|B|up|down|mid|magnitude_vector)[._]"
    r"|lora_linear_layer|hada_w[12]_[ab]|lokr_w[12]|oft_(?:blocks|diag|R)|dora_scale|diff_b\b|lora_embedding_[AB])"
)
_OTHER_KINDS = {
    "GLoRA": r"\.(?:a1|a2|b1|b2|bm1|bm2)\.weight",
    "IA³": r"\.on_input|\.(?:lora|ia3)_l(?:\.weight)?",
    "OFT or BOFT": r"\.oft_(?:blocks|diag|R)(?:\.weight)?|\.boft_[RS](?:\.weight)?",
    "VeRA": r"\.?vera_(?:lambda_[bd]|[AB])(?:\.weight)?",
    "a LoRA that gives a weight another shape": r"\.reshape_weight",
    "a LoRA that sets weights": r"\.set_weight",
}
"""Changes that are no sum with the weight, or give it another shape; and a part of each, by which it is known."""
_OTHERS = [(kind, re.compile(rf".*(?:{part})\Z", re.DOTALL)) for kind, part in _OTHER_KINDS.items()]
_MARKS = ("lora", "hada_w", "lokr_w", "oft_", "dora_scale", "diff_b", "ia3_l", "vera_")
"""One of them is in whatever ``_PART`` finds: to look for them in all names at once takes next to nothing."""
_SCALE = re.compile(r"\.(?:alpha|network_alpha|scale|dora_scale)\Z")


def is_adapter(names: Iterable[str]) -> bool:
    """Whether all of these tensors are parts of an adapter, none a weight of a model."""
    names = list(names)
    every = "\n".join(names)
    if not any(mark in every for mark in _MARKS):
        return False
    part = re.compile(_PART)
    parts = [name for name in names if part.search(name) or other_kind([name])]
    return bool(parts) and len(parts) + sum(_SCALE.search(name) is not None for name in names) >= len(names)


def other_kind(names: Iterable[str]) -> tuple[str, str] | None:
    """The kind of an adapter that is no sum with weights, and a name that tells it."""
    names = list(names)
    return next(((kind, name) for kind, part in _OTHERS for name in names if part.match(name)), None)


def how_to_use(location: str, config: Mapping[str, Any], names: Iterable[str] = ()) -> str:
    """What to do with an adapter that was taken for a model; ``config``: its adapter_config.json, empty if none."""
    names = list(names)
    kind = config.get("peft_type", FUSED[0])
    if kind in _BESIDE:
        return f"Its type, {kind}, cannot be merged into weights. {LOAD_BESIDE}"
    if kind not in FUSED:
        return f"Its type, {quoted(str(kind), 40)}, is none that qz fuses. {MERGE}"
    if not config and (unlike := other_kind(names)) is not None:
        return f"It is {unlike[0]} ({quoted(unlike[1])}), which qz does not fuse. {MERGE_ELSEWHERE}"
    remote = re.fullmatch(r"(.+)@[0-9a-f]{12,40}", location)
    first = (
        "Download its adapter_config.json, too, which says its scale; then name" if _of_peft(config, names) else "Name"
    )
    return (
        f"{first} the model that it was made for, and fuse it on the way: "
        f"`qz quantize BASE --lora {remote[1] if remote else location}`."
    )


def _of_peft(config: Mapping[str, Any], names: list[str]) -> bool:
    """Whether PEFT saved an adapter of a model of transformers, and its config is not there."""
    return not config and bool(names) and all(name.startswith("base_model.model.") for name in names)


def unmerged(names: Iterable[str]) -> str | None:
    """A weight that an adapter still wraps, as a model is saved with it."""
    return next((name for name in names if ".base_layer." in name), None)
