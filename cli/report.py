"""What a conversion did, for people and for scripts: the summary and the loss as tables, JSON and Markdown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import UsageError
from qz.cli.new_file import require_new, store
from qz.cli.output import (
    Column,
    Section,
    facts,
    markdown,
    percent,
    plain,
    quantity,
    say,
    show,
    size,
    table,
    took,
    warn,
    write_step_summary,
)
from qz.counted import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qz.formats.publish.destination import PushResult
    from qz.quantize.pipeline_summary import PipelineSummary
    from qz.quantize.planning.kept_layers import KeptLayers
    from qz.quantize.streaming.loss import LayerLoss, Loss
    from qz.quantize.summary import Summary
    from qz.quantize.up_to_date import UpToDate

FILES = (Column("file", foldable=True), Column("bytes", right=True))
CURVE = (
    Column("in memory", right=True),
    Column("kept", right=True),
    Column("expected loss", right=True),
    Column(""),
)
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


def require_place(page: Path | None, output: Path | None, *, dry_run: bool) -> None:
    """Raise for a --page that could not be written when all else is done. It may lie in the output, which comes."""
    if page is None:
        return
    if dry_run:
        raise UsageError("--page tells of what was done, and --dry-run does nothing. Leave one of them out.")
    if output is None or page.parent != output:
        require_new(page, "--page")


def present(
    summary: Summary | PipelineSummary | UpToDate, *, as_json: bool, quiet: bool = False, page: Path | None = None
) -> None:
    """The report of a conversion: a table or JSON on stdout, warnings on stderr, Markdown for a CI job's page.

    ``page``: the file to write it to as HTML as well.
    """
    from qz.cli.pipeline_report import pipeline_sections
    from qz.quantize.pipeline_summary import PipelineSummary
    from qz.quantize.up_to_date import UpToDate

    if summary.pushed is not None:
        for note in summary.pushed.notes:
            say(f"Note: {note}.", quiet=quiet)
    if isinstance(summary, UpToDate):
        for note in summary.notes:
            warn(note)
        if page is not None:
            warn(f"{page} was not written: nothing was done that it could tell of")
        present_existing(summary, as_json=as_json)
        return
    if page is not None:
        from qz.cli.report_page import conversion_page

        store(page, conversion_page(summary), "--page")
    for warning in summary.warnings:
        warn(warning)
    sections = pipeline_sections(summary) if isinstance(summary, PipelineSummary) else model_sections(summary)
    sections += kept_sections(summary)
    texts = [*(section.text() for section in sections), *pushed_text(summary.pushed)]
    show(summary.as_json(), as_json=as_json, text="\n\n".join(texts), done=outcome(summary))
    if not summary.dry_run:
        shown = [section.markdown() for section in sections]
        write_step_summary("\n\n".join([f"### qz {summary.act}: {summary.method}", *shown]))
    elif not quiet and not as_json:
        say(*table(FILES, [(shard.name, f"{shard.bytes:,}") for shard in summary.shards]).split("\n"))


def present_existing(found: UpToDate, *, as_json: bool) -> None:
    """A run with nothing to do: the report of the one that made the output."""
    text = (
        f"{found.output} is up to date: made from the same source with the same settings, and complete. Nothing to do."
    )
    say(text, quiet=not as_json)
    show(found.as_json(), as_json=as_json, text="\n\n".join([plain(text), *pushed_text(found.pushed)]), done=text)
    write_step_summary(f"### qz\n\n{markdown(text)}")


def outcome(summary: Summary | PipelineSummary) -> str:
    """What holds after the run, whether or not its report can be written."""
    if summary.dry_run:
        return ""
    made = f"{summary.output} is complete. " if summary.output else ""
    return made + (f"{summary.pushed.url} has it. " if summary.pushed else "") + "There is nothing to run again."


def pushed_text(pushed: PushResult | None) -> list[str]:
    """The report of the push that followed, if one did."""
    from qz.cli.push import report

    return [] if pushed is None else [facts(report(pushed))]


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
        *([("scales", refined(summary.refinement))] if summary.refinement.get("scales") == "search" else []),
        *fused_loras(summary),
        ("parameters", f"{quantity(summary.parameters)}, {share} of them {'were ' if back else ''}quantized"),
        ("on disk", f"{saved} ({summary.bits_per_weight:.2f} bits per weight)"),
        ("in memory", f"{size(summary.footprint_before)} → {size(summary.footprint_after)}"),
    ]
    if summary.kept_layers is not None:
        rows.append(("kept", kept_layers(summary.kept_layers)))
    if summary.skipped:
        names = list(summary.skipped)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        rows.append(("not quantized", f"{shown} ({', '.join(sorted(set(summary.skipped.values())))})"))
    rows += left_out(summary)
    if summary.loss:
        _, _, error, ratio, largest = lost(summary.loss.total)
        rows.append(("loss", f"relative error {error}, SNR {ratio}, largest error {largest}"))
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
    names = summary.left_out
    if not names:
        return []
    shown = ", ".join(plain(name) for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return [("left out", shown)]


def refined(how: Mapping[str, Any]) -> str:
    """How scales and codes were chosen, where not as the libraries do."""
    importance = how["importance"]
    text = "searched"
    if importance is not None:
        text += f" with {importance['file']} ({quantity(importance['tokens'])} tokens)"
    return text + (", rounded by GPTQ" if how["rounding"] == "gptq" else "")


def kept_sections(summary: Summary | PipelineSummary) -> list[Section]:
    """In a dry run, what each size would lose: a table with a picture in it, of each model whose layers were chosen."""
    models: Sequence[Summary] = getattr(summary, "models", None) or [summary]
    return [Section(curve_rows(each), CURVE) for each in models if each.kept_layers is not None and each.dry_run]


def curve_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Points from nothing kept to everything, and the chosen one; bars show the loss, or sizes where none is known."""
    from qz.quantize.planning.kept_layers import Point

    kept = summary.kept_layers
    assert kept is not None  # the caller looked
    chosen = Point(len(kept.kept), summary.footprint_after, kept.loss)
    last = len(kept.curve) - 1
    some = [kept.curve[number] for number in sorted({round(n * last / (POINTS - 1)) for n in range(POINTS)})]
    points = sorted([chosen, *(point for point in some if point != chosen)], key=lambda point: point.size)
    values = [float(point.size if point.loss is None else point.loss) for point in points]
    most = max(values) or 1.0
    return [
        (
            ("→ " if point is chosen else "") + size(point.size),
            f"{point.kept:,}",
            "–" if point.loss is None else f"{point.loss:.4f}",
            "█" * round(BAR * value / most),
        )
        for point, value in zip(points, values, strict=True)
    ]


def kept_layers(kept: KeptLayers) -> str:
    """What stays unquantized for a size or a loss, and how it was chosen."""
    by = f"scores of {kept.scores['file']}" if kept.scores is not None else "names and places, without data"
    expected = f"; expected loss {kept.loss:.4g} (by absmax scales)" if kept.loss is not None else ""
    return f"{counted(len(kept.kept), 'linear')}, by {by}{expected}"


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
