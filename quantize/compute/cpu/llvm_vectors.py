"""LLVM's vectors of 64 lanes, in llvmlite's terms: what kernels with and without numba are made of.

Nothing here is tied to a processor: LLVM maps vectors of 64 lanes to AVX-512, AVX2, SSE or NEON.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

LANES = 64
I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))


def vector(element: Any, lanes: int = LANES) -> Any:
    """The type of a vector."""
    return ir.VectorType(element, lanes)


def same(element: Any, value: Any, lanes: int = LANES) -> Any:
    """A constant vector whose lanes all hold ``value``."""
    return ir.Constant(vector(element, lanes), [value] * lanes)


def broadcast(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    """A vector whose lanes all hold ``scalar``."""
    single = builder.insert_element(ir.Constant(vector(scalar.type, lanes), ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(single, single, same(I32, 0, lanes))


def pointer_to(context: Any, builder: Any, array_type: Any, value: Any, index: Any) -> Any:
    """The address of an element of one of numba's arrays: ``value``, of ``array_type``."""
    return builder.gep(context.make_array(array_type)(context, builder, value).data, [index])


def load(builder: Any, pointer: Any, element: Any, lanes: int = LANES) -> Any:
    """Consecutive elements from an address of any alignment."""
    loaded = builder.load(builder.bitcast(pointer, vector(element, lanes).as_pointer()))
    loaded.align = 1
    return loaded


def store(builder: Any, value: Any, pointer: Any) -> None:
    """Write a vector to an address of any alignment."""
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 1


def largest_magnitude(builder: Any, loaded: Any) -> Any:
    """Of 64 floats, given as their bits: without the sign, they order like unsigned integers."""
    element = loaded.type.element
    magnitudes = builder.and_(loaded, same(element, 2 ** (element.width - 1) - 1))
    name = f"llvm.vector.reduce.umax.v{LANES}i{element.width}"
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(element, [vector(element)]), name)
    return builder.call(function, [magnitudes])


def store_codes(builder: Any, above: list[Any], codes: list[int], lane: Any, pointer: Any) -> None:
    """Each lane takes the code after the last bound it is above; see ``store_pairs``."""
    chosen = same(lane, codes[0])
    for is_above, code in zip(above, codes[1:], strict=True):
        chosen = builder.select(is_above, same(lane, code), chosen)
    store_pairs(builder, chosen, pointer)


def store_pairs(builder: Any, chosen: Any, pointer: Any) -> None:
    """Pairs of 64 codes become bytes, the first in the high half."""
    lane = chosen.type.element
    # Little endian: the first lane of a pair is its lower half.
    double = ir.IntType(2 * lane.width)
    pairs = builder.bitcast(chosen, vector(double, 32))
    merged = builder.or_(builder.shl(pairs, same(double, 4, 32)), builder.lshr(pairs, same(double, lane.width, 32)))
    store(builder, builder.trunc(merged, vector(I8, 32)), pointer)
