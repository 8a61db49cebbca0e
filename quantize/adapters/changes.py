"""The arithmetic of a LoRA: what it makes of rows of a weight, in float32.

As ``peft`` 0.21 merges: LoRA W + s·B·A (Hu et al., 2021), DoRA m·(W + s·B·A)/‖W + s·B·A‖ (Liu et al., 2024), LoHa the
element-wise product of two low-rank products, LoKr a Kronecker product (``peft/tuners/{lora,loha,lokr}/layer.py``).
As ``lycoris`` 4.1 (``functional``): the tucker form of each, and a DoRA of any of them, of which only a part may count.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qz import MalformedInput
from qz.formats.checkpoint.adapter_file import AdapterFile
from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import StoredTensor
from qz.quantize.adapters.modules import AdapterModule
from qz.quantize.compute.arrays import NUMPY, Memory
from qz.quantize.compute.tables import widen

Floats = NDArray[np.float32]
_ALPHAS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``[start, start + count)`` of a weight are changed as the rows from ``first`` on of a module's change."""

    start: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Expert:
    """Which of the experts that a module changes, its ``B`` (out, rank · count) and ``A`` (rank · count, in).

    PEFT keeps them so (``peft.tuners.lora.layer.ParamWrapper``, 0.21): the ranks of ``A`` expert by expert, those of
    ``B`` the other way round.
    """

    index: int
    count: int
    transposed: bool
    """The change of the expert's matrix as it is stored is (in, out)."""


@dataclass(frozen=True)
class Change:
    """What one module of a LoRA does to one tensor."""

    module: AdapterModule
    scale: float
    """Alpha by rank, times what the user asked for, unless ``strength`` is that."""
    pieces: tuple[Piece, ...]
    what: Literal["weight", "bias", "bias of B", "replace"] = "weight"
    transposed: bool = False
    """The tensor holds (in, out): the weight of a ``Conv1D``, or of an embedding whose ``B·A`` is (out, in)."""
    magnitude_of: Literal["rows", "columns"] | None = None
    """Of which norms a DoRA sets, in the tensor as it is stored; columns of a convolution are its input channels."""
    strength: float = 1.0
    """How much of the new norms of LyCORIS' DoRA counts."""
    expert: Expert | None = None

    @property
    def adapter(self) -> AdapterFile:
        return self.module.adapter


@dataclass
class Loaded:
    """A change with its factors in memory, float32; ``columns`` of the changed tensor, which is seen as a matrix."""

    change: Change
    columns: int
    factors: dict[str, Floats] = field(default_factory=dict)
    full: Floats | None = None
    """The whole change where it cannot be computed by rows."""

    def __post_init__(self) -> None:
        module = self.change.module
        wanted = _WANTED[self.change.what]
        for part, tensor in module.parts.items():
            if part != "alpha" and (wanted is None or part in wanted):
                self.factors[part] = read_floats(module.adapter, tensor, self.change.expert, part)
        if self.change.what == "weight" and module.kind == "LoHa" and "hada_t1" in self.factors:
            self.full = self._tucker_loha()

    def apply(self, weight: Floats, start: int, memory: Memory) -> None:
        """Change ``weight`` in place: rows from ``start`` on, (rows, columns)."""
        stop = start + len(weight)
        touched = [each for each in self.change.pieces if each.start < stop and start < each.start + each.count]
        for piece in touched:
            low, high = max(start, piece.start), min(stop, piece.start + piece.count)
            first = piece.first + low - piece.start
            rows = weight[low - start : high - start]
            added = self._rows(first, first + high - low, memory)
            if self.change.what == "replace":
                rows[:] = added
            else:
                rows += added
            if self.change.magnitude_of == "rows":
                rows *= self._by_norms(np.linalg.norm(rows, axis=1), slice(first, first + high - low))[:, None]
        if self.change.magnitude_of == "columns":  # all rows are here
            channels = weight.reshape(len(weight), self._magnitude.size, -1)
            channels *= self._by_norms(np.sqrt(np.square(channels).sum(axis=(0, 2))), slice(None))[:, None]

    @property
    def _magnitude(self) -> Floats:
        return self.factors["magnitude" if "magnitude" in self.factors else "dora_scale"].reshape(-1)

    def _by_norms(self, norms: Floats, part: slice) -> Floats:
        """What vectors of these ``norms`` are multiplied by."""
        factors: Floats = self._magnitude[part] / norms
        strength = np.float32(self.change.strength)
        return factors if strength == 1 else strength * (factors - 1) + 1

    def _rows(self, first: int, last: int, memory: Memory) -> Floats:
        """Rows of what is added, or of what replaces the tensor."""
        factors, scale = self.factors, np.float32(self.change.scale)
        if self.change.what == "replace":
            return factors["replacement"].reshape(-1, self.columns)[first:last]
        if self.change.what == "bias":
            return factors["bias_difference"].reshape(-1, 1)[first:last] * scale
        if self.change.what == "bias of B":
            return factors["up_bias"].reshape(-1, 1)[first:last] * scale
        if self.full is not None:
            return self.full[first:last] * scale
        kind = self.change.module.kind
        if kind == "difference":
            return factors["difference"].reshape(-1, self.columns)[first:last] * scale
        if kind == "LoHa":
            one, two = (
                _flat(factors[f"{name}_a"])[first:last] @ _flat(factors[f"{name}_b"]) for name in ("hada_w1", "hada_w2")
            )
            return one * two * scale
        if kind == "LoKr":
            return self._kronecker_rows(first, last) * scale
        left, right = self._low_rank()
        # In reused memory: allocating takes longer than computing what is put there.
        added: Floats = memory("added", (last - first) * right.shape[1] * 4).view(np.float32)
        added = added.reshape(last - first, right.shape[1])
        np.matmul(left[first:last], right, out=added)
        if scale != 1:
            added *= scale
        return added

    def _low_rank(self) -> tuple[Floats, Floats]:
        """(rows, r) and (r, columns)."""
        factors = self.factors
        down, up = (factors.get(name, factors.get(f"embedding_{name}")) for name in ("down", "up"))
        assert down is not None
        assert up is not None
        if "mid" in factors:
            down = np.einsum("rs...,si->ri...", factors["mid"], _flat(down))
        down, up = _flat(down), _flat(up)
        expert = self.change.expert
        transposed = self.change.transposed if expert is None else expert.transposed
        return (down.T, up.T) if transposed else (up, down)

    def _kronecker_rows(self, first: int, last: int) -> Floats:
        factors = self.factors
        one = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
        if "lokr_w2" in factors:
            two = _flat(factors["lokr_w2"])
        elif "lokr_t2" in factors:
            two = _flat(np.einsum(_TUCKER, factors["lokr_t2"], factors["lokr_w2_b"], factors["lokr_w2_a"]))
        else:
            two = factors["lokr_w2_a"] @ _flat(factors["lokr_w2_b"])
        rows = np.arange(first, last)
        return (one[rows // len(two), :, None] * two[rows % len(two), None, :]).reshape(last - first, -1)

    def _tucker_loha(self) -> Floats:
        """Each factor is a core with a matrix on two of its sides (``rebuild_tucker`` of LyCORIS)."""
        one, two = (
            np.einsum(_TUCKER, *(self.factors[f"hada_{name}"] for name in names))
            for names in (("t1", "w1_b", "w1_a"), ("t2", "w2_b", "w2_a"))
        )
        return _flat(one * two)


_TUCKER = "ij...,jr,ip->pr..."
_WANTED: dict[str, tuple[str, ...] | None] = {
    "weight": None, "bias": ("bias_difference",), "bias of B": ("up_bias",), "replace": ("replacement",),
}  # fmt: skip


class Changes:
    """All changes of one tensor, in the order in which the LoRAs were named; loaded when they are first needed."""

    def __init__(self, changes: Sequence[Change], columns: int) -> None:
        self.changes, self.columns = changes, columns
        self.lock = threading.Lock()
        self.loaded: list[Loaded] | None = None

    def apply(self, weight: Floats, start: int, memory: Memory) -> None:
        """Change rows from ``start`` on in place; from any thread."""
        with self.lock:
            if self.loaded is None:
                self.loaded = [Loaded(change, self.columns) for change in self.changes]
        for loaded in self.loaded:
            loaded.apply(weight, start, memory)


def matrix_shape(shape: tuple[int, ...], *, experts: bool) -> tuple[int, int]:
    """(rows, columns) that changes are computed in: of 3-D ``experts`` the rows of all of their matrices."""
    if experts and shape:
        return math.prod(shape[:-1]), shape[-1]
    return (shape[0] if shape else 1), max(math.prod(shape[1:]), 1)


def delta_shape(module: AdapterModule) -> tuple[int, int]:
    """(rows, columns) of a module's change to a weight, as its factors say; MalformedInput if they do not fit."""
    shapes = {part: tensor.shape for part, tensor in module.parts.items()}

    def product(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, int]:
        inner = math.prod(left[1:])
        if len(left) < 2 or len(right) < 2 or inner != right[0]:
            raise _misfit(module)
        return left[0], math.prod(right[1:])

    kind = module.kind
    if kind == "difference":
        shape = shapes["difference"]
        return (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    if kind == "LoHa":
        if "hada_t1" in shapes:
            return _tucker(module, "hada_t1", "hada_w1_a", "hada_w1_b")
        both = product(shapes["hada_w1_a"], shapes["hada_w1_b"]), product(shapes["hada_w2_a"], shapes["hada_w2_b"])
        if both[0] != both[1]:
            raise _misfit(module)
        return both[0]
    if kind == "LoKr":
        one = shapes["lokr_w1"] if "lokr_w1" in shapes else product(shapes["lokr_w1_a"], shapes["lokr_w1_b"])
        if len(one) != 2:
            raise _misfit(module)
        if "lokr_w2" in shapes:
            two = (shapes["lokr_w2"][0], math.prod(shapes["lokr_w2"][1:])) if len(shapes["lokr_w2"]) > 1 else (0, 0)
        elif "lokr_t2" in shapes:
            two = _tucker(module, "lokr_t2", "lokr_w2_a", "lokr_w2_b")
        else:
            two = product(shapes["lokr_w2_a"], shapes["lokr_w2_b"])
        return one[0] * two[0], one[1] * two[1]
    if "embedding_down" in shapes:
        return product(shapes["embedding_up"], shapes["embedding_down"])
    if "mid" in shapes:
        mid, down, up = shapes["mid"], shapes["down"], shapes["up"]
        if len(mid) < 3 or math.prod(up[1:]) != mid[0] or down[0] != mid[1]:
            raise _misfit(module)
        return up[0], math.prod(down[1:]) * math.prod(mid[2:])
    return product(shapes["up"], shapes["down"])


def _tucker(module: AdapterModule, core: str, out: str, into: str) -> tuple[int, int]:
    middle, first, second = (module.parts[name].shape for name in (core, out, into))
    if len(middle) < 3 or len(first) != 2 or len(second) != 2 or middle[:2] != (first[0], second[0]):
        raise _misfit(module)
    return first[1], second[1] * math.prod(middle[2:])


def _misfit(module: AdapterModule) -> MalformedInput:
    shown = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in sorted(module.parts.items()))
    return MalformedInput(
        f"{module.adapter.where}: the parts of {quoted(module.stem)} do not fit each other ({shown}). "
        "Download the LoRA again."
    )


def read_floats(adapter: AdapterFile, tensor: StoredTensor, expert: Expert | None, part: str) -> Floats:
    """A ``part`` of a LoRA's module as float32, or what of it is one expert's.

    Raises MalformedInput for values that are NaN or infinite.
    """
    rows, first, shape = tensor.shape[0] if tensor.shape else 1, 0, tensor.shape
    if expert is not None and part == "down":
        rows //= expert.count
        first, shape = expert.index * rows, (rows, *shape[1:])
    width = tensor.nbytes // max(tensor.shape[0] if tensor.shape else 1, 1)
    raw = np.empty(rows * width, np.uint8)
    adapter.read_into(tensor, first * width, raw.data)
    values = raw.view(NUMPY[tensor.dtype])
    if expert is not None and part == "up":
        values = np.ascontiguousarray(values.reshape(shape[0], -1, expert.count)[:, :, expert.index])
        shape = values.shape
    floats = values if tensor.dtype == "F32" else widen(values, tensor.dtype)
    if not np.isfinite(floats).all():
        raise MalformedInput(
            f"{adapter.where}: {quoted(tensor.name)} holds NaN or infinite values, which would spoil the weight that "
            "it is fused into. Download the LoRA again, or use another one."
        )
    return floats.reshape(shape)


def read_alpha(module: AdapterModule) -> float | None:
    """The alpha that the file states for a module; None if it states none."""
    tensor = module.parts.get("alpha")
    if tensor is None:
        return None
    raw = np.empty(tensor.nbytes, np.uint8)
    if math.prod(tensor.shape) == 1 and tensor.dtype in (*_ALPHAS, "BF16"):
        module.adapter.read_into(tensor, 0, raw.data)
        if tensor.dtype == "BF16":
            value = float(widen(raw.view(np.uint16), "BF16")[0])
        else:
            value = float(raw.view(_ALPHAS[tensor.dtype])[0])
        if np.isfinite(value):
            return value
    raise MalformedInput(f"{module.adapter.where}: {quoted(tensor.name)} is not one finite number. Download it again.")


def _flat(factor: Floats) -> Floats:
    return factor.reshape(len(factor), -1)
