"""Architectures that a library was asked for before, kept on disk: planning again needs neither it nor torch.

Importing a library takes most of a short run, and its answer depends on little: the config, the names, dtypes and
shapes of the tensors, what is wished for, and the library's own code. All of that is compared before an answer is used,
the code by the size and time of every file of it that was loaded. An answer that depends on values of weights, or that
holds the library's own functions, is not kept.

Answers lie in ``$QZ_CACHE/architectures``, by default in the user's cache directory; nothing is kept if ``QZ_CACHE`` is
empty or there is no home. What cannot be read, or does not have the checksum it was written with, counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from qz.formats.checkpoint.survey import MAX_CONFIG_BYTES, Checkpoint, read_file
from qz.formats.regular_file import read_regular
from qz.formats.user_cache import user_cache
from qz.quantize.libraries.architecture import Architecture, Footprint, LoadRequest, Saved, TensorSpec, Weight

MOST = 256
"""Answers that are kept, the newest."""
MOST_BYTES = 256_000_000
"""Of one answer; that for 400,000 tensors takes a hundred."""
CODE = ("accelerate", "diffusers", "qz", "timm", "transformers")
"""Packages whose loaded files must be the same; of the others, the version and the place."""
GENERATION_CONFIG = "generation_config.json"


def question(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorSpec], request: LoadRequest, versions: Mapping[str, str]
) -> str:
    """A name for what a library is asked: the SHA-256 of all that it is told, and of which library it is."""
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
        if hashlib.sha256(body).hexdigest().encode() != checksum:
            return None
        kept = json.loads(body)
        if any(_state(path) != state for path, state in kept["code"].items()):
            return None
        return decoded(kept["architecture"])
    except Exception:  # noqa: BLE001  whatever else lies there, it is no answer
        return None


def keep(question: str, architecture: Architecture) -> None:
    """Keep an answer that can be kept, if there is room; in the process that got it from the library."""
    folder, told = _folder(), encoded(architecture)
    if folder is None or told is None:
        return
    with suppress(OSError):
        body = json.dumps({"code": _code(), "architecture": told}).encode()
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, delete=False) as file:
            try:
                file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
                file.close()
                os.replace(file.name, folder / question)
            except BaseException:
                os.unlink(file.name)
                raise
        for old in sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime_ns)[MOST:]:
            old.unlink()


def _folder() -> Path | None:
    cache = user_cache()
    return cache / "architectures" if cache is not None else None


def _code() -> dict[str, list[int]]:
    """Path → state of the files of ``CODE`` that are loaded. Raises OSError if one cannot be looked at."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in CODE]
    return {path: _state(path) for module in modules if (path := getattr(module, "__file__", None))}


def _state(path: str) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def encoded(architecture: Architecture) -> dict[str, Any] | None:
    """JSON values; None where a weight is made by the library's functions. Outputs of one weight go on sharing it."""
    weights = {id(saved.weight): saved.weight for saved in architecture.saved}
    if any(weight.conversion is not None for weight in weights.values()):
        return None
    number = {key: number for number, key in enumerate(weights)}
    return {
        "class_name": architecture.class_name,
        "weights": [
            (w.name, w.sources, w.dtype, w.shape, w.quantized, w.transposed, w.parameter, w.index)
            for w in weights.values()
        ],
        "saved": [
            (s.name, s.dtype, s.shape, number[id(s.weight)], s.nbytes, s.part, s.variable, s.storage)
            for s in architecture.saved
        ],
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


def decoded(kept: dict[str, Any]) -> Architecture:
    weights = [
        Weight(name, tuple(sources), dtype, tuple(shape), quantized, transposed, parameter=parameter, index=index)
        for name, sources, dtype, shape, quantized, transposed, parameter, index in kept["weights"]
    ]
    return Architecture(
        class_name=kept["class_name"],
        saved=tuple(
            Saved(name, dtype, tuple(shape), weights[number], nbytes, part, variable, storage)
            for name, dtype, shape, number, nbytes, part, variable, storage in kept["saved"]
        ),
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
