"""The settings that an output was made with, from its record."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import MissingInput, QzError, Unsupported, UsageError
from qz.counted import counted
from qz.formats.files.file_hash import sha256_of
from qz.formats.malformed import Malformed, quoted
from qz.formats.output.recorded.record import RECORD, as_text
from qz.quantize.methods import FourBit, Int8, Method
from qz.quantize.provenance.command import lora_option
from qz.quantize.provenance.fingerprints import config_fingerprint, settings_fingerprint
from qz.quantize.settings import Settings

if TYPE_CHECKING:
    from qz.formats.checkpoint.adapter_file import AdapterFile

GIVEN = {"importance", "loras", "config"}
"""Settings whose content the record has a hash of, or whose outcome is part of the output."""
CHOOSING = ("target_size", "max_loss", "split_groups", "scores")
"""Settings whose outcome the record tells, so that nothing needs to be chosen again."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a record names without its content, or does not know, so that the user names it once more."""

    importance: Path | None = None
    loras: tuple[AdapterFile, ...] = ()
    config: str | None = None
    """Of a single file's model, instead of the recorded place."""
    allow_pickle: bool = False
    device: str = "auto"
    threads: int = 0


def recorded_settings(about: Mapping[str, Any], given: Given) -> Settings:
    """What a run needs to make the same bytes; the hashes of what is ``given`` are compared with the recorded ones.

    Raises UsageError or MissingInput if something is needed and not given, or is not what was used, and Unsupported if
    there is a setting that this qz does not know.
    """
    told = about.get("settings")
    if not isinstance(told, dict):
        raise Malformed("record-malformed", f"{RECORD} does not say with which settings the checkpoint was made.")
    if told.get("target_size") is not None or told.get("max_loss") is not None:
        told = _with_the_choice(told, about)
    _require_given(told, given)
    try:
        settings = Settings(
            _method(told["method"]),
            told["dtype"],
            tuple(told["skips"]),
            default_skips=told["default_skips"],
            max_shard_bytes=told["max_shard_bytes"],
            device=given.device,
            threads=given.threads,
            keep_nonfinite=told["keep_nonfinite"],
            weights_only=told["weights_only"],
            components=tuple(told["components"]) if told["components"] is not None else None,
            component_methods={name: _method(method) for name, method in told["component_methods"].items()},
            scales=told.get("scales", "absmax"),
            importance=given.importance,
            rounding=told.get("rounding", "nearest"),
            experts=told.get("experts", False),
            variant=told.get("variant"),
            layout=told.get("layout", "diffusers"),
            file=told.get("file"),
            config=given.config or _repository(told.get("config")),
            loras=given.loras,
            allow_pickle=given.allow_pickle,
        )
        again = as_text(settings_fingerprint(settings))
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise Malformed("record-malformed", f"The settings in {RECORD} are damaged ({error}).") from None
    keys = (told.keys() | again.keys()) - GIVEN  # given anew, as files move; their hashes were compared
    unlike = sorted(key for key in keys if told.get(key) != again.get(key))
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


def _repository(told: object) -> str | None:
    return told if isinstance(told, str) else None


def _require_given(told: Mapping[str, Any], given: Given) -> None:
    """Raise UsageError unless what is given is what was used, by its hashes."""
    try:
        _require_importance(told.get("importance"), given.importance)
        _require_loras(told.get("loras") or [], given.loras)
        _require_config(told.get("config"), given.config)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Malformed("record-malformed", f"The settings in {RECORD} are damaged ({error}).") from None


def _require_importance(used: Mapping[str, Any] | None, file: Path | None) -> None:
    if used is None:
        if file is not None:
            raise UsageError("--importance names a file, and this checkpoint was made without one. Leave it out.")
        return
    if file is None:
        raise UsageError(
            f"It was made with an importance file, {quoted(str(used.get('file')))}. Name that file with --importance."
        )
    try:
        digest = sha256_of(file)
    except (OSError, QzError) as error:
        raise MissingInput(f"{file} cannot be read: {error}") from error
    if digest != used["sha256"]:
        raise UsageError(f"{file} is not the importance file that was used: its SHA-256 differs.")


def _require_loras(used: Sequence[Mapping[str, Any]], given: Sequence[AdapterFile]) -> None:
    wanted = " ".join(_option(each) for each in used)
    if not used and given:
        raise UsageError("--lora names a LoRA, and this checkpoint was made without one. Leave it out.")
    if len(used) != len(given):
        raise UsageError(
            f"It was made with {counted(len(used), 'LoRA')} fused into it. Name the same, in the same order: {wanted}"
        )
    for each, lora in zip(used, given, strict=True):
        if (lora.sha256, lora.config_sha256) != (each["sha256"], each["config_sha256"]):
            raise UsageError(
                f"{lora.where} is not the LoRA that was used: its SHA-256, or that of its config, differs. It "
                f"was made with {wanted}"
            )
        if lora.scale != each["scale"]:
            raise UsageError(f"{lora.where} was fused with another scale: {_option(each)}")


def _option(lora: Mapping[str, Any]) -> str:
    """A recorded LoRA as it is named on the command line."""
    return shlex.join(lora_option(lora["location"], lora["file"], lora["revision"], lora["scale"]))


def _require_config(used: object, given: str | None) -> None:
    """A config in a folder has a recorded hash; that of a repository shows in the output's own config.json."""
    if not isinstance(used, dict):
        return
    if given is None:
        raise UsageError(
            f"It was made with the config in a folder, {quoted(str(used.get('folder')))}. Name that folder with "
            "--config."
        )
    found = config_fingerprint(given)
    if not isinstance(found, dict) or found["sha256"] != used["sha256"]:
        raise UsageError(f"The config in {given} is not the one that was used: its SHA-256 differs.")
