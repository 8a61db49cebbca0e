"""Quantizing straight from a Hub, against ``hf download`` from the same one: time, CPU, memory, disk, and requests.

The Hub is ``tests/hub_server`` in a process of its own on 127.0.0.1; every connection has a latency of 5 ms and
70 MB/s, which is what the CDN of the real one gives at most.

    python -m benchmarks.hub [FOLDER] [--model llama-1b|flux-noise] [--method nf4] [--xet] [--alone]

FOLDER (default: .bench) holds the checkpoint that is made once and kept. ``--xet``: the CDN refuses, so that everything
comes over Xet. ``flux-noise``: FLUX-sized, of 64 MB of noise again and again, which the server makes as it is read; the
output is compared with what bitsandbytes makes of the noise, and qz with nothing. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from benchmarks.memory import Peak

ROOT = Path(__file__).parent.parent
IMPORTS = "import torch, transformers, diffusers, bitsandbytes, numba"
LATENCY, BANDWIDTH = 0.005, 70e6


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, nargs="?", default=ROOT / ".bench")
    arguments.add_argument("--model", choices=("llama-1b", "flux-noise"), default="llama-1b")
    arguments.add_argument("--method", choices=("nf4", "fp4", "int8"), default="nf4")
    arguments.add_argument("--xet", action="store_true", help="the CDN refuses")
    arguments.add_argument("--alone", action="store_true", help="qz only: nothing to compare with")
    asked = arguments.parse_args()
    if asked.model == "flux-noise" and asked.method != "nf4":
        arguments.error("flux-noise is compared in NF4 only")

    from benchmarks import checkpoints, noise

    models = asked.folder.resolve() / "hub" / asked.model
    source = models / "bench" / asked.model
    source.parent.mkdir(parents=True, exist_ok=True)
    fill = noise.write(models / "noise") if asked.model == "flux-noise" else None
    if asked.model == "llama-1b":
        checkpoints.SHARD_BYTES = 300 * 10**6  # eight shards, for eight connections of hf download
        checkpoints.llama(source, checkpoints.LLAMA_1B)
    else:
        checkpoints.flux(source, holes=True)
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    repo, quantize = f"bench/{asked.model}", [sys.executable, "-m", "qz", "quantize", f"--{asked.method}", "--json"]

    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        place = Path(scratch)
        imports = watched([sys.executable, "-c", IMPORTS], place, {})
        with Served(models, place, outage=asked.xet, fill=fill) as hub:
            remote = watched([*quantize, "--quiet", "-o", "remote", repo], place, hub.environment)
        output = size_of(place / "remote")
        result: dict[str, Any] = {
            "model": asked.model,
            "method": asked.method,
            "way": "xet" if asked.xet else "cdn",
            "bytes_weights": weights,
            "bytes_output": output,
            "asked_of_the_hub": hub.counts["requests"],
            "bytes_of_the_hub": hub.counts["bytes_out"],
            "qz": told(remote, weights),
            "peak_disk_bytes_beside_output": max(0, remote["disk"] - output),
            "peak_anonymous_bytes_of_imports": imports["memory"],
        }
        if fill is not None:
            result["differing_from_bitsandbytes"] = noise.differing(source, place / "remote")
        elif not asked.alone:
            local = watched([*quantize, "--quiet", "-o", "local", str(source)], place, {})
            result["same_weights_as_local"] = same(place / "remote", place / "local")
            result["qz_from_a_local_folder"] = told(local, weights)
            for name in ("remote", "local"):
                shutil.rmtree(place / name)
            with Served(models, place) as hub:
                hf = [sys.executable, "-m", "huggingface_hub.cli.hf", "download", repo, "--quiet"]
                download = watched(hf, place, hub.environment | {"HF_HUB_DISABLE_XET": "1"})
            result["hf_download"] = told(download, weights)
            result["throughput_against_hf_download"] = round(download["seconds"] / remote["seconds"], 2)
    print(json.dumps(result, indent=2))


class Served:
    """A Hub in a process of its own. A context manager; ``counts`` is there afterwards.

    What its clients keep for another time lies in ``place`` too, and goes with it. ``fill``: see the server."""

    def __init__(
        self,
        models: Path,
        place: Path,
        *,
        outage: bool = False,
        bandwidth: float = BANDWIDTH,
        fill: Path | None = None,
    ) -> None:
        command = [sys.executable, "-m", "hub_server", models, "--latency", LATENCY, "--bandwidth", bandwidth]
        filled = [] if fill is None else ["--fill", fill]
        self.command = [str(word) for word in (*command, *filled)] + ["--outage"] * outage
        self.place = place
        self.counts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(self.command, cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.home = tempfile.mkdtemp(dir=self.place)
        self.environment = {
            "HF_ENDPOINT": self.process.stdout.readline().strip(),
            "HF_HOME": f"{self.home}/hub",
            "HF_XET_CACHE": f"{self.home}/xet",
            "QZ_CACHE": f"{self.home}/cache",  # nothing is remembered
        }
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.counts = json.loads(self.process.communicate()[0])
        shutil.rmtree(self.home)


def told(run: dict[str, Any], weights: int) -> dict[str, Any]:
    return {
        "seconds": run["seconds"],
        "mb_per_second": round(weights / run["seconds"] / 1e6, 1),
        "cpu_seconds_per_gb": round(run["cpu"] / (weights / 1e9), 2),
        "peak_anonymous_bytes": run["memory"],
        "peak_anonymous_bytes_of_all_processes": run["memory_together"],
        "peak_disk_bytes": run["disk"],
    }


def same(one: Path, other: Path) -> bool:
    return all((one / path.name).read_bytes() == path.read_bytes() for path in other.glob("*.safetensors"))


def watched(command: list[str], place: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a command in ``place``: its seconds and CPU seconds, peak anonymous memory, peak disk use there."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=place,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    memory, disk = Peak(), 0
    while process.poll() is None:
        memory.look(process.pid)
        disk = max(disk, used(place))
        time.sleep(0.02)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(time.monotonic() - began, 2),
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "memory": memory.largest,
        "memory_together": memory.together,
        "disk": disk,
    }


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


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


if __name__ == "__main__":
    main()
