"""Which tensor goes into which file: sharding, file names and the index, as the libraries do it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from qz.formats.tensors.weight_names import STEMS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT_SHARD_BYTES = 10**9
"""Of one file at most. Its SHA-256 is work for one thread, that of several files for several: 5 GB take as long
to hash as all of FLUX takes a GPU or 16 cores to quantize. Parts differ by it, and --push-only needs a disk for two."""


class Item(NamedTuple):
    """A tensor to place. Items of one ``storage`` share memory in the library and are put, and counted, together."""

    name: str
    nbytes: int
    storage: int


def split(items: Sequence[Item], max_bytes: int) -> list[list[str]]:
    """Names by shard, greedily in the given order.

    The rule of ``huggingface_hub.serialization.split_state_dict_into_shards_factory`` (2.4.0): a storage larger than
    ``max_bytes`` gets a shard of its own, ahead of the one being filled.
    """
    members: dict[int, list[Item]] = {}
    for item in items:
        members.setdefault(item.storage, []).append(item)
    shards: list[list[str]] = []
    current: list[str] = []
    size = 0
    for storage in members.values():
        nbytes = sum(item.nbytes for item in storage)
        names = [item.name for item in storage]
        if nbytes > max_bytes:
            shards.append(names)
            continue
        if size + nbytes > max_bytes:
            shards.append(current)
            current, size = [], 0
        current += names
        size += nbytes
    if current:
        shards.append(current)
    return shards


def file_names(library: str, count: int) -> list[str]:
    """Names of ``count`` weight files."""
    stem = STEMS[library]
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_name(library: str) -> str:
    """The name of the index that lists the weight files."""
    return f"{STEMS[library]}.safetensors.index.json"


def index(weight_map: Mapping[str, str], total_size: int, total_parameters: int | None) -> bytes:
    """The index as ``save_pretrained`` writes it; ``total_parameters`` is None for diffusers, which has none."""
    metadata = {"total_size": total_size}
    if total_parameters is not None:
        metadata["total_parameters"] = total_parameters
    content = {"metadata": metadata, "weight_map": dict(weight_map)}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
