"""The report of the run that made an output, from the record that it left there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qz.formats.output.recorded.record import Record

HIDDEN = ("qz", "versions", "command", "identity", "settings", "loads_in")
"""What a record says of the making that no report says."""


def report_of_record(record: Record, output: Path, notes: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys that do not depend on the run: see ``Summary.as_json``. ``notes`` are added to the warnings."""
    told = {key: value for key, value in record.about.items() if key not in HIDDEN}
    source, warnings = told.get("source"), told.get("warnings")
    shards = [file for file in record.files if file.name.endswith(".safetensors")]
    return {
        **told,
        "warnings": [*(warnings if isinstance(warnings, list) else ()), *notes],
        "source": source if isinstance(source, dict) else {},
        "output": str(output),
        "dry_run": False,
        "shards": [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in shards],
    }


def kind_of(device: str) -> str:
    """``cuda`` of ``cuda:1``."""
    return device.partition(":")[0]


def kind_of_bytes(about: Mapping[str, Any]) -> str:
    """The kind of device whose bytes an output has, by its record."""
    return kind_of(str(about.get("bytes_of") or about.get("device", "")))
