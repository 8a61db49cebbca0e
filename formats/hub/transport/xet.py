"""The second way to a file's bytes: range streams of hf_xet, from the storage behind the Hub.

Nothing that hf_xet returns is trusted. A stream may end early without an error (hf_xet 1.8), so its bytes are counted;
its content is not checked there, so it is hashed like any other. A call that waits for the network can neither be
cancelled nor interrupted: it runs in a thread of its own, and whoever waits for it gives up after a minute, or at once
when the folder is closed.
"""

from __future__ import annotations

import os
import threading
import time
from importlib import metadata
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, get_token, hf_raise_for_status
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but exported by name only

from qz import QzError, __version__
from qz.formats.hub.transport.errors import Signal, hub_errors, sanitized
from qz.formats.hub.transport.session import hub_session, with_retries
from qz.formats.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qz.formats.hub.transport.backoff import Backoff
    from qz.formats.hub.transport.remote_file import RemoteFile

OLDEST = (1, 7)
"""hf_xet before 1.7 stops every other thread of the process while it waits."""
STREAMS = 3
"""At once: each holds tens of megabytes."""
ATTEMPTS = 2
LONGEST_SILENCE = 60.0
"""Seconds without a byte before a stream is given up."""
BEFORE_EXPIRY = 60.0
"""Seconds before its end that a token is renewed."""
SETTINGS = {
    # By default the buffers are sized by the machine's memory, up to 6 GB.
    "reconstruction.download_buffer_size": "16mb",
    "reconstruction.download_buffer_limit": "16mb",
    "reconstruction.download_buffer_perfile_size": "0",
    "reconstruction.min_reconstruction_fetch_size": "8mb",
    "reconstruction.min_prefetch_buffer": "8mb",
    "client.ac_max_download_concurrency": STREAMS,
    "client.ac_initial_download_concurrency": STREAMS,
    "client.read_timeout": "20s",
    "client.connect_timeout": "10s",
    "client.retry_max_attempts": 3,
    "client.retry_base_delay": "500ms",
    "client.retry_max_duration": "45s",
    "telemetry.enabled": False,
}


class XetFailed(Signal):
    """The bytes did not come over Xet."""


def unavailable() -> str | None:
    """Why nothing can come or go over Xet; None if it can."""
    if constants.HF_HUB_DISABLE_XET:
        return "HF_HUB_DISABLE_XET is set"
    try:
        version = metadata.version("hf_xet")
    except metadata.PackageNotFoundError:
        return "hf_xet is not installed"
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        return f"hf_xet {version} is too old"
    return None


class Xet:
    """Ranges of the files of ``repo_id`` at ``commit``. Thread-safe."""

    def __init__(self, repo_id: str, commit: str, endpoint: str, backoff: Backoff) -> None:
        self._repo_id, self._commit, self._endpoint, self._backoff = repo_id, commit, endpoint, backoff
        self._streams = Slots(STREAMS)
        self._lock, self._asking = threading.Lock(), threading.Lock()
        self._session: Any = None
        self._group: Any = None
        self._group_key: tuple[int, str | None] | None = None
        self._expires = 0.0

    def close(self) -> None:
        """End the streams under way."""
        with self._lock:
            self._drop(abort=True)

    def why_not(self, file: RemoteFile) -> str | None:
        """Why ``file`` cannot come this way; None if it can."""
        if file.xet is None:
            return "it is not stored in Xet"
        return unavailable()

    def fetch(self, file: RemoteFile, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of ``file`` from ``start`` on. Raises XetFailed, and TryAgain once closed."""
        with self._streams:
            self._fetch(file, start, view)

    def _fetch(self, file: RemoteFile, start: int, view: memoryview) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            self._backoff.require_open()
            group = None
            try:
                group = self._current_group()
                self._read(group, file, start, view)
            except XetFailed:
                self._forget(group)
                if attempt == ATTEMPTS:
                    raise
            else:
                return

    def _read(self, group: Any, file: RemoteFile, start: int, view: memoryview) -> None:
        reading = _Reading(group, file, start, view)
        thread = threading.Thread(target=reading.run, name="qz-xet", daemon=True)
        thread.start()
        try:
            while not reading.ended.wait(0.2):
                self._backoff.require_open()
                if time.monotonic() - reading.moved > LONGEST_SILENCE:
                    raise XetFailed(f"no byte arrived for {LONGEST_SILENCE:.0f} s")
        except BaseException:  # an interrupt, too: the thread must not write into the buffer any more
            reading.abandon()
            with self._lock:
                self._drop(abort=True)  # nothing else releases a thread blocked inside hf_xet
            raise
        if reading.failure is not None:
            raise XetFailed(_shortened(sanitized(str(reading.failure))) or type(reading.failure).__name__)
        if reading.done != len(view):
            raise XetFailed(f"the stream ended after {reading.done:,} of {len(view):,} bytes")

    def _current_group(self) -> Any:
        """The group of streams for a token that is still good. Raises XetFailed if there is none to be had."""
        with self._asking:  # one thread asks for all
            key = (os.getpid(), get_token())  # after a fork, or with another token of the Hub, everything is new
            group = self._group
            if group is None or key != self._group_key or time.time() > self._expires - BEFORE_EXPIRY:
                if self._group_key is not None and key[0] != self._group_key[0]:
                    self._session = None
                group, self._expires = self._new_group()
                with self._lock:
                    self._group, self._group_key = group, key
            return group

    def _new_group(self) -> tuple[Any, float]:
        """A group of streams for a new token, and when that ends, in seconds since 1970."""
        import hf_xet

        url = f"{self._endpoint}/api/models/{self._repo_id}/xet-read-token/{self._commit}"
        doing = f"Asking for access to {self._repo_id} over Xet"
        try:
            with hub_errors(self._repo_id, doing, revision=self._commit, endpoint=self._endpoint):
                headers = with_retries(lambda: _token(url))
                token = headers[constants.HUGGINGFACE_HEADER_X_XET_ACCESS_TOKEN]
                expires = int(headers[constants.HUGGINGFACE_HEADER_X_XET_EXPIRATION][:12])
                with self._lock:
                    if self._session is None:
                        self._session = hf_xet.XetSession(hf_xet.XetConfig().with_config(SETTINGS))
                    session = self._session
                group = session.new_download_stream_group(
                    endpoint=headers[constants.HUGGINGFACE_HEADER_X_XET_ENDPOINT],
                    token=token,
                    token_expiry_unix_secs=expires,
                    token_refresh_url=url,  # hf_xet asks there itself in the last 30 s of a token's life
                    token_refresh_headers=build_hf_headers(library_name="qz", library_version=__version__),
                    custom_headers={"User-Agent": f"qz/{__version__}"},
                )
        except QzError as error:
            raise XetFailed(_shortened(str(error))) from None
        return group, float(expires)

    def _forget(self, group: Any) -> None:
        with self._lock:
            if self._group is group:
                self._drop(abort=False)

    def _drop(self, *, abort: bool) -> None:
        """The lock is held."""
        if abort and self._session is not None:
            self._session.sigint_abort()
            self._session = None
        self._group = None


class _Reading:
    """One stream, drained into a buffer by a thread of its own until it is abandoned."""

    def __init__(self, group: Any, file: RemoteFile, start: int, view: memoryview) -> None:
        self._group, self._file, self._start, self._view = group, file, start, view
        self._lock = threading.Lock()
        self._abandoned = False
        self.done = 0
        self.moved = time.monotonic()
        self.failure: BaseException | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        import hf_xet

        stop = self._start + len(self._view)
        try:
            info = hf_xet.XetFileInfo(self._file.xet, self._file.size)
            for chunk in self._group.download_stream(info, self._start, stop):
                with self._lock:
                    if self._abandoned:
                        return
                    if self.done + len(chunk) > len(self._view):
                        raise XetFailed("the stream is longer than what was asked for")
                    self._view[self.done : self.done + len(chunk)] = chunk
                    self.done += len(chunk)
                    self.moved = time.monotonic()
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
            self.failure = error
        finally:
            self.ended.set()

    def abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            self._view = memoryview(b"")


def _shortened(text: str) -> str:
    """The beginning of a message that becomes part of another one."""
    first = text.split(". ")[0].rstrip(".")
    return first if len(first) <= 120 else first[:119] + "…"


def _token(url: str) -> Mapping[str, str]:
    headers = build_hf_headers(library_name="qz", library_version=__version__)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    response = hub_session().get(url, headers={**headers, "Accept-Encoding": "gzip"}, timeout=timeout)
    hf_raise_for_status(response)
    return response.headers
