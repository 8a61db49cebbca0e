"""What a conversion did, or what a comparison found, as an HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, TypeVar

from qz.cli.output import Column, percent, quantity, size
from qz.cli.reports.markup import Markup, chart, columns, facts, page, section, table, tag
from qz.cli.reports.model import LAYERS, described, lost
from qz.cli.reports.pipeline import COLUMNS, report, row
from qz.cli.reports.tensors import natural_key
from qz.counted import counted

if TYPE_CHECKING:
    from qz.cli.reports.picture import Chart
    from qz.quantize.calibration.compare import Comparison
    from qz.quantize.reports.pipeline_summary import PipelineSummary
    from qz.quantize.reports.summary import Summary
    from qz.quantize.streaming.measuring.loss import LayerLoss, Loss

Value = TypeVar("Value")
KEPT = (Column("module"), Column("why it is not quantized"))


def conversion_page(summary: Summary | PipelineSummary) -> str:
    """The page of a model, or of a pipeline and each of its models."""
    from qz.quantize.reports.pipeline_summary import PipelineSummary

    name = PurePath(summary.output or summary.source.location).name
    title = f"{name}: {summary.act}d, {summary.method}"
    if not isinstance(summary, PipelineSummary):
        return page(title, facts(by_name(described(summary))), sizes(summary), *layers(summary))
    parts = [facts(by_name(report(summary))), sizes(summary)]
    made = [row(component) for component in summary.components if component.bytes]
    parts.append(section("Components", table("What became of each", COLUMNS, made)))
    parts += [
        section(component.name, facts(of_component(component.model)), *layers(component.model))
        for component in summary.components
        if component.model is not None
    ]
    return page(title, *parts)


def of_component(model: Summary) -> list[tuple[str, str]]:
    """Its rows without those that are of the whole run."""
    return [(label, value) for label, value in described(model) if label not in ("source", "output", "took")]


def comparison_page(found: Comparison, rows: Sequence[tuple[str, str]], charts: Sequence[Chart]) -> str:
    """``rows``: its report as labels and values; ``charts``: what its picture shows."""
    parts = [facts(rows)]
    for each in charts:
        listed = [(name, f"{value:.4f}") for name, value in each.values]
        figures = table("The same in figures", (Column(each.noun), Column("relative error", right=True)), listed)
        parts.append(section(f"{each.noun}s".capitalize(), columns(each.title, each.values), figures))
    parts.append(section("Layers", *losses(found.loss)))
    return page(f"{PurePath(found.other).name} against {PurePath(found.original).name}", *parts)


def by_name(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """``rows`` without the folders of this machine, as the page may be published."""
    return [
        (label, PurePath(value).name if label in ("source", "output") and value.startswith(("/", ".", "~")) else value)
        for label, value in rows
    ]


def sizes(summary: Summary | PipelineSummary) -> Markup:
    """Before and after, on disk and in memory."""
    pairs = [
        ("on disk", summary.bytes_source, summary.bytes_output),
        ("in memory", summary.footprint_before, summary.footprint_after),
    ]
    bars = [
        (f"{place}, {when}", float(count), size(count))
        for place, *counts in pairs
        for when, count in zip(("before", "after"), counts, strict=True)
    ]
    rows = [(place, f"{before:,}", f"{after:,}", percent(after, before)) for place, before, after in pairs]
    titles = ("", "bytes before", "bytes after", "of before")
    heads = [Column(title, right=bool(title)) for title in titles]
    return section("Sizes", chart("Of the weights, and of the loaded model", bars), table("In bytes", heads, rows))


def layers(summary: Summary) -> list[Markup]:
    """What each quantized layer lost, if that was measured, and why others were left as they are."""
    parts = []
    if summary.loss is not None:
        parts.append(section("What the layers lost", *losses(summary.loss)))
    elif summary.act == "quantize":
        told = (
            f"{quantity(summary.quantized_parameters)} of {quantity(summary.parameters)} parameters are quantized. "
            "What each layer lost was not measured; --report does that."
        )
        parts.append(section("What the layers lost", tag("p", told)))
    if summary.skipped:
        kept = "it is" if len(summary.skipped) == 1 else "they are"
        caption = f"{counted(len(summary.skipped), 'linear layer')} left as {kept}"
        parts.append(section("What is not quantized", table(caption, KEPT, in_order(summary.skipped.items()))))
    return parts


def losses(loss: Loss) -> list[Markup]:
    """A bar for each layer, in the order of the names, and all figures, worst first."""
    ordered = in_order((layer.name, layer) for layer in loss.layers)
    told = "Relative error of each layer's weights, in the order of their names"
    drawn = columns(told, [(name, finite(layer)) for name, layer in ordered])
    rows = [lost(loss.total), *map(lost, loss.layers)]
    return [drawn, table("All together, then each layer, largest error first", LAYERS, rows)]


def in_order(named: Iterable[tuple[str, Value]]) -> list[tuple[str, Value]]:
    """In the order of the names, in which 10 comes after 9."""
    return sorted(named, key=lambda pair: natural_key(pair[0]))


def finite(layer: LayerLoss) -> float:
    """The relative error as the height of a bar."""
    return layer.relative_error if math.isfinite(layer.relative_error) else 0.0
