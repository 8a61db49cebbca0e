"""What qz writes is what diffusers writes, where diffusers runs at all: its check for a GPU is walked around."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from converted import matching, quantized
from covering import in_turn
from forward import output_of
from reference import config_of, differing_files, differing_tensors, diffusers_model
from zoo import DIFFUSERS, Saved

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = in_turn(
    DIFFUSERS,
    [(method, "auto") for method in ("nf4", "int8", "fp4", "nf4-double")],
    [(method, dtype) for dtype in ("bfloat16", "float16") for method in ("nf4", "int8")],
    [(method, dtype) for dtype in ("bfloat16", "float16") for method in ("fp4", "nf4-double")],
)
SOME = in_turn(DIFFUSERS, ["nf4", "int8", "fp4", "nf4-double"])
SKIPS = ["proj_out", "transformer_blocks.0", "blocks.0"]


@pytest.fixture(params=DIFFUSERS)
def model(request: pytest.FixtureRequest, models: Callable[[str], Saved]) -> Saved:
    return models(request.param)


@pytest.fixture(scope="module")
def loaded() -> Callable[..., Any]:
    """The library's quantized models by class, folder, method and dtype, each loaded once."""
    return cache(diffusers_model)


@pytest.fixture
def theirs(model: Saved, loaded: Callable[..., Any]) -> Callable[[str, torch.dtype], Any]:
    model_class, _, source = model
    return partial(loaded, model_class, source)


def assert_is_the_librarys(output: Path, reference: Path, method: str) -> None:
    if method == "nf4-double":
        assert differing_tensors(reference, output) == []
        assert config_of(reference) == config_of(output)
    else:
        assert differing_files(reference, output) == []


@pytest.mark.parametrize(("model", "method", "dtype"), CASES, indirect=["model"])
def test_the_whole_folder_is_the_librarys_in_every_dtype(
    model: Saved, theirs: Callable[[str, torch.dtype], Any], method: str, dtype: str, tmp_path: Path
) -> None:
    _, own_dtype, source = model
    expected = theirs(method, DTYPES[dtype] or own_dtype)
    expected.save_pretrained(tmp_path / "reference")
    summary = quantized(source, tmp_path / "output", method, dtype=dtype)
    assert_is_the_librarys(tmp_path / "output", tmp_path / "reference", method)
    assert summary.footprint_after == expected.get_memory_footprint()


@pytest.mark.parametrize(("model", "method"), SOME, indirect=["model"])
def test_the_whole_folder_is_the_librarys_with_skips(model: Saved, method: str, tmp_path: Path) -> None:
    model_class, own_dtype, source = model
    skips = matching(SKIPS, source)
    assert skips
    expected = diffusers_model(model_class, source, method, own_dtype, list(skips))
    expected.save_pretrained(tmp_path / "reference")
    summary = quantized(source, tmp_path / "output", method, skips=tuple(skips))
    assert_is_the_librarys(tmp_path / "output", tmp_path / "reference", method)
    assert summary.footprint_after == expected.get_memory_footprint()


@pytest.mark.parametrize(("model", "method"), SOME, indirect=["model"])
def test_many_shards_hold_the_librarys_tensors_and_keep_a_weight_with_its_companions(
    model: Saved, theirs: Callable[[str, torch.dtype], Any], method: str, tmp_path: Path
) -> None:
    _, own_dtype, source = model
    reference, output = tmp_path / "reference", tmp_path / "output"
    theirs(method, own_dtype).save_pretrained(reference, max_shard_size="40KB")
    quantized(source, output, method, max_shard_bytes=40_000)
    assert differing_tensors(reference, output) == []
    files = list(output.glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        with safe_open(file, "pt") as shard:
            names = set(shard.keys())
        modules = {name.partition(".weight.")[0] for name in names if ".weight." in name}
        assert all(f"{module}.weight" in names for module in modules)
        assert all(name.removesuffix("SCB") + "weight" in names for name in names if name.endswith(".SCB"))


@pytest.mark.parametrize(("model", "method"), SOME, indirect=["model"])
def test_the_output_loads_without_naming_a_config_and_computes_the_same(
    model: Saved, theirs: Callable[[str, torch.dtype], Any], method: str, tmp_path: Path
) -> None:
    model_class, own_dtype, source = model
    output = tmp_path / "output"
    summary = quantized(source, output, method, max_shard_bytes=40_000)
    ours = diffusers_model(model_class, output, None, own_dtype)
    assert ours.get_memory_footprint() == summary.footprint_after
    assert torch.equal(output_of(ours), output_of(theirs(method, own_dtype)))
