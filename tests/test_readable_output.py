"""What qz writes qz reads: an output that could not be inspected, verified and dequantized never gets its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qz import MalformedInput, QzError, Unsupported, api
from qz.quantize.methods import Fp4, Int8, Method, Nf4
from qz.quantize.streaming.output import output_folders
from qz.quantize.streaming.output.readable import UnreadableOutput, require_readable

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
State = dict[str, torch.Tensor]


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_llama, tmp_path / "source")
    return tmp_path / "source"


def change(source: Path, tensors: Callable[[State], None] = lambda _: None, **config: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    state = load_file(source / "model.safetensors")
    tensors(state)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})


def quantize(source: Path, **options: Any) -> Any:
    return api.quantize(source, source.parent / "out", device="cpu", **options)


def left(source: Path) -> set[str]:
    return set(os.listdir(source.parent)) - {source.name}


def readable(folder: Path) -> None:
    """Inspect, verify and dequantize it."""
    found = api.inspect(folder, verify=True)
    assert found.verified is not None
    assert found.verified.intact
    assert not found.as_json()["problems"]
    api.dequantize(folder, folder.parent / "back", device="cpu")


def without_values(state: State) -> None:
    for name in [name for name in state if ".mlp." in name]:
        state[name] = state[name].new_zeros((64, 0) if "down_proj" in name else (0, 64))


@pytest.mark.parametrize("method", [Nf4(), Nf4(double_quant=True), Fp4(), Int8()], ids=["nf4", "double", "fp4", "int8"])
def test_linears_without_values_are_refused_by_name(method: Method, source: Path) -> None:
    change(source, without_values, intermediate_size=0)
    with pytest.raises(MalformedInput, match=r"mlp.down_proj.weight' has the shape \[64, 0\]: there is nothing in it"):
        quantize(source, method=method)
    assert not left(source)


DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [UP, NORM])
def test_a_weight_of_any_dtype_that_is_not_computed_with_is_refused_before_work(
    name: str, dtype: torch.dtype, source: Path
) -> None:
    def convert(state: State) -> None:
        state[name] = state[name].to(dtype)

    change(source, convert)
    with pytest.raises(Unsupported, match=name.replace(".", r"\.")):
        quantize(source, dry_run=True)
    assert not left(source)


def test_a_model_without_any_quantized_weight_gets_no_name_and_nothing_of_it_stays(source: Path) -> None:
    change(source, num_hidden_layers=-1)
    with pytest.raises(QzError) as refused:
        quantize(source)
    assert refused.value.exit_code in (65, 78)
    assert not left(source)


def test_whatever_the_reader_refuses_is_not_kept_and_not_used_by_a_later_run(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(folder: Path, parts: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["bnb_4bit_quant_type"] = "nf5"
        (folder / "config.json").write_text(json.dumps(config))
        require_readable(folder, parts)

    with monkeypatch.context() as patch:
        patch.setattr(output_folders, "require_readable", damaged)
        with pytest.raises(UnreadableOutput, match=r"could not be read back, so it was not kept: .*nf5"):
            quantize(source)
    assert not left(source)
    assert not quantize(source).resumed
    readable(source.parent / "out")


def test_names_that_are_no_utf8_do_not_spoil_the_record(source: Path) -> None:
    try:
        stray = open(os.fsencode(source) + b"/stray-\xff.txt", "wb")  # noqa: SIM115
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    stray.close()
    renamed = source.with_name(os.fsdecode(b"source-\xff"))
    source.rename(renamed)
    assert not quantize(renamed).as_json()["up_to_date"]
    assert quantize(renamed, if_exists="skip").as_json()["up_to_date"]
    readable(renamed.parent / "out")
