"""The quantization methods of bitsandbytes as frozen settings: what each stores, and the config it writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

from qz import UsageError
from qz.formats.tensors.safetensors import BITS

QuantType = Literal["nf4", "fp4"]

BLOCK_SIZE = 64
"""Values that share one absmax. Fixed: transformers and diffusers have no config field for it."""

NESTED_BLOCK_SIZE = 256
"""Absmax values that share one nested absmax under double quantization."""

LOW_COVERAGE = 0.5
"""Share of the parameters; where less is quantized, the report says so."""

COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
MEAN_LENGTH = 25
"""Characters that JSON needs at most for ``nested_offset``, a float32 printed as a Python float."""


class Part(NamedTuple):
    """One tensor that a quantized weight is stored as. ``suffix`` follows the module's path and a dot."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    variable: bool = False
    """The true length is at most the one of ``shape``, and known only after the weight was quantized."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class FourBit:
    """NF4 or FP4: 4-bit codes in blocks of 64 with an absolute maximum each (QLoRA, arXiv:2305.14314)."""

    quant_type: QuantType
    double_quant: bool = False
    compute_dtype: str = "bfloat16"
    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "compute_dtype", full_name(self.compute_dtype))
        check_compute_dtype(self.compute_dtype)

    @property
    def name(self) -> QuantType:
        return self.quant_type

    def config(self) -> dict[str, Any]:
        """Arguments of both libraries' ``BitsAndBytesConfig``."""
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": self.compute_dtype,
        }

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        """What ``Linear4bit`` adds to a state dict, in its order, for a weight of that shape and torch dtype."""
        count = math.prod(shape)
        blocks = -(-count // BLOCK_SIZE)
        state_name = f"weight.quant_state.bitsandbytes__{self.quant_type}"
        weight = Part("weight", "U8", (-(-count // 2), 1))
        quant_map = Part("weight.quant_map", "F32", (16,))
        if not self.double_quant:
            state = Part(state_name, "U8", (len(self.quant_state(shape, dtype)),))
            return weight, Part("weight.absmax", "F32", (blocks,)), quant_map, state
        longest = len(self.quant_state(shape, dtype, 0.0)) - len("0.0") + MEAN_LENGTH
        nested = Part("weight.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK_SIZE),))
        return (
            weight,
            Part("weight.absmax", "U8", (blocks,)),
            quant_map,
            nested,
            Part("weight.nested_quant_map", "F32", (256,)),
            Part(state_name, "U8", (longest,), variable=True),
        )

    def quant_state(self, shape: tuple[int, ...], dtype: str, nested_offset: float | None = None) -> bytes:
        """The JSON of ``bitsandbytes.functional.QuantState.as_dict(packed=True)`` (0.50.2), byte for byte."""
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": BLOCK_SIZE,
            "dtype": dtype,
            "shape": list(shape),
        }
        if nested_offset is not None:
            state |= {
                "nested_blocksize": NESTED_BLOCK_SIZE,
                "nested_dtype": "float32",
                "nested_offset": nested_offset,
            }
        return json.dumps(state).encode()

    def footprint(self, count: int) -> int:
        """Bytes of a weight of ``count`` values in the model's ``get_memory_footprint()``: the packed codes only."""
        return -(-count // 2)

    def counted(self, count: int) -> int:
        """What transformers' ``num_parameters()`` counts for a weight of ``count`` values: two a byte."""
        return -(-count // 2) * 2


@dataclass(frozen=True, slots=True)
class Int8:
    """LLM.int8(): one scale a row; hidden states beyond ``threshold`` are computed in fp16 (arXiv:2208.07339)."""

    threshold: float = 6.0
    name: ClassVar[Literal["int8"]] = "int8"
    bits: ClassVar[int] = 8
    double_quant: ClassVar[bool] = False
    compute_dtype: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < float("inf"):
            raise UsageError(f"--threshold {self.threshold} is not a finite number ≥ 0. The usual value is 6.0.")

    def config(self) -> dict[str, Any]:
        """Arguments of both libraries' ``BitsAndBytesConfig``."""
        return {"load_in_8bit": True, "llm_int8_threshold": self.threshold}

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:  # noqa: ARG002  as FourBit
        """What ``Linear8bitLt`` adds to a state dict, in its order."""
        return Part("weight", "I8", shape), Part("SCB", "F32", (shape[0],)), Part("weight_format", "U8", ())

    def footprint(self, count: int) -> int:
        """Bytes of a weight of ``count`` values in the model's ``get_memory_footprint()``: SCB is not counted."""
        return count

    def counted(self, count: int) -> int:
        return count


Method = FourBit | Int8
Nf4 = partial(FourBit, "nf4")
Fp4 = partial(FourBit, "fp4")


def full_name(dtype: str) -> str:
    """torch's name of a dtype that may go by a short one: ``bf16``, ``fp16``, ``half``, ``fp32``."""
    return SHORT_NAMES.get(dtype.lower(), dtype)


def check_compute_dtype(name: str) -> None:
    """Raise UsageError unless ``name`` is a dtype that bitsandbytes computes in."""
    if name not in COMPUTE_DTYPES:
        raise UsageError(f"--compute-dtype {name} is not one of {', '.join(COMPUTE_DTYPES)}.")
