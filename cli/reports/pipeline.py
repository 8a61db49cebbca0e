"""Whole pipelines for ``qz quantize`` and ``qz dequantize``: a row for each component, and the total."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.cli.output import Column, Section, percent, quantity, size
from qz.cli.reports.model import (
    LAYERS,
    bits,
    closing_rows,
    fused_loras,
    kept_layers,
    place_of,
    refined,
    worst_layers,
)

if TYPE_CHECKING:
    from qz.quantize.reports.pipeline_summary import ComponentSummary, PipelineSummary

COLUMNS = (
    Column("component"),
    Column("weights", right=True),
    Column("in memory", right=True),
    Column("method"),
    Column("why", foldable=True),
)
COMBINATIONS = (
    Column("in memory", right=True),
    Column("quantized", foldable=True),
    Column("weight error", right=True),
    Column(""),
)
BAR = 20
"""Characters of the longest."""


def pipeline_sections(summary: PipelineSummary) -> list[Section]:
    """A row for each component with weights, then the whole."""
    components = [row(component) for component in summary.components if component.bytes]
    sections = [Section(components, COLUMNS), Section(report(summary))]
    if summary.loss is not None:
        sections.append(Section(worst_layers(summary.loss), LAYERS))
    if summary.dry_run and summary.combinations:
        sections.append(Section(combinations(summary), COMBINATIONS))
    return sections


def combinations(summary: PipelineSummary) -> list[tuple[str, ...]]:
    """Sizes, the methods that they leave room for, and what the weights are expected to lose; the chosen one marked."""
    most = max(each.error for each in summary.combinations) or 1.0
    fits = [each for each in summary.combinations if each.size <= summary.footprint_after]
    return [
        (
            ("→ " if fits and each is fits[-1] else "") + size(each.size),
            ", ".join(f"{option.component} {option.method.name}" for option in each.options if option.method) or "–",
            f"{each.error:.4f}",
            "█" * round(BAR * each.error / most),
        )
        for each in summary.combinations
    ]


def row(component: ComponentSummary) -> tuple[str, ...]:
    """A component's cells."""
    weights, memory = size(component.bytes), size(component.footprint_before)
    if not component.converted:
        if component.cast is not None:
            weights = f"{weights} → {size(component.bytes_output)}"
            memory = f"{memory} → {size(component.footprint_after)}"
        return component.name, weights, memory, "–", component.reason
    model = component.model
    assert model is not None
    method = model.method + (" + double quant" if model.double_quant else "")
    return (
        component.name,
        f"{weights} → {size(component.bytes_output)}",
        f"{memory} → {size(component.footprint_after)}",
        f"{method} → {model.dtype}" if model.act == "dequantize" else method,
        component.reason,
    )


def report(summary: PipelineSummary) -> list[tuple[str, str]]:
    """The whole as labels and values."""
    share = percent(summary.quantized_parameters, summary.parameters)
    saved = f"{size(summary.bytes_source)} → {size(summary.bytes_output)}"
    rows = [
        ("source", summary.source.location),
        ("pipeline", str(summary.source.architecture)),
        ("output", place_of(summary)),
        *fused_loras(summary),
        *refined(summary.refinement),
        ("parameters", f"{quantity(summary.parameters)}, {share} of them quantized"),
        ("on disk", saved + bits(summary)),
        ("in memory", f"{size(summary.footprint_before)} → {size(summary.footprint_after)}"),
    ]
    if summary.kept_layers is not None:
        rows.append(("kept", kept_layers(summary.kept_layers)))
    others = [component.name for component in summary.components if not component.bytes]
    if others:
        rows.append(("unchanged", ", ".join(others)))
    return rows + closing_rows(summary)
