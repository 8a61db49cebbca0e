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
from forward import output_of
from reference import METHODS, config_of, differing_files, differing_tensors, diffusers_model
from zoo import DIFFUSERS, build

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = [
    pytest.param(method, dtype, marks=[] if dtype == "auto" or method in ("nf4", "int8") else [pytest.mark.soak])
    for method in METHODS
    for dtype in DTYPES
]
"""What 4-bit methods are given when a dtype is asked for does not depend on which of them it is."""
SKIPS = ["proj_out", "transformer_blocks.0", "blocks.0"]


@pytest.fixture(scope="module", params=DIFFUSERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("source") / request.param
    build(request.param).save_pretrained(folder)
    return build(request.param), folder


@pytest.fixture(scope="module")
def theirs(model: tuple[Any, Path]) -> Callable[[str, torch.dtype], Any]:
    """The library's quantized model by method and dtype, loaded once."""
    original, source = model
    return cache(partial(diffusers_model, type(original), source))


def assert_is_the_librarys(output: Path, reference: Path, method: str) -> None:
    if method == "nf4-double":
        assert differing_tensors(reference, output) == []
        assert config_of(reference) == config_of(output)
    else:
        assert differing_files(reference, output) == []


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_the_whole_folder_is_the_librarys_in_every_dtype(
    model: tuple[Any, Path], theirs: Callable[[str, torch.dtype], Any], method: str, dtype: str, tmp_path: Path
) -> None:
    original, source = model
    expected = theirs(method, DTYPES[dtype] or original.dtype)
    expected.save_pretrained(tmp_path / "reference")
    summary = quantized(source, tmp_path / "output", method, dtype=dtype)
    assert_is_the_librarys(tmp_path / "output", tmp_path / "reference", method)
    assert summary.footprint_after == expected.get_memory_footprint()


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_folder_is_the_librarys_with_skips(model: tuple[Any, Path], method: str, tmp_path: Path) -> None:
    original, source = model
    skips = matching(SKIPS, source)
    assert skips
    expected = diffusers_model(type(original), source, method, original.dtype, list(skips))
    expected.save_pretrained(tmp_path / "reference")
    summary = quantized(source, tmp_path / "output", method, skips=tuple(skips))
    assert_is_the_librarys(tmp_path / "output", tmp_path / "reference", method)
    assert summary.footprint_after == expected.get_memory_footprint()


@pytest.mark.parametrize("method", METHODS)
def test_many_shards_hold_the_librarys_tensors_and_keep_a_weight_with_its_companions(
    model: tuple[Any, Path], theirs: Callable[[str, torch.dtype], Any], method: str, tmp_path: Path
) -> None:
    original, source = model
    reference, output = tmp_path / "reference", tmp_path / "output"
    theirs(method, original.dtype).save_pretrained(reference, max_shard_size="40KB")
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


@pytest.mark.parametrize("method", METHODS)
def test_the_output_loads_without_naming_a_config_and_computes_the_same(
    model: tuple[Any, Path], theirs: Callable[[str, torch.dtype], Any], method: str, tmp_path: Path
) -> None:
    original, source = model
    output = tmp_path / "output"
    summary = quantized(source, output, method, max_shard_bytes=40_000)
    ours = diffusers_model(type(original), output, None, original.dtype)
    assert ours.get_memory_footprint() == summary.footprint_after
    assert torch.equal(output_of(ours), output_of(theirs(method, original.dtype)))
