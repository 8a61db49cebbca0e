"""What a plan will write, as the rules of a consumer look at it; and what is worth a warning before it is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qz.quantize.consumers.contents import Contents, Packed
from qz.quantize.consumers.registry import CONSUMERS, judge
from qz.quantize.planning.plan import Plan

TOLD = ("vllm", "sglang")
LISTED = ("vllm", "sglang", "unsloth", "peft")
RULES = ("split-group", "unlisted-skip", "int8-capitals", "ending-names")
"""What depends on how a model was quantized, so that another choice would help."""


def planned_contents(plan: Plan) -> Contents:
    """The output of ``plan``."""
    method = plan.method
    packed: dict[str, Packed] = {}
    plain: dict[str, tuple[int, ...]] = {}
    for saved in plan.architecture.saved:
        if method is not None and saved.part == "weight":
            packed[saved.name] = Packed(method.name, saved.weight.shape, saved.dtype)
        elif not saved.part:
            plain[saved.name] = saved.shape
    return Contents(
        library=plan.checkpoint.library,
        architecture=plan.architecture.class_name,
        config=json.loads(plan.files["config.json"]),
        packed=packed,
        plain=plain,
        kept_linears=tuple(plan.architecture.kept_linears),
        files=tuple(layout.file for layout in plan.shards),
        has_index=len(plan.shards) > 1,
    )


def warnings(plan: Plan) -> Iterator[str]:
    """One line for each choice of this run that loaders other than the model's library take differently."""
    if plan.method is None or plan.checkpoint.library != "transformers" or plan.checkpoint.class_module is not None:
        return  # components of pipelines, too: these programs serve no pipelines
    verdicts = judge(planned_contents(plan), TOLD)
    told: set[str] = set()
    for verdict in verdicts.values():
        for finding in verdict.findings:
            if finding.rule in RULES and finding.rule not in told:
                told.add(finding.rule)
                yield f"{CONSUMERS[verdict.consumer].title} {finding.message.removesuffix('.')}"


def loads_in(plan: Plan) -> list[dict[str, Any]]:
    """For the record and the card: of each program that serves or trains language models whether it loads the output,
    and what is to know. Empty for what is not quantized, and for models of diffusers."""
    if plan.method is None or plan.checkpoint.library != "transformers":
        return []
    return [
        {
            "name": CONSUMERS[name].title,
            "package": verdict.package,
            "loads": verdict.loads,
            "why": " ".join(finding.message for finding in verdict.errors or verdict.findings),
        }
        for name, verdict in judge(planned_contents(plan), LISTED).items()
    ]
