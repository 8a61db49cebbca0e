"""A staging area that keeps nothing: what is written is compared with what lies in a finished output."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qz.formats.output.resuming.pending import IsVerified
from qz.formats.output.shards.checksums import as_bytes
from qz.formats.output.shards.shard_layout import ShardLayout
from qz.quantize.methods import BLOCK_SIZE
from qz.quantize.streaming.discard import DiscardedShard, DiscardOutput

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qz.formats.files.folder import Folder
    from qz.formats.tensors.decoded import StoredTensor
    from qz.quantize.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How a tensor differs from what was recomputed. ``bytes``: how many of its bytes; ``first``: the first of them.

    ``missing``: it is not there, or with another dtype, shape or file; then in words. ``explained``: by what is known
    of the libraries' arithmetic on other devices, in words.
    """

    name: str
    file: str
    bytes: int
    first: int
    missing: str | None = None
    explained: str | None = None

    def inside(self, prefix: str) -> TensorDifference:
        """With the name and file as they are in a whole output."""
        return replace(self, name=prefix + self.name, file=prefix + self.file)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "file": self.file,
            "bytes": self.bytes,
            "first": self.first,
            "missing": self.missing,
            "explained": self.explained,
        }


@dataclass(slots=True)
class _Tally:
    bytes: int = 0
    first: int = -1
    explained: str | None = ""
    """Empty while nothing differs, None as soon as something is not explained."""


class ComparedOutput(DiscardOutput):
    """Where a ``Run`` puts what it makes."""

    def __init__(
        self,
        plan: Plan,
        folder: Folder,
        stored: Mapping[str, StoredTensor],
        *,
        other_device: bool,
        on_equal: Callable[[str], None],
    ) -> None:
        """``folder`` has the tensors that are ``stored``. ``other_device``: whether they were computed on another kind
        of device than what is written. ``on_equal`` is called for each weight all of whose tensors are equal.
        """
        self._plan, self._folder, self._stored = plan, folder, stored
        self._other_device, self._on_equal = other_device, on_equal
        self._places = {saved.name: (saved, step) for step in plan.steps for saved in step.outputs}
        self._tallies: dict[str, _Tally] = {}
        self._left: dict[str, int] = {}
        """Bytes of a tensor, and tensors of a weight, that are not compared yet, of those that are begun."""
        self._lock = threading.Lock()
        self.misplaced = {each.name: each for each in self._misplaced()}
        self.compared: set[str] = set()

    def _misplaced(self) -> list[TensorDifference]:
        """Tensors that are not where the plan has them, and those that are in no plan."""
        found: list[TensorDifference] = []
        left = dict(self._stored)
        for layout in self._plan.shards:
            for planned in layout.tensors:
                stored = left.pop(planned.name, None)
                why = None
                if stored is None:
                    why = "it is not there"
                elif stored.file != layout.file:
                    why = f"it lies in {stored.file}"
                elif planned.name not in layout.variable and stored.offset != layout.header_size + planned.start:
                    why = "it lies at another place of the file"
                elif stored.dtype != planned.dtype or (
                    planned.name not in layout.variable and stored.shape != planned.shape
                ):
                    why = f"it is {stored.dtype} {list(stored.shape)}, not {planned.dtype} {list(planned.shape)}"
                if why is not None:
                    found.append(TensorDifference(planned.name, layout.file, 0, 0, why))
        found += [TensorDifference(name, stored.file, 0, 0, "it is not planned") for name, stored in left.items()]
        return found

    @property
    def differences(self) -> tuple[TensorDifference, ...]:
        """In the order of the names."""
        found = [
            TensorDifference(name, self._stored[name].file, tally.bytes, tally.first, explained=tally.explained or None)
            for name, tally in self._tallies.items()
        ]
        return tuple(sorted([*found, *self.misplaced.values()], key=lambda each: each.name))

    def open_shard(self, layout: ShardLayout, is_verified: IsVerified) -> ComparedShard:  # noqa: ARG002 - as a staging area has it
        return ComparedShard(layout.file, self)

    def give_up(self) -> None:
        self._folder.give_up()

    def compare(self, tensor: str, data: memoryview, offset: int) -> None:
        """``data`` is what ``tensor`` has to hold from byte ``offset`` on."""
        self._compare(tensor, data, offset)
        self._book(tensor, len(data), self._places[tensor][0].nbytes)

    def compare_whole(self, tensor: str, data: bytes) -> None:
        """The same for a tensor whose length is not planned."""
        stored = self._stored.get(tensor)
        size = stored.nbytes if stored is not None else len(data)
        self._compare(tensor, memoryview(data[:size].ljust(size, b"\0")), 0)
        self._book(tensor, 0, 0)

    def _compare(self, tensor: str, data: memoryview, offset: int) -> None:
        stored = self._stored.get(tensor)
        if stored is None or tensor in self.misplaced or not len(data):
            return
        there = bytearray(len(data))
        self._folder.read_into(stored.file, stored.offset + offset, memoryview(there))
        if there != data:
            self._note(tensor, np.frombuffer(there, np.uint8), np.frombuffer(data, np.uint8), offset)

    def _book(self, tensor: str, nbytes: int, all_bytes: int) -> None:
        """Count what is compared, to note each weight that is equal as a whole."""
        weight = self._places[tensor][1].weight.name
        outputs = self._places[tensor][1].outputs
        with self._lock:
            self.compared.add(tensor)
            if self._count(f"tensor {tensor}", nbytes, all_bytes) or self._count(f"weight {weight}", 1, len(outputs)):
                return
            names = {saved.name for saved in outputs}
            equal = names.isdisjoint(self._tallies) and names.isdisjoint(self.misplaced)
        if equal:
            self._on_equal(weight)

    def _count(self, what: str, done: int, whole: int) -> int:
        """How much is left of it."""
        left = self._left.pop(what, whole) - done
        if left > 0:
            self._left[what] = left
        return left

    def _note(self, tensor: str, there: NDArray[np.uint8], wanted: NDArray[np.uint8], offset: int) -> None:
        places = np.flatnonzero(there != wanted)
        why = self._explained(tensor, there, wanted) if self._other_device else None
        with self._lock:
            tally = self._tallies.setdefault(tensor, _Tally())
            tally.bytes += len(places)
            first = offset + int(places[0])
            tally.first = first if tally.first < 0 else min(tally.first, first)
            tally.explained = None if why is None or tally.explained is None else why

    def _explained(self, tensor: str, there: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> str | None:
        method, (saved, step) = self._plan.method, self._places[tensor]
        if method is None or step.act != "quantize" or not saved.part:
            return None
        return explained(method.name, method.double_quant, saved.part, there, wanted)


def explained(
    method: str, double_quant: bool, kind: str, there: NDArray[np.uint8], wanted: NDArray[np.uint8]
) -> str | None:
    """What makes the libraries write the two on different devices, in words; None if nothing known does.

    ``kind``: which tensor of a quantized weight it is. See docs/explanation/equal-bytes.md, "CPU and GPU".
    """
    if method == "int8" and kind == "weight":
        apart = np.abs(there.view(np.int8).astype(np.int16) - wanted.view(np.int8))
        return "ties of int8 are rounded otherwise" if apart.max() <= 1 else None
    if kind == "weight" and method == "nf4":
        return "blocks of zeros have another code" if _in_blocks_of_zeros(there, wanted) else None
    if kind == "weight" and method == "fp4":
        clear = (_without_sign_of_zero(there) == _without_sign_of_zero(wanted)).all()
        return "zero has another sign" if clear else None
    if not double_quant:
        return None
    if kind == "weight.absmax":
        apart = np.abs(there.astype(np.int16) - wanted)
        return SUMS if apart.max() <= 1 else None
    if kind == "weight.nested_absmax" and len(there) % 4 == 0:
        return SUMS if np.allclose(there.view(np.float32), wanted.view(np.float32), rtol=1e-6, atol=0) else None
    return SUMS if "quant_state" in kind else None


SUMS = "the mean of the scales is summed in another order"


def _in_blocks_of_zeros(there: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> bool:
    """Whether they differ only in whole blocks in which one has the code 7 for all values, and the other the code 0."""
    width = BLOCK_SIZE // 2
    if len(there) % width:
        return False
    one, other = there.reshape(-1, width), wanted.reshape(-1, width)
    unlike = (one != other).any(axis=1)
    pairs = np.sort(np.stack([one[unlike], other[unlike]]), axis=0)
    return bool((pairs[0] == 0).all() and (pairs[1] == 0x77).all())


def _without_sign_of_zero(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """4-bit codes of fp4, two a byte, in which -0 (0b1000) is 0."""
    plain = codes.copy()
    plain[codes & 0xF0 == 0x80] &= 0x0F
    plain[codes & 0x0F == 0x08] &= 0xF0
    return plain


@dataclass(frozen=True, slots=True)
class ComparedShard(DiscardedShard):
    """Has what a ``Run`` needs of a shard's writer."""

    output: ComparedOutput

    def write(self, tensor: str, data: Any, offset: int = 0) -> None:
        self.output.compare(tensor, as_bytes(data), offset)

    def write_variable(self, tensor: str, data: bytes) -> None:
        self.output.compare_whole(tensor, data)
