"""What the converters of a library make of the tensors of a file: followed on the meta device, without values.

Slices of a tensor are views, which say where in which tensor they begin; what is joined or copied is noted on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qz import Unsupported
from qz.formats.malformed import quoted
from qz.quantize.libraries.architecture import TensorSpec

MOST_PIECES = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """``count`` values of a tensor of the file, from ``start`` on, that lie one after the other."""

    source: str
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class View:
    """Values of a tensor of the file in another order, as torch's strides describe it."""

    source: str
    start: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity matrix, which the library puts where the file has nothing."""


@dataclass(frozen=True, slots=True)
class Converted:
    """A tensor of the model, and what of the file it is: pieces one after the other, or one view; or an identity."""

    shape: tuple[int, ...]
    dtype: str
    content: tuple[Piece, ...] | View | Identity

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors of the file that it is made of."""
        if isinstance(self.content, tuple):
            return tuple(piece.source for piece in self.content)
        return (self.content.source,) if isinstance(self.content, View) else ()


def on_meta(tensors: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """Tensors without values, for a converter."""
    return {
        name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for name, spec in tensors.items()
    }


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what new tensors are made of, while it is entered."""

    def __init__(self, tensors: Mapping[str, TensorSpec]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = on_meta(tensors)
        """The tensors of the file, to be converted."""
        self.dtypes = {name: spec.dtype for name, spec in tensors.items()}
        self.sources = {_storage(tensor): name for name, tensor in self.state.items()}
        self._first = dict(self.state)  # keeps the storages alive when the state changes
        self.made: dict[int, tuple[torch.Tensor, str, list[torch.Tensor]]] = {}
        """By storage: a new tensor, which is kept so that its storage stays, how it was made, and of what."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and _storage(out) not in self.sources and _storage(out) not in self.made:
            operation = func.overloadpacket
            given = args[0] if args and isinstance(args[0], list | tuple) else args[:1]
            inputs = [each for each in given if isinstance(each, torch.Tensor)]
            dimension = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            if operation is torch.ops.aten.cat and dimension in (0, -out.ndim):
                self.made[_storage(out)] = (out, "joined", inputs)
            elif operation in (torch.ops.aten.clone, torch.ops.aten._to_copy) and out.dtype == inputs[0].dtype:
                self.made[_storage(out)] = (out, "copied", inputs)
            elif operation is torch.ops.aten.eye:
                self.made[_storage(out)] = (out, "identity", [])
            elif inputs:
                self.made[_storage(out)] = (out, str(operation), [])
        return out

    def converted(self, made: Mapping[str, Any]) -> dict[str, Converted]:
        """What of the file the tensors of a model are; Unsupported if the values of one are computed."""
        return {
            name: Converted(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), self._content(name, tensor))
            for name, tensor in made.items()
            if isinstance(tensor, torch.Tensor)
        }

    def _content(self, name: str, tensor: torch.Tensor) -> tuple[Piece, ...] | View | Identity:
        source = self.sources.get(_storage(tensor))
        if source is not None and not tensor.is_contiguous():
            return View(source, int(tensor.storage_offset()), tuple(tensor.stride()))
        pieces = self._pieces(tensor)
        if pieces is None and (made := self.made.get(_storage(tensor))) and made[1] == "copied":
            view = made[2][0]
            source = self.sources.get(_storage(view))
            if source is not None and tensor.is_contiguous() and view.shape == tensor.shape:
                return View(source, int(view.storage_offset()), tuple(view.stride()))
        if pieces is None and self.made.get(_storage(tensor), ("", ""))[1] == "identity":
            return Identity()
        if pieces is None or len(pieces) > MOST_PIECES or len({self.dtypes[piece.source] for piece in pieces}) > 1:
            raise Unsupported(
                f"diffusers computes {quoted(name)} from the file, which is more than to rename, split or join it. "
                "Open the file there once with from_single_file(), and save it with save_pretrained()."
            )
        return tuple(pieces)

    def _pieces(self, tensor: torch.Tensor) -> list[Piece] | None:
        """In the order of the tensor's values; None if they are not in pieces that lie one after the other."""
        if not tensor.is_contiguous():
            return None
        start, count = int(tensor.storage_offset()), tensor.numel()
        source = self.sources.get(_storage(tensor))
        if source is not None:
            return [Piece(source, start, count)]
        whole, how, inputs = self.made.get(_storage(tensor), (tensor, "unknown", []))
        if how not in ("joined", "copied") or not whole.is_contiguous():
            return None
        found: list[Piece] = []
        for each in inputs:
            pieces = self._pieces(each)
            if pieces is None:
                return None
            found += pieces
        return _cut(found, start, count)


def _cut(pieces: list[Piece], start: int, count: int) -> list[Piece]:
    """``count`` values from ``start`` on of all that the pieces hold."""
    found: list[Piece] = []
    begins = 0
    for piece in pieces:
        low, high = max(start, begins), min(start + count, begins + piece.count)
        if low < high:
            found.append(Piece(piece.source, piece.start + low - begins, high - low))
        begins += piece.count
    return found
