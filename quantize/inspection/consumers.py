"""What each consumer would make of the checkpoint that is inspected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from qz import QzError
from qz.formats.checkpoint.problems import Problem, worst_first
from qz.formats.checkpoint.quantization.quantized import QuantizedWeight, part_names
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.output.recorded.record import read_record
from qz.quantize.consumers.contents import Contents, Packed
from qz.quantize.consumers.registry import CONSUMERS, judge
from qz.quantize.consumers.verdict import Consumer, Finding, Verdict
from qz.quantize.inspection.linear_layers import Value, values
from qz.quantize.inspection.report import Inspection

OF_ONE_MODEL = ("transformers", "vllm", "sglang", "unsloth")
"""Consumers that load no pipeline."""
LAYOUT = "original-layout"
"""The problem of a file that only other tools load."""


def checkpoint_contents(
    checkpoint: Checkpoint, weights: Mapping[str, QuantizedWeight], problems: Iterable[Problem], *, alone: bool = False
) -> Contents:
    """A checkpoint that was read. ``alone``: a single file, without a config."""
    companions = part_names(weights)
    names = (name for name in checkpoint.folder.sizes() if name.endswith(".safetensors"))
    errors = dict.fromkeys(problem.kind for problem in problems if problem.severity == "error")
    return Contents(
        library=None if alone else checkpoint.library,
        architecture=checkpoint.architecture,
        config=checkpoint.config,
        packed={name: Packed(each.kind, each.shape, each.parts["weight"].dtype) for name, each in weights.items()},
        plain={name: tensor.shape for name, tensor in checkpoint.tensors.items() if name not in companions},
        kept_linears=() if alone else _kept_linears(checkpoint, weights, companions),
        files=checkpoint.files,
        others=() if alone else tuple(name for name in names if name not in checkpoint.files),
        has_index=checkpoint.index is not None,
        errors=tuple(kind for kind in errors if not (alone and kind == LAYOUT)),
    )


def judged(found: Inspection, contents: Contents, names: Sequence[str]) -> Inspection:
    """With what the consumers make of it. A layout of other tools is no error where one of them is named."""
    verdicts = judge(contents, names)
    problems = found.problems
    if any(verdict.loads is not False for verdict in verdicts.values()):
        problems = tuple(each._replace(severity="warning") if each.kind == LAYOUT else each for each in problems)
    return replace(found, consumers=verdicts, problems=worst_first(problems))


def _kept_linears(
    checkpoint: Checkpoint, weights: Mapping[str, QuantizedWeight], companions: Iterable[str]
) -> tuple[str, ...]:
    """As qz recorded them when it wrote the checkpoint; otherwise by an estimate from names and shapes."""
    try:
        record = read_record(checkpoint.folder)
    except QzError:
        record = None
    told = record.about.get("skipped") if record is not None else None
    if isinstance(told, list):
        return tuple(str(path) for path in told if f"{path}.weight" in checkpoint.tensors)
    apart = set(companions)
    plain = [
        Value(name, tensor.dtype, tensor.shape, tensor.nbytes)
        for name, tensor in checkpoint.tensors.items()
        if name not in apart
    ]
    found = values(checkpoint.library, checkpoint.architecture, checkpoint.config, plain)
    return tuple(each.name.removesuffix(".weight") for each in found if each.linear and each.name not in weights)


def verdicts_on_pipeline(parts: Mapping[str, Contents], names: Iterable[str]) -> dict[str, Verdict]:
    """What the consumers make of a diffusers pipeline, from its components that have weights."""
    return {name: _on_pipeline(CONSUMERS[name], parts) for name in names}


def _on_pipeline(consumer: Consumer, parts: Mapping[str, Contents]) -> Verdict:
    each = {part: judge(contents, [consumer.name])[consumer.name] for part, contents in parts.items()}
    if all(verdict.loads is None for verdict in each.values()):
        return Verdict(consumer.name, consumer.package, None)
    if consumer.name in OF_ONE_MODEL:
        finding = Finding("error", "pipeline", "loads one model, not a pipeline. Name a component with --subfolder.")
        return Verdict(consumer.name, consumer.package, False, (finding,))
    if consumer.name == "comfyui":
        finding = Finding("error", "pipeline", "loads single files, not the folder of a pipeline.")
        return Verdict(consumer.name, consumer.package, False, (finding,))
    if consumer.name == "invokeai":
        text = (
            "loads the folder of a pipeline as diffusers does, which was not checked; --subfolder judges a component."
        )
        return Verdict(consumer.name, consumer.package, None, (Finding("warning", "pipeline", text),))
    findings = tuple(
        Finding(finding.severity, finding.rule, f"{part}: {finding.message}")
        for part, verdict in each.items()
        for finding in verdict.findings
    )
    return Verdict(consumer.name, consumer.package, not any(f.severity == "error" for f in findings), findings)
