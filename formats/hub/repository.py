"""Model repositories on the Hub as folders to read: by byte ranges, from the cache where it has the file.

Everything is read at one commit, which is looked up once. Small files are fetched whole and compared with their hash.
Of weight files only the asked bytes are fetched, until ``announce`` says what will be read; then each of those files is
streamed whole, and ``check`` tells whether every one had the hash that the Hub lists.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qz import MissingInput
from qz.formats.files.local_folder import LocalFolder
from qz.formats.hub.cache import CachedFiles, require_space
from qz.formats.hub.listing import list_folder
from qz.formats.hub.read_ahead import AheadFile, HashedRange, ReadAhead
from qz.formats.hub.transport.errors import hub_errors
from qz.formats.hub.transport.remote_file import RemoteFile, differs
from qz.formats.hub.transport.routes import Routes
from qz.formats.malformed import Malformed, quoted
from qz.thread_pool import thread_pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from huggingface_hub import HfApi

    from qz.formats.files.folder import Range
    from qz.formats.files.promised import Promised
    from qz.formats.hub.read_ahead import Pace
    from qz.formats.hub.transport.backoff import Retries

HEAD = 1 << 16
"""Bytes fetched at the first look into a weight file: most headers fit."""
WHOLE = 1 << 20
"""LFS files up to this size are fetched whole, like everything that is not LFS (10 MB at most on the Hub)."""
LARGEST_REGULAR = 16 << 20
"""Bytes of a file that is not LFS: the Hub takes 10 MB at most."""
KEPT = 32 << 20
"""Bytes of heads and small files that are kept."""


class HubFolder:
    """A folder of a model repository at one commit; a ``Folder``. ``private`` and ``gated`` are None if unknown."""

    revision: str | None = None
    private: bool | None = None
    gated: str | bool | None = None
    note: str | None = None
    """What the user should know of where the files come from."""
    license: Mapping[str, Any] = MappingProxyType({})
    """license, license_name and license_link of the repository's card, as far as given."""

    narrow = False
    """Whether memory is short, so that less is fetched ahead."""
    allow_pickle = False
    named_file: str | None = None
    only: str | None = None

    def __init__(
        self,
        api: HfApi,
        repo_id: str,
        commit: str,
        path: str = "",
        *,
        snapshot: Path | None = None,
        retries: Retries | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.repo_id, self.commit, self.path = repo_id, commit, path
        self.location = f"{repo_id}@{commit[:12]}" + (f"/{path}" if path else "")
        self._api, self._snapshot, self._retries, self._pace = api, snapshot, retries, pace
        self._routes = Routes(repo_id, commit, api.endpoint, retries)
        self._files: dict[str, RemoteFile] | None = None
        self._folders: tuple[str, ...] = ()
        self._cache = CachedFiles(repo_id, commit, api.endpoint)
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._seen: dict[str, list[HashedRange]] = {}
        self._ahead: ReadAhead | None = None
        self._lock = threading.RLock()
        self._promised: Promised | None = None

    @property
    def promised(self) -> Promised | None:
        return self._promised

    @promised.setter
    def promised(self, promised: Promised | None) -> None:
        self._promised = promised
        if promised is not None:
            self._cache.hold_to(promised)

    @property
    def bytes_received(self) -> int:
        """What came over the network by ranges so far."""
        return self._routes.bytes_received

    def sizes(self) -> Mapping[str, int]:
        return {name: file.size for name, file in self._listed().items() if self.only in (None, name)}

    def hashes(self) -> dict[str, tuple[str, str]]:
        """Of each file the kind of hash that the Hub lists, as in-toto calls it, and the hash; none offline."""
        files = {name: file for name, file in self._listed().items() if file.sha256 or file.git}
        return {name: ("sha256", file.sha256) if file.sha256 else ("gitBlob", file.git) for name, file in files.items()}

    def subfolders(self) -> Sequence[str]:
        self._listed()
        return self._folders if self.only is None else ()

    def include(self, name: str, files: Iterable[str]) -> None:
        inner, own = self.subfolder(name)._listed(), self._listed()
        for file in files:
            if file in inner:
                own[f"{name}/{file}"] = replace(inner[file], depth=name.count("/") + 1)

    def subfolder(self, name: str) -> HubFolder:
        if any(part in ("", ".", "..") or "\0" in part for part in name.split("/")):
            raise Malformed("unsafe-name", f"{quoted(name)} is not a folder inside {self.location}.")
        path = f"{self.path}/{name}" if self.path else name
        inner = HubFolder(
            self._api,
            self.repo_id,
            self.commit,
            path,
            snapshot=self._snapshot,
            retries=self._retries,
            pace=self._pace,
        )
        inner.revision, inner.private, inner.gated = self.revision, self.private, self.gated
        inner.license, inner.note, inner.allow_pickle = self.license, self.note, self.allow_pickle
        inner.narrow = self.narrow
        inner.promised = self.promised.inside(name) if self.promised is not None else None
        try:
            inner.sizes()
        except MissingInput:
            there = ", ".join(self.subfolders()) or "none"
            raise MissingInput(f"{self.location} has no folder {quoted(name)}. Folders there: {there}.") from None
        return inner

    def identity(self) -> dict[str, Any]:
        return {"repository": self.repo_id, "commit": self.commit, "subfolder": self.path}

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        remote, view = self._file(file), buffer.cast("B")
        if offset + len(view) > remote.size:
            raise Malformed(
                "truncated",
                f"{self.location}/{file} ends at byte {remote.size}, before byte {offset + len(view)}: it is "
                "truncated. Ask the repository's owner.",
            )
        local = self._cache.find(remote)
        if local is None and self._promised is not None:
            self._require_promised(remote, self._promised)
        if local is not None:
            local.read_into(file, offset, view)
        elif self._ahead is not None and file in self._ahead:
            self._ahead.read_into(file, offset, view)
        elif self._is_small(remote):
            view[:] = memoryview(self._whole(remote))[offset : offset + len(view)]
        elif len(view) == remote.size:
            self._routes.fetch(remote, 0, view)
            self._require_digest(remote, view)
        else:
            self._read_part(remote, offset, view)

    def announce(self, ranges: Sequence[Range]) -> None:
        wanted: dict[str, list[tuple[int, int]]] = {}
        for range_ in ranges:
            remote = self._file(range_.file)
            local = self._cache.find(remote)
            if local is None and self._is_small(remote) and remote.path in self._kept:
                continue
            if local is None:
                wanted.setdefault(range_.file, []).append((range_.start, range_.stop))
            else:
                local.announce([range_])
        if self._ahead is not None:
            self._ahead.finish()
            self._ahead.close()
        files = self._listed()
        streams = [
            AheadFile(name, files[name].size, files[name].hasher(), files[name].digest, spans, self._seen.get(name, ()))
            for name, spans in wanted.items()
        ]
        self._ahead = ReadAhead(
            streams,
            lambda name, start, view: self._routes.fetch(files[name], start, view),
            self.location,
            self._pace,
            lambda: self.narrow or self._routes.over_xet,
        )

    def is_verified(self, file: str) -> bool:
        if self._ahead is not None and file in self._ahead:
            # Also where the file was downloaded in the middle: what came by ranges before that is hashed by the stream.
            return self._ahead.is_verified(file)
        local = self._cache.find(self._file(file))
        return local is None or local.is_verified(file)

    def check(self) -> None:
        if self._ahead is not None:
            self._ahead.finish()
        for folder in self._cache.folders():
            folder.check()

    def download(self, files: Iterable[str], progress: Callable[[str, int], None] | None = None) -> None:
        """Fill the Hub cache with ``files`` (those already there are kept) and read them from there.

        ``progress(file, bytes)`` is called, from several threads, when a file has arrived and has the right hash.
        """

        names = list(files)
        missing = [remote for remote in map(self._file, names) if self._cache.find(remote) is None]
        require_space(self.repo_id, sum(remote.size for remote in missing))

        def fetch(name: str) -> None:
            remote = self._file(name)
            self._cache.fetch(remote)
            if progress:
                progress(name, remote.size)

        with thread_pool(4) as pool:
            for _ in pool.map(fetch, names):
                pass

    def give_up(self) -> None:
        self._routes.close()
        if self._ahead is not None:
            self._ahead.close()

    def close(self) -> None:
        self._routes.close()
        if self._ahead is not None:
            self._ahead.close()
        for folder in self._cache.folders():
            folder.close()

    # What there is

    def _listed(self) -> dict[str, RemoteFile]:
        with self._lock:
            if self._files is None:
                self._list_snapshot() if self._snapshot else self._list_hub()
            return self._files or {}

    def _list_hub(self) -> None:
        with hub_errors(self.repo_id, f"Listing {self.location}", revision=self.commit, endpoint=self._api.endpoint):
            self._files, self._folders = list_folder(
                self._api.endpoint, self.repo_id, self.commit, self.path, self._retries
            )

    def _list_snapshot(self) -> None:
        """Offline there is what is in the cache, and no promised hash."""
        assert self._snapshot is not None
        folder = LocalFolder(self._snapshot)
        if self.path:
            folder = folder.subfolder(self.path)
        prefix = f"{self.path}/" if self.path else ""
        self._files = {name: RemoteFile(prefix + name, size, "", None) for name, size in folder.sizes().items()}
        self._cache.adopt(folder, self._files.values())
        self._folders = tuple(folder.subfolders())

    def _file(self, name: str) -> RemoteFile:
        try:
            return self._listed()[name]
        except KeyError:
            why = "the Hub does not answer" if self.note else "HF_HUB_OFFLINE is set"
            offline = f" in the cache, and {why}" if self._snapshot else ""
            raise MissingInput(f"{self.location}/{name} does not exist{offline}.") from None

    # What comes by ranges

    @staticmethod
    def _is_small(remote: RemoteFile) -> bool:
        """Whether it is fetched whole, and kept, where a part of it is read."""
        return remote.sha256 is None or remote.size <= WHOLE

    def _read_part(self, remote: RemoteFile, offset: int, view: memoryview) -> None:
        done = 0
        if offset < HEAD:
            head = self._head(remote)
            done = min(len(view), len(head) - offset)
            view[:done] = memoryview(head)[offset : offset + done]
        if done < len(view):
            self._routes.fetch(remote, offset + done, view[done:])
            self._remember(remote, offset + done, view[done:])

    def _head(self, remote: RemoteFile) -> bytes:
        with self._lock:
            head = self._kept.get(remote.path)
        if head is None:
            fetched = bytearray(min(HEAD, remote.size))
            self._routes.fetch(remote, 0, memoryview(fetched))
            self._remember(remote, 0, memoryview(fetched))
            head = self._keep(remote, bytes(fetched))
        return head

    def _whole(self, remote: RemoteFile) -> bytes:
        with self._lock:
            data = self._kept.get(remote.path)
        if data is None:
            if remote.size > LARGEST_REGULAR:
                raise Malformed(
                    "too-large",
                    f"{self.location}/{remote.name} has {remote.size:,} bytes and is not in LFS, where the Hub takes "
                    "10 MB at most. Ask the repository's owner.",
                )
            fetched = bytearray(remote.size)
            if remote.size:
                self._routes.fetch(remote, 0, memoryview(fetched))
            self._require_digest(remote, memoryview(fetched))
            data = self._keep(remote, bytes(fetched))
        return data

    def _keep(self, remote: RemoteFile, data: bytes) -> bytes:
        with self._lock:
            self._kept[remote.path] = data
            while len(self._kept) > 1 and sum(map(len, self._kept.values())) > KEPT:
                self._kept.popitem(last=False)
        return data

    def _remember(self, remote: RemoteFile, start: int, view: memoryview) -> None:
        """What was read now must be what is hashed later, when the file is streamed."""
        seen = HashedRange(start, start + len(view), hashlib.sha256(view).digest())
        with self._lock:
            self._seen.setdefault(remote.name, []).append(seen)

    def _require_promised(self, remote: RemoteFile, promised: Promised) -> None:
        """By the hash that the Hub lists, with which what comes is compared; of a file outside of LFS, by itself."""
        read = partial(self._read_whole, remote)
        promised.require_before(remote.name, remote.size, self.location, read, remote.sha256)

    def _read_whole(self, remote: RemoteFile, _: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = memoryview(self._whole(remote))[offset : offset + len(buffer)]

    def _require_digest(self, remote: RemoteFile, view: memoryview) -> None:
        hasher = remote.hasher()
        hasher.update(view)
        if hasher.hexdigest() != remote.digest:
            raise differs(f"{self.location}/{remote.name}", remote.digest)
