"""Pickles that are no state dict, or want more than to be one: bytes of a pickle, and the kind of problem it is.

``@`` as the first byte stands for a zip archive of ``torch.save`` around the pickle, with one storage of 16 bytes;
without it the bytes are the file.
"""

from __future__ import annotations

import pickle
import struct

UNSAFE, BROKEN = "pickle-unsafe", "pickle-malformed"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
"""The persistent id of four float32 values."""


def tensor(offset: bytes = b"K\x00", shape: bytes = b"K\x04\x85", strides: bytes = b"K\x01\x85") -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + offset + shape + strides
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def state(value: bytes) -> bytes:
    """A zip archive of a dictionary with one item."""
    return b"@\x80\x02}X\x01\x00\x00\x00w" + value + b"s."


class Command:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch /tmp/qz-was-run",)


CASES: dict[str, tuple[bytes, str | None]] = {
    "good": (state(tensor()), None),
    # What is asked for
    "a command": (b"@" + pickle.dumps({"w": Command()}, protocol=2), UNSAFE),
    "a command, protocol 4": (b"@" + pickle.dumps({"w": Command()}, protocol=4), UNSAFE),
    "a command in the legacy form": (pickle.dumps(Command()), UNSAFE),
    "a command as an instance": (b"@(S'true'\nios\nsystem\n.", UNSAFE),
    "a command as an object": (b"@(cos\nsystem\nS'true'\no.", UNSAFE),
    "a command by new": (b"@\x80\x02csubprocess\nPopen\nX\x04\x00\x00\x00true\x85\x81.", UNSAFE),
    "a name of builtins": (state(b"cbuiltins\neval\n"), UNSAFE),
    "a name of torch": (state(b"ctorch\nload\n"), UNSAFE),
    "a name with dots": (state(b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n"), UNSAFE),
    "an extension": (state(b"\x82\x01"), UNSAFE),
    "attributes of a function": (state(b"ccollections\nOrderedDict\n}b"), UNSAFE),
    "a call of a string": (state(b"X\x02\x00\x00\x00ls)R"), UNSAFE),
    "a storage of another class": (
        state(tensor().replace(b"ctorch\nFloatStorage", b"ctorch\nOtherStorage")),
        UNSAFE,
    ),
    "an id that is no storage": (state(b"X\x04\x00\x00\x00fileQ"), UNSAFE),
    "an id that is a text": (state(b"Pfile\n"), UNSAFE),
    "an old view": (state(tensor().replace(b"K\x04tQ", b"K\x04K\x00tQ")), UNSAFE),
    "a set": (state(b"\x8f"), UNSAFE),
    "a key that is a tuple": (b"@\x80\x02}K\x00K\x00\x86K\x01s.", UNSAFE),
    "a key that is a dictionary": (b"@\x80\x02}}K\x01s.", UNSAFE),
    "items of a text": (state(b"X\x01\x00\x00\x00a(K\x01K\x02u"), UNSAFE),
    # What does not fit
    "no dictionary": (b"@\x80\x02]K\x01a.", BROKEN),
    "empty": (b"@", BROKEN),
    "no end": (b"@\x80\x02}", BROKEN),
    "an unknown instruction": (b"@\x80\x02\xff.", BROKEN),
    "nothing on the stack": (b"@\x80\x02.", BROKEN),
    "no mark": (b"@\x80\x02}K\x01K\x02u.", BROKEN),
    "a mark left": (b"@\x80\x02(.", BROKEN),
    "half an item": (b"@\x80\x02}(K\x01u.", BROKEN),
    "a memory that is not there": (b"@\x80\x02h\x05.", BROKEN),
    "a memory of nothing": (b"@\x80\x02q\x05.", BROKEN),
    "a text longer than the file": (b"@\x80\x02X\xff\xff\xff\x7fa.", BROKEN),
    "bytes longer than memory": (b"@\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".", BROKEN),
    "a number of a million digits": (b"@I" + b"1" * 1_000_000 + b"\n.", BROKEN),
    "a tensor beyond its storage": (state(tensor(shape=b"K\x05\x85")), BROKEN),
    "a tensor that begins beyond it": (state(tensor(offset=b"K\x04", shape=b"K\x01\x85")), BROKEN),
    "a tensor of strides beyond it": (state(tensor(shape=b"K\x02K\x02\x86", strides=b"K\x03K\x01\x86")), BROKEN),
    "a tensor of a petabyte": (
        state(tensor(shape=b"\x8a\x07" + b"\x00" * 6 + b"\x40\x85", strides=b"K\x00\x85")),
        BROKEN,
    ),
    "a negative offset": (state(tensor(offset=b"J\xff\xff\xff\xff")), BROKEN),
    "a negative stride": (state(tensor(strides=b"J\xff\xff\xff\xff\x85")), BROKEN),
    "a shape of texts": (state(tensor(shape=b"X\x01\x00\x00\x004\x85")), BROKEN),
    "a shape without strides": (state(tensor(strides=b")")), BROKEN),
    "a tensor without a storage": (state(tensor().replace(STORAGE, b"N")), BROKEN),
    "a storage that is missing": (state(tensor().replace(b"\x01\x00\x00\x000X", b"\x01\x00\x00\x009X")), BROKEN),
    "a storage that is a path": (state(tensor().replace(b"\x01\x00\x00\x000X", b"\x04\x00\x00\x00../0X")), BROKEN),
    "a storage that is too small": (state(tensor().replace(b"cpuK\x04", b"cpuK\x05")), BROKEN),
    "a name that controls terminals": (b"@\x80\x02}X\x04\x00\x00\x00\x1b[2J" + tensor() + b"s.", BROKEN),
    "a tensor without a name": (b"@\x80\x02}X\x00\x00\x00\x00" + tensor() + b"s.", BROKEN),
    # Files
    "another pickle": (pickle.dumps({"a": 1}), BROKEN),
    "legacy, cut off": (pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2), BROKEN),
    "legacy, of another version": (
        pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1002, protocol=2),
        BROKEN,
    ),
    "no file of PyTorch": (b"hello", BROKEN),
    "nothing": (b"\x00" * 64, BROKEN),
    "a zip archive of nothing": (b"PK\x05\x06" + bytes(18), BROKEN),
    "half a zip archive": (b"PK\x03\x04" + bytes(60), BROKEN),
}
