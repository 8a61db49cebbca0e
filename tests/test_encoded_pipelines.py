"""Components of diffusers pipelines that are stored in fp8: quantized, dequantized, or kept as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pipelines
from encoded import State, rewritten
from qz.api import dequantize, inspect, quantize
from qz.quantize.inspection.pipeline import PipelineInspection
from reference import tensors_of


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, State]]:
    """A pipeline whose transformer (scaled, as ComfyUI does) and second text encoder are in fp8; the plain states."""
    folder = pipelines.flux(tmp_path_factory.mktemp("flux") / "flux")
    plain: dict[str, State] = {}

    def change(state: State, part: str) -> None:
        expected = plain[part] = {}
        for name, weight in list(state.items()):
            expected[name] = weight
            if weight.ndim == 2 and name.endswith(".weight") and "embed" not in name:
                scale = weight.float().abs().amax() / 448
                state[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
                state[f"{name.removesuffix('weight')}scale_weight"] = scale
                expected[name] = (state[name].float() * scale).to(weight.dtype)

    for part in ("transformer", "text_encoder_2"):
        for file in (folder / part).glob("*.bin"):
            file.unlink()
        moved = (folder / part).rename(folder.parent / part)
        whole: State = {}
        for file in [*moved.glob("*.safetensors"), *moved.glob("*.index.json")]:
            whole |= load_file(file) if file.suffix == ".safetensors" else {}
            file.unlink()
        stem = "diffusion_pytorch_model" if part == "transformer" else "model"
        save_file(whole, moved / f"{stem}.safetensors", {"format": "pt"})
        rewritten(moved, folder / part, lambda state, part=part: change(state, part))  # type: ignore[misc]
    return folder, plain


def test_dequantizing_the_pipeline_gives_the_plain_components(
    flux: tuple[Path, dict[str, State]], tmp_path: Path
) -> None:
    folder, plain = flux
    summary = dequantize(folder, tmp_path / "output", device="cpu").as_json()
    methods = {each["name"]: each["method"] for each in summary["components"] if each["method"] != "none"}
    assert methods == {"transformer": "fp8", "text_encoder_2": "fp8"}
    for part, expected in plain.items():
        found = tensors_of(tmp_path / "output" / part)
        assert {name for name, tensor in found.items() if not tensor.equal(expected[name])} == set()
        assert found.keys() <= expected.keys()


def test_quantizing_the_pipeline_quantizes_what_it_stands_for(
    flux: tuple[Path, dict[str, State]], tmp_path: Path
) -> None:
    folder, _ = flux
    dequantize(folder, tmp_path / "plain", device="cpu")
    for name, source in (("ours", folder), ("reference", tmp_path / "plain")):
        quantize(source, tmp_path / name, components=["transformer"], device="cpu")
    ours = load_file(next((tmp_path / "ours/transformer").glob("*.safetensors")))
    reference = load_file(next((tmp_path / "reference/transformer").glob("*.safetensors")))
    assert ours.keys() == reference.keys()
    assert all(tensor.equal(reference[name]) for name, tensor in ours.items())
    config = json.loads((tmp_path / "ours/transformer/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    # What is not asked for stays as it is, in fp8.
    for file in (folder / "text_encoder_2").glob("*.safetensors"):
        assert (tmp_path / "ours/text_encoder_2" / file.name).read_bytes() == file.read_bytes()


def test_inspect_names_the_form_of_each_component(flux: tuple[Path, dict[str, State]]) -> None:
    found = inspect(flux[0])
    assert isinstance(found, PipelineInspection)
    methods = {
        each.name: each.model.quantization.method
        for each in found.components
        if each.model is not None and each.model.quantization is not None
    }
    assert methods == {"transformer": "fp8", "text_encoder_2": "fp8"}
