"""What qz writes is what diffusers writes, where diffusers runs at all: its check for a GPU is walked around."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from converted import quantized
from reference import METHODS, config_of, differing_files, differing_tensors, diffusers_model
from zoo import DIFFUSERS, build

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
SKIPS = {"no skips": None, "skips": ["proj_out", "transformer_blocks.0"]}


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
    for dtype, torch_dtype in DTYPES.items():
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
    with torch.no_grad():
        assert torch.equal(run(ours), run(theirs))


def run(model: Any) -> torch.Tensor:
    """A forward pass on a fixed input."""
    torch.manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(model.dtype)

    time = torch.tensor([0.5, 0.5]).to(model.dtype)
    name = type(model).__name__
    if name.startswith("Flux"):
        inputs = {
            "hidden_states": noise(2, 16, 64),
            "encoder_hidden_states": noise(2, 6, 64),
            "pooled_projections": noise(2, 64),
            "timestep": time,
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(6, 3),
        }
    elif name.startswith("SD3"):
        inputs = {
            "hidden_states": noise(2, 4, 32, 32),
            "encoder_hidden_states": noise(2, 6, 64),
            "pooled_projections": noise(2, 64),
            "timestep": time,
        }
    elif name.startswith("UNet"):
        inputs = {"sample": noise(2, 4, 32, 32), "timestep": time, "encoder_hidden_states": noise(2, 6, 64)}
    elif name.startswith("Wan"):
        inputs = {
            "hidden_states": noise(2, 16, 2, 8, 8),
            "encoder_hidden_states": noise(2, 6, 64),
            "timestep": torch.tensor([1, 1]),
        }
    else:
        inputs = {
            "hidden_states": noise(2, 16, 64),
            "encoder_hidden_states": noise(2, 6, 64),
            "encoder_hidden_states_mask": torch.ones(2, 6, dtype=torch.long),
            "timestep": time,
            "img_shapes": [[(1, 4, 4)]] * 2,
        }
    output: torch.Tensor = model(**inputs, return_dict=False)[0]
    return output
