"""How qz uses numba: explicit signatures, code cached on disk, and the few operations numba has no name for."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic as _intrinsic

from qz.quantize.compute.once import once

_Function = TypeVar("_Function", bound=Callable[..., Any])


def array(dtype: Any, dimensions: int = 1, *, output: bool = False) -> Any:
    """numba's type of a contiguous array that may be unaligned and, unless it is an output, read-only."""
    return types.Array(dtype, dimensions, "C", readonly=not output, aligned=False)


class _NamedCache(FunctionCache):  # type: ignore[misc]  # numba has no types
    """Files of one function, by its name. numba also tells by a pickle what a function closes over, and where these are
    functions of its own it has another pickle of them in every process: nothing would be found again."""

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        return signature, codegen.magic_tuple()


def compiled(signature: Any, *, name: str = "", **options: Any) -> Callable[[_Function], _Function]:
    """``numba.njit`` for this signature, at the first call: compiled, or loaded from the cache of an earlier process.

    ``name``: for a function with a closure, of which there may be several; it says what is closed over.

    The cache lies beside the module, or in the user's cache directory where that cannot be written (or where
    ``NUMBA_CACHE_DIR`` says); without a home there is none. Processes that write it at the same time replace whole
    files. What is cached counts as long as none of the sources that kernels are made of has changed. Thread-safe.
    """

    def decorate(function: _Function) -> _Function:
        assert name or function.__closure__ is None, "what is cached is found by its name alone"
        built: list[Callable[..., Any]] = []
        known: set[tuple[object, ...]] = set()

        def build(*, keep: bool) -> Callable[..., Any]:
            dispatcher = numba.njit(nogil=True, error_model="numpy", **options)(function)
            if keep:  # numba itself looks at the function's own file only; its name is part of the cache's
                function.__qualname__ = f"{name or function.__name__}_{sources_digest()}"
                dispatcher._cache = _NamedCache(function)
            dispatcher.compile(signature)
            dispatcher.disable_compile()
            return cast(Callable[..., Any], dispatcher)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            kinds = tuple(map(_kind, arguments))
            if kinds in known:
                return built[0](*arguments)
            with _first_calls:
                if not built:
                    try:
                        built.append(build(keep=has_place_for_cache(Path(function.__code__.co_filename).parent)))
                    except (RuntimeError, OSError):  # no place for the cache, or no room in it
                        built.append(build(keep=False))
                result = built[0](*arguments)
                known.add(kinds)
            return result

        return cast(_Function, call)

    return decorate


_first_calls = threading.Lock()
"""Held while a kernel meets a kind of arguments for the first time. numba then makes types of them and notes how they
convert, for all kernels at once and without a lock: threads that met there got "No matching definition" at random."""


def _kind(argument: object) -> object:
    """What numba distinguishes arguments by."""
    if isinstance(argument, np.ndarray):
        flags = argument.flags
        return argument.dtype, argument.ndim, flags.c_contiguous, flags.f_contiguous, flags.writeable, flags.aligned
    return type(argument)


def has_place_for_cache(modules: Path) -> bool:
    """Whether numba would keep its cache elsewhere than in a folder ``~`` of the working directory."""
    home = os.path.expanduser("~")
    return bool(os.environ.get("NUMBA_CACHE_DIR")) or os.path.isabs(home) or os.access(modules, os.W_OK)


@once
def sources_digest() -> str:
    """Of the modules that kernels are made of: of loops, generators of LLVM, and tables."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*here.glob("*.py"), *here.parent.glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def inlined(function: _Function) -> _Function:
    """A scalar function for use inside compiled loops, where LLVM inlines it."""
    return cast(_Function, numba.njit(error_model="numpy", inline="always")(function))


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """``numba.extending.intrinsic``: a function of argument types that returns a signature and a generator of LLVM."""
    return cast(Callable[..., Any], _intrinsic(function))


@intrinsic
def bits(_: Any, value: Any) -> Any:  # noqa: ARG001 (numba calls it with types)
    """The bits of a float32, as uint32."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@intrinsic
def float_of(_: Any, value: Any) -> Any:  # noqa: ARG001
    """The float32 of these bits; a wider integer loses its upper half."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic
def bits_64(_: Any, value: Any) -> Any:  # noqa: ARG001
    """The bits of a float64, as int64."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.int64))

    return types.int64(types.float64), generate


@intrinsic
def double_of(_: Any, value: Any) -> Any:  # noqa: ARG001
    """The float64 of these bits."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float64))

    return types.float64(types.int64), generate
