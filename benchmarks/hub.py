"""Quantizing straight from a Hub: bytes over the network, peak memory, peak disk, and time, against a local folder.

The Hub is ``tests/hub_server`` in a process of its own on 127.0.0.1, so the network is as fast as a loop-back is.

    python benchmarks/hub.py FOLDER [--model llama-1b|flux-holes] [--method nf4] [--remote-only]

FOLDER holds the checkpoint that is made once and kept. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose kernels.py would hide a package of that name

IMPORTS = "import torch, transformers, diffusers, bitsandbytes, numba"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--model", choices=("llama-1b", "flux-holes"), default="llama-1b")
    arguments.add_argument("--method", choices=("nf4", "fp4", "int8"), default="nf4")
    arguments.add_argument("--remote-only", action="store_true", help="no run from the local folder to compare with")
    asked = arguments.parse_args()

    from benchmarks import checkpoints

    source = asked.folder / "bench" / asked.model
    if asked.model == "llama-1b":
        checkpoints.llama(source, checkpoints.LLAMA_1B)
    else:
        checkpoints.flux(source, holes=True)
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))

    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        place = Path(scratch)
        server = subprocess.Popen(
            [sys.executable, "-m", "hub_server", asked.folder], cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        try:
            hub = {"HF_ENDPOINT": url, "HF_HOME": str(place / "home"), "HF_HUB_DISABLE_XET": "1"}
            baseline = watched([sys.executable, "-c", IMPORTS], place, {})
            command = [sys.executable, "-m", "qz", "quantize", f"--{asked.method}", "--json", "--quiet", "-o"]
            local = None if asked.remote_only else watched([*command, "local", str(source)], place, {})
            remote = watched([*command, "remote", f"bench/{asked.model}"], place, hub)
        finally:
            server.kill()
        same = (
            None
            if local is None
            else all(
                (place / "remote" / path.name).read_bytes() == path.read_bytes()
                for path in (place / "local").glob("*.safetensors")
            )
        )
        output = sum(path.stat().st_size for path in (place / "remote").iterdir())
    print(
        json.dumps(
            {
                "model": asked.model,
                "method": asked.method,
                "bytes_weights": weights,
                "bytes_received": remote["received"],
                "bytes_output": output,
                "same_weights_as_local": same,
                "seconds": {"remote": remote["seconds"], "local": local and local["seconds"]},
                "peak_anonymous_bytes": {
                    "imports": baseline["memory"],
                    "local": local and local["memory"],
                    "remote": remote["memory"],
                },
                "peak_disk_bytes_beside_output": max(0, remote["disk"] - (local["left"] if local else 0) - output),
            },
            indent=2,
        )
    )


def watched(command: list[str], place: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a command in ``place``: its seconds, peak anonymous memory, peak disk use there, bytes over the network."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=place,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    before, memory, disk = loopback(), 0, 0
    while process.poll() is None:
        memory = max(memory, anonymous(process.pid))
        disk = max(disk, used(place))
        time.sleep(0.02)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)
    return {
        "seconds": round(time.monotonic() - began, 2),
        "memory": memory,
        "disk": disk,
        "left": used(place),
        "received": loopback() - before,
    }


def anonymous(pid: int) -> int:
    """Bytes of memory that no file stands behind (RssAnon)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon")), 0)


def used(place: Path) -> int:
    """Bytes that the files below ``place`` take on the disk."""
    total = 0
    for folder, _, files in os.walk(place):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except OSError:
                continue
    return total


def loopback() -> int:
    """Bytes that went over 127.0.0.1 since the machine started: an upper bound where others use it too."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[0])
    return 0


if __name__ == "__main__":
    if shutil.disk_usage(Path.cwd()).free < 1 << 30:
        raise SystemExit("Less than 1 GB is free here.")
    main()
