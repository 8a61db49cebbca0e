"""Serve ``root/<owner>/<name>`` as repositories until interrupted; the first line printed is the address."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

from hub_server.server import HubServer


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("root", type=Path)
    arguments.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    arguments.add_argument("--bandwidth", type=float, default=0.0, help="bytes a second of each connection")
    asked = arguments.parse_args()
    with HubServer() as hub:
        hub.latency, hub.bandwidth = asked.latency, asked.bandwidth
        for folder in sorted(asked.root.glob("*/*")):
            files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
            hub.add(f"{folder.parent.name}/{folder.name}", files)
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
