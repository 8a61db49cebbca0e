"""What a LoRA file holds, module by module: the parts of one low-rank change, whatever tool named them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qz import MalformedInput, Unsupported
from qz.formats.checkpoint.adapter_file import AdapterFile
from qz.formats.checkpoint.other_contents.adapters import MERGE_ELSEWHERE, other_kind
from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import StoredTensor

Kind = Literal["LoRA", "LoHa", "LoKr", "difference"]

# Suffixes by which PEFT, diffusers, kohya and LyCORIS name the parts of a module's change.
_ENDINGS = {
    "down": r"\.lora_A(?:\.default)?\.weight|\.lora_A|\.lora_down\.weight|[._]lora\.down\.weight"
    r"|\.lora_linear_layer\.down\.weight|\.down\.weight",
    "up": r"\.lora_B(?:\.default)?\.weight|\.lora_B|\.lora_up\.weight|[._]lora\.up\.weight"
    r"|\.lora_linear_layer\.up\.weight|\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "up_bias": r"\.lora_B\.bias",
    "embedding_down": r"\.lora_embedding_A",
    "embedding_up": r"\.lora_embedding_B",
    "magnitude": r"\.lora_magnitude_vector(?:\.weight)?",
    "dora_scale": r"\.dora_scale",
    "alpha": r"\.alpha",
    "difference": r"\.diff|\.w_norm",
    "bias_difference": r"\.diff_b|\.b_norm",
    **{name: rf"\.{name}" for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: rf"\.{name}" for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    "lokr_t2": r"\.lokr_t2",
}
_PARTS = [(part, re.compile(rf"(?P<stem>.+?)(?:{ending})\Z", re.DOTALL)) for part, ending in _ENDINGS.items()]
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class AdapterModule:
    """The change of one module. ``stem`` is its name in the file, ``parts`` its tensors by what they are."""

    adapter: AdapterFile = field(repr=False)
    stem: str
    parts: Mapping[str, StoredTensor]

    @property
    def kind(self) -> Kind | None:
        """How the change is computed; None if only a bias is changed."""
        if "lokr_w1" in self.parts or "lokr_w1_a" in self.parts:
            return "LoKr"
        if "hada_w1_a" in self.parts:
            return "LoHa"
        if "down" in self.parts or "embedding_down" in self.parts:
            return "LoRA"
        return "difference" if "difference" in self.parts else None

    def require_whole(self) -> None:
        """Raise MalformedInput if a part is missing, or has no dtype or shape that it can have."""
        kind = self.kind
        pairs = [("down", "up"), ("embedding_down", "embedding_up"), ("lokr_w1_a", "lokr_w1_b")]
        pairs += [("lokr_w2_a", "lokr_w2_b"), ("hada_t1", "hada_t2")]
        missing = {other for pair in pairs for other in pair if set(pair) & self.parts.keys()} - self.parts.keys()
        if kind == "LoHa":
            missing |= {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} - self.parts.keys()
        if kind == "LoKr" and not {"lokr_w2", "lokr_w2_a"} & self.parts.keys():
            missing.add("lokr_w2")
        if kind is None and "bias_difference" not in self.parts:
            missing.add("down")
        if missing:
            raise MalformedInput(
                f"{self.adapter.where}: {quoted(self.stem)} has {', '.join(sorted(self.parts))}, but not "
                f"{', '.join(sorted(missing))}. Download the LoRA again."
            )
        for part, tensor in self.parts.items():
            if 0 in tensor.shape:
                raise MalformedInput(
                    f"{self.adapter.where}: {quoted(tensor.name)} is {list(tensor.shape)}. It has no values. Download "
                    "the LoRA again."
                )
            if tensor.dtype not in _FLOATS and part != "alpha":
                raise Unsupported(
                    f"{self.adapter.where}: {quoted(tensor.name)} is stored as {tensor.dtype}. A LoRA is fused from "
                    f"{', '.join(_FLOATS)} only; convert it first."
                )

    @property
    def rank(self) -> int:
        """The inner size of the low-rank product, which alpha is divided by; 0 where there is none."""
        shapes = {part: tensor.shape for part, tensor in self.parts.items()}
        for part, axis in (("down", 0), ("embedding_down", 0), ("hada_w1_b", 0), ("lokr_w1_b", 0), ("lokr_w2_b", 0)):
            if shapes.get(part):
                return shapes[part][axis]
        return 0


def modules_of(adapter: AdapterFile) -> tuple[dict[str, AdapterModule], dict[str, StoredTensor]]:
    """The modules of a LoRA by their names, and the tensors that are no part of a change.

    Raises Unsupported for an adapter of a kind that cannot be fused into weights as they are read.
    """
    parts: dict[str, dict[str, StoredTensor]] = {}
    others: dict[str, StoredTensor] = {}
    for name, tensor in adapter.tensors.items():
        found = next(((part, match["stem"]) for part, end in _PARTS if (match := end.match(name))), None)
        if found is None or (name.endswith((".down.weight", ".up.weight")) and "lora" not in name):
            others[name] = tensor
            continue
        part, stem = found
        if part in parts.setdefault(stem, {}):
            raise MalformedInput(
                f"{adapter.where} holds {quoted(stem)} twice, as {quoted(parts[stem][part].name)} and {quoted(name)}. "
                "Which of the two counts is not clear. Use a LoRA that has it once."
            )
        parts[stem][part] = tensor
    modules = {stem: AdapterModule(adapter, stem, found) for stem, found in parts.items()}
    if adapter.config is None and (unlike := other_kind(others)) is not None:  # a config says the kind
        kind, name = unlike
        raise Unsupported(f"{adapter.where} is {kind} ({quoted(name)}), which qz does not fuse. {MERGE_ELSEWHERE}")
    for module in modules.values():
        module.require_whole()
    return modules, others
