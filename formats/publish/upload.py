"""Upload the files of a commit, several at a time, before the commit is made. What the Hub has already is not sent."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, BinaryIO, cast

from huggingface_hub import CommitOperationAdd, constants

from qz import TryAgain
from qz.progress import OnProgress, Progress, ignore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    from qz.formats.publish.checkpoint_files import OwnFile
    from qz.formats.publish.verified_file import VerifiedFile

AT_ONCE = 4
"""Files that are uploaded at a time, without Xet."""
CALLS = 64
"""Calls that upload large files, at most: the Hub limits their rate."""
SMALL = 5_000_000
"""Bytes of a file that shares a call with the other small ones."""


@dataclass(eq=False)
class Addition(CommitOperationAdd):
    """A file to add that tells how much of it was read, and stops being read when told."""

    read: Callable[[int], None] = field(default=ignore, repr=False)
    file: VerifiedFile | None = field(default=None, repr=False)

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        if self.file is not None:
            with _Counted(self.file.open(), self.read if with_tqdm else ignore) as file:
                yield cast("BinaryIO", file)
        else:
            with super().as_file() as file:
                yield file


class _Counted(io.BufferedReader):
    def __init__(self, descriptor: int, read: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(descriptor))
        self._count = read

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._count(self.tell())
        return data


@dataclass(frozen=True)
class Blob:
    """A file of the commit and its size."""

    addition: CommitOperationAdd
    bytes: int

    @classmethod
    def of(cls, path: str, file: OwnFile) -> Blob:
        if file.data is not None:
            return cls(CommitOperationAdd(path, file.data), file.bytes)
        addition = Addition(path, b"", file=file.file)  # huggingface_hub would open it by its path, for the same facts
        addition.path_or_fileobj = file.file.real
        with open(file.file.open(), "rb") as opened:
            addition.upload_info.sample = opened.read(512)
        addition.upload_info.size = file.bytes
        addition.upload_info.sha256 = bytes.fromhex(file.sha256 or file.file.hashed())
        return cls(addition, file.bytes)

    @property
    def path(self) -> str:
        return self.addition.path_in_repo

    def is_at(self, entry: RepoFile) -> bool:
        """Whether what the Hub lists is this content."""
        if entry.lfs:
            return entry.lfs.sha256 == self.addition.upload_info.sha256.hex()
        git = hashlib.sha1(b"blob %d\0" % self.bytes, usedforsecurity=False)
        with self.addition.as_file() as file:
            git.update(file.read())
        return entry.blob_id == git.hexdigest()


def upload(
    api: HfApi,
    repo_id: str,
    blobs: Sequence[Blob],
    revision: str,
    *,
    create_pr: bool,
    progress: OnProgress,
) -> int:
    """Upload what is not to be part of the commit itself; the number of bytes that were sent.

    Raises what huggingface_hub raises. With Xet, which sends only chunks that the Hub lacks, whole files are counted.
    """
    state = _State(blobs, progress)
    for blob in blobs:
        if isinstance(blob.addition, Addition):
            blob.addition.read = state.reader(blob)

    def send(batch: Sequence[Blob]) -> None:
        api.preupload_lfs_files(
            repo_id,
            additions=[blob.addition for blob in batch],
            revision=revision,
            create_pr=create_pr,
            num_threads=1,
            free_memory=False,
            gitignore_content="",  # else a .gitignore there would leave files out in silence
        )
        for blob in batch:
            state.done(blob)

    pool = ThreadPoolExecutor(1 if _has_xet() else AT_ONCE, thread_name_prefix="qz-upload")
    try:
        for future in as_completed([pool.submit(send, batch) for batch in _batches(blobs)]):
            future.result()
    except BaseException:
        state.stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return state.sent()


def _batches(blobs: Sequence[Blob]) -> Iterator[Sequence[Blob]]:
    """The large ones first and by themselves, unless that makes too many calls."""
    large = sorted((blob for blob in blobs if blob.bytes > SMALL), key=lambda blob: -blob.bytes)
    small = [blob for blob in blobs if blob.bytes <= SMALL]
    if small:
        yield small
    step = -(-len(large) // CALLS) if large else 1
    for start in range(0, len(large), step):
        yield large[start : start + step]


def _has_xet() -> bool:
    """Whether huggingface_hub uploads with Xet, which sends the parts of a file in parallel itself."""
    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


class _State:
    """How far each file is. Thread-safe."""

    def __init__(self, blobs: Sequence[Blob], progress: OnProgress) -> None:
        self.stop = threading.Event()
        self._blobs, self._progress = blobs, progress
        self._read: dict[str, int] = {}
        self._done: set[str] = set()
        self._lock = threading.Lock()

    def reader(self, blob: Blob) -> Callable[[int], None]:
        def read(position: int) -> None:
            if self.stop.is_set():
                raise TryAgain(f"Uploading {blob.path} was stopped.")
            with self._lock:
                self._read[blob.path] = max(position, self._read.get(blob.path, 0))
            self._report(None)

        return read

    def done(self, blob: Blob) -> None:
        with self._lock:
            self._done.add(blob.path)
        self._report(blob.path)

    def sent(self) -> int:
        if _has_xet():
            return sum(blob.bytes for blob in self._blobs)
        return sum(self._read.values())

    def _report(self, file: str | None) -> None:
        with self._lock:
            bytes_done = sum(
                blob.bytes if blob.path in self._done else min(self._read.get(blob.path, 0), blob.bytes)
                for blob in self._blobs
            )
            files = len(self._done)
        total = sum(blob.bytes for blob in self._blobs)
        count = len(self._blobs)
        self._progress(Progress("Uploading", files, count, bytes_done, total, unit="file", file=file))
