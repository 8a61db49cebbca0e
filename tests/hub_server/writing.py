"""What changes repositories: create, settings, preupload, LFS upload, commit."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import itertools
import json
from typing import TYPE_CHECKING, Any, ClassVar

from hub_server.contents import Blob, Entry, front_matter, is_lfs
from hub_server.faults import Answer
from hub_server.request import REPO, Request

if TYPE_CHECKING:
    pass


class Writing(Request):
    ROUTES: ClassVar = [
        ("hub", "POST", r"/api/repos/create", "create"),
        ("hub", "POST", r"/api/validate-yaml", "validate_yaml"),
        ("hub", "POST", rf"/api/models/{REPO}/preupload/(?P<rev>[^/]+)", "preupload"),
        ("hub", "POST", rf"/api/models/{REPO}/commit/(?P<rev>[^/]+)", "commit"),
        ("hub", "POST", rf"/api/models/{REPO}/branch/(?P<rev>[^/]+)", "branch"),
        ("hub", "PUT", rf"/api/models/{REPO}/settings", "settings"),
        ("hub", "POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("hub", "POST", rf"/{REPO}/lfs-verify", "lfs_verify"),
        ("hub", "POST", r"/store/(?P<oid>[0-9a-f]{64})/complete", "lfs_complete"),
        ("cdn", "PUT", r"/store/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("cdn", "PUT", r"/store/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", "lfs_part"),
    ]

    def create(self, body: bytes) -> None:
        hub, wanted = self.server.hub, json.loads(body)
        user = self.user()
        if user is None:
            raise Answer(401, message="Invalid username or password.")
        name = f"{wanted.get('organization') or user['name']}/{wanted['name']}"
        if not self.owns(name):
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
                upload: dict[str, Any] = {"href": f"{hub.cdn_url}/store/{oid}?X-Amz-Expires=900&Signature=0"}
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
            hub, oid = self.server.hub, value["oid"]
            if oid not in hub.objects:
                raise Answer(400, message="LFS pointer pointed to a file that does not exist")
            tree[value["path"]] = Entry(hub.objects[oid], lfs=True, xet=hub.uploads.names.get(oid))
        elif key == "deletedFile" and tree.pop(value["path"], None) is None:
            raise Answer(404, "EntryNotFound", "A file with this name doesn't exist")
