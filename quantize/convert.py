"""Quantize a checkpoint: plan it, stream it into a staging area, commit it, and sum it up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qz import Unsupported
from qz.formats.checkpoint import Checkpoint, StoredTensor
from qz.formats.folder import Folder, LocalFolder
from qz.formats.staging import Staging, refuse_overlap
from qz.quantize.architecture import Wish, examine, library_versions
from qz.quantize.methods import Method
from qz.quantize.plan import Plan, make_plan
from qz.quantize.stream import Nowhere, Progress, Run
from qz.quantize.summary import Source, Summary, summarize

DEFAULT_SHARD_BYTES = 5 * 10**9
COMPARE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """How to convert. ``threads`` 0 means one for each CPU that may be used."""

    method: Method | None
    dtype: str = "auto"
    skips: tuple[str, ...] = ()
    default_skips: bool = True
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    device: str = "auto"
    threads: int = 0
    keep_nonfinite: bool = False
    """Leave weights that hold NaN or infinite values unquantized, instead of refusing them."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to put the result, and what to do with what is there."""

    output: Path
    overwrite: bool = False
    resume: bool = True


def plan_quantization(checkpoint: Checkpoint, settings: Settings) -> Plan:
    """The plan of a plain checkpoint. Raises Unsupported if it is quantized already, or cannot be."""
    refuse_quantized(checkpoint)
    wish = Wish(settings.method, settings.dtype, settings.skips, settings.default_skips)

    def planned(wish: Wish) -> Plan:
        architecture = examine(checkpoint, wish, equal=lambda one, other: equal_tensors(checkpoint, one, other))
        return make_plan(checkpoint, architecture, settings.method, settings.max_shard_bytes)

    plan = planned(wish)
    if settings.keep_nonfinite and (modules := nonfinite_modules(plan, settings)):
        plan = planned(replace(wish, skips=(*wish.skips, *modules)))
    return plan


def nonfinite_modules(plan: Plan, settings: Settings) -> list[str]:
    """Paths of the linears whose weight cannot be quantized, found by reading the whole source once."""
    from qz.quantize.devices import arithmetic_on

    arithmetic = arithmetic_on(settings.device)
    run = Run(plan, plan.checkpoint.folder, Nowhere(), arithmetic, forgiving=True)
    run.convert(settings.threads or arithmetic.threads)
    return sorted(weight.removesuffix(".weight") for weight in run.nonfinite)


def carry_out(
    plan: Plan,
    source: Source,
    target: Target,
    settings: Settings,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Write what the plan says. Afterwards the output is complete and checked, or absent.

    Raises what reading, computing and writing raise; finished shards stay for the next run with the same settings.
    """
    from qz.quantize.devices import arithmetic_on

    begun = time.monotonic()
    folder = plan.checkpoint.folder
    if isinstance(folder, LocalFolder):
        refuse_overlap(folder.path, target.output)
    arithmetic = arithmetic_on(settings.device)
    with Staging(
        target.output,
        _fingerprint(plan, settings, arithmetic.name),
        needed=plan.bytes_output,
        overwrite=target.overwrite,
        resume=target.resume,
        about=_about(plan, source, arithmetic.name),
    ) as staging:
        resumed = staging.resumed
        Run(plan, folder, staging, arithmetic, progress).convert(settings.threads or arithmetic.threads)
        for name, data in plan.files.items():
            staging.write_file(name, data)
        written = staging.commit()
    return summarize(
        plan,
        source,
        str(target.output),
        device=arithmetic.name,
        written=written,
        seconds=time.monotonic() - begun,
        resumed=resumed,
    )


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise Unsupported if the checkpoint says, or its tensors show, that it is quantized already."""
    config = checkpoint.config.get("quantization_config")
    where = checkpoint.folder.location
    if isinstance(config, dict):
        method = str(config.get("quant_method", "an unknown method"))
        bits = " (4 bit)" if config.get("load_in_4bit") else " (8 bit)" if config.get("load_in_8bit") else ""
        hint = (
            f"Run `qz dequantize {where}` first, or start from the original weights."
            if method == "bitsandbytes"
            else "Start from the original weights."
        )
        raise Unsupported(f"{where} is already quantized with {method}{bits}. {hint}")
    for tensor in checkpoint.tensors.values():
        if tensor.dtype.startswith(("F8", "F4", "F6")):
            raise Unsupported(
                f"{where} holds {tensor.dtype} weights ({tensor.name}); bitsandbytes quantizes 16- and 32-bit floats "
                "only. Start from the bfloat16 weights of this model."
            )
        if ".quant_state.bitsandbytes__" in tensor.name:
            raise Unsupported(
                f"{where} is already quantized with bitsandbytes ({tensor.name}), though config.json does not say so. "
                f"Run `qz inspect {where}`."
            )


def equal_tensors(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two stored tensors hold the same bytes, compared piece by piece."""
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False

    def piece(tensor: StoredTensor, start: int) -> bytes:
        buffer = bytearray(min(COMPARE_BYTES, tensor.nbytes - start))
        checkpoint.folder.read_into(tensor.file, tensor.offset + start, memoryview(buffer))
        return bytes(buffer)

    return all(piece(first, start) == piece(second, start) for start in range(0, first.nbytes, COMPARE_BYTES))


def _fingerprint(plan: Plan, settings: Settings, device: str) -> dict[str, Any]:
    """What must be the same for a resumed run to write the same bytes. Threads are not part of it."""
    method = settings.method
    return {
        "source": plan.checkpoint.folder.identity(),
        "method": method.name if method else None,
        "settings": {
            **(method.config() if method else {}),
            "dtype": settings.dtype,
            "skips": list(settings.skips),
            "default_skips": settings.default_skips,
            "max_shard_bytes": settings.max_shard_bytes,
        },
        "versions": library_versions(),
        "device": device,
    }


def _about(plan: Plan, source: Source, device: str) -> dict[str, Any]:
    """What the record in the output says of how it was made; nothing private, so no local path."""
    from qz import __version__

    summary = summarize(plan, source, "", device=device)
    about = summary.as_json()
    for key in ("output", "dry_run", "seconds", "shards", "resumed"):
        about.pop(key)
    if isinstance(plan.checkpoint.folder, LocalFolder):
        about["source"]["location"] = os.path.basename(os.path.realpath(source.location))
    return {"qz": __version__, "versions": library_versions(), **about}
