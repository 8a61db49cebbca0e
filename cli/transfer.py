"""What ``--download`` and ``--push`` add to a conversion: the cache filled before it, the result published after it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qz.cli.progress import Display
from qz.cli.push import Step, publish

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from qz.formats.checkpoint.survey import Checkpoint
    from qz.formats.folder import Folder
    from qz.formats.publish.destination import Destination, PushResult


@dataclass(frozen=True, slots=True)
class Publishing:
    """``--push REPO_ID``. ``source_private``: the source is not for everyone."""

    to: Destination
    source_private: bool
    quiet: bool

    def __call__(self, output: Path) -> PushResult:
        return publish(output, self.to, quiet=self.quiet, source_private=self.source_private)


def publishing(
    repo_id: str | None, public: bool | None, source: Folder, *, dry_run: bool, quiet: bool
) -> Publishing | None:
    """What to do with the output, None without ``--push``; raises now what would fail after the work."""
    from qz import UsageError
    from qz.formats.source import is_restricted

    if repo_id is None:
        if public is not None:
            raise UsageError("--public and --private say who may see what --push publishes. Add --push REPO_ID.")
        return None
    from qz.formats.publish.destination import Destination
    from qz.formats.publish.push import require_possible

    to = Destination(repo_id, private=None if public is None else not public)
    restricted = is_restricted(source)
    require_possible(to, source_private=restricted)
    return None if dry_run else Publishing(to, restricted, quiet)


def fill_cache(checkpoints: Iterable[Checkpoint], *, quiet: bool) -> None:
    """``--download``: every weight file into the Hub cache, from where it is then read."""
    from qz.formats.source import download

    found = list(checkpoints)
    total, count = sum(sum(each.sizes[name] for name in each.files) for each in found), sum(len(c.files) for c in found)
    done, lock = [0, 0], threading.Lock()

    with Display("Downloading", unit="file", quiet=quiet) as display:

        def arrived(_: str, size: int) -> None:
            with lock:
                done[0], done[1] = done[0] + 1, done[1] + size
                display(Step(done[0], count, done[1], total))

        for each in found:
            download(each.folder, each.files, arrived)
