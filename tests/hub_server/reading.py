"""What reads repositories at the Hub itself: info, listings, and resolve, which redirects."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, quote, urlsplit

from hub_server.contents import front_matter
from hub_server.faults import Answer
from hub_server.request import REPO, Request

if TYPE_CHECKING:
    from hub_server.contents import Entry


class Reading(Request):
    ROUTES: ClassVar = [
        ("hub", "GET", r"/api/whoami-v2", "whoami"),
        ("hub", "GET", rf"/api/models/{REPO}/auth-check", "auth_check"),
        ("hub", "GET", rf"/api/models/{REPO}/refs", "refs"),
        ("hub", "GET", rf"/api/models/{REPO}/revision/(?P<rev>[^/]+)", "info"),
        ("hub", "GET", rf"/api/models/{REPO}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("hub", "POST", rf"/api/models/{REPO}/paths-info/(?P<rev>[^/]+)", "paths_info"),
        ("hub", "GET", rf"/api/models/{REPO}", "info"),
        ("hub", "GET", rf"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
        ("hub", "HEAD", rf"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "head"),
    ]

    def whoami(self, body: bytes) -> None:
        user = self.user()
        if user is None:
            raise Answer(401, message="Invalid credentials in Authorization header")
        if "only" in user:
            raise Answer(403, message="This token is not for a whole account")
        self.json(
            {
                "type": "user",
                "name": user["name"],
                "fullname": user["name"],
                "avatarUrl": f"{self.server.hub.url}/avatars/{user['name']}.svg",
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
        if not entry.lfs:
            location = f"/api/resolve-cache/models/{repo}/{commit}/{quote(path)}?%2F{repo}"
            self.reply(307, b"", headers | {"Location": location})
            return
        if entry.xet:
            auth = f"{hub.url}/api/models/{repo}/xet-read-token/{commit}"
            info = f"{hub.cas_url}/v1/reconstructions/{entry.xet}"
            headers["X-Xet-Hash"] = entry.xet
            headers["Link"] = f'<{auth}>; rel="xet-auth", <{info}>; rel="xet-reconstruction-info"'
        location = hub.links.mint(entry.blob.sha256, self.headers.get("Range"), self.command)
        self.reply(302, b"", headers | {"Location": location})

    head = resolve
