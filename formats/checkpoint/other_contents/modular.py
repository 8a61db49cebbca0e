"""A modular pipeline of diffusers: an index that says where each component is loaded from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from qz.counted import shown

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

MODULAR_INDEX = "modular_model_index.json"
_PLAIN = re.compile(r"[A-Za-z0-9_./@ -]+")
_NO_MODEL = re.compile(r"Tokenizer|Processor|Scheduler|Extractor|Guidance|Guider")
MOST_NAMED = 4
"""Components that a message names."""


def commands_for(index: Mapping[str, Any], location: str, here: Collection[str]) -> str:
    """The commands that quantize a modular pipeline's models where they lie; empty if it names none.

    That is in ``location``, where the component has a folder ``here``, and else where the index says. They will be
    pasted into a shell: only plain names get into them.
    """
    commands = []
    for name, value in index.items():
        where = value[2] if isinstance(value, list) and len(value) > 2 and isinstance(value[2], dict) else {}
        hint = where.get("type_hint")
        class_name = value[1] if where and value[1] else hint[-1] if isinstance(hint, list) and hint else hint
        if name.startswith("_") or class_name is None or _NO_MODEL.search(f"{class_name}"):
            continue
        repository = where.get("pretrained_model_name_or_path") or where.get("repo")
        folder = where.get("subfolder")
        if name in here:
            repository, folder = location, name
        texts = [each for each in (repository, folder) if each]
        if not repository or not all(isinstance(text, str) and _PLAIN.fullmatch(text) for text in texts):
            continue
        commands.append(f"`qz quantize '{repository}'" + (f" --subfolder '{folder}'" if folder else "") + f"` ({name})")
    return shown(commands, MOST_NAMED) + ("." if commands else "")
