"""Which components the class of a pipeline takes, read from the text of the installed diffusers: its import takes
seconds. Each of its pipelines has an ``__init__`` and ``_optional_components`` of its own, which from_pretrained asks.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_ENTRY = re.compile(r'_import_structure\["(\w+)"\]')
"""In the list of what ``diffusers.pipelines`` exports: the folder of the names that follow."""


@dataclass(frozen=True, slots=True)
class PipelineArguments:
    """What ``__init__`` takes."""

    components: frozenset[str]
    """What from_pretrained loads; all else in an index is a setting, or is ignored."""
    needed: tuple[str, ...]
    """Components that may not be None."""

    def unclear(self, index: Mapping[str, Any]) -> tuple[str, ...]:
        """Components that the index gives as something else than library and class, or null for both."""
        given = {name: value for name, value in index.items() if name in self.components}
        return tuple(name for name, value in given.items() if not is_pair(value) and not _is_null(value))

    def lacking(self, index: Mapping[str, Any]) -> tuple[str, ...]:
        """Components that the index does not give, and without which from_pretrained raises ValueError."""
        return tuple(name for name in self.needed if name not in index or _is_null(index[name]))


def is_pair(value: Any) -> bool:
    """Whether a value of an index is two strings: a library and a class of it."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _is_null(value: Any) -> bool:
    return isinstance(value, list) and value[:1] == [None]


@cache
def arguments_of(class_name: str) -> PipelineArguments | None:
    """What a class of diffusers takes; None for one that the installed version does not have."""
    spec = find_spec("diffusers")
    if spec is None or spec.origin is None or not class_name.isidentifier():
        return None
    folder = Path(spec.origin).parent / "pipelines"
    exported = _text(folder / "__init__.py")
    if (place := exported.find(f'"{class_name}"')) < 0:
        return None
    folders = [found[1] for found in _ENTRY.finditer(exported, 0, place)]
    for path in sorted((folder / folders[-1]).rglob("*.py")) if folders else ():
        text = _text(path)
        if re.search(rf"^class {class_name}\b", text, re.MULTILINE):
            return _arguments(text, class_name)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _arguments(text: str, class_name: str) -> PipelineArguments | None:
    classes = (each for each in ast.parse(text).body if isinstance(each, ast.ClassDef) and each.name == class_name)
    found = next(classes, None)
    body = found.body if found is not None else []
    init = next((each for each in body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
    if init is None:
        return None
    given = init.args
    positional = [each.arg for each in (*given.posonlyargs, *given.args)]
    required = positional[1 : len(positional) - len(given.defaults)]
    required += [each.arg for each, value in zip(given.kwonlyargs, given.kw_defaults, strict=True) if value is None]
    optional = _value(body, "_optional_components") or ()
    needed = [name for name in required if name not in optional]
    if _value(body, "_load_connected_pipes"):  # from the repository that the card names
        needed = [name for name in needed if not name.startswith("prior_")]
    return PipelineArguments(frozenset((*required, *optional)), tuple(needed))


def _value(body: list[ast.stmt], name: str) -> Any:
    """What a class assigns to a name; None where it does not."""
    for each in body:
        if isinstance(each, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in each.targets):
            return ast.literal_eval(each.value)
    return None
