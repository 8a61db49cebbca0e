"""Architectures that a library was asked for before, kept on disk: planning again needs neither it nor torch.

Importing a library takes most of a short run, and its answer depends on little: the config, the names, dtypes and
shapes of the tensors, what is asked for, and the library's own code. All of that is compared before an answer is used,
the code by the size and time of every file of it that was loaded. An answer that depends on values of weights, or that
holds the library's own functions, is not kept.

Answers lie in ``$QZ_CACHE/architectures``, by default in the user's cache directory; nothing is kept if ``QZ_CACHE`` is
empty or there is no home. What cannot be read, or does not have the checksum it was written with, counts as absent.
The state of the code lies in ``$QZ_CACHE/code``, once for all answers that the same code gave: it names a thousand
files, and to read it with each answer took longer than the answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.files.folder import read_file
from qz.formats.files.regular_file import read_regular
from qz.formats.json_files import MAX_CONFIG_BYTES
from qz.formats.user_cache import user_cache
from qz.quantize.libraries.architecture import Architecture, Footprint, LoadRequest, Saved, TensorSpec, Weight

MOST_KEPT = 1_000
"""Answers, and states of code, that are kept: the newest."""
MOST_BYTES = 256_000_000
"""Of one answer; that for 400,000 tensors takes a hundred."""
CODE = ("accelerate", "diffusers", "qz", "timm", "transformers")
"""Packages whose loaded files must be the same; of the others, the version and the place."""
GENERATION_CONFIG = "generation_config.json"


def question(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorSpec], request: LoadRequest, versions: Mapping[str, str]
) -> str:
    """A name for what a library is asked: the SHA-256 of all that it is given, and of which library it is."""
    generation = GENERATION_CONFIG in checkpoint.folder.sizes()
    asked = {
        "python": sys.version,
        "versions": dict(versions),
        "places": [found.origin if (found := find_spec(name)) else None for name in (*CODE, *versions)],
        "library": checkpoint.library,
        "class": [checkpoint.architecture, checkpoint.class_module],
        "config": checkpoint.config,
        "generation": read_file(checkpoint.folder, GENERATION_CONFIG, MAX_CONFIG_BYTES).hex() if generation else None,
        "tensors": [(name, given.dtype, given.shape, given.linear) for name, given in tensors.items()],
        "method": request.method and [type(request.method).__name__, request.method.config()],
        "request": [request.dtype, request.skips, request.default_skips, request.experts],
    }
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def recall(question: str) -> Architecture | None:
    """The answer to an earlier question; None if there is none, or the code that gave it has changed."""
    folder = _folder()
    if folder is None:
        return None
    try:
        checksum, body = read_regular(folder / question, MOST_BYTES).split(b"\n", 1)
        if _sha256(body).encode() != checksum:
            return None
        kept = json.loads(body)
        return decoded(kept["architecture"]) if _is_loaded(_code_folder(folder) / kept["code"]) else None
    except Exception:  # noqa: BLE001  whatever else lies there, it is no answer
        return None


def keep(question: str, told: dict[str, Any]) -> None:
    """Keep an ``encoded`` answer, if there is room; in the process that got it from the library."""
    folder = _folder()
    if folder is None:
        return
    with suppress(OSError):
        name, code = _code(frozenset(sys.modules))
        state = _code_folder(folder) / name
        if state not in _LOADED:
            _write(state, code)
            _LOADED.add(state)
        body = json.dumps({"code": state.name, "architecture": told}).encode()
        _write(folder / question, _sha256(body).encode() + b"\n" + body)


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all; the oldest files beside it go, if there are too many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(data)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    with os.scandir(path.parent) as entries:
        found = list(entries)
    if len(found) > MOST_KEPT:
        for old in sorted(found, key=lambda entry: -entry.stat().st_mtime_ns)[MOST_KEPT:]:
            os.unlink(old)


def _folder() -> Path | None:
    cache = user_cache()
    return cache / "architectures" if cache is not None else None


def _code_folder(answers: Path) -> Path:
    return answers.with_name("code")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@lru_cache(maxsize=1)
def _code(loaded: frozenset[str]) -> tuple[str, bytes]:
    """The name and the JSON of path → state of the files of ``CODE`` that are loaded, among the modules of these names.

    Raises OSError if one cannot be looked at. Once for all answers that the same code gives: it takes milliseconds.
    """
    modules = [sys.modules.get(name) for name in loaded if name.partition(".")[0] in CODE]
    files = {path: _state(path) for module in modules if (path := getattr(module, "__file__", None))}
    code = json.dumps(files, sort_keys=True).encode()
    return _sha256(code), code


_LOADED: set[Path] = set()
"""States of code that are this process's own."""


def _is_loaded(state: Path) -> bool:
    """Whether each file that it names is as it was, and so what this process would load. Raises OSError if one cannot
    be read, ValueError if this is no such state."""
    if state not in _LOADED:
        data = read_regular(state, MOST_BYTES)
        if _sha256(data) == state.name and all(
            _state(path) == as_it_was for path, as_it_was in json.loads(data).items()
        ):
            _LOADED.add(state)
    return state in _LOADED


@cache
def _state(path: str) -> list[int]:
    """As first seen: a file that is changed later is not what this process loads. There are a thousand, and to look at
    each took a third of a plan that is known."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def encoded(architecture: Architecture) -> dict[str, Any] | None:
    """JSON values; None where a weight is made by the library's functions. Outputs of one weight go on sharing it.

    Hundreds of thousands of tensors have few dtypes and shapes, and most are a weight under its own name: what they
    have in common is written once.
    """
    weights = {id(saved.weight): saved.weight for saved in architecture.saved}
    if any(weight.conversion is not None for weight in weights.values()):
        return None
    number = {key: number for number, key in enumerate(weights)}
    kinds, forms = _Table(), _Table()
    rows = [
        (
            number[id(saved.weight)],
            forms.place((saved.dtype, saved.shape, saved.nbytes, saved.part, saved.variable)),
            saved.storage,
            *(() if saved.name == saved.weight.name else (saved.name,)),
        )
        for saved in architecture.saved
    ]
    return {
        "class_name": architecture.class_name,
        "weights": [
            (
                weight.name,
                kinds.place((weight.dtype, weight.shape, weight.quantized, weight.transposed)),
                *(() if _is_plain(weight) else (weight.sources, weight.parameter, weight.index)),
            )
            for weight in weights.values()
        ],
        "weight_kinds": list(kinds.places),
        "saved": rows,
        "saved_forms": list(forms.places),
        "kept_linears": dict(architecture.kept_linears),
        "dropped": architecture.dropped,
        "parameters": architecture.parameters,
        "counted_parameters": architecture.counted_parameters,
        "footprint": (architecture.footprint.before, architecture.footprint.after),
        "dtype": architecture.dtype,
        "documents": {name: data.decode() for name, data in architecture.documents.items()},
        "notes": architecture.notes,
        "packed_elsewhere": architecture.packed_elsewhere,
        "unmatched_skips": architecture.unmatched_skips,
        "tied": dict(architecture.tied),
        "conv1d": architecture.conv1d,
        "class_module": architecture.class_module,
    }


def _is_plain(weight: Weight) -> bool:
    return weight.sources == (weight.name,) and not weight.parameter and weight.index is None


class _Table:
    """Values by the place at which they were first seen."""

    def __init__(self) -> None:
        self.places: dict[Any, int] = {}

    def place(self, value: Any) -> int:
        return self.places.setdefault(value, len(self.places))


def decoded(kept: dict[str, Any]) -> Architecture:
    """The architecture that was kept as these JSON values."""
    kinds = [(dtype, tuple(shape), *more) for dtype, shape, *more in kept["weight_kinds"]]
    weights = []
    for name, kind, *own in kept["weights"]:
        sources, parameter, index = own or ((name,), "", None)
        dtype, shape, quantized, transposed = kinds[kind]
        weights.append(
            Weight(name, tuple(sources), dtype, shape, quantized, transposed, parameter=parameter, index=index)
        )
    forms = [(dtype, tuple(shape), *more) for dtype, shape, *more in kept["saved_forms"]]
    saved = []
    for number, form, storage, *names in kept["saved"]:
        weight = weights[number]
        dtype, shape, nbytes, part, variable = forms[form]
        name = names[0] if names else weight.name
        saved.append(Saved(name, dtype, shape, weight, nbytes, part, variable, storage))
    return Architecture(
        class_name=kept["class_name"],
        saved=tuple(saved),
        kept_linears=kept["kept_linears"],
        dropped=tuple(kept["dropped"]),
        parameters=kept["parameters"],
        counted_parameters=kept["counted_parameters"],
        footprint=Footprint(*kept["footprint"]),
        dtype=kept["dtype"],
        documents={name: text.encode() for name, text in kept["documents"].items()},
        notes=tuple(kept["notes"]),
        packed_elsewhere=tuple(kept["packed_elsewhere"]),
        unmatched_skips=tuple(kept["unmatched_skips"]),
        tied=kept["tied"],
        conv1d=tuple(kept["conv1d"]),
        class_module=kept["class_module"],
    )
