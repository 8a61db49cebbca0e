"""No bad number without a word: what is not finite is named, and scales that are not are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qz import MalformedInput, api
from qz.formats.output.shards.shard_writer import ShardWriter
from qz.quantize.compute.arrays import NUMPY, count_nonfinite
from qz.quantize.methods import Fp4, Int8, Method, Nf4

NORM, TABLE, INPUT_NORM = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"
METHODS: dict[str, Method] = {"nf4": Nf4(), "double": Nf4(double_quant=True), "fp4": Fp4(), "int8": Int8()}
FINITE = "gives [0-9]+ scales? that (is|are) NaN or infinite"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    for name, method in METHODS.items():
        api.quantize(tiny_llama, folder / name, method=method, device="cpu")
    return {name: folder / name for name in METHODS}


def changed(source: Path, target: Path, change: Callable[[State], None]) -> Path:
    shutil.copytree(source, target)
    state = load_file(target / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    (target / "qz.json").unlink(missing_ok=True)  # or the file would be refused for not being what it records
    return target


@pytest.fixture
def wide(tiny_llama: Path, tmp_path: Path) -> Path:
    """In float32, with values that float16 cannot hold and one that is none."""

    def widen(state: State) -> None:
        for name in state:
            state[name] = state[name].float()
        state[NORM][3] = 70_000
        state[TABLE][1, 1] = state[TABLE][7, 7] = -1e30
        state[INPUT_NORM][0] = torch.nan

    return changed(tiny_llama, tmp_path / "wide", widen)


NAMED = [
    {"name": TABLE, "stored": 0, "overflowed": 2},
    {"name": INPUT_NORM, "stored": 1, "overflowed": 0},
    {"name": NORM, "stored": 0, "overflowed": 1},
]


def quantize(source: Path, target: Path, **options: Any) -> Any:
    return api.quantize(source, target, device="cpu", **options)


def dequantize(source: Path, target: Path, **options: Any) -> Any:
    return api.dequantize(source, target, device="cpu", **options)


def test_kept_tensors_that_overflow_or_are_not_finite_are_named_and_counted(wide: Path, tmp_path: Path) -> None:
    summary = quantize(wide, tmp_path / "out", dtype="float16")
    assert summary.as_json()["nonfinite"] == NAMED
    overflowed, stored = (text for text in summary.warnings if "infinite" in text)
    assert f"became infinite: 2 in {TABLE}, 1 in {NORM}. Choose a --dtype" in overflowed
    assert f"kept as they are: 1 in {INPUT_NORM}" in stored
    assert "nonfinite" not in json.loads((tmp_path / "out" / "qz.json").read_text())["about"]
    assert set(quantize(wide, tmp_path / "wider", dtype="float32").nonfinite) == {INPUT_NORM}


def test_a_continued_run_names_what_the_interrupted_one_had_written(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, options = ShardWriter.finish, {"dtype": "float16", "max_shard_bytes": 40_000, "threads": 1}

    def finish_and_stop(writer: ShardWriter) -> None:
        finish(writer)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", finish_and_stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(wide, tmp_path / "out", **options)
    summary = quantize(wide, tmp_path / "out", **options)
    assert summary.resumed
    assert summary.as_json()["nonfinite"] == NAMED


def spoil(name: str, value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[next(each for each in state if each.endswith(name))].view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    ("kind", "part", "value", "named", "why"),
    [
        ("nf4", "weight.absmax", torch.nan, "absmax", FINITE),
        ("fp4", "weight.absmax", -torch.inf, "absmax", FINITE),
        ("double", "nested_absmax", torch.inf, "nested_absmax", FINITE),
        ("double", "nested_quant_map", torch.nan, "nested_absmax", FINITE),
        ("int8", "SCB", torch.nan, "SCB", FINITE),
        ("nf4", "quant_map", torch.nan, "quant_map", "is not the map of nf4"),
        ("nf4", "quant_map", 1e38, "quant_map", "is not the map of nf4"),
        ("fp4", "quant_map", 0.5, "quant_map", "is not the map of fp4"),
        ("double", "weight.quant_map", 0.5, "weight.quant_map", "is not the map of nf4"),
    ],
)
def test_scales_that_are_not_finite_and_foreign_maps_are_refused(
    kind: str, part: str, value: float, named: str, why: str, quantized: dict[str, Path], tmp_path: Path
) -> None:
    source = changed(quantized[kind], tmp_path / "source", lambda state: state.update(whole_map(state, part, value)))
    with pytest.raises(MalformedInput, match=f"{named}' {why}"):
        dequantize(source, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def whole_map(state: State, part: str, value: float) -> State:
    """The first such tensor with ``value`` at its beginning; of a nested map, everywhere."""
    name = next(each for each in state if each.endswith(part))
    tensor = state[name].clone()
    tensor.view(-1)[: tensor.numel() if part == "nested_quant_map" else 1] = value
    return {name: tensor}


@pytest.mark.parametrize("kind", METHODS)
def test_negative_scales_are_right(kind: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    part = {"double": "nested_absmax", "int8": "SCB"}.get(kind, "weight.absmax")
    source = changed(quantized[kind], tmp_path / "source", spoil(part, -0.125))
    assert not dequantize(source, tmp_path / "back").nonfinite


def test_a_weight_that_overflows_when_it_is_dequantized_is_named(quantized: dict[str, Path], tmp_path: Path) -> None:
    source = changed(quantized["int8"], tmp_path / "source", spoil("down_proj.SCB", 1e6))
    found = dequantize(source, tmp_path / "back", dtype="float16").nonfinite
    assert [name.rpartition(".mlp.")[2] for name in found] == ["down_proj.weight"]
    assert next(iter(found.values())).overflowed > 0


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_what_is_not_finite_is_counted_as_torch_does(dtype: str, torch_dtype: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    bits: Any = every if dtype != "F32" else every.astype(np.uint32) << 16
    tensor = torch.from_numpy(bits.view(np.int16 if dtype != "F32" else np.int32)).view(getattr(torch, torch_dtype))
    counted = count_nonfinite(bits.view(NUMPY[dtype]), dtype, lambda _, nbytes: np.empty(nbytes, np.uint8))
    assert counted == int((~torch.isfinite(tensor)).sum())
