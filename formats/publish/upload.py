"""Upload the files of a commit before the commit is made: over Xet, else by LFS. What the branch has is not sent."""

from __future__ import annotations

import base64
import io
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, get_session, hf_raise_for_status
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but exported by name only

from qz import TryAgain, __version__
from qz.formats.hub.bars import without_bars
from qz.formats.hub.transport.session import with_retries
from qz.formats.hub.transport.xet import unavailable
from qz.formats.publish.blobs import LARGEST_REGULAR
from qz.formats.publish.verified_file import VerifiedFile
from qz.formats.publish.xet import XetNotServed, XetUploads
from qz.progress import OnProgress, Progress, ignore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub import HfApi

    from qz.formats.publish.blobs import Blob

AT_ONCE = 4
"""Files that are uploaded at a time by LFS; hf_xet sends the parts of a file in parallel itself."""
CALLS = 64
"""Calls that upload large files, at most: the Hub limits their rate."""
SMALL = 5_000_000
"""Bytes of a file that shares a call with the other small ones."""
ASKED_AT_ONCE = 256
"""Files whose place, Git or LFS, is asked for in one request."""


class Uploads:
    """Uploads to one branch of one repository. ``stop`` may be called from any thread, at any time."""

    def __init__(self, api: HfApi, repo_id: str, branch: str, *, create_pr: bool, ahead: int | None = None) -> None:
        """``ahead``: see ``XetUploads``."""
        self._api, self._repo_id, self._branch, self._create_pr = api, repo_id, branch, create_pr
        xet = XetUploads(api.endpoint, repo_id, branch, create_pr=create_pr, ahead=ahead)
        self._xet = xet if unavailable() is None else None
        self._stopped = threading.Event()

    def send(self, blobs: Sequence[Blob], progress: OnProgress = ignore) -> int:
        """Upload what is not to be part of the commit itself; the bytes that went over the network.

        Raises what huggingface_hub raises, and what ``XetUploads.send`` does.
        """
        self._choose([blob for blob in blobs if blob.lfs is None])
        state = _State(blobs, progress)
        large = [blob for blob in blobs if blob.lfs and blob.content is not None]
        for blob in blobs:
            if blob not in large:
                state.done([blob])
        batches = list(_batches(large))
        if self._xet is not None:
            with suppress(XetNotServed):
                return sum(_side_by_side(partial(self._by_xet, state=state), batches, 1, self._stopped))
            self._xet = None
        return sum(_side_by_side(partial(self._by_lfs, state=state), batches, AT_ONCE, self._stopped))

    def stop(self) -> None:
        """Let all that is under way fail soon."""
        self._stopped.set()
        if self._xet is not None:
            self._xet.stop()

    def _choose(self, blobs: Sequence[Blob]) -> None:
        """Ask which files Git holds, and which LFS does."""
        url = f"{self._api.endpoint}/api/models/{self._repo_id}/preupload/{quote(self._branch, safe='')}"
        for start in range(0, len(blobs), ASKED_AT_ONCE):
            batch = blobs[start : start + ASKED_AT_ONCE]
            files = [
                {"path": blob.path, "size": blob.size, "sample": base64.b64encode(blob.sample()).decode()}
                for blob in batch
            ]
            modes = self._post(url, {"files": files})["files"]  # without regard to a .gitignore
            lfs = {file["path"] for file in modes if file["uploadMode"] == "lfs"}
            for blob in batch:
                large = blob.path in lfs or blob.size > LARGEST_REGULAR
                blob.lfs = large and blob.size > 0  # the storage takes no empty files

    def _post(self, url: str, value: Any) -> Any:
        params = {"create_pr": "1"} if self._create_pr else None

        def ask() -> Any:
            headers = build_hf_headers(library_name="qz", library_version=__version__)
            response = get_session().post(url, json=value, headers=headers, params=params)
            hf_raise_for_status(response)
            return response.json()

        return with_retries(ask)

    def _by_xet(self, batch: Sequence[Blob], state: _State) -> int:
        assert self._xet is not None
        sent = self._xet.send(batch, state.reader(batch))
        state.done(batch)
        return sent

    def _by_lfs(self, batch: Sequence[Blob], state: _State) -> int:
        read: dict[str, int] = {}

        def reader(blob: Blob) -> Callable[[int], None]:
            tell = state.reader([blob])

            def count(position: int) -> None:
                if self._stopped.is_set():
                    raise TryAgain(f"Uploading {blob.path} was stopped.")
                read[blob.path] = max(position, read.get(blob.path, 0))
                tell(position)

            return count

        with without_bars():
            self._api.preupload_lfs_files(
                self._repo_id,
                additions=[_addition(blob, reader(blob)) for blob in batch],
                revision=self._branch,
                create_pr=self._create_pr,
                num_threads=1,
                free_memory=False,
                gitignore_content="",  # otherwise the repository's .gitignore would silently drop files
            )
        state.done(batch)
        return sum(read.values())


@dataclass(eq=False)
class _Addition(CommitOperationAdd):
    """A file that reports how much of it was read, can be stopped, and is not sent by Xet."""

    file: VerifiedFile | None = field(default=None, repr=False)
    read: Callable[[int], None] = field(default=ignore, repr=False)

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        if self.file is None:
            with super().as_file() as file:
                yield file
        else:
            with _Counted(self.file.open(), self.read if with_tqdm else ignore) as file:
                yield cast("BinaryIO", file)


def _addition(blob: Blob, read: Callable[[int], None]) -> CommitOperationAdd:
    if isinstance(blob.content, VerifiedFile):
        addition = _Addition(blob.path, b"", file=blob.content, read=read)  # it would open a path itself
        addition.upload_info.sample, addition.upload_info.size = blob.sample(), blob.size
    else:
        addition = _Addition(blob.path, blob.read())
    addition.upload_info.sha256 = bytes.fromhex(blob.hashed())  # as verified
    # huggingface_hub sends by Xet whatever is not a stream, also where the repository has none.
    addition.path_or_fileobj = io.BytesIO(blob.content) if isinstance(blob.content, bytes) else io.BytesIO()
    return addition


class _Counted(io.BufferedReader):
    def __init__(self, descriptor: int, read: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(descriptor))
        self._count = read

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._count(self.tell())
        return data


def _batches(blobs: Sequence[Blob]) -> Iterator[Sequence[Blob]]:
    """The large ones first and by themselves, unless that makes too many calls."""
    large = sorted((blob for blob in blobs if blob.size > SMALL), key=lambda blob: -blob.size)
    small = [blob for blob in blobs if blob.size <= SMALL]
    if small:
        yield small
    step = -(-len(large) // CALLS) if large else 1
    for start in range(0, len(large), step):
        yield large[start : start + step]


def _side_by_side(
    work: Callable[[Sequence[Blob]], int], batches: Sequence[Sequence[Blob]], count: int, stopped: threading.Event
) -> list[int]:
    """What ``work`` returns for each batch, ``count`` at a time, by threads that an interrupt does not wait for."""
    todo: queue.SimpleQueue[Sequence[Blob]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
    for batch in batches:
        todo.put(batch)

    def run() -> None:
        with suppress(queue.Empty):
            while True:
                batch = todo.get_nowait()
                try:
                    if stopped.is_set():
                        raise TryAgain("The upload was stopped.")
                    ended.put(work(batch))
                except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
                    ended.put(error)

    for _ in batches[:count]:
        threading.Thread(target=run, name="qz-upload", daemon=True).start()
    done = []
    for _ in batches:
        result = ended.get()
        if isinstance(result, BaseException):
            while not todo.empty():
                with suppress(queue.Empty):
                    todo.get_nowait()
            raise result
        done.append(result)
    return done


class _State:
    """How far each file is. Thread-safe."""

    def __init__(self, blobs: Sequence[Blob], progress: OnProgress) -> None:
        self._blobs, self._progress = blobs, progress
        self._read: dict[str, int] = {}
        self._done: set[str] = set()
        self._lock = threading.Lock()

    def reader(self, batch: Sequence[Blob]) -> Callable[[int], None]:
        """The callback for how many bytes of the batch are done."""

        def read(position: int) -> None:
            with self._lock:
                left = position
                for blob in batch:
                    count = min(max(left, 0), blob.size)
                    left -= blob.size
                    self._read[blob.path] = max(count, self._read.get(blob.path, 0))
            self._report(None)

        return read

    def done(self, batch: Sequence[Blob]) -> None:
        for blob in batch:
            with self._lock:
                self._done.add(blob.path)
            self._report(blob.path)

    def _report(self, file: str | None) -> None:
        with self._lock:
            bytes_done = sum(
                blob.size if blob.path in self._done else self._read.get(blob.path, 0) for blob in self._blobs
            )
            files = len(self._done)
        total = sum(blob.size for blob in self._blobs)
        self._progress(Progress("Uploading", files, len(self._blobs), bytes_done, total, "file", file))
