"""bitsandbytes' quant_state: the small JSON object that lies as a U8 tensor beside every 4-bit weight."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NoReturn

from qz import QzError
from qz.formats.json_files import read_json
from qz.formats.malformed import Malformed, quoted

MAX_BYTES = 4096
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("bfloat16", "float16", "float32")
_FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}


class QuantState(NamedTuple):
    """How a 4-bit weight was made: its ``shape`` and ``dtype`` before, elements a block, and the same of its absmax.

    The ``nested_`` fields are None without double quantization; ``nested_offset`` was subtracted from absmax before.
    """

    quant_type: Literal["nf4", "fp4"]
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested_blocksize: int | None = None
    nested_dtype: str | None = None
    nested_offset: float | None = None


def parse_quant_state(data: bytes, where: str) -> QuantState:
    """The quant_state in ``data`` (bitsandbytes 0.50 ``QuantState.from_dict``); Malformed, with ``where`` and why."""

    def fail(why: str) -> NoReturn:
        raise Malformed("quant-state-malformed", f"{where} {why}. Quantize the original again, or download this again.")

    try:
        said = read_json(data, where, limit=MAX_BYTES)
    except QzError as error:
        raise Malformed("quant-state-malformed", str(error)) from None
    missing = (_FIELDS if not _NESTED & said.keys() else _FIELDS | _NESTED) - said.keys()
    if missing:
        fail(f"lacks {', '.join(sorted(missing))}")
    if unknown := said.keys() - _FIELDS - _NESTED:
        fail(f"has the unknown field {quoted(min(unknown), 40)}, which bitsandbytes refuses")
    shape = said["shape"]
    if not isinstance(shape, list) or not shape or len(shape) > 16 or not all(_is_count(extent) for extent in shape):
        fail("has a shape that is not a list of positive numbers")
    for field, known in (
        ("quant_type", ("nf4", "fp4")),
        ("dtype", DTYPES),
        ("blocksize", BLOCKSIZES),
        ("nested_dtype", DTYPES),
        ("nested_blocksize", BLOCKSIZES),
    ):
        value: Any = said.get(field)
        if field in said and (isinstance(value, bool) or value not in known):
            fail(f"has the {field} {quoted(str(value), 40)}, which is none of {', '.join(map(str, known))}")
    offset = said.get("nested_offset")
    if offset is not None or "nested_offset" in said:
        if not isinstance(offset, int | float) or isinstance(offset, bool):
            fail("has a nested_offset that is not a number")
        offset = float(offset)
    return QuantState(
        quant_type=said["quant_type"],
        blocksize=said["blocksize"],
        dtype=said["dtype"],
        shape=tuple(shape),
        nested_blocksize=said.get("nested_blocksize"),
        nested_dtype=said.get("nested_dtype"),
        nested_offset=offset,
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 48
