"""What reading over Xet asks for: tokens at the Hub, reconstructions at the CAS, ranges of xorbs at the CDN.

A file is cut into xorbs of 32 MiB and those into chunks of 64 KiB, uncompressed; neither is stored: a range of a xorb
is made from the file when it is asked for. The client checks no hash, so those here are only names.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from hub_server.faults import Answer
from hub_server.request import REPO, Request

if TYPE_CHECKING:
    from hub_server.contents import Blob
    from hub_server.server import HubServer

CHUNK, XORB = 64 << 10, 32 << 20
HEADER = 8


def xet_hash(sha256: str) -> str:
    """The Xet hash of a file added behind the client's back: another name than its SHA-256, as on the Hub."""
    return hashlib.sha256(f"xet {sha256}".encode()).hexdigest()


class XetStore:
    """Which file each Xet hash names, which part of which file each xorb holds, and tokens."""

    def __init__(self, hub: HubServer) -> None:
        self._hub = hub
        self.files: dict[str, Blob] = {}
        self.xorbs: dict[str, tuple[Blob, int]] = {}

    def add(self, hash_: str, blob: Blob) -> None:
        self.files[hash_] = blob

    def token(self, scope: str, repo: str, commit: str) -> dict[str, Any]:
        ends = int(self._hub.now() + self._hub.rules.xet_token_seconds)
        said = base64.urlsafe_b64encode(json.dumps([scope, repo, commit, ends]).encode()).decode()
        return {"accessToken": said, "exp": ends, "casUrl": self._hub.cas_url}

    def allowed(self, token: str, scope: str) -> str:
        """The repository that ``token`` is for; raises the CAS's refusal."""
        try:
            said, repo, _commit, ends = json.loads(base64.urlsafe_b64decode(token))
        except ValueError:
            raise Answer(401, message="Unauthorized") from None
        if ends <= self._hub.now():
            raise Answer(401, message="Token expired")
        if scope == "write" and said != "write":
            raise Answer(403, message="Forbidden")
        return str(repo)

    def reconstruction(self, hash_: str, start: int, stop: int, version: int) -> dict[str, Any]:
        """The terms that hold bytes [start, stop), as whole chunks, and links for the ranges of xorbs they are in."""
        blob = self.files[hash_]
        terms, links = [], {}
        for number in range(start // XORB, (stop - 1) // XORB + 1):
            xorb = hashlib.sha256(f"{hash_} {number}".encode()).hexdigest()
            self.xorbs[xorb] = blob, number * XORB
            size = min(XORB, blob.size - number * XORB)
            first = max(0, start - number * XORB) // CHUNK
            last = -(-min(size, stop - number * XORB) // CHUNK)
            length = min(size, last * CHUNK) - first * CHUNK
            terms.append({"hash": xorb, "range": {"start": first, "end": last}, "unpacked_length": length})
            span = first * (CHUNK + HEADER), first * (CHUNK + HEADER) + length + HEADER * (last - first) - 1
            url = self._hub.links.sign(
                f"{self._hub.cdn_urls['aws']}/xorbs/default/{xorb}", f"bytes={span[0]}-{span[1]}"
            )
            chunks, bytes_ = {"start": first, "end": last}, {"start": span[0], "end": span[1]}
            links[xorb] = (
                [{"url": url, "ranges": [{"chunks": chunks, "bytes": bytes_}]}]
                if version == 2
                else [{"range": chunks, "url": url, "url_range": bytes_}]
            )
        key = "xorbs" if version == 2 else "fetch_info"
        return {"offset_into_first_range": start % CHUNK, "terms": terms, key: links}

    def packed(self, xorb: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a xorb: chunks, each behind version, packed length, scheme (0: none) and length."""
        blob, base = self.xorbs[xorb]
        size, out = min(XORB, blob.size - base), bytearray()
        first = start // (CHUNK + HEADER)
        for chunk in range(first, -(-stop // (CHUNK + HEADER))):
            data = blob.read(base + chunk * CHUNK, base + min(size, (chunk + 1) * CHUNK))
            length = struct.pack("<I", len(data))[:3]
            out += b"\0" + length + b"\0" + length + data
        skip = start - first * (CHUNK + HEADER)
        return bytes(out[skip : skip + stop - start])


class XetReading(Request):
    ROUTES: ClassVar = [
        ("hub", "GET", rf"/api/models/{REPO}/xet-(?P<scope>read|write)-token/(?P<rev>.+)", "xet_token"),
        ("cas", "GET", r"/v(?P<version>[12])/reconstructions/(?P<hash_>[0-9a-f]{64})", "reconstruction"),
        ("cas", "POST", r"/v1/telemetry", "telemetry"),
        ("cdn", "GET", r"/xorbs/default/(?P<xorb>[0-9a-f]{64})", "xorb"),
    ]

    def xet_token(self, body: bytes, repo: str, scope: str, rev: str) -> None:
        found = self.readable(repo) if scope == "read" else self.writable(repo)
        if not self.server.hub.rules.xet:
            raise Answer(404, message="Sorry, we can't find the page you are looking for.")
        said = self.server.hub.xet.token(scope, found.name, found.resolve(rev))
        headers = {
            "X-Xet-Cas-Url": said["casUrl"],
            "X-Xet-Access-Token": said["accessToken"],
            "X-Xet-Token-Expiration": str(said["exp"]),
        }
        self.json(said, headers=headers)

    def telemetry(self, body: bytes) -> None:
        self.json({})

    def reconstruction(self, body: bytes, version: str, hash_: str) -> None:
        hub = self.server.hub
        repo = hub.xet.allowed(self.headers.get("Authorization", "").removeprefix("Bearer "), "read")
        listed = (entry.xet for tree in hub.repos[repo].commits.values() for entry in tree.values())
        if (version == "2" and not hub.rules.reconstructions_v2) or hash_ not in hub.xet.files or hash_ not in listed:
            raise Answer(404, message="not found")
        size = hub.xet.files[hash_].size
        start, stop = self.span(size) or (0, size)
        if start >= size:
            raise Answer(416, message="Range not satisfiable", Content_Range=f"bytes */{size}")
        said = hub.xet.reconstruction(hash_, start, stop, int(version))
        if any(fault.lacking for fault in self.faults):
            said["terms"].pop()
        self.json(said)

    def xorb(self, body: bytes, xorb: str) -> None:
        hub, range_ = self.server.hub, self.headers.get("Range")
        if "Authorization" in self.headers:
            hub.tokens_seen_by_cdn.append(self.path)
        hub.links.check(self.server.host, urlsplit(self.path).path, self.query, range_, self.command)
        self.corrupt_at = HEADER
        blob, base = hub.xet.xorbs[xorb]
        size = min(XORB, blob.size - base)
        whole = size + HEADER * -(-size // CHUNK)
        start, stop = self.span(whole) or (0, whole)
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{whole}", "ETag": f'"{xorb}"'}
        self.reply(206 if range_ else 200, hub.xet.packed(xorb, start, stop), headers)
        self.corrupt_at = 0
