"""Which file of transformers defines a tokenizer, processor or model class, or another name for one."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

from qz.quantize.libraries.source_code.installed import folder_of

_TOKENIZERS = ("tokenization_",)
_OTHERS = ("processing_", "image_processing_", "feature_extraction_", "video_processing_", "modeling_")
"""Files of transformers whose classes are components, or bases of them."""
_CLASS = re.compile(rb"^(?:class (\w+)|(\w+Tokenizer(?:Fast)?) = \w+$)", re.MULTILINE)


def defining_file(name: str) -> Path | None:
    """Mostly in the folder whose name begins that of the class."""
    files = _TOKENIZERS if name.endswith(("Tokenizer", "TokenizerFast", "TokenizerLegacy")) else _OTHERS
    lower = name.lower()
    likely = (folder for folder in _folders() if lower.startswith(folder.name.replace("_", "")))
    found = next((found[name] for folder in likely if name in (found := _defined_in(folder, files))), None)
    return found or _all(files).get(name)


@cache
def _folders() -> tuple[Path, ...]:
    root = folder_of("transformers")
    with os.scandir(root / "models") as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    return (*(root / "models" / name for name in names), root)


@cache
def _all(files: tuple[str, ...]) -> dict[str, Path]:
    return {name: path for folder in _folders() for name, path in _defined_in(folder, files).items()}


@cache
def _defined_in(folder: Path, files: tuple[str, ...]) -> dict[str, Path]:
    """Name of a class → the file in a folder that defines it."""
    paths = sorted(path for path in folder.iterdir() if path.name.startswith(files))
    return {(one or two).decode(): path for path in paths for one, two in _CLASS.findall(path.read_bytes())}
