"""docs/reference/consumers.md: the rules as they are in the code, and what consumers' code made of qz's outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from qz.quantize.consumers.verdict import Consumer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "consumers.md"
HEAD = """# Who loads it

<!-- Written by `make consumers`. Changes belong into quantize/consumers and tests/real_consumers. -->

`qz inspect FOLDER --for vllm` says whether a checkpoint loads there, and if not, what would; the exit code is 65 then.
The names are `{names}`; `--for` can be repeated. `qz quantize` warns where a choice of the run decides it.

## Run on their code

Functions that read the tensors of a checkpoint were taken out of the published packages and run on a CPU, on small
outputs of qz: a Llama, and a Qwen3-MoE with `--experts`. ✓: every weight came out with the values that bitsandbytes
gives. A cell that is empty was not run. What these programs do besides (building their model, their kernels) was not.

"""
RULES = """
transformers, diffusers (without a GPU) and PEFT are run as a whole by qz's own tests: every method loads, the forward
agrees with the dequantized model's, an adapter trains on a CPU and merges. ComfyUI and its nodes are in no package
registry: their rules are read from the code of the commits that are named, and are not run by `make consumers`. By
hand they were run once, on a CPU and on a GPU (a copy of ComfyUI of January 2026, a FLUX of two blocks): UNETLoaderNF4
loaded what `--layout single-file` wrote in nf4 and fp4 with the same values, and the forward was that of diffusers'
class with these values. So was that of InvokeAI's own FLUX with the file in nf4, bit for bit.

## Rules

What `--for` looks at. The source is the file and function that the rule was read from.

"""


def page(consumers: Iterable[Consumer], columns: Sequence[str], cells: Mapping[tuple[str, str], str]) -> str:
    consumers = list(consumers)
    run = dict.fromkeys(name for name, _ in cells)
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for consumer in consumers:
        if consumer.name in run:
            row = [cells.get((consumer.name, column), "") for column in columns]
            lines.append(f"| {consumer.package} | " + " | ".join(row) + " |")
    head = HEAD.format(names="`, `".join(consumer.name for consumer in consumers))
    return head + "\n".join(lines) + "\n" + RULES + rules(consumers)


def rules(consumers: Iterable[Consumer]) -> str:
    parts = []
    for consumer in consumers:
        parts.append(f"### {consumer.title}\n\n`--for {consumer.name}`, read from {consumer.package}.\n")
        parts.append("| rule | | source |\n|---|---|---|")
        for rule in consumer.rules:
            what = " ".join((rule.check.__doc__ or "").split())
            parts.append(f"| {rule.name} | {what} | {rule.source} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"
