"""A checkpoint that goes to the Hub file by file while it is made, and becomes visible in one commit at the end."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qz import OutputRefused
from qz.formats.json_files import MAX_BYTES
from qz.formats.publish.blobs import Blob
from qz.formats.publish.checkpoint_files import README, config_among
from qz.formats.publish.destination import UploadsLost
from qz.formats.publish.push import PushPlan, superseded
from qz.formats.publish.remote import ObjectsLost, Remote, differing
from qz.formats.publish.xet import AHEAD
from qz.progress import OnProgress, Progress, ignore

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from qz.formats.publish.destination import Destination, PushResult
    from qz.formats.publish.upload import Uploads
    from qz.formats.publish.verified_file import VerifiedFile

STILL = 1.0
"""Seconds without news of the conversion, after which that of the uploads is shown."""


class Publication:
    """Where finished files go. ``send`` and ``stop`` may be called from any thread.

    ``progress`` is also that of the conversion: it passes, and while nothing is converted, the uploads show.
    """

    def __init__(self, to: Destination, *, source_private: bool, progress: OnProgress = ignore) -> None:
        """Raise PermissionRefused or MissingInput where nothing could be published in the end."""
        self._to, self._source_private, self._progress = to, source_private, progress
        self._remote = Remote(to)
        self._found = self._remote.target()
        self._remote.require_audience(self._found, source_private)
        self._was_private = to.private is not False if self._found is None else self._found.private is not False
        self._uploads: Uploads | None = None
        self._sent = 0
        self._told = 0.0
        self._lock = threading.Lock()

    @property
    def place(self) -> dict[str, Any]:
        """What must be the same for a later run to go on: JSON values."""
        remote, to = self._remote, self._to
        return {"endpoint": remote.api.endpoint, "repository": remote.repo_id, "branch": to.branch, "folder": to.folder}

    @property
    def is_restricted(self) -> bool:
        """Whether not everyone may see the source."""
        return self._source_private

    @property
    def location(self) -> str:
        return f"{self._remote.api.endpoint}/{self._remote.repo_id}"

    def check(self, weights: Iterable[str]) -> str | None:
        """The commit to build on, if there is one; OutputRefused if it holds other weights than those to come."""
        remote = self._remote
        head = remote.head(self._found)
        coming = [Blob(self._to.path(name), -1, None, "", lfs=True) for name in weights]
        try:
            superseded(coming, remote.listed(head), self._to, remote.repo_id)
        except OutputRefused as error:
            raise OutputRefused(f"{str(error).partition(' Push to')[0]} Push to another repository.") from None
        return head

    def begin(self, weights: Iterable[str]) -> None:
        """Make the repository if there is none. Raises what ``check`` does."""
        self._remote.prepare(self._found, self.check(weights))
        self._uploads = self._remote.uploads(AHEAD)  # leaves memory for the conversion

    def converting(self, step: Progress) -> None:
        """Pass on how far the conversion is."""
        self._told = time.monotonic()
        self._progress(step)

    def send(self, name: str, file: VerifiedFile, sha256: str) -> None:
        """Upload one finished file, so that it need not be on this disk any more. Raises what a push raises."""
        self._send([Blob(self._to.path(name), file.size, file, sha256, lfs=True)])

    def stop(self) -> None:
        """Let every upload fail now."""
        if self._uploads is not None:
            self._uploads.stop()

    def publish(
        self,
        uploaded: Mapping[str, tuple[int, str]],
        here: Mapping[str, VerifiedFile],
        about: Mapping[str, Any],
    ) -> PushResult:
        """Make the one commit. ``uploaded``: size and SHA-256 by name; ``here``: the files to send with it.

        ``about``: of the record. Raises UploadsLost if the Hub does not hold what was sent.
        """
        remote = self._remote
        names = frozenset({*uploaded, *here})
        config = config_among(here, lambda name: here[name].read(MAX_BYTES))
        plan = PushPlan.of(remote, about, config, names, self._source_private)
        blobs = [Blob(self._to.path(name), size, None, digest, lfs=True) for name, (size, digest) in uploaded.items()]
        blobs += [Blob(self._to.path(name), file.size, file, file.hashed()) for name, file in here.items()]
        blobs.sort(key=lambda blob: blob.path)
        result = plan.result(blobs)
        remote.require_valid_card(result.card)
        parent = plan.head or remote.prepare(plan.found, plan.head)
        whole = [*blobs, Blob.in_memory(README, result.card.encode())]
        self._send([blob for blob in differing(whole, plan.there) if blob.content is not None])
        info = remote.require_still_private(was_private=self._was_private)
        try:
            commit, pull_request = remote.commit(whole, result.removed, parent, plan.message, plan.there)
        except ObjectsLost:
            lost = set(remote.lost(whole))
            raise UploadsLost(
                f"{remote.repo_id} no longer holds files that were sent and deleted here. Nothing was committed. "
                "Run the same command again: it makes them anew and keeps the others.",
                tuple(name for name in uploaded if self._to.path(name) in lost),
            ) from None
        remote.require_complete(commit, whole)
        return replace(
            result,
            created=self._found is None,
            commit=commit,
            pull_request=pull_request,
            bytes_uploaded=self._sent,
            private=info.private is not False,
        )

    def _send(self, blobs: Sequence[Blob]) -> None:
        assert self._uploads is not None, "begin comes first"
        with self._remote.errors(f"Uploading to {self._remote.repo_id}"):
            sent = self._uploads.send(blobs, self._tell)
        with self._lock:
            self._sent += sent

    def _tell(self, step: Progress) -> None:
        """Show an upload, where nothing else is to be shown."""
        if time.monotonic() - self._told > STILL:
            self._progress(step)
