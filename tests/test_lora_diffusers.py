"""LoRAs fused into pipelines equal diffusers' own ``fuse_lora``, in whatever names they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import lycoris_values
import pipelines
from commands import run
from converted import plan_of
from qz import MalformedInput, Unsupported
from qz.cli.commands.dequantize import dequantize
from qz.cli.commands.quantize import quantize
from qz.cli.commands.verify import verify
from qz.formats.checkpoint.adapter_file import open_adapter
from qz.formats.checkpoint.survey import Checkpoint, open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.formats.tensors.safetensors_layout import encode_header, layout
from qz.quantize.adapters.changes import Changes
from qz.quantize.adapters.placement import placements
from qz.quantize.planning.fusing import fuse
from qz.quantize.planning.membership import Membership
from qz.quantize.planning.plan import Plan
from qz.quantize.planning.sources import Fused
from reference import differing_tensors, tensors_of

RANK = 4
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Of the two factors of a LoRA, by the name of what it changes."""


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.flux(tmp_path_factory.mktemp("lora") / "flux")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.sdxl(tmp_path_factory.mktemp("lora") / "sdxl")


@pytest.fixture(scope="module")
def unet_plan(sdxl: Path) -> Plan:
    return plan_of(sdxl / "unet", "nf4")


def layers(model: torch.nn.Module, within: str = "") -> Shapes:
    """Paths of a model's linears and convolutions → shapes of the two factors of a LoRA for each."""
    return {
        name: ((RANK, *weight.shape[1:]), (weight.shape[0], RANK, *[1] * (weight.ndim - 2)))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and within in name
        for weight in [module.weight]
    }


def lora(shapes: Shapes, down: str, up: str) -> dict[str, torch.Tensor]:
    found = {}
    for name, (first, second) in shapes.items():
        found[f"{name}.{down}"], found[f"{name}.{up}"] = torch.randn(first) * 0.1, torch.randn(second) * 0.1
    return found


def in_diffusers_names(pipeline: Any) -> dict[str, torch.Tensor]:
    shapes = {f"transformer.{name}": found for name, found in layers(pipeline.transformer, "blocks").items()}
    shapes |= {f"text_encoder.{name}": found for name, found in layers(pipeline.text_encoder).items()}
    return lora(shapes, "lora_A.weight", "lora_B.weight")


def in_xlabs_names(_: Any) -> dict[str, torch.Tensor]:
    place = "double_blocks.0.processor"
    shapes: Shapes = {f"{place}.qkv_lora{n}": ((RANK, 64), (192, RANK)) for n in (1, 2)}
    shapes |= {f"{place}.proj_lora{n}": ((RANK, 64), (64, RANK)) for n in (1, 2)}
    return lora(shapes, "down.weight", "up.weight")


def in_kohya_names_of_flux(pipeline: Any) -> dict[str, torch.Tensor]:
    sizes = {"attn_qkv": (64, 192), "attn_proj": (64, 64), "mlp_0": (64, 256), "mlp_2": (256, 64), "mod_lin": (64, 384)}
    shapes: Shapes = {
        f"lora_unet_double_blocks_0_{stream}_{name}": ((RANK, into), (out, RANK))
        for stream in ("img", "txt")
        for name, (into, out) in sizes.items()
    }
    for name, found in layers(pipeline.text_encoder, "layers").items():
        shapes["lora_te1_text_model_" + name.removeprefix("text_model.").replace(".", "_")] = found
    alphas = {f"{name}.alpha": torch.tensor(2.0) for name in shapes}
    return lora(shapes, "lora_down.weight", "lora_up.weight") | alphas


def in_kohya_names_of_sdxl(pipeline: Any) -> dict[str, torch.Tensor]:
    shapes = {
        f"lora_unet_{name.replace('.', '_')}": found for name, found in layers(pipeline.unet, "attentions").items()
    }
    for number, encoder in ((1, pipeline.text_encoder), (2, pipeline.text_encoder_2)):
        for name, found in layers(encoder, "layers").items():
            path = "text_model_" + name.removeprefix("text_model.").replace(".", "_")
            shapes[f"lora_te{number}_{path}"] = found
    alphas = {f"{name}.alpha": torch.tensor(1.0) for name in shapes}
    return lora(shapes, "lora_down.weight", "lora_up.weight") | alphas


def fused_by_diffusers(base: Path, file: Path, scale: float, folder: Path, dtype: torch.dtype) -> Path:
    """In float32, as qz computes, and rounded once, when all is fused."""
    pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    loadable = [name for name in pipeline._lora_loadable_modules if name in pipeline.components]
    pipeline.fuse_lora(components=loadable, lora_scale=scale)
    pipeline.unload_lora_weights()
    pipeline.to(dtype)
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("source", "names", "scale"),
    [
        ("flux", in_diffusers_names, 0.5),
        ("flux", in_kohya_names_of_flux, 1),
        ("flux", in_xlabs_names, 1),
        ("sdxl", in_kohya_names_of_sdxl, 0.7),
    ],
)
def test_every_component_has_the_bytes_of_fuse_lora(
    source: str, names: Any, scale: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(source)
    torch.manual_seed(3)
    save_file(names(DiffusionPipeline.from_pretrained(base)), tmp_path / "lora.safetensors")
    dtype = torch.bfloat16 if source == "flux" else torch.float32
    wanted = fused_by_diffusers(base, tmp_path / "lora.safetensors", scale, tmp_path / "fused", dtype)
    run(quantize, wanted, output=tmp_path / "wanted")
    report = run(quantize, base, output=tmp_path / "made", lora=[f"{tmp_path / 'lora.safetensors'}:{scale}"])
    for component in ("transformer", "unet", "text_encoder", "text_encoder_2"):
        if (base / component).is_dir():
            assert differing_tensors(tmp_path / "wanted" / component, tmp_path / "made" / component) == [], component
    assert report["loras"][0]["weights"] > 3


def test_convolutions_are_changed_to_the_last_bits_of_float32(sdxl: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(sdxl)
    torch.manual_seed(4)
    shapes = {f"lora_unet_{name.replace('.', '_')}": found for name, found in layers(pipeline.unet, "resnets").items()}
    save_file(lora(shapes, "lora_down.weight", "lora_up.weight"), tmp_path / "lora.safetensors")
    wanted = fused_by_diffusers(sdxl, tmp_path / "lora.safetensors", 1, tmp_path / "fused", torch.float32)
    run(quantize, sdxl, output=tmp_path / "made", lora=[str(tmp_path / "lora.safetensors")])
    ours, theirs = tensors_of(tmp_path / "made" / "unet"), tensors_of(wanted / "unet")
    convolutions = [name for name, tensor in theirs.items() if tensor.ndim == 4 and "resnets" in name]
    assert len(convolutions) > 3
    for name in convolutions:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_the_config_in_the_header_scales_as_diffusers_does(flux: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(flux, torch_dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "to_k", "proj_mlp"], rank_pattern={"to_k": 2},
        alpha_pattern={"to_k": 7}, init_lora_weights=False,
    )  # fmt: skip
    pipeline.transformer.add_adapter(config)
    layers = dict(peft.get_peft_model_state_dict(pipeline.transformer))
    pipeline.save_lora_weights(
        tmp_path / "lora", transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
    )
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    run(quantize, fused_by_diffusers(flux, file, 1, tmp_path / "fused", torch.bfloat16), output=tmp_path / "wanted")
    run(quantize, flux, output=tmp_path / "made", lora=[str(tmp_path / "lora")])
    assert differing_tensors(tmp_path / "wanted" / "transformer", tmp_path / "made" / "transformer") == []


def test_one_component_takes_its_lora_and_refuses_what_belongs_to_another(flux: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    both = in_diffusers_names(DiffusionPipeline.from_pretrained(flux))
    save_file(both, tmp_path / "both.safetensors")
    save_file({n: t for n, t in both.items() if n.startswith("transformer.")}, tmp_path / "one.safetensors")
    whole = run(quantize, flux, output=tmp_path / "whole", lora=[str(tmp_path / "one.safetensors")])
    one = run(
        quantize, flux, output=tmp_path / "one", subfolder="transformer", lora=[str(tmp_path / "one.safetensors")]
    )
    alone = run(quantize, flux / "transformer", output=tmp_path / "alone", lora=[str(tmp_path / "one.safetensors")])
    assert whole["loras"] == one["loras"] == alone["loras"]
    for name in ("one", "alone"):
        assert differing_tensors(tmp_path / "whole" / "transformer", tmp_path / name) == []
    with pytest.raises(MalformedInput, match="They belong to text_encoder; what is converted here is transformer"):
        run(quantize, flux, subfolder="transformer", lora=[str(tmp_path / "both.safetensors")], dry_run=True)


def test_a_quantized_pipeline_is_dequantized_with_its_lora_and_small_components_are_changed_too(
    flux: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    save_file(in_diffusers_names(DiffusionPipeline.from_pretrained(flux)), tmp_path / "lora.safetensors")
    run(quantize, flux, output=tmp_path / "base")
    run(dequantize, tmp_path / "base", output=tmp_path / "plain")
    fused_by_diffusers(tmp_path / "plain", tmp_path / "lora.safetensors", 1, tmp_path / "wanted", torch.bfloat16)
    run(dequantize, tmp_path / "base", output=tmp_path / "made", lora=[str(tmp_path / "lora.safetensors")])
    for component in ("transformer", "text_encoder", "text_encoder_2"):
        assert differing_tensors(tmp_path / "wanted" / component, tmp_path / "made" / component) == []
    again = {"against": str(tmp_path / "base"), "lora": [str(tmp_path / "lora.safetensors")]}
    assert run(verify, tmp_path / "made", **again)["intact"]


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({"transformer.nothing.lora_A.weight": (4, 64), "transformer.nothing.lora_B.weight": (64, 4)}, MalformedInput,
         "there is no 'nothing.weight'"),
        ({"lora_unet_nothing.lora_down.weight": (4, 64), "lora_unet_nothing.lora_up.weight": (64, 4)}, MalformedInput,
         "'lora_unet_nothing'"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 32),
          "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": (64, 4)},
         MalformedInput, r"\[64, 32\].*\[64, 64\]"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 64),
          "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": (64, 4), "transformer.norm.weight": (64,)},
         MalformedInput, "'transformer.norm.weight'"),
        ({"transformer.x.weight": (4, 4)}, Unsupported, "is not a LoRA"),
    ],
)  # fmt: skip
def test_what_belongs_nowhere_is_named(
    flux: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], error: type[Exception], words: str
) -> None:
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(error, match=words):
        run(quantize, flux, output=tmp_path / "made", lora=[str(tmp_path / "lora.safetensors")])
    assert not (tmp_path / "made").exists()


def wide_flux(folder: Path) -> Checkpoint:
    """A FLUX of one layer each with the real widths, of which only the header is there."""
    folder.mkdir()
    with init_empty_weights():
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    model.save_config(folder)
    tensors = layout((name, "BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items())
    header = encode_header(tensors)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + tensors[-1].stop)
    return open_checkpoint(LocalFolder(folder))


@pytest.mark.parametrize("kind", ["kohya", "original names", "LoHa", "LoKr"])
def test_fused_layers_of_the_original_names_are_split_over_those_of_diffusers(tmp_path: Path, kind: str) -> None:
    """The rows of one change of ``linear1`` go to q, k, v and the MLP, whatever the change is made of."""
    checkpoint = wide_flux(tmp_path / "flux")
    torch.manual_seed(5)
    out, into = 3 * 3072 + 12288, 3072
    if kind in ("LoHa", "LoKr"):
        stem, alpha = "lora_unet_single_blocks_0_linear1", torch.tensor(2.0)
        if kind == "LoHa":
            parts = {f"hada_w{n}_{s}": torch.randn((out, 2) if s == "a" else (2, into)) for n in "12" for s in "ab"}
            one, two = parts["hada_w1_a"] @ parts["hada_w1_b"], parts["hada_w2_a"] @ parts["hada_w2_b"]
            wanted = one * two
        else:
            parts = {
                "lokr_w1": torch.randn(4, 4),
                "lokr_w2_a": torch.randn(out // 4, 2),
                "lokr_w2_b": torch.randn(2, into // 4),
            }
            wanted = torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
        tensors = {f"{stem}.{name}": value for name, value in parts.items()} | {f"{stem}.alpha": alpha}
    else:
        down, up = torch.randn(2, into), torch.randn(out, 2)
        wanted = up @ down
        if kind == "kohya":
            stem = "lora_unet_single_blocks_0_linear1"
            tensors = {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": torch.tensor(2.0),
            }
        else:
            stem = "diffusion_model.single_blocks.0.linear1"
            tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    plan = plan_of(tmp_path / "flux", "nf4")
    adapter = open_adapter(LocalFolder(tmp_path), "lora.safetensors", "lora.safetensors", 1.0)
    placed = placements(adapter, {"transformer": checkpoint}, "FluxPipeline")
    assert sorted(each.path.rpartition(".")[2] for each in placed) == ["proj_mlp", "to_k", "to_q", "to_v"]
    planned = fuse(plan, [adapter], Membership("transformer", "FluxPipeline"))
    changed = {step.name: step.sources[0] for step in planned.steps}
    start = 0
    for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        source = changed[f"single_transformer_blocks.0.{name}.weight"]
        assert isinstance(source, Fused)
        rows = torch.zeros(64, into).numpy()
        Changes(source.changes, into).apply(rows, 128, lambda _, nbytes: np.empty(nbytes, np.uint8))
        torch.testing.assert_close(torch.from_numpy(rows), wanted[start + 128 : start + 192], rtol=1e-4, atol=1e-4)
        start += source.shape[0]
    assert start == out


def weight_with(plan: Plan, name: str, base: torch.Tensor) -> torch.Tensor:
    """``base`` with what the plan fuses into the tensor of this name."""
    [source] = next(step.sources for step in plan.steps if step.name == name)
    assert isinstance(source, Fused)
    rows = base.clone().reshape(len(base), -1)
    Changes(source.changes, rows.shape[1]).apply(rows.numpy(), 0, lambda _, nbytes: np.empty(nbytes, np.uint8))
    return rows.reshape(base.shape)


@pytest.mark.parametrize(
    ("prefix", "case"),
    [
        *(("lycoris", case) for case in lycoris_values.CASES),
        *(("lora_unet", case) for case in ("lora", "loha", "lokr")),
    ],
)
def test_every_kind_of_lycoris_gives_the_weight_that_it_computes(
    unet_plan: Plan, tmp_path: Path, case: str, prefix: str
) -> None:
    known = load_file(lycoris_values.FILE)
    parts = {name.split("|")[1]: tensor for name, tensor in known.items() if name.startswith(f"{case}|lycoris_")}
    save_file({name.replace("lycoris", prefix, 1): part for name, part in parts.items()}, tmp_path / "x.safetensors")
    for what, scale in (("whole", 1.0), ("half", 0.5)):
        adapter = open_adapter(LocalFolder(tmp_path), "x.safetensors", "x.safetensors", scale)
        changed = fuse(unet_plan, [adapter], Membership("unet", "StableDiffusionXLPipeline"))
        for path, shape in lycoris_values.LAYERS.items():
            ours = weight_with(changed, f"{path}.weight", lycoris_values.layer(shape))
            torch.testing.assert_close(ours, known[f"{case}|{path}|{what}"], rtol=1e-5, atol=2e-6)


def test_norms_and_biases_are_changed_by_their_differences(sdxl: Path, tmp_path: Path) -> None:
    torch.manual_seed(6)
    stem, path = "lycoris_down_blocks_0_resnets_0_norm1", "down_blocks.0.resnets.0.norm1"
    tensors = tensors_of(sdxl / "unet")
    changes = {f"{stem}.w_norm": torch.randn(8), f"{stem}.b_norm": torch.randn(8)}
    changes |= {"lycoris_conv_in.diff": torch.randn(8, 4, 3, 3), "lycoris_conv_in.diff_b": torch.randn(8)}
    save_file(changes, tmp_path / "lora.safetensors")
    run(quantize, sdxl, output=tmp_path / "made", lora=[f"{tmp_path / 'lora.safetensors'}:0.5"])
    made = tensors_of(tmp_path / "made" / "unet")
    places = {f"{path}.weight": f"{stem}.w_norm", f"{path}.bias": f"{stem}.b_norm"}
    places |= {"conv_in.weight": "lycoris_conv_in.diff", "conv_in.bias": "lycoris_conv_in.diff_b"}
    for name, part in places.items():
        torch.testing.assert_close(made[name], tensors[name] + 0.5 * changes[part])


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        (("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"), "GLoRA"),
        (("oft_blocks", "alpha"), "OFT or BOFT"),
        (("weight", "on_input"), "IA³"),
        (("lora_down.weight", "lora_up.weight", "reshape_weight"), "gives a weight another shape"),
    ],
)
def test_what_is_no_sum_with_the_weight_is_refused_by_its_kind(
    sdxl: Path, tmp_path: Path, parts: tuple[str, ...], kind: str
) -> None:
    save_file({f"lycoris_conv_in.{part}": torch.ones(4, 4) for part in parts}, tmp_path / "lora.safetensors")
    with pytest.raises(Unsupported, match=f"{kind} .*Merge it into the model with the program that trained it"):
        run(quantize, sdxl, lora=[str(tmp_path / "lora.safetensors")], dry_run=True)


def test_norms_of_the_inputs_of_a_part_of_a_layer_are_not_known(tmp_path: Path) -> None:
    wide_flux(tmp_path / "flux")
    stem, out, into = "lora_unet_single_blocks_0_linear1", 3 * 3072 + 12288, 3072
    parts = {"lora_down.weight": torch.ones(2, into), "lora_up.weight": torch.ones(out, 2)}
    parts["dora_scale"] = torch.ones(1, into)
    save_file({f"{stem}.{name}": part for name, part in parts.items()}, tmp_path / "lora.safetensors")
    adapter = open_adapter(LocalFolder(tmp_path), "lora.safetensors", "lora.safetensors", 1.0)
    with pytest.raises(Unsupported, match="those of the whole are not known"):
        fuse(plan_of(tmp_path / "flux", "nf4"), [adapter], Membership("transformer", "FluxPipeline"))
