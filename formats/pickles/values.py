"""What a pickled checkpoint may consist of: containers, plain values, storages and tensors over them.

The functions that PyTorch's pickles call are known by name and done here; no object of another class is ever made.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qz.formats.malformed import quoted

STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
DTYPES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_OTHERS = re.compile(
    r"(?:Complex|Q)\w+Storage|complex\d+|qu?int\d\w*|per_(?:tensor|channel)\w*|_rebuild_(?:qtensor|sparse_tensor"
    r"|sparse_csr_tensor|nested_tensor|meta_tensor_no_storage)"
)
"""Names by which PyTorch saves tensors of other kinds, which run nothing either."""
_KEY = re.compile(r"[0-9A-Za-z_.-]{1,64}")


class UnsafePickle(Exception):
    """The pickle asks for something else than containers, plain values and tensors; the message says what."""


class BrokenPickle(Exception):
    """The pickle breaks the rules of its format; the message says how."""


class OtherTensor(Exception):
    """The pickle has a tensor of a kind that is not read; the message says of which."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that stands for a function or a class, never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return quoted(f"{self.module}.{self.name}", 100)


@dataclass(frozen=True, slots=True)
class Storage:
    """``key`` names its bytes in the file; ``count`` values of ``dtype``."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor over a storage: ``offset`` and ``strides`` in values of ``dtype``."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def storage_of(persistent: Any) -> Storage:
    """The storage that a persistent id of ``torch.save`` names: (storage, class, key, device, count)."""
    if not isinstance(persistent, tuple) or len(persistent) not in (5, 6) or persistent[0] != "storage":
        raise UnsafePickle("an object stored outside of it that is not a storage")
    _, kind, key, _, count = persistent[:5]
    if len(persistent) == 6 and persistent[5] is not None:
        raise UnsafePickle("a view of a storage, as PyTorch before 0.4 wrote them")
    known = isinstance(kind, Global) and kind.module in ("torch", "torch.storage") and kind.name in STORAGES
    if not known:
        raise UnsafePickle(f"a storage of the class {kind}")
    if not isinstance(key, str) or not _KEY.fullmatch(key) or type(count) is not int or count < 0:
        raise BrokenPickle("a storage has no valid key or size")
    return Storage(key, STORAGES[kind.name], count)


def called(function: Any, arguments: Any) -> Any:
    """What a call gives that PyTorch's pickles make; UnsafePickle for any other."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise UnsafePickle("a call of something that has no name")
    known = _CALLS.get((function.module, function.name))
    if known is None:
        raise UnsafePickle(f"a call of {function}")
    try:
        return known(*arguments)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BrokenPickle(f"{function} is called with arguments that it does not take") from error


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any, dtype: str | None = None) -> PickledTensor:
    """``more``: requires_grad, hooks, and what is to be done to the values when they are used, such as ``neg``."""
    if len(more) > 2 and more[2]:
        raise OtherTensor("a view that is negated or conjugated when it is used, which qz does not read")
    whole = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or any(type(each) is not int or each < 0 for each in whole):
        raise ValueError
    if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= 16):
        raise ValueError
    return PickledTensor(storage, dtype or storage.dtype, offset, shape, strides)


def _tensor_of(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> PickledTensor:
    """``_rebuild_tensor_v3``: (…, requires_grad, hooks, dtype[, metadata])."""
    dtype = more[2]
    if not isinstance(dtype, Global) or dtype.module != "torch":
        raise ValueError
    return _tensor(storage, offset, shape, strides, *more[:2], *more[3:], dtype=DTYPES[dtype.name])


def _parameter(data: Any, *_: Any) -> PickledTensor:
    if not isinstance(data, PickledTensor):
        raise ValueError
    return data


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in items:
        put(found, key, value)
    return found


def _size(extents: Any = ()) -> tuple[Any, ...]:
    if not isinstance(extents, tuple | list):
        raise ValueError
    return tuple(extents)


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """How Python 2 and 3 both read bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError
    return text.encode("latin1")


def _nothing(*_: Any) -> None:
    return None


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _dictionary,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): _size,
    ("torch", "device"): _nothing,
    ("_codecs", "encode"): _encoded,
}


def named(module: Any, name: Any) -> Global:
    """A name that may occur: of the calls above, a storage class or a dtype; UnsafePickle for every other."""
    found = Global(str(module), str(name))
    if (found.module, found.name) in _CALLS:
        return found
    if found.module in ("torch", "torch.storage") and found.name in STORAGES:
        return found
    if found.module == "torch" and found.name in DTYPES:
        return found
    if found.module in ("torch", "torch.storage", "torch._utils") and _OTHERS.fullmatch(found.name):
        raise OtherTensor(f"a complex, quantized, sparse or nested tensor ({found}), which qz does not read")
    raise UnsafePickle(f"{found}, which is neither a tensor nor a container")


def put(found: dict[Any, Any], key: Any, value: Any) -> None:
    """Add an item; only keys whose hash costs nothing."""
    if key is not None and type(key) not in (str, int, float, bool, bytes):
        raise UnsafePickle(f"a dictionary with a key of type {type(key).__name__}")
    found[key] = value
