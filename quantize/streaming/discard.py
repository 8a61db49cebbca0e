"""An output that is thrown away: the source is only read, by the code that converts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qz.formats.output.recorded.record import WrittenFile

if TYPE_CHECKING:
    from qz.formats.output.resuming.pending import IsVerified
    from qz.formats.output.shards.pieces import Begun
    from qz.formats.output.shards.shard_layout import ShardLayout


class DiscardOutput:
    """A staging area that keeps nothing."""

    finished: Mapping[str, WrittenFile] = MappingProxyType({})
    begun: Mapping[str, Begun] = MappingProxyType({})

    def open_shard(self, layout: ShardLayout, is_verified: IsVerified) -> DiscardedShard:  # noqa: ARG002 - as a staging area has it
        return DiscardedShard(layout.file)

    def is_worth_keeping(self, nbytes: int, seconds: float) -> bool:  # noqa: ARG002
        return False

    def keep(self, shard: Any, tensors: Any, is_verified: IsVerified) -> None: ...

    def read_staged(self, name: str, offset: int, buffer: memoryview) -> bool:  # noqa: ARG002
        return False

    def give_up(self) -> None: ...


@dataclass(frozen=True, slots=True)
class DiscardedShard:
    """A shard whose bytes go nowhere."""

    file: str

    def write(self, tensor: str, data: Any, offset: int = 0) -> None: ...

    def write_variable(self, tensor: str, data: bytes) -> None: ...

    def finish(self) -> WrittenFile:
        return WrittenFile(self.file, 0, "")
