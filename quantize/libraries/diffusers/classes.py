"""Which class of diffusers a checkpoint is of, wherever the library keeps it; a repository's own code is never run."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from qz import Unsupported
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.versions import requirement

_ROOMS = ("models", "pipelines")
"""Folders of the package whose modules have model classes."""


def model_class_of(checkpoint: Checkpoint) -> Any:
    """The class that the checkpoint names: exported, in the module that model_index.json names, or in another one.

    diffusers exports most classes; those that only one pipeline uses stay in that pipeline's module, which
    model_index.json names in the place of a library.
    """
    # diffusers imports bitsandbytes, which advises to install kernels that qz has no use for.
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin

    name = checkpoint.architecture
    if isinstance(name, str) and name.isidentifier():
        for module in _modules(name, checkpoint.class_module):
            found = getattr(module, name, None)
            if isinstance(found, type) and issubclass(found, ModelMixin) and hasattr(found, "from_config"):
                return found
    raise Unsupported(
        f"diffusers {diffusers.__version__} has no model class {name}, which {checkpoint.folder.location}/config.json "
        f"asks for. Try a newer version: pip install -U '{requirement('diffusers')}'."
    )


def _modules(name: str, named: str | None) -> Iterator[Any]:
    """Where the class may be, the likeliest first; imported one by one."""
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
            if definition.search(path.read_text(encoding="utf-8")):
                yield ".".join(("diffusers", *path.relative_to(root).with_suffix("").parts))
