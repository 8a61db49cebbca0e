"""Every case of the malformed corpus: found, named, in time, and without a traceback."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import socket
import tempfile
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors

from pace import stopwatch
from qz import QzError
from qz.formats.checkpoint.problems import ERRORS, WARNINGS, Problem, worst_first
from qz.formats.checkpoint.quantization.quantized import read_quantized
from qz.formats.checkpoint.survey import open_checkpoint, survey
from qz.formats.files.local_folder import LocalFolder
from qz.formats.sources.encoded import read_encoded
from qz.formats.tensors.safetensors import Header, read_header
from qz.formats.tensors.safetensors_layout import encode_header, layout

CORPUS = Path(__file__).parent / "malformed"
HEADERS: dict[str, tuple[bytes, str, str]] = runpy.run_path(str(CORPUS / "headers.py"))["CASES"]
FOLDERS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    **runpy.run_path(str(CORPUS / "folders.py"))["CASES"],
    **{f"quantized {name}": case for name, case in runpy.run_path(str(CORPUS / "quantized.py"))["CASES"].items()},
    **{f"quantized {name}": case for name, case in runpy.run_path(str(CORPUS / "encoded.py"))["CASES"].items()},
    **{f"header {name}": ("single", {"model.safetensors": data}, (kind,)) for name, (data, kind, _) in HEADERS.items()},
}
Tensors = dict[str, tuple[Any, ...] | None]

W = ("F32", (2, 2))
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 16]}
NESTED = STATE | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
SAID = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def nf4(state: Mapping[str, Any]) -> Tensors:
    data = json.dumps(state).encode()
    return {
        "a.bias": ("BF16", (16,)),
        "q.weight": ("U8", (64, 1)),
        "q.weight.absmax": ("F32", (2,)),
        "q.weight.quant_map": ("F32", (16,)),
        "q.weight.quant_state.bitsandbytes__nf4": ("U8", (len(data),), data),
    }


DOUBLE = nf4(NESTED) | {
    "q.weight.absmax": ("U8", (2,)),
    "q.weight.nested_absmax": ("F32", (1,)),
    "q.weight.nested_quant_map": ("F32", (256,)),
}
INT8: Tensors = {"q.weight": ("I8", (8, 16)), "q.SCB": ("F32", (8,)), "q.weight_format": ("U8", ())}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
FLUX = {"_class_name": "FluxTransformer2DModel"}
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TWICE = SAID | {"bnb_4bit_use_double_quant": True}
BASES: dict[str, dict[str, Any]] = {
    "single": {"config.json": LLAMA, "model.safetensors": {"a.weight": W, "b.weight": W}},
    "sharded": {
        "config.json": LLAMA,
        "model.safetensors.index.json": {
            "metadata": {"total_size": 48},
            "weight_map": {"a.weight": ONE, "b.weight": ONE, "c.weight": TWO},
        },
        ONE: {"a.weight": W, "b.weight": W},
        TWO: {"c.weight": W},
    },
    "diffusers": {"config.json": FLUX, WEIGHTS: {"a.weight": W}},
    "nf4": {"config.json": LLAMA | {"quantization_config": SAID}, "model.safetensors": nf4(STATE)},
    "double": {"config.json": LLAMA | {"quantization_config": TWICE}, "model.safetensors": DOUBLE},
    "int8": {
        "config.json": LLAMA | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "model.safetensors": INT8,
    },
    "diffusers-nf4": {"config.json": FLUX | {"quantization_config": SAID}, WEIGHTS: nf4(STATE)},
    "diffusers-double": {"config.json": FLUX | {"quantization_config": TWICE}, WEIGHTS: DOUBLE},
}


def write_tensors(path: Path, tensors: Tensors) -> None:
    """A valid file; tensors are zeros but for those that have bytes."""
    held = {name: spec for name, spec in tensors.items() if spec is not None}
    placed = layout([(name, spec[0], spec[1]) for name, spec in held.items()])
    data = b"".join(spec[2] if len(spec := held[info.name]) > 2 else bytes(info.nbytes) for info in placed)
    path.write_bytes(encode_header(placed) + data)


def write(path: Path, content: Any) -> None:
    """Put ``content`` at ``path``, as the corpus has it."""
    if path.is_symlink() or path.exists():
        if isinstance(content, tuple) and content[0] in ("mode", "cut"):
            if content[0] == "mode":
                path.chmod(int(content[1], 8))
            else:
                os.truncate(path, path.stat().st_size - int(content[1]))
            return
        path.unlink()
    if isinstance(content, dict) and path.suffix == ".safetensors":
        write_tensors(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, tuple):
        special(path, *content)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def special(path: Path, kind: str, target: str = "") -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(target)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that an unprivileged user can enter too, with a short path."""
    path = Path(tempfile.mkdtemp(prefix="qz-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def build(folder: Path, base: str, changes: Mapping[str, Any]) -> None:
    folder.mkdir()
    for name, content in BASES[base].items():
        change = changes.get(name)
        if isinstance(content, dict) and isinstance(change, dict) and name.endswith(".safetensors"):
            content = content | change
        write(folder / name, content)
    for name, content in changes.items():
        merged = isinstance(content, dict) and name.endswith(".safetensors") and name in BASES[base]
        if not merged:
            write(folder / name, content)


def problems_in(folder: Path) -> tuple[Problem, ...]:
    """All problems; an unprivileged user's view if this one may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        checkpoint, problems = survey(LocalFolder(folder))
        if checkpoint is not None:
            encoded, more = read_encoded(checkpoint)
            problems = worst_first((*problems, *(more if encoded is not None else read_quantized(checkpoint)[1])))
    finally:
        os.seteuid(user)
    return problems


def test_the_corpus_has_at_least_150_cases() -> None:
    assert len(FOLDERS) >= 250
    assert {kind for _, _, kinds in FOLDERS.values() for kind in kinds} >= (ERRORS.keys() | WARNINGS.keys()) - {
        "not-a-folder",  # these are about the folder itself, or need it to change: tested in test_checkpoint.py
        "variant-missing",
        "changed",
        "pickle-unsafe",  # read only where the user allows it: tested in test_pickles.py
        "pickle-malformed",
        "pickle-tensor",
        "component-null",  # of a whole pipeline: tested in test_pipeline.py
        "component-class",  # likewise
        "companion-class",  # of files beside a model: tested in test_companion_classes.py
        "tokenizer-vocabulary",  # likewise
        "experts-quantized",  # what --experts writes: tested in test_experts.py
        "gguf-type",  # needs a whole file: tested in test_gguf.py
    }


@pytest.mark.parametrize("name", FOLDERS)
def test_a_malformed_checkpoint_is_named_for_what_it_is(name: str, place: Path) -> None:
    base, changes, kinds = FOLDERS[name]
    folder = place / "checkpoint"
    build(folder, base, changes)
    tracemalloc.start()
    try:
        with stopwatch() as watch:
            problems = problems_in(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert tuple(dict.fromkeys(problem.kind for problem in problems)) == kinds
    assert watch.loops < 50
    assert peak < 300_000_000
    for problem in problems:
        assert problem.severity == ("error" if problem.kind in ERRORS else "warning")
        assert problem.message.isprintable()
        assert problem.where.isprintable()
        assert 20 < len(problem.message) < 1000
        assert str(folder) in problem.message or problem.where in problem.message


UNOPENED = [
    name
    for name, (_, _, kinds) in FOLDERS.items()
    if not name.startswith("quantized") and not ERRORS.keys().isdisjoint(kinds)
]


@pytest.mark.parametrize("name", UNOPENED)
def test_a_malformed_checkpoint_is_not_opened(name: str, place: Path) -> None:
    base, changes, kinds = FOLDERS[name]
    folder = place / "checkpoint"
    build(folder, base, changes)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(QzError) as raised:
            open_checkpoint(LocalFolder(folder))
    finally:
        os.seteuid(user)
    assert type(raised.value) is ERRORS[kinds[0]][0]
    assert raised.value.exit_code in (65, 66, 74, 77, 78)
    lines = str(raised.value).splitlines()
    assert len(lines) <= 4
    assert all(line.isprintable() for line in lines)


def header_of(data: bytes, where: str) -> Header:
    return read_header(lambda offset, length: data[offset : offset + length], len(data), where)


@pytest.mark.parametrize("name", [name for name in FOLDERS if name.startswith(("header", "good"))])
def test_whatever_header_is_accepted_safetensors_accepts(name: str, place: Path) -> None:
    base, changes, _ = FOLDERS[name]
    folder = place / "checkpoint"
    build(folder, base, changes)
    for path in folder.glob("*.safetensors"):
        if not path.is_file() or path.is_symlink():
            continue
        data = path.read_bytes()
        try:
            header = header_of(data, path.name)
        except QzError:
            continue
        with safetensors.safe_open(path, "numpy") as opened:
            assert set(opened.keys()) == set(header.tensors)
            assert (opened.metadata() or {}) == header.metadata
            for tensor, info in header.tensors.items():
                assert opened.get_slice(tensor).get_dtype() == info.dtype
                assert tuple(opened.get_slice(tensor).get_shape()) == info.shape
