"""What the Hub holds: contents, trees of files, and repositories with commits and refs."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hub_server.faults import Answer

if TYPE_CHECKING:
    from pathlib import Path

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
class Repeated(Blob):
    """``data``, and then ``pattern`` again and again: a large file that neither memory nor a disk holds."""

    pattern: bytes = b""

    @classmethod
    def to(cls, size: int, head: bytes, pattern: bytes) -> Repeated:
        unnamed = cls(size, "", "", data=head, pattern=pattern)
        sha1, sha256 = hashlib.sha1(b"blob %d\0" % size), hashlib.sha256()
        for start in range(0, size, 1 << 20):
            chunk = unnamed.read(start, min(size, start + (1 << 20)))
            sha1.update(chunk)
            sha256.update(chunk)
        return cls(size, sha1.hexdigest(), sha256.hexdigest(), data=head, pattern=pattern)

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        stop, head = self.size if stop is None else stop, self.data or b""
        out = head[start:stop]
        while (at := start + len(out)) < stop:
            at = (at - len(head)) % len(self.pattern)
            out += self.pattern[at : at + stop - start - len(out)]
        return out


@dataclass(frozen=True)
class Entry:
    """A file of a tree; ``lfs`` if the repository holds a pointer to it; ``xet``: its Xet hash, if it has one."""

    blob: Blob
    lfs: bool
    xet: str | None = None

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
        if self.xet:
            entry["xetHash"] = self.xet
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


def is_lfs(path: str, sample: bytes = b"", size: int = 0) -> bool:
    name = path.rsplit("/", 1)[-1]
    return any(fnmatch.fnmatch(name, pattern) for pattern in LFS_NAMES) or b"\0" in sample[:512] or size > REGULAR_LIMIT


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
