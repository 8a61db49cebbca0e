"""The Hub, the two hosts of its CDN and its CAS, each on a port of its own; what it holds, and what it counts."""

from __future__ import annotations

import fnmatch
import threading
import time
from collections import Counter
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar, Self

from hub_server.cdn import Cdn, Links
from hub_server.contents import Blob, Entry, Repo, is_lfs
from hub_server.faults import Fault
from hub_server.oidc import Ci, TrustedPublishing
from hub_server.reading import Reading
from hub_server.rules import Rules
from hub_server.writing import Writing
from hub_server.xet import XetReading, XetStore, xet_hash
from hub_server.xet_uploads import XetUploading, XetUploads

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

OWNER = "hf_owner_of_me_and_org"
READER = "hf_reader_without_rights"


class Handler(Cdn, Writing, XetReading, XetUploading, TrustedPublishing):
    """One connection. ``ROUTES`` says which request is of which kind; a method of that name answers it."""

    ROUTES: ClassVar = [
        *XetReading.ROUTES,
        *XetUploading.ROUTES,
        *Cdn.ROUTES,
        *Reading.ROUTES,
        *Writing.ROUTES,
        *TrustedPublishing.ROUTES,
    ]


class HubServer:
    """A context manager. ``rules`` may be given by name, as may ``page_size`` and the sizes of LFS uploads."""

    def __init__(
        self, *, page_size: int = 1000, multipart_from: int = 1 << 62, part_size: int = 1 << 20, **rules: Any
    ) -> None:
        self.page_size, self.multipart_from, self.part_size = page_size, multipart_from, part_size
        self.rules = Rules(**rules)
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.objects: dict[str, Blob] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.users: dict[str, dict[str, Any]] = {
            OWNER: {"name": "me", "orgs": ["org"], "role": "write"},
            READER: {"name": "reader", "orgs": [], "role": "read"},
        }
        self.faults: list[Fault] = []
        self.requests: Counter[str] = Counter()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.bytes_out: Counter[str] = Counter()
        self.bytes_in: Counter[str] = Counter()
        self.windows: Counter[tuple[str, str, int]] = Counter()
        self.tokens_seen_by_cdn: list[str] = []
        self.ranges: list[tuple[str, int, int]] = []
        self.commit_bodies: list[list[dict[str, Any]]] = []
        self.latency = 0.0
        self.bandwidth = 0.0
        self.lock = threading.RLock()
        self._ahead = 0.0
        self.links = Links(self)
        self.xet = XetStore(self)
        self.uploads = XetUploads()
        self.ci: Ci | None = None
        self._listeners = {
            host: Listener(self, origin, host)
            for origin, host in (("hub", "hub"), ("cdn", "aws"), ("cdn", "gcp"), ("cas", "cas"))
        }
        urls = {host: f"http://127.0.0.1:{listener.server_address[1]}" for host, listener in self._listeners.items()}
        self.url, self.cas_url, self.cdn_url = urls["hub"], urls["cas"], urls["aws"]
        self.cdn_urls = {host: urls[host] for host in ("aws", "gcp")}

    def __enter__(self) -> Self:
        for listener in self._listeners.values():
            threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        ending = [threading.Thread(target=listener.shutdown) for listener in self._listeners.values()]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()
        for listener in self._listeners.values():
            listener.server_close()

    def now(self) -> float:
        """The server's own clock, by which links, tokens and windows of rate limits end."""
        return time.time() + self._ahead

    def pass_time(self, seconds: float) -> None:
        self._ahead += seconds

    def expire_links(self) -> None:
        """Every signed link handed out so far stops working: their time is over."""
        self.pass_time(self.rules.link_seconds + 1)

    def add(self, name: str, files: Mapping[str, bytes | Path | Blob] | None = None, **about: Any) -> Repo:
        """A new repository whose first commit holds ``files`` (LFS by name, as .gitattributes has it on the Hub)."""
        repo = self.repos[name] = Repo(name, **about)
        repo.add({path: self.entry(path, content) for path, content in (files or {}).items()}, "main", None, "first")
        return repo

    def commit(self, name: str, files: Mapping[str, bytes | Path | None], ref: str = "main") -> str:
        """Another commit on ``ref``, behind the client's back. None deletes a file."""
        repo = self.repos[name]
        tree = dict(repo.commits[repo.refs[ref]])
        for path, content in files.items():
            tree.pop(path, None)
            if content is not None:
                tree[path] = self.entry(path, content)
        return repo.add(tree, ref, repo.refs[ref], "another commit")

    def entry(self, path: str, content: bytes | Path | Blob) -> Entry:
        blob = content if isinstance(content, Blob) else Blob.of(content)
        if not is_lfs(path, content if isinstance(content, bytes) else b""):
            return Entry(blob, lfs=False)
        self.objects[blob.sha256] = blob
        if not self.rules.xet or any(fnmatch.fnmatch(path, pattern) for pattern in self.rules.without_xet):
            return Entry(blob, lfs=True)
        self.xet.add(xet_hash(blob.sha256), blob)
        return Entry(blob, lfs=True, xet=xet_hash(blob.sha256))

    def fail(self, kind: str, **how: Any) -> Fault:
        fault = Fault(kind, **how)
        self.faults.append(fault)
        return fault

    def rename(self, old: str, new: str) -> None:
        self.repos[new] = self.repos.pop(old)
        self.repos[new].name = new
        self.renamed[old] = new

    def trust(self, *resources: str) -> Ci:
        """A CI job that the repositories and users named trust."""
        self.ci = Ci(self, set(resources))
        return self.ci

    def lose_uploads(self) -> None:
        """What is in no commit is swept out of the storage."""
        with self.lock:
            trees = [tree for repo in self.repos.values() for tree in repo.commits.values()]
            kept = {entry.blob.sha256 for tree in trees for entry in tree.values()}
            self.objects = {oid: blob for oid, blob in self.objects.items() if oid in kept}
            self.uploads = XetUploads()

    def reset_counts(self) -> None:
        with self.lock:
            for counter in (self.requests, self.answers, self.bytes_out, self.bytes_in):
                counter.clear()
            self.ranges.clear()


class Listener(ThreadingHTTPServer):
    """One port. ``origin``: hub, cdn or cas; ``host``: hub, aws, gcp or cas."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, hub: HubServer, origin: str, host: str) -> None:
        self.hub, self.origin, self.host = hub, origin, host
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not news."""
