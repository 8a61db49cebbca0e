"""``qz compare``: options in, one call of ``qz.api``, its report as a table or JSON out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.cli import options
from qz.cli.output import facts, show, table, took, warn
from qz.cli.progress import Display, timed
from qz.cli.report import LAYERS, lost, worst_layers

if TYPE_CHECKING:
    from qz.quantize.calibration.compare import Comparison


def compare(
    original: options.OriginalArg,
    other: options.OtherArg,
    subfolder: options.SubfolderOpt = None,
    text: options.TextOpt = None,
    tokens: options.TokensOpt = None,
    device: options.DeviceOpt = "auto",
    as_json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
) -> None:
    """Show what quantizing changed: in each layer's weights, and in what the model makes of a text."""
    from qz import api
    from qz.quantize.compute.allocator import return_freed_memory
    from qz.quantize.libraries.importing import lean_imports

    lean_imports.forbid()  # the models run
    return_freed_memory()
    with Display(quiet=quiet) as display:
        found = api.compare(
            original, other, subfolder=subfolder, text=text, tokens=tokens, device=device, on_progress=display
        )
    for warning in found.warnings:
        warn(warning)
    found = timed(found)
    parts = [facts(report(found)), table(LAYERS, worst_layers(found.loss))]
    show(found.as_json(), as_json=as_json, text="\n\n".join(parts))


def report(found: Comparison) -> list[tuple[str, str]]:
    """The result as labels and values."""
    sequences = "1 sequence" if found.sequences == 1 else f"{found.sequences:,} sequences"
    text = "qz's own" if found.text == "default" else found.text
    rows = [("model", found.architecture), ("text", f"{text}: {found.tokens:,} tokens in {sequences}")]
    if found.kl is not None:
        noise = f" ± {found.kl_error:.4f}" if found.kl_error is not None else ""
        rows.append(("KL divergence", f"{found.kl:.4f}{noise} nats per token"))
    if found.same_top is not None:
        rows.append(("same prediction", f"{found.same_top:.1%} of the tokens"))
    if found.perplexity_original is not None:
        rows.append(("perplexity", f"{found.perplexity_original:.2f} → {found.perplexity_other:.2f}"))
    if found.cosine_loss is not None:
        rows.append(("1 − cosine", f"{found.cosine_loss:.4f}, of the mean last hidden states"))
    _, _, error, ratio, largest = lost(found.loss.total)
    rows.append(("weights", f"relative error {error}, SNR {ratio}, largest error {largest}"))
    return [*rows, ("took", took(found.seconds, f"{found.device} in {found.dtype}", 0))]
