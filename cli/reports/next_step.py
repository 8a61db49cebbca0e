"""Suggestions at the end of a command: Python that loads what was made, and commands to paste."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qz import QzError
from qz.cli.output import say

if TYPE_CHECKING:
    from qz.formats.publish.destination import PushResult

ACCOUNT = "YOUR_NAME"
"""Stands for the user's own account on the Hub."""
MAX_NAME = 96
"""Characters of a repository's name on the Hub, with the account."""


def tell(*steps: Sequence[str]) -> None:
    """Each of ``steps`` as a paragraph: a comment, which Python and shells skip, and lines that are never folded."""
    for step in steps:
        say("", *step)


def after_output(output: Path) -> list[list[str]]:
    """How to load what lies in a folder, and how to publish it; nothing if it is gone again, which fails no run."""
    from qz.formats.publish.model_card.card_facts import facts_here
    from qz.formats.publish.model_card.snippet import Here, loading
    from qz.quantize.libraries.importing.gpu_driver import may_have_a_gpu

    place = named(output)
    if not any(output.rglob("config.json")):  # a single file in its original names
        files = output.glob("*.safetensors")
        ask = (command("qz", "inspect", named(file), "--for", "comfyui") for file in files)
        return [["# Whether ComfyUI loads it:", line] for line in ask]
    try:
        facts = facts_here(output)
    except (QzError, OSError):
        return []
    load = loading(facts, Here(place, gpu=may_have_a_gpu()))
    name = os.path.basename(os.path.realpath(output))
    publish = command("qz", "push", place, f"{ACCOUNT}/{repository_name(name)}")
    return [["# Load it, in Python:", *filled(load)], ["# Publish it:", publish]]


def repository_name(folder: str) -> str:
    """The name of a folder as one that the Hub takes: letters, digits, ``-._``, no ``--`` or ``..``, 96 at most."""
    name = re.sub(r"[^\w.-]+", "-", folder, flags=re.ASCII)
    name = re.sub(r"[-.]{2,}", "-", name)[: MAX_NAME - len(ACCOUNT) - 1].strip("-.").removesuffix(".git")
    return name or "model"


def after_push(pushed: PushResult) -> list[list[str]]:
    """How to load what is on the Hub."""
    from qz.formats.publish.model_card.snippet import OnHub, loading

    place = OnHub(pushed.to.repo_id, pushed.to.folder, pushed.revision)
    return [["# Load it, in Python:", *filled(loading(pushed.facts, place))]]


def after_part(place: Path, push: str | None) -> list[list[str]]:
    """How the parts become one; ``place``: the folder of a part."""
    output = place.parent.with_name(place.parent.name.removesuffix(".parts"))
    return [["# When all parts are made:", command("qz", "merge", named(output), *(("--push", push) if push else ()))]]


def named(path: Path) -> str:
    """A path that cannot be taken for a repository or an option."""
    text = str(path)
    return text if path.is_absolute() or text.startswith(".") else os.path.join(".", text)


def command(*words: str) -> str:
    """A line for a shell; for what is not printable, in bash's quotes."""
    return " ".join(shlex.quote(word) if word.isprintable() else in_bash(word) for word in words)


def in_bash(word: str) -> str:
    """``word`` in the quotes in which bash reads escapes, for bytes that are not printable."""
    printable = (chr(b) if 32 <= b < 127 and chr(b) not in "'\\" else f"\\x{b:02x}" for b in os.fsencode(word))
    return f"$'{''.join(printable)}'"


def filled(lines: Iterable[str]) -> list[str]:
    """Without empty lines, which end a block that is pasted into Python."""
    return [line for line in lines if line]
