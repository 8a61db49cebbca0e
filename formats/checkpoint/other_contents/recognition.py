"""Which of these things a folder or a file is, as a problem of a kind, with the facts that its message tells."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from qz import QzError
from qz.counted import shown
from qz.formats.checkpoint.other_contents import adapters
from qz.formats.checkpoint.other_contents.additions import addition
from qz.formats.checkpoint.other_contents.models_inside import models_inside
from qz.formats.checkpoint.other_contents.modular import MODULAR_INDEX, commands_for
from qz.formats.checkpoint.other_contents.original_layouts import original_layout
from qz.formats.checkpoint.other_contents.other_forms import ADDITIONS, files_inside, other_forms
from qz.formats.files.folder import PIPELINE_INDEX, Folder, read_file
from qz.formats.json_files import MAX_CONFIG_BYTES, read_json
from qz.formats.malformed import quoted
from qz.formats.tensors.weight_names import PICKLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_SETTINGS = {
    "scheduler_config.json": "a scheduler",
    "tokenizer_config.json": "a tokenizer",
    "preprocessor_config.json": "a processor",
    "modular_config.json": "the code of a modular pipeline",
}
"""Files that say what a folder without config.json holds, if it is not a model."""


class Recognized(NamedTuple):
    """``kind``: of the problem, as in ``problems``; ``where``: the file that shows it."""

    kind: str
    where: str
    facts: Mapping[str, str]


def recognize_folder(folder: Folder, names_in: Callable[[str], Iterable[str]]) -> Recognized | None:
    """What a folder without config.json is, if it is something well known that is not a model.

    ``names_in``: the names of the tensors in a file, none if it cannot be read.
    """
    sizes = folder.sizes()
    weights = sorted(name for name in sizes if name.endswith(".safetensors"))
    settings = next((name for name in _SETTINGS if name in sizes), None)
    if PIPELINE_INDEX in sizes:
        return Recognized("pipeline-root", PIPELINE_INDEX, {"inside": ", ".join(folder.subfolders()) or "none"})
    if MODULAR_INDEX in sizes:
        return Recognized("modular-pipeline", MODULAR_INDEX, {"components": _modular_components(folder)})
    if "adapter_config.json" in sizes:
        return _adapter(folder, "adapter_config.json", "an adapter")
    if weights:
        return recognize_file(folder, weights[0], names_in(weights[0]))
    if models := models_inside(folder):
        also = other_forms(folder, ADDITIONS)
        return Recognized("models-inside", "config.json", {"inside": shown(models), "also": f" {also}" if also else ""})
    if settings is not None and other_forms(folder) is None:
        return Recognized("settings-only", settings, {"what": _SETTINGS[settings], "name": settings})
    return None


def recognize_file(folder: Folder, file: str, names: Iterable[str], class_name: str | None = None) -> Recognized | None:
    """What a file with tensors of these names is, if it is no model, or one in another tool's names.

    ``class_name``: of the config beside it, if there is one.
    """
    names = list(names)
    if class_name is None and (facts := addition(folder.location, file, names, folder.subfolders())):
        return Recognized("adapter-only", file, facts)
    if adapters.is_adapter(names):
        return _adapter(folder, file, "an adapter" if adapters.other_kind(names) else "a LoRA adapter", names)
    if facts := original_layout(names, class_name):
        return Recognized("original-layout", file, facts)
    return None


def instead_of_config(folder: Folder) -> str:
    """What to do about a folder without config.json that is nothing well known."""
    if forms := other_forms(folder):
        return forms
    names = list(files_inside(folder))
    if single := next((name for name in names if name.endswith(".safetensors")), None):
        return f"If {quoted(single, 60)} is a whole model of diffusers, name that file."
    if pickle := next(filter(PICKLE.search, names), None):
        return f"{quoted(pickle, 60)} alone does not say what model it is of. Use a repository with a config.json."
    return "Download that too."


def _adapter(folder: Folder, file: str, what: str, names: Iterable[str] = ()) -> Recognized:
    config: Mapping[str, Any] = {}
    if (name := "adapter_config.json") in folder.sizes():
        with suppress(QzError):  # reported when the adapter is read
            config = read_json(read_file(folder, name, MAX_CONFIG_BYTES), f"{folder.location}/{name}")
    how = adapters.how_to_use(folder.location, config, names)
    return Recognized("adapter-only", file, {"what": what, "how": how})


def _modular_components(folder: Folder) -> str:
    try:
        index = read_json(read_file(folder, MODULAR_INDEX, MAX_CONFIG_BYTES), f"{folder.location}/{MODULAR_INDEX}")
    except QzError as error:
        return str(error)
    remote = re.fullmatch(r"(.+)@[0-9a-f]{12,40}(/.+)?", folder.location)
    here = () if remote and remote[2] else folder.subfolders()
    return commands_for(index, remote[1] if remote else folder.location, here) or "it names none."
