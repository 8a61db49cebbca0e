"""One folder of an output in the making, as a staging area of its own: a component of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from qz.formats.staging import Settled, ShardLayout, ShardWriter, Staging, WrittenFile


class Section:
    """What is written here lands in the folder ``name`` of the output, or in the output itself where it is empty."""

    def __init__(self, staging: Staging, name: str) -> None:
        self._staging = staging
        self._prefix = f"{name}/" if name else ""

    @property
    def finished(self) -> Mapping[str, WrittenFile]:
        """Shards of this folder that an earlier, interrupted run completed, by their name in it."""
        found = self._staging.finished.items()
        return {name.removeprefix(self._prefix): file for name, file in found if name.startswith(self._prefix)}

    def open_shard(self, layout: ShardLayout, settled: Settled = lambda: True) -> ShardWriter:
        return self._staging.open_shard(replace(layout, file=self._prefix + layout.file), settled)

    def write_file(self, name: str, data: bytes) -> WrittenFile:
        return self._staging.write_file(self._prefix + name, data)

    def copy_file(
        self,
        name: str,
        size: int,
        read: Callable[[int, memoryview], None],
        progress: Callable[[int], None] | None = None,
        settled: Settled = lambda: True,
    ) -> WrittenFile:
        return self._staging.copy_file(self._prefix + name, size, read, progress, settled)
