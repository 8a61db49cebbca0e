"""``qz calibrate``: options in, one call of ``qz.api``, its report as a table or JSON out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.cli.options import arguments, machine, methods, outputs, reports, selection
from qz.cli.output import facts, show, size, took, warn
from qz.cli.progress import Display, timed
from qz.cli.reports import run_on
from qz.cli.reports.next_step import command, tell
from qz.counted import counted

if TYPE_CHECKING:
    from qz.quantize.calibration.run import Calibration


LOSSES = {
    "kl": "KL divergence in nats per token",
    "cosine": "1 − cosine of mean hidden states",
    "output": "squared relative error of the output",
}


def calibrate(
    source: arguments.SourceArg,
    output: outputs.StatisticsOpt,
    subfolder: selection.SubfolderOpt = None,
    revision: selection.RevisionOpt = None,
    variant: selection.VariantOpt = None,
    allow_pickle: selection.AllowPickleOpt = False,
    text: selection.TextOpt = None,
    generate: selection.GenerateOpt = False,
    tokens: selection.TokensOpt = None,
    steps: selection.StepsOpt = None,
    resolution: selection.ResolutionOpt = None,
    seed: selection.SeedOpt = None,
    experts: outputs.RecordExpertsOpt = False,
    hessians: outputs.HessiansOpt = False,
    scores: outputs.ScoresOpt = False,
    method: outputs.ScoredMethodOpt = None,
    resume: outputs.ResumeOpt = True,
    device: machine.DeviceOpt = "auto",
    as_json: reports.JsonOpt = False,
    quiet: reports.QuietOpt = False,
) -> None:
    """Run a 16-bit model on a text, or a pipeline on prompts, block by block, and record the inputs of its linears."""
    from qz import api
    from qz.quantize.compute.allocator import return_freed_memory
    from qz.quantize.libraries.importing import lean_imports

    lean_imports.forbid()  # the model needs the whole library to run
    return_freed_memory()
    with Display(quiet=quiet) as display:
        found = api.calibrate(
            source,
            output,
            subfolder=subfolder,
            revision=revision,
            variant=variant,
            allow_pickle=allow_pickle,
            text=text,
            generate=generate,
            tokens=tokens,
            experts=experts,
            hessians=hessians,
            scores=scores,
            resume=resume,
            steps=steps,
            resolution=resolution,
            seed=seed or 0,
            method=methods.MethodOptions().method(method) if method is not None else None,
            device=device,
            on_progress=display,
        )
    for warning in found.warnings:
        warn(warning)
    found = timed(found)
    show(found.as_json(), as_json=as_json, text=facts(report(found)))
    if quiet or as_json:
        return
    asked: dict[str, str | bool | None] = {
        "subfolder": subfolder,
        "revision": revision,
        "variant": variant,
        "allow-pickle": allow_pickle,
        "experts": experts,
    }
    tell(next_command(found, asked))


def next_command(found: Calibration, asked: dict[str, str | bool | None]) -> list[str]:
    """The command that uses what was recorded, of the same source; ``asked``: how that was named."""
    scored, scores = next(iter(found.component_scores.items()), (None, found.scores))
    total = scores.total if scores is not None else 0.0
    if found.component_scores and found.component_scores.keys() == set(found.components):
        scored, total = None, sum(each.total for each in found.component_scores.values())  # of the whole pipeline
    words = ["qz", "quantize", found.source]
    for option, value in (asked | {"subfolder": asked["subfolder"] or scored}).items():
        words += [f"--{option}"] if value is True else [f"--{option}", value] if isinstance(value, str) else []
    method = scores.method if scores is not None else "nf4"
    words += [f"--{method}", "--scores" if method == "int8" else "--importance", found.output]
    words += ["--rounding", "gptq"] if found.hessian_files and method != "int8" else []
    words += ["--max-loss", f"{total / 2:.2g}"] if scores is not None else []
    return ["# Use it:", command(*words)]


def report(found: Calibration) -> list[tuple[str, str]]:
    """The result as labels and values."""
    text = {"default": "qz's own", "generated": "the model's own"}.get(found.text, found.text)
    rows = [("model", f"{found.architecture}, {counted(found.linears, 'linear layer')}")]
    if found.steps is None:
        if found.hessian_files and found.text not in ("default", "generated"):
            text += " and qz's own"
        rows.append(("text", f"{text}: {run_on.read(found)}"))
    else:
        rows.append(("components", ", ".join(found.components)))
        rows.append(("prompts", f"{text}: {run_on.prompts(found)}, up to {found.tokens:,} tokens"))
        rows.append(("memory", f"{size(found.weights_at_once or 0)} of weights at a time"))
    rows.append(("statistics", found.output))
    if found.hessian_files:
        rows.append(("Hessians", f"{counted(len(found.hessian_files), 'file')} beside it, {size(found.hessian_bytes)}"))
    for name, scores in {**found.component_scores, **({"": found.scores} if found.scores is not None else {})}.items():
        whose = f"{name}, " if name else ""
        rows.append((f"{whose}all as {scores.method}", f"{LOSSES[scores.loss]} {scores.total:.4g}"))
        most = sorted(scores.of, key=lambda name: -scores.of[name])[:3]
        rows.append((f"{whose}most sensitive", ", ".join(name.removesuffix(".weight") for name in most)))
    return [*rows, ("took", took(found.seconds, f"{found.device} in {found.dtype}", found.bytes_read))]
