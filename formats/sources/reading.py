"""One checkpoint in another tool's form, while its tensors are taken apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qz.formats.malformed import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qz.formats.checkpoint.problems import Problems
    from qz.formats.files.folder import Folder
    from qz.formats.tensors.decoded import Decoded, StoredTensor


@dataclass
class Reading:
    """What is known so far. ``dtype``: of values that may be of any dtype."""

    folder: Folder
    tensors: Mapping[str, StoredTensor]
    settings: Mapping[str, Any]
    problems: Problems
    dtype: str
    taken: dict[str, Decoded] = field(default_factory=dict)
    """By the name of the tensor that holds the codes."""
    used: set[str] = field(default_factory=set)
    left: list[str] = field(default_factory=list)

    def take(self, tensor: Decoded) -> None:
        """``tensor`` stands for all of its parts."""
        first = next(iter(tensor.parts.values()))
        self.taken[first.name] = tensor
        self.used |= {part.name for part in tensor.parts.values()}

    def misfit(self, part: StoredTensor, weight: tuple[int, ...]) -> None:
        """A part that does not fit its weight's shape."""
        found = f"{part.dtype} {list(part.shape)}"
        name = quoted(part.name)
        self.problems.add("scale-malformed", name, name=name, found=found, weight=list(weight))

    def missing(self, weight: str, kind: str, part: str) -> None:
        name = quoted(weight)
        self.problems.add("encoded-part-missing", name, name=name, kind=kind, missing=part)

    def leave_out(self, tensor: StoredTensor) -> None:
        self.used.add(tensor.name)
        self.left.append(tensor.name)
