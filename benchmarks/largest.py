"""The largest open models, planned: DeepSeek-V3 and Kimi-K2 by their shapes, in files that are all holes.

python -m benchmarks.largest [--folder DIR] [--parts 64]

Each line is a whole process: wall time, CPU time, and its largest RssAnon. The parts are dry runs: what is planned for
each, and how even that is. Nothing is read but headers, and the files are holes, so little disk is used; but a dry run
refuses what has no room, so there must be some for a part: about 40 GB with 64 parts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.whole import QZ, run
from qz.formats.tensors.safetensors_layout import encode_header, layout
from qz.formats.tensors.shards import file_names, index, index_name

SHARD_BYTES = 8_400_000_000
MODELS: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": {},
    "Kimi-K2": {"n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 163_840,
                "first_k_dense_replace": 1},
}  # fmt: skip
Entry = tuple[str, str, tuple[int, ...]]


def hollow(folder: Path, changes: dict[str, Any]) -> Path:
    """A bf16 checkpoint with a tensor for each matrix of each expert, as these models are published."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    config = DeepseekV3Config(**changes, dtype="bfloat16")
    with torch.device("meta"):
        state = DeepseekV3ForCausalLM(config).state_dict()
    entries = [entry for name, tensor in state.items() for entry in published(name, tuple(tensor.shape))]
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        nbytes = bytes_of(entry)
        if size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes
    names = file_names("transformers", len(shards))
    for name, members in zip(names, shards, strict=True):
        placed = layout(members)
        with (folder / name).open("wb") as file:
            file.write(encode_header(placed))
            file.truncate(file.tell() + placed[-1].stop)
    where = {entry[0]: name for name, members in zip(names, shards, strict=True) for entry in members}
    (folder / index_name("transformers")).write_bytes(index(where, sum(map(bytes_of, entries)), None))
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(folder)
    return folder


def published(name: str, shape: tuple[int, ...]) -> list[Entry]:
    """What the library keeps in one tensor for all experts, a tensor for each of them."""
    base, _, last = name.rpartition(".")
    if not base.endswith(".experts"):
        return [(name, "F32" if name.endswith("e_score_correction_bias") else "BF16", shape)]
    count, rows, columns = shape
    if last == "down_proj":
        return [(f"{base}.{expert}.down_proj.weight", "BF16", (rows, columns)) for expert in range(count)]
    halves = ("gate_proj", "up_proj")
    return [
        (f"{base}.{expert}.{half}.weight", "BF16", (rows // 2, columns)) for expert in range(count) for half in halves
    ]


def bytes_of(entry: Entry) -> int:
    nbytes = 4 if entry[1] == "F32" else 2
    for extent in entry[2]:
        nbytes *= extent
    return nbytes


def told(label: str, command: list[str]) -> None:
    figure = run(command)
    print(
        f"  {label:34} {figure.wall:6.1f} s   {figure.cpu:6.1f} s CPU   {figure.anonymous / 2**20:6.0f} MB", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-largest"))
    parser.add_argument("--parts", type=int, nargs="+", default=[64])
    chosen = parser.parse_args()
    for name, changes in MODELS.items():
        source = hollow(chosen.folder / name, changes)
        files = list(source.glob("*.safetensors"))
        tensors = len(json.loads((source / index_name("transformers")).read_text())["weight_map"])
        nbytes = sum(file.stat().st_size for file in files)
        print(f"{name}: {tensors:,} tensors, {len(files)} files, {nbytes / 1e12:.2f} TB", flush=True)
        told("qz inspect", [*QZ, "inspect", str(source), "--json"])
        dry = [*QZ, "quantize", str(source), "-o", str(chosen.folder / "out"), "--dry-run", "--json", "--device", "cpu"]
        for label in ("dry run of a part, first", "dry run of a part, remembered"):
            told(label, [*dry, "--part", f"1/{max(chosen.parts)}"])
        for count in chosen.parts:
            loads = []
            for number in sorted({1, count // 2, count}):
                said = subprocess.run([*dry, "--part", f"{number}/{count}"], capture_output=True, check=True).stdout
                loads.append(sum(shard["bytes"] for shard in json.loads(said)["shards"]))
            shown = ", ".join(f"{load / 1e9:.2f}" for load in loads)
            print(f"  of {count} parts the first, middle and last write {shown} GB", flush=True)


if __name__ == "__main__":
    main()
