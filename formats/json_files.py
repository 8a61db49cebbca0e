"""JSON files of a checkpoint: read under bounds, written as the libraries write them."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from qz.formats.malformed import GIT_LFS_POINTER, Malformed, quoted

if TYPE_CHECKING:
    from collections.abc import Callable

NonFinite = Literal["refuse", "tag", "keep"]
MAX_BYTES = 10_000_000
MAX_CONFIG_BYTES = 8_000_000
"""Of a config.json. In memory a library needs several times as much for one: 400 MB with the libraries themselves."""
MAX_CONTAINERS = 100_000
MAX_VALUES = 150_000
"""In a file of up to ``MAX_BYTES``: in memory, short ones take twenty times what they take in the file."""
MAX_DEPTH = 64
MAX_DIGITS = 40
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


class _RefusedError(ValueError):
    """Something that Python's JSON reader takes and qz does not."""


def read_json(data: bytes, where: str, *, limit: int = MAX_BYTES, nonfinite: NonFinite = "refuse") -> dict[str, Any]:
    """The JSON object in ``data``; Malformed, naming ``where``, for anything else.

    Refused beyond what JSON forbids: more than ``limit`` bytes (text beyond ASCII: ``MAX_BYTES``), ``MAX_DEPTH``
    levels, ``MAX_CONTAINERS`` lists and objects, ``MAX_VALUES`` values (by their commas; not with a larger ``limit``),
    duplicate keys, NaN and infinities, integers of more than ``MAX_DIGITS``. ``nonfinite``: to ``tag`` NaN and
    infinities gives what transformers 5 writes for them; it used to ``keep`` them as they are, as diffusers does.
    """
    if data.startswith(GIT_LFS_POINTER):
        raise Malformed(
            "git-lfs-pointer", f"{where} is a Git-LFS pointer, not the file. Run `git lfs pull`, or download it again."
        )
    if len(data) > limit or (len(data) > MAX_BYTES and not data.isascii()):
        raise _malformed(f"{where} is {len(data)} bytes long, which is too large for such a file")
    containers = data.count(b"{") + data.count(b"[")
    if containers > MAX_CONTAINERS:
        raise _malformed(f"{where} holds more than {MAX_CONTAINERS} lists and objects, too many for such a file")
    if limit <= MAX_BYTES and data.count(b",") >= MAX_VALUES:
        raise _malformed(f"{where} holds more than {MAX_VALUES} values, too many for such a file")
    try:
        value = _DECODERS[nonfinite].decode(data.decode("utf-8"))
    except _RefusedError as error:
        raise _malformed(f"{where} is refused: {error}") from None
    except UnicodeDecodeError as error:
        raise _malformed(f"{where} is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        why = error.msg.removesuffix(" at").lower()
        raise _malformed(f"{where} is not valid JSON: {why}, line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _malformed(f"{where} is nested more than {MAX_DEPTH} levels deep") from None
    if not isinstance(value, dict):
        raise _malformed(f"{where} holds {_KINDS.get(type(value), 'something')} where an object is expected")
    if _HALF.search(data) and not _is_unicode(value):
        raise _malformed(f"{where} holds half a surrogate pair, which is not valid text")
    if containers > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise _malformed(f"{where} is nested more than {MAX_DEPTH} levels deep")
    return value


def _malformed(why: str) -> Malformed:
    return Malformed("json-malformed", f"{why}. Correct it, or download it again.")


def dump_json(value: object) -> bytes:
    """As transformers and diffusers write config.json, generation_config.json and the index."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


_KINDS: dict[type, str] = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a truth value",
    type(None): "null",
}


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for node in level:
            inner += (
                item for item in (node.values() if isinstance(node, dict) else node) if isinstance(item, dict | list)
            )
        if not inner:
            return False
        level = inner
    return True


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RefusedError(f"the key {quoted(twice)} appears twice")
    return found


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _RefusedError(f"a number has {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RefusedError(f"the number {quoted(text, 20)} is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise _RefusedError(f'{text} is not JSON (transformers writes it as {{"__float__": "{text}"}})')


def _decoder(constant: Callable[[str], Any]) -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_distinct, parse_int=_int, parse_float=_float, parse_constant=constant)


_DECODERS: dict[NonFinite, json.JSONDecoder] = {
    "refuse": _decoder(_constant),
    "tag": _decoder(lambda text: {"__float__": text}),
    "keep": _decoder(float),
}
