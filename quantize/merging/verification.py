"""The files of parts, read and compared with what each part recorded, and moved only as they were read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qz import MalformedInput
from qz.formats.output.recorded.record import WrittenFile
from qz.formats.output.shards.checksums import hash_file
from qz.formats.output.shares import FinishedShare
from qz.formats.output.staging import Staging
from qz.formats.output.storage.directory import Directory
from qz.progress import OnProgress, Progress
from qz.quantize.merging.checks import again


class Verification:
    """Reads every file of every part once, in several threads, and remembers which file it was that it read."""

    def __init__(self, folder: Directory, staging: Staging, progress: OnProgress, threads: int) -> None:
        self._folder, self._staging, self._progress = folder, staging, progress
        self._threads = threads
        self._marks: dict[str, tuple[int, int, int]] = {}
        self._lock = threading.Lock()
        self.shared: dict[str, bytes] = {}
        """The content of the small files."""

    def verify(self, made: Sequence[FinishedShare]) -> None:
        """Raise MalformedInput for the first file that is missing or differs from what its part recorded."""
        todo = [(each, file) for each in made for file in each.record.files if not self._is_taken(file)]
        self._total = sum(file.bytes for _, file in todo)
        self._done = self._files = 0
        self._count = len(todo)
        with ThreadPoolExecutor(self._threads) as pool:
            work = [pool.submit(self._check, each, file) for each, file in todo]
            try:
                for each in work:
                    each.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _is_taken(self, file: WrittenFile) -> bool:
        """Whether an interrupted merge has it already."""
        return self._staging.finished.get(file.name) == file

    def _check(self, part: FinishedShare, file: WrittenFile) -> None:
        share, name = part.receipt.share, f"{part.receipt.share.folder}/{file.name}"
        where = self._folder.path / name
        mark = self._mark(name)
        if mark is None or mark[1] != file.bytes:
            raise MalformedInput(f"{where} is missing or has another size than when it was made. {again(share)}")
        found = hash_file(self._folder, name)
        if found != file.sha256:
            raise MalformedInput(
                f"{where} is damaged: its SHA-256 is {found}; it was made with {file.sha256}. {again(share)}"
            )
        if file.name in part.shared and file.name not in self.shared:
            self.shared[file.name] = self._read(name, file)
        if self._mark(name) != mark:
            raise _changed(where)
        with self._lock:
            self._marks[name] = mark
            self._done, self._files = self._done + file.bytes, self._files + 1
            self._progress(Progress("Verifying", self._files, self._count, self._done, self._total, unit="file"))

    def _read(self, name: str, file: WrittenFile) -> bytes:
        data = bytearray(file.bytes)
        descriptor, path = self._folder.open(name), self._folder.path / name
        try:
            self._folder.disk.read(descriptor, path, memoryview(data), 0)
        finally:
            self._folder.disk.close(descriptor, path)
        return bytes(data)

    def _mark(self, name: str) -> tuple[int, int, int] | None:
        """What tells a file from one put in its place; a move does not change it."""
        found = self._folder.status(name)
        return None if found is None else (found.st_ino, found.st_size, found.st_mtime_ns)

    def adopt(self, part: FinishedShare, folder: Directory, staging: Staging) -> None:
        """Move the weights of a part into the output."""
        for file in part.own.values():
            if self._is_taken(file):
                continue
            name = f"{part.receipt.share.folder}/{file.name}"
            if self._mark(name) != self._marks[name]:
                raise _changed(self._folder.path / name)
            staging.adopt(folder, file)


def _changed(path: Path) -> MalformedInput:
    return MalformedInput(f"{path} was changed by someone else meanwhile. Run the same command again.")
