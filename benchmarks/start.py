"""How much CPU time commands take that compute nothing, against ``hf --help``, in turn on the same machine.

python -m benchmarks.start

Fails where a median of the ratios is above its goal, so that an import too many is noticed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

from benchmarks.checkpoints import llama
from benchmarks.whole import run

BIN = Path(sys.executable).parent
HF, QZ = str(BIN / "hf"), str(BIN / "qz")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, default=Path(".bench"))
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}", flush=True)
    arguments.place.mkdir(parents=True, exist_ok=True)
    # As installed: modules are compiled once, not at every start.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str((arguments.place / "bytecode").absolute())
    plain, packed = llama(arguments.place / "llama-2-layers", SMALL, 320), arguments.place / "llama-2-layers-nf4"
    if not packed.exists():
        run([QZ, "quantize", str(plain), "-o", str(packed), "-q"])
    commands = {
        "qz --help": ([QZ, "--help"], 0.12),
        "qz inspect, a bf16 Llama": ([QZ, "inspect", str(plain)], 0.18),
        "qz inspect, the same in NF4": ([QZ, "inspect", str(packed)], 0.18),
    }
    for command in ([HF, "--help"], *(command for command, _ in commands.values())):
        run(command)
    rounds = [
        (run([HF, "--help"]).cpu, [run(command).cpu for command, _ in commands.values()])
        for _ in range(arguments.rounds)
    ]
    print(f"{'hf --help':28} {statistics.median(theirs for theirs, _ in rounds):.3f} s CPU", flush=True)
    late = []
    for number, (name, (_, goal)) in enumerate(commands.items()):
        seconds = statistics.median(ours[number] for _, ours in rounds)
        ratio = statistics.median(ours[number] / theirs for theirs, ours in rounds)
        print(f"{name:28} {seconds:.3f} s CPU, {ratio:.3f}× of it; goal {goal}×", flush=True)
        late += [name] if ratio > goal else []
    if late:
        raise SystemExit(f"Above the goal: {', '.join(late)}. `python -X importtime -m qz …` shows what is imported.")


if __name__ == "__main__":
    main()
