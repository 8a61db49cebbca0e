"""Ask the library that a checkpoint belongs to, once: the one way from here to transformers and diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.json_files import dump_json
from qz.quantize.libraries import answer_cache
from qz.quantize.libraries.architecture import Architecture, LoadRequest, TensorSpec, torch_name
from qz.quantize.libraries.importing import lean_imports
from qz.quantize.libraries.importing.boundary import library_errors
from qz.quantize.libraries.importing.isolation import isolated, trusted
from qz.quantize.libraries.importing.optional_packages import needed_by
from qz.quantize.libraries.importing.untrusted_config import (
    note_removed,
    parts_bounded,
    require_plausible,
    without_code,
    without_own_code,
)
from qz.quantize.libraries.importing.work_bounds import is_hard, work_bounded
from qz.quantize.libraries.process import asking


@contextmanager
def examining(checkpoints: Iterable[Checkpoint]) -> Iterator[None]:
    """Name, before the first, all that will be examined inside: a library is imported once, for all of them."""
    for checkpoint in checkpoints:
        lean_imports.keep(needed_by(checkpoint))
    with asking.together():
        yield


def examine(
    checkpoint: Checkpoint,
    request: LoadRequest,
    given: Mapping[str, TensorSpec] | None = None,
    equal: Callable[[str, str], bool] | None = None,
) -> Architecture:
    """Ask the checkpoint's library how it would load and save it.

    ``given`` replaces the checkpoint's own names, dtypes and shapes (dequantize shows the weights as they will be);
    ``equal`` compares two checkpoint tensors, asked only where two tied weights are both stored.

    Raises Unsupported when the installed library lacks the class or cannot handle the model, MalformedInput when
    tensors are missing or misshapen.
    """
    tensors = given if given is not None else _specs(checkpoint)
    question = answer_cache.question(checkpoint, tensors, request, library_versions())
    if (known := answer_cache.recall(question)) is not None:
        return known
    with examining([checkpoint]):
        if not is_hard():
            told = asking.ask(checkpoint, tensors, request, question, equal)
            if told is not None:
                return told
        return _ask_here(checkpoint, tensors, request, question, equal)


def _specs(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """What there is, as the library is shown it. Experts by the thousand are alike, and share what is said of them."""
    known: dict[tuple[str, tuple[int, ...]], TensorSpec] = {}
    specs: dict[str, TensorSpec] = {}
    for name, tensor in checkpoint.tensors.items():
        kind = tensor.dtype, tensor.shape
        if kind not in known:
            known[kind] = TensorSpec(torch_name(tensor.dtype, name), tensor.shape)
        specs[name] = known[kind]
    return specs


def _ask_here(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorSpec],
    request: LoadRequest,
    question: str,
    equal: Callable[[str, str], bool] | None,
) -> Architecture:
    compared = False

    def compare(one: str, other: str) -> bool:
        nonlocal compared
        compared = True
        with trusted():
            return equal is not None and equal(one, other)

    architecture = ask_library(checkpoint, tensors, request, compare if equal else None)
    if not compared and (told := answer_cache.encoded(architecture)) is not None:
        answer_cache.keep(question, told)
    return architecture


def ask_library(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorSpec],
    request: LoadRequest,
    equal: Callable[[str, str], bool] | None,
) -> Architecture:
    """Ask the library, which is not to be trusted with this config: no code, no network, no more parts than tensors."""
    where, config = checkpoint.folder.location, checkpoint.config
    shapes = {name: given.shape for name, given in tensors.items()}
    require_plausible(config, shapes, where)
    harmless, removed = without_code(config)
    asked = replace(checkpoint, config=harmless, own_code="auto_map" in removed)
    with (
        lean_imports.lean_imports(),
        library_errors(checkpoint.library, str(checkpoint.architecture or "the model"), where),
        isolated(),
        parts_bounded(len(tensors), where),
    ):
        if checkpoint.library == "diffusers":
            from qz.quantize.libraries.diffusers import on_diffusers

            with work_bounded(shapes, where):
                architecture = on_diffusers.examine(asked, tensors, request)
        else:
            from qz.quantize.libraries.transformers import on_transformers

            with work_bounded(shapes, where):
                architecture = on_transformers.examine(asked, tensors, request, equal)
    notes = note_removed(removed)
    if "auto_map" in removed and checkpoint.library == "transformers":
        elsewhere, here = without_own_code(config["auto_map"])
        if elsewhere:  # code of another repository still exists: saved unchanged, as the library does
            written = json.loads(architecture.documents["config.json"]) | {"auto_map": elsewhere}
            documents = {**architecture.documents, "config.json": dump_json(written)}
            architecture = replace(architecture, documents=documents)
        if here:
            notes += (f"auto_map left out of config.json: code is not copied, and {checkpoint.library} has the class",)
    return replace(architecture, notes=(*architecture.notes, *notes))


def library_versions() -> dict[str, str]:
    """Versions that decide the bytes of an output."""
    return {name: _version(name) for name in ("torch", "bitsandbytes", "transformers", "diffusers")}


@cache
def _version(name: str) -> str:
    """The whole description of a package is read for it: milliseconds."""
    from importlib.metadata import version

    return version(name)
