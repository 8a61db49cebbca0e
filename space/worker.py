"""One conversion in a process of its own: a request as JSON on stdin, events as JSON lines on stdout.

The token of whoever asked is in the environment, and nowhere else. SIGINT stops the work cleanly; the same request goes
on where it was stopped.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

from qz import QzError
from qz.api import Fp4, Int8, Nf4, quantize
from qz.progress import Progress

METHODS = {
    "nf4": Nf4,
    "nf4, double quantization": lambda: Nf4(double_quant=True),
    "fp4": Fp4,
    "int8": Int8,
}
EVERY = 0.5
"""Seconds between two reports of progress."""


def main() -> int:
    request = json.load(sys.stdin)
    try:
        tell("done", convert(request))
    except QzError as error:
        tell("failed", {"message": str(error), "code": error.exit_code})
        return error.exit_code
    except KeyboardInterrupt:
        tell("failed", {"message": "Stopped. Ask for the same again, and it goes on from here.", "code": 130})
        return 130
    return 0


def convert(request: dict[str, Any]) -> dict[str, Any]:
    """What ``request`` asks for; without a repository to push to, only what it would give."""
    target = request.get("target")
    summary = quantize(
        request["source"],
        method=METHODS[request["method"]](),
        scales=request.get("scales"),
        subfolder=request.get("subfolder") or None,
        push=target,
        push_only=bool(target),
        public=request.get("public", False) if target else None,
        dry_run=not target,
        on_progress=Told(),
    )
    return summary.as_json()


class Told:
    """Passes on what is worth showing: every new phase and file, and the numbers twice a second. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = ("", 0.0)

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            doing, then = self._last
            now = time.monotonic()
            if progress.doing == doing and progress.file is None and progress.kept is None and now - then < EVERY:
                return
            self._last = (progress.doing, now)
            tell(
                "progress",
                {
                    "doing": progress.doing,
                    "bytes": progress.bytes,
                    "all_bytes": progress.all_bytes,
                    "file": progress.file,
                    "kept": progress.kept,
                },
            )


def tell(event: str, data: dict[str, Any]) -> None:
    print(json.dumps({"event": event, "data": data}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
