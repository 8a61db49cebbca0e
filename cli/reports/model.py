"""One model for ``qz quantize`` and ``qz dequantize``: labels and values, the layers that lost most, and what stays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from qz.cli.output import Column, Section, percent, plain, quantity, size, took
from qz.counted import counted, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qz.quantize.planning.budget.kept_layers import KeptLayers
    from qz.quantize.reports.pipeline_summary import PipelineSummary
    from qz.quantize.reports.summary import Summary
    from qz.quantize.streaming.measuring.loss import LayerLoss, Loss

POINTS, BAR = 12, 30
"""Rows of that table, and characters of its longest bar."""
WORST = 10
"""Layers that the table of the loss shows; the JSON has all."""
LAYERS = (
    Column("layer", foldable=True),
    Column("parameters", right=True),
    Column("relative error", right=True),
    Column("SNR", right=True),
    Column("largest error", right=True),
)


def model_sections(summary: Summary) -> list[Section]:
    """A model: labels and values, then the layers that lost most if that was measured."""
    layers = worst_layers(summary.loss) if summary.loss else []
    return [Section(described(summary)), *([Section(layers, LAYERS)] if layers else [])]


def described(summary: Summary) -> list[tuple[str, str]]:
    """The summary as labels and values."""
    source = summary.source
    method = summary.method + (" + double quant" if summary.double_quant else "")
    saved = f"{size(summary.bytes_source)} → {size(summary.bytes_output)}"
    back = summary.act == "dequantize"
    share = percent(summary.quantized_parameters, summary.parameters)
    rows = [
        ("source", source.location + (f" ({source.subfolder})" if source.subfolder else "")),
        ("model", f"{source.architecture} ({source.library})"),
        ("output", place_of(summary)),
        ("method", f"{method} → {summary.dtype}" if back else f"{method}, {summary.dtype} elsewhere"),
        *refined(summary.refinement),
        *fused_loras(summary),
        ("parameters", f"{quantity(summary.parameters)}, {share} of them {'were ' if back else ''}quantized"),
        ("on disk", saved + bits(summary)),
        ("in memory", f"{size(summary.footprint_before)} → {size(summary.footprint_after)}"),
    ]
    if summary.kept_layers is not None:
        rows.append(("kept", kept_layers(summary.kept_layers)))
    if summary.skipped:
        why = ", ".join(sorted(set(summary.skipped.values())))
        rows.append(("not quantized", f"{shown(summary.skipped, 4)} ({why})"))
    return rows + closing_rows(summary)


def closing_rows(summary: Summary | PipelineSummary) -> list[tuple[str, str]]:
    """The last rows: what was left out, what was lost, which part was made, and the time."""
    rows = left_out(summary)
    if summary.loss is not None:
        rows.append(("loss", told_of_loss(summary.loss)))
    rows += part_of(summary)
    if not summary.dry_run:
        rows.append(("took", took(summary.seconds, summary.device, summary.bytes_read)))
    return rows


def place_of(summary: Summary | PipelineSummary) -> str:
    """Where the output is, or what a dry run found in its place."""
    place = summary.output or "on the Hub only"
    if not summary.dry_run:
        return place
    left = "; the run would continue an interrupted one" if summary.resumed else ""
    return f"{place} (dry run: nothing written{left})"


def bits(summary: Summary | PipelineSummary) -> str:
    """What follows the size on disk: bits per weight, for which a part has too few bytes."""
    return f" ({summary.bits_per_weight:.2f} bits per weight)" if summary.share is None else " in this part"


def part_of(summary: Summary | PipelineSummary) -> list[tuple[str, str]]:
    """The row of which part this is; none for a run that makes everything."""
    if summary.share is None:
        return []
    own = f"{counted(len(summary.shards), 'weight file')}, {size(sum(shard.bytes for shard in summary.shards))}"
    return [("part", f"{summary.share.number} of {summary.share.count}: {own}")]


def fused_loras(summary: Summary | PipelineSummary) -> list[tuple[str, str]]:
    """A row for each LoRA that was fused into the weights."""
    rows = []
    for lora in summary.loras:
        location, file = lora["location"], lora["file"]
        place = location if location == file else f"{location}/{file}"
        times = f" × {lora['scale']:g}" if lora["scale"] != 1 else ""
        rows.append(("LoRA", f"{plain(place)}{times} (fused into {counted(lora['weights'], 'tensor')})"))
    return rows


def left_out(summary: Summary | PipelineSummary) -> list[tuple[str, str]]:
    """The row of what the source has and the output has not; none if it has everything."""
    return [("left out", shown(map(plain, summary.left_out), 4))] if summary.left_out else []


def refined(how: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The row of how scales and codes were chosen; none where that is as the libraries do."""
    if how.get("scales") != "search":
        return []
    importance = how["importance"]
    text = "searched"
    if importance is not None:
        text += f" with {importance['file']} ({quantity(importance['tokens'])} tokens)"
    return [("scales", text + (", rounded by GPTQ" if how["rounding"] == "gptq" else ""))]


def kept_sections(summary: Summary | PipelineSummary) -> list[Section]:
    """In a dry run, what each size would lose: a table with a picture in it, of each model whose layers were chosen, or
    of the pipeline where its were chosen together."""
    own: Sequence[Summary | PipelineSummary] = getattr(summary, "models", None) or [summary]
    models = [summary] if summary.kept_layers is not None else own
    return [curve(each, summary) for each in models if each.kept_layers is not None and each.dry_run]


def curve(summary: Summary | PipelineSummary, whole: Summary | PipelineSummary) -> Section:
    """Points from nothing kept to everything, and the chosen one; bars show the loss, or sizes where none is known."""
    from qz.quantize.planning.budget.kept_layers import Point

    kept = summary.kept_layers
    assert kept is not None  # checked by the caller
    chosen = Point(len(kept.kept), summary.footprint_after, kept.loss)
    last = len(kept.curve) - 1
    some = [kept.curve[number] for number in sorted({round(n * last / (POINTS - 1)) for n in range(POINTS)})]
    points = sorted([chosen, *(point for point in some if point != chosen)], key=lambda point: point.size)
    values = [float(point.size if point.loss is None else point.loss) for point in points]
    most = max(values) or 1.0
    rows = [
        (
            ("→ " if point is chosen else "") + size(point.size),
            f"{point.kept:,}",
            *([] if point.loss is None else [f"{point.loss:.4f}"]),
            "█" * round(BAR * value / most),
        )
        for point, value in zip(points, values, strict=True)
    ]
    of = "" if summary is whole else f"{summary.source.subfolder} "
    loss = [] if chosen.loss is None else [Column("expected loss", right=True)]
    return Section(rows, (Column(f"{of}in memory", right=True), Column("kept", right=True), *loss, Column("")))


def kept_layers(kept: KeptLayers) -> str:
    """What stays unquantized for a size or a loss, and how it was chosen."""
    by = f"scores of {kept.scores['file']}" if kept.scores is not None else "names and places, without data"
    expected = f"; expected loss {kept.loss:.4g} (by absmax scales)" if kept.loss is not None else ""
    return f"{counted(len(kept.kept), 'linear')}, by {by}{expected}"


def told_of_loss(loss: Loss) -> str:
    """All layers together."""
    _, _, error, ratio, largest = lost(loss.total)
    return f"relative error {error}, SNR {ratio}, largest error {largest}"


def worst_layers(loss: Loss) -> list[tuple[str, ...]]:
    """Rows of ``LAYERS``, worst first."""
    rows: list[tuple[str, ...]] = [lost(layer) for layer in loss.layers[:WORST]]
    if len(loss.layers) > WORST:
        rows.append((f"… and {len(loss.layers) - WORST} more, see --json", "", "", "", ""))
    return rows


def lost(layer: LayerLoss) -> tuple[str, str, str, str, str]:
    """One row of ``LAYERS``."""
    ratio = "no error" if layer.snr_db == math.inf else f"{layer.snr_db:.1f} dB"
    return layer.name, quantity(layer.parameters), f"{layer.relative_error:.4f}", ratio, f"{layer.max_error:.3g}"
