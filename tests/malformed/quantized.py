"""Quantized checkpoints whose parts do not belong together. Cases as in folders.py, on small quantized bases.

The bases ``nf4``, ``double``, ``int8`` (transformers) and ``diffusers-nf4`` have one weight of (8, 16), ``q.weight``. A
tensor may have a third element, its bytes; of ``STATE``, the quant_state, they are the JSON.
"""

from __future__ import annotations

import json

Case = tuple[str, dict[str, object], tuple[str, ...]]

FILE = "model.safetensors"
FLUX = "diffusion_pytorch_model.safetensors"
STATE = "q.weight.quant_state.bitsandbytes__nf4"
NF4 = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 16]}
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
W = ("BF16", (8, 16))


def tensors(base: str, changes: dict[str, object], *kinds: str) -> Case:
    return base, {FLUX if base.startswith("diffusers") else FILE: changes}, kinds


def without(base: str, name: str, *kinds: str) -> Case:
    return tensors(base, {name: None}, *kinds)


def state(value: object, *kinds: str, base: str = "nf4") -> Case:
    """The base with another quant_state: bytes, or a dict that changes the JSON (None deletes)."""
    if isinstance(value, dict):
        said = {
            key: held for key, held in (NF4 | (NESTED if base == "double" else {}) | value).items() if held is not None
        }
        value = json.dumps(said).encode()
    assert isinstance(value, bytes)
    return tensors(base, {STATE: ("U8", (len(value),), value)}, *(kinds or ("quant-state-malformed",)))


def config(base: str, said: object, *kinds: str) -> Case:
    """The base with another quantization_config."""
    return base, {"config.json": {"model_type": "llama", "quantization_config": said}}, kinds


def other(method: str, packed: dict[str, object]) -> Case:
    """What another tool packed, in a form that qz does not read."""
    said = {"model_type": "llama", "quantization_config": {"quant_method": method}}
    return "single", {"config.json": said, FILE: packed}, ("quantized-by-other",)


LEFT_OVER = "quantization-left-over"
MISMATCH = "quantization-config-mismatch"
DIFFERS = "quantization-config-differs"
CASES: dict[str, Case] = {
    "good: nf4": ("nf4", {}, ()),
    "good: double": ("double", {}, ()),
    "good: int8": ("int8", {}, ()),
    "good: diffusers": ("diffusers-nf4", {}, ()),
    "good: no weight_format": without("int8", "q.weight_format"),
    "good: bf16 storage": tensors("nf4", {"q.weight": ("BF16", (32, 1))}),
    # Companions
    "nf4: no weight": without("nf4", "q.weight", "companion-orphan", MISMATCH),
    "nf4: no absmax": without("nf4", "q.weight.absmax", "companion-missing"),
    "nf4: no quant_map": without("nf4", "q.weight.quant_map", "companion-missing"),
    "nf4: no quant_state": without("nf4", STATE, "companion-missing"),
    "nf4: weight alone": tensors(
        "nf4", {"q.weight.absmax": None, "q.weight.quant_map": None, STATE: None}, "companion-missing"
    ),
    "double: no nested_absmax": without("double", "q.weight.nested_absmax", "nested-absmax-missing"),
    "double: no nested_quant_map": without("double", "q.weight.nested_quant_map", "companion-missing"),
    "double: no nested part": tensors(
        "double",
        {"q.weight.nested_absmax": None, "q.weight.nested_quant_map": None},
        "nested-absmax-missing",
        "companion-missing",
    ),
    "double: no nested_absmax under diffusers": without(
        "diffusers-double", "q.weight.nested_absmax", "nested-absmax-missing"
    ),
    "double: no nested_absmax and no quant_state": tensors(
        "double", {"q.weight.nested_absmax": None, STATE: None}, "nested-absmax-missing", "companion-missing"
    ),
    "double: only nested_absmax": tensors(
        "nf4",
        {"q.weight.nested_absmax": ("F32", (1,))},
        "companion-missing",
        "companion-malformed",
        "quant-state-mismatch",
        DIFFERS,
    ),
    "nf4: absmax too short": tensors("nf4", {"q.weight.absmax": ("F32", (1,))}, "companion-malformed"),
    "nf4: absmax too long": tensors("nf4", {"q.weight.absmax": ("F32", (3,))}, "companion-malformed"),
    "nf4: absmax in fp16": tensors("nf4", {"q.weight.absmax": ("F16", (2,))}, "companion-malformed"),
    "nf4: absmax quantized, nothing nested": tensors(
        "nf4",
        {"q.weight.absmax": ("U8", (2,))},
        "nested-absmax-missing",
        "companion-missing",
        "quant-state-mismatch",
        DIFFERS,
    ),
    "nf4: quant_map of 15": tensors("nf4", {"q.weight.quant_map": ("F32", (15,))}, "companion-malformed"),
    "nf4: quant_map in fp16": tensors("nf4", {"q.weight.quant_map": ("F16", (16,))}, "companion-malformed"),
    "double: absmax not quantized": tensors("double", {"q.weight.absmax": ("F32", (2,))}, "companion-malformed"),
    "double: nested_quant_map of 255": tensors(
        "double", {"q.weight.nested_quant_map": ("F32", (255,))}, "companion-malformed"
    ),
    "double: nested_absmax of 2": tensors("double", {"q.weight.nested_absmax": ("F32", (2,))}, "companion-malformed"),
    "double: nested_absmax in bf16": tensors(
        "double", {"q.weight.nested_absmax": ("BF16", (1,))}, "companion-malformed"
    ),
    "nf4: weight too short": tensors("nf4", {"q.weight": ("U8", (63, 1))}, "quant-state-mismatch"),
    "nf4: weight twice as long": tensors("nf4", {"q.weight": ("U8", (128, 1))}, "quant-state-mismatch"),
    "nf4: weight not quantized": tensors("nf4", {"q.weight": W}, "quant-state-mismatch"),
    # quant_state
    "state: empty": state(b""),
    "state: not JSON": state(b"nf4"),
    "state: a list": state(b"[]"),
    "state: cut off": state(b'{"quant_type": "nf4", "bl'),
    "state: key twice": state(b'{"quant_type": "nf4", "quant_type": "nf4"}'),
    "state: NUL bytes": state(bytes(90)),
    "state: not UTF-8": state(b'{"quant_type": "\xff"}'),
    "state: pickle": state(b"\x80\x02}q\0."),
    "state: nested": state(b"[" * 4000),
    "state: number of 4,000 digits": state(b'{"blocksize": ' + b"6" * 4000 + b"}"),
    "state: 5,000 bytes": state({"x": "x" * 5000}, "companion-malformed"),
    "state: not U8": tensors("nf4", {STATE: ("I8", (90,))}, "companion-malformed"),
    "state: no quant_type": state({"quant_type": None}),
    "state: no blocksize": state({"blocksize": None}),
    "state: no dtype": state({"dtype": None}),
    "state: no shape": state({"shape": None}),
    "state: unknown field": state({"version": 2}),
    "state: unknown quant_type": state({"quant_type": "nf5"}),
    "state: quant_type a list": state({"quant_type": ["nf4"]}),
    "state: quant_type of another": state({"quant_type": "fp4"}, "quant-state-mismatch"),
    "state: blocksize 0": state({"blocksize": 0}),
    "state: blocksize 63": state({"blocksize": 63}),
    "state: blocksize of a terabyte": state({"blocksize": 1 << 40}),
    "state: blocksize true": state({"blocksize": True}),
    "state: blocksize text": state({"blocksize": "64"}),
    "state: blocksize a fraction": state({"blocksize": 64.5}),
    "state: blocksize of another": state({"blocksize": 128}, "companion-malformed"),
    "state: dtype float64": state({"dtype": "float64"}),
    "state: dtype with code": state({"dtype": "__class__"}),
    "state: dtype a number": state({"dtype": 16}),
    "state: shape text": state({"shape": "8x16"}),
    "state: shape empty": state({"shape": []}),
    "state: shape negative": state({"shape": [-8, -16]}),
    "state: shape with nought": state({"shape": [0, 16]}),
    "state: shape of fractions": state({"shape": [8.0, 16.0]}),
    "state: shape too large": state({"shape": [1 << 60, 1 << 60]}),
    "state: shape of 17": state({"shape": [1] * 17}),
    "state: shape of another": state({"shape": [16, 16]}, "quant-state-mismatch"),
    "state: nested_blocksize 0": state({"nested_blocksize": 0}, base="double"),
    "state: no nested_offset": state({"nested_offset": None}, base="double"),
    "state: no nested_dtype": state({"nested_dtype": None}, base="double"),
    "state: nested_offset text": state({"nested_offset": "0.5"}, base="double"),
    "state: nested_offset NaN": state({"nested_offset": float("nan")}, base="double"),
    "state: nested_offset Infinity": state({"nested_offset": float("inf")}, base="double"),
    "state: nested_dtype unknown": state({"nested_dtype": "int8"}, base="double"),
    "state: nothing nested": state(json.dumps(NF4).encode(), "quant-state-mismatch", base="double"),
    "state: nested without its parts": state(
        NESTED, "nested-absmax-missing", "companion-missing", "companion-malformed", DIFFERS
    ),
    "state: two": tensors(
        "nf4", {"q.weight.quant_state.bitsandbytes__fp4": ("U8", (2,), b"{}")}, "quant-state-malformed"
    ),
    # int8
    "int8: no SCB": without("int8", "q.SCB", "companion-missing"),
    "int8: no companions": tensors("int8", {"q.SCB": None, "q.weight_format": None}, "companion-missing"),
    "int8: no weight": without("int8", "q.weight", "companion-orphan", MISMATCH),
    "int8: SCB too short": tensors("int8", {"q.SCB": ("F32", (7,))}, "companion-malformed"),
    "int8: SCB in fp16": tensors("int8", {"q.SCB": ("F16", (8,))}, "companion-malformed"),
    "int8: weight in U8": tensors("int8", {"q.weight": ("U8", (8, 16))}, "companion-malformed"),
    "int8: weight of one dimension": tensors("int8", {"q.weight": ("I8", (128,))}, "companion-malformed"),
    "int8: weight not quantized": tensors("int8", {"q.weight": W}, "companion-malformed"),
    "int8: weight_format col32": tensors("int8", {"q.weight_format": ("U8", (), b"\1")}, "companion-malformed"),
    "int8: weight_format of 8 bytes": tensors("int8", {"q.weight_format": ("I64", ())}, "companion-malformed"),
    # config.json against the tensors
    "config: none": ("nf4", {"config.json": {"model_type": "llama"}}, ("quantization-config-missing",)),
    "config: none, int8": ("int8", {"config.json": {"model_type": "llama"}}, ("quantization-config-missing",)),
    "config: null": config("nf4", None, "quantization-config-missing"),
    "config: a list": config("nf4", [], "quantization-config-malformed"),
    "config: text": config("nf4", "nf4", "quantization-config-malformed"),
    "config: empty": config("nf4", {}, "quantization-config-malformed"),
    "config: quant_method a number": config("nf4", {"quant_method": 4}, "quantization-config-malformed"),
    "config: neither 4 nor 8 bit": config("nf4", {"quant_method": "bitsandbytes"}, MISMATCH),
    "config: 4 and 8 bit": config("nf4", BITSANDBYTES | {"load_in_8bit": True}, MISMATCH),
    "config: 8 bit of nf4": config("nf4", {"quant_method": "bitsandbytes", "load_in_8bit": True}, MISMATCH),
    "config: 4 bit of int8": config("int8", BITSANDBYTES, MISMATCH),
    "config: 4 bit of nothing": config("single", BITSANDBYTES, MISMATCH),
    "config: 8 bit of nothing": config("single", {"quant_method": "bitsandbytes", "load_in_8bit": True}, MISMATCH),
    "config: old, without quant_method": config("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "config: fp4 of nf4": config("nf4", BITSANDBYTES | {"bnb_4bit_quant_type": "fp4"}, DIFFERS),
    "config: nf5": config("nf4", BITSANDBYTES | {"bnb_4bit_quant_type": "nf5"}, "quantization-config-malformed"),
    "config: double of single": config(
        "nf4", BITSANDBYTES | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, DIFFERS
    ),
    "config: single of double": config("double", BITSANDBYTES | {"bnb_4bit_quant_type": "nf4"}, DIFFERS),
    "config: threshold text": config(
        "int8",
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": "6"},
        "quantization-config-malformed",
    ),
    "config: skips a text": config(
        "nf4",
        BITSANDBYTES | {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": "lm_head"},
        "quantization-config-malformed",
    ),
    "config: skips numbers": config(
        "nf4",
        BITSANDBYTES | {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": [1]},
        "quantization-config-malformed",
    ),
    "config: skips what is quantized": config(
        "nf4", BITSANDBYTES | {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["q"]}, "skipped-but-quantized"
    ),
    # Other methods
    "other: torchao": other("torchao", {"q._weight_qdata": ("I8", (8, 16)), "q._weight_scale": ("F32", (8, 1))}),
    "other: quanto": other("quanto", {"q.weight._data": ("I8", (8, 16)), "q.weight._scale": ("BF16", (8, 1))}),
    "other: with ESC": other("\x1b[2J\u202e", {"q.weight": ("U8", (8, 8))}),
    "other: AWQ over plain weights": config("single", {"quant_method": "awq", "bits": 4}, LEFT_OVER),
    "other: GPTQ over plain weights": config("single", {"quant_method": "gptq", "bits": 4}, LEFT_OVER),
    "other: fp8 over plain weights": config("single", {"quant_method": "fp8"}, LEFT_OVER),
    "other: torchao over plain weights": config("single", {"quant_method": "torchao"}, LEFT_OVER),
    "other: with ESC over plain weights": config("single", {"quant_method": "\x1b[2J\u202e"}, LEFT_OVER),
    "other: compressed-tensors over plain weights": (
        "single",
        {"config.json": {"model_type": "llama", "compression_config": {"format": "x"}}},
        (LEFT_OVER,),
    ),
    "other: fp8 weights beside nf4": tensors("nf4", {"a.weight": ("F8_E4M3", (2, 2))}, "fp8-weights"),
    # diffusers
    "diffusers: bf16 storage": tensors("diffusers-nf4", {"q.weight": ("BF16", (32, 1))}, "storage-unsupported"),
    "diffusers: split across shards": (
        "diffusers-nf4",
        {
            FLUX: {"q.weight.absmax": None},
            "s2.safetensors": {"q.weight.absmax": ("F32", (2,))},
            FLUX + ".index.json": {
                "metadata": {},
                "weight_map": {
                    "a.bias": FLUX,
                    "q.weight": FLUX,
                    "q.weight.absmax": "s2.safetensors",
                    "q.weight.quant_map": FLUX,
                    STATE: FLUX,
                },
            },
        },
        ("split-across-shards", "two-layouts"),
    ),
}
