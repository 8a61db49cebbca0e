"""Serve ``root/<owner>/<name>`` as repositories; the first line printed is the address.

SIGTERM ends it, and it prints what was asked of it, as JSON.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
from pathlib import Path

from hub_server.contents import Blob, Repeated
from hub_server.server import HubServer


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("root", type=Path)
    arguments.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    arguments.add_argument("--bandwidth", type=float, default=0.0, help="bytes a second of each connection")
    arguments.add_argument("--link-seconds", type=float, default=3600, help="life of a signed link")
    arguments.add_argument("--outage", action="store_true", help="the CDN refuses every link to a file")
    arguments.add_argument("--fill", type=Path, help="a file whose bytes, repeated, are those of all tensors")
    asked = arguments.parse_args()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with HubServer(link_seconds=asked.link_seconds) as hub:
        hub.latency, hub.bandwidth = asked.latency, asked.bandwidth
        if asked.outage:
            hub.fail("cdn", status=403, message="SignatureError: invalid key pair id")
        for folder in sorted(asked.root.glob("*/*")):
            paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
            files = {str(path.relative_to(folder)): _content(path, asked.fill) for path in paths}
            hub.add(f"{folder.parent.name}/{folder.name}", files)
        print(hub.url, flush=True)
        ended.wait()
        print(json.dumps({"requests": hub.requests, "bytes_out": hub.bytes_out}), flush=True)


def _content(path: Path, fill: Path | None) -> Path | Blob:
    if fill is None or path.suffix != ".safetensors":
        return path
    with path.open("rb") as file:
        size = file.read(8)
        head = size + file.read(int.from_bytes(size, "little"))
    return Repeated.to(path.stat().st_size, head, fill.read_bytes())


if __name__ == "__main__":
    main()
