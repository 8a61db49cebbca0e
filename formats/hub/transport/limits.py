"""Bounds of what any server may send: the size of answers, what decompression makes of them, and the least rate.

A hook of huggingface_hub's session puts them around the body of every answer to a request of qz.
"""

from __future__ import annotations

import time
import zlib
from typing import TYPE_CHECKING

import httpx2

from qz import HubUnreachable
from qz.formats.hub.transport.trust import is_ours, require_storage_on_the_web

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGEST_ANSWER = 8 << 20
"""Bytes of an answer of the Hub's API, and of a refusal; a page of a listing has some 300 KB."""
LEAST_RATE = 10_000.0
"""Bytes a second that a body must bring over ``SLOW_SECONDS`` of waiting for it: a timeout is renewed by every byte."""
SLOW_SECONDS = 60.0
_STEP = 1 << 18


class TooSlow(httpx2.ReadTimeout):
    """A connection that keeps delivering, but next to nothing."""


def bind(session: httpx2.Client) -> None:
    """Put the bounds around what ``session`` receives for qz."""
    hooks = session.event_hooks.setdefault("response", [])
    hooks += [hook for hook in _HOOKS if hook not in hooks]


def unbind(session: httpx2.Client) -> None:
    """Take the bounds away again."""
    hooks = session.event_hooks.get("response", [])
    hooks[:] = [hook for hook in hooks if hook not in _HOOKS]


def _limit(response: httpx2.Response) -> None:
    request = response.request
    if not is_ours(request):
        return
    is_file = response.is_success and "/api/" not in request.url.path.replace("/api/resolve-cache/", "")
    inflater = None
    if response.status_code != 206 and response.headers.get("content-encoding") in ("gzip", "deflate"):
        # Decompressed in small steps: a few kilobytes may stand for gigabytes.
        gzip = response.headers["content-encoding"] == "gzip"
        inflater = zlib.decompressobj(zlib.MAX_WBITS | 16 if gzip else zlib.MAX_WBITS)
        for name in ("content-encoding", "content-length"):
            response.headers.pop(name, None)
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = _Bounded(response.stream, inflater, None if is_file else LARGEST_ANSWER, request)


_HOOKS = (_limit, require_storage_on_the_web)


class _Bounded(httpx2.SyncByteStream):
    """A body that is cut off when it is too long or too slow. ``most``: bytes after decompression, None for a file."""

    def __init__(
        self, body: httpx2.SyncByteStream, inflater: zlib._Decompress | None, most: int | None, request: httpx2.Request
    ) -> None:
        self._body, self._inflater, self._most, self._request = body, inflater, most, request

    def __iter__(self) -> Iterator[bytes]:
        total = 0
        for chunk in self._inflated():
            total += len(chunk)
            if self._most is not None and total > self._most:
                raise HubUnreachable(
                    f"The answer of {self._request.url.host} is longer than {self._most >> 20} MB, which no Hub "
                    "sends. Check HF_ENDPOINT."
                )
            yield chunk

    def close(self) -> None:
        self._body.close()

    def _inflated(self) -> Iterator[bytes]:
        if self._inflater is None:
            yield from self._timely()
            return
        for chunk in self._timely():
            rest = chunk
            while rest and not self._inflater.eof:
                yield self._inflater.decompress(rest, _STEP)
                rest = self._inflater.unconsumed_tail
        yield self._inflater.flush(_STEP)

    def _timely(self) -> Iterator[bytes]:
        waited, arrived, chunks = 0.0, 0, iter(self._body)
        while True:
            since = time.monotonic()
            chunk = next(chunks, None)
            if chunk is None:
                return
            waited, arrived = waited + time.monotonic() - since, arrived + len(chunk)
            if waited >= SLOW_SECONDS:
                if arrived < LEAST_RATE * waited:
                    raise TooSlow(f"less than {LEAST_RATE / 1000:.0f} KB/s arrived", request=self._request)
                waited, arrived = 0.0, 0
            yield chunk
