"""A folder of an output in the making, for those who write into it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from qz.formats.output.recorded.record import WrittenFile
    from qz.formats.output.resuming.pending import IsVerified
    from qz.formats.output.shards.pieces import Begun
    from qz.formats.output.shards.shard_layout import ShardLayout
    from qz.formats.output.shards.shard_writer import ShardWriter
    from qz.formats.output.staging import Staging


class Section:
    """What is written here lands in the folder ``name`` of the output, or in the output itself where it is empty."""

    elsewhere: Collection[str] = frozenset()
    """Files of this folder that are not made here."""

    def __init__(self, staging: Staging, name: str) -> None:
        self._staging = staging
        self._prefix = f"{name}/" if name else ""

    @property
    def finished(self) -> Mapping[str, WrittenFile]:
        """Shards of this folder that an earlier, interrupted run completed, by their name in it."""
        found = self._staging.finished.items()
        return {name.removeprefix(self._prefix): file for name, file in found if name.startswith(self._prefix)}

    @property
    def begun(self) -> Mapping[str, Begun]:
        """What is kept of those that it began."""
        found = self._staging.begun.items()
        return {name.removeprefix(self._prefix): begun for name, begun in found if name.startswith(self._prefix)}

    def is_worth_keeping(self, nbytes: int, seconds: float) -> bool:
        return self._staging.is_worth_keeping(nbytes, seconds)

    def open_shard(self, layout: ShardLayout, is_verified: IsVerified = lambda: True) -> ShardWriter:
        return self._staging.open_shard(replace(layout, file=self._prefix + layout.file), is_verified)

    def keep(self, shard: ShardWriter, tensors: Collection[str], is_verified: IsVerified) -> None:
        self._staging.keep(shard, tensors, is_verified)

    def read_staged(self, name: str, offset: int, buffer: memoryview) -> bool:
        return self._staging.read_staged(self._prefix + name, offset, buffer)

    def give_up(self) -> None:
        self._staging.give_up()

    def write_file(self, name: str, data: bytes) -> WrittenFile:
        return self._staging.write_file(self._prefix + name, data)

    def copy_file(
        self,
        name: str,
        size: int,
        read: Callable[[int, memoryview], None],
        progress: Callable[[int], None] | None = None,
        is_verified: IsVerified = lambda: True,
    ) -> WrittenFile:
        return self._staging.copy_file(self._prefix + name, size, read, progress, is_verified)
