"""The header reader and writer against safetensors itself."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import re
import runpy
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pace import stopwatch
from qz.formats.malformed import Malformed
from qz.formats.tensors.safetensors import BITS, Header, TensorInfo, read_header
from qz.formats.tensors.safetensors_layout import encode_header, layout

# What safetensors' writer calls each dtype; it cannot write the 6-bit ones, and F4 only two to an element.
WRITTEN = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "F64": "float64", "I64": "int64", "U64": "uint64",
    "C64": "complex64", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E4M3FNUZ": "float8_e4m3fnuz",
}  # fmt: skip
Entry = tuple[str, str, tuple[int, ...]]
zeros = ctypes.create_string_buffer(1 << 16)


def theirs(entries: list[Entry], metadata: dict[str, str] | None) -> bytes:
    """The file that safetensors writes for these entries, all zeros."""
    specs = {}
    for name, dtype, shape in entries:
        size = int(np.prod(shape, dtype=np.int64)) * BITS[dtype] // 8
        pointer = ctypes.addressof(zeros)
        specs[name] = safetensors.TensorSpec(dtype=WRITTEN[dtype], shape=shape, data_ptr=pointer, data_len=size)
    return bytes(safetensors.serialize(specs, metadata))


def ours(entries: list[Entry], metadata: dict[str, str]) -> bytes:
    """The same, by the functions under test."""
    placed = layout(entries)
    return encode_header(placed, metadata) + bytes(placed[-1].stop if placed else 0)


def header_of(data: bytes) -> Header:
    return read_header(lambda offset, length: data[offset : offset + length], len(data), "x.safetensors")


def file(text: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header text, whatever it is."""
    text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


safe_names = st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
all_names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def entries(names: st.SearchStrategy[str]) -> st.SearchStrategy[list[Entry]]:
    return st.lists(
        st.tuples(names, st.sampled_from(sorted(WRITTEN)), shapes), max_size=12, unique_by=lambda entry: entry[0]
    )


# Writing


def test_layout_sorts_every_pair_of_dtypes_as_safetensors_does() -> None:
    for first, second in itertools.permutations(WRITTEN, 2):
        pair: list[Entry] = [("x", first, (8,)), ("y", second, (8,))]
        assert ours(pair, {"format": "pt"}) == theirs(pair, {"format": "pt"})


@settings(max_examples=150, deadline=None)
@given(entries(all_names))
def test_a_written_header_is_byte_for_byte_that_of_save_file(listed: list[Entry]) -> None:
    metadata = {"format": "pt"} if listed else {}  # without tensors, safetensors 0.8.0 writes invalid JSON there
    assert ours(listed, metadata) == theirs(listed, metadata or None)


def test_names_are_escaped_as_safetensors_escapes_them() -> None:
    name = "".join(map(chr, range(0x20 + 1))) + "\"\\/\x7f\x80é\u2028\u202e\ufeff😀<>&'"
    assert ours([(name, "F32", ())], {"format": "p\x1bt"}) == theirs([(name, "F32", ())], {"format": "p\x1bt"})


def test_torch_and_numpy_write_the_same_file(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.arange(15, dtype=torch.bfloat16).reshape(3, 5),
        "a": torch.ones(2),
        "z": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
        "codes": torch.arange(7, dtype=torch.uint8),
    }
    dtypes = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}
    placed = layout([(name, dtypes[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()])
    data = b"".join(tensors[info.name].reshape(-1).view(torch.uint8).numpy().tobytes() for info in placed)
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert encode_header(placed) + data == (tmp_path / "theirs.safetensors").read_bytes()

    arrays: dict[str, np.ndarray[Any, Any]] = {"w": np.arange(6, dtype=np.int64), "v": np.ones((2, 2), np.float16)}
    placed = layout([("w", "I64", (6,)), ("v", "F16", (2, 2))])
    data = b"".join(arrays[info.name].tobytes() for info in placed)
    assert encode_header(placed, {}) + data == safetensors.numpy.save(arrays)


def test_a_reserved_header_has_the_size_asked_for_and_still_opens(tmp_path: Path) -> None:
    placed = layout([("a", "F32", (2,))])
    data = encode_header(placed, reserve=1003) + bytes(8)
    assert len(data) == 1003 + 8
    (tmp_path / "x.safetensors").write_bytes(data)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.get_tensor("a").tolist() == [0, 0]
    assert header_of(data).data_start == 1003


def test_a_header_that_does_not_fit_is_not_written() -> None:
    with pytest.raises(ValueError, match="does not fit in 40"):
        encode_header(layout([("a", "F32", (2,))]), reserve=40)


def test_layout_refuses_what_has_no_whole_bytes() -> None:
    with pytest.raises(ValueError, match="whole bytes"):
        layout([("a", "F4", (3,))])
    with pytest.raises(ValueError, match="unknown dtype F7"):
        layout([("a", "F7", (3,))])


def test_metadata_keys_keep_their_order() -> None:
    metadata = {"z": "1", "a": "2", "format": "pt"}
    assert list(header_of(ours([("w", "F32", ())], metadata)).metadata) == ["z", "a", "format"]


# Reading


@settings(max_examples=150, deadline=None)
@given(entries(safe_names), st.dictionaries(all_names, all_names, max_size=3))
def test_what_safetensors_writes_is_read_back(listed: list[Entry], metadata: dict[str, str]) -> None:
    if not listed:
        metadata = {}
    header = header_of(theirs(listed, metadata or None))
    assert header.metadata == metadata
    assert list(header.tensors.values()) == layout(listed)


def test_every_dtype_of_safetensors_is_known_with_its_size() -> None:
    for dtype, bits in BITS.items():
        text = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}})
        data = file(text, bytes(bits))
        assert header_of(data).tensors["a"] == TensorInfo("a", dtype, (8,), 0, bits)
        ((name, info),) = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        assert (name, info["dtype"], info["shape"]) == ("a", dtype, [8])


@pytest.mark.parametrize(
    "text",
    [
        '{"a":{"data_offsets":[0,4],"shape":[],"dtype":"F32"}}',
        '{ "a" :\n\t{ "dtype" : "F32" , "shape" : [ ] , "data_offsets" : [ 0 , 4 ] } } \n ',
        '{"\\u0061":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        '{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
        '{"__metadata__":{},"a":{"dtype":"F32","sh\\u0061pe":[],"data_offsets":[0,4]}}',
    ],
    ids=["other order", "white space", "escaped", "json.dumps", "escaped field"],
)
def test_other_ways_to_write_the_same_header_are_read(text: str) -> None:
    data = file(text, bytes(4))
    assert list(header_of(data).tensors.values()) == [TensorInfo("a", "F32", (), 0, 4)]
    assert list(safetensors.torch.load(data)) == ["a"]


PLAIN = '"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'


@pytest.mark.parametrize(
    "second",
    [
        '"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}',
        '"b" : { "dtype" : "U8", "shape" : [ 2 ], "data_offsets" : [ 2, 4 ] }',
        '"b":{"shape":[2],"data_offsets":[2,4],"dtype":"U8"}',
        '"\\u0062":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}',
        '"__metadata__":{"x":"y"},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}',
    ],
)
def test_every_way_of_writing_an_entry_is_read_alike(second: str) -> None:
    for entries in (
        [PLAIN, second],
        [second, PLAIN],
        [PLAIN, second, '"é":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}'],
    ):
        text = ("{" + ", ".join(entries) + "}").encode()
        found = header_of(len(text).to_bytes(8, "little") + text + bytes(4))
        assert [found.tensors[name] for name in "ab"] == [
            TensorInfo("a", "U8", (2,), 0, 2),
            TensorInfo("b", "U8", (2,), 2, 4),
        ]


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (PLAIN, "tensor 'a' appears twice"),
        ('"\\u0061":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}', "tensor 'a' appears twice"),
        ('"__metadata__":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}', "'shape' is not a string"),
        ('"":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}', "is empty"),
        ('"\x7f":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}', "control characters"),
        ('"b":{"dtype":"U9","shape":[2],"data_offsets":[2,4]}', "unknown dtype 'U9'"),
        ('"b":{"dtype":"U8","shape":[3],"data_offsets":[2,4]}', "does not fill its bytes 2 to 4"),
        ('"b":{"dtype":"F4","shape":[3],"data_offsets":[2,4]}', "does not fill its bytes 2 to 4"),
        ('"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}', "overlaps the one before it"),
        ('"b":{"dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[2,2]}', "impossibly large"),
        ('"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]};', "a comma or a brace is missing"),
        ('"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}', "something follows the closing brace"),
    ],
)
def test_a_bad_entry_behind_plain_ones_is_told_like_a_first_one(second: str, why: str) -> None:
    text = f"{{{PLAIN},{second}}}".encode()
    with pytest.raises(Malformed, match=re.escape(why)):
        header_of(len(text).to_bytes(8, "little") + text + bytes(4))


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    text = (
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        '"empty":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}'
    )
    assert list(header_of(file(text, bytes(3))).tensors) == ["b", "empty", "a"]


def test_a_long_header_is_read_with_a_second_read_and_a_short_one_with_one() -> None:
    reads: list[tuple[int, int]] = []
    for count in (10, 2000):
        data = ours([(f"model.layers.{place}.weight", "U8", (1,)) for place in range(count)], {})

        def read(offset: int, length: int, data: bytes = data) -> bytes:
            reads.append((offset, length))
            return data[offset : offset + length]

        assert len(read_header(read, len(data), "x").tensors) == count
    assert [offset for offset, _ in reads] == [0, 0, 8]


# Refusing

REFUSED: dict[str, tuple[bytes, str, str]] = runpy.run_path(str(Path(__file__).parent / "malformed" / "headers.py"))[
    "CASES"
]


@pytest.mark.parametrize(("data", "kind", "why"), REFUSED.values(), ids=REFUSED)
def test_a_malformed_file_is_refused_with_the_reason(data: bytes, kind: str, why: str) -> None:
    with pytest.raises(Malformed, match=why) as raised:
        header_of(data)
    assert raised.value.kind == kind
    assert str(raised.value).startswith("x.safetensors ")
    assert str(raised.value).isprintable()


BOMBS: dict[str, Callable[[], bytes]] = {
    "one tensor of 25 M dimensions": lambda: (
        b'{"a":{"dtype":"F32","shape":[' + b"0," * 24_999_900 + b'0],"data_offsets":[0,0]}}'
    ),
    "a long list": lambda: b'{"a":[' + b"[]," * 15_000_000 + b"[]]}",
    "a million tensors and one": lambda: (
        b"{"
        + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % place for place in range(1_000_001))
        + b"}"
    ),
    "objects": lambda: b'{"a":' * 8_000_000,
    "metadata": lambda: b'{"__metadata__":{' + b",".join(b'"%d":""' % place for place in range(1_000_000)) + b"}}",
    "backslashes": lambda: b'{"' + b"\\" * 15_000_000,
    "white space": lambda: b"{" + b" " * 15_000_000,
    "a long string": lambda: b'{"' + b"\xf0\x9f\x98\x80" * 3_500_000 + b'":{}}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_neither_time_nor_memory(name: str) -> None:
    data = file(BOMBS[name]())
    tracemalloc.start()
    try:
        with stopwatch() as watch, pytest.raises(Malformed):
            header_of(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert watch.loops < 30
    assert peak < 3 * len(data)


# Fuzzing


def fuzzer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_headers", Path(__file__).with_name("fuzz_headers.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_is_accepted_safetensors_accepts_with_the_same_tensors() -> None:
    """Some seconds' worth; `make fuzz` runs ten million."""
    tally = fuzzer().fuzz(seed=time.time_ns() % (1 << 32), count=6_000)
    assert tally.inputs == 6_000
    assert tally.accepted > tally.inputs / 20


@pytest.mark.fuzz
def test_ten_million_inputs_make_no_difference() -> None:
    tally = fuzzer().fuzz(seed=time.time_ns() % (1 << 32), count=10_000_000)
    assert tally.inputs == 10_000_000
