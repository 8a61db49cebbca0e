"""What a record may say of how a checkpoint was made: the kinds of its values, checked when it is read.

A record may come with a download. What it says ends up in cards, commands and messages, so each value that is used has
to be of the kind that qz writes there; unknown keys are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from qz.formats.malformed import UNSAFE_TEXT, quoted

Check = Callable[[Any], bool]

REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
METHODS = frozenset({"nf4", "fp4", "int8", "none", ""})
ENCODINGS = frozenset({"fp8", "fbgemm_fp8", "modelopt", "mxfp8", "mxfp4", "compressed-tensors", "gptq", "awq", "gguf"})
"""What the quantization of a source by another tool is called; see ``qz.formats.sources``."""
DTYPES = frozenset({"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "auto", ""})
LIBRARIES = frozenset({"transformers", "diffusers"})
LONGEST = 1 << 16
"""Characters of a text."""


def check_about(about: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first value that is not of its kind. Null is a value that is not known."""
    _check("", about, ABOUT)


def _check(where: str, value: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for key, kind in kinds.items():
        found = value.get(key)
        if found is None:
            continue
        path = f"{where}{key}"
        if isinstance(kind, Mapping):
            if not isinstance(found, dict):
                raise ValueError(f"{path} is not an object")
            _check(f"{path}.", found, kind)
        elif isinstance(kind, list):
            if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
                raise ValueError(f"{path} is not a list of objects")
            for number, each in enumerate(found):
                _check(f"{path}[{number}].", each, kind[0])
        elif not kind(found):
            raise ValueError(f"{path} cannot be {quoted(str(found)[:LONGEST])}")


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST and not UNSAFE_TEXT.search(value)


def _like(pattern: str) -> Check:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None


def _among(words: frozenset[str]) -> Check:
    """One of ``words``, or several joined by ``+``, as of a pipeline."""
    return lambda value: isinstance(value, str) and words.issuperset(value.split("+"))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 63


def _location(value: Any) -> bool:
    """A repository, or the name of a folder, which may be any."""
    return _text(value) and (REPO_ID.fullmatch(value) is not None or "/" not in value)


def _repository(value: Any) -> bool:
    return isinstance(value, str) and REPO_ID.fullmatch(value) is not None


def _number(value: Any) -> bool:
    return isinstance(value, float) or _count(value)


def _command(value: Any) -> bool:
    return _texts(value) and value[:1] == ["qz"] and value[1:2] in (["quantize"], ["dequantize"])


def _versions(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_name, value)) and all(map(_version, value.values()))


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


_name = _like(r"[A-Za-z0-9][\w.-]{0,63}")
_version = _like(r"[A-Za-z0-9][\w.+!-]{0,63}")
_class_name = _like(r"([A-Za-z_]\w{0,199})?")
_commit = _like(r"[0-9a-f]{40,64}")
_SIZES = {"source": _count, "output": _count}
_FOOTPRINT = {"before": _count, "after": _count}
_LAYER = {"name": _text, "relative_error": _number}
_PARAMETERS = {"total": _count, "quantized": _count}

ABOUT: Mapping[str, Any] = {
    "qz": _version,
    "versions": _versions,
    "act": _among(frozenset({"quantize", "dequantize"})),
    "command": _command,
    "source": {
        "location": _location,
        "revision": _commit,
        "subfolder": _text,
        "library": lambda value: isinstance(value, str) and value in LIBRARIES,
        "architecture": _class_name,
        "module": _like(r"[A-Za-z_][\w.]{0,199}"),
        "pipeline": _class_name,
    },
    "origin": {"location": _repository, "revision": _commit},
    "method": _among(METHODS | ENCODINGS),
    "double_quant": _boolean,
    "scales": _among(frozenset({"absmax", "search"})),
    "rounding": _among(frozenset({"nearest", "gptq"})),
    "importance": {"file": _text, "sha256": _like(r"[0-9a-f]{64}"), "tokens": _number},
    "loras": [
        {
            "location": _text,
            "revision": _commit,
            "file": _text,
            "sha256": _like(r"[0-9a-f]{64}"),
            "config_sha256": _like(r"[0-9a-f]{64}"),
            "scale": _number,
            "weights": _count,
        }
    ],
    "device": _text,
    "bytes_of": _text,
    "dtype": _among(DTYPES),
    "parameters": _PARAMETERS,
    "bytes": _SIZES,
    "memory_footprint": _FOOTPRINT,
    "carried": _texts,
    "left_out": _texts,
    "warnings": _texts,
    "skipped": _texts,
    "loss": {"total": {"relative_error": _number}, "layers": [_LAYER], "layers_left_out": _count},
    "loads_in": [{"name": _text, "package": _text, "loads": _boolean, "why": _text}],
    "identity": {"files": {}},
    "settings": {
        "method": {"name": _among(METHODS), "bnb_4bit_compute_dtype": _among(DTYPES)},
        "dtype": _among(DTYPES),
        "skips": _strings,
        "components": _strings,
        "component_methods": {},
        "max_shard_bytes": _count,
        "experts": _boolean,
    },
    "components": [
        {
            "name": _text,
            "architecture": _class_name,
            "method": _among(METHODS | ENCODINGS),
            "dtype": _among(DTYPES),
            "parameters": _PARAMETERS,
            "bytes": _SIZES,
            "memory_footprint": _FOOTPRINT,
            "skipped": _texts,
        }
    ],
}
