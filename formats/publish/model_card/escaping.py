"""Text from a checkpoint, made fit for the place in a model card where it stands, where it is nothing but text."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable

from qz.formats.malformed import UNSAFE_TEXT
from qz.formats.output.recorded.about import DTYPES

LONGEST, LONGEST_TEXT = 120, 1_000
"""Characters that are shown of a name, and of sentences."""


def markdown(text: object, longest: int = LONGEST) -> str:
    """Running text or a cell of a table: no markup, link, HTML, or border of a cell."""
    shown = re.sub(r"([\\`*_{}\[\]()#+!|~$@:])", r"\\\1", _one_line(str(text), longest).replace("&", "&amp;"))
    return shown.replace("<", "&lt;").replace(">", "&gt;").replace("www.", "www\\.")


def code(text: object) -> str:
    """A name in a code span, also in a table. What could end the span or the cell is left out."""
    shown = re.sub(r"[`<>|\[\]\\]", "", _one_line(str(text)))
    return f"`{shown or ' '}`"


def python_string(text: str) -> str:
    """A string of Python."""
    return json.dumps(UNSAFE_TEXT.sub(" ", text), ensure_ascii=False)


def torch_dtype(name: str | None) -> str:
    """A dtype of torch; bfloat16 where ``name`` is none."""
    known = (name or "").removeprefix("torch.")
    return f"torch.{known if known in DTYPES - {'auto', ''} else 'bfloat16'}"


def shell(words: Iterable[str]) -> str:
    """A command to paste, each word of which is one word of the shell."""
    return shlex.join(UNSAFE_TEXT.sub(" ", word) for word in words)


def fenced(language: str, text: str) -> str:
    """A block of code that nothing in ``text`` can end: its fence is longer than any in there."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _one_line(text: str, longest: int = LONGEST) -> str:
    shown = UNSAFE_TEXT.sub(" ", text)
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"
