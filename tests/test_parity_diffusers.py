"""What qz writes is what diffusers writes, where diffusers runs at all: its check for a GPU is walked around."""

from __future__ import annotations

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
SKIPS = {"no skips": None, "skips": ["proj_out", "transformer_blocks.0", "blocks.0"]}


@pytest.fixture(scope="module", params=DIFFUSERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("source") / request.param
    build(request.param).save_pretrained(folder)
    return build(request.param), folder


@pytest.mark.parametrize("skips", SKIPS.values(), ids=list(SKIPS))
@pytest.mark.parametrize("method", METHODS)
def test_the_whole_folder_is_the_librarys_in_every_dtype(
    model: tuple[Any, Path], method: str, skips: list[str] | None, tmp_path: Path
) -> None:
    original, source = model
    if skips:
        skips = matching(skips, source)
        assert skips
    for dtype, torch_dtype in DTYPES.items() if skips is None else [("auto", None)]:
        reference, output = tmp_path / f"reference-{dtype}", tmp_path / f"output-{dtype}"
        theirs = diffusers_model(
            type(original), source, method, torch_dtype or original.dtype, list(skips or ()) or None
        )
        theirs.save_pretrained(reference)
        summary = quantized(source, output, method, dtype=dtype, skips=tuple(skips or ()))
        if method == "nf4-double":
            assert differing_tensors(reference, output) == []
            assert config_of(reference) == config_of(output)
        else:
            assert differing_files(reference, output) == []
        assert summary.footprint_after == theirs.get_memory_footprint()


@pytest.mark.parametrize("method", METHODS)
def test_many_shards_hold_the_librarys_tensors_and_keep_a_weight_with_its_companions(
    model: tuple[Any, Path], method: str, tmp_path: Path
) -> None:
    original, source = model
    reference, output = tmp_path / "reference", tmp_path / "output"
    diffusers_model(type(original), source, method, original.dtype).save_pretrained(reference, max_shard_size="40KB")
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
    model: tuple[Any, Path], method: str, tmp_path: Path
) -> None:
    original, source = model
    output = tmp_path / "output"
    summary = quantized(source, output, method, max_shard_bytes=40_000)
    theirs = diffusers_model(type(original), source, method, original.dtype)
    ours = diffusers_model(type(original), output, None, original.dtype)
    assert ours.get_memory_footprint() == summary.footprint_after
    assert torch.equal(output_of(ours), output_of(theirs))
