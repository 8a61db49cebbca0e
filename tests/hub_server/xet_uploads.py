"""What uploading over Xet asks for: grants for xorbs at the CAS, PUTs to a signed link, shards that make files of them.

A xorb is kept as it came; a file is put together when its shard arrives, and its SHA-256 compared with the shard's.
Sources: huggingface/hub-docs, docs/xet (upload-protocol, xorb, shard); the grants are in hf_xet 1.8 only.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import ClassVar

import lz4.frame  # what the client compresses

from hub_server.contents import Blob
from hub_server.faults import Answer
from hub_server.request import Request

TAG = b"HFRepoMetaData\0" + bytes([85, 105, 103, 69, 106, 123, 129, 87, 131, 165, 189, 217, 92, 205, 209, 74, 169])
RECORD = 48
HASH = r"(?P<hash_>[0-9a-f]{64})"


@dataclass
class XetUploads:
    """Xorbs as lists of chunks, unpacked; grants, and what was put under them; Xet hashes by SHA-256."""

    xorbs: dict[str, list[bytes]] = field(default_factory=dict)
    grants: dict[str, str] = field(default_factory=dict)
    put: dict[str, bytes] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


class XetUploading(Request):
    ROUTES: ClassVar = [
        ("cas", "GET", rf"/v1/chunks/[a-z-]+/{HASH}", "xet_dedup"),
        ("cas", "POST", rf"/v1/xorb-grants/default/{HASH}", "xorb_grant"),
        ("cas", "POST", rf"/v1/xorb-commits/default/{HASH}/grant/(?P<grant>\w+)", "xorb_commit"),
        ("cas", "POST", rf"/v1/xorbs/default/{HASH}", "xorb_post"),
        ("cas", "POST", r"/v(?P<version>[12])/shards", "shard"),
        ("cdn", "PUT", r"/xorb-uploads/(?P<grant>\w+)", "xorb_put"),
    ]

    def writing(self) -> None:
        self.server.hub.xet.allowed(self.headers.get("Authorization", "").removeprefix("Bearer "), "write")

    def xet_dedup(self, body: bytes, hash_: str) -> None:
        self.writing()
        raise Answer(404, message="not found")  # no chunk of anyone else's is offered

    def xorb_grant(self, body: bytes, hash_: str) -> None:
        self.writing()
        hub = self.server.hub
        if not hub.rules.xorb_grants:
            raise Answer(404, message="not found")
        with hub.lock:
            grant = f"g{len(hub.uploads.grants)}"
            hub.uploads.grants[grant] = hash_
        url = hub.links.sign(f"{hub.cdn_url}/xorb-uploads/{grant}", None)
        self.json({"id": grant, "method": "PUT", "url": url, "headers": {}}, 201)

    def xorb_put(self, body: bytes, grant: str) -> None:
        hub = self.server.hub
        if "Authorization" in self.headers:
            hub.tokens_seen_by_cdn.append(self.path)
        hub.links.check(self.server.host, f"/xorb-uploads/{grant}", self.query, None, "GET")
        with hub.lock:
            hub.uploads.put[grant] = body
        self.reply(200, b"")

    def xorb_commit(self, body: bytes, hash_: str, grant: str) -> None:
        self.writing()
        uploads = self.server.hub.uploads
        with self.server.hub.lock:
            if uploads.grants.get(grant) != hash_ or grant not in uploads.put:
                raise Answer(404, message="no upload under this grant")
            uploads.xorbs[hash_] = chunks(uploads.put.pop(grant))
        self.json({"was_inserted": True})

    def xorb_post(self, body: bytes, hash_: str) -> None:
        self.writing()
        with self.server.hub.lock:
            self.server.hub.uploads.xorbs[hash_] = chunks(body)
        self.json({"was_inserted": True})

    def shard(self, body: bytes, version: str) -> None:
        self.writing()
        hub = self.server.hub
        with hub.lock:
            for name, sha256, terms in files_of(body):
                missing = [xorb for xorb, _, _ in terms if xorb not in hub.uploads.xorbs]
                if missing:
                    raise Answer(400, message=f"shard names xorbs that were not uploaded: {missing[0]}")
                content = b"".join(b"".join(hub.uploads.xorbs[xorb][first:stop]) for xorb, first, stop in terms)
                blob = Blob.of(content)
                if sha256 not in (None, blob.sha256):
                    raise Answer(400, message="the SHA-256 in the shard is not that of the content")
                hub.objects[blob.sha256] = blob
                hub.xet.add(name, blob)
                hub.uploads.names[blob.sha256] = name
        if version == "1":
            self.json({"result": 1})
            return
        lines = ({"type": "validating", "verified": 1, "total": 1}, {"type": "result"})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self.reply(200, text.encode(), {"Content-Type": "application/x-ndjson"})


def chunks(xorb: bytes) -> list[bytes]:
    """The chunks of a xorb, one behind the other, then perhaps a footer ("XETBLOB"), which is not read."""
    found, at = [], 0
    while at + 8 <= len(xorb) and xorb[at : at + 7] != b"XETBLOB":
        packed, scheme = int.from_bytes(xorb[at + 1 : at + 4], "little"), xorb[at + 4]
        data = xorb[at + 8 : at + 8 + packed]
        found.append(unpacked(data, scheme))
        at += 8 + packed
    return found


def unpacked(data: bytes, scheme: int) -> bytes:
    """0: as it is; 1: LZ4; 2: LZ4 of the bytes 0, 4, 8 …, then 1, 5, 9 … and so on."""
    if scheme == 0:
        return data
    data = lz4.frame.decompress(data)
    if scheme == 2:
        out, at = bytearray(len(data)), 0
        for first in range(4):
            size = (len(data) + 3 - first) // 4
            out[first::4] = data[at : at + size]
            at += size
        data = bytes(out)
    return data


def files_of(shard: bytes) -> list[tuple[str, str | None, list[tuple[str, int, int]]]]:
    """Xet hash, SHA-256 and (xorb, first chunk, stop) of each file: 48-byte records up to a bookend of ones."""
    if shard[:32] != TAG or struct.unpack_from("<Q", shard, 32)[0] != 2:
        raise Answer(400, message="not a shard")
    found, at = [], RECORD
    while shard[at : at + 32] != b"\xff" * 32:
        name = spelled(shard[at : at + 32])
        flags, count = struct.unpack_from("<II", shard, at + 32)
        at += RECORD
        terms = []
        for _ in range(count):
            _, _, first, stop = struct.unpack_from("<4I", shard, at + 32)
            terms.append((spelled(shard[at : at + 32]), first, stop))
            at += RECORD
        at += RECORD * count if flags >> 31 else 0
        sha256 = None
        if flags >> 30 & 1:
            sha256 = spelled(shard[at : at + 32])
            at += RECORD
        found.append((name, sha256, terms))
    return found


def spelled(raw: bytes) -> str:
    """Xet's spelling of a hash: four little-endian 64-bit numbers, each as 16 digits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))
