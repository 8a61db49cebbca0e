"""Pickled checkpoints: the tensors are those that torch.load gives, nothing is run, and nothing else is read."""

from __future__ import annotations

import io
import json
import os
import runpy
import shlex
import shutil
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import Qz
from converted import carried_out
from qz import MalformedInput
from qz.api import dequantize, inspect, quantize, verify
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.formats.malformed import Malformed
from qz.formats.output.recorded.record import read_record
from qz.formats.pickles.file import read_pickled
from qz.quantize.inspection.report import Inspection
from qz.quantize.methods import FourBit
from qz.quantize.models.plan import plan_quantization
from qz.quantize.planning.plan import Plan
from qz.quantize.settings import Settings
from qz.quantize.streaming.readers import reader

HOSTILE: dict[str, tuple[bytes, str | None]] = runpy.run_path(str(Path(__file__).parent / "malformed/pickles.py"))[
    "CASES"
]
ZIPPED: dict[str, bool] = {}
LEGACY = {"_use_new_zipfile_serialization": False}


def states() -> dict[str, Any]:
    """State dicts as models have them, and as nobody should write them."""
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    return {
        "dtypes": {str(dtype): (base * 9).to(dtype) for dtype in (*dtypes, torch.uint8, torch.bool)},
        "views": {
            "whole": base,
            "tied": base,
            "rows": base[2:5],
            "transposed": base.T,
            "columns": base[:, 1:4],
            "every other": base[::2, ::3],
            "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
            "one row": base.T[3:4],
        },
        "sizes": {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "one": torch.ones(1, 1, 1)},
        "parameters": torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).state_dict(keep_vars=True),
        "module": torch.nn.Linear(4, 3).state_dict(),
        "wrapped": {"epoch": 3, "state_dict": OrderedDict(a=base), "optimizer": {"lr": 0.1, "steps": [1, 2]}},
        "float8": {"w": base.to(torch.float8_e4m3fn), "v": base.to(torch.float8_e5m2)},
    }


@pytest.mark.parametrize("form", [ZIPPED, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", states())
def test_the_tensors_are_those_that_torch_loads(tmp_path: Path, name: str, form: dict[str, bool]) -> None:
    if name == "float8" and form:
        pytest.skip("torch itself does not load these")
    file = tmp_path / "pytorch_model.bin"
    torch.save(states()[name], file, **form)
    theirs = torch.load(file, weights_only=True)
    theirs = theirs.get("state_dict", theirs)
    folder = LocalFolder(tmp_path)
    size = file.stat().st_size

    def read(offset: int, length: int) -> bytes:
        return file.read_bytes()[offset : offset + length]

    found = read_pickled(read, size, file.name, str(file))
    assert list(found.tensors) == list(theirs)
    assert found.left_out == (("'epoch'", "'optimizer'") if name == "wrapped" else ())
    for key, tensor in found.tensors.items():
        expected = theirs[key].detach().contiguous()
        assert tensor.shape == tuple(expected.shape)
        opened, count = reader(folder, tensor), expected.numel()
        pieces = []
        for start in range(0, count, opened.unit):
            raw, dtype = opened.read(
                start, start + opened.unit, tensor.dtype, lambda _, nbytes: np.empty(nbytes, np.uint8)
            )
            assert dtype == tensor.dtype
            pieces.append(bytes(raw))
        assert b"".join(pieces) == bytes(expected.view(-1).view(torch.uint8).numpy()) if count else pieces == []


def planned(folder: LocalFolder) -> Plan:
    folder.allow_pickle = True
    return plan_quantization(open_checkpoint(folder), Settings(FourBit("nf4"), device="cpu"))


@pytest.fixture
def pickled(tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(shards: int, form: dict[str, bool]) -> Path:
        folder = Path(shutil.copytree(tiny_llama, tmp_path / "pickled"))
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if shards == 1:
            torch.save(state, folder / "pytorch_model.bin", **form)
            return folder
        names = sorted(state)
        files = [f"pytorch_model-{number + 1:05}-of-{shards:05}.bin" for number in range(shards)]
        weight_map = {name: files[number % shards] for number, name in enumerate(names)}
        for file in files:
            torch.save({name: state[name] for name in names if weight_map[name] == file}, folder / file, **form)
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        return folder

    return make


def test_pickles_are_dequantized_and_compared_with_pickled_originals(
    pickled: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    original = pickled(1, ZIPPED)
    quantize(tiny_llama, tmp_path / "q", device="cpu")
    source = Path(shutil.copytree(tmp_path / "q", tmp_path / "q-pickled"))
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(MalformedInput, match="With --allow-pickle qz reads them"):
        dequantize(source, tmp_path / "refused", device="cpu")
    done = dequantize(source, tmp_path / "back", device="cpu", allow_pickle=True, against=original)
    theirs = dequantize(tmp_path / "q", tmp_path / "reference", device="cpu", against=tiny_llama)
    assert done.as_json()["loss"] == theirs.as_json()["loss"]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()


@pytest.mark.parametrize(("shards", "form"), [(1, ZIPPED), (1, LEGACY), (3, ZIPPED)], ids=["zip", "legacy", "shards"])
def test_what_comes_of_a_pickle_is_what_comes_of_safetensors(
    pickled: Callable[..., Path], tiny_llama: Path, tmp_path: Path, shards: int, form: dict[str, bool]
) -> None:
    folder = pickled(shards, form)
    settings = Settings(FourBit("nf4"), device="cpu")
    summary = carried_out(planned(LocalFolder(folder)), tmp_path / "output", settings)
    carried_out(planned(LocalFolder(tiny_llama)), tmp_path / "reference", settings)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "output" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
    assert not [name for name in summary.left_out if "pytorch_model" in name]


def test_pickles_are_read_only_where_that_is_asked_for(
    pickled: Callable[..., Path], tmp_path: Path, forked_qz: Callable[..., Any]
) -> None:
    folder = pickled(1, ZIPPED)
    refused = forked_qz("quantize", folder, "-o", tmp_path / "output")
    assert refused.returncode == 65
    assert "With --allow-pickle qz reads them" in refused.stderr
    done = forked_qz("quantize", folder, "-o", tmp_path / "output", "--allow-pickle", "--json")
    assert done.returncode == 0, done.stderr
    record = read_record(LocalFolder(tmp_path / "output"))
    assert record is not None
    assert "--allow-pickle" in record.about["command"]
    found = inspect(folder, allow_pickle=True)
    assert isinstance(found, Inspection)
    assert found.errors == ()
    assert inspect(folder).errors != ()


def zipped(content: bytes) -> bytes:
    """The archive that ``torch.save`` makes around a pickle, with a storage of 16 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path, name: str) -> None:
    content, kind = HOSTILE[name]
    data = zipped(content[1:]) if content[:1] == b"@" else content
    tracemalloc.start()
    try:
        found = refused(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (found.kind if found else None) == kind
    assert peak < 100_000_000
    assert not os.path.exists("/tmp/qz-was-run")
    if found is not None:
        assert str(found).isprintable()
        assert len(str(found)) < 500


def others() -> dict[str, tuple[Any, str]]:
    """What PyTorch saves and loads that is no plain tensor of a state dict, and how it is named."""
    ones = torch.ones(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8)
    return {
        "negated": ({"w": torch._neg_view(ones)}, "a view that is negated"),
        "complex": ({"w": ones.to(torch.complex64)}, "ComplexFloatStorage"),
        "quantized": ({"w": quantized}, "_rebuild_qtensor"),
        "sparse": ({"w": ones.to_sparse()}, "_rebuild_sparse_tensor"),
        "repeated": ({"w": torch.ones(1).expand(9)}, "'w', a view that repeats its values"),
        "elsewhere": ({"model": {"w": ones}, "ema": {"w": ones}, "step": 3}, "its tensors in 'model', 'ema', where no"),
    }


@pytest.mark.parametrize("form", [ZIPPED, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", others())
def test_what_is_no_plain_tensor_is_refused_as_such(name: str, form: dict[str, bool]) -> None:
    value, words = others()[name]
    buffer = io.BytesIO()
    torch.save(value, buffer, **form)
    found = refused(buffer.getvalue())
    assert found is not None
    assert (found.kind, words in str(found)) == ("pickle-tensor", True)


def refused(data: bytes) -> Malformed | None:
    try:
        read_pickled(lambda offset, length: data[offset : offset + length], len(data), "x.bin", "x.bin")
    except Malformed as error:
        return error
    return None


def test_a_hostile_archive_is_refused(tmp_path: Path) -> None:
    good = HOSTILE["good"][0][1:]
    data = zipped(good)
    assert refused(data) is None
    for cut in range(1, len(data), 7):
        found = refused(data[:-cut])
        assert found is not None
        assert found.kind == "pickle-malformed"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", good)
        archive.writestr("archive/data/0", bytes(16))
    compressed = refused(buffer.getvalue())
    assert compressed is not None
    assert "compressed" in str(compressed)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", good)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("archive/data.pkl", good)
    twice = refused(buffer.getvalue())
    assert twice is not None
    assert "twice" in str(twice)


def test_any_change_of_a_byte_is_read_or_refused(tmp_path: Path) -> None:
    """No exception but qz's own, and never more tensors than there are."""
    for form in (ZIPPED, LEGACY):
        buffer = io.BytesIO()
        torch.save({"a": torch.arange(12.0).reshape(3, 4).T, "b": torch.ones(3)}, buffer, **form)
        data = buffer.getvalue()
        for place in range(0, len(data), 3):
            for value in (0, data[place] ^ 0x55, 255):
                refused(data[:place] + bytes([value]) + data[place + 1 :])


def test_the_error_names_the_file_and_what_it_asks_for(pickled: Callable[..., Path]) -> None:
    folder = pickled(1, ZIPPED)
    (folder / "pytorch_model.bin").write_bytes(zipped(HOSTILE["a command"][0][1:]))
    with pytest.raises(MalformedInput, match=r"pytorch_model\.bin asks for 'posix\.system', .* as safetensors"):
        planned(LocalFolder(folder))


def test_an_output_of_pickles_is_verified_with_the_same_consent(
    pickled: Callable[..., Path], tmp_path: Path, forked_qz: Qz
) -> None:
    source = pickled(1, ZIPPED)
    quantize(source, tmp_path / "out", device="cpu", allow_pickle=True)
    with pytest.raises(MalformedInput, match="was made of them with --allow-pickle") as raised:
        verify(tmp_path / "out", source, device="cpu")
    program, *words = shlex.split(str(raised.value).split("`")[1])
    done = forked_qz(*words)
    assert (program, done.returncode) == ("qz", 0), done.stderr
