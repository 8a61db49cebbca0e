"""Commands run in the test's own process, and what is in a folder afterwards."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(command: Callable[..., None], source: Path | str, **options: Any) -> dict[str, Any]:
    """The function of a command with ``--json --quiet --device cpu``; its report."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        command(str(source), **{"as_json": True, "quiet": True, "device": "cpu", **options})
    report: dict[str, Any] = json.loads(stdout.getvalue())
    return report


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
