"""A modular pipeline of diffusers: an index that says where each component is loaded from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from qz.counted import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

MODULAR_INDEX = "modular_model_index.json"
_PLAIN = re.compile(r"[A-Za-z0-9_./@ -]+")
MOST = 4
"""Components that a message names."""


def commands_for(index: Mapping[str, Any]) -> str:
    """The commands that quantize a modular pipeline's models where they lie; empty if it names none.

    They will be pasted into a shell: only plain names get into them.
    """
    commands = []
    for name, value in index.items():
        where = value[2] if isinstance(value, list) and len(value) > 2 and isinstance(value[2], dict) else {}
        repository = where.get("pretrained_model_name_or_path") or where.get("repo")
        folder = where.get("subfolder")
        texts = [each for each in (repository, folder) if each]
        if name.startswith("_") or not repository or not all(isinstance(t, str) and _PLAIN.fullmatch(t) for t in texts):
            continue
        if re.search(r"Tokenizer|Processor|Scheduler|Extractor|Guidance|Guider", f"{value[1]}"):
            continue
        commands.append(f"`qz quantize '{repository}'" + (f" --subfolder '{folder}'" if folder else "") + f"` ({name})")
    return shown(commands, MOST) + ("." if commands else "")
