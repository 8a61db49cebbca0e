"""A part of an output that goes to the Hub shard by shard, and leaves a receipt: what it sent, and the small files."""

from __future__ import annotations

from qz.formats.output.staging import Staging
from qz.formats.publish.uploaded_output import UploadedOutput


class UploadedShare(UploadedOutput):
    """As ``UploadedOutput``, but no commit is made: the folder of the part is there afterwards, without its weights."""

    replaces = True

    def _publish(self) -> None:
        for name in sorted(self._journal.uploaded & self._written.keys()):
            self._staged.remove(name)
        Staging._publish(self)
