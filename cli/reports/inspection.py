"""The report of ``qz inspect``: facts, tables of dtypes, components and estimates, the tensors, and the problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qz.cli.output import Column, facts, fold, percent, quantity, say, show, size, table, terminal_width
from qz.cli.reports.tensors import COLUMNS, grouped, matching, single
from qz.counted import counted, shown
from qz.quantize.methods import LOW_COVERAGE

if TYPE_CHECKING:
    from qz.formats.checkpoint.problems import Problem
    from qz.quantize.consumers.verdict import Verdict
    from qz.quantize.inspection.estimate import Estimate
    from qz.quantize.inspection.pipeline import ComponentInspection, PipelineInspection
    from qz.quantize.inspection.report import Inspection, Quantization, Verified

SHOWN = 20
"""Problems that the report shows; the JSON has all."""
NAMES = {"nf4_double_quant": "nf4 + double"}
ESTIMATES = (
    Column("quantized"),
    Column("on disk", right=True),
    Column("in memory", right=True),
    Column("share", right=True),
)
DTYPES = (
    Column("stored as"),
    Column("tensors", right=True),
    Column("parameters", right=True),
    Column("bytes", right=True),
)
COMPONENTS = (
    Column("component"),
    Column("class", foldable=True),
    Column("parameters", right=True),
    Column("on disk", right=True),
    Column("in memory", right=True),
    Column("quantization"),
)


def present(
    found: Inspection | PipelineInspection, *, as_json: bool, listed: bool, pattern: str | None, quiet: bool = False
) -> None:
    """The report on stdout: the table or the JSON of the same value."""
    if as_json:
        value = found.as_json()
        if listed:
            value["tensors"] = matching(found.tensors, pattern)
        show(value, as_json=True, text="")
        return
    show(None, as_json=False, text="\n\n".join(part for part in sections(found, listed, pattern) if part))
    if not quiet and listed and pattern is None:
        note = "Similar layers are grouped; --filter '*' lists each tensor."
        say(*fold(note, terminal_width() or len(note)))


def sections(found: Inspection | PipelineInspection, listed: bool, pattern: str | None) -> Iterable[str]:
    """The parts of the report, those that say nothing left empty."""
    components = getattr(found, "components", None)
    yield facts(described(found, components))
    rows = [row(component) for component in components or () if component.model is not None]
    if rows:
        yield table(COMPONENTS, rows)
    if len(found.dtypes) > 1:
        shares = [
            (dtype, f"{share.tensors:,}", quantity(share.parameters), size(share.bytes))
            for dtype, share in found.dtypes.items()
        ]
        yield table(DTYPES, shares)
    if found.estimates:
        yield estimated(found, components)
    if listed:
        tensors = matching(found.tensors, pattern)
        rows_of = grouped if pattern is None else single
        yield table(COLUMNS, rows_of(tensors)) if tensors else "no tensor matches"
    yield judged(found.consumers)
    yield complaints(found.problems)


def judged(verdicts: Mapping[str, Verdict]) -> str:
    """A line for each consumer that was asked for, and one for each finding."""
    rows = []
    for verdict in verdicts.values():
        loads = {True: "loads", False: "does not load", None: "not judged"}[verdict.loads]
        if verdict.loads is None and not verdict.findings:
            loads += ": nothing is quantized with bitsandbytes"
        rows.append((verdict.consumer, f"{loads} ({verdict.package})"))
        rows += [("", f"{finding.severity}: {finding.message}") for finding in verdict.findings]
    return facts(rows) if rows else ""


def described(
    found: Inspection | PipelineInspection, components: Sequence[ComponentInspection] | None
) -> list[tuple[str, str]]:
    """What it is, as labels and values."""
    source = found.source
    place = source.location + (f" ({source.subfolder})" if source.subfolder else "")
    rows = [("source", place + (f" at {source.revision[:12]}" if source.revision else ""))]
    if source.architecture or source.library:
        rows.append(("pipeline" if components is not None else "model", model_name(found)))
    if found.parameters is not None and found.bytes is not None:
        count = sum(share.tensors for share in found.dtypes.values())
        rows.append(("parameters", f"{quantity(found.parameters)} in {counted(count, 'tensor')}"))
        shards = sum(file.tensors is not None for file in found.files)
        dtypes = f", {next(iter(found.dtypes))}" if len(found.dtypes) == 1 else ""
        rows.append(("on disk", f"{size(found.bytes)} in {counted(shards, 'file')}{dtypes}"))
    elif found.files:
        weights = [file for file in found.files if file.name.endswith(".safetensors")]
        rows.append(("files", f"{len(found.files):,}, {len(weights):,} of them weights"))
    if found.memory_footprint is not None:
        about = "" if found.memory_footprint_exact else ", without buffers that are in no file"
        rows.append(("in memory", size(found.memory_footprint) + about))
    if found.quantization is not None:
        rows += quantization(found.quantization, found.parameters or 0)
    rows += [("tied", f"{name} = {stored}") for name, stored in found.ties.items()]
    if components:
        others = [component.name for component in components if component.model is None]
        rows += [("no weights", ", ".join(others))] if others else []
    if found.verified is not None:
        rows.append(("verified", verification(found.verified)))
    return rows


def model_name(found: Inspection | PipelineInspection) -> str:
    """The class, and its library."""
    source = found.source
    return f"{source.architecture or 'no class named'}" + (f" ({source.library})" if source.library else "")


def quantization(how: Quantization, parameters: int) -> list[tuple[str, str]]:
    """How it is quantized."""
    parts = [how.method + (" + double quant" if how.double_quant else "")]
    parts += [f"blocks of {how.block_size}"] if how.block_size else []
    parts += [f"computes in {how.compute_dtype}"] if how.compute_dtype else []
    parts += [f"stored as {how.storage}"] if how.storage else []
    parts += [f"outliers beyond {how.threshold:g} in fp16"] if how.threshold is not None else []
    rows = [("quantization", ", ".join(parts))]
    if how.quantized_parameters is not None:
        share = percent(how.quantized_parameters, parameters)
        count = how.quantized_tensors or 0
        rows.append(("quantized", f"{share} of the parameters, {counted(count, 'weight')}"))
    if how.skipped is not None:
        rows.append(("skipped", shown(how.skipped, 6) or "none (library defaults disabled)"))
    return rows


def verification(verified: Verified) -> str:
    """What was verified, and the outcome."""
    what = f"{counted(verified.files, 'file')}, {size(verified.bytes)} read"
    return f"{what}: all as qz wrote them" if verified.intact else f"{what}: not as qz wrote them"


def row(component: ComponentInspection) -> tuple[str, ...]:
    """A component's cells."""
    model = component.model
    assert model is not None
    how = model.quantization
    method = "–" if how is None else how.method + (" + double quant" if how.double_quant else "")
    if model.errors:
        method = f"{counted(len(model.errors), 'error')}, see below"
    return (
        component.name,
        model.source.architecture or component.architecture,
        quantity(model.parameters) if model.parameters is not None else "?",
        size(model.bytes) if model.bytes is not None else "?",
        size(model.memory_footprint) if model.memory_footprint is not None else "?",
        method,
    )


def estimated(found: Inspection | PipelineInspection, components: Sequence[ComponentInspection] | None) -> str:
    """What quantizing would give, and how sure that is."""
    assert found.estimates is not None
    rows = [estimate(NAMES.get(name, name), each, found.parameters or 0) for name, each in found.estimates.items()]
    notes = []
    if max(each.quantized_parameters for each in found.estimates.values()) < LOW_COVERAGE * (found.parameters or 0):
        notes.append(
            "Most parameters would stay: only linear layers are quantized, not embeddings or experts (--experts)."
        )
    if components:
        chosen = [component.name for component in components if component.chosen]
        notes.append(f"With {', '.join(chosen)} quantized.")
    if not all(each.exact for each in found.estimates.values()):
        notes.append("Estimated from names and shapes; --plan asks the model's library.")
    lines = [line for note in notes for line in fold(note, terminal_width() or len(note))]
    return "\n".join([table(ESTIMATES, rows), *lines])


def estimate(name: str, each: Estimate, parameters: int) -> tuple[str, ...]:
    """A row of ``ESTIMATES``."""
    return name, size(each.bytes), size(each.memory_footprint), percent(each.quantized_parameters, parameters)


def complaints(problems: Sequence[Problem]) -> str:
    """Problems, worst first, each with what to do."""
    if not problems:
        return ""
    rows: list[tuple[str, Any]] = [(problem.severity, problem.message) for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        rows.append(("", f"… and {len(problems) - SHOWN} more, see --json"))
    return facts(rows)
