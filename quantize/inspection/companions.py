"""What is wrong with the files beside a model's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qz import QzError
from qz.formats.checkpoint.problems import Problems
from qz.formats.files.folder import read_file
from qz.formats.files.local_folder import LocalFolder
from qz.formats.json_files import MAX_BYTES, read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qz.formats.checkpoint.problems import Problem
    from qz.formats.files.folder import Folder
    from qz.formats.output.companions import Companion
    from qz.quantize.libraries.companions.notes import Note


_GENERATION = "generation_config.json"


def problems_beside_model(folder: Folder, config: Mapping[str, Any] | None) -> tuple[Problem, ...]:
    """Files that no loader can read, and what they name that there is not. Of a repository on the Hub small ones of
    ``folder`` itself are looked at. ``config``: None if it could not be read."""
    if folder.named_file is not None or folder.only is not None:
        return ()
    problems, names = Problems(folder.location), folder.sizes()
    try:
        if _GENERATION in names:
            read_json(read_file(folder, _GENERATION, MAX_BYTES), f"{folder.location}/{_GENERATION}", nonfinite="tag")
    except QzError as error:
        problems.add_error(error, _GENERATION, missing="unreadable")
    try:
        if any(map(_may_be_companion, names)) or folder.subfolders():
            _look_at(folder, config, problems)
    except QzError as error:
        problems.add_error(error, folder.location, missing="unreadable")
    return problems.worst_first()


def _may_be_companion(name: str) -> bool:
    """Whether a file is one that the imports for it are worth: a model has these two at least."""
    return name not in ("config.json", _GENERATION) and not name.endswith((".safetensors", ".safetensors.index.json"))


def _look_at(folder: Folder, config: Mapping[str, Any] | None, problems: Problems) -> None:
    from qz.formats.output.companions import beside, companions
    from qz.quantize.libraries.companions.notes import notes_on_model

    found = {each.name: each for each in beside(folder)}
    if isinstance(folder, LocalFolder) and folder.subfolders():
        found |= {each.name: each for each in companions(folder)}
    for name in ("config.json", _GENERATION):  # which are read elsewhere
        found.pop(name, None)
    _add_damage(found.values(), problems)
    if config is not None:
        _add_notes(notes_on_model(found.values(), config), problems)


def problems_of_settings(folder: Folder, name: str, library: str, class_name: str) -> tuple[Problem, ...]:
    """The same of the component ``name`` of a pipeline, which has no weights."""
    from qz.formats.output.companions import beside
    from qz.quantize.libraries.companions.notes import notes_on_component

    problems = Problems(folder.location)
    try:
        _add_damage(beside(folder), problems)
        _add_notes(notes_on_component(folder, library, class_name), problems)
    except QzError as error:
        problems.add_error(error, folder.location, missing="unreadable")
    return tuple(each._replace(where=f"{name}/{each.where}") for each in problems.worst_first())


def _add_damage(found: Iterable[Companion], problems: Problems) -> None:
    from qz.formats.output.damaged import damaged

    for name, error in damaged(found).items():
        problems.add_error(error, name, missing="unreadable")


def _add_notes(notes: Iterable[Note], problems: Problems) -> None:
    for note in notes:
        problems.add("tokenizer-vocabulary" if note.is_vocabulary else "companion-class", note.where, told=note.told)
