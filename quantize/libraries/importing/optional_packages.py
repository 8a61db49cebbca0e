"""Which optional packages the code of a model imports, read from the library's files without importing any of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.importing.lean_imports import OPTIONAL
from qz.quantize.libraries.source_code.installed import folder_of, text_of

FROM_THE_HUB = "kernels"
"""Downloads code: no model is built with it."""
_IMPORT = re.compile(
    rf"^\s*(?:from|import) ({'|'.join(name for name in OPTIONAL if name != FROM_THE_HUB)})\b", re.MULTILINE
)
OF_TRANSFORMERS = frozenset(("transformers",))
"""Not scipy, by which its losses match: only classes whose own code imports it need that to be built."""


def needed_by(checkpoint: Checkpoint) -> frozenset[str]:
    """Those of ``OPTIONAL`` without which the model might not be built, or be built otherwise."""
    needed: set[str] = set()
    if checkpoint.library == "transformers":
        needed |= OF_TRANSFORMERS
        for model_type in set(_model_types(checkpoint.config)):
            needed |= _imported_by_model_type(model_type)
    else:
        needed |= _imported_by_class(str(checkpoint.architecture))
    if "transformers" in needed:
        needed |= OF_TRANSFORMERS
    if "timm" in json.dumps(checkpoint.config):
        needed.add("torchvision")
    return frozenset(needed)


def _model_types(config: Any) -> Iterator[str]:
    """The types of a model and of those that it is made of."""
    values = list(config.values()) if isinstance(config, dict) else config if isinstance(config, list) else []
    if isinstance(config, dict) and isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in values:
        yield from _model_types(value)


@cache
def _imported_by_model_type(model_type: str) -> frozenset[str]:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", model_type):
        return frozenset()
    folder = folder_of("transformers") / "models" / model_type.replace("-", "_")
    return frozenset(package for path in folder.glob("modeling_*.py") for package in _imported_by(path))


@cache
def _imported_by_class(name: str) -> frozenset[str]:
    """Of a class of diffusers. Those outside ``diffusers.models`` are there only where transformers is."""
    models = folder_of("diffusers") / "models"
    listed = re.finditer(r'\["([\w.]+)"\] = \[([^\]]*)\]', text_of(models / "__init__.py"))
    module = next((found[1] for found in listed if f'"{name}"' in found[2]), None)
    if module is None:
        return OF_TRANSFORMERS
    return _imported_by(models / (module.replace(".", "/") + ".py"))


def _imported_by(path: Path) -> frozenset[str]:
    return frozenset(found[1] for found in _IMPORT.finditer(text_of(path)))
