"""Byte ranges of the files of one Hub commit: redirects, signed links, retries, and what a server may get wrong."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but exported by name only

from qz import HubUnreachable, TryAgain, __version__
from qz.formats.hub.errors import BUSY, hub_errors, reason
from qz.formats.hub.session import Retries, seconds_asked
from qz.formats.malformed import Malformed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qz.formats.hub.read_ahead import Hasher

MAX_HOPS = 8


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at a commit. ``path`` is within the repository; ``sha256`` is its LFS oid, ``git`` its blob's SHA-1."""

    path: str
    size: int
    git: str
    sha256: str | None

    @property
    def name(self) -> str:
        """Its name inside its folder."""
        return self.path.rpartition("/")[2]

    @property
    def digest(self) -> str:
        """The promised hash of the content, hexadecimal: SHA-256 for LFS files, git's SHA-1 for others."""
        return self.sha256 or self.git

    def hasher(self) -> Hasher:
        if self.sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


class RangesNotServed(Exception):
    """The server has the file but gives no byte ranges of it."""


class _Failed(Exception):
    """One attempt failed; another may not. ``wait``: seconds that the server asks for."""

    def __init__(self, reason: str, *, status: int = 0, wait: float | None = None, refused: bool = False) -> None:
        super().__init__(reason)
        self.status, self.wait, self.refused = status, wait, refused


class Connection:
    """Ranges of the files of ``repo_id`` at ``commit``, over huggingface_hub's session. Thread-safe.

    The Hub is asked once per file; further requests go to the link that it redirects to, without the token, until that
    link expires.
    """

    def __init__(self, repo_id: str, commit: str, endpoint: str, retries: Retries | None = None) -> None:
        self.repo_id, self.commit, self.endpoint = repo_id, commit, endpoint
        self.location = f"{repo_id}@{commit[:12]}"
        self.bytes_received = 0
        self._retries = retries or Retries()
        self._closing = threading.Event()
        self._links: dict[str, str] = {}
        self._not_before = 0.0
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let requests under way fail soon."""
        self._closing.set()

    def fetch(self, file: RemoteFile, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of ``file`` from ``start`` on.

        Raises RangesNotServed; MalformedInput (the server's file is another one), PermissionRefused or MissingInput at
        once; TryAgain (rate limit) or HubUnreachable when the retries are used up.
        """
        done = failures = refusals = 0
        while done < len(view):
            before = done
            self._pause(self._not_before - time.monotonic(), file)
            try:
                for count in self._attempt(file, start + done, view[done:]):
                    done += count
            except _Failed as failed:
                refusals += failed.refused  # the first one says that a link has expired
                if refusals > 1:
                    raise RangesNotServed(file.path) from None
                # A connection that brings something each time may break as often as it likes.
                failures = 1 if done - before >= min(1 << 20, len(view)) else failures + 1
                self._back_off(failed, failures, file)
            finally:
                with self._lock:
                    self.bytes_received += done - before

    def _attempt(self, file: RemoteFile, start: int, view: memoryview) -> Iterator[int]:
        """One request; yields the number of bytes written each time some arrived."""
        headers = {"Accept-Encoding": "identity"}
        if len(view) < file.size:
            headers["Range"] = f"bytes={start}-{start + len(view) - 1}"
        done = 0
        try:
            with self._answer(file, headers) as response:
                self._require_range(response, file, start, len(view))
                for chunk in response.iter_raw():
                    if self._closing.is_set():
                        raise self._closed(file)
                    if done + len(chunk) > len(view):
                        raise self._another(file, "more bytes than were asked for")
                    view[done : done + len(chunk)] = chunk
                    done += len(chunk)
                    yield len(chunk)
        except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
            raise _Failed(reason(error)) from None
        if done < len(view):
            raise _Failed("the answer ended early")

    @contextmanager
    def _answer(self, file: RemoteFile, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """The answer that holds the bytes, after redirects."""
        url = self._links.get(file.path)
        at_hub = url is None
        if url is None:
            url = hf_hub_url(self.repo_id, file.path, revision=self.commit, endpoint=self.endpoint)
        for _ in range(MAX_HOPS):
            with self._request(url, headers, at_hub=at_hub) as response:
                if at_hub:
                    self._require_commit(response, file)
                if response.has_redirect_location:
                    response.read()  # so that the connection is kept
                    target = urljoin(url, response.headers["location"])
                    if at_hub and not _is_hub(url, target):
                        # What lies elsewhere is a signed link: it must not see the token.
                        at_hub, self._links[file.path] = False, target
                    url = target
                    continue
                self._require_success(response, file, at_hub=at_hub)
                yield response
                return
        raise _Failed("too many redirects")

    @contextmanager
    def _request(self, url: str, headers: Mapping[str, str], *, at_hub: bool) -> Iterator[httpx2.Response]:
        own = build_hf_headers(token=None if at_hub else False, library_name="qz", library_version=__version__)
        timeout = httpx2.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        with (
            hub_errors(
                self.repo_id, f"Reading {self.location}", revision=self.commit, endpoint=self.endpoint, transport=False
            ),
            get_session().stream(
                "GET", url, headers={**own, **headers}, timeout=timeout, follow_redirects=False
            ) as response,
        ):
            yield response

    def _require_commit(self, response: httpx2.Response, file: RemoteFile) -> None:
        commit = response.headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT)
        if commit not in (None, self.commit):
            raise self._another(file, f"commit {commit[:12]!r}")
        etag = response.headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG)
        if etag is not None and etag.removeprefix("W/").strip('"') != file.digest:
            raise self._another(file, "a file with another hash")

    def _require_success(self, response: httpx2.Response, file: RemoteFile, *, at_hub: bool) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        if status == 416:
            raise self._another(file, "a shorter file")
        if status in BUSY or status >= 500:
            raise _Failed(f"the server answers {status}", status=status, wait=seconds_asked(response.headers))
        if not at_hub:
            self._links.pop(file.path, None)
            raise _Failed(f"the link is refused ({status})", status=status, wait=0.0, refused=True)
        response.read()
        hf_raise_for_status(response)
        raise _Failed(f"the server answers {status}", status=status)

    def _require_range(self, response: httpx2.Response, file: RemoteFile, start: int, length: int) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise RangesNotServed(file.path)
        if response.status_code == 200:
            if length < file.size:
                raise RangesNotServed(file.path)
            size = response.headers.get("content-length")
            if size is not None and size != str(file.size):
                raise self._another(file, f"{size[:20]} bytes instead of {file.size}")
            return
        served = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("content-range", ""))
        if served is None:
            raise RangesNotServed(file.path)
        if int(served[1]) != start or int(served[3]) != file.size:
            raise self._another(file, f"bytes {served[1]}-{served[2]} of {served[3]}")

    def _back_off(self, failed: _Failed, failures: int, file: RemoteFile) -> None:
        retries, wait = self._retries, failed.wait
        asked = f" and asks to wait {wait:.0f} s" if wait else ""
        if failures >= retries.attempts or (wait or 0) > retries.longest_asked:
            kind = TryAgain if failed.status == 429 else HubUnreachable
            limit = ": the Hub limits the rate of requests" if failed.status == 429 else f": {failed}"
            raise kind(
                f"{self.location}/{file.path} could not be read after {failures} attempts{limit}{asked}. Run the same "
                "command again later."
            )
        if wait is None:
            wait = retries.wait(failures)
        elif wait > 0:
            with self._lock:  # what one connection is asked to wait, all of them do
                self._not_before = max(self._not_before, time.monotonic() + wait)
        self._pause(wait, file)

    def _pause(self, seconds: float, file: RemoteFile) -> None:
        if self._closing.wait(max(0.0, seconds)):
            raise self._closed(file)

    def _closed(self, file: RemoteFile) -> TryAgain:
        return TryAgain(f"Reading {self.location}/{file.path} was stopped.")

    def _another(self, file: RemoteFile, what: str) -> Malformed:
        return Malformed(
            "changed",
            f"{self.location}/{file.path} is not what the Hub lists: the server sent {what}. Run the same command "
            "again; if it stays so, ask the repository's owner.",
        )


def differs(where: str, digest: str) -> Malformed:
    """The error for content with another hash than the Hub lists."""
    return Malformed(
        "changed",
        f"{where} arrived with another content than the Hub lists (expected hash {digest}). Nothing was made of it. "
        "Run the same command again.",
    )


def _is_hub(url: str, target: str) -> bool:
    """Whether ``target`` is at the same origin as ``url``, or at one that huggingface_hub trusts with the token."""
    here, there = urlsplit(url), urlsplit(target)
    trusted = there.scheme == "https" and there.hostname in constants.HF_URL_HOSTS and there.port is None
    return (here.scheme, here.netloc) == (there.scheme, there.netloc) or trusted
