"""Commands run in the test's own process, and what is in a folder afterwards."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from json_contract import checked


def run(command: Callable[..., None], source: Path | str, **options: Any) -> dict[str, Any]:
    """The function of a command with ``--json --quiet --device cpu``; its report, which is as its type says."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        command(str(source), **{"as_json": True, "quiet": True, "device": "cpu", **options})
    report: dict[str, Any] = checked(command.__name__, stdout.getvalue())
    return report


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
