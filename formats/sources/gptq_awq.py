"""GPTQ's and AWQ's layouts: ``qweight``, ``qzeros`` and ``scales`` of the transposed weight, and GPTQ's ``g_idx``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import CODES, GROUPS, SCALE, ZERO_POINT, Decoded
from qz.formats.tensors.encodings import Columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qz.formats.sources.reading import Reading
    from qz.formats.tensors.decoded import StoredTensor

_GPTQ_BITS = (2, 3, 4, 8)
_GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What is added to a stored zero point."""


def read_gptq(reading: Reading) -> None:
    """Take every weight that GPTQ packed, of 2, 3, 4 or 8 bits, in the original format or ``gptq_v2``.

    A layer may have other bits than the config says of all, as with GPTQModel's ``dynamic``: its tensors show them.
    """
    bits, settings = reading.settings.get("bits"), reading.settings
    said = str(settings.get("checkpoint_format", settings.get("format")) or "gptq")
    if bits not in _GPTQ_BITS or said not in _GPTQ_FORMATS:
        what = f"GPTQ of {quoted(str(bits), 10)} bits in the format {quoted(str(said), 40)}"
        reading.problems.add("encoding-unknown", "config.json", what=what)
        return
    for name in [name for name in reading.tensors if name.endswith(".qweight")]:
        layouts = [Columns("rows", each, 0, _GPTQ_FORMATS[said]) for each in (bits, *_GPTQ_BITS)]
        _take(reading, name, layouts)


def read_awq(reading: Reading) -> None:
    """Take every weight that AWQ packed, of 4 bits in its ``gemm`` version."""
    bits, version = reading.settings.get("bits", 4), str(reading.settings.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        what = f"AWQ of {quoted(str(bits), 10)} bits in the version {quoted(version, 40)}"
        reading.problems.add("encoding-unknown", "config.json", what=what)
        return
    for name in [name for name in reading.tensors if name.endswith(".qweight")]:
        _take(reading, name, [Columns("columns", 4, 0)])


def _take(reading: Reading, name: str, layouts: Sequence[Columns]) -> None:
    """The weight of which ``name`` holds the codes, if all parts of it are there and fit one of the layouts."""
    module = name.removesuffix("qweight")
    plain = f"{module}weight"
    parts = {CODES: reading.tensors[name]}
    for part, suffix in ((SCALE, "scales"), (ZERO_POINT, "qzeros"), (GROUPS, "g_idx")):
        if (found := reading.tensors.get(module + suffix)) is not None:
            parts[part] = found
    kind = "GPTQ" if layouts[0].packed == "rows" else "AWQ"
    for part, suffix in ((SCALE, "scales"), (ZERO_POINT, "qzeros")):
        if part not in parts:
            reading.missing(plain, kind, suffix)
            return
    layout, shape = next(((each, shape) for each in layouts if (shape := _shape(parts, each))), (layouts[0], None))
    if shape is None:
        stored = ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts.values())
        reading.problems.add("encoded-malformed", quoted(name), name=quoted(name), kind=kind, found=stored)
        return
    groups = parts[SCALE].shape[0]
    group = -(-shape[1] // groups)
    scale = parts[SCALE].dtype
    rounded = scale in ("F16", "BF16")
    encoding = Columns(layout.packed, layout.bits, group, layout.zero_offset)
    reading.take(Decoded(plain, scale if rounded else reading.dtype, shape, parts, encoding, rounded=rounded))


def _shape(parts: dict[str, StoredTensor], layout: Columns) -> tuple[int, int] | None:
    """(out, in) of the weight; None if its parts do not fit together."""
    codes, scale, zero, order = parts[CODES], parts[SCALE], parts[ZERO_POINT], parts.get(GROUPS)
    bits = layout.bits
    if any(len(part.shape) != 2 or 0 in part.shape for part in (codes, scale, zero)):
        return None
    if codes.dtype != "I32" or zero.dtype != "I32" or scale.dtype not in ("F16", "BF16", "F32"):
        return None
    rows = scale.shape[1]
    along = order.shape[0] if order is not None and len(order.shape) == 1 else None
    if layout.packed == "rows":
        columns = along or codes.shape[0] * 32 // bits
        fits = codes.shape == (-(-columns * bits // 32), rows)
    else:
        columns = codes.shape[0]
        fits = codes.shape == (columns, rows * bits // 32) and rows * bits % 32 == 0
    fits = fits and zero.shape == (scale.shape[0], -(-rows * bits // 32))
    if order is not None:
        fits = fits and order.dtype == "I32" and along == columns
    elif columns % scale.shape[0]:
        return None
    return (rows, columns) if fits else None
