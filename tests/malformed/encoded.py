"""Checkpoints that other tools quantized, whose parts do not belong together. Cases as in folders.py."""

from __future__ import annotations

Case = tuple[str, dict[str, object], tuple[str, ...]]

FILE = "model.safetensors"


def said(method: str | None, tensors: dict[str, object], *kinds: str, **settings: object) -> Case:
    """The base's tensors replaced, and a quantization_config of ``method`` that says ``settings``."""
    config: dict[str, object] = {"model_type": "llama"}
    if method is not None:
        config["quantization_config"] = {"quant_method": method, **settings}
    return "single", {"config.json": config, FILE: {"a.weight": None, "b.weight": None, **tensors}}, kinds


def fp8(scale: tuple[str, tuple[int, ...]], *kinds: str, block: object = (2, 2)) -> Case:
    weight: dict[str, object] = {"q.weight": ("F8_E4M3", (6, 4)), "q.weight_scale_inv": scale}
    return said("fp8", weight, *kinds, weight_block_size=block)


def packed(changes: dict[str, object], *kinds: str, bits: object = 4, **settings: object) -> Case:
    """A weight of (8, 16) in compressed-tensors' pack-quantized form with groups of 8, and zero points."""
    tensors: dict[str, object] = {
        "q.weight_packed": ("I32", (8, 2)),
        "q.weight_scale": ("BF16", (8, 2)),
        "q.weight_zero_point": ("I32", (1, 2)),
        "q.weight_shape": ("I64", (2,), shape(8, 16)),
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int"}}}
    said_of_it = {"format": "pack-quantized", "config_groups": groups, **settings}
    return said("compressed-tensors", tensors | changes, *kinds, **said_of_it)


def shape(*extents: int) -> bytes:
    return b"".join(extent.to_bytes(8, "little", signed=True) for extent in extents)


def gptq(changes: dict[str, object], *kinds: str, method: str = "gptq", **settings: object) -> Case:
    """A weight of (16, 32) in groups of 16, as GPTQ packs it."""
    tensors: dict[str, object] = {
        "q.qweight": ("I32", (4, 16)),
        "q.qzeros": ("I32", (2, 2)),
        "q.scales": ("F16", (2, 16)),
        "q.g_idx": ("I32", (32,)),
    }
    return said(method, tensors | changes, *kinds, **{"bits": 4, **settings})


AWQ: dict[str, object] = {"q.qweight": ("I32", (32, 2)), "q.g_idx": None}
EXPERTS: dict[str, object] = {"e.up_blocks": ("U8", (3, 8, 2, 16)), "e.up_scales": ("U8", (3, 8, 2))}
COMFY = b'{"format": "float8_e4m3fn"}'
CASES: dict[str, Case] = {
    "good: fp8 blocks": fp8(("F32", (3, 2))),
    "good: fp8 blocks at ragged edges": fp8(("F32", (2, 2)), block=[4, 3]),
    "good: fp8 rows": fp8(("BF16", (6, 1)), block=None),
    "good: fp8 one scale": fp8(("F32", ())),
    "good: fp8 codes alone": said(None, {"q.weight": ("F8_E5M2", (6, 4))}),
    "good: ComfyUI": said(
        None,
        {
            "q.weight": ("F8_E4M3", (6, 4)),
            "q.weight_scale": ("F32", ()),
            "q.comfy_quant": ("U8", (len(COMFY),), COMFY),
            "scaled_fp8": ("F8_E4M3", (2,)),
        },
    ),
    "fp8: scales of another weight": fp8(("F32", (5, 3)), "scale-malformed"),
    "fp8: scales of three dimensions": fp8(("F32", (3, 3, 2)), "scale-malformed"),
    "fp8: no scale in it": fp8(("F32", (0, 2)), "scale-malformed"),
    "fp8: no values": said(
        "fp8", {"q.weight": ("F8_E4M3", (0, 4)), "q.weight_scale_inv": ("F32", (1, 1))}, "scale-malformed"
    ),
    "fp8: block of zero": fp8(("F32", (4, 3)), "scale-malformed", block=[0, 0]),
    "fp8: block of text": fp8(("F32", (4, 3)), "scale-malformed", block="128x128"),
    "fp8: one scale missing": said(
        "fp8",
        {"q.weight": ("F8_E4M3", (6, 4)), "q.weight_scale_inv": ("F32", ()), "k.weight": ("F8_E4M3", (6, 4))},
        "scale-missing",
    ),
    "ComfyUI: another form": said(
        None,
        {
            "q.weight": ("F8_E4M3", (6, 4)),
            "q.weight_scale": ("F32", ()),
            "q.comfy_quant": ("U8", (19,), b'{"format": "nvfp4"}'),
        },
        "encoding-unknown",
    ),
    "ComfyUI: no JSON": said(
        None,
        {"q.weight": ("F8_E4M3", (6, 4)), "q.weight_scale": ("F32", ()), "q.comfy_quant": ("U8", (4,), b"\x1b[2J")},
        "encoding-unknown",
    ),
    "ComfyUI: megabytes of JSON": said(
        None,
        {"q.weight": ("F8_E4M3", (6, 4)), "q.weight_scale": ("F32", ()), "q.comfy_quant": ("U8", (10_000_000,))},
        "encoding-unknown",
    ),
    # compressed-tensors
    "good: packed": packed({}),
    "packed: no scale": packed({"q.weight_scale": None}, "encoded-part-missing"),
    "packed: no shape": packed({"q.weight_shape": None}, "scale-malformed"),
    "packed: a negative shape": packed({"q.weight_shape": ("I64", (2,), shape(8, -16))}, "scale-malformed"),
    "packed: a huge shape": packed({"q.weight_shape": ("I64", (2,), shape(8, 1 << 62))}, "scale-malformed"),
    "packed: a shape of one": packed({"q.weight_shape": ("I64", (1,), shape(8))}, "scale-malformed"),
    "packed: megabytes of shape": packed({"q.weight_shape": ("I64", (1_000_000,))}, "scale-malformed"),
    "packed: bits that do not fit": packed({}, "scale-malformed", bits=8),
    "packed: bits that are text": packed({}, "scale-malformed", bits="4"),
    "packed: no groups": packed({}, "encoding-unknown", config_groups=None),
    "packed: groups of nothing": packed({}, "encoding-unknown", config_groups={"group_0": [1]}),
    "packed: scales of another weight": packed({"q.weight_scale": ("BF16", (8, 3))}, "scale-malformed"),
    "packed: integer scales": packed({"q.weight_scale": ("I32", (8, 2))}, "scale-malformed"),
    "packed: zero points too few": packed({"q.weight_zero_point": ("I32", (1, 1))}, "scale-malformed"),
    "packed: the plain weight as well": packed({"q.weight": ("BF16", (8, 16))}, "encoded-twice"),
    "packed: sparse": packed({}, "encoding-unknown", format="sparse-24-bitmask"),
    # gpt-oss
    "good: mxfp4": said("mxfp4", EXPERTS),
    "mxfp4: no scales": said("mxfp4", EXPERTS | {"e.up_scales": None}, "encoded-part-missing"),
    "mxfp4: other scales": said("mxfp4", EXPERTS | {"e.up_scales": ("U8", (3, 8, 1))}, "scale-malformed"),
    "mxfp4: blocks of 15 bytes": said("mxfp4", EXPERTS | {"e.up_blocks": ("U8", (3, 8, 2, 15))}, "scale-malformed"),
    "mxfp4: no experts": said(
        "mxfp4", {"e.up_blocks": ("U8", (0, 8, 2, 16)), "e.up_scales": ("U8", (0, 8, 2))}, "scale-malformed"
    ),
    # GPTQ and AWQ
    "good: gptq": gptq({}),
    "good: gptq without g_idx": gptq({"q.g_idx": None}),
    "good: awq": gptq(AWQ, method="awq"),
    "gptq: no scales": gptq({"q.scales": None}, "encoded-part-missing"),
    "gptq: no zero points": gptq({"q.qzeros": None}, "encoded-part-missing"),
    "gptq: g_idx too short": gptq({"q.g_idx": ("I32", (16,))}, "encoded-malformed"),
    "gptq: g_idx of 64 bits": gptq({"q.g_idx": ("I64", (32,))}, "encoded-malformed"),
    "gptq: scales of another weight": gptq({"q.scales": ("F16", (2, 8))}, "encoded-malformed"),
    "gptq: zero points of another weight": gptq({"q.qzeros": ("I32", (1, 2))}, "encoded-malformed"),
    "gptq: codes of 64 bits": gptq({"q.qweight": ("I64", (4, 16))}, "encoded-malformed"),
    "gptq: no codes": gptq({"q.qweight": ("I32", (0, 16))}, "encoded-malformed"),
    "gptq: bits that are text": gptq({}, "encoding-unknown", bits="4"),
    "gptq: 5 bits": gptq({}, "encoding-unknown", bits=5),
    "gptq: another format": gptq({}, "encoding-unknown", checkpoint_format="marlin"),
    "gptq: the format a list": gptq({}, "encoding-unknown", checkpoint_format=["gptq"]),
    "awq: another version": gptq(AWQ, "encoding-unknown", method="awq", version="gemv"),
    "awq: scales of another weight": gptq(AWQ | {"q.scales": ("F16", (3, 16))}, "encoded-malformed", method="awq"),
}
