"""Pushing to a Hub, against ``hf upload`` to the same one: time, CPU and memory; and quantizing with --push-only.

The Hub is that of ``benchmarks.hub``; what is uploaded goes over Xet, as fast as a loop-back is. With --push-only the
source comes from there too, as fast.

    python -m benchmarks.push [FOLDER]

FOLDER (default: .bench) holds the checkpoint that is made once and kept. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.hub import ROOT, Served, told, watched

SHARD, ROUNDS = "200MB", 3
OWNER = {"HF_TOKEN": "hf_owner_of_me_and_org"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, nargs="?", default=ROOT / ".bench")
    folder = arguments.parse_args().folder.resolve()

    from benchmarks import checkpoints

    source = folder / "push" / "bench" / "llama-1b"
    checkpoints.llama(source, checkpoints.LLAMA_1B)
    qz = [sys.executable, "-m", "qz"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        place = Path(scratch)
        (place / "models").mkdir()
        made = watched(
            [*qz, "quantize", str(source), "--nf4", "--max-shard-size", SHARD, "-o", "made", "-q"], place, {}
        )
        output = sum(path.stat().st_size for path in (place / "made").iterdir())
        runs = {
            "qz_push": [*qz, "push", "made", "me/qz", "--quiet"],
            "hf_upload": [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", "me/hf", "made", "--private"],
        }
        ways: dict[str, dict[str, Any]] = {}
        for _ in range(ROUNDS):  # in turn: what else the machine does falls on both
            for name, command in runs.items():
                with Served(place / "models", place) as hub:
                    run = watched(command, place, hub.environment | OWNER)
                ways[name] = min(run, ways.get(name, run), key=lambda each: each["seconds"])
        shutil.rmtree(place / "made")
        with Served(folder / "push", place, bandwidth=0) as hub:
            words = ["--nf4", "--max-shard-size", SHARD, "--push", "me/only", "--push-only", "--quiet"]
            only = watched([*qz, "quantize", "bench/llama-1b", *words], place, hub.environment | OWNER)
    result = {
        "bytes_output": output,
        **{name: told(run, output) for name, run in ways.items()},
        "throughput_against_hf_upload": round(ways["hf_upload"]["seconds"] / ways["qz_push"]["seconds"], 2),
        "quantize": told(made, output),
        "quantize_push_only": told(only, output),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
