"""Weights in 8-bit and 4-bit floats beside their scales, by the names that tools give those.

``weight_scale_inv`` (DeepSeek, transformers' fp8), ``weight_scale`` (fbgemm, ModelOpt, compressed-tensors), ``scale``
(DeepSeek-V4), ``qscale_weight`` (Mistral), ``scale_weight`` (ComfyUI); experts have ``<name>_scale_inv`` and the like.
Without any scales the codes are the values, as in ComfyUI's plain fp8 files.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from qz.formats.checkpoint.small_tensors import read_small
from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import CODES, FLOATS_8, GLOBAL_SCALE, SCALE, Decoded
from qz.formats.tensors.encodings import Grid

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qz.formats.sources.reading import Reading
    from qz.formats.tensors.decoded import StoredTensor

_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E4M3", "F8_E8M0", "U8")
_OF_ACTIVATIONS = re.compile(
    r"(?:.*\.)?(?:activation_scale|input_scale|scale_input|input_scale_ub|output_scale|[qkv]_scale|kv_scale"
    r"|input_global_scale|[qkv]_cache_scale|qscale_act|gate_up_proj_input_scale|down_proj_input_scale)"
)
_OF_INPUTS = re.compile(r"(?:.*\.)?pre_quant_scale")
"""What ModelOpt multiplies a layer's inputs by: its weights are divided by the same."""
_MARKER = re.compile(r"(?:.*\.)?scaled_fp8")
_COMFY = ".comfy_quant"
_COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_MOST_JSON = 4096


def read_scaled(reading: Reading) -> None:
    """Take every weight of 8-bit and 4-bit floats; what belongs to activations is left out."""
    tensors = reading.tensors
    scaled = {name: scale for name in tensors if (scale := _scale_of(name, tensors)) is not None}
    used = {part.name for parts in scaled.values() for part in parts}
    for name, tensor in tensors.items():
        if name in scaled:
            _take_scaled(reading, tensor, *scaled[name])
        elif tensor.dtype in FLOATS_8 and name not in used and not _MARKER.fullmatch(name):
            if scaled:
                reading.problems.add("scale-missing", quoted(name), name=quoted(name), dtype=tensor.dtype)
            reading.take(Decoded(name, reading.dtype, tensor.shape, {CODES: tensor}, Grid(tensor.dtype, (1, 1))))
    for name, tensor in tensors.items():
        if _OF_INPUTS.fullmatch(name):
            what = "weights of scaled inputs (pre_quant_scale)"
            reading.problems.add("encoding-unknown", quoted(name), what=what)
        if name not in reading.used and (
            _MARKER.fullmatch(name) or (_OF_ACTIVATIONS.fullmatch(name) and tensor.dtype not in FLOATS_8)
        ):
            reading.leave_out(tensor)
    _check_comfy(reading)


def _scale_of(name: str, tensors: Mapping[str, StoredTensor]) -> tuple[StoredTensor, ...] | None:
    """The scale of a weight of small floats, and the scale of all of its scales if there is one."""
    tensor = tensors[name]
    if tensor.dtype not in (*FLOATS_8, "U8", "I8", "F4"):
        return None
    for candidate in _candidates(name):
        scale = tensors.get(candidate)
        if scale is None or scale.dtype not in _SCALE_DTYPES:
            continue
        if tensor.dtype not in FLOATS_8 and scale.dtype not in ("F8_E4M3", "F8_E8M0"):
            continue  # int8 belongs to others; two 4-bit floats in a byte have 8-bit scales
        overall = tensors.get(f"{name}_scale_2")
        return (scale, overall) if overall is not None else (scale,)
    return None


def _candidates(name: str) -> Iterator[str]:
    yield f"{name}_scale_inv"
    yield f"{name}_scale"
    if name == "weight" or name.endswith(".weight"):
        module = name.removesuffix("weight")
        yield from (module + last for last in ("scale_weight", "qscale_weight", "scale"))


def _take_scaled(
    reading: Reading, tensor: StoredTensor, scale: StoredTensor, overall: StoredTensor | None = None
) -> None:
    codes = tensor.dtype if tensor.dtype in FLOATS_8 else "F4"
    shape = tensor.shape
    if codes == "F4" and shape and tensor.dtype != "F4":  # two in a byte
        shape = (*shape[:-1], shape[-1] * 2)
    block = block_of(shape, scale.shape, stated_block(reading.settings.get("weight_block_size")))
    if block is None or (overall is not None and overall.nbytes != 4):
        reading.misfit(scale, shape)
        return
    parts = {CODES: tensor, SCALE: scale}
    if overall is not None:
        parts[GLOBAL_SCALE] = overall
    grid = Grid(codes, block, exponents=scale.dtype == "U8")
    reading.take(Decoded(tensor.name, reading.dtype, shape, parts, grid))


def block_of(
    shape: tuple[int, ...], scales: tuple[int, ...], stated: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """How many rows and columns a scale holds for, ``stated`` if that fits; None if they do not fit the weight.

    At the edges of a weight that is no multiple of the stated block, blocks are cut off. Without a statement the blocks
    are equal, as ``Fp8Dequantize`` of transformers 5.23 takes them.
    """
    if not shape or 0 in shape:
        return None
    *matrices, rows, columns = (1, *shape) if len(shape) == 1 else shape
    count = math.prod(scales)
    if count == 1:
        return (rows, columns)
    each = count // math.prod(matrices) if count % math.prod(matrices) == 0 else 0
    if len(scales) < 2 or (len(scales) > 2 and scales[:-2] != tuple(matrices)):
        flat = count in (rows, rows * math.prod(matrices)) and math.prod(scales[1:]) in (1, rows)
        if flat:
            return (1, columns)
        return (rows, columns) if each == 1 else None
    down, across = scales[-2:]
    if math.prod(scales[:-2]) not in (1, math.prod(matrices)):
        return None
    if stated and (-(-rows // stated[0]), -(-columns // stated[1])) == (down, across):
        return stated
    if 0 in (down, across) or rows % down or columns % across:
        return None
    return rows // down, columns // across


def stated_block(found: object) -> tuple[int, int] | None:
    """The rows and columns of a block that a config states; None for anything else."""
    if isinstance(found, list) and len(found) == 2 and all(type(each) is int and each > 0 for each in found):
        return found[0], found[1]
    return None


def _check_comfy(reading: Reading) -> None:
    """ComfyUI says of each weight in JSON how it is quantized; other forms than fp8 arrange their scales anew."""
    said = [tensor for name, tensor in reading.tensors.items() if name.endswith(_COMFY)]
    small = [tensor for tensor in said if tensor.dtype == "U8" and tensor.nbytes <= _MOST_JSON]
    contents = read_small(reading.folder, small)
    for tensor in said:
        form = _comfy_format(contents.get(tensor.name, b""))
        if form not in _COMFY_FORMATS:
            reading.problems.add("encoding-unknown", quoted(tensor.name), what=f"ComfyUI's {quoted(str(form), 40)}")
        reading.leave_out(tensor)


def _comfy_format(text: bytes) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found.get("format") if isinstance(found, dict) else None
