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
}
