"""Differential fuzzing of the header reader: what qz accepts, safetensors accepts, with the same tensors.

    python tests/fuzz_headers.py --count 10000000

Mutates small valid files, as JSON trees and as bytes, and compares ``read_header`` with ``safetensors.deserialize``.
The first difference is printed and ends the run with 1. It also counts what safetensors accepts and qz does not, by
reason: every one of those must be a strictness that is meant.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError, deserialize

from qz import QzError
from qz.formats.tensors.safetensors import BITS, read_header
from qz.formats.tensors.safetensors_layout import encode_header, layout

NAMES = ("a", "b", "layer.0.weight", "é", "😀", 'x"y', "back\\slash", "tab\t", "", "__metadata__", "\u202e", "a" * 40)
TOKENS = (
    *(bytes((byte,)) for byte in b'{}[],:"\\ \n\t\0\x0b\x7f\xff\xc3'),
    *(b"null true -0 -1 0 00 1e0 1.0 0.0 1E2 NaN Infinity [] {} [0,0] // 9223372036854775808".split()),
    *(b"18446744073709551615 18446744073709551616 \\u0041 \\ud800 \\ud83d\\ude00 \\u0000 \\/ \\x".split()),
    *(b'"a": "dtype": "shape": "data_offsets": "__metadata__": "F32" "BOOL" "F4" "F6_E2M3" "extra":1,'.split()),
    *(b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc2\x85"),
)
NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 4, 7, 8, 16, -1, 1.0, True, None, "1", []),
    *(1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64),
)
MEANT = re.compile(
    "appears twice|is empty|is too long|holds control characters|dimensions|needs exactly|not an object|"
    "is not described|has .* twice|number is negative|more than|longer than"
)


@dataclass
class Tally:
    """How often each thing happened. ``stricter``: why qz refused what safetensors takes."""

    inputs: int = 0
    accepted: int = 0
    stricter: Counter[str] = field(default_factory=Counter)


class Difference(AssertionError):
    """qz and safetensors disagree in a way that is not meant."""


def check(data: bytes, tally: Tally) -> None:
    """Compare both readers on one whole file."""
    tally.inputs += 1
    try:
        header = read_header(lambda offset, length: data[offset : offset + length], len(data), "x")
    except QzError as error:
        reason = re.sub(r"['\"].*['\"]|\d+", "…", str(error))
        try:
            deserialize(data)  # type: ignore[no-untyped-call]
        except SafetensorError:
            return
        tally.stricter[reason] += 1
        if not (MEANT.search(str(error)) or data[8:9].isspace() or holds_twins(data)):
            raise Difference(f"safetensors accepts, qz does not ({error}): {data!r}") from None
        return
    tally.accepted += 1
    try:
        theirs = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise Difference(f"qz accepts, safetensors does not ({error}): {data!r}") from None
    ours = {
        info.name: (info.dtype, list(info.shape), data[header.data_start + info.start : header.data_start + info.stop])
        for info in header.tensors.values()
    }
    other = {name: (info["dtype"], list(info["shape"]), bytes(info["data"])) for name, info in theirs}
    if ours != other:
        raise Difference(f"qz reads {ours}, safetensors {other}: {data!r}")


def holds_twins(data: bytes) -> bool:
    """Whether a name is there twice; safetensors forgets the first, whatever it says."""
    pairs = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=list)
    return len(dict(pairs)) < len(pairs)


class Mutator:
    """Random files, from valid to absurd; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.valid = [self.fresh() for _ in range(200)]

    def fresh(self) -> tuple[bytes, bytes]:
        """A valid header's text and its data, as ``save_file`` writes them."""
        choose = self.random
        names = choose.sample(
            [name for name in NAMES if name.isprintable() and name and name[0] != "_"], choose.randint(0, 4)
        )
        dtypes = [dtype for dtype in BITS if BITS[dtype] % 8 == 0]
        entries = [
            (name, choose.choice(dtypes), tuple(choose.choice((0, 1, 2, 3)) for _ in range(choose.randint(0, 3))))
            for name in names
        ]
        if choose.random() < 0.2:
            entries.append(("packed", choose.choice(("F4", "F6_E2M3", "F6_E3M2")), (choose.choice((4, 8)), 2)))
        placed = layout(entries)
        metadata = {"format": "pt"} if choose.random() < 0.5 else {}
        data = choose.randbytes(placed[-1].stop) if placed else b""
        return encode_header(placed, metadata)[8:], data

    def next(self) -> bytes:
        choose = self.random
        text, data = choose.choice(self.valid)
        kind = choose.random()
        if kind < 0.45:
            text = self.changed_tree(text)
        if kind > 0.4:
            for _ in range(choose.choice((0, 1, 1, 1, 2, 3))):
                text = self.changed_bytes(text)
        if choose.random() < 0.1:
            data = choose.choice((b"", data[:-1], data + b"\0", data * 2))
        length = len(text)
        if choose.random() < 0.03:
            length = choose.choice((0, 1, length - 1, length + 1, length + len(data), 1 << 32, (1 << 64) - 1))
        return max(length, 0).to_bytes(8, "little") + text + data

    def changed_bytes(self, text: bytes) -> bytes:
        choose = self.random
        start = choose.randrange(len(text) + 1)
        stop = min(len(text), start + choose.choice((0, 0, 1, 1, 2, 5)))
        return (
            text[:start] + choose.choice(TOKENS) + text[stop:] if choose.random() < 0.8 else text[:start] + text[stop:]
        )

    def changed_tree(self, text: bytes) -> bytes:
        choose = self.random
        pairs = [(name, dict(entry)) for name, entry in json.loads(text).items()]
        for _ in range(choose.choice((1, 1, 2))):
            self.change(pairs)
        space = choose.choice(("", "", " ", "\n", " \t\r\n"))
        separators = (space + "," + space, space + ":" + space)
        escape = choose.random() < 0.3
        body = separators[0].join(
            json.dumps(name, ensure_ascii=escape)
            + separators[1]
            + json.dumps(entry, separators=separators, ensure_ascii=escape)
            for name, entry in pairs
        )
        return ("{" + body + space + "}").encode("utf-8", "surrogatepass") + b" " * choose.choice((0, 0, 1, 8))

    def change(self, pairs: list[tuple[str, Any]]) -> None:
        """One structural change: of an entry's fields, of the order, or of the entries there are."""
        choose = self.random
        act = choose.randrange(8)
        if act == 0:
            choose.shuffle(pairs)
        elif act == 1 and pairs:
            pairs.append(choose.choice(pairs))
        elif act == 2:
            pairs.append(
                (choose.choice(NAMES), choose.choice(({}, [], None, "x", {"format": "pt"}, {"k": 1}, {"k": "v"})))
            )
        elif act == 3:
            offset = choose.choice((0, 4, 8))
            entry = {"dtype": choose.choice((*BITS, "f32", "F16 ")), "shape": [], "data_offsets": [offset, offset]}
            entry["shape"] = [choose.choice((0, 1, 1 << 40)) for _ in range(choose.choice((0, 1, 2, 17)))]
            pairs.append((choose.choice(NAMES), entry))
        elif pairs:
            self.change_entry(*choose.choice(pairs))

    def change_entry(self, _: str, entry: Any) -> None:
        choose = self.random
        if not isinstance(entry, dict) or not entry:
            return
        key = choose.choice(list(entry))
        act = choose.randrange(5)
        if act == 0:
            del entry[key]
        elif act == 1:
            entry[choose.choice(("extra", "dtype", "shape"))] = choose.choice(NUMBERS)
        elif act == 2:
            items = list(entry.items())
            choose.shuffle(items)
            entry.clear()
            entry.update(items)
        elif isinstance(entry[key], list) and entry[key]:
            entry[key][choose.randrange(len(entry[key]))] = choose.choice(NUMBERS)
        else:
            entry[key] = choose.choice((*NUMBERS, *BITS))


def fuzz(seed: int, count: int | None = None, seconds: float | None = None) -> Tally:
    """Run ``count`` inputs, or as many as ``seconds`` allow; raises Difference at the first one found."""
    mutator, tally = Mutator(seed), Tally()
    end = time.monotonic() + seconds if seconds is not None else float("inf")
    while (count is None or tally.inputs < count) and (tally.inputs % 256 or time.monotonic() < end):
        check(mutator.next(), tally)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, help="how many inputs (default: a million)")
    parser.add_argument("--seconds", type=float, help="how long, instead")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    count = options.count if options.count or options.seconds else 1_000_000
    print(f"seed {options.seed}", flush=True)
    start = time.monotonic()
    try:
        tally = fuzz(options.seed, count, options.seconds)
    except Difference as difference:
        print(difference)
        return 1
    print(
        f"{tally.inputs} inputs in {time.monotonic() - start:.0f} s: qz accepted {tally.accepted}, all of them rightly;"
    )
    print(f"it refused {tally.stricter.total()} that safetensors accepts:")
    for reason, times in tally.stricter.most_common(8):
        print(f"  {times:8} {reason.partition('. Download')[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
