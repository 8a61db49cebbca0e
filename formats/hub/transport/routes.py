"""The routes by which bytes of a file come: ranges from the CDN; when it refuses, streams over Xet; then the CDN again.

Each covers part of what may fail the other: Xet has no quota of links and no files too large, the CDN no silences. One
call is answered by one of them, from its first byte to its last.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from qz import MissingInput, QzError, TryAgain
from qz.formats.hub.transport.backoff import log
from qz.formats.hub.transport.ranges import CdnRefused, Connection
from qz.formats.hub.transport.xet import Xet, XetFailed

if TYPE_CHECKING:
    from qz.formats.hub.transport.backoff import Retries
    from qz.formats.hub.transport.remote_file import RemoteFile


class Routes:
    """Ranges of the files of ``repo_id`` at ``commit``. Thread-safe."""

    def __init__(self, repo_id: str, commit: str, endpoint: str, retries: Retries | None = None) -> None:
        self.repo_id = repo_id
        self._cdn = Connection(repo_id, commit, endpoint, retries)
        self._xet = Xet(repo_id, commit, endpoint, self._cdn.backoff)
        self.location = self._cdn.location
        self._received_over_xet = 0
        self._refused: dict[str, CdnRefused] = {}
        self._lock = threading.Lock()

    @property
    def bytes_received(self) -> int:
        return self._cdn.bytes_received + self._received_over_xet

    @property
    def over_xet(self) -> bool:
        """Whether files come over Xet now, which takes memory of its own."""
        return bool(self._refused)

    def close(self) -> None:
        """Let requests under way fail soon."""
        self._cdn.close()
        self._xet.close()

    def fetch(self, file: RemoteFile, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of ``file`` from ``start`` on.

        Raises MalformedInput (the server's file is another one), PermissionRefused, MissingInput, HubUnreachable, and
        TryAgain (a rate limit, or an outage of the CDN).
        """
        refused = self._refused.get(file.path)
        if refused is None:
            try:
                self._cdn.fetch(file, start, view)
            except CdnRefused as why:
                refused = why
            else:
                return
        not_xet = self._xet.why_not(file)
        if not_xet is not None:
            raise self._no_way(file, refused, not_xet)
        self._tell(file, refused)
        try:
            self._xet.fetch(file, start, view)
        except XetFailed as failed:
            try:
                self._cdn.fetch(file, start, view)
            except CdnRefused as again:
                raise self._no_way(file, again, str(failed)) from None
            with self._lock:
                self._refused.pop(file.path, None)
        else:
            with self._lock:
                self._received_over_xet += len(view)

    def _tell(self, file: RemoteFile, refused: CdnRefused) -> None:
        """Go on over Xet, and say so, once for each file."""
        with self._lock:
            new = file.path not in self._refused
            self._refused[file.path] = refused
        if new:
            log.warning("The Hub's CDN does not serve %s (%s): reading it over Xet.", file.path, refused)

    def _no_way(self, file: RemoteFile, refused: CdnRefused, not_xet: str) -> QzError:
        where = f"{self.location}/{file.path}"
        if refused.error is not None:
            return type(refused.error)(f"{refused.error} Over Xet: {not_xet}.")
        if refused.status == 404:
            return MissingInput(
                f"{where} is listed, but the Hub's CDN does not have it ({refused}); over Xet: {not_xet}. Try again "
                "later."
            )
        copy = f"`--download` or `hf download {self.repo_id}` ({file.size:,} bytes on disk)"
        return TryAgain(
            f"{where} cannot be read by byte ranges. The Hub's CDN: {refused}. Xet: {not_xet}. Try again later, or "
            f"fill the Hub cache first, with {copy}."
        )
