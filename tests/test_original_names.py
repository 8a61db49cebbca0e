"""Files in original names, read and written: for every class whose names qz knows, by diffusers' own converters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file, save_file

from commands import run
from converted import plan_of
from original_names import State, ltx_names, sd3_names
from qz import Unsupported, UsageError
from qz.cli.commands.quantize import quantize
from qz.cli.commands.verify import verify
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.importance.hessian_reader import HessianPlace
from qz.quantize.importance.statistics import InputSums, write_hessians, write_statistics
from qz.quantize.libraries.architecture import TensorSpec
from qz.quantize.libraries.diffusers.single_file import convert
from qz.quantize.single_files.names import LAYOUTS
from qz.quantize.single_files.originals import inverted, joined_specs, original_specs
from qz.quantize.single_files.tensors import read_original
from qz.quantize.streaming.readers import reader
from reference import differing_tensors, raw
from tiny_denoisers import READ_ONLY, SMALL, WIDE, denoiser

ROOT = Path(__file__).resolve().parent.parent
IN_FULL = ("SD3Transformer2DModel", "LTXVideoTransformer3DModel", "WanTransformer3DModel", "ZImageTransformer2DModel",
           "Flux2Transformer2DModel", "QwenImageTransformer2DModel")  # fmt: skip
"""Classes that are compared through the command; of the others, the conversion."""


def random(specs: dict[str, TensorSpec]) -> State:
    torch.manual_seed(0)
    return {name: torch.randn(spec.shape).to(getattr(torch, spec.dtype)) for name, spec in specs.items()}


def specs_of(model: torch.nn.Module) -> dict[str, TensorSpec]:
    return {name: TensorSpec("bfloat16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


class Made(NamedTuple):
    name: str
    file: Path
    folder: Path
    """What the library makes of the file."""


@pytest.fixture(scope="module", params=IN_FULL)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A file of random weights in a class's original names."""
    place, name = tmp_path_factory.mktemp(request.param), request.param
    model = denoiser(name)
    (place / "config").mkdir()
    model.save_config(place / "config")
    file = place / "original.safetensors"
    save_file(random(original_specs(name, specs_of(model), "")), file)
    loaded = getattr(diffusers, name).from_single_file(
        str(file), config=str(place / "config"), torch_dtype=torch.bfloat16
    )
    loaded.save_pretrained(place / "loaded" / "transformer", max_shard_size="100KB")
    return Made(name, file, place / "loaded" / "transformer")


def test_a_file_in_original_names_gives_the_bytes_of_from_single_file(made: Made, tmp_path: Path) -> None:
    run(quantize, made.folder, output=tmp_path / "wanted")
    report = run(quantize, made.file, config=str(made.folder), output=tmp_path / "made")
    assert differing_tensors(tmp_path / "wanted", tmp_path / "made") == []
    assert report["left_out"] == []


def test_a_folder_becomes_the_file_that_its_original_becomes(made: Made, tmp_path: Path) -> None:
    planned = run(quantize, made.folder, output=tmp_path / "made", layout="single-file", dry_run=True)
    report = run(quantize, made.folder, output=tmp_path / "made", layout="single-file")
    assert planned["bytes"] == report["bytes"]
    assert [shard["name"] for shard in report["shards"]] == ["loaded-nf4.safetensors"]
    run(quantize, made.file, config=str(made.folder), output=tmp_path / "wanted", layout="single-file")
    assert differing_tensors(tmp_path / "wanted", tmp_path / "made") == []
    assert run(verify, tmp_path / "made", against=str(made.folder))["intact"]


def lora_of(model: torch.nn.Module, path: Path) -> State:
    """A LoRA of some parts of fused layers, of one whose halves are swapped, and of others; what it makes of them."""
    torch.manual_seed(1)
    state = model.state_dict()
    lora: State = {}
    for name in (each.removesuffix(".weight") for each, tensor in state.items() if tensor.ndim == 2):
        if re.search(r"attn.*to_[qv]$|norm_out|\.ff\.", name):
            outputs, inputs = state[f"{name}.weight"].shape
            down, up = torch.randn(4, inputs) / 8, torch.randn(outputs, 4) / 8
            lora |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
            state[f"{name}.weight"] = (state[f"{name}.weight"].float() + 0.5 * (up @ down)).bfloat16()
    save_file(lora, path)
    return state


def test_a_single_file_out_has_the_loras_in_it(tmp_path: Path) -> None:
    name = "SD3Transformer2DModel"
    torch.manual_seed(0)
    model = denoiser(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model" / "transformer")
    model.load_state_dict(lora_of(model, tmp_path / "lora.safetensors"))
    model.save_pretrained(tmp_path / "merged" / "transformer")
    asked: dict[str, Any] = {
        "output": tmp_path / "made",
        "layout": "single-file",
        "lora": [f"{tmp_path}/lora.safetensors:0.5"],
    }
    report = run(quantize, tmp_path / "model" / "transformer", **asked)
    assert report["loras"][0]["weights"] == len(load_file(tmp_path / "lora.safetensors")) // 2
    run(quantize, tmp_path / "merged" / "transformer", output=tmp_path / "wanted", layout="single-file")
    found, wanted = (load_file(next((tmp_path / place).glob("*.safetensors"))) for place in ("made", "wanted"))
    assert found.keys() == wanted.keys()
    assert [key for key, tensor in found.items() if raw(tensor) != raw(wanted[key])] == []
    comfy = {
        f"model.diffusion_model.{key}": tensor
        for key, tensor in random(original_specs(name, specs_of(model), "")).items()
    }
    save_file(comfy, tmp_path / "comfy.safetensors")
    config = str(tmp_path / "model" / "transformer")
    run(quantize, tmp_path / "comfy.safetensors", **(asked | {"config": config, "output": tmp_path / "file"}))
    assert run(
        verify, tmp_path / "file", against=str(tmp_path / "comfy.safetensors"), config=config, lora=asked["lora"]
    )["intact"]
    loaded = getattr(diffusers, name).from_single_file(
        str(tmp_path / "comfy.safetensors"), config=config, torch_dtype=torch.bfloat16
    )
    loaded.save_pretrained(tmp_path / "loaded")
    run(quantize, tmp_path / "loaded", **(asked | {"output": tmp_path / "folder"}))
    found, wanted = (load_file(next((tmp_path / place).glob("*.safetensors"))) for place in ("file", "folder"))
    assert {key.removeprefix("model.diffusion_model."): raw(tensor) for key, tensor in found.items()} == {
        key: raw(tensor) for key, tensor in wanted.items()
    }


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_layers_that_are_one_in_the_file_are_refined_by_their_common_inputs(rounding: str, tmp_path: Path) -> None:
    model = denoiser("SD3Transformer2DModel").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    names = [step.weight.name for step in plan_of(tmp_path / "model", "nf4").steps if step.weight.quantized]
    shapes = {name: model.state_dict()[name].shape for name in names}
    inputs = {
        width: np.random.default_rng(width).standard_normal((64, width)).astype(np.float32)
        for _, width in shapes.values()
    }
    hessians = {width: x.T @ x for width, x in inputs.items()}
    sums = {name: InputSums(hessians[width].diagonal().copy(), 64) for name, (_, width) in shapes.items()}
    known = tmp_path / "inputs.safetensors"
    file = "inputs.hessians-00001.safetensors"
    digest = write_hessians(tmp_path / file, {str(width): each for width, each in hessians.items()})
    places = {name: HessianPlace(file, f"{width}.hessian") for name, (_, width) in shapes.items()}
    write_statistics(known, sums, {}, places, {file: digest})
    asked: dict[str, Any] = {"importance": known, "rounding": rounding}
    run(quantize, tmp_path / "model", output=tmp_path / "parts", **asked)
    run(quantize, tmp_path / "model", output=tmp_path / "made", layout="single-file", **asked)
    parts, made = (load_file(next((tmp_path / place).glob("*.safetensors"))) for place in ("parts", "made"))
    for suffix in ("", ".absmax"):
        three = [parts[f"transformer_blocks.0.attn.to_{each}.weight{suffix}"].flatten() for each in "qkv"]
        assert torch.equal(made[f"joint_blocks.0.x_block.attn.qkv.weight{suffix}"].flatten(), torch.cat(three))
    sums["transformer_blocks.0.attn.to_k.weight"] = InputSums(np.ones(64, np.float32), 64)
    write_statistics(known, sums, {}, places, {file: digest})
    with pytest.raises(
        Unsupported, match=r"attn\.qkv\.weight' is one layer in the file.* inputs of transformer_blocks"
    ):
        run(quantize, tmp_path / "model", output=tmp_path / "none", layout="single-file", **asked)


def test_8_bit_floats_are_read_where_they_are_put_together(tmp_path: Path) -> None:
    name = "SD3Transformer2DModel"
    model = denoiser(name)
    model.save_config(tmp_path / "config")
    state = random(original_specs(name, specs_of(model), ""))
    codes = {key: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for key, tensor in state.items()}
    save_file(codes, tmp_path / "fp8.safetensors")
    loaded = getattr(diffusers, name).from_single_file(
        str(tmp_path / "fp8.safetensors"), config=str(tmp_path / "config"), torch_dtype=torch.bfloat16
    )
    loaded.save_pretrained(tmp_path / "loaded")
    run(quantize, tmp_path / "loaded", output=tmp_path / "wanted")
    report = run(quantize, tmp_path / "fp8.safetensors", config=str(tmp_path / "config"), output=tmp_path / "made")
    assert differing_tensors(tmp_path / "wanted", tmp_path / "made") == []
    assert report["dtype"] == "bfloat16"


def in_scaled_8_bit_floats(state: State, form: str) -> tuple[State, State]:
    """Matrices as ComfyUI stores them, and what they stand for; as transformers' fp8 where ``form`` is blocks."""
    stored, values = dict(state), dict(state)
    for name in [name for name, tensor in state.items() if tensor.ndim == 2 and name.endswith(".weight")]:
        weight = state[name].float()
        height = 32 if form == "blocks" and weight.shape[0] % 32 == 0 else weight.shape[0]
        tall = weight.reshape(-1, height * weight.shape[1])
        scales = tall.abs().amax(1) / 448
        codes = (tall / scales[:, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        values[name] = (codes.float().reshape(tall.shape) * scales[:, None]).reshape(weight.shape)
        path = name.removesuffix("weight")
        stored[name] = codes
        if form == "blocks":
            stored[f"{name}_scale_inv"] = scales[:, None]
        elif form == "scale_weight":
            stored |= {f"{path}scale_weight": scales[0], f"{path}scale_input": torch.ones(())}
        else:
            said = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
            stored |= {f"{name}_scale": scales[0], f"{path}comfy_quant": said.clone()}
    return stored | ({"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} if form == "scale_weight" else {}), values


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("SD3Transformer2DModel", "scale_weight"),
        ("SD3Transformer2DModel", "blocks"),
        ("ZImageTransformer2DModel", "comfy_quant"),
        ("WanTransformer3DModel", "scale_weight"),
    ],
)
def test_8_bit_floats_with_scales_are_what_they_stand_for(name: str, form: str, tmp_path: Path) -> None:
    """Also where diffusers' converter would lose the scales, or splits a matrix and not its scale."""
    model = denoiser(name)
    model.save_config(tmp_path / "config")
    stored, values = in_scaled_8_bit_floats(random(original_specs(name, specs_of(model), "")), form)
    save_file(stored, tmp_path / "scaled.safetensors")
    wanted = getattr(diffusers, name).from_single_file(values, config=str(tmp_path / "config"))
    wanted.to(torch.float32).save_pretrained(tmp_path / "plain")
    config = str(tmp_path / "config")
    for layout in ("diffusers", "single-file"):
        asked: dict[str, Any] = {"layout": layout, "dtype": "bfloat16"}
        run(quantize, tmp_path / "plain", output=tmp_path / f"{layout}-wanted", **asked)
        report = run(quantize, tmp_path / "scaled.safetensors", output=tmp_path / layout, config=config, **asked)
        assert any("quantized already, with fp8" in warning for warning in report["warnings"])
    assert differing_tensors(tmp_path / "diffusers-wanted", tmp_path / "diffusers") == []
    assert differing_tensors(tmp_path / "single-file-wanted", tmp_path / "single-file") == []


def narrow(specs: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Of the true number of rows and at most two columns: converters look at rows only."""
    return {
        key: TensorSpec(spec.dtype, (*spec.shape[:1], *(min(each, 2) for each in spec.shape[1:])))
        for key, spec in specs.items()
    }


@pytest.mark.parametrize("name", [*SMALL, *WIDE, *READ_ONLY])
def test_a_conversion_is_that_of_the_library_and_its_way_back_gives_the_file(name: str, tmp_path: Path) -> None:
    with init_empty_weights():
        model = denoiser(name)
    config = dict(model.config)
    own = narrow(specs_of(model))
    if name in READ_ONLY:
        _, layout, dropped = READ_ONLY[name]
        specs = joined_specs(layout, own, "") | {key: TensorSpec("bfloat16", shape) for key, shape in dropped.items()}
    else:
        specs = original_specs(name, own, "")
    values = random(specs)
    save_file(values, tmp_path / "original.safetensors")
    convert_real = SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    wanted = convert_real(checkpoint=dict(values), config=config)
    assert set(wanted) == set(own)
    file = read_original(LocalFolder(tmp_path), "original.safetensors")
    found = convert(name, config, file.specs)
    assert set(found) == set(wanted)
    for key, each in found.items():
        stored = file.stored_as(key, each)
        read, _ = reader(file.folder, stored).read(
            0, wanted[key].numel(), "BF16", lambda _, size: np.empty(size, np.uint8)
        )
        assert stored.shape == tuple(wanted[key].shape)
        assert read.tobytes() == raw(wanted[key])
    for key, (spec, parts) in inverted(name, config, own, "").items() if name not in READ_ONLY else ():
        pieces = [wanted[part.name].flatten()[part.start : part.start + part.count] for part in parts]
        assert raw(torch.cat(pieces).reshape(spec.shape)) == raw(values[key])


def test_an_order_that_no_file_tells_is_told_of(tmp_path: Path) -> None:
    name = "MiniMaxH3Transformer3DModel"
    model = denoiser(name)
    model.save_config(tmp_path / "config")
    _, layout, dropped = READ_ONLY[name]
    specs = joined_specs(layout, specs_of(model), "")
    specs |= {key: TensorSpec("bfloat16", shape) for key, shape in dropped.items()}
    save_file(random(specs), tmp_path / "original.safetensors")
    report = run(quantize, tmp_path / "original.safetensors", config=str(tmp_path / "config"), dry_run=True)
    assert [text for text in report["warnings"] if "taken to lie one after the other" in text]


@pytest.mark.parametrize(
    ("name", "theirs"), [("SD3Transformer2DModel", sd3_names), ("LTXVideoTransformer3DModel", ltx_names)]
)
def test_the_names_are_those_of_the_original_code(name: str, theirs: Any) -> None:
    model = denoiser(name)
    assert set(original_specs(name, specs_of(model), "")) == set(theirs(model.state_dict()))


def test_flux_has_the_names_of_black_forest_labs(tmp_path: Path) -> None:
    """Of FLUX.1-dev, with one block of each kind: those of the published file."""
    with init_empty_weights():
        model = denoiser("FluxTransformer2DModel")
    found = original_specs("FluxTransformer2DModel", specs_of(model), "")
    double = [
        f"double_blocks.0.{side}_{rest}"
        for side in ("img", "txt")
        for rest in (
            "attn.norm.key_norm.scale", "attn.norm.query_norm.scale", "attn.proj.bias", "attn.proj.weight",
            "attn.qkv.bias", "attn.qkv.weight", "mlp.0.bias", "mlp.0.weight", "mlp.2.bias", "mlp.2.weight",
            "mod.lin.bias", "mod.lin.weight",
        )
    ]  # fmt: skip
    single = [
        "linear1.bias", "linear1.weight", "linear2.bias", "linear2.weight", "modulation.lin.bias",
        "modulation.lin.weight", "norm.key_norm.scale", "norm.query_norm.scale",
    ]  # fmt: skip
    inside = [f"{kind}_in.{end}_layer" for kind in ("guidance", "time", "vector") for end in ("in", "out")]
    linears = ["final_layer.adaLN_modulation.1", "final_layer.linear", "img_in", "txt_in", *inside]
    assert set(found) == {
        *double,
        *(f"single_blocks.0.{rest}" for rest in single),
        *(f"{name}.{kind}" for name in linears for kind in ("weight", "bias")),
    }
    assert found["single_blocks.0.linear1.weight"].shape == (21504, 3072)
    assert found["double_blocks.0.img_attn.qkv.weight"].shape == (9216, 3072)


def test_what_has_no_original_names_or_is_quantized_in_part_is_refused(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"output": tmp_path / "made", "layout": "single-file"}
    pipeline = tmp_path / "pipeline"
    model = denoiser("SD3Transformer2DModel")
    model.save_pretrained(pipeline / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    with pytest.raises(UsageError, match="without --double-quant"):
        run(quantize, pipeline / "transformer", double_quant=True, **asked)
    with pytest.raises(Unsupported, match="only some are quantized"):
        run(quantize, pipeline / "transformer", skip=["transformer_blocks.0.attn.to_q"], **asked)
    with pytest.raises(UsageError, match="Name its denoiser with --subfolder"):
        run(quantize, pipeline, **asked)
    small = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=32,
        num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=64,
    )  # fmt: skip
    small.save_pretrained(tmp_path / "sana")
    with pytest.raises(Unsupported, match=r"tensors of SanaTransformer2DModel is not known.*Write diffusers' layout"):
        run(quantize, tmp_path / "sana", **asked)
    assert not (tmp_path / "made").exists()


def test_the_page_of_sources_names_every_class_that_diffusers_reads_from_single_files() -> None:
    page = (ROOT / "docs" / "reference" / "sources.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+)", page, re.MULTILINE))
    assert set(rows) == set(SINGLE_FILE_LOADABLE_CLASSES)
    written = {name for name, text in rows.items() if text == "both"}
    assert written == set(LAYOUTS)
    assert {name for name, text in rows.items() if text in ("both", "read")} >= {*SMALL, *WIDE, *READ_ONLY, *IN_FULL}
