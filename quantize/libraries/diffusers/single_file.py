"""How diffusers reads a model from one file in the names of its own code: learned from the library's converters.

A converter is run on tensors of the meta device, which have shapes and no values. Slices of them are views, which say
where in which tensor they begin; what is joined or copied is noted on the way.
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
from qz.quantize.libraries.diffusers.internals import (
    default_pipeline,
    needs_conversion,
    single_file_classes,
)

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
class Converted:
    """A tensor of the model, and what of the file it is: pieces one after the other, or one view."""

    shape: tuple[int, ...]
    dtype: str
    content: tuple[Piece, ...] | View


def default_source(tensors: Mapping[str, TensorSpec]) -> str | None:
    """The repository whose configs diffusers takes for a file with such tensors, told by names and shapes, or None."""
    return default_pipeline(_on_meta(tensors))


def loadable_names() -> tuple[str, ...]:
    """Names of the classes that diffusers reads from single files."""
    return tuple(single_file_classes())


def convert(class_name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, Converted]:
    """The tensors that diffusers' converter for a class makes of those of the file; without the others of the file.

    Raises Unsupported where the library has no converter for the class, or one that computes values.
    """
    classes = single_file_classes()
    model_class = getattr(__import__("diffusers"), class_name, None)
    converter = classes.get(class_name)
    if converter is None and isinstance(model_class, type):
        bases = (base.__name__ for base in model_class.__mro__)
        converter = next((classes[name] for name in bases if name in classes), None)
    if converter is None or model_class is None:
        raise Unsupported(
            f"diffusers reads no {class_name} from a single file, so what its tensors mean is not known. Use a "
            "repository of this model in diffusers' layout."
        )
    state = _on_meta(tensors)
    trace = _Trace({_storage(tensor): name for name, tensor in state.items()})
    dtypes = {name: spec.dtype for name, spec in tensors.items()}
    with trace:
        made = converter(dict(config), dict(state)) if needs_conversion(model_class, config, state) else state
    return {
        name: Converted(
            tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), trace.content(name, tensor, dtypes)
        )
        for name, tensor in made.items()
        if isinstance(tensor, torch.Tensor)
    }


def _on_meta(tensors: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for name, spec in tensors.items()
    }


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what new tensors are made of."""

    def __init__(self, sources: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources = sources
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
            else:
                self.made[_storage(out)] = (out, str(operation), [])
        return out

    def content(self, name: str, tensor: torch.Tensor, dtypes: Mapping[str, str]) -> tuple[Piece, ...] | View:
        """What of the file a tensor is; Unsupported if its values are computed."""
        source = self.sources.get(_storage(tensor))
        if source is not None and not tensor.is_contiguous():
            return View(source, int(tensor.storage_offset()), tuple(tensor.stride()))
        pieces = self._pieces(tensor)
        if pieces is None and (made := self.made.get(_storage(tensor))) and made[1] == "copied":
            view = made[2][0]
            source = self.sources.get(_storage(view))
            if source is not None and tensor.is_contiguous() and view.shape == tensor.shape:
                return View(source, int(view.storage_offset()), tuple(view.stride()))
        if pieces is None or len(pieces) > MOST_PIECES or len({dtypes[piece.source] for piece in pieces}) > 1:
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
