"""Where the bytes of a file are: the Hub is asked once, and the signed link that it redirects to is kept.

The Hub is asked without a Range: a Range would be written into the link's signature, and the link would then serve that
range only.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huggingface_hub import constants, hf_raise_for_status

from qz.formats.hub.transport.backoff import Backoff, Failed
from qz.formats.hub.transport.errors import BUSY
from qz.formats.hub.transport.remote_file import RemoteFile, not_as_listed
from qz.formats.hub.transport.requests import Requests, target_of
from qz.formats.hub.transport.session import seconds_asked
from qz.formats.hub.transport.trust import is_hub

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx2

MAX_HOPS = 8
SMALL_BODY = 1 << 16
"""Bodies of redirects up to this size are read, so that the connection is kept."""


@dataclass(eq=False, slots=True)
class Link:
    """``at_hub``: the Hub serves the file itself, and wants the token. ``served``: it has given bytes of the file."""

    url: str
    at_hub: bool
    served: bool = False


class Links:
    """The links of a commit's files. Thread-safe: a file is asked for once, and whoever else wants its link waits."""

    def __init__(self, requests: Requests, backoff: Backoff) -> None:
        self._requests, self._backoff = requests, backoff
        self._links: dict[str, Link] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, file: RemoteFile) -> Link:
        """The link of ``file``. Raises Failed, and what the Hub refuses with."""
        with self._lock:
            lock = self._locks.setdefault(file.path, threading.Lock())
        with lock:
            link = self._links.get(file.path)
            if link is None:
                self._backoff.until_allowed()
                link = self._links[file.path] = self._ask(file)
            return link

    def drop(self, file: RemoteFile, link: Link) -> None:
        """Forget ``link``, unless another thread has already got a newer one."""
        with self._lock:
            if self._links.get(file.path) is link:
                del self._links[file.path]

    @contextmanager
    def at_hub(self, file: RemoteFile) -> Iterator[httpx2.Response]:
        """The Hub's answer for ``file``: a redirect to elsewhere, or the file itself. Redirects within are followed."""
        url = self._requests.url(file)
        for _ in range(MAX_HOPS):
            with self._requests.get(url, {}, at_hub=True) as response:
                self._require_commit(response, file)
                if not response.has_redirect_location:
                    self._require_success(response)
                    yield response
                    return
                target = target_of(response, url)
                if not is_hub(url, target):
                    yield response
                    return
                url = target
                skip_body(response)
        raise Failed("too many redirects")

    def _ask(self, file: RemoteFile) -> Link:
        with self.at_hub(file) as response:
            url = str(response.url)
            if not response.has_redirect_location:
                return Link(url, at_hub=True)  # its body is not read
            skip_body(response)
            return Link(target_of(response, url), at_hub=False)

    def _require_commit(self, response: httpx2.Response, file: RemoteFile) -> None:
        where = f"{self._requests.location}/{file.path}"
        commit = response.headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT)
        if commit not in (None, self._requests.commit):
            raise not_as_listed(where, f"commit {commit[:12]!r}")
        etag = response.headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG)
        if etag is not None and etag.removeprefix("W/").strip('"') != file.digest:
            raise not_as_listed(where, "a file with another hash")

    def _require_success(self, response: httpx2.Response) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        if status in BUSY or status >= 500:
            raise Failed(f"the server answers {status}", status=status, wait=seconds_asked(response.headers))
        response.read()
        hf_raise_for_status(response)
        raise Failed(f"the server answers {status}", status=status)


def skip_body(response: httpx2.Response) -> None:
    """Read a short body, so that the connection is kept; a long one is left, and the connection closed."""
    size = response.headers.get("content-length", "")
    if len(size) <= 5 and size.isascii() and size.isdigit() and int(size) <= SMALL_BODY:
        response.read()
