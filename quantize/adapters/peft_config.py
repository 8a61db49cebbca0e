"""PEFT's adapter_config.json: how much each module's change counts, and what of PEFT cannot be fused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qz import MalformedInput, Unsupported
from qz.formats.checkpoint.adapter_file import CONFIG, AdapterFile
from qz.formats.checkpoint.other_contents.adapters import FUSED, LOAD_BESIDE, MERGE, how_to_use
from qz.formats.json_files import read_json
from qz.formats.malformed import quoted
from qz.formats.patterns import INVALID, is_simple

IN_HEAD = "lora_adapter_metadata"
_ELSEWHERE = "Merge it with the program that trained it, then quantize that."
_ARROW = "Quantize the model, and let PEFT route on top: `create_arrow_model(model, ADAPTERS, ArrowConfig(top_k=…))`."
_REFUSED = {
    "alora_invocation_tokens": ("it is active from certain tokens on only (aLoRA)", LOAD_BESIDE),
    "arrow_config": ("it routes between adapters (Arrow)", _ARROW),
    "kasa_config": ("it changes the base weight (KaSA)", MERGE),
    "layer_replication": ("it repeats layers of the model", LOAD_BESIDE),
    "megatron_config": ("it belongs to a Megatron model", _ELSEWHERE),
    "monteclora_config": ("it samples its weights (MonteCLoRA)", MERGE),
    "trainable_token_indices": ("it trains single rows of an embedding (trainable_token_indices)", MERGE),
    "use_bdlora": ("its factors are block-diagonal (BD-LoRA)", MERGE),
    "use_qalora": ("it pools its inputs (QA-LoRA)", MERGE),
    "velora_config": ("it compresses its inputs (VeLoRA)", MERGE),
}
"""Settings of a LoraConfig (peft 0.21) under which B·A is not what is added, or not everywhere; and what to do then."""
_INITIAL = ("gaussian", "eva", "mica", "orthogonal")
"""Ways to begin that leave the base weight alone; PiSSA, OLoRA, CorDA, LoftQ and others subtract something from it."""
_MADE_ANEW = ("loftq", "olora", "pissa")
"""Those whose changed base PEFT makes again, from the model as it is published, whenever it loads the adapter."""
_CONVERT = (
    "PEFT converts it if the adapter was saved before training, too: "
    "`model.save_pretrained('LORA', path_initial_model_for_weight_conversion='INITIAL')`. Then name that with --lora."
)


@dataclass(frozen=True)
class PeftConfig:
    """What decides how a module's change is scaled."""

    where: str
    peft_type: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    parameters: tuple[str, ...] = ()
    """Ends of the names of parameters that hold all experts of a layer (``target_parameters``)."""

    def scale_of(self, path: str, rank: int) -> float:
        """Alpha by rank, or by its root, of the module at ``path``; its factors have ``rank``, 0 if they do not say.

        Raises MalformedInput if the config says another rank.
        """
        stated = _pattern_value(self.rank_pattern, path, self.rank, self.where)
        if rank and self.peft_type == "LORA" and stated != rank:
            raise MalformedInput(
                f"{self.where} says rank {stated:g} for {quoted(path)}, whose tensors have rank {rank}. "
                "Download the adapter again, config and weights of one revision."
            )
        alpha = _pattern_value(self.alpha_pattern, path, self.alpha, self.where)
        return alpha / (math.sqrt(stated) if self.rslora else stated)


def peft_config(adapter: AdapterFile) -> PeftConfig:
    """What adapter_config.json says. Raises Unsupported, naming why, for what cannot be fused."""
    return _checked(adapter.config or {}, f"{adapter.folder.location}/{CONFIG}")


def head_config(adapter: AdapterFile, component: str) -> PeftConfig | None:
    """What diffusers put into the file's head of the LoRA of a component; None if there is nothing."""
    text = adapter.metadata.get(IN_HEAD)
    if not text:
        return None
    where = f"{adapter.where} ({IN_HEAD} in its header)"
    said = read_json(text.encode(), where)
    prefix = f"{component}."
    own = {key.removeprefix(prefix): value for key, value in said.items() if key.startswith(prefix)}
    return _checked({"peft_type": "LORA", **own}, where) if own else None


def _checked(config: Mapping[str, Any], where: str) -> PeftConfig:
    kind = config.get("peft_type")
    if kind not in FUSED:
        raise Unsupported(
            f"{where}: an adapter of the type {quoted(str(kind), 40)} cannot be fused; qz fuses {', '.join(FUSED)}. "
            + how_to_use(where, {"peft_type": kind})
        )
    for key, (why, advice) in _REFUSED.items():
        if config.get(key):
            raise Unsupported(f"{where}: the adapter cannot be fused: {why}. {advice}")
    initial = config.get("init_lora_weights", True)
    if not isinstance(initial, bool) and str(initial).lower() not in _INITIAL:
        raise Unsupported(
            f"{where}: the adapter belongs to a base weight that was changed when it began (init_lora_weights: "
            f"{quoted(str(initial), 40)}), not to the model as it is published. "
            + (MERGE if str(initial).lower() in _MADE_ANEW else _CONVERT)
        )
    number = config.get("lora_alpha" if kind == "LORA" else "alpha", 8)
    rank = config.get("r", 8)
    if not _is_number(number) or not _is_number(rank) or rank < 1 or not number:
        raise _wrong(where, f"r {rank!r} and alpha {number!r}")
    return PeftConfig(
        where,
        kind,
        rank,
        number,
        _pattern(config, "rank_pattern", where),
        _pattern(config, "alpha_pattern", where),
        rslora=_flag(config, "use_rslora", where),
        dora=_flag(config, "use_dora", where),
        parameters=_names(config, "target_parameters", where),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(where: str, what: str) -> MalformedInput:
    return MalformedInput(f"{where}: {what} is not valid. Download the adapter again.")


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    found = config.get(key)
    if found is not None and not isinstance(found, bool):
        raise _wrong(where, f"{key} {found!r}")
    return bool(found)


def _names(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    found = config.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise _wrong(where, f"{key}, which is not a list of names,")
    return tuple(found)


def _pattern(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, float]:
    found = config.get(key) or {}
    if not isinstance(found, dict) or not all(_is_number(value) for value in found.values()):
        raise _wrong(where, f"{key}, which is not an object of numbers,")
    if key == "rank_pattern" and any(value < 1 for value in found.values()):
        raise _wrong(where, f"{key} with a rank below 1")
    return found


def _pattern_value(patterns: Mapping[str, float], path: str, otherwise: float, where: str) -> float:
    """The value of the first pattern that matches the end of ``path``, as ``peft.utils.other.get_pattern_key`` does."""
    for pattern, value in patterns.items():
        if pattern == path or path.endswith(f".{pattern}"):
            return value
        if not is_simple(pattern):
            raise Unsupported(f"{where}: the pattern {quoted(pattern)} is too involved to be matched safely.")
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except INVALID:
            raise _wrong(where, f"the pattern {quoted(pattern)}, which is no regular expression,") from None
    return otherwise
