"""What a conversion did, for people and for scripts: the summary and the loss as tables, JSON and Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from qz.cli.output import (
    Column,
    facts,
    markdown,
    markdown_table,
    percent,
    plain,
    quantity,
    say,
    show,
    size,
    table,
    warn,
    write_step_summary,
)

if TYPE_CHECKING:
    from pathlib import Path

    from qz.formats.output.record import Record
    from qz.formats.publish.destination import PushResult
    from qz.quantize.streaming.loss import LayerLoss, Loss
    from qz.quantize.summary import Summary

WORST = 10
"""Layers that the table of the loss shows; the JSON has all."""
LAYERS = (
    Column("layer", foldable=True),
    Column("parameters", right=True),
    Column("relative error", right=True),
    Column("SNR", right=True),
    Column("largest error", right=True),
)


def present(summary: Summary, *, as_json: bool, quiet: bool = False, pushed: PushResult | None = None) -> None:
    """The report of a conversion: a table or JSON on stdout, warnings on stderr, Markdown for a CI job's page."""
    for warning in summary.warnings:
        warn(warning)
    rows = described(summary)
    text = facts(rows)
    layers = worst_layers(summary.loss) if summary.loss else []
    if layers:
        text += f"\n\n{table(LAYERS, layers)}"
    show(with_push(summary.as_json(), pushed), as_json=as_json, text=text + push_text(pushed))
    if not quiet and not as_json and summary.dry_run:
        columns = (Column("file", foldable=True), Column("bytes", right=True))
        say(table(columns, [(shard.name, f"{shard.bytes:,}") for shard in summary.shards]))
    if not summary.dry_run:
        page = f"### qz {summary.act}: {summary.method}\n\n" + markdown_table((Column(""), Column("")), rows)
        write_step_summary(page + (f"\n\n{markdown_table(LAYERS, layers)}" if layers else ""))


def with_push(value: dict[str, Any], pushed: PushResult | None) -> dict[str, Any]:
    """The JSON of a conversion, with that of the push that followed it."""
    return {**value, "push": pushed.as_json()} if pushed is not None else value


def push_text(pushed: PushResult | None) -> str:
    if pushed is None:
        return ""
    from qz.cli.push import report

    return f"\n\n{facts(report(pushed))}"


def present_existing(
    record: Record, output: Path, source: str, *, as_json: bool, pushed: PushResult | None = None
) -> None:
    """A run with nothing to do: the report of the one that made the output."""
    from qz.quantize.up_to_date import as_report

    text = f"{output} is up to date: made from the same source with the same settings, and complete. Nothing to do."
    say(text, quiet=not as_json)
    value = with_push(as_report(record, output, source), pushed)
    show(value, as_json=as_json, text=plain(text) + push_text(pushed))
    write_step_summary(f"### qz\n\n{markdown(text)}")


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
        ("output", summary.output + (" (dry run: nothing written)" if summary.dry_run else "")),
        ("method", f"{method} → {summary.dtype}" if back else f"{method}, {summary.dtype} elsewhere"),
        ("parameters", f"{quantity(summary.parameters)}, {share} of them {'were ' if back else ''}quantized"),
        ("on disk", f"{saved} ({summary.bits_per_weight:.2f} bits per weight)"),
        ("in memory", f"{size(summary.footprint_before)} → {size(summary.footprint_after)}"),
    ]
    if summary.skipped:
        names = list(summary.skipped)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        rows.append(("left alone", f"{shown} ({', '.join(sorted(set(summary.skipped.values())))})"))
    if summary.loss:
        _, _, error, ratio, largest = lost(summary.loss.total)
        rows.append(("loss", f"relative error {error}, SNR {ratio}, largest error {largest}"))
    if not summary.dry_run:
        rate = summary.bytes_source / summary.seconds if summary.seconds else 0
        rows.append(("took", f"{summary.seconds:.1f} s on {summary.device} ({size(rate)}/s)"))
    return rows


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
