"""Which group each column of a weight belongs to, where a tensor says it (``g_idx``): checked once it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qz import MalformedInput
from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import GROUPS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qz.quantize.decoding.parts import Parts


def group_indexes(parts: Parts, groups: int) -> NDArray[Any]:
    """One index for each column, all of them below ``groups``; MalformedInput if one is not."""
    found = parts.array(GROUPS).reshape(-1)
    if found.size and not (found.min() >= 0 and found.max() < groups):
        stored = parts.tensor.parts[GROUPS]
        raise MalformedInput(
            f"{parts.folder.location}/{stored.file}: {quoted(stored.name)} names a group that is not there: there are "
            f"{groups:,}. Download it again."
        )
    return found
