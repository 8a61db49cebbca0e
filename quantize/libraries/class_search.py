"""Where diffusers keeps a class: at its top level, or in the modules of its models and pipelines.

It exports most of its models. What only one pipeline uses stays in that pipeline's module, which model_index.json names
in the place of a library; text encoders and safety checkers among it are models of transformers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from qz.formats.malformed import quoted

LONGEST_NAME = 100
"""Letters; no class has a longer name."""
_ROOMS = ("models", "pipelines")
"""Folders of the package whose modules have model classes."""


def classes_in_diffusers(name: Any, module: str | None) -> Iterator[type]:
    """Classes of that name, the likeliest first; ``module`` is the one of a pipeline that model_index.json names."""
    if not isinstance(name, str) or len(name) > LONGEST_NAME or not name.isidentifier():
        return
    # diffusers imports bitsandbytes, which suggests installing kernels that qz does not use.
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
    for each in _modules(name, module):
        found = getattr(each, name, None)
        if isinstance(found, type):
            yield found


def shown(name: str) -> str:
    """A class's name from a file, for a message: as it is, or in quotes and cut if no class has such a name."""
    return name if name.replace(".", "").isidentifier() and len(name) <= LONGEST_NAME else quoted(name, LONGEST_NAME)


def module_of(model_class: type, library: Any) -> str | None:
    """The module of a class that ``library`` does not export; None for one that it does."""
    return None if getattr(library, model_class.__name__, None) is model_class else model_class.__module__


def _modules(name: str, named: str | None) -> Iterator[Any]:
    """Where the class may be; imported one by one."""
    import diffusers

    if named is not None and named.isidentifier() and named in dir(diffusers.pipelines):
        yield getattr(diffusers.pipelines, named)
    yield diffusers
    for module in _modules_that_define(name):
        with suppress(ImportError):  # it needs a package that is not installed
            yield import_module(module)


def _modules_that_define(name: str) -> Iterator[str]:
    """Names of the library's modules whose text defines a class of that name."""
    import diffusers

    root = Path(diffusers.__file__).parent
    definition = re.compile(rf"^class {name}\b", re.MULTILINE)
    for room in _ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if name in text and definition.search(text):
                yield ".".join(("diffusers", *path.relative_to(root).with_suffix("").parts))
