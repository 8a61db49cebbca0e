"""The layouts of compressed-tensors (as of its release 0.20): ``weight_packed`` or small codes, and ``weight_scale``.

pack-quantized, int-quantized, float-quantized, naive-quantized, nvfp4-, mxfp4-pack-quantized and mxfp8-quantized.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from qz.formats.checkpoint.small_tensors import read_small
from qz.formats.malformed import quoted
from qz.formats.patterns import INVALID, is_simple
from qz.formats.sources.scaled import block_of, stated_block
from qz.formats.tensors.decoded import CODES, FLOATS_8, GLOBAL_SCALE, GROUPS, SCALE, ZERO_POINT, Decoded
from qz.formats.tensors.encodings import Grid

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qz.formats.sources.reading import Reading
    from qz.formats.tensors.decoded import StoredTensor

_SCALES = ("F32", "BF16", "F16")
_UNKNOWN = re.compile(r"(?:sparse|marlin|mxfp6)[\w-]*")
_OF_ACTIVATIONS = re.compile(
    r"(?:.*\.)?(?:(?:input|output|[qkv]|kv_cache|[qkv]_cache)_(?:scale|zero_point|global_scale|g_idx)|k_scale|v_scale)"
)
_LONGEST_SHAPE = 64


def read_compressed_tensors(reading: Reading) -> None:
    """Take every weight that the package would decompress."""
    groups = _groups(reading.settings)
    sparse, rotated = (_object(reading.settings, key) for key in ("sparsity_config", "transform_config"))
    for form in {str(each.get("format", "")) for each in (reading.settings, sparse, *groups)}:
        if _UNKNOWN.fullmatch(form):
            reading.problems.add("encoding-unknown", "config.json", what=f"the format {quoted(form, 40)}")
            return
    if rotated.get("config_groups"):
        what = "weights that were rotated, to be used with rotated inputs (transform_config)"
        reading.problems.add("encoding-unknown", "config.json", what=what)
        return
    modules = [name.removesuffix("_packed") for name in reading.tensors if name.endswith("weight_packed")]
    if any(reading.tensors[f"{name}_packed"].dtype == "I32" for name in modules) and not any(map(_says_bits, groups)):
        what = "config.json does not say how many bits a packed value has"
        reading.problems.add("encoding-unknown", "config.json", what=what)
        return
    shapes = _stated_shapes(reading, modules)
    for name in modules:
        _take_packed(reading, name, shapes, groups)
    for name, tensor in reading.tensors.items():
        if tensor.dtype in (*FLOATS_8, "I8") and name.endswith("weight") and f"{name}_scale" in reading.tensors:
            _take_codes(reading, tensor)
    for name, tensor in reading.tensors.items():
        if name not in reading.used and _OF_ACTIVATIONS.fullmatch(name):
            reading.leave_out(tensor)


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [group for group in _object(settings, "config_groups").values() if isinstance(group, dict)]


def _object(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What ``settings`` hold under ``key``, if that is an object."""
    found = settings.get(key)
    return found if isinstance(found, dict) else {}


def _says_bits(group: Mapping[str, Any]) -> bool:
    return "num_bits" in _object(group, "weights")


def _stated_shapes(reading: Reading, modules: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """What each ``weight_shape`` says: the packed words hide how many columns there are."""
    stored = [reading.tensors[f"{name}_shape"] for name in modules if f"{name}_shape" in reading.tensors]
    small = [each for each in stored if each.dtype in ("I64", "I32") and each.nbytes <= _LONGEST_SHAPE]
    contents = read_small(reading.folder, small)
    found = {}
    for each in small:
        size, raw = 8 if each.dtype == "I64" else 4, contents[each.name]
        found[each.name.removesuffix("_shape")] = tuple(
            int.from_bytes(raw[start : start + size], "little", signed=True) for start in range(0, len(raw), size)
        )
    return found


def _take_packed(
    reading: Reading, name: str, shapes: Mapping[str, tuple[int, ...]], groups: Iterable[Mapping[str, Any]]
) -> None:
    packed, scale = reading.tensors[f"{name}_packed"], reading.tensors.get(f"{name}_scale")
    if scale is None:
        reading.missing(name, "packed", "scale")
        return
    parts = {CODES: packed, SCALE: scale}
    if (stated := reading.tensors.get(f"{name}_shape")) is not None:
        reading.used.add(stated.name)
    if packed.dtype == "U8":
        _take_floats(reading, name, parts)
        return
    shape = shapes.get(name, ())
    bits = _bits(name, packed, shape, groups)
    if bits is None:
        reading.misfit(packed, shape)
        return
    zero, order = reading.tensors.get(f"{name}_zero_point"), reading.tensors.get(f"{name}_g_idx")
    if zero is not None:
        parts[ZERO_POINT] = zero
    if order is not None:
        parts[GROUPS] = order
    block = block_of(shape, scale.shape)
    if not _fits(shape, block, bits, parts):
        reading.misfit(scale, shape)
        return
    assert block is not None
    _take(reading, name, shape, parts, Grid(f"INT{bits}", block))


def _fits(shape: tuple[int, ...], block: tuple[int, int] | None, bits: int, parts: Mapping[str, StoredTensor]) -> bool:
    """Whether the scales, zero points and groups are those of a weight of ``shape``."""
    scale, zero, order = parts[SCALE], parts.get(ZERO_POINT), parts.get(GROUPS)
    if block is None or scale.dtype not in _SCALES:
        return False
    if zero is not None:
        down, groups = -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
        words = (*shape[:-2], -(-down * bits // 32), groups)
        if zero.dtype != "I32" or zero.shape != words:
            return False
    return order is None or (order.dtype == "I32" and math.prod(order.shape) == shape[-1])


def _bits(name: str, packed: StoredTensor, shape: tuple[int, ...], groups: Iterable[Mapping[str, Any]]) -> int | None:
    """How many bits a code has: what the config's groups say, and the size of the packed tensor allows."""
    if packed.dtype != "I32" or len(shape) < 2 or min(shape) < 1 or packed.shape[:-1] != shape[:-1]:
        return None
    said: dict[int, bool] = {}
    for group in groups:
        bits = _object(group, "weights").get("num_bits")
        if type(bits) is int and 1 <= bits <= 8 and -(-shape[-1] * bits // 32) == packed.shape[-1]:
            said[bits] = said.get(bits, False) or _is_target(name, group.get("targets"))
    if len(said) > 1:
        said = {bits: True for bits, named in said.items() if named}
    return next(iter(said)) if len(said) == 1 else None


def _is_target(name: str, targets: Any) -> bool:
    """Whether a group's targets name the module itself; names of classes do not tell."""
    module = name.removesuffix(".weight")
    for target in targets if isinstance(targets, list) else ():
        if not isinstance(target, str):
            continue
        if target == module:
            return True
        if target.startswith("re:") and is_simple(target[3:]):
            try:
                if re.match(target[3:], module):
                    return True
            except INVALID:
                continue
    return False


def _take_floats(reading: Reading, name: str, parts: dict[str, StoredTensor]) -> None:
    """Two E2M1 codes in a byte; scales of 16 (nvfp4, with a global scale) or 32 (mxfp4, exponents)."""
    packed, scale, overall = parts[CODES], parts[SCALE], reading.tensors.get(f"{name}_global_scale")
    shape = (*packed.shape[:-1], packed.shape[-1] * 2) if packed.shape else ()
    block = block_of(shape, scale.shape)
    if overall is not None:
        parts[GLOBAL_SCALE] = overall
    known = scale.dtype in ("F8_E4M3", "U8", "F8_E8M0", *_SCALES)
    if block is None or not known or (overall is not None and (overall.dtype, overall.nbytes) != ("F32", 4)):
        reading.misfit(scale, shape)
        return
    grid = Grid("F4", block, exponents=scale.dtype == "U8", globally="divide")
    reading.take(Decoded(name, "BF16", shape, parts, grid, rounded=True))


def _take_codes(reading: Reading, tensor: StoredTensor) -> None:
    """A code in each byte, of fp8 or int8."""
    scale, zero = reading.tensors[f"{tensor.name}_scale"], reading.tensors.get(f"{tensor.name}_zero_point")
    parts = {CODES: tensor, SCALE: scale}
    stated = (stated_block(_object(group, "weights").get("block_structure")) for group in _groups(reading.settings))
    block = block_of(tensor.shape, scale.shape, next(filter(None, stated), None))
    fits = scale.dtype in (*_SCALES, "U8", "F8_E8M0")
    if zero is not None:
        parts[ZERO_POINT] = zero
        fits = fits and zero.shape == scale.shape and zero.dtype in ("I8", *FLOATS_8, *_SCALES)
    if block is None or not fits:
        reading.misfit(scale, tensor.shape)
        return
    _take(reading, tensor.name, tensor.shape, parts, Grid(tensor.dtype, block, exponents=scale.dtype == "U8"))


def _take(reading: Reading, name: str, shape: tuple[int, ...], parts: dict[str, StoredTensor], grid: Grid) -> None:
    """Computed in the dtype of the scales, of exponents in bfloat16, as the package does."""
    scale = parts[SCALE].dtype
    dtype = scale if scale in ("F16", "BF16") else "BF16" if scale in ("U8", "F8_E8M0") else ""
    reading.take(Decoded(name, dtype or reading.dtype, shape, parts, grid, rounded=bool(dtype)))
