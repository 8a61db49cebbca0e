"""Experts of MoE models: who reads them quantized, in which layout, and who expects them so."""

from __future__ import annotations

from collections.abc import Iterator

from qz.counted import shown
from qz.quantize.consumers.contents import EXPERT, Contents
from qz.quantize.consumers.verdict import Finding
from qz.quantize.methods import BLOCK_SIZE

VLLM_NAMES = frozenset(("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
"""What models' ``get_expert_mapping`` in vLLM name the weights of one expert."""
INSTEAD = "Load it with qz.load, unsloth or vLLM, or quantize without --experts."


def transformers_merges(contents: Contents) -> Iterator[Finding]:
    """transformers 5 merges the experts of a layer into one tensor and knows nothing of their scales."""
    if contents.packed_experts or contents.fused_experts:
        text = f"cannot load quantized experts: it would merge their codes as if they were weights. {INSTEAD}"
        yield Finding("error", "experts", text)


def peft_needs_a_loader(contents: Contents) -> Iterator[Finding]:
    """PEFT takes a model that is loaded; transformers cannot load quantized experts, qz.load can."""
    if contents.packed_experts or contents.fused_experts:
        yield Finding(
            "note", "experts", "load the model with qz.load first: transformers cannot load quantized experts."
        )


def vllm_int8(contents: Contents) -> Iterator[Finding]:
    """Models with experts are refused in int8."""
    if contents.is_int8 and (contents.plain_experts or contents.packed_experts):
        yield Finding("error", "experts-int8", "refuses models with experts in int8. Use --nf4.")


def vllm_fp4(contents: Contents) -> Iterator[Finding]:
    """The quant states of experts are joined as nf4, whatever they are."""
    if any(each.kind == "fp4" for each in contents.packed_experts.values()):
        yield Finding("error", "experts-fp4", "would read fp4 experts as nf4, and compute nonsense. Use --nf4.")


def vllm_layout(contents: Contents) -> Iterator[Finding]:
    """Experts are read one by one, under the names of the model's expert mapping."""
    wrong = [
        *contents.fused_experts,
        *(name for name in contents.packed_experts if (m := EXPERT.fullmatch(name)) and m[2] not in VLLM_NAMES),
    ]
    if wrong:
        text = f"reads no quantized experts by such names: {shown(wrong)}. Quantize without --experts."
        yield Finding("error", "experts-layout", text)


def vllm_some(contents: Contents) -> Iterator[Finding]:
    """Of a layer's experts all must be quantized, or none is: then they are when the model is loaded."""
    layers = {match[1] for name in contents.packed_experts if (match := EXPERT.fullmatch(name))}
    plain = [name for name in contents.plain_experts if (match := EXPERT.fullmatch(name)) and match[1] in layers]
    if plain:
        text = f"needs all experts of a layer quantized, and these are not: {shown(plain)}. Do not skip them."
        yield Finding("error", "experts-some", text)
    elif contents.plain_experts and not contents.packed_experts and contents.packed and not contents.is_int8:
        text = (
            "quantizes the experts to nf4 when it loads, which the file has in 16 bit. --experts stores them quantized."
        )
        yield Finding("warning", "experts-plain", text)


def _ragged(contents: Contents) -> list[str]:
    """Experts that are no whole number of blocks."""
    return [name for name, each in contents.packed_experts.items() if (each.elements or 0) % BLOCK_SIZE]


def whole_blocks(contents: Contents) -> Iterator[Finding]:
    """The scales of experts are concatenated, which is right only where an expert is a whole number of blocks."""
    if ragged := _ragged(contents):
        text = f"joins the scales of experts, which are not whole blocks of {BLOCK_SIZE}: {shown(ragged)}."
        yield Finding("error", "experts-blocks", text)


def without_gates(contents: Contents) -> Iterator[Finding]:
    """Experts have three weights: gate, up and down. Those without a gate (Nemotron-H) have no place."""
    found = (EXPERT.fullmatch(name) for name in contents.packed_experts)
    names = {match[2] or match[3] for match in found if match}
    if names and names.isdisjoint(("gate_proj", "w1", "gate_up_projs")):
        yield Finding(
            "error", "experts-gate", "reads quantized experts only if they have a gate. Quantize without --experts."
        )


def sglang(contents: Contents) -> Iterator[Finding]:
    """SGLang's models with experts have no mapping for bitsandbytes, and its loader joins no experts' quant states."""
    if contents.plain_experts or contents.packed_experts or contents.fused_experts:
        yield Finding("error", "experts", "loads no model with experts from bitsandbytes weights. Use vLLM.")


def unsloth_blocks(contents: Contents) -> Iterator[Finding]:
    """Where an expert is no whole number of blocks, the experts of a layer are quantized again."""
    if ragged := _ragged(contents):
        text = f"quantizes the experts again, because they are not whole blocks of {BLOCK_SIZE}: {shown(ragged)}."
        yield Finding("warning", "experts-blocks", text)


def shared_gate(contents: Contents) -> Iterator[Finding]:
    """The gate of shared experts is an ordinary layer there, which does not take codes."""
    gates = [name for name in contents.packed if name.endswith(".shared_expert_gate.weight")]
    if gates:
        text = (
            f"builds the gate of shared experts as an ordinary layer, so {shown(gates, 1)} does not fit. Quantize "
            "again with --skip shared_expert_gate."
        )
        yield Finding("error", "shared-gate", text)
