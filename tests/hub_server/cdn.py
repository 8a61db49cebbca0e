"""The CDN: two hosts, links signed as CloudFront signs them, byte ranges; and what small files come by at the Hub."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import secrets
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_server.faults import Answer
from hub_server.reading import Reading
from hub_server.request import REPO

if TYPE_CHECKING:
    from hub_server.contents import Blob
    from hub_server.server import HubServer

OID = r"(?P<oid>[0-9a-f]{64})"


class Links:
    """Signed links: a policy that names the path, the end of its life, and perhaps the one Range it is good for."""

    def __init__(self, hub: HubServer) -> None:
        self._hub, self._secret = hub, secrets.token_hex(8)
        self._turn = itertools.count()

    def mint(self, oid: str, range_: str | None, method: str) -> str:
        """A link to a whole file, perhaps behind relays."""
        rules = self._hub.rules
        host = rules.hosts[next(self._turn) % len(rules.hosts)]
        bound = range_ if rules.bound_links and host in rules.binding_hosts else None
        link = self.sign(f"{self._hub.cdn_urls[host]}/xet-bridge-us/{oid}", bound, method)
        for relay in reversed(rules.relays):
            if relay == "relative":
                parts = urlsplit(link)
                link = f"{parts.scheme}://{parts.netloc}/relay?to={quote(f'{parts.path}?{parts.query}', safe='')}"
            else:
                link = f"{self._hub.cdn_urls[relay]}/relay?to={quote(link, safe='')}"
        return link

    def sign(self, url: str, range_: str | None, method: str = "GET") -> str:
        ends = self._hub.now() + self._hub.rules.link_seconds
        policy: dict[str, Any] = {"Resource": urlsplit(url).path, "DateLessThan": ends, "Method": method}
        if range_:
            policy["ByteRange"] = {"ExpectedHeader": range_}
        text = base64.urlsafe_b64encode(json.dumps(policy).encode()).decode()
        life = int(self._hub.rules.link_seconds)
        return f"{url}?X-Amz-Expires={life}&Policy={quote(text)}&Signature={self._signature(text)}&Key-Pair-Id=K2L8"

    def check(self, host: str, path: str, query: dict[str, list[str]], range_: str | None, method: str) -> None:
        """Raise the CDN's 403 unless the link is good for this request."""
        rules = self._hub.rules
        text = query.get("Policy", [""])[0]
        if host in rules.outage:
            raise Answer(403, message="SignatureError: invalid key pair id")
        if query.get("Signature") != [self._signature(text)]:
            raise Answer(403, message="SignatureError: signature does not match")
        policy = json.loads(base64.urlsafe_b64decode(text))
        if policy["Resource"] != path:
            raise Answer(403, message="Access denied")
        if policy["DateLessThan"] <= self._hub.now():
            raise Answer(403, message="Request has expired")
        if "ByteRange" in policy and policy["ByteRange"]["ExpectedHeader"] != range_:
            raise Answer(403, message="Auth failed: invalid range")
        if policy["Method"] != method and not rules.head_links_serve_get:
            raise Answer(403, message="Access denied")

    def _signature(self, policy: str) -> str:
        return hashlib.sha256(f"{self._secret}{policy}".encode()).hexdigest()


class Cdn(Reading):
    ROUTES: ClassVar = [
        ("cdn", "GET", rf"/xet-bridge-us/{OID}", "cdn"),
        ("cdn", "GET", r"/relay", "relay"),
        ("hub", "GET", rf"/api/resolve-cache/models/{REPO}/(?P<rev>[^/]+)/(?P<path>.+)", "resolve_cache"),
        ("hub", "HEAD", rf"/api/resolve-cache/models/{REPO}/(?P<rev>[^/]+)/(?P<path>.+)", "resolve_cache"),
    ]

    def resolve_cache(self, body: bytes, repo: str, rev: str, path: str) -> None:
        commit, entry = self.found(repo, rev, path)
        self.file(entry.blob, {"X-Repo-Commit": commit, "ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"})

    def relay(self, body: bytes) -> None:
        self.note_token()
        self.reply(302, b"", {"Location": parse_qs(urlsplit(self.path).query)["to"][0]})

    def cdn(self, body: bytes, oid: str) -> None:
        hub, rules = self.server.hub, self.server.hub.rules
        self.note_token()
        range_ = self.headers.get("Range")
        hub.links.check(self.server.host, unquote(urlsplit(self.path).path), self.query, range_, self.command)
        blob = hub.objects[oid]
        if range_ is None and blob.size > min(rules.largest_unranged, rules.largest_served):
            raise Answer(400, message="The file is too large to be served whole")
        self.file(blob, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def note_token(self) -> None:
        if "Authorization" in self.headers:
            self.server.hub.tokens_seen_by_cdn.append(self.path)

    def file(self, blob: Blob, headers: dict[str, str]) -> None:
        span = self.span(blob.size)
        start, stop = span or (0, blob.size)
        with self.server.hub.lock:
            self.server.hub.ranges.append((blob.sha256, start, stop))
        if not span or any(fault.ignore_range for fault in self.faults):
            self.reply(200, (blob, 0, blob.size), headers)
        elif start >= blob.size:
            raise Answer(416, message="Range not satisfiable", Content_Range=f"bytes */{blob.size}")
        else:
            content_range = f"bytes {start}-{stop - 1}/{blob.size}"
            self.reply(206, (blob, start, stop), headers | {"Content-Range": content_range})
