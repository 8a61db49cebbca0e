"""How a staged folder gets the name of the output while an old one is moved aside, and how a crash is repaired."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qz import IOFailed, OutputRefused, QzError
from qz.formats.output.refusals import refuse_output
from qz.formats.output.storage.beside import ASIDE, JOURNAL, PARTIAL

if TYPE_CHECKING:
    from qz.formats.output.resuming.journal import Journal
    from qz.formats.output.storage.directory import Directory


def refuse_foreign_partial(parent: Directory, name: str) -> None:
    """Raise OutputRefused for remains of the output ``name`` that have no journal: qz did not leave them."""
    journal = name + JOURNAL
    for remains in (name + PARTIAL, name + ASIDE):
        before = parent.status(remains)
        if before is None or parent.kind(journal) is not None:
            continue
        after = parent.status(remains)
        if after is not None and os.path.samestat(before, after) and parent.kind(journal) is None:
            raise OutputRefused(
                f"{parent.path / remains} exists, and it is not an interrupted run of qz. Move it away, or write "
                "elsewhere with -o/--output."
            )


def recover(parent: Directory, name: str) -> None:
    """Finish or take back an exchange of old and new output that a crash interrupted."""
    aside = name + ASIDE
    if parent.kind(aside) is None:
        return
    if parent.kind(name) is None:
        parent.rename(aside, name)
        parent.sync()
    elif parent.kind(name + PARTIAL) is None:
        parent.remove(aside)
    else:
        raise OutputRefused(
            f"{parent.path / aside} is the output that an interrupted run was replacing, and {parent.path / name} "
            "exists again. Move one of them away."
        )


class Exchange:
    """The renaming of ``staged`` to ``name``, both in ``parent``. ``done``: it has that name."""

    def __init__(self, parent: Directory, name: str, staged: Directory) -> None:
        self._parent, self._name, self._staged = parent, name, staged
        self._partial, self._aside = name + PARTIAL, name + ASIDE
        self.done = False

    def carry_out(self, journal: Journal, *, overwrite: bool) -> None:
        """Exchange, remove what was replaced, then the journal. The caller defers signals."""
        parent, name = self._parent, self._name
        refuse_output(parent, name, overwrite)
        self._require_in_place()
        replaced = parent.kind(name) is not None and bool(parent.names(name))
        try:
            if replaced:
                parent.rename(name, self._aside)
            parent.rename(self._partial, name)
            self.done = True
        except BaseException:
            if replaced and parent.kind(name) is None:
                parent.rename(self._aside, name)
            raise
        exchanged = False
        try:
            exchanged = not parent.is_same(name, self._staged.descriptor)
            if not exchanged:
                parent.sync()
                parent.remove(self._aside)
                journal.remove()
                parent.sync()
        except QzError as error:
            raise type(error)(f"{parent.path / name} is complete, but cleaning up failed: {error}") from error
        finally:
            if not exchanged:
                journal.close()
        if exchanged:  # someone replaced it just before the rename
            self.done = False
            parent.rename(name, self._partial)
            if replaced:
                parent.rename(self._aside, name)
            self._require_in_place()

    def _require_in_place(self) -> None:
        """Raise IOFailed unless the staged folder, and the one that the output is to lie in, are where they were."""
        for place, is_there in (
            (self._staged.path, self._parent.is_same(self._partial, self._staged.descriptor)),
            (self._parent.path, self._parent.is_at_its_path()),
        ):
            if not is_there:
                raise IOFailed(f"{place} was moved or replaced by someone else meanwhile. Run the same command again.")
