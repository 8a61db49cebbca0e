"""The settings that an output was made with, from its record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qz import MissingInput, QzError, Unsupported, UsageError
from qz.formats.file_hash import sha256_of
from qz.formats.malformed import Malformed, quoted
from qz.formats.output.recorded.record import RECORD, as_text
from qz.quantize.methods import FourBit, Int8, Method
from qz.quantize.settings import Settings
from qz.quantize.up_to_date import settings_fingerprint

NOT_AGAIN = {
    "loras": "with LoRAs fused into it",
    "layout": "as a single file",
    "file": "from one file of a repository",
    "config": "from a single file",
}
"""Settings of outputs that are verified against their hashes only."""
CHOOSING = ("target_size", "max_loss", "split_groups", "scores")
"""Settings whose outcome the record tells, so that nothing needs to be chosen again."""


def recorded_settings(
    about: Mapping[str, Any], importance: Path | None, device: str, threads: int, *, allow_pickle: bool = False
) -> Settings:
    """What a run needs to make the same bytes. ``importance``: the file that was used, whose hash is compared.

    Raises UsageError or MissingInput if that file is needed and is not it, and Unsupported if there is a setting that
    this qz does not know.
    """
    told = about.get("settings")
    if not isinstance(told, dict):
        raise Malformed("record-malformed", f"{RECORD} does not say with which settings the checkpoint was made.")
    for key, what in NOT_AGAIN.items():
        if told.get(key):
            raise Unsupported(
                f"It was made {what}, which is not computed again for a comparison. Run the command that {RECORD} has "
                "once more, and compare the hashes of both outputs."
            )
    if told.get("target_size") is not None or told.get("max_loss") is not None:
        told = _with_the_choice(told, about)
    used = told.get("importance")
    if isinstance(used, dict):
        _require_same(importance, used)
    elif importance is not None:
        raise UsageError("--importance names a file, and this checkpoint was made without one. Leave it out.")
    try:
        settings = Settings(
            _method(told["method"]),
            told["dtype"],
            tuple(told["skips"]),
            default_skips=told["default_skips"],
            max_shard_bytes=told["max_shard_bytes"],
            device=device,
            threads=threads,
            keep_nonfinite=told["keep_nonfinite"],
            weights_only=told["weights_only"],
            components=tuple(told["components"]) if told["components"] is not None else None,
            component_methods={name: _method(method) for name, method in told["component_methods"].items()},
            scales=told.get("scales", "absmax"),
            importance=importance,
            rounding=told.get("rounding", "nearest"),
            variant=told.get("variant"),
            allow_pickle=allow_pickle,
        )
        again = as_text(settings_fingerprint(settings))
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise Malformed("record-malformed", f"The settings in {RECORD} are damaged ({error}).") from None
    if isinstance(used, dict):  # wherever the file lies now
        again["importance"] = {**again["importance"], "file": used.get("file")}
    unlike = sorted(key for key in told.keys() | again.keys() if told.get(key) != again.get(key))
    if unlike:
        raise Unsupported(
            f"It was made with settings that this qz {_version()} does not know or reads otherwise: "
            f"{', '.join(map(quoted, unlike))}. Verify it with qz {quoted(str(about.get('qz')))}, which made it."
        )
    return settings


def _with_the_choice(told: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that say outright which linears, and of a pipeline which components, were kept for a size or a loss."""
    plain = {key: each for key, each in told.items() if key not in CHOOSING}
    rows = about.get("components")
    try:
        if not isinstance(rows, list):
            return {**plain, "skips": [*told["skips"], *about["kept_layers"]["kept"]]}
        made = {row["name"]: row for row in rows if row["converted"]}
        kept = [f"{name}/{path}" for name, row in made.items() for path in _kept(row)]
        methods = {
            name: told["method"] if row["method"] == told["method"]["name"] else {"name": "int8", **Int8().config()}
            for name, row in made.items()
        }
        own = told["component_methods"]
        return {
            **plain,
            "skips": [*told["skips"], *kept],
            "components": list(made),
            "component_methods": {name: own.get(name) or method for name, method in methods.items()},
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise Malformed("record-malformed", f"The settings in {RECORD} are damaged ({error}).") from None


def _kept(row: Mapping[str, Any]) -> list[str]:
    found: list[str] = (row.get("kept_layers") or {"kept": []})["kept"]
    return found


def _version() -> str:
    from qz import __version__

    return __version__


def _method(told: Mapping[str, Any] | None) -> Method | None:
    if told is None:
        return None
    if told["name"] == "int8":
        return Int8(told["llm_int8_threshold"])
    return FourBit(told["name"], told["bnb_4bit_use_double_quant"], told["bnb_4bit_compute_dtype"])


def _require_same(file: Path | None, used: Mapping[str, Any]) -> None:
    if file is None:
        raise UsageError(
            f"It was made with an importance file, {quoted(str(used.get('file')))}. Name that file with --importance."
        )
    try:
        digest = sha256_of(file)
    except (OSError, QzError) as error:
        raise MissingInput(f"{file} cannot be read: {error}") from error
    if digest != used.get("sha256"):
        raise UsageError(f"{file} is not the importance file that was used: its SHA-256 is another one.")
