"""What must be the same for the same bytes: settings, versions and device, as JSON for the journal and the record."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING, Any

from qz.formats.files.file_hash import sha256_of
from qz.formats.source import local_path, open_source
from qz.quantize.libraries.examine import library_versions
from qz.quantize.methods import Method
from qz.quantize.settings import Settings
from qz.quantize.single_files.configs import config_digest

if TYPE_CHECKING:
    from qz.quantize.compute.arithmetic import Arithmetic


def fingerprint(source: dict[str, Any], settings: Settings, arithmetic: Arithmetic) -> dict[str, Any]:
    """What must be the same for a resumed run to write the same bytes. Threads are not part of it."""
    from qz import __version__

    versions = {"qz": __version__, **library_versions()}
    device = f"{arithmetic.name} ({arithmetic.model})" if arithmetic.model else arithmetic.name
    if arithmetic.name == "cpu" != arithmetic.bytes_of:
        device = f"cpu, as {arithmetic.bytes_of}"
    return {"source": source, "settings": settings_fingerprint(settings), "versions": versions, "device": device}


def settings_fingerprint(settings: Settings) -> dict[str, Any]:
    """The settings that decide the bytes, as JSON values. Device, threads and versions do not."""
    refined: dict[str, Any] = {}  # only where it applies, because outputs of earlier versions do not have it
    if settings.scales != "absmax":
        refined = {"scales": settings.scales, "rounding": settings.rounding}
        if settings.importance is not None:
            refined["importance"] = {"file": settings.importance.name, "sha256": sha256_of(settings.importance)}
    named = ("file", "variant")
    refined |= {name: value for name in named if (value := getattr(settings, name)) is not None}
    if settings.config is not None:
        refined["config"] = config_fingerprint(settings.config)
    if settings.layout != "diffusers":
        refined["layout"] = settings.layout
    if settings.loras:
        refined["loras"] = [lora.as_json() for lora in settings.loras]
    if settings.chooses_layers:
        refined |= {
            "target_size": settings.target_size,
            "max_loss": settings.max_loss,
            "split_groups": settings.split_groups,
        }
        if settings.scores is not None:
            refined["scores"] = {"file": settings.scores.name, "sha256": sha256_of(settings.scores)}
    if settings.experts:
        refined["experts"] = True
    return {
        "method": method_fingerprint(settings.method),
        "dtype": settings.dtype,
        "skips": list(settings.skips),
        "default_skips": settings.default_skips,
        "max_shard_bytes": settings.max_shard_bytes,
        "keep_nonfinite": settings.keep_nonfinite,
        "weights_only": settings.weights_only,
        "components": list(settings.components) if settings.components is not None else None,
        "component_methods": {name: method_fingerprint(method) for name, method in settings.component_methods.items()},
        **refined,
    }


def config_fingerprint(named: str) -> str | dict[str, str]:
    """A repository's name; of a folder its own name, and the SHA-256 of the config in it, or of all of a pipeline's."""
    path = local_path(named)
    if path is None:
        return named
    with closing(open_source(named)) as folder:
        return {"folder": os.path.basename(os.path.realpath(path)), "sha256": config_digest(folder)}


def method_fingerprint(method: Method | None) -> dict[str, Any] | None:
    """The settings of a method that decide the bytes."""
    return None if method is None else {"name": method.name, **method.config()}
