"""What is wrong with the files beside a model's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz import QzError
from qz.formats.checkpoint.problems import Problems
from qz.formats.files.local_folder import LocalFolder

if TYPE_CHECKING:
    from qz.formats.checkpoint.problems import Problem
    from qz.formats.files.folder import Folder


def companion_problems(folder: Folder, *, model: bool = True) -> tuple[Problem, ...]:
    """Files that no loader can read, as far as they are looked at: of a repository on the Hub small ones of ``folder``
    itself. ``model``: its config.json is read elsewhere."""
    from qz.formats.output.companions import beside, companions
    from qz.formats.output.damaged import damaged

    if folder.named_file is not None or folder.only is not None:
        return ()
    problems = Problems(folder.location)
    try:
        found = {each.name: each for each in beside(folder) if not (model and each.name == "config.json")}
        if isinstance(folder, LocalFolder):
            found |= {each.name: each for each in companions(folder)}
        for name, error in damaged(found.values()).items():
            problems.add_error(error, name, missing="unreadable")
    except QzError as error:
        problems.add_error(error, folder.location, missing="unreadable")
    return problems.worst_first()
