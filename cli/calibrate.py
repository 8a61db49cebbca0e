"""``qz calibrate``: options in, one call of ``qz.api``, its report as a table or JSON out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.cli import options
from qz.cli.output import facts, show, size, took, warn
from qz.cli.progress import Display, timed

if TYPE_CHECKING:
    from qz.quantize.calibration.run import Calibration


def calibrate(
    source: options.SourceArg,
    output: options.StatisticsOpt,
    subfolder: options.SubfolderOpt = None,
    revision: options.RevisionOpt = None,
    variant: options.VariantOpt = None,
    text: options.TextOpt = None,
    tokens: options.TokensOpt = None,
    hessians: options.HessiansOpt = False,
    device: options.DeviceOpt = "auto",
    as_json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
) -> None:
    """Run a 16-bit model of transformers on a text, block by block, and record the inputs of its linear layers."""
    from qz import api
    from qz.quantize.compute.allocator import return_freed_memory
    from qz.quantize.libraries.importing import lean_imports

    lean_imports.forbid()  # the model runs
    return_freed_memory()
    with Display(quiet=quiet) as display:
        found = api.calibrate(
            source,
            output,
            subfolder=subfolder,
            revision=revision,
            variant=variant,
            text=text,
            tokens=tokens,
            hessians=hessians,
            device=device,
            on_progress=display,
        )
    for warning in found.warnings:
        warn(warning)
    found = timed(found)
    show(found.as_json(), as_json=as_json, text=facts(report(found)))


def report(found: Calibration) -> list[tuple[str, str]]:
    """The result as labels and values."""
    sequences = "1 sequence" if found.sequences == 1 else f"{found.sequences:,} sequences"
    text = "qz's own" if found.text == "default" else found.text
    rows = [
        ("model", f"{found.architecture}, {found.linears:,} linear layers"),
        ("text", f"{text}: {found.tokens:,} tokens in {sequences}"),
        ("statistics", found.output),
    ]
    if found.hessian_files:
        rows.append(("Hessians", f"{len(found.hessian_files):,} files beside it, {size(found.hessian_bytes)}"))
    return [*rows, ("time", took(found.seconds, f"{found.device} in {found.dtype}", found.bytes_read))]
