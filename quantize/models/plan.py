"""Plan the quantization of a model: what its library says, LoRAs, the layers that stay, what is known of inputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from qz import QzError, Unsupported, UsageError
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.importance.refine import refinement
from qz.quantize.importance.score_file import score_file
from qz.quantize.libraries.architecture import LoadRequest, TensorSpec
from qz.quantize.libraries.examine import examine
from qz.quantize.libraries.importing.lean_imports import gc_paused
from qz.quantize.libraries.plain import plain_checkpoint
from qz.quantize.planning.budget.kept_layers import with_kept_layers
from qz.quantize.planning.dequantization import dequantized_checkpoint
from qz.quantize.planning.fusing import fuse
from qz.quantize.planning.membership import ALONE, Membership
from qz.quantize.planning.nearest import refuse_unmatched
from qz.quantize.planning.original_layout import in_original_names
from qz.quantize.planning.plan import Plan, make_plan
from qz.quantize.planning.sources import Source as TensorSource
from qz.quantize.planning.unquantized import equal_sources, is_bitsandbytes, refuse_quantized
from qz.quantize.settings import Settings
from qz.quantize.streaming.discard import DiscardOutput
from qz.quantize.streaming.run import Run


def plan_quantization(checkpoint: Checkpoint, settings: Settings, member: Membership = ALONE) -> Plan:
    """The plan of a plain checkpoint, or of one that bitsandbytes quantized if LoRAs are fused into it.

    Raises Unsupported if it is quantized already, cannot be, or nothing of it would be; UsageError if
    ``settings.skips`` leave nothing, or one of them matches nothing (in a whole pipeline it may match elsewhere).
    """
    plan = plan_conversion(checkpoint, settings, member)
    if not plan.quantized:
        raise _nothing_to_quantize(plan)
    return in_original_names(plan) if settings.layout == "single-file" else plan


def plan_conversion(checkpoint: Checkpoint, settings: Settings, member: Membership = ALONE) -> Plan:
    """As ``plan_quantization``, also where no layer can be quantized."""
    checkpoint = plain_checkpoint(checkpoint)
    if settings.experts and checkpoint.library != "transformers":
        raise UsageError(f"{checkpoint.folder.location} is a model of {checkpoint.library}: leave out --experts.")
    request = LoadRequest(settings.method, settings.dtype, settings.skips, settings.default_skips, settings.experts)
    sources: dict[str, TensorSource] | None = None
    given: dict[str, TensorSpec] | None = None
    if settings.loras and is_bitsandbytes(checkpoint):
        sources, given, before = dequantized_checkpoint(checkpoint)
        request = replace(request, dtype=before if request.dtype == "auto" else request.dtype)
    else:
        refuse_quantized(checkpoint)

    def equal(one: str, other: str) -> bool:
        return equal_sources(checkpoint, sources, one, other)

    def planned(request: LoadRequest) -> Plan:
        with gc_paused():  # a plan stays, and large ones are a million objects
            architecture = examine(checkpoint, request, given, equal)
            plan = make_plan(checkpoint, architecture, settings.method, settings.max_shard_bytes, sources)
        return fuse(plan, settings.loras, member)

    plan = planned(request)
    if not member.whole_pipeline:
        refuse_unmatched(plan.architecture.unmatched_skips, checkpoint.folder.location, [plan])
    if settings.keep_nonfinite and (modules := nonfinite_modules(plan, settings)):
        request = replace(request, skips=(*request.skips, *modules))
        plan = planned(request)
    if settings.chooses_layers and plan.quantized:
        again = lambda paths: planned(replace(request, skips=(*request.skips, *paths)))  # noqa: E731
        plan = with_kept_layers(plan, settings, again, score_file(settings, member))
    return replace(plan, refinement=refinement(plan, settings, member))


def _nothing_to_quantize(plan: Plan) -> QzError:
    where, name = plan.checkpoint.folder.location, plan.architecture.class_name
    kept = Counter(plan.architecture.kept_linears.values())
    if kept["skipped on request"]:
        return UsageError(f"{where}: with these --skip nothing of {name} is left to quantize. Leave some of them out.")
    why = ", ".join(f"{count} {reason}" for reason, count in kept.most_common(3))
    found = f"each of its linear layers stays as it is ({why})" if kept else "it has no linear layer"
    return Unsupported(
        f"{where}: nothing of {name} can be quantized: {found}, and bitsandbytes quantizes no other. Use the model as "
        "it is; loaded in a 16-bit dtype it takes half the memory of float32."
    )


def nonfinite_modules(plan: Plan, settings: Settings) -> list[str]:
    """Paths of the linears whose weight cannot be quantized, found by reading the whole source once."""
    from qz.quantize.compute.devices import arithmetic_on

    arithmetic = arithmetic_on(settings.device)
    run = Run(plan, plan.checkpoint.folder, DiscardOutput(), arithmetic, allow_nonfinite=True)
    run.convert(settings.threads or arithmetic.threads)
    return sorted(weight.removesuffix(".weight") for weight in run.nonfinite)
