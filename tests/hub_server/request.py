"""One request: which kind it is, what goes wrong with it on order, how it is answered, and who asks."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import struct
import time
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from hub_server.faults import Answer, Fault

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hub_server.contents import Blob, Repo
    from hub_server.server import Listener

REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"


class Request(BaseHTTPRequestHandler):
    """``ROUTES``: (origin, method, pattern, kind); the method named like the kind answers with the pattern's groups."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener

    ROUTES: ClassVar[list[tuple[str, str, str, str]]] = []
    answered = 0
    corrupt_at = 0

    def handle_any(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.faults: list[Fault] = []
        self.limit_headers: dict[str, str] = {}
        self.kind, match = self.route(parts.path)
        body = self.read_body()
        with hub.lock:
            hub.requests[self.kind] += 1
            hub.bytes_in[self.kind] += len(body)
            self.faults = [fault for fault in hub.faults if fault.strikes(self.kind, self.path)]
        time.sleep(hub.latency + sum(fault.hang for fault in self.faults))
        try:
            self.limit_rate()
            for fault in self.faults:
                if fault.before:
                    fault.before()
                if fault.drop:
                    self.close_now()
                    return
                if fault.body is not None:
                    self.reply(fault.status or 200, fault.body, fault.headers, faults=[])
                    return
                if fault.status is not None:
                    raise Answer(fault.status, fault.code, fault.message, **fault.headers)
            if match is None:
                raise Answer(404, message="Sorry, we can't find the page you are looking for.")
            arguments = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            if arguments.get("repo") in hub.renamed:
                new = hub.renamed[arguments["repo"]]
                self.reply(307, b"", {"Location": self.path.replace(arguments["repo"], new, 1)})
                return
            getattr(self, self.kind)(body, **arguments)
        except Answer as answer:
            self.refuse(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        self.answered += 1
        if self.answered >= hub.rules.requests_per_connection:
            self.close_connection = True

    def route(self, path: str) -> tuple[str, re.Match[str] | None]:
        for origin, method, pattern, kind in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command and origin == self.server.origin:
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

    def span(self, size: int) -> tuple[int, int] | None:
        """Start and stop of the Range that is asked for; None for the whole."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        return match and (int(match[1]), min(size, int(match[2]) + 1) if match[2] else size)

    def limit_rate(self) -> None:
        """The fixed windows of the Hub: by token, or by address."""
        hub = self.server.hub
        if self.server.origin != "hub":
            return
        bucket = "resolvers" if self.kind in ("resolve", "head", "resolve_cache") else "api"
        token = self.headers.get("Authorization", "")
        quota = getattr(hub.rules, f"{bucket}_{'user' if token else 'anonymous'}")
        now, window = hub.now(), hub.rules.rate_window
        key = token, bucket, int(now // window)
        with hub.lock:
            hub.windows[key] += 1
            left = quota - hub.windows[key]
        wait = int(window - now % window)
        self.limit_headers = {
            "RateLimit": f'"{bucket}";r={max(0, left)};t={wait}',
            "RateLimit-Policy": f'"fixed window";"{bucket}";q={quota};w={int(window)}',
        }
        if left < 0:
            after = {"Retry-After": str(wait)} if hub.rules.retry_after else {}
            raise Answer(429, message=f"We had to rate limit you: {bucket}", **after)

    def refuse(self, answer: Answer) -> None:
        if self.server.origin == "hub":
            body, kind = json.dumps({"error": answer.message or "error"}).encode(), "application/json"
        else:
            code = {400: "BadRequest", 403: "AccessDenied", 416: "InvalidRange"}.get(answer.status, "Error")
            said = f"<Error><Code>{code}</Code><Message>{answer.message}</Message></Error>"
            text = f'<?xml version="1.0" encoding="UTF-8"?>\n{said}'
            body, kind = text.encode(), "application/xml"
        self.reply(answer.status, body, {"Content-Type": kind, **answer.headers}, faults=[])

    def reply(
        self,
        status: int,
        body: bytes | tuple[Blob, int, int],
        headers: Mapping[str, str | None] | None = None,
        faults: list[Fault] | None = None,
    ) -> None:
        """Send an answer; a body ``(blob, start, stop)`` is streamed. Faults change it on the way."""
        faults = self.faults if faults is None else faults
        headers = {**self.limit_headers, **(headers or {})}
        for fault in faults:
            headers |= fault.replace
        if self.server.hub.rules.weak_etags and headers.get("ETag"):
            headers["ETag"] = f"W/{headers['ETag']}"
        if self.server.hub.rules.gzip_anyway and status == 200 and isinstance(body, bytes):
            body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
        length = len(body) if isinstance(body, bytes) else body[2] - body[1]
        with self.server.hub.lock:
            self.server.hub.answers[self.kind, status] += 1
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(body, length, faults)

    def send_body(self, body: bytes | tuple[Blob, int, int], length: int, faults: list[Fault]) -> None:
        hub = self.server.hub
        limit = min([length, *(fault.truncate for fault in faults if fault.truncate is not None)])
        pace = min([hub.bandwidth or 1e15, *(fault.trickle for fault in faults if fault.trickle)])
        stall = sum(fault.stall for fault in faults)
        sent = 0
        for chunk in _pieces(body, limit, step=int(min(1 << 18, max(1, pace / 10)))):
            if sent == 0 and chunk and any(fault.corrupt for fault in faults):
                at = min(self.corrupt_at, len(chunk) - 1)
                chunk = chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :]
            if stall and sent + len(chunk) == limit:
                self.wfile.write(chunk[:-1])
                self.wfile.flush()
                time.sleep(stall)
                chunk = chunk[-1:]
            self.wfile.write(chunk)
            sent += len(chunk)
            if pace < 1e15:
                time.sleep(len(chunk) / pace)
        with hub.lock:
            hub.bytes_out[self.kind] += sent
        if limit < length:
            self.reset_now() if any(fault.reset for fault in faults) else self.close_now()

    def close_now(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def reset_now(self) -> None:
        """End the connection with RST: closed at once, with nothing left to send."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def log_message(self, *args: object) -> None:
        """Quiet."""

    # Who may do what

    def user(self) -> dict[str, Any] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        user = self.server.hub.users.get(token)
        if user is None or user.get("ends", self.server.hub.now() + 1) <= self.server.hub.now():
            raise Answer(401, message="Invalid credentials in Authorization header")
        return user

    def owns(self, name: str) -> bool:
        """Whether the token may do all with a namespace, or with a repository."""
        user = self.user()
        if user is None or user["role"] != "write":
            return False
        return name == user["only"] if user.get("only") else name.split("/")[0] in (user["name"], *user["orgs"])

    def repo(self, name: str, *, write: bool = False) -> Repo:
        repo, user = self.server.hub.repos.get(name), self.user()
        mine = self.owns(name)
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
        if (
            repo.gated
            and not self.owns(name)
            and (user is None or user.get("only") or user["name"] not in repo.granted)
        ):
            raise Answer(401 if user is None else 403, "GatedRepo", f"Access to model {name} is restricted.")
        return repo

    def writable(self, name: str) -> Repo:
        """Anyone who can read may open a pull request; everything else needs the right to write."""
        return self.readable(name) if self.query.get("create_pr") == ["1"] else self.repo(name, write=True)


def _pieces(body: bytes | tuple[Blob, int, int], limit: int, step: int) -> Iterable[bytes]:
    if isinstance(body, bytes):
        return [body[at : min(at + step, limit)] for at in range(0, limit, step)]
    blob, start, _stop = body
    return (blob.read(at, min(at + step, start + limit)) for at in range(start, start + limit, step))
