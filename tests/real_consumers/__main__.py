"""Run every consumer's code on small outputs of qz, hold the rules of ``qz inspect --for`` against it, write the page.

``python -m real_consumers WHEELS`` in tests/, with a folder for the wheels; needs a network for those not there yet.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from converted import quantized
from mixtures import mixture
from qz.formats.checkpoint.quantization.quantized import read_quantized
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.consumers.registry import CONSUMERS, judge
from qz.quantize.inspection.consumers import checkpoint_contents
from real_consumers import readers
from real_consumers.page import PAGE, page
from reference import dequantized_by_bitsandbytes, tensors_of

COLUMNS = ("nf4", "nf4-double", "fp4", "int8", "nf4 --experts", "fp4 --experts")
READERS: dict[str, Callable[[Path, Path], readers.Values]] = {
    "vllm": readers.vllm,
    "sglang": readers.sglang,
    "invokeai": readers.invokeai,
    "unsloth": readers.unsloth,
}
ONLY = {"unsloth": ("nf4 --experts", "fp4 --experts"), "invokeai": COLUMNS[:4], "sglang": COLUMNS[:4]}
"""What else these read is by code that cannot be taken out alone."""


def llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def made(root: Path) -> dict[str, Path]:
    """An output for each column, and those of rules: a split group."""
    dense, sparse = llama(root / "llama"), mixture("qwen3_moe", root / "moe")
    for column in COLUMNS:
        method, _, experts = column.partition(" --")
        source = sparse if experts else dense
        quantized(source, root / column, method, experts=bool(experts))
    quantized(dense, root / "split", "nf4", skips=("q_proj",))
    return {name: root / name for name in (*COLUMNS, "split")}


def outcome(read: Callable[[Path, Path], readers.Values], wheels: Path, folder: Path) -> tuple[bool, str]:
    """Whether every tensor of the checkpoint came out with the values that bitsandbytes gives."""
    stored = tensors_of(folder)
    expected = dequantized_by_bitsandbytes(stored)
    found = read(wheels, folder)
    compared = [name for name in expected if name in found]
    wrong = [name for name in compared if not torch.equal(found[name].to(expected[name].dtype), expected[name])]
    leaked = [name for name in found if name not in stored]
    if not compared or wrong or leaked:
        return False, f"{len(wrong)} of {len(compared)} weights have other values"
    return True, f"{len(compared)} weights, the same values"


def judged(consumer: str, folder: Path) -> Any:
    checkpoint = open_checkpoint(LocalFolder(folder))
    weights, problems = read_quantized(checkpoint)
    return judge(checkpoint_contents(checkpoint, weights, problems), [consumer])[consumer]


def main(wheels: Path) -> int:
    wheels.mkdir(parents=True, exist_ok=True)
    cells: dict[tuple[str, str], str] = {}
    failed = []
    with tempfile.TemporaryDirectory(prefix="qz-consumers-") as place:
        folders = made(Path(place))
        for consumer, read in READERS.items():
            for column in ONLY.get(consumer, COLUMNS):
                right, told = outcome(read, wheels, folders[column])
                cells[consumer, column] = ("✓ " if right else "✗ ") + told
                said = judged(consumer, folders[column]).loads
                if consumer != "invokeai" and said is not right:
                    failed.append(f"{consumer} {column}: the rules say {said}, and its code {right} ({told})")
        values = readers.vllm(wheels, folders["split"])
        plain = tensors_of(folders["split"])
        name = "model.layers.0.self_attn.q_proj.weight"
        changed = not torch.equal(values[name].to(plain[name].dtype), plain[name])
        rules = [each.rule for each in judged("vllm", folders["split"]).findings if each.severity == "warning"]
        if not changed or rules != ["split-group"]:
            failed.append(f"vllm, skipped q_proj: quantized there: {changed}; the rules say {rules}")
    PAGE.write_text(page(CONSUMERS.values(), COLUMNS, cells))
    print("\n".join(failed) or f"{len(cells)} cells, as the rules say; {PAGE} is written")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", type=Path)
    raise SystemExit(main(parser.parse_args().wheels))
