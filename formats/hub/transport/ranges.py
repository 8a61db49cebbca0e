"""Byte ranges of the files of one Hub commit, from its CDN: signed links, retries, and what a server may get wrong."""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qz.formats.hub.transport.backoff import Backoff, Failed, Retries
from qz.formats.hub.transport.errors import BUSY, Signal
from qz.formats.hub.transport.links import MAX_HOPS, Link, Links, skip_body
from qz.formats.hub.transport.remote_file import RemoteFile, not_as_listed
from qz.formats.hub.transport.requests import Requests, first_line, target_of
from qz.formats.hub.transport.session import seconds_asked

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import httpx2

    from qz import QzError

CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)
MOST_LINKS = 4
"""Fresh links in a row that may be refused, each with another answer."""


class CdnRefused(Signal):
    """The CDN does not give this file by ranges, whatever link it is asked with. ``error``: what to end with if there
    is no other way; ``status`` 0: the answers are not refusals, but there are no ranges in them."""

    def __init__(self, why: str, status: int = 0, error: QzError | None = None) -> None:
        super().__init__(why)
        self.status, self.error = status, error


class _LinkRefused(Signal):
    """A client error of the CDN: the link has expired, or is not good for this."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status}: {said}" if said else str(status))
        self.status = status


class Connection:
    """Ranges of the files of ``repo_id`` at ``commit``. Thread-safe.

    The Hub is asked once per file; further requests go to the link that it redirects to, without the token, until that
    link expires.
    """

    def __init__(self, repo_id: str, commit: str, endpoint: str, retries: Retries | None = None) -> None:
        self.location = f"{repo_id}@{commit[:12]}"
        self.bytes_received = 0
        self.backoff = Backoff(self.location, retries)
        self._requests = Requests(repo_id, commit, endpoint)
        self._links = Links(self._requests, self.backoff)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let requests under way fail soon."""
        self.backoff.close()

    def fetch(self, file: RemoteFile, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of ``file`` from ``start`` on.

        Raises CdnRefused at once, or when the retries are used up; MalformedInput (the server's file is another one),
        PermissionRefused or MissingInput at once; TryAgain (rate limit) or HubUnreachable when those of the Hub are.
        """
        done = failures = 0
        refusals: list[_LinkRefused] = []
        while done < len(view):
            before, link = done, None
            self.backoff.until_allowed()
            try:
                if file.sha256:
                    link = self._links.get(file)
                    for count in self._range(link, file, start + done, view[done:]):
                        done += count
                else:
                    done = before = 0  # a file outside LFS comes whole: the Hub is not asked for ranges
                    for count in self._whole(file, view):
                        done += count
            except _LinkRefused as refused:
                assert link is not None
                self._links.drop(file, link)
                if link.served:  # it worked before, so it has expired
                    failures += 1
                    self.backoff.back_off(Failed(f"the link was refused ({refused})", wait=0.0), failures, file.path)
                else:
                    _note(refused, refusals)
            except Failed as failed:
                # A connection that brings something each time may break as often as it likes.
                failures = 1 if done - before >= min(1 << 20, len(view)) else failures + 1
                self._back_off(failed, failures, file, asked_cdn=link is not None)
            finally:
                with self._lock:
                    self.bytes_received += done - before

    def _range(self, link: Link, file: RemoteFile, start: int, view: memoryview) -> Iterator[int]:
        """One request; yields the number of bytes written each time some arrived."""
        headers = {"Range": f"bytes={start}-{start + len(view) - 1}"}
        with self._answer(link, headers, file) as response:
            self._require_range(response, file, start, len(view))
            link.served = True
            yield from self._body(response, file, view)

    def _whole(self, file: RemoteFile, view: memoryview) -> Iterator[int]:
        with self._links.at_hub(file) as response:
            if response.has_redirect_location:
                with self._answer(Link(target_of(response, str(response.url)), at_hub=False), {}, file) as elsewhere:
                    yield from self._body(elsewhere, file, view)
            else:
                yield from self._body(response, file, view)

    def _body(self, response: httpx2.Response, file: RemoteFile, view: memoryview) -> Iterator[int]:
        done = 0
        for chunk in response.iter_raw():
            self.backoff.require_open()
            if done + len(chunk) > len(view):
                raise not_as_listed(self._where(file), "more bytes than were asked for")
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
            yield len(chunk)
        if done < len(view):
            raise Failed("the answer ended early")

    @contextmanager
    def _answer(self, link: Link, headers: Mapping[str, str], file: RemoteFile) -> Iterator[httpx2.Response]:
        """The answer that holds the bytes, after redirects beyond the Hub."""
        url = link.url
        for _ in range(MAX_HOPS):
            with self._requests.get(url, headers, at_hub=link.at_hub and url == link.url) as response:
                if response.has_redirect_location:
                    url = target_of(response, url)
                    skip_body(response)
                    continue
                self._require_success(response, file)
                yield response
                return
        raise Failed("too many redirects")

    def _require_success(self, response: httpx2.Response, file: RemoteFile) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        if status == 416:
            raise not_as_listed(self._where(file), "a shorter file")
        if status in BUSY or status >= 500:
            raise Failed(f"the server answers {status}", status=status, wait=seconds_asked(response.headers))
        raise _LinkRefused(status, first_line(response))

    def _require_range(self, response: httpx2.Response, file: RemoteFile, start: int, length: int) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise CdnRefused("it compresses what it sends, although bytes were asked for")
        if response.status_code == 200:
            if length < file.size:
                raise CdnRefused("it serves no byte ranges of this file")
            size = response.headers.get("content-length")
            if size is not None and size != str(file.size):
                raise not_as_listed(self._where(file), f"{size[:20]} bytes instead of {file.size}")
            return
        served = CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if served is None:
            raise CdnRefused("it does not say which bytes it sends")
        if int(served[1]) != start or int(served[3]) != file.size:
            raise not_as_listed(self._where(file), f"bytes {served[1]}-{served[2]} of {served[3]}")

    def _back_off(self, failed: Failed, failures: int, file: RemoteFile, *, asked_cdn: bool) -> None:
        retries = self.backoff.retries
        beyond = failures >= retries.attempts or (failed.wait or 0) > retries.longest_asked
        if beyond and (asked_cdn or failed.status == 429):
            error = self.backoff.used_up(failed, failures, file.path)
            why = "the rate of requests is limited" if failed.status == 429 else str(failed)
            raise CdnRefused(why, failed.status, error)
        self.backoff.back_off(failed, failures, file.path)

    def _where(self, file: RemoteFile) -> str:
        return f"{self.location}/{file.path}"


def _note(refused: _LinkRefused, refusals: list[_LinkRefused]) -> None:
    """Count the refusal of a fresh link. Raises CdnRefused if another link would be refused, too."""
    same = any(str(earlier) == str(refused) for earlier in refusals)
    refusals.append(refused)
    if refused.status == 400 or same or len(refusals) >= MOST_LINKS:
        raise CdnRefused(f"it refuses fresh links ({refused})", refused.status)
