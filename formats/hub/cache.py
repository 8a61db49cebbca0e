"""What huggingface_hub's cache holds of one folder of one commit, and how a file gets there."""

from __future__ import annotations

import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from qz import IOFailed, __version__
from qz.formats.files.local_folder import LocalFolder
from qz.formats.hub.bars import without_bars
from qz.formats.hub.transport.errors import hub_errors
from qz.formats.hub.transport.remote_file import RemoteFile, differs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qz.formats.files.promised import Promised

CHUNK = 1 << 20


def require_space(repo_id: str, size: int) -> None:
    """Raise IOFailed if ``size`` bytes more do not fit into the Hub cache."""
    place = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (place, *place.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise IOFailed(
            f"Downloading {repo_id} takes {size:,} bytes in the Hub cache at {place}, where {free:,} bytes are free. "
            "Free some space, set HF_HOME to a larger disk, or leave out --download: weights are then streamed."
        )


class CachedFiles:
    """Files are taken from the cache by name and size, as huggingface_hub does; what is downloaded here is hashed."""

    def __init__(self, repo_id: str, commit: str, endpoint: str) -> None:
        self._repo_id, self._commit, self._endpoint = repo_id, commit, endpoint
        self._found: dict[str, LocalFolder | None] = {}
        self._lock = threading.RLock()
        self._coming: dict[str, threading.Lock] = {}
        self._promised: Promised | None = None

    def hold_to(self, promised: Promised) -> None:
        """Compare what is read with what a record promises."""
        with self._lock:
            self._promised = promised
            for folder in self.folders():
                folder.promised = promised

    def folders(self) -> list[LocalFolder]:
        """Those that were read from."""
        with self._lock:
            return list({id(folder): folder for folder in self._found.values() if folder is not None}.values())

    def adopt(self, folder: LocalFolder, files: Iterable[RemoteFile]) -> None:
        """Take ``files`` from ``folder`` without asking."""
        with self._lock:
            self._found |= dict.fromkeys((file.name for file in files), folder)

    def find(self, file: RemoteFile) -> LocalFolder | None:
        """The snapshot's folder if it holds ``file`` with the size that the Hub lists."""
        with self._lock:
            if file.name not in self._found:
                self._found[file.name] = None
                path = try_to_load_from_cache(self._repo_id, file.path, revision=self._commit)
                if isinstance(path, str):
                    folder = self._counting(file, next(iter(self.folders()), None) or self._snapshot(Path(path), file))
                    if folder.sizes().get(file.name) == file.size:
                        self._found[file.name] = folder
            return self._found[file.name]

    def fetch(self, file: RemoteFile) -> LocalFolder:
        """The folder that holds ``file``, which is downloaded into the cache if it is not there.

        Raises MalformedInput for another hash than the Hub lists (nothing is left in the cache then), IOFailed for a
        full disk, and what else keeps a file from coming.
        """
        with self._lock:
            coming = self._coming.setdefault(file.name, threading.Lock())
        with coming:
            folder = self.find(file)
            if folder is None:
                path = self._download(file)
                folder = self._counting(file, self._snapshot(path, file))
                with self._lock:
                    self._found[file.name] = folder
            return folder

    def _snapshot(self, path: Path, file: RemoteFile) -> LocalFolder:
        """The folder of the cache, listed anew, for which ``file`` at ``path`` counts."""
        folder = LocalFolder(path.parents[file.depth])
        folder.promised = self._promised
        return folder

    @staticmethod
    def _counting(file: RemoteFile, folder: LocalFolder) -> LocalFolder:
        """``folder`` with ``file`` among its files, also where that lies in a folder inside."""
        if file.depth:
            folder.include(*file.place)
        return folder

    def _download(self, file: RemoteFile) -> Path:
        doing = f"Downloading {self._repo_id}@{self._commit[:12]}/{file.path}"
        with hub_errors(self._repo_id, doing, revision=self._commit, endpoint=self._endpoint), without_bars():
            path = hf_hub_download(
                self._repo_id,
                file.path,
                revision=self._commit,
                endpoint=self._endpoint,
                library_name="qz",
                library_version=__version__,
            )
        hasher = file.hasher()
        with open(path, "rb") as stream:
            while chunk := stream.read(CHUNK):
                hasher.update(memoryview(chunk))
        if hasher.hexdigest() != file.digest:
            for copy in (os.path.realpath(path), path):  # otherwise the cache would keep serving the damaged file
                with suppress(OSError):
                    os.remove(copy)
            raise differs(f"{self._repo_id}@{self._commit[:12]}/{file.path}", file.digest)
        return Path(path)
