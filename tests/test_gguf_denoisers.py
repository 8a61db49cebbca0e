"""Diffusion models in GGUF, as for ComfyUI: the values of the gguf package, in diffusers' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from commands import run
from full_checkpoints import sd15, sd15_file
from hub_server import connected
from qz import MalformedInput, Unsupported
from qz.api import inspect
from qz.cli.commands.dequantize import dequantize
from qz.cli.commands.quantize import quantize
from qz.cli.commands.verify import verify
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.libraries.architecture import TensorSpec
from qz.quantize.libraries.diffusers.tracing import Converted, Piece
from qz.quantize.single_files.originals import original_specs
from qz.quantize.single_files.tensors import read_original
from qz.quantize.streaming.readers import reader
from reference import differing_tensors, raw, tensors_of
from tiny_denoisers import denoiser

State = dict[str, torch.Tensor]


def write_gguf(path: Path, state: State, kind: str, shapes: dict[str, list[int]] | None = None) -> State:
    """A file with matrices of ``kind`` where they have whole blocks, as ComfyUI's converter writes it; its values."""
    writer = gguf.GGUFWriter(path, "flux")
    values: State = {}
    for name, tensor in state.items():
        own = Type[kind if tensor.ndim == 2 and tensor.shape[-1] % 32 == 0 else "F16" if tensor.ndim > 1 else "F32"]
        stored = gguf.quants.quantize(tensor.float().numpy(), own)
        writer.add_tensor(name, stored, raw_dtype=own)
        values[name] = torch.from_numpy(np.ascontiguousarray(gguf.dequantize(stored, own), np.float32))
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def original(name: str) -> State:
    """Random weights of a class in its original names."""
    torch.manual_seed(0)
    model = denoiser(name)
    specs = original_specs(
        name, {key: TensorSpec("float32", tuple(t.shape)) for key, t in model.state_dict().items()}, ""
    )
    return {key: torch.randn(spec.shape) for key, spec in specs.items()}


@pytest.mark.parametrize(
    ("name", "kind", "prefix"),
    [
        ("SD3Transformer2DModel", "Q8_0", "model.diffusion_model."),
        ("WanTransformer3DModel", "Q5_1", ""),  # whose 3-D convolution has five dimensions
        ("ZImageTransformer2DModel", "BF16", ""),
        ("AuraFlowTransformer2DModel", "Q4_0", ""),
    ],
)
def test_a_denoiser_in_gguf_has_the_values_of_the_package_in_diffusers_layout(
    name: str, kind: str, prefix: str, tmp_path: Path
) -> None:
    file, config = tmp_path / "tiny.gguf", tmp_path / "config"
    values = write_gguf(file, {prefix + key: tensor for key, tensor in original(name).items()}, kind)
    denoiser(name).save_config(config)
    model_class = getattr(diffusers, name)
    wanted = model_class.from_single_file(values, config=str(config)).state_dict()
    report = run(dequantize, file, config=str(config), output=tmp_path / "made", dtype="float32")
    assert report["left_out"] == []
    assert (report["source"]["architecture"], report["method"]) == (name, "gguf")
    found = tensors_of(tmp_path / "made")
    assert found.keys() == wanted.keys()
    assert [key for key, tensor in found.items() if raw(tensor) != raw(wanted[key].contiguous())] == []
    how = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    theirs = model_class.from_single_file(str(file), config=str(config), quantization_config=how)
    for key, tensor in theirs.state_dict().items():  # which the library computes in float16
        assert torch.allclose(dequantize_gguf_tensor(tensor).float(), found[key], rtol=2**-9, atol=2**-9)


def test_quantizing_a_denoiser_in_gguf_is_quantizing_what_it_stands_for(tmp_path: Path) -> None:
    name = "SD3Transformer2DModel"
    folder, config = tmp_path / "files", tmp_path / "config"
    folder.mkdir()
    denoiser(name).save_config(config)
    for kind in ("Q4_0", "Q8_0"):
        values = write_gguf(folder / f"tiny-{kind}.gguf", original(name), kind)
    save_file(values, tmp_path / "tiny-Q8_0.safetensors")
    for layout in ("diffusers", "single-file"):
        asked: dict[str, Any] = {"config": str(config), "layout": layout, "dtype": "bfloat16"}
        run(quantize, tmp_path / "tiny-Q8_0.safetensors", output=tmp_path / f"{layout}-wanted", **asked)
        asked |= {"file": "tiny-Q8_0.gguf", "output": tmp_path / layout}
        planned = run(quantize, folder, **asked, dry_run=True)
        report = run(quantize, folder, **asked)
        assert planned["bytes"] == report["bytes"]
        assert report["warnings"] == ["the source is quantized already, with gguf: its values were computed from that"]
        assert differing_tensors(tmp_path / f"{layout}-wanted", tmp_path / layout) == []
        assert run(verify, tmp_path / layout, against=str(folder), config=str(config))["intact"]
    found = inspect(folder / "tiny-Q8_0.gguf")
    assert (found.source.library, found.quantization and found.quantization.method) == ("diffusers", "gguf")
    with pytest.raises(Unsupported, match=r"holds a diffusion model in GGUF.*--file tiny-Q4_0\.gguf, .*--config"):
        run(quantize, folder, variant="Q4_0", output=tmp_path / "none")


def test_one_of_the_files_of_a_repository_is_read_with_the_config_of_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "SD3Transformer2DModel"
    denoiser(name).save_config(tmp_path / "config")
    write_gguf(tmp_path / "tiny-Q8_0.gguf", original(name), "Q8_0")
    asked: dict[str, Any] = {"dtype": "bfloat16"}
    with connected(monkeypatch, tmp_path / "home", xet=False) as hub:
        files: dict[str, Path | bytes] = {"tiny-Q8_0.gguf": tmp_path / "tiny-Q8_0.gguf", "deep/tiny-Q4_0.gguf": b"GGUF"}
        hub.add("me/files", files)
        hub.add("me/model", {"transformer/config.json": tmp_path / "config" / "config.json"})
        file = "tiny-Q8_0.gguf"
        run(quantize, "me/files", file=file, config="me/model", output=tmp_path / "made", **asked)
        with pytest.raises(MalformedInput, match=r"deep/tiny-Q4_0\.gguf is not a valid GGUF file"):
            run(quantize, "me/files", file="deep/tiny-Q4_0.gguf", config="me/model", output=tmp_path / "none", **asked)
    run(quantize, tmp_path / file, config=str(tmp_path / "config"), output=tmp_path / "wanted", **asked)
    assert differing_tensors(tmp_path / "wanted", tmp_path / "made") == []


def test_a_whole_pipeline_in_gguf_becomes_its_folder(tmp_path: Path) -> None:
    pipeline = sd15(tmp_path / "pipeline")
    state = load_file(sd15_file(pipeline, tmp_path / "pipeline.safetensors"))
    values = write_gguf(tmp_path / "tiny.gguf", state, "Q8_0")
    save_file(values, tmp_path / "wanted.safetensors")
    asked: dict[str, Any] = {"config": str(tmp_path / "pipeline"), "dtype": "bfloat16"}
    run(quantize, tmp_path / "wanted.safetensors", output=tmp_path / "wanted", **asked)
    run(quantize, tmp_path / "tiny.gguf", output=tmp_path / "made", **asked)
    for component in ("unet", "vae", "text_encoder"):
        assert differing_tensors(tmp_path / "wanted" / component, tmp_path / "made" / component) == []


def test_shapes_that_were_changed_to_fit_blocks_are_those_of_the_model(tmp_path: Path) -> None:
    name, key = "SD3Transformer2DModel", "x_embedder.proj.weight"
    state, file = original(name), tmp_path / "tiny.gguf"
    shape = list(state[key].shape)
    asked: dict[str, Any] = {"config": str(tmp_path / "config"), "dtype": "float32"}
    denoiser(name).save_config(tmp_path / "config")
    state[key] = state[key].reshape(-1, 32)
    values = write_gguf(file, state, "Q8_0", {key: shape})
    run(dequantize, file, output=tmp_path / "made", **asked)
    assert torch.equal(tensors_of(tmp_path / "made")["pos_embed.proj.weight"], values[key].reshape(shape))
    write_gguf(file, state, "Q8_0", {key: [*shape, 2]})
    with pytest.raises(MalformedInput, match=r"x_embedder\.proj\.weight' does not have as many values"):
        run(dequantize, file, output=tmp_path / "none", **asked)


def test_values_are_put_together_from_whole_blocks_only(tmp_path: Path) -> None:
    """Of several tensors, of different types, too; nothing that diffusers reads today needs it."""
    values = write_gguf(tmp_path / "tiny.gguf", {"a": torch.randn(3, 32), "b": torch.randn(96)}, "Q8_0")
    file = read_original(LocalFolder(tmp_path), "tiny.gguf")

    def read(*pieces: Piece) -> bytes:
        made = Converted((sum(piece.count for piece in pieces),), "float32", pieces)
        stored = file.stored_as("made", made)
        found, _ = reader(file.folder, stored).read(0, made.shape[0], "F32", lambda _, size: np.empty(size, np.uint8))
        return found.tobytes()

    wanted = torch.cat([values["b"][32:64], values["a"].flatten()[64:], values["a"].flatten()[:32]])
    assert read(Piece("b", 32, 32), Piece("a", 64, 32), Piece("a", 0, 32)) == raw(wanted)
    for pieces in ([Piece("a", 16, 32)], [Piece("a", 0, 32), Piece("b", 0, 16)]):
        with pytest.raises(Unsupported, match="block"):
            read(*pieces)
