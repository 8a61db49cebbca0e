"""16-bit values to 4-bit codes, block by block, by LLVM's code alone: importing numba takes longer than a gigabyte.

The loop is written out in llvmlite's terms, compiled when it is first needed, in a few hundredths of a second, and
called by its address without the GIL.
"""

from __future__ import annotations

import ctypes
import os
from types import ModuleType
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
from llvmlite import ir

from qz.quantize.compute import cuda_tables, tables
from qz.quantize.compute.cpu.llvm_vectors import I8, I16, I64, broadcast, largest_magnitude, load, same, store_codes
from qz.quantize.compute.once import once

_Array = npt.NDArray[Any]


def quantize_4bit(values: _Array, dtype: str, quant_type: str, packed: _Array, absmax: _Array) -> tuple[int, int]:
    """``kernels.quantize_4bit`` of "BF16" or "F16". Returns the count and the first index of non-finite values."""
    whole = values.size // 64 * 64
    bad = _quantize(values[:whole], dtype, quant_type, tables, packed, absmax)
    if whole < values.size:
        bad |= quantize_tail(
            tables.widen(values[whole:], dtype), quant_type, packed[whole // 2 :], absmax[whole // 64 :]
        )
    return nonfinite(values, dtype) if bad else (0, -1)


def quantize_4bit_as_cuda(
    values: _Array, dtype: str, quant_type: str, packed: _Array, absmax: _Array
) -> tuple[int, int]:
    """The kernel of CUDA fills a short block up with zeros, and knows no other rule for it."""
    whole = values.size // 64 * 64
    bad = _quantize(values[:whole], dtype, quant_type, cuda_tables, packed, absmax)
    if whole < values.size:
        block, codes = np.zeros(64, np.uint16), np.empty(32, np.uint8)
        block[: values.size - whole] = values[whole:]
        bad |= _quantize(block, dtype, quant_type, cuda_tables, codes, absmax[whole // 64 :])
        packed[whole // 2 :] = codes[: packed.size - whole // 2]
    return nonfinite(values, dtype) if bad else (0, -1)


def require_working() -> None:
    """Raise whatever llvmlite raises where it is not as it was."""
    _compiled("nf4", False)


def nonfinite(values: _Array, dtype: str) -> tuple[int, int]:
    """How many values are not finite, and the index of the first."""
    bad = np.flatnonzero((values & np.uint16(0x7FFF)) >= tables.infinity_bits(dtype))
    return bad.size, int(bad[0]) if bad.size else -1


def _quantize(whole: _Array, dtype: str, quant_type: str, rules: ModuleType, packed: _Array, absmax: _Array) -> bool:
    """Whole blocks by integer comparison with ``rules.cut_points``; whether there is a value that is not finite.

    ``rules``: the module of the tables. The codes of a block with such a value are meaningless.
    """
    function = _compiled(quant_type, rules is cuda_tables)
    cuts, magnitudes = rules.cut_points(quant_type, dtype), rules.magnitudes(dtype)
    addresses = (array.ctypes.data for array in (whole, cuts, magnitudes, packed, absmax))
    return bool(function(*addresses, whole.size // 64, tables.infinity_bits(dtype)))


def quantize_tail(values: _Array, quant_type: str, packed: _Array, absmax: _Array) -> bool:
    """The last, short block, as float32: divided by its clamped absmax, which is also what is stored."""
    with np.errstate(invalid="ignore"):
        top = np.maximum(np.abs(values).max(), np.float32(1e-38))
        scaled = np.append(values / top, np.zeros(values.size % 2, np.float32))
    codes = tables.order(quant_type)[np.searchsorted(tables.bounds(quant_type), scaled, side="left")]
    absmax[0], packed[:] = top, codes[::2] << 4 | codes[1::2]
    return not np.isfinite(top)


@once
def _compiled(quant_type: str, cuda: bool) -> Any:
    """The function at its address: int64 of pointers to the arrays, the count of blocks and the bits of infinity."""
    order = (cuda_tables if cuda else tables).order(quant_type)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(*_processor(), opt=3)
    module = llvm.parse_assembly(str(_module(order.tolist())))
    module.verify()
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    pointers, numbers = [ctypes.c_void_p] * 5, [ctypes.c_int64, ctypes.c_uint16]
    return ctypes.CFUNCTYPE(ctypes.c_int64, *pointers, *numbers)(engine.get_function_address("quantize"))


_engines: list[Any] = []
"""What owns the code."""


def _processor() -> tuple[str, str]:
    """The name and the features of the one that the code is for: this one, or the one that numba is told."""
    name = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES")
    return name, llvm.get_host_cpu_features().flatten() if features is None else features


def _module(codes: list[int]) -> ir.Module:
    """``codes``: in the order of the cut points."""
    module = ir.Module()
    shorts, octets, floats = I16.as_pointer(), I8.as_pointer(), ir.FloatType().as_pointer()
    kind = ir.FunctionType(I64, [shorts, shorts, floats, octets, floats, I64, I16])
    function = ir.Function(module, kind, "quantize")
    values, cuts, magnitudes, packed, absmax, blocks, infinity = function.args
    entry, loop, done = (function.append_basic_block(name) for name in ("entry", "loop", "done"))
    builder = ir.IRBuilder(entry)
    builder.cbranch(builder.icmp_signed(">", blocks, I64(0)), loop, done)

    builder.position_at_end(loop)
    block, bad = builder.phi(I64), builder.phi(I64)
    x = load(builder, builder.gep(values, [builder.mul(block, I64(64))]), I16)
    top = builder.zext(largest_magnitude(builder, x), I64)
    builder.store(builder.load(builder.gep(magnitudes, [top])), builder.gep(absmax, [block]), align=1)
    beyond = builder.icmp_unsigned(">=", top, builder.zext(infinity, I64))
    bad_now = builder.or_(bad, builder.zext(beyond, I64))
    # As integers that sort like the values.
    ordered = builder.xor(x, builder.and_(builder.ashr(x, same(I16, 15)), same(I16, 0x7FFF)))
    row = builder.gep(cuts, [builder.shl(top, I64(4))])
    limits = [builder.load(builder.gep(row, [I64(k)])) for k in range(15)]
    above = [builder.icmp_signed(">", ordered, broadcast(builder, limit)) for limit in limits]
    store_codes(builder, above, codes, I16, builder.gep(packed, [builder.mul(block, I64(32))]))
    following = builder.add(block, I64(1))
    builder.cbranch(builder.icmp_signed("<", following, blocks), loop, done)
    for phi, first, later in ((block, I64(0), following), (bad, I64(0), bad_now)):
        phi.add_incoming(first, entry)
        phi.add_incoming(later, loop)

    builder.position_at_end(done)
    found = builder.phi(I64)
    found.add_incoming(I64(0), entry)
    found.add_incoming(bad_now, loop)
    builder.ret(found)
    return module
