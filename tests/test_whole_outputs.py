"""An output has all that the source's loaders read; what it has not is told, and advice works as given."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import pipelines
import qz
import reference
from commands import contents, run
from qz import MalformedInput, MissingInput, Unsupported, api
from qz.cli.commands.dequantize import dequantize
from qz.cli.commands.quantize import quantize
from qz.formats.checkpoint.other_contents.original_layouts import original_layout
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output import companions, file_names
from qz.quantize.inspection.pipeline import PipelineInspection
from reference import config_of
from whole_zoo.transformers_cases import small_models

LLAMA = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
         "num_attention_heads": 4}  # fmt: skip


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def with_two_nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nets") / "source"
    tokenizer = pipelines.clip_tokenizer(folder.with_name("clip-files"))
    net = unet()
    StableDiffusionControlNetPipeline(
        vae=pipelines.vae(),
        text_encoder=pipelines.clip(tokenizer, 32, projected=False),
        tokenizer=tokenizer,
        unet=net,
        controlnet=[ControlNetModel.from_unet(net) for _ in range(3)],
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.flux(tmp_path_factory.mktemp("flux") / "source")


@pytest.fixture
def pipeline(flux: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(flux, tmp_path / "source"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama") / "source"
    LlamaForCausalLM(LlamaConfig(**LLAMA)).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "source"))


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- pipelines --------------------------------------------------------------------------------------------------------
def test_nets_that_follow_the_one_in_the_index_go_along_and_are_quantized_like_it(
    with_two_nets: Path, tmp_path: Path
) -> None:
    chosen = ["controlnet=nf4", "unet=none"]
    report = run(quantize, with_two_nets, output=tmp_path / "out", component=chosen)
    methods = {part["name"]: part["method"] for part in report["components"]}
    assert methods["controlnet"] == methods["controlnet_1"] == methods["controlnet_2"] == "nf4"
    for name in ("controlnet", "controlnet_1", "controlnet_2"):
        method = reference.diffusers_model(ControlNetModel, with_two_nets / name, "nf4", torch.float32)
        method.save_pretrained(tmp_path / "theirs" / name)
        assert not reference.differing_tensors(tmp_path / "out" / name, tmp_path / "theirs" / name)
    nets = qz.load(tmp_path / "out", device="cpu").controlnet.nets
    assert [any(type(each) is Linear4bit for each in net.modules()) for net in nets] == [True] * 3
    found = api.inspect(tmp_path / "out")
    assert isinstance(found, PipelineInspection)
    assert {"controlnet", "controlnet_1", "controlnet_2"} <= {part.name for part in found.components}
    assert not found.problems
    run(dequantize, tmp_path / "out", output=tmp_path / "back")
    assert len(DiffusionPipeline.from_pretrained(tmp_path / "back").controlnet.nets) == 3


def test_a_follower_may_have_a_method_of_its_own(with_two_nets: Path, tmp_path: Path) -> None:
    chosen = ["controlnet=int8", "controlnet_2=none"]
    report = run(quantize, with_two_nets, output=tmp_path / "out", component=chosen, dry_run=True)
    methods = {part["name"]: part["method"] for part in report["components"]}
    assert (methods["controlnet"], methods["controlnet_1"], methods["controlnet_2"]) == ("int8", "int8", "none")


def test_a_config_beside_the_index_does_not_make_it_one_model(pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "config.json").write_text('{"model_type": "cosmos3_omni", "architectures": ["Cosmos3"]}')
    report = run(quantize, pipeline, output=tmp_path / "out", dry_run=True)
    assert report["source"]["architecture"] == "FluxPipeline"
    assert "config.json" in report["left_out"]


def test_the_other_half_of_a_pipeline_which_only_its_card_names_is_told(pipeline: Path, tmp_path: Path) -> None:
    rewrite(pipeline / "model_index.json", _class_name="KandinskyV22Pipeline")
    (pipeline / "README.md").write_text("---\nlicense: other\nprior:\n- big/prior\n---\n# Half a pipeline\n")
    report = run(quantize, pipeline, output=tmp_path / "out", dry_run=True)
    assert any("loads big/prior, too" in warning for warning in report["warnings"])


def test_a_component_says_which_pipeline_it_is_of(pipeline: Path, tmp_path: Path) -> None:
    report = run(quantize, pipeline, output=tmp_path / "out", subfolder="transformer", dry_run=True)
    assert report["source"]["pipeline"] == "FluxPipeline"


def test_what_is_left_out_of_a_pipeline_is_told(pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline / "vae", pipeline / "vae_old")
    report = run(quantize, pipeline, output=tmp_path / "out", dry_run=True)
    assert {"pipeline.py", "flux1-dev.safetensors", "vae_old/", "vae/diffusion_pytorch_model.bin"} <= set(
        report["left_out"]
    )
    assert any("vae_old/ holds a model that model_index.json does not name" in text for text in report["warnings"])


def test_all_settings_of_a_component_without_weights_go_along(pipeline: Path, tmp_path: Path) -> None:
    settings = pipeline / "scheduler" / "sigmas_of_tomorrow.json"
    settings.write_text("[1.0, 0.5]")
    run(quantize, pipeline, output=tmp_path / "out")
    assert (tmp_path / "out" / "scheduler" / settings.name).read_bytes() == settings.read_bytes()


def test_every_settings_file_that_diffusers_knows_goes_along() -> None:
    import diffusers

    root = Path(diffusers.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
    names = set(re.findall(r"""(?:config_name|CONFIG_NAME) = ["']([\w.]+\.json)["']""", text))
    assert {"guider_config.json", "mel_config.json", "scheduler_config.json"} <= names
    known = (file_names.CONFIGS, file_names.SETTINGS)
    assert not {name for name in names if not any(pattern.fullmatch(name) for pattern in known)} - {
        "modular_model_index.json",
        "model_index.json",
    }


def test_a_dtype_holds_for_every_component_as_torch_dtype_does(pipeline: Path, tmp_path: Path) -> None:
    report = run(quantize, pipeline, output=tmp_path / "out", dtype="float16")
    DiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float16).save_pretrained(tmp_path / "theirs")
    for part in ("vae", "text_encoder"):
        (name,) = [file.name for file in (tmp_path / "theirs" / part).glob("*.safetensors")]
        ours: dict[str, torch.Tensor] = {}
        for file in (tmp_path / "out" / part).glob("*.safetensors"):
            ours |= load_file(file)
        theirs = load_file(tmp_path / "theirs" / part / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[each], theirs[each]) and ours[each].dtype == torch.float16 for each in ours)
    told = {part["name"]: part for part in report["components"]}
    assert told["vae"]["dtype"] == "float16"
    assert "cast to float16" in told["vae"]["reason"]


def test_what_a_cast_leaves_out_or_makes_infinite_is_told(pipeline: Path, tmp_path: Path) -> None:
    (file,) = (pipeline / "vae").glob("*.safetensors")
    stored = load_file(file)
    name = next(each for each, tensor in stored.items() if tensor.ndim == 4)
    stored[name] = stored[name].float()
    stored[name].view(-1)[:3] = 1e6
    save_file(stored | {"of.no.use": torch.zeros(4)}, file, {"format": "pt"})
    report = run(quantize, pipeline, output=tmp_path / "out", dtype="float16")
    assert {"name": f"vae/{name}", "stored": 0, "overflowed": 3} in report["nonfinite"]
    (infinite,) = [text for text in report["warnings"] if "became infinite" in text]
    assert infinite.startswith("vae: ")
    assert f"3 in {name}" in infinite
    assert any(text.startswith("vae: ") and "of.no.use" in text for text in report["warnings"])


def test_a_component_that_needs_no_weights_or_that_nobody_knows_stops_no_pipeline(
    pipeline: Path, tmp_path: Path
) -> None:
    rewrite(pipeline / "model_index.json", safety_checker=["diffusers", "SafetyCheckerOfTomorrow"])
    (pipeline / "safety_checker").mkdir()
    (pipeline / "safety_checker" / "config.json").write_text('{"_class_name": "SafetyCheckerOfTomorrow"}')
    report = run(quantize, pipeline, output=tmp_path / "out")
    assert any("safety_checker is kept as it is" in text for text in report["warnings"])
    assert contents(tmp_path / "out" / "safety_checker") == contents(pipeline / "safety_checker")
    assert not api.inspect(tmp_path / "out").errors


def test_a_component_that_lacks_the_weights_of_its_class_does(pipeline: Path, tmp_path: Path) -> None:
    for file in (pipeline / "vae").iterdir():
        if file.name != "config.json":
            file.unlink()
    with pytest.raises(MissingInput, match="diffusion_pytorch_model"):
        run(quantize, pipeline, output=tmp_path / "out")


@pytest.mark.parametrize("name", ["controlnet", "controlnet_1"])
def test_one_of_several_nets_that_lacks_its_weights_does(name: str, with_two_nets: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(with_two_nets, tmp_path / "source"))
    (source / name / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(MissingInput, match=rf"{name} has no diffusion_pytorch_model.safetensors"):
        run(quantize, source, output=tmp_path / "out")
    found = api.inspect(source)
    assert [problem.where for problem in found.errors] == [f"{name}/diffusion_pytorch_model.safetensors"]


# --- models -----------------------------------------------------------------------------------------------------------
def test_modules_voices_tokenizers_and_adapters_go_along(model: Path, tmp_path: Path) -> None:
    header = '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    weights = f"{chr(len(header))}{chr(0) * 7}{header}x"
    files = {
        "modules.json": '[{"path": ""}, {"path": "2_Dense"}, {"path": "extra"}]',
        "2_Dense/config.json": "{}",
        "2_Dense/pytorch_model.bin": "copied unread",
        "extra/model.safetensors": weights,
        "speaker_embeddings_path.json": '{"voice": {"prompt": "voices/a.npy"}}',
        "voices/a.npy": "numbers",
        "alphabet.json": "{}",
        "language_model/attrs.json": "{}",
        "language_model/5gram.bin": "KenLM",
        "decoder_tokenizer/tokenizer_config.json": "{}",
        "decoder_tokenizer/vocab.json": "{}",
        "speech_lora/adapter_config.json": "{}",
        "speech_lora/adapter_model.safetensors": weights,
        "adapter.fra.safetensors": weights,
        "guider_config.json": "{}",
        "spk_dict.pt": "voices, copied unread",
        "Roboto-Regular.ttf": "a font",
    }
    stays = {"checkpoint-5/tokenizer_config.json": "{}", "original/params.json": "{}", "notes.json": "{}"}
    for name, text in {**files, **stays}.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    report = run(quantize, model, output=tmp_path / "out")
    assert set(files) <= set(report["carried"])
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files
    assert report["left_out"] == ["checkpoint-5/", "notes.json", "original/"]


def test_a_class_that_reads_more_than_weights_finds_it_in_the_output(tmp_path: Path) -> None:
    """Qwen2.5-Omni loads the voices beside its weights, and makes a part of itself float32."""
    torch.manual_seed(0)
    model = next(small_models("qwen2_5_omni", "Qwen2_5OmniForConditionalGeneration"))
    vocoder = model.config.token2wav_config.bigvgan_config  # six stages of filters, which are computed when it is built
    vocoder.upsample_rates, vocoder.upsample_kernel_sizes = [2], [4]
    vocoder.resblock_kernel_sizes, vocoder.resblock_dilation_sizes = [3], [[1, 3, 5]]
    model = type(model)(model.config).bfloat16()
    source, output, made_by_library = tmp_path / "source", tmp_path / "output", tmp_path / "reference"
    model.save_pretrained(source)
    torch.save({"Ethan": {"bos_token": torch.tensor(1)}}, source / "spk_dict.pt")
    assert run(quantize, source, output=output)["carried"] == ["spk_dict.pt"]
    reference.transformers_model(type(model), source, "nf4").save_pretrained(made_by_library)
    assert reference.differing_tensors(made_by_library, output) == []
    assert list(type(model).from_pretrained(output, device_map="cpu").speaker_map) == ["Ethan"]


def test_a_map_to_code_that_does_not_come_along_is_left_out_and_told(model: Path, tmp_path: Path) -> None:
    here = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}
    rewrite(model / "config.json", auto_map={**here, "AutoModelForCausalLM": "owner/repo--modeling_x.X"})
    report = run(quantize, model, output=tmp_path / "out")
    assert config_of(tmp_path / "out")["auto_map"] == {"AutoModelForCausalLM": "owner/repo--modeling_x.X"}
    assert any("auto_map left out" in text for text in report["warnings"])


# --- advice -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}),
        ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "tokenization_own.OwnProcessor"}}),
        ("modules.json", [{"idx": 0, "name": "0", "path": "", "type": "tokenization_own.Transformer"}]),
    ],
)
def test_code_that_a_file_in_the_output_names_is_told(file: str, content: Any, model: Path, tmp_path: Path) -> None:
    (model / file).write_text(json.dumps(content))
    (model / "tokenization_own.py").write_text("raise SystemExit('run')")
    (model / "handler.py").write_text("raise SystemExit('run')")
    report = run(quantize, model, output=tmp_path / "out")
    told = f"{file} names code in tokenization_own.py, which is not copied"
    assert [text.startswith(told) for text in report["warnings"] if "code in" in text] == [True]
    assert (tmp_path / "out" / file).read_bytes() == (model / file).read_bytes()


def test_code_that_a_component_names_is_told(pipeline: Path, tmp_path: Path) -> None:
    settings = pipeline / "tokenizer" / "tokenizer_config.json"
    rewrite(settings, auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    (pipeline / "tokenizer" / "tokenization_own.py").write_text("raise SystemExit('run')")
    report = run(quantize, pipeline, output=tmp_path / "out", dry_run=True)
    told = "tokenizer/tokenizer_config.json names code in tokenization_own.py, which is not copied"
    assert [text for text in report["warnings"] if text.startswith(told)]


def test_the_command_that_converts_pickles_works_where_it_is_pasted(
    pipeline: Path, tmp_path: Path, python_with_libraries: list[str]
) -> None:
    folder = pipeline / "text_encoder_2"
    held: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors*"):
        if file.suffix == ".safetensors":
            held |= load_file(file)
        file.unlink()
    names = sorted(held)
    torch.save({name: held[name] for name in names[:3]}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({name: held[name] for name in names[3:]}, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(MalformedInput, match="pickle") as raised:
        run(quantize, pipeline, output=tmp_path / "out")
    command = re.search(r'python -c ".*"', str(raised.value))
    assert command is not None
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.join(python_with_libraries)} "$@"\n')
    python.chmod(0o755)
    path = f"{python.parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", command.group()], check=True, env={**os.environ, "PATH": path})
    run(quantize, pipeline, output=tmp_path / "out")
    assert load_file(folder / "model.safetensors").keys() == held.keys()


def test_a_component_in_pickles_is_copied_unread_where_that_is_asked_for(pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    for file in (pipeline / "vae").glob("*.safetensors*"):
        file.unlink()
    report = run(quantize, pipeline, output=tmp_path / "out", component=["vae=none"])
    assert "vae/diffusion_pytorch_model.bin" in report["carried"]
    assert not api.inspect(tmp_path / "out").errors
    back = run(dequantize, tmp_path / "out", output=tmp_path / "back")
    assert "vae/diffusion_pytorch_model.bin" in back["carried"]
    torch.save({}, tmp_path / "back" / "vae" / "diffusion_pytorch_model.pt")  # none that qz copied
    assert {problem.kind for problem in api.inspect(tmp_path / "back").errors} == {"pickle-only"}


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("pytorch_lora_weights", "transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight"),
        ("style", "lora_unet_double_blocks_0_img_attn_proj.lora_{}.weight"),
        ("adapter_model", "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"),
    ],
)
def test_a_folder_with_only_a_lora_is_named_for_what_it_is(file: str, pattern: str, tmp_path: Path) -> None:
    sides = ("down", "up") if file == "style" else ("A", "B")
    tensors = {pattern.format(sides[0]): torch.zeros(4, 64), pattern.format(sides[1]): torch.zeros(64, 4)}
    tensors |= {pattern.split(".lora")[0] + ".alpha": torch.ones(1)}
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / f"{file}.safetensors")
    with pytest.raises(Unsupported, match="only a LoRA adapter"):
        run(quantize, tmp_path / "lora", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            ["lora_unet_x.oft_blocks", "lora_unet_x.alpha"],
            r"It is OFT or BOFT \('lora_unet_x.oft_blocks'\), which qz does",
        ),
        (["base_model.model.x.boft_R", "base_model.model.x.boft_S"], "It is OFT or BOFT"),
        (["base_model.model.x.ia3_l"], "It is IA³"),
        (["base_model.vera_A", "base_model.vera_B", "base_model.model.x.vera_lambda_b"], "It is VeRA"),
        (["lora_unet_x.a1.weight", "lora_unet_x.b2.weight", "lora_unet_x.alpha"], "It is GLoRA"),
        (["base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"], "Download its adapter_config.json"),
    ],
)
def test_an_adapter_without_its_config_is_told_by_its_tensors(names: list[str], told: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "some.safetensors")
    for source in (tmp_path, tmp_path / "some.safetensors"):
        with pytest.raises(Unsupported, match=rf"holds only an? (?:LoRA )?adapter, not a model\. {told}"):
            run(quantize, source)


ONTO_A_PIPELINE: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "a token by its name": ("embedding of textual inversion", {"<fox>": (32,)}),
    "a token of A1111": ("embedding of textual inversion", {"emb_params": (2, 32)}),
    "a token in an encoder by its name": ("embedding of textual inversion", {"clip_l": (2, 32)}),
    "an IP-Adapter of FLUX": (
        "IP-Adapter",
        {f"image_proj.proj.{name}": shape for name, shape in {"weight": (256, 24), "bias": (256,)}.items()}
        | {f"image_proj.norm.{name}": (64,) for name in ("weight", "bias")}
        | {
            f"ip_adapter.0.to_{name}_ip.{part}": (64, 64)[: 1 + (part == "weight")]
            for name in "kv"
            for part in ("weight", "bias")
        },
    ),
}


@pytest.fixture(scope="module")
def quantized_flux(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "flux"
    run(quantize, flux, output=output)
    return output


@pytest.mark.parametrize("case", ONTO_A_PIPELINE)
def test_what_is_loaded_onto_a_pipeline_is_loaded_onto_a_quantized_one_as_the_advice_says(
    case: str, quantized_flux: Path, tmp_path: Path
) -> None:
    kind, shapes = ONTO_A_PIPELINE[case]
    save_file({name: torch.ones(shape) / 50 for name, shape in shapes.items()}, tmp_path / "some.safetensors")
    pipe = qz.load(quantized_flux, device="cpu")
    for source in (tmp_path, tmp_path / "some.safetensors"):
        with pytest.raises(Unsupported, match=rf"holds only an {kind}, not a model. Quantize the pipeline") as raised:
            run(quantize, source)
    exec(str(raised.value).split("`")[1], {"pipeline": pipe})
    if kind == "IP-Adapter":
        assert "IPAdapter" in type(pipe.transformer.transformer_blocks[0].attn.processor).__name__
    else:
        assert len(pipe.tokenizer.encode("<fox>" if "<fox>" in shapes else "<TOKEN>")) == 3 + (len(shapes) - 1)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "onto a UNet that is not quantized only"),
        (["768.0.linear.0.weight", "768.1.linear.0.weight"], "only a hypernetwork, not a model. Neither library loads"),
    ],
)
def test_what_is_not_loaded_onto_a_quantized_pipeline_is_told_so(names: list[str], told: str, tmp_path: Path) -> None:
    """diffusers casts a UNet after it has loaded an IP-Adapter onto it, which it refuses for a quantized one."""
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "some.safetensors")
    with pytest.raises(Unsupported, match=told):
        run(quantize, tmp_path / "some.safetensors")


def test_models_beside_an_ip_adapter_are_not_all_that_is_told(tmp_path: Path) -> None:
    (tmp_path / "models" / "image_encoder").mkdir(parents=True)
    (tmp_path / "models" / "image_encoder" / "config.json").write_text('{"model_type": "clip_vision_model"}')
    save_file({"ip_adapter.1.to_k_ip.weight": torch.zeros(4, 4)}, tmp_path / "models" / "ip-adapter_sd15.safetensors")
    with pytest.raises(MissingInput, match=r"models/image_encoder.* It holds an IP-Adapter .*load_ip_adapter"):
        run(quantize, tmp_path)


def test_a_pipeline_saved_with_a_lora_attached_is_named_for_what_it_is(pipeline: Path, tmp_path: Path) -> None:
    loaded = DiffusionPipeline.from_pretrained(pipeline)
    loaded.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    loaded.save_pretrained(tmp_path / "attached")
    with pytest.raises(Unsupported, match="saved while a LoRA was attached") as raised:
        run(quantize, tmp_path / "attached", output=tmp_path / "out")
    assert "pipe.unload_lora_weights()" in str(raised.value)


def test_a_lora_is_fused_into_its_pipeline_as_the_advice_says(pipeline: Path, tmp_path: Path) -> None:
    loaded = DiffusionPipeline.from_pretrained(pipeline)
    loaded.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    layers = dict(peft.get_peft_model_state_dict(loaded.transformer))
    loaded.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    with pytest.raises(Unsupported, match="only a LoRA") as raised:
        run(quantize, tmp_path / "lora", output=tmp_path / "out")
    assert run_advice(str(raised.value), pipeline, tmp_path / "out")["loras"][0]["weights"] == 3


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (
            peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
            "merge_and_unload().save_pretrained('MERGED')",
        ),
        (
            peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            "PeftModel.from_pretrained(model, ADAPTER)",
        ),
    ],
    ids=["merged", "beside"],
)
def test_an_adapter_that_is_not_fused_is_merged_or_loaded_beside_as_the_advice_says(
    kind: peft.PeftConfig, advice: str, llama: Path, tmp_path: Path
) -> None:
    adapted = peft.get_peft_model(LlamaForCausalLM.from_pretrained(llama), kind)
    adapted.save_pretrained(tmp_path / "adapter")
    for source, more in ((tmp_path / "adapter", {}), (llama, {"lora": [str(tmp_path / "adapter")]})):
        with pytest.raises(Unsupported, match=re.escape(advice)):
            run(quantize, source, output=tmp_path / "out", **more)
    if "merge" in advice:
        adapted.merge_and_unload().save_pretrained(tmp_path / "MERGED")
        run(quantize, tmp_path / "MERGED", output=tmp_path / "out")
    else:
        run(quantize, llama, output=tmp_path / "out")
        model = LlamaForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
        assert (
            peft.PeftModel.from_pretrained(model, tmp_path / "adapter")(torch.tensor([[1, 2]])).logits.isfinite().all()
        )


def test_a_peft_adapter_is_fused_into_its_model_as_the_advice_says(llama: Path, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(llama)
    peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(Unsupported, match="only an adapter") as raised:
        run(quantize, tmp_path / "adapter", output=tmp_path / "out")
    assert run_advice(str(raised.value), llama, tmp_path / "out")["loras"][0]["weights"] == 1


def test_a_model_saved_with_a_lora_attached_is_mended_as_the_advice_says(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = LlamaForCausalLM.from_pretrained(llama)
    merged = peft.get_peft_model(LlamaForCausalLM.from_pretrained(llama), lora)
    merged.get_base_model().save_pretrained("attached", state_dict=merged.get_base_model().state_dict())
    with pytest.raises(Unsupported, match="saved while a LoRA was attached") as raised:
        run(quantize, tmp_path / "attached", output=tmp_path / "out")
    assert "`model.merge_and_unload().save_pretrained('MERGED')`" in str(raised.value)
    merged.merge_and_unload().save_pretrained("MERGED")
    run(quantize, tmp_path / "MERGED", output=tmp_path / "of-merged")
    assert "`model.save_pretrained('LORA')` saves the LoRA alone" in str(raised.value)
    model.add_adapter(lora)
    model.save_pretrained("LORA")
    assert run_advice(str(raised.value), llama, tmp_path / "of-lora")["loras"][0]["weights"] == 1


def run_advice(message: str, base: Path, output: Path) -> Any:
    """What the command in a message does to the model ``base``."""
    (words,) = re.findall(r"`qz quantize BASE --lora (.*?)`", message)
    return run(quantize, base, output=output, lora=[words])


def test_a_modular_pipeline_says_where_its_models_are_and_how_to_quantize_them(pipeline: Path, tmp_path: Path) -> None:
    place = {"pretrained_model_name_or_path": str(pipeline), "subfolder": "transformer", "variant": None}
    index = {
        "_class_name": "FluxModularPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel", place],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler", {**place, "subfolder": "scheduler"}],
    }
    (tmp_path / "modular").mkdir()
    (tmp_path / "modular" / "modular_model_index.json").write_text(json.dumps(index))
    with pytest.raises(Unsupported, match="modular pipeline") as raised:
        run(quantize, tmp_path / "modular", output=tmp_path / "out")
    assert re.findall(r"`(qz .*?)`", str(raised.value)) == [f"qz quantize '{pipeline}' --subfolder 'transformer'"]
    run(quantize, pipeline, output=tmp_path / "out", subfolder="transformer")


def test_a_modular_pipeline_that_was_saved_whole_says_how_to_quantize_its_folders(
    pipeline: Path, tmp_path: Path
) -> None:
    """As ``ModularPipeline.save_pretrained`` saves it, and as it is after it was moved."""
    gone = {"pretrained_model_name_or_path": "/moved", "subfolder": "transformer", "type_hint": None}
    unknown = {**gone, "subfolder": "image_encoder", "type_hint": [None, None]}
    index = {
        "_class_name": "FluxModularPipeline",
        "transformer": [None, None, {**gone, "type_hint": ["diffusers", "FluxTransformer2DModel"]}],
        "tokenizer": [None, None, {**gone, "type_hint": ["transformers", "CLIPTokenizer"], "subfolder": "tokenizer"}],
        "image_encoder": [None, None, unknown],
    }
    (pipeline / "modular_model_index.json").write_text(json.dumps(index))
    (pipeline / "model_index.json").unlink()
    with pytest.raises(Unsupported, match="modular pipeline") as raised:
        run(quantize, pipeline, output=tmp_path / "out")
    assert re.findall(r"`(qz .*?)`", str(raised.value)) == [f"qz quantize '{pipeline}' --subfolder 'transformer'"]
    run(quantize, pipeline, output=tmp_path / "out", subfolder="transformer")


def test_remote_code_in_a_component_leaves_the_others_to_subfolder(pipeline: Path, tmp_path: Path) -> None:
    rewrite(pipeline / "model_index.json", vae=["my_vae", "MyVAE"])
    (pipeline / "vae" / "my_vae.py").write_text("raise SystemExit\n")
    with pytest.raises(Unsupported, match="--subfolder"):
        run(quantize, pipeline, output=tmp_path / "out")
    run(quantize, pipeline, output=tmp_path / "out", subfolder="transformer")


def test_a_library_loads_what_was_made_of_a_sentence_encoder(tmp_path: Path) -> None:
    config = BertConfig(**{**LLAMA, "num_hidden_layers": 1})
    BertModel(config).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    (tmp_path / "source" / "1_Pooling").mkdir()
    (tmp_path / "source" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    report = run(quantize, tmp_path / "source", output=tmp_path / "out")
    assert {"modules.json", "1_Pooling/config.json"} <= set(report["carried"])
    assert report["left_out"] == []
    BertModel.from_pretrained(tmp_path / "out")


def test_files_of_a_folder_that_is_not_there_at_all_are_one_name(model: Path) -> None:
    (model / "original").mkdir()
    (model / "original" / "params.json").write_text("{}")
    used = {"config.json", "generation_config.json", "model.safetensors"}
    assert companions.left_out(LocalFolder(model), used) == ("original/",)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("distilled_guidance_layer.in_proj.bias", "ChromaTransformer2DModel"),
        ("distilled_guidance_layer.layers.0.linear_1.weight", "ChromaTransformer2DModel"),
        ("head.modulation", "WanAnimate2Transformer3DModel"),
    ],
)
def test_the_own_names_of_a_class_are_no_other_layout(name: str, class_name: str) -> None:
    assert original_layout([name], class_name) is None
