"""Plan the way back: every weight that bitsandbytes quantized becomes an ordinary one, whoever saved the checkpoint.

The library is shown the checkpoint as it will be, so class, names, tied weights and config come out as for a plain one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from qz import MalformedInput, QzError, Unsupported
from qz.formats.checkpoint.problems import Problem, as_error
from qz.formats.checkpoint.quantization.left_over import left_over
from qz.formats.checkpoint.quantization.quantization_config import stated_quantization
from qz.formats.checkpoint.quantization.quantized import QuantizedWeight, part_names, read_quantized
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import StoredTensor
from qz.quantize.libraries.architecture import (
    FLOATS,
    SAFETENSORS_NAMES,
    Architecture,
    Footprint,
    LoadRequest,
    TensorSpec,
    torch_name,
)
from qz.quantize.libraries.examine import examine
from qz.quantize.libraries.expert_layout import expert_lists
from qz.quantize.libraries.plain import plain_checkpoint
from qz.quantize.planning.fusing import fuse
from qz.quantize.planning.membership import ALONE, Membership
from qz.quantize.planning.plan import Plan, make_plan
from qz.quantize.planning.sources import Packed, Source, Stacked, packed_parts
from qz.quantize.planning.unquantized import equal_sources, equal_tensors
from qz.quantize.settings import Settings

DAMAGED = frozenset(
    (
        "companion-malformed",
        "companion-missing",
        "companion-orphan",
        "nested-absmax-missing",
        "quant-state-malformed",
        "quant-state-mismatch",
    )
)
"""Problems without whose solution the values are not known. Others (a config that differs, a storage or a split that
the library cannot load) keep a loader from its work, but not this."""


def plan_dequantization(checkpoint: Checkpoint, settings: Settings, member: Membership = ALONE) -> Plan:
    """The plan of a quantized checkpoint's way back; ``settings.dtype`` auto is the dtype before quantization.

    LoRAs are fused into the dequantized weights.

    Raises Unsupported if the checkpoint is not quantized, or by another method than bitsandbytes', MalformedInput
    where companions of a weight are missing or do not fit it.
    """
    plain = plain_checkpoint(checkpoint)
    if plain.encoded_as is not None:
        return fuse(_plan_decoding(plain, settings), settings.loras, member)
    weights = quantized_weights(checkpoint)
    before = dtype_before(checkpoint, weights)
    dtype = before if settings.dtype == "auto" else settings.dtype
    sources, given = as_plain(checkpoint, weights)

    def equal(one: str, other: str) -> bool:
        return equal_sources(checkpoint, sources, one, other)

    architecture = examine(checkpoint, LoadRequest(None, dtype), given, equal)
    refuse_codes(checkpoint, architecture, sources)
    same = architecture if dtype == before else examine(checkpoint, LoadRequest(None, before), given, equal)
    footprint = Footprint(footprint_before(same, sources), architecture.footprint.after)
    architecture = replace(architecture, footprint=footprint)
    plan = make_plan(checkpoint, architecture, None, settings.max_shard_bytes, sources)
    return fuse(plan, settings.loras, member)


def dequantized_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Source], dict[str, TensorSpec], str]:
    """A quantized checkpoint as the plain one that LoRAs are fused into: its sources, what they are, and the dtype
    before quantization. Raises as ``plan_dequantization``."""
    weights = quantized_weights(checkpoint)
    return *as_plain(checkpoint, weights), dtype_before(checkpoint, weights)


def _plan_decoding(plain: Checkpoint, settings: Settings) -> Plan:
    """The plan of what another tool quantized, written plain. No library tells the footprint before: it is taken to be
    what is stored of the tensors that the class uses."""
    request = LoadRequest(None, settings.dtype)
    architecture = examine(plain, request, equal=lambda one, other: equal_tensors(plain, one, other))
    used = {source for saved in architecture.saved for source in saved.weight.sources}
    stored = sum(plain.tensors[name].nbytes for name in used)
    footprint = Footprint(stored, architecture.footprint.after)
    return make_plan(plain, replace(architecture, footprint=footprint), None, settings.max_shard_bytes)


def as_plain(
    checkpoint: Checkpoint, weights: Mapping[str, QuantizedWeight]
) -> tuple[dict[str, Source], dict[str, TensorSpec]]:
    """The tensors of a checkpoint as they are before ``weights`` are quantized: how they are read, what they are."""
    sources: dict[str, Source] = {}
    companions = part_names(weights)
    for name, tensor in checkpoint.tensors.items():
        if name in weights:
            sources[name] = packed(weights[name])
        elif name not in companions:
            sources[name] = tensor
    _stack_experts(sources, checkpoint.folder.location)
    given = {
        name: TensorSpec(torch_name(source.dtype, name), source.shape, linear=bool(packed_parts(source)))
        for name, source in sources.items()
    }
    return sources, given


def _stack_experts(sources: dict[str, Source], where: str) -> None:
    """Put the parameters that gpt-oss has for all experts in the place of the single experts."""
    lists = expert_lists(sources)
    for parameter, singles in lists.stacked.items():
        parts = tuple(sources.pop(name) for name in singles)
        odd = next((part for part in parts if (part.dtype, part.shape) != (parts[0].dtype, parts[0].shape)), None)
        if odd is not None:
            raise MalformedInput(
                f"{where}: {quoted(odd.name)} is {odd.dtype} {list(odd.shape)}, but {quoted(parts[0].name)} of the "
                f"same layer is {parts[0].dtype} {list(parts[0].shape)}. Download the checkpoint again."
            )
        sources[parameter] = Stacked(parameter, tuple(p for p in parts if isinstance(p, StoredTensor | Packed)))
    for name, renamed in lists.renamed.items():
        sources[name] = sources.pop(renamed)


def quantized_weights(checkpoint: Checkpoint) -> dict[str, QuantizedWeight]:
    """What bitsandbytes quantized, by name; raises for everything that keeps it from being dequantized."""
    weights, problems = read_quantized(checkpoint)
    where = checkpoint.folder.location
    kinds = {problem.kind: problem for problem in problems}
    if "quantized-by-other" in kinds:
        method = (stated_quantization(checkpoint.config) or {}).get("quant_method", "another method")
        raise Unsupported(
            f"{where} is quantized with {quoted(str(method), 40)}, not with bitsandbytes. Start from the original "
            "model, or dequantize it with the library that made it."
        )
    if "fp8-weights" in kinds:
        name = quoted(kinds["fp8-weights"].where)
        raise Unsupported(
            f"{where} holds weights in 8-bit floating point ({name}), which bitsandbytes does not make. Start from the "
            "bfloat16 weights of this model."
        )
    damaged = [problem for problem in problems if problem.kind in DAMAGED]
    if damaged:
        raise as_error(where, damaged, recorded=bool(checkpoint.folder.promised))
    if not weights:
        raise nothing_quantized(checkpoint, problems)
    return weights


def nothing_quantized(checkpoint: Checkpoint, problems: tuple[Problem, ...]) -> QzError:
    """The error for a checkpoint without a quantized weight; its config may say otherwise."""
    where = checkpoint.folder.location
    if (left := left_over(checkpoint.config, checkpoint.tensors)) is not None:
        return MalformedInput(left.told(f"{where}/config.json"))
    if stated := [problem for problem in problems if problem.kind.startswith("quantization-")]:
        return as_error(where, stated)
    place = where if checkpoint.original is None else f"{where}/{checkpoint.files[0]}"
    return Unsupported(f"{place} is not quantized: there is nothing to dequantize. `qz quantize {place}` quantizes it.")


def packed(weight: QuantizedWeight) -> Packed:
    """The weight as a source. int8 is dequantized to float32, 4 bit to the dtype of its quant state."""
    assert weight.shape is not None  # a missing quant state was refused before
    return Packed(weight, SAFETENSORS_NAMES[weight.dtype or "float32"], weight.shape)


def dtype_before(checkpoint: Checkpoint, weights: Mapping[str, QuantizedWeight]) -> str:
    """torch dtype name of the weights before: of the quant states the one of most values; int8 leaves it to the config.

    diffusers' configs do not say it. Then it is what the tensors have that are not quantized; some of those may be
    float32 in a 16-bit model, for models keep parts of them so.
    """
    counts: Counter[str] = Counter()
    for weight in weights.values():
        if weight.dtype is not None:
            counts[weight.dtype] += weight.elements
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    said = said.removeprefix("torch.") if isinstance(said, str) else None
    if not counts and said in FLOATS:
        return str(said)
    if not counts:
        companions = part_names(weights)
        for name, tensor in checkpoint.tensors.items():
            if name not in companions and (dtype := torch_name(tensor.dtype, name)) in FLOATS:
                counts[dtype] += math.prod(tensor.shape)
        if len(counts) > 1:
            del counts["float32"]
    return counts.most_common(1)[0][0] if counts else "float16"


def refuse_codes(checkpoint: Checkpoint, architecture: Architecture, sources: Mapping[str, Source]) -> None:
    """Raise MalformedInput for codes that would pass as weights: int8 without its scales has the weight's shape."""
    for saved in architecture.saved:
        source = sources[saved.weight.sources[0]]
        if saved.name.endswith(".weight") and source.dtype in ("I8", "U8"):
            raise MalformedInput(
                f"{checkpoint.folder.location}/{source.file}: {quoted(source.name)} holds {source.dtype} codes, but "
                "nothing that says what they stand for. Quantize the original again, or download this again."
            )


def footprint_before(architecture: Architecture, sources: Mapping[str, Source]) -> int:
    """``get_memory_footprint()`` of the quantized model: of a quantized weight it counts the codes only."""
    before = architecture.footprint.after
    for saved in architecture.saved:
        source = sources[saved.weight.sources[0]]
        if packed_parts(source) and len(saved.weight.sources) == 1:
            before += source.nbytes - saved.nbytes
    return before
