"""config.json's quantization_config: what it says of the quantization, held against the tensors."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qz.counted import counted
from qz.formats.malformed import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qz.formats.checkpoint.problems import Problems

Kind = Literal["nf4", "fp4", "int8"]
FOUR_BIT: frozenset[Kind] = frozenset(("nf4", "fp4"))


class Settings(NamedTuple):
    """What quantization_config says, with bitsandbytes' own defaults for what it leaves out.

    ``method`` is None if there is no quantization_config, or none that can be understood (``present`` tells which).
    ``skipped`` is None if the library's defaults apply.
    """

    present: bool = False
    method: str | None = None
    four_bit: bool = False
    eight_bit: bool = False
    quant_type: Kind = "fp4"
    double_quant: bool = False
    compute_dtype: str = "float32"
    storage: str = "uint8"
    threshold: float = 6.0
    skipped: tuple[str, ...] | None = None


_NOT_MLX = ("quant_method", "desc_act", "sym")


def stated_quantization(config: Mapping[str, Any]) -> Any:
    """What config.json says of a quantization, at its root or in the config of a part; None if nothing.

    Of MLX, which has it under ``quantization``, mostly under ``quantization_config`` too, the method is added. GPTQ's
    first configs had none either, and said more than bits and the size of a group.
    """
    for key in ("quantization_config", "quantization"):
        found = config.get(key)
        if isinstance(found, dict) and {"bits", "group_size"} <= found.keys() and found.keys().isdisjoint(_NOT_MLX):
            return {**found, "quant_method": "mlx"}
        if found is not None and key == "quantization_config":
            return found
    if isinstance(config.get("compression_config"), dict):
        return {**config["compression_config"], "quant_method": "compressed-tensors"}
    parts = (part for part in config.values() if isinstance(part, dict))
    return next((found for part in parts if (found := stated_quantization(part)) is not None), None)


def read_settings(config: Mapping[str, Any], problems: Problems) -> Settings:
    """The settings in ``config``; what cannot be understood is added to ``problems`` and left at its default."""
    said = stated_quantization(config)
    if said is None:
        return Settings()

    def refuse(why: str) -> None:
        problems.add("quantization-config-malformed", "config.json", why=why)

    if not isinstance(said, dict):
        refuse("is not an object")
        return Settings(present=True)
    method = said.get("quant_method")
    if method is None and ("load_in_4bit" in said or "load_in_8bit" in said):
        method = "bitsandbytes"  # configs older than quant_method
    if not isinstance(method, str):
        refuse("does not say its quant_method")
        return Settings(present=True)
    if not method.startswith("bitsandbytes"):  # there are bitsandbytes_4bit and bitsandbytes_8bit too
        return Settings(present=True, method=method)
    skipped, threshold = said.get("llm_int8_skip_modules"), said.get("llm_int8_threshold", 6.0)
    if skipped is not None and not (isinstance(skipped, list) and all(isinstance(each, str) for each in skipped)):
        refuse("has llm_int8_skip_modules that are not a list of names")
        skipped = None
    if not isinstance(threshold, int | float):
        refuse("has an llm_int8_threshold that is not a number")
        threshold = 6.0
    quant_type = said.get("bnb_4bit_quant_type", "fp4")
    if quant_type not in ("nf4", "fp4"):
        refuse(f"has the bnb_4bit_quant_type {quoted(str(quant_type), 20)}, which is neither nf4 nor fp4")
        quant_type = "nf4"
    return Settings(
        present=True,
        method="bitsandbytes",
        four_bit=bool(said.get("load_in_4bit") or said.get("_load_in_4bit")),
        eight_bit=bool(said.get("load_in_8bit") or said.get("_load_in_8bit")),
        quant_type=quant_type,
        double_quant=bool(said.get("bnb_4bit_use_double_quant")),
        compute_dtype=_text(said.get("bnb_4bit_compute_dtype"), "float32"),
        storage=_text(said.get("bnb_4bit_quant_storage"), "uint8"),
        threshold=float(threshold),
        skipped=tuple(skipped) if skipped is not None else None,
    )


def _text(value: object, default: str) -> str:
    return value if isinstance(value, str) else default


def check_settings(
    settings: Settings, weights: Mapping[str, tuple[Kind, bool]], library: str, problems: Problems
) -> None:
    """``settings`` against the quantized ``weights``: the kind of each by name, and whether it is double-quantized."""
    counts = Counter(kind for kind, _ in weights.values())
    found = f"the weights are {' and '.join(sorted(counts))}" if weights else "no weight is quantized"
    if not settings.present and weights:
        many = counted(len(weights), "weight") + (" is" if len(weights) == 1 else " are")
        facts = {"weights": many, "kind": ", ".join(sorted(counts)), "library": library}
        problems.add("quantization-config-missing", "config.json", **facts)
    if settings.method != "bitsandbytes":
        return
    if settings.four_bit == settings.eight_bit:
        said = "both 4 and 8 bit" if settings.four_bit else "neither 4 nor 8 bit"
        problems.add("quantization-config-mismatch", "config.json", said=said, found=found)
        return
    said, kinds = ("4 bit", FOUR_BIT) if settings.four_bit else ("8 bit", frozenset[Kind](("int8",)))
    if not weights or counts.keys() - kinds:
        problems.add("quantization-config-mismatch", "config.json", said=said, found=found)
    elif settings.four_bit:
        if counts.keys() != {settings.quant_type}:
            said = f"bnb_4bit_quant_type {settings.quant_type}"
            problems.add("quantization-config-differs", "config.json", said=said, found=found)
        doubles = sum(double for _, double in weights.values())
        if doubles != (len(weights) if settings.double_quant else 0):
            said = f"bnb_4bit_use_double_quant {str(settings.double_quant).lower()}"
            found = f"{doubles} of {len(weights)} weights have it"
            problems.add("quantization-config-differs", "config.json", said=said, found=found)
    _check_skipped(settings, weights, library, problems)


def _check_skipped(settings: Settings, weights: Mapping[str, object], library: str, problems: Problems) -> None:
    """Modules that are quantized although they are listed by name among those to skip.

    The libraries also take patterns; only what both take for certain counts here: the whole path, or its last part.
    """
    listed = set(settings.skipped or ())
    for name in weights:
        module = name.removesuffix(".weight")
        for key in (module, module.rpartition(".")[2]):
            if key in listed:
                facts = {"name": quoted(name), "module": quoted(key), "library": library}
                problems.add("skipped-but-quantized", quoted(name), **facts)
                break
