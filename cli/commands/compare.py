"""``qz compare``: options in, one call of ``qz.api``, its report as a table or JSON out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import PurePath
from typing import TYPE_CHECKING

from qz import UsageError
from qz.cli.options import arguments, machine, reports, selection
from qz.cli.output import Column, facts, show, table, took, warn
from qz.cli.progress import Display, timed
from qz.cli.reports import run_on
from qz.cli.reports.model import LAYERS, told_of_loss, worst_layers
from qz.cli.reports.new_file import require_new, store
from qz.cli.reports.picture import Chart, charts

if TYPE_CHECKING:
    from qz.quantize.calibration.compare import Comparison, OutputError

TIMESTEPS = (
    Column("component"),
    Column("timestep", right=True),
    Column("relative squared error", right=True),
    Column("1 − cosine", right=True),
)


def compare(
    original: arguments.OriginalArg,
    other: arguments.OtherArg,
    subfolder: selection.SubfolderOpt = None,
    allow_pickle: selection.AllowPickleOpt = False,
    text: selection.TextOpt = None,
    tokens: selection.TokensOpt = None,
    steps: selection.StepsOpt = None,
    resolution: selection.ResolutionOpt = None,
    seed: selection.SeedOpt = None,
    picture: reports.PictureOpt = None,
    page: reports.PageOpt = None,
    device: machine.DeviceOpt = "auto",
    as_json: reports.JsonOpt = False,
    quiet: reports.QuietOpt = False,
) -> None:
    """Show what quantizing changed: in each layer's weights, and in what the model makes of a text or of prompts."""
    from qz import api
    from qz.quantize.compute.allocator import return_freed_memory
    from qz.quantize.libraries.importing import lean_imports

    for path, option in ((picture, "--picture"), (page, "--page")):
        if path is not None:
            require_new(path, option)
    if page is not None and picture is not None and os.path.abspath(page) == os.path.abspath(picture):
        raise UsageError(f"{page} cannot be the page and the picture. Name two files.")
    lean_imports.forbid()  # the models need the whole libraries to run
    return_freed_memory()
    with Display(quiet=quiet) as display:
        found = api.compare(
            original,
            other,
            subfolder=subfolder,
            allow_pickle=allow_pickle,
            text=text,
            tokens=tokens,
            steps=steps,
            resolution=resolution,
            seed=seed,
            device=device,
            on_progress=display,
        )
    for warning in found.warnings:
        warn(warning)
    found = timed(found)
    if picture is not None:
        store(picture, charts(drawn(found)), "--picture")
    if page is not None:
        from qz.cli.reports.page import comparison_page

        store(page, comparison_page(found, report(found), drawn(found)), "--page")
    parts = [facts(report(found))]
    if found.timesteps:
        parts.append(table(TIMESTEPS, timestep_rows(found)))
    parts.append(table(LAYERS, worst_layers(found.loss)))
    show(found.as_json(), as_json=as_json, text="\n\n".join(parts))


def drawn(found: Comparison) -> list[Chart]:
    """What the picture shows."""
    of = PurePath(found.other).name
    made = [Chart(f"{of}: relative error of what each block returns", "block", root(found.blocks.items()))]
    if found.timesteps:
        steps = [(f"{each.component} at {each.timestep:g}", each.error.relative_error) for each in found.timesteps]
        made.insert(0, Chart(f"{of}: relative error of the denoiser's output", "timestep", root(steps)))
    return [each for each in made if each.values]


def root(squares: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """Relative errors from their squares."""
    return [(name, math.sqrt(value)) for name, value in squares]


def timestep_rows(found: Comparison) -> list[tuple[str, ...]]:
    """Rows of ``TIMESTEPS``."""
    return [
        (each.component, f"{each.timestep:g}", noisy(each.error), f"{each.error.cosine_loss:.4g}")
        for each in found.timesteps
    ]


def noisy(error: OutputError) -> str:
    """The squared relative error, with its standard error where that is known."""
    noise = f" ± {error.noise:.2g}" if error.noise is not None else ""
    return f"{error.relative_error:.4g}{noise}"


def report(found: Comparison) -> list[tuple[str, str]]:
    """The result as labels and values."""
    text = "qz's own" if found.text == "default" else found.text
    rows = [("model", found.architecture)]
    if found.steps is None:
        rows.append(("text", f"{text}: {run_on.read(found)}"))
    else:
        rows.append(("prompts", f"{text}: {run_on.prompts(found)}"))
    for name, changed in (("denoiser's output", found.denoiser), ("last latents", found.latents)):
        if changed is not None:
            rows.append((name, f"relative squared error {noisy(changed)}, 1 − cosine {changed.cosine_loss:.4g}"))
    if found.kl is not None:
        noise = f" ± {found.kl_error:.4f}" if found.kl_error is not None else ""
        rows.append(("KL divergence", f"{found.kl:.4f}{noise} nats per token"))
    if found.same_top is not None:
        rows.append(("same prediction", f"{found.same_top:.1%} of the tokens"))
    if found.perplexity_original is not None:
        rows.append(("perplexity", f"{found.perplexity_original:.2f} → {found.perplexity_other:.2f}"))
    if found.cosine_loss is not None:
        rows.append(("1 − cosine", f"{found.cosine_loss:.4f}, of the mean last hidden states"))
    if found.blocks:
        worst = max(found.blocks, key=lambda name: found.blocks[name])
        last = math.sqrt(list(found.blocks.values())[-1])
        most = math.sqrt(found.blocks[worst])
        rows.append(("blocks", f"relative error {last:.4f} after the last, at most {most:.4f} (after {worst})"))
    rows.append(("weights", told_of_loss(found.loss)))
    return [*rows, ("took", took(found.seconds, f"{found.device} in {found.dtype}", 0))]
