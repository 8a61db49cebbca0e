"""The pipelines of diffusers, made of small components: quantized by qz, loaded by the library, called."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from qz import QzError, api
from reference import bitsandbytes_arguments, config_of, differing_tensors
from whole_zoo.calls import call, call_that_runs
from whole_zoo.case import Case, NotBuilt, Row, fill, mark, one_line, seed
from whole_zoo.components import Sizes, build_components, sizes_called_for
from whole_zoo.inputs import OF_DTYPES
from whole_zoo.pipeline_needs import IMPOSSIBLE, no_call
from whole_zoo.transformers_cases import needed

METHODS = ("nf4", "int8")
MOST_PARAMETERS = 60_000_000
MOST_TRIES = 4
"""Sizes of components that are tried."""


def cases() -> Iterator[Case]:
    """Every pipeline class at diffusers' top level, in an order that is the same on every day."""
    import diffusers

    names = [
        name
        for name in dir(diffusers)
        if name.endswith("Pipeline") and "Modular" not in name and name != "DiffusionPipeline"
    ]
    for name in sorted(names, key=lambda name: zlib.crc32(name.encode())):
        yield Case("diffusers pipeline", name, name, _rows)


def _rows(case: Case, folder: Path) -> Iterator[Row]:
    import diffusers

    seed(case.architecture)
    pipeline_class = getattr(diffusers, case.architecture)
    source = folder / "source"
    try:
        if type(pipeline_class).__name__ == "DummyObject":
            raise NotBuilt(f"needs {needed(pipeline_class)}")
        for pattern, why in IMPOSSIBLE.items():
            if re.fullmatch(pattern, case.architecture):
                raise NotBuilt(why)
        if not hasattr(pipeline_class, "__call__"):  # noqa: B004 - the class itself is callable
            raise NotBuilt("has no call of its own: it stands for others")
        dtype = torch.bfloat16
        pipeline, arguments, reason = _pipeline_that_answers(pipeline_class, source, dtype)
        if arguments is None and OF_DTYPES.search(reason):
            dtype = torch.float32
            pipeline, arguments, reason = _pipeline_that_answers(pipeline_class, source, dtype)
    except Exception as error:  # a class may raise anything for components that do not fit each other
        told = str(error) if isinstance(error, NotBuilt) else f"{type(error).__name__}: {error}"
        yield case.row(result="not built", why=told)
        return
    for method in METHODS:
        row = case.row(method)
        try:
            _compare(row, pipeline_class, pipeline.components, source, folder / method, arguments, dtype)
        except Exception as error:
            row.faults.append(one_line(f"{type(error).__name__}: {error}")[:300])
        row.ran = row.ran or reason[:160]
        shutil.rmtree(folder / method, ignore_errors=True)
        yield row


def _pipeline_that_answers(
    pipeline_class: Any, folder: Path, dtype: torch.dtype
) -> tuple[Any, dict[str, Any] | None, str]:
    """A pipeline in the folder, and what it can be called with, or why it gives no answer. Where the sizes of its
    components do not fit each other, others are tried."""
    waiting: list[dict[str, dict[str, int]]] = [{}]
    tried: list[dict[str, dict[str, int]]] = []
    reason = ""
    while waiting and len(tried) < MOST_TRIES:
        sizes = waiting.pop()
        tried.append(sizes)
        try:
            pipeline = _saved(pipeline_class, folder, sizes, dtype)
        except Exception:
            if not sizes:
                raise
            continue  # a component may not take such a size
        if why := no_call(pipeline_class.__name__):
            return pipeline, None, f"cannot be called: {why}"
        mark(folder.parent, "", "while the library calls the original")
        arguments, told = call_that_runs(pipeline)
        if arguments is not None:
            return pipeline, arguments, ""
        reason = reason or told
        for more in sizes_called_for(pipeline, told):
            both = {name: {**sizes.get(name, {}), **more.get(name, {})} for name in (*sizes, *more)}
            if both not in tried:
                waiting.append(both)
    return _saved(pipeline_class, folder, {}, dtype), None, reason


def _saved(pipeline_class: Any, folder: Path, sizes: Sizes, dtype: torch.dtype) -> Any:
    """The pipeline of small components, saved in the folder and loaded from it."""
    shutil.rmtree(folder, ignore_errors=True)
    components = build_components(pipeline_class, folder.parent, sizes)
    models = [part for part in components.values() if isinstance(part, torch.nn.Module)]
    for model in models:
        fill(model.to(dtype))
    if sum(each.numel() for model in models for each in model.parameters()) > MOST_PARAMETERS:
        raise NotBuilt(f"more than {MOST_PARAMETERS:,} parameters")
    pipeline_class(**components).save_pretrained(folder)
    return _loaded(pipeline_class, folder, components, dtype)


def _loaded(pipeline_class: Any, folder: Path, components: dict[str, Any], dtype: torch.dtype, **parts: Any) -> Any:
    """The pipeline in a folder, by the library; ``parts`` are loaded by the caller.

    Where it has given up a pipeline, whose own models it then does not find, each component by its class.
    """
    import diffusers

    told = {"torch_dtype": dtype}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    named = [name for library, name in filter(_is_pair, index.values()) if library == "diffusers"]
    if all(hasattr(diffusers, name) for name in named):
        absent = {name: None for name, value in index.items() if value == [None, None]}  # some want to be told
        return pipeline_class.from_pretrained(folder, **told, **absent, **parts)
    for name, part in components.items():
        if name not in parts:
            found = part is not None and hasattr(type(part), "from_pretrained")
            more = told if isinstance(part, torch.nn.Module) else {}
            parts[name] = type(part).from_pretrained(folder / name, **more) if found else part
    return pipeline_class(**parts)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _compare(
    row: Row,
    pipeline_class: Any,
    components: dict[str, Any],
    source: Path,
    folder: Path,
    arguments: dict[str, Any] | None,
    dtype: torch.dtype,
) -> None:
    models = {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}
    output, back = folder / "output", folder / "back"
    mark(source.parent, row.method, "in qz quantize")
    method = api.Int8() if row.method == "int8" else api.Nf4()
    try:
        api.quantize(source, output, method=method, device="cpu", fsync=False)
    except QzError as error:
        row.result, row.why = "refused", one_line(str(error).replace(str(source), "the pipeline"))
        return
    row.result = "identical"
    chosen = [name for name in models if "quantization_config" in config_of(output / name)]
    carried = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    own = {path for path in carried if path.parts[0] in chosen and path.suffix in (".safetensors", ".json")}
    for path in sorted(carried - own):
        if not (output / path).is_file() or (output / path).read_bytes() != (source / path).read_bytes():
            row.faults.append(f"not carried: {path}")
    mark(source.parent, row.method, "while the library quantizes")
    parts = {}
    for name in chosen:
        skips = config_of(output / name)["quantization_config"]["llm_int8_skip_modules"]
        parts[name] = _quantized_by_library(type(models[name]), source / name, row.method, skips, dtype)
        parts[name].save_pretrained(folder / "reference" / name)
        row.faults += [f"{name}: other bytes: {each}" for each in
                       differing_tensors(folder / "reference" / name, output / name)[:2]]  # fmt: skip
    row.why = f"quantized: {', '.join(chosen)}"
    mark(source.parent, row.method, "while the library loads what qz wrote")
    loaded = _loaded(pipeline_class, output, components, dtype)
    mark(source.parent, row.method, "while the library's pipeline runs")
    if arguments is not None:
        theirs = _loaded(pipeline_class, source, components, dtype, **parts)
        row.ran = _called(row, theirs, loaded, arguments)
    mark(source.parent, row.method, "in qz dequantize")
    api.dequantize(output, back, fsync=False, device="cpu")
    _loaded(pipeline_class, back, components, dtype)


def _quantized_by_library(
    model_class: Any, source: Path, method: str, skips: list[str] | None, dtype: torch.dtype
) -> Any:
    import diffusers
    import transformers

    if issubclass(model_class, diffusers.ModelMixin):
        kept = model_class._keep_in_fp32_modules or []
        listed = [skip for skip in skips if skip not in kept] if skips is not None else None
        config = diffusers.BitsAndBytesConfig(**bitsandbytes_arguments(method), llm_int8_skip_modules=listed)
        return model_class.from_pretrained(source, quantization_config=config, torch_dtype=dtype)
    config = transformers.BitsAndBytesConfig(**bitsandbytes_arguments(method), llm_int8_skip_modules=skips)
    return model_class.from_pretrained(source, quantization_config=config, dtype=dtype, device_map="cpu")


def _called(row: Row, theirs: Any, loaded: Any, arguments: dict[str, Any]) -> str:
    try:
        wanted = call(theirs, arguments)
    except Exception as error:
        return one_line(f"the library's quantized pipeline fails: {type(error).__name__}: {error}")[:160]
    if not _same(wanted, call(loaded, arguments)):
        row.faults.append("another output than the pipeline of the library's parts")
    return "equal"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if torch.is_tensor(one):
        return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, numpy.ndarray):
        return numpy.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return bool(one.tobytes() == other.tobytes()) if hasattr(one, "tobytes") else type(one) is type(other)
