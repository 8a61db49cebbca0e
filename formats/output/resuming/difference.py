"""How two runs differ, in words: which setting, version or file of the source."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

MOST_TOLD = 4
"""Differences that a message names."""
_ABSENT = object()
_SAID_BY_THE_REST = ("source", "settings", "versions", "folder")
"""Levels of a fingerprint whose names add nothing: ``versions.torch`` is ``torch``."""


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """``method: nf4 → int8, model.safetensors has changed``: values that differ, in nested objects too."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    keys = [key for key in sorted(before | after) if before.get(key, _ABSENT) != after.get(key, _ABSENT)]
    other_methods = [key[:-1] for key in keys if key[-1] == "name"]  # the settings of another method say nothing more
    keys = [key for key in keys if key[-1] == "name" or key[:-1] not in other_methods]
    keys.sort(key=lambda key: key not in before or key not in after)  # keys that both have say most
    told = list(dict.fromkeys(_in_words(key, before.get(key, _ABSENT), after.get(key, _ABSENT)) for key in keys))
    return ", ".join(told[:MOST_TOLD]) + (f" and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else "")


def _in_words(key: tuple[str, ...], old: Any, new: Any) -> str:
    if "files" in key:
        name = "/".join((*key[: key.index("files")], *key[key.index("files") + 1 :])).removeprefix("source/").strip("/")
        return f"{name} " + ("was not read" if old is _ABSENT else "is not read" if new is _ABSENT else "has changed")
    words = [part for part in key if part not in _SAID_BY_THE_REST] or ["source"]
    if words[-1] == "name":  # of a method
        words.pop()
    name = " ".join(
        word if before == "component_methods" else _plain(word)
        for before, word in zip(["", *words], words, strict=False)
    )
    return f"{name}: {_short(old)} → {_short(new)}"


def _plain(word: str) -> str:
    """A key as words: ``compute dtype``."""
    return word.removeprefix("bnb_4bit_").removeprefix("llm_int8_").replace("_", " ")


def _flatten(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, (*key, str(name)))
    elif isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value, start=1):
            yield from _flatten(inner, (*key, str(number)))
    else:
        yield key, value


def _short(value: Any) -> str:
    if value is _ABSENT or value is None or value in ([], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = json.dumps(text, ensure_ascii=True)[1:-1]
    return text if len(text) <= 60 else text[:59] + "…"
