"""The shards that a run still has to write: where its results go, and when a shard is complete or worth keeping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from qz.quantize.planning.sources import stored_parts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qz.formats.files.folder import Folder
    from qz.formats.output.recorded.record import WrittenFile
    from qz.formats.output.resuming.pending import IsVerified
    from qz.formats.output.section import Section
    from qz.formats.output.shards.shard_writer import ShardWriter
    from qz.formats.output.staging import Staging
    from qz.quantize.libraries.architecture import Saved
    from qz.quantize.planning.plan import Plan, Step
    from qz.quantize.streaming.discard import DiscardedShard, DiscardOutput

Job = Callable[[], None]


@dataclass(slots=True)
class _OpenShard:
    """``left``: how many tensors are still to be written. All but it is of those that are whole and not kept yet."""

    writer: ShardWriter | DiscardedShard | None = None
    left: int = 0
    tensors: list[str] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    """Of the source, which they are made of."""
    nbytes: int = 0


class OpenShards:
    """The shards of one run. Thread-safe, once they are open."""

    def __init__(
        self,
        plan: Plan,
        folder: Folder,
        staging: Staging | Section | DiscardOutput,
        on_finished: Callable[[WrittenFile], None],
    ) -> None:
        self._plan, self._folder, self._staging, self._on_finished = plan, folder, staging, on_finished
        self._kept = {tensor for begun in staging.begun.values() for tensor in begun.tensors}
        self._shards = {
            home: _OpenShard() for home, layout in enumerate(plan.shards) if layout.file not in staging.finished
        }
        for name, home in plan.shard_of.items():
            if home in self._shards and name not in self._kept:
                self._shards[home].left += 1
        self._lock = threading.Lock()
        self._is_keeping = False
        self._kept_at = time.monotonic()

    def wants(self, saved: Saved) -> bool:
        """Whether an output still has to be written: an earlier run did not."""
        return self._plan.shard_of[saved.name] in self._shards and saved.name not in self._kept

    def open(self, steps: Iterable[Step]) -> list[Job]:
        """Open all shards, which ``steps`` are to fill; what is left to do for those that are full already."""
        sources: dict[int, set[str]] = {home: set() for home in self._shards}
        for step in steps:
            for home in {self._plan.shard_of[saved.name] for saved in step.outputs} & sources.keys():
                sources[home] |= _source_files(step)
        for home, shard in self._shards.items():
            shard.writer = self._staging.open_shard(self._plan.shards[home], self._are_verified(sources[home]))
        return [self._finishing(shard) for shard in self._shards.values() if not shard.left]

    def write(self, saved: Saved, data: NDArray[Any], offset: int) -> None:
        """Write bytes of an output tensor, unless an earlier run did."""
        if self.wants(saved):
            self._writer(saved).write(saved.name, memoryview(data).cast("B"), offset)

    def write_variable(self, saved: Saved, data: bytes) -> None:
        """Write an output tensor of variable length, unless an earlier run did."""
        if self.wants(saved):
            self._writer(saved).write_variable(saved.name, data)

    def _writer(self, saved: Saved) -> ShardWriter | DiscardedShard:
        writer = self._shards[self._plan.shard_of[saved.name]].writer
        assert writer is not None
        return writer

    def finish_step(self, step: Step) -> list[Job]:
        """Count the outputs of a step as written; returns what is to be done now, in any thread and order."""
        jobs = []
        with self._lock:
            touched = set()
            for saved in filter(self.wants, step.outputs):
                home = self._plan.shard_of[saved.name]
                shard = self._shards[home]
                shard.left -= 1
                shard.tensors.append(saved.name)
                shard.nbytes += saved.nbytes
                touched.add(home)
            for home in sorted(touched):
                shard = self._shards[home]
                shard.files |= _source_files(step)
                if not shard.left:
                    jobs.append(self._finishing(shard))
                elif not self._is_keeping and self._is_worth_keeping(shard):
                    jobs.append(self._keeping(shard))
        return jobs

    def _finishing(self, shard: _OpenShard) -> Job:
        writer = shard.writer
        assert writer is not None
        shard.writer = None
        return lambda: self._on_finished(writer.finish())

    def _is_worth_keeping(self, shard: _OpenShard) -> bool:
        return self._staging.is_worth_keeping(shard.nbytes, time.monotonic() - self._kept_at)

    def _keeping(self, shard: _OpenShard) -> Job:
        """Keep, for a later run, what is whole and not kept yet. One shard at a time."""
        writer, tensors, is_verified = shard.writer, shard.tensors, self._are_verified(shard.files)
        shard.tensors, shard.files, shard.nbytes, self._is_keeping = [], set(), 0, True

        def keep() -> None:
            self._staging.keep(writer, tensors, is_verified)  # type: ignore[arg-type]  # nothing discarded is kept
            self._kept_at = time.monotonic()
            self._is_keeping = False

        return keep

    def _are_verified(self, files: set[str]) -> IsVerified:
        return lambda: all(self._folder.is_verified(file) for file in files)


def _source_files(step: Step) -> set[str]:
    """The files that a step's outputs are made of."""
    return {part.file for source in step.sources for part in stored_parts(source)}
