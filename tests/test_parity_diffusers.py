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
from zoo import DIFFUSERS, build

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = in_turn(
    DIFFUSERS,
    [("nf4", "auto")],
    [("int8", "auto")],
    [("fp4", "auto"), ("nf4-double", "auto")],
    [(method, dtype) for dtype in ("bfloat16", "float16") for method in ("nf4", "int8")],
    [(method, dtype) for dtype in ("bfloat16", "float16") for method in ("fp4", "nf4-double")],
)
SOME = in_turn(DIFFUSERS, ["nf4", "int8"], ["fp4", "nf4-double"])
SKIPS = ["proj_out", "transformer_blocks.0", "blocks.0"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    @cache
    def saved(name: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp("source") / name
        built = build(name)
        built.save_pretrained(folder)
        return built, folder

    return saved


@pytest.fixture(params=DIFFUSERS)
def model(request: pytest.FixtureRequest, models: Callable[[str], tuple[Any, Path]]) -> tuple[Any, Path]:
    return models(request.param)


@pytest.fixture(scope="module")
def loaded() -> Callable[..., Any]:
    """The library's quantized models by class, folder, method and dtype, each loaded once."""
    return cache(diffusers_model)


@pytest.fixture
def theirs(model: tuple[Any, Path], loaded: Callable[..., Any]) -> Callable[[str, torch.dtype], Any]:
    original, source = model
    return partial(loaded, type(original), source)


def assert_is_the_librarys(output: Path, reference: Path, method: str) -> None:
    if method == "nf4-double":
        assert differing_tensors(reference, output) == []
        assert config_of(reference) == config_of(output)
    else:
        assert differing_files(reference, output) == []


@pytest.mark.parametrize(("model", "method", "dtype"), CASES, indirect=["model"])
def test_the_whole_folder_is_the_librarys_in_every_dtype(
    model: tuple[Any, Path], theirs: Callable[[str, torch.dtype], Any], method: str, dtype: str, tmp_path: Path
) -> None:
    original, source = model
    expected = theirs(method, DTYPES[dtype] or original.dtype)
    expected.save_pretrained(tmp_path / "reference")
    summary = quantized(source, tmp_path / "output", method, dtype=dtype)
    assert_is_the_librarys(tmp_path / "output", tmp_path / "reference", method)
    assert summary.footprint_after == expected.get_memory_footprint()


@pytest.mark.parametrize(("model", "method"), SOME, indirect=["model"])
def test_the_whole_folder_is_the_librarys_with_skips(model: tuple[Any, Path], method: str, tmp_path: Path) -> None:
    original, source = model
    skips = matching(SKIPS, source)
    assert skips
    expected = diffusers_model(type(original), source, method, original.dtype, list(skips))
    expected.save_pretrained(tmp_path / "reference")
    summary = quantized(source, tmp_path / "output", method, skips=tuple(skips))
    assert_is_the_librarys(tmp_path / "output", tmp_path / "reference", method)
    assert summary.footprint_after == expected.get_memory_footprint()


@pytest.mark.parametrize(("model", "method"), SOME, indirect=["model"])
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


@pytest.mark.parametrize(("model", "method"), SOME, indirect=["model"])
def test_the_output_loads_without_naming_a_config_and_computes_the_same(
    model: tuple[Any, Path], theirs: Callable[[str, torch.dtype], Any], method: str, tmp_path: Path
) -> None:
    original, source = model
    output = tmp_path / "output"
    summary = quantized(source, output, method, max_shard_bytes=40_000)
    ours = diffusers_model(type(original), output, None, original.dtype)
    assert ours.get_memory_footprint() == summary.footprint_after
    assert torch.equal(output_of(ours), output_of(theirs(method, original.dtype)))
