"""A Hub on 127.0.0.1: what the huggingface_hub client asks of huggingface.co, answered as huggingface.co does.

Repositories with commits, branches, pull requests and visibility; model info, tree (paged), paths-info, resolve with
redirects to a second origin that plays the CDN (signed links, ranges), whoami, create, settings, preupload, LFS batch,
basic and multipart upload, verify, commit. ``Fault`` makes any request of a kind fail in a chosen way; ``requests``,
``bytes_out`` and ``bytes_in`` count per kind. Run as a script, it serves a directory of repositories.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import itertools
import json
import re
import secrets
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import pytest

OWNER = "hf_owner_of_me_and_org"
READER = "hf_reader_without_rights"
LFS_NAMES = ("*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.model", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.tar.gz")
REGULAR_LIMIT = 10_000_000


@dataclass(frozen=True)
class Blob:
    """Content in memory or in a file, and the two names it may have: git's SHA-1 and LFS's SHA-256."""

    size: int
    git: str
    sha256: str
    data: bytes | None = None
    path: Path | None = None

    @classmethod
    def of(cls, content: bytes | Path) -> Blob:
        if isinstance(content, bytes):
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return cls(len(content), git, hashlib.sha256(content).hexdigest(), data=content)
        size = content.stat().st_size
        sha1, sha256 = hashlib.sha1(b"blob %d\0" % size), hashlib.sha256()
        with content.open("rb") as file:
            while chunk := file.read(1 << 20):
                sha1.update(chunk)
                sha256.update(chunk)
        return cls(size, sha1.hexdigest(), sha256.hexdigest(), path=content)

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        stop = self.size if stop is None else stop
        if self.data is not None:
            return self.data[start:stop]
        assert self.path is not None
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


@dataclass(frozen=True)
class Entry:
    """A file of a tree; ``lfs`` if the repository holds a pointer to it."""

    blob: Blob
    lfs: bool

    @property
    def pointer(self) -> bytes:
        oid, size = self.blob.sha256, self.blob.size
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()

    @property
    def oid(self) -> str:
        return Blob.of(self.pointer).git if self.lfs else self.blob.git

    @property
    def etag(self) -> str:
        return self.blob.sha256 if self.lfs else self.blob.git

    def described(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "oid": self.oid, "size": self.blob.size, "path": path}
        if self.lfs:
            entry["lfs"] = {"oid": self.blob.sha256, "size": self.blob.size, "pointerSize": len(self.pointer)}
        return entry


@dataclass
class Repo:
    """One model repository. ``commits`` maps an oid to its tree; ``refs`` a branch or ``refs/pr/N`` to an oid."""

    name: str
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)
    disabled: bool = False
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return self.refs["main"]

    def resolve(self, revision: str) -> str:
        if revision in self.refs:
            return self.refs[revision]
        if revision in self.commits:
            return revision
        raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: entry.blob.read() for path, entry in self.commits[self.resolve(revision)].items()}

    def add(self, tree: dict[str, Entry], ref: str, parent: str | None, message: str) -> str:
        listing = "".join(f"{path} {entry.etag}\n" for path, entry in sorted(tree.items()))
        oid = hashlib.sha1(f"{parent} {len(self.commits)} {self.name}\n{listing}".encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.parents[oid] = tree, message, parent
        self.refs[ref] = oid
        return oid


class Answer(Exception):
    """An error status with the Hub's headers."""

    def __init__(self, status: int, code: str | None = None, message: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()} | (
            {"X-Error-Code": code} if code else {}
        )
        if message:
            self.headers["X-Error-Message"] = message.replace("\n", " ")


@dataclass
class Fault:
    """What goes wrong with the requests of one kind, from the ``nth`` on, ``times`` times.

    kind: see ``Handler.route``, or "*". matching: only requests whose path contains it. status, code, message, headers:
    answered instead of the real answer. before: called first (moves a ref, flips visibility). truncate: so many bytes
    of the body are sent, then the connection closes. drop: closed without an answer. hang: seconds before the answer.
    stall: seconds before the last byte. corrupt: one byte of the body differs. ignore_range: the whole file with 200.
    replace: headers of the real answer that are replaced (None: left out). lose_answer: the commit is made, and the
    connection closes before its answer.
    """

    kind: str
    nth: int = 1
    times: int = 1_000_000
    matching: str = ""
    status: int | None = None
    code: str | None = None
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    before: Callable[[], object] | None = None
    truncate: int | None = None
    drop: bool = False
    hang: float = 0.0
    stall: float = 0.0
    lose_answer: bool = False
    corrupt: bool = False
    ignore_range: bool = False
    replace: Mapping[str, str | None] = field(default_factory=dict)
    seen: int = 0

    def strikes(self, kind: str, path: str) -> bool:
        if self.kind not in (kind, "*") or self.matching not in path:
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


class HubServer:
    """The Hub and its CDN, each on a port of its own. A context manager."""

    def __init__(self, *, page_size: int = 1000, multipart_from: int = 1 << 62, part_size: int = 1 << 20) -> None:
        self.page_size, self.multipart_from, self.part_size = page_size, multipart_from, part_size
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
        self.bytes_out: Counter[str] = Counter()
        self.bytes_in: Counter[str] = Counter()
        self.tokens_seen_by_cdn: list[str] = []
        self.ranges: list[tuple[str, int, int]] = []
        self.commit_bodies: list[list[dict[str, Any]]] = []
        self.latency = 0.0
        self.secret = secrets.token_hex(8)
        self.lock = threading.RLock()
        self._listeners = [_Listener(self), _Listener(self)]
        self.port, self.cdn_port = (listener.server_address[1] for listener in self._listeners)
        self.url, self.cdn_url = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.cdn_port}"

    def __enter__(self) -> Self:
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()

    def add(self, name: str, files: Mapping[str, bytes | Path] | None = None, **about: Any) -> Repo:
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

    def entry(self, path: str, content: bytes | Path) -> Entry:
        entry = Entry(Blob.of(content), is_lfs(path, content if isinstance(content, bytes) else b""))
        if entry.lfs:
            self.objects[entry.blob.sha256] = entry.blob
        return entry

    def fail(self, kind: str, **how: Any) -> Fault:
        fault = Fault(kind, **how)
        self.faults.append(fault)
        return fault

    def rename(self, old: str, new: str) -> None:
        self.repos[new] = self.repos.pop(old)
        self.repos[new].name = new
        self.renamed[old] = new

    def expire_links(self) -> None:
        """Every signed CDN link handed out so far stops working."""
        self.secret = secrets.token_hex(8)

    def reset_counts(self) -> None:
        with self.lock:
            for counter in (self.requests, self.bytes_out, self.bytes_in):
                counter.clear()
            self.ranges.clear()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not news."""


def is_lfs(path: str, sample: bytes = b"", size: int = 0) -> bool:
    name = path.rsplit("/", 1)[-1]
    return any(fnmatch.fnmatch(name, pattern) for pattern in LFS_NAMES) or b"\0" in sample[:512] or size > REGULAR_LIMIT


class Handler(BaseHTTPRequestHandler):
    """One connection. ``ROUTES`` says which request is of which kind; a method of that name answers it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    ROUTES: ClassVar = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)/auth-check", "auth_check"),
        ("GET", r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)/refs", "refs"),
        ("GET", r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)/revision/(?P<rev>[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)/paths-info/(?P<rev>[^/]+)", "paths_info"),
        ("POST", r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)/commit/(?P<rev>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)/branch/(?P<rev>[^/]+)", "branch"),
        ("PUT", r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)/settings", "settings"),
        ("GET", r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)", "info"),
        ("GET", r"/api/resolve-cache/models/(?P<repo>[^/]+/[^/]+)/(?P<rev>[^/]+)/(?P<path>.+)", "resolve_cache"),
        ("HEAD", r"/api/resolve-cache/models/(?P<repo>[^/]+/[^/]+)/(?P<rev>[^/]+)/(?P<path>.+)", "resolve_cache"),
        ("GET", r"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD", r"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "head"),
        ("POST", r"/(?P<repo>[^/]+(?:/[^/]+)?)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", r"/(?P<repo>[^/]+(?:/[^/]+)?)/lfs-verify", "lfs_verify"),
        ("GET", r"/cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
        ("PUT", r"/store/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("PUT", r"/store/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", "lfs_part"),
        ("POST", r"/store/(?P<oid>[0-9a-f]{64})/complete", "lfs_complete"),
    ]

    # -- one request ------------------------------------------------------------------------------------------------

    def handle_any(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.faults: list[Fault] = []
        kind, match = self.route(parts.path)
        self.kind = kind
        body = self.read_body()
        with hub.lock:
            hub.requests[kind] += 1
            hub.bytes_in[kind] += len(body)
            self.faults = [fault for fault in hub.faults if fault.strikes(kind, self.path)]
        time.sleep(hub.latency + sum(fault.hang for fault in self.faults))
        try:
            for fault in self.faults:
                if fault.before:
                    fault.before()
                if fault.drop:
                    self.close_now()
                    return
                if fault.status is not None:
                    raise Answer(fault.status, fault.code, fault.message, **fault.headers)
            if match is None:
                raise Answer(404, message="Sorry, we can't find the page you are looking for.")
            arguments = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            if "repo" in arguments and arguments["repo"] in hub.renamed:
                new = hub.renamed[arguments["repo"]]
                self.reply(307, b"", {"Location": self.path.replace(arguments["repo"], new, 1)})
                return
            getattr(self, kind)(body, **arguments)
        except Answer as answer:
            error = json.dumps({"error": answer.message or "error"}).encode()
            self.reply(answer.status, error, {"Content-Type": "application/json", **answer.headers}, faults=[])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def route(self, path: str) -> tuple[str, re.Match[str] | None]:
        for method, pattern, kind in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                return kind, match
        return "unknown", None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 - http.server's names

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(
        self,
        status: int,
        body: bytes | tuple[Blob, int, int],
        headers: Mapping[str, str | None] | None = None,
        faults: list[Fault] | None = None,
    ) -> None:
        """Send an answer; a body ``(blob, start, stop)`` is streamed. Faults change it on the way."""
        faults = self.faults if faults is None else faults
        headers = dict(headers or {})
        for fault in faults:
            headers |= fault.replace
        length = len(body) if isinstance(body, bytes) else body[2] - body[1]
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = min([length, *(fault.truncate for fault in faults if fault.truncate is not None)])
        chunks = _pieces(body, limit)
        sent = 0
        for chunk in chunks:
            if sent == 0 and chunk and any(fault.corrupt for fault in faults):
                chunk = bytes([chunk[0] ^ 1]) + chunk[1:]
            stall = sum(fault.stall for fault in faults)
            if stall and sent + len(chunk) == limit:
                self.wfile.write(chunk[:-1])
                self.wfile.flush()
                time.sleep(stall)
                chunk = chunk[-1:]
            self.wfile.write(chunk)
            sent += len(chunk)
        with self.server.hub.lock:
            self.server.hub.bytes_out[self.kind] += sent
        if limit < length:
            self.close_now()

    def close_now(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def log_message(self, *args: object) -> None:
        """Quiet."""

    # -- who may do what --------------------------------------------------------------------------------------------

    def user(self) -> dict[str, Any] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.server.hub.users:
            raise Answer(401, message="Invalid credentials in Authorization header")
        return self.server.hub.users[token]

    def owns(self, namespace: str) -> bool:
        user = self.user()
        return user is not None and user["role"] == "write" and namespace in (user["name"], *user["orgs"])

    def repo(self, name: str, *, write: bool = False) -> Repo:
        repo, user = self.server.hub.repos.get(name), self.user()
        mine = self.owns(name.split("/")[0])
        if repo is None or (repo.private and not mine):
            raise Answer(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if repo.disabled:
            raise Answer(403, message="Access to this resource is disabled.")
        if write and not mine:
            if user is None:
                raise Answer(401, message="Invalid username or password.")
            raise Answer(403, message="You don't have the rights to write to this repository")
        return repo

    def readable(self, name: str) -> Repo:
        repo, user = self.repo(name), self.user()
        if repo.gated and not self.owns(name.split("/")[0]) and (user is None or user["name"] not in repo.granted):
            raise Answer(401 if user is None else 403, "GatedRepo", f"Access to model {name} is restricted.")
        return repo

    # -- reading ----------------------------------------------------------------------------------------------------

    def whoami(self, body: bytes) -> None:
        user = self.user()
        if user is None:
            raise Answer(401, message="Invalid credentials in Authorization header")
        self.json(
            {
                "type": "user",
                "name": user["name"],
                "fullname": user["name"],
                "orgs": [{"name": org} for org in user["orgs"]],
                "auth": {"accessToken": {"displayName": "test", "role": user["role"]}},
            }
        )

    def auth_check(self, body: bytes, repo: str) -> None:
        self.readable(repo)
        self.json({})

    def info(self, body: bytes, repo: str, rev: str = "main") -> None:
        found = self.repo(repo)
        commit = found.resolve(rev)
        tree = found.commits[commit]
        card = tree["README.md"].blob.read().decode() if "README.md" in tree else ""
        info: dict[str, Any] = {
            "_id": hashlib.sha1(repo.encode()).hexdigest()[:24],
            "id": found.name,
            "modelId": found.name,
            "sha": commit,
            "author": found.name.split("/")[0],
            "private": found.private,
            "gated": found.gated,
            "disabled": found.disabled,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "library_name": "transformers",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "lastModified": "2026-01-01T00:00:00.000Z",
            "cardData": front_matter(card, strict=False),
        }
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(tree)]
        if "blobs" in self.query:
            siblings = [
                {"rfilename": path, "size": entry.blob.size, "blobId": entry.oid}
                | (
                    {"lfs": {"sha256": entry.blob.sha256, "size": entry.blob.size, "pointerSize": len(entry.pointer)}}
                    if entry.lfs
                    else {}
                )
                for path, entry in sorted(tree.items())
            ]
        if "expand" in self.query:
            wanted = {"_id", "id", *self.query["expand"]}
            info = {key: value for key, value in (info | {"siblings": siblings}).items() if key in wanted}
        else:
            info["siblings"] = siblings
        self.json(info)

    def tree(self, body: bytes, repo: str, rev: str, path: str = "") -> None:
        tree = self.repo(repo).commits[self.repo(repo).resolve(rev)]
        prefix = path.strip("/") + "/" if path else ""
        if path and not any(name.startswith(prefix) for name in tree):
            raise Answer(404, "EntryNotFound", f"{path} does not exist on {rev}")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries: list[dict[str, Any]] = []
        folders: set[str] = set()
        for name, entry in sorted(tree.items()):
            if not name.startswith(prefix):
                continue
            *above, _last = name[len(prefix) :].split("/")
            for depth in range(1, len(above) + 1 if recursive else min(len(above), 1) + 1):
                folder = prefix + "/".join(above[:depth])
                if folder not in folders:
                    folders.add(folder)
                    oid = hashlib.sha1(folder.encode()).hexdigest()
                    entries.append({"type": "directory", "oid": oid, "size": 0, "path": folder})
            if recursive or not above:
                entries.append(entry.described(name))
        first = int(self.query.get("cursor", ["0"])[0])
        last, headers = first + self.server.hub.page_size, {}
        if last < len(entries):
            query = f"recursive={recursive}&cursor={last}"
            headers["Link"] = f'<{self.server.hub.url}{urlsplit(self.path).path}?{query}>; rel="next"'
        self.json(entries[first:last], headers=headers)

    def paths_info(self, body: bytes, repo: str, rev: str) -> None:
        tree = self.repo(repo).commits[self.repo(repo).resolve(rev)]
        paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        self.json([tree[path].described(path) for path in paths if path in tree])

    def refs(self, body: bytes, repo: str) -> None:
        refs = self.repo(repo).refs.items()
        heads = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in refs
            if not name.startswith("refs/")
        ]
        self.json({"branches": heads, "tags": [], "converts": [], "pullRequests": []})

    def found(self, repo: str, rev: str, path: str) -> tuple[str, Entry]:
        found = self.readable(repo)
        commit = found.resolve(rev)
        if path not in found.commits[commit]:
            raise Answer(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        return commit, found.commits[commit][path]

    def resolve(self, body: bytes, repo: str, rev: str, path: str) -> None:
        hub = self.server.hub
        commit, entry = self.found(repo, rev, path)
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(entry.blob.size),
            "X-Linked-Etag": f'"{entry.etag}"',
            "Accept-Ranges": "bytes",
            "ETag": f'"{entry.etag}"',
        }
        if entry.lfs:
            location = f"{hub.cdn_url}/cdn/{entry.blob.sha256}?Expires=1&Signature={hub.secret}"
            self.reply(302, b"", headers | {"Location": location})
        else:
            location = f"/api/resolve-cache/models/{repo}/{commit}/{quote(path)}?%2F{repo}"
            self.reply(307, b"", headers | {"Location": location})

    head = resolve

    def resolve_cache(self, body: bytes, repo: str, rev: str, path: str) -> None:
        commit, entry = self.found(repo, rev, path)
        self.file(entry.blob, {"X-Repo-Commit": commit, "ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"})

    def cdn(self, body: bytes, oid: str) -> None:
        hub = self.server.hub
        if "Authorization" in self.headers:
            hub.tokens_seen_by_cdn.append(self.path)
        if self.query.get("Signature") != [hub.secret]:
            raise Answer(403, message="Request has expired")
        self.file(hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def file(self, blob: Blob, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = (int(match[1]), int(match[2]) + 1 if match[2] else blob.size) if match else (0, blob.size)
        with self.server.hub.lock:
            self.server.hub.ranges.append((blob.sha256, start, min(stop, blob.size)))
        if not match or any(fault.ignore_range for fault in self.faults):
            self.reply(200, (blob, 0, blob.size), headers)
        elif start >= blob.size:
            raise Answer(416, message="Range not satisfiable", Content_Range=f"bytes */{blob.size}")
        else:
            stop = min(stop, blob.size)
            content_range = f"bytes {start}-{stop - 1}/{blob.size}"
            self.reply(206, (blob, start, stop), headers | {"Content-Range": content_range})

    # -- writing ----------------------------------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        hub, wanted = self.server.hub, json.loads(body)
        user = self.user()
        if user is None:
            raise Answer(401, message="Invalid username or password.")
        name = f"{wanted.get('organization') or user['name']}/{wanted['name']}"
        if not self.owns(name.split("/")[0]):
            raise Answer(403, message=f"You don't have the rights to create a model under this namespace: {name}")
        url = f"{hub.url}/{name}"
        if name in hub.repos:
            self.json({"error": "You already created this model repo", "url": url}, 409)
            return
        repo = hub.add(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        repo.private = wanted.get("visibility") == "private"
        self.json({"url": url, "name": name, "id": name})

    def settings(self, body: bytes, repo: str) -> None:
        wanted, found = json.loads(body), self.repo(repo, write=True)
        if "visibility" in wanted:
            found.private = wanted["visibility"] == "private"
        found.gated = wanted.get("gated", found.gated)
        self.json({})

    def validate_yaml(self, body: bytes) -> None:
        try:
            card = front_matter(json.loads(body)["content"])
        except ValueError as error:
            self.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        problems = [
            f'"{key}" must be a string'
            for key in ("license", "library_name", "pipeline_tag")
            if key in card and not isinstance(card[key], str)
        ]
        self.json({"errors": [{"message": text} for text in problems], "warnings": []}, 400 if problems else 200)

    def branch(self, body: bytes, repo: str, rev: str) -> None:
        found, wanted = self.repo(repo, write=True), json.loads(body or b"{}")
        if rev in found.refs:
            raise Answer(409, message=f"Reference already exists: refs/heads/{rev}")
        found.refs[rev] = found.resolve(wanted.get("startingPoint", "main"))
        self.json({})

    def writable(self, repo: str) -> Repo:
        """Anyone who can read may open a pull request; everything else needs the right to write."""
        return self.readable(repo) if self.query.get("create_pr") == ["1"] else self.repo(repo, write=True)

    def preupload(self, body: bytes, repo: str, rev: str) -> None:
        found, wanted = self.writable(repo), json.loads(body)
        tree = found.commits[found.resolve(rev)]
        ignored = wanted.get("gitIgnore")
        if ignored is None:
            ignored = tree[".gitignore"].blob.read().decode() if ".gitignore" in tree else ""
        patterns = [line for line in ignored.splitlines() if line and not line.startswith("#")]
        answers = []
        for file in wanted["files"]:
            path, name = file["path"], file["path"].rsplit("/", 1)[-1]
            lfs = is_lfs(path, base64.b64decode(file["sample"]), file["size"])
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": any(fnmatch.fnmatch(name, pattern) for pattern in patterns),
                }
                | ({"oid": tree[path].etag} if path in tree else {})
            )
        self.json({"files": answers, "commitOid": found.resolve(rev)})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        hub, wanted = self.server.hub, json.loads(body)
        self.repo(repo, write="ref" in wanted)
        objects = []
        for item in wanted["objects"]:
            oid, size = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in hub.objects:
                upload: dict[str, Any] = {"href": f"{hub.cdn_url}/store/{oid}?Signature={hub.secret}"}
                if size >= hub.multipart_from:
                    count = -(-size // hub.part_size)
                    links = {f"{part:05d}": f"{hub.cdn_url}/store/{oid}/{part}" for part in range(1, count + 1)}
                    upload = {
                        "href": f"{hub.url}/store/{oid}/complete",
                        "header": {"chunk_size": str(hub.part_size)} | links,
                    }
                answer["authenticated"] = True
                answer["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/{repo}/lfs-verify"}}
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects})

    def stored(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Answer(400, message="The provided 'x-amz-checksum-sha256' header does not match what was computed.")
        self.server.hub.objects[oid] = Blob.of(data)

    def lfs_put(self, body: bytes, oid: str) -> None:
        if "Authorization" in self.headers:
            self.server.hub.tokens_seen_by_cdn.append(self.path)
        self.stored(oid, body)
        self.reply(200, b"", {"ETag": f'"{oid[:32]}"'})

    def lfs_part(self, body: bytes, oid: str, part: str) -> None:
        with self.server.hub.lock:
            self.server.hub.parts.setdefault(oid, {})[int(part)] = body
        self.reply(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def lfs_complete(self, body: bytes, oid: str) -> None:
        parts = self.server.hub.parts.pop(oid, {})
        if [part["partNumber"] for part in json.loads(body)["parts"]] != sorted(parts):
            raise Answer(400, message="Parts are missing")
        self.stored(oid, b"".join(parts[number] for number in sorted(parts)))
        self.json({})

    def lfs_verify(self, body: bytes, repo: str) -> None:
        self.repo(repo)
        wanted, stored = json.loads(body), self.server.hub.objects.get(json.loads(body)["oid"])
        if stored is None or stored.size != wanted["size"]:
            raise Answer(404, message="The object does not exist")
        self.json({})

    def commit(self, body: bytes, repo: str, rev: str) -> None:
        hub = self.server.hub
        found = self.writable(repo)
        with hub.lock:
            parent = found.resolve(rev)
            lines = [json.loads(line) for line in body.splitlines() if line]
            hub.commit_bodies.append(lines)
            header = next(line["value"] for line in lines if line["key"] == "header")
            pull = self.query.get("create_pr") == ["1"]
            expected = header.get("parentCommit")
            if pull and expected:
                parent = found.resolve(expected)
            elif expected and expected != parent:
                raise Answer(412, message="A commit has happened since. Please refresh and try again.")
            tree = dict(found.commits[parent])
            for line in lines:
                self.change(tree, line["key"], line["value"])
            number = next(n for n in itertools.count(1) if f"refs/pr/{n}" not in found.refs)
            oid = found.add(tree, f"refs/pr/{number}" if pull else rev, parent, header["summary"])
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{found.name}/commit/{oid}"}
        if pull:
            answer["pullRequestUrl"] = f"{hub.url}/{found.name}/discussions/{number}"
        if any(fault.lose_answer for fault in self.faults):
            self.close_now()  # the commit was made, the answer is lost
            return
        self.json(answer)

    def change(self, tree: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            tree[value["path"]] = Entry(Blob.of(base64.b64decode(value["content"])), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.server.hub.objects:
                raise Answer(400, message="LFS pointer pointed to a file that does not exist")
            tree[value["path"]] = Entry(self.server.hub.objects[value["oid"]], lfs=True)
        elif key == "deletedFile" and tree.pop(value["path"], None) is None:
            raise Answer(404, "EntryNotFound", "A file with this name doesn't exist")


def _pieces(body: bytes | tuple[Blob, int, int], limit: int) -> Iterable[bytes]:
    if isinstance(body, bytes):
        return [body[:limit]]
    blob, start, _stop = body
    step = 1 << 18
    return (blob.read(at, min(at + step, start + limit)) for at in range(start, start + limit, step))


def front_matter(card: str, *, strict: bool = True) -> dict[str, Any]:
    """The YAML block at the head of a model card; if it is none, ValueError, or nothing unless ``strict``."""
    import yaml

    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        if strict:
            raise ValueError(f"Invalid YAML: {error}") from None
        data = {}
    if not isinstance(data or {}, dict):
        raise ValueError("The metadata is not a mapping")
    return data or {}


class Hurried:
    """The module ``time`` for huggingface_hub's own back-off, which is not what these tests are about."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.01))


@contextmanager
def connected(monkeypatch: pytest.MonkeyPatch, home: Path, **options: Any) -> Iterator[HubServer]:
    """A Hub that huggingface_hub in this process talks to, as with HF_ENDPOINT, HF_HOME and HF_TOKEN, without Xet.

    The library reads the environment once, when it is first imported, so its constants are set as well.
    """
    from huggingface_hub import close_session, constants, file_download
    from huggingface_hub.utils import _http

    with HubServer(**options) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(home))
        monkeypatch.setenv("HF_TOKEN", OWNER)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", Hurried())
        close_session()
        yield hub
        close_session()


def serve(root: Path) -> None:
    """Serve ``root/<owner>/<name>`` as repositories until interrupted; the first line printed is the address."""
    with HubServer() as hub:
        for folder in sorted(root.glob("*/*")):
            files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
            hub.add(f"{folder.parent.name}/{folder.name}", files)
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    import sys

    serve(Path(sys.argv[1]))
