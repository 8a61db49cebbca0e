"""The ways by which bytes of a file come: ranges from the CDN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz import MissingInput, QzError, TryAgain
from qz.formats.hub.ranges import CdnRefused, Connection

if TYPE_CHECKING:
    from qz.formats.hub.patience import Retries
    from qz.formats.hub.remote_file import RemoteFile


class Ways:
    """Ranges of the files of ``repo_id`` at ``commit``. Thread-safe."""

    def __init__(self, repo_id: str, commit: str, endpoint: str, retries: Retries | None = None) -> None:
        self.repo_id = repo_id
        self._cdn = Connection(repo_id, commit, endpoint, retries)
        self.location = self._cdn.location

    @property
    def bytes_received(self) -> int:
        return self._cdn.bytes_received

    def close(self) -> None:
        """Let requests under way fail soon."""
        self._cdn.close()

    def fetch(self, file: RemoteFile, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of ``file`` from ``start`` on.

        Raises MalformedInput (the server's file is another one), PermissionRefused, MissingInput, HubUnreachable, and
        TryAgain (a rate limit, or an outage of the CDN).
        """
        try:
            self._cdn.fetch(file, start, view)
        except CdnRefused as refused:
            raise self._no_way(file, refused) from None

    def _no_way(self, file: RemoteFile, refused: CdnRefused) -> QzError:
        where = f"{self.location}/{file.path}"
        if refused.error is not None:
            return refused.error
        if refused.status == 404:
            return MissingInput(f"{where} is listed, but the Hub's CDN does not have it: {refused}. Try again later.")
        return TryAgain(
            f"{where} cannot be read by byte ranges from the Hub's CDN: {refused}. Try again later, or fill the Hub "
            f"cache first, with `--download` or `hf download {self.repo_id}` ({file.size:,} bytes on disk)."
        )
