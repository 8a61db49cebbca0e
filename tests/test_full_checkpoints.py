"""A whole pipeline in one file gives what diffusers' ``from_single_file`` and bitsandbytes make of it, as a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import full_checkpoints
from commands import contents, run
from hooks import every_disk
from hub_server import HubServer, connected
from qz import MalformedInput, MissingInput, OutputRefused, QzError, Unsupported, UsageError, api
from qz.cli.commands.inspect import inspect
from qz.cli.commands.quantize import quantize
from qz.cli.commands.verify import verify
from qz.progress import Progress
from reference import differing_files

KINDS = ("sd15", "sd2", "sdxl", "sd3")


class Checkpoint(NamedTuple):
    """One file; the folder that has its configs, and what the library makes of both."""

    pipeline: Any
    folder: Path
    file: Path

    def loaded(self, place: Path) -> Path:
        again = type(self.pipeline).from_single_file(str(self.file), config=str(self.folder), torch_dtype=torch.float16)
        again.save_pretrained(place)
        return place


def checkpoint(kind: str, place: Path) -> Checkpoint:
    pipeline = getattr(full_checkpoints, kind)(place / "configs")
    return Checkpoint(
        pipeline, place / "configs", getattr(full_checkpoints, f"{kind}_file")(pipeline, place / "a.safetensors")
    )


@pytest.fixture(scope="module", params=KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint("sd15", tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint("sd3", tmp_path_factory.mktemp("sd3"))


def models(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir()) if list(path.glob("*.safetensors"))}


def test_a_full_checkpoint_gives_the_bytes_of_from_single_file(each: Checkpoint, tmp_path: Path) -> None:
    run(quantize, each.loaded(tmp_path / "loaded"), output=tmp_path / "wanted")
    planned = run(quantize, each.file, config=str(each.folder), output=tmp_path / "made", dry_run=True)
    report = run(quantize, each.file, config=str(each.folder), output=tmp_path / "made")
    assert planned["bytes"] == report["bytes"]
    assert report["source"]["architecture"] == type(each.pipeline).__name__
    assert report["left_out"] == []
    wanted = models(tmp_path / "wanted")
    assert wanted.keys() == models(tmp_path / "made").keys()
    for name, folder in wanted.items():
        assert differing_files(folder, tmp_path / "made" / name) == []
    made, theirs = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("made", "loaded"))
    assert made == theirs
    quantized = {component["name"] for component in report["components"] if component["converted"]}
    assert quantized == {"unet"} or quantized == {"transformer", "text_encoder_3"}


def test_the_components_of_a_file_are_chosen_like_those_of_a_folder(sd15: Checkpoint, tmp_path: Path) -> None:
    options = {"component": ["text_encoder=int8", "unet=fp4"], "dtype": "float32"}
    run(quantize, sd15.loaded(tmp_path / "loaded"), output=tmp_path / "wanted", **options)
    run(quantize, sd15.file, config=str(sd15.folder), output=tmp_path / "made", **options)
    for name, folder in models(tmp_path / "wanted").items():
        assert differing_files(folder, tmp_path / "made" / name) == []


def test_progress_is_of_quantizing_also_in_components_that_are_kept(sd15: Checkpoint, tmp_path: Path) -> None:
    seen: list[Progress] = []
    api.quantize(sd15.file, tmp_path / "made", config=sd15.folder, on_progress=seen.append)
    assert {step.doing for step in seen} == {"Reading headers", "Planning", "Quantizing"}


def test_a_lora_is_fused_into_the_models_of_a_file(sd15: Checkpoint, tmp_path: Path) -> None:
    state = {}
    for kind, model in (("unet", sd15.pipeline.unet), ("text_encoder", sd15.pipeline.text_encoder)):
        ends = ("to_q", "q_proj")
        for name, module in model.named_modules():
            if name.endswith(ends):
                rows, columns = module.weight.shape
                state[f"{kind}.{name}.lora_A.weight"] = torch.randn(2, columns) * 0.1
                state[f"{kind}.{name}.lora_B.weight"] = torch.randn(rows, 2) * 0.1
    save_file(state, tmp_path / "lora.safetensors")
    options = {"lora": [str(tmp_path / "lora.safetensors")]}
    run(quantize, sd15.loaded(tmp_path / "loaded"), output=tmp_path / "wanted", **options)
    run(quantize, sd15.file, config=str(sd15.folder), output=tmp_path / "made", **options)
    for name, folder in models(tmp_path / "wanted").items():
        assert differing_files(folder, tmp_path / "made" / name) == []


class Stopped(Exception):
    """The power cut of a test."""


def test_a_run_that_stopped_goes_on_and_its_output_is_verified_against_the_file(
    sd15: Checkpoint, tmp_path: Path
) -> None:
    run(quantize, sd15.file, config=str(sd15.folder), output=tmp_path / "whole")

    def stop(operation: str, path: str) -> None:
        if operation == "rename" and path.endswith("unet/config.json"):
            raise Stopped

    output = tmp_path / "out"
    with every_disk(stop), pytest.raises(Stopped):
        run(quantize, sd15.file, config=str(sd15.folder), output=output)
    assert run(quantize, sd15.file, config=str(sd15.folder), output=output)["resumed"]
    assert contents(output) == contents(tmp_path / "whole")
    found = run(verify, output, against=str(sd15.file), config=str(sd15.folder))
    assert found["intact"]
    assert run(quantize, sd15.file, config=str(sd15.folder), output=output, if_exists="skip")["up_to_date"]
    with pytest.raises(OutputRefused, match="different settings"):
        run(quantize, sd15.file, config=str(sd15.folder), output=output, int8=True, if_exists="skip")
    assert str(sd15.folder) not in (output / "qz.json").read_text()
    weights = output / "vae" / "diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(MalformedInput, match="is not what"):
        run(verify, output, against=str(sd15.file), config=str(sd15.folder))


def test_parts_of_a_file_merge_into_what_one_run_makes(sd15: Checkpoint, tmp_path: Path) -> None:
    run(quantize, sd15.file, config=str(sd15.folder), output=tmp_path / "whole")
    for number in (1, 2):
        run(quantize, sd15.file, config=str(sd15.folder), output=tmp_path / "out", part=f"{number}/2")
    api.merge(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with connected(monkeypatch, tmp_path / "home", xet=False) as hub:
        yield hub


def configs(folder: Path, prefix: str = "") -> dict[str, Path | bytes]:
    return {
        prefix + str(path.relative_to(folder)): path
        for path in folder.rglob("*")
        if path.suffix in (".json", ".txt") and ".index." not in path.name
    }


def test_a_file_on_the_hub_takes_its_configs_where_diffusers_does(
    hub: HubServer, sd15: Checkpoint, tmp_path: Path
) -> None:
    safety = {"safety_checker/config.json": b"{}", "feature_extractor/preprocessor_config.json": b"{}"}
    index = json.loads((sd15.folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    files = {**configs(sd15.folder), **safety, "model_index.json": json.dumps(index).encode()}
    hub.add("stable-diffusion-v1-5/stable-diffusion-v1-5", files)
    hub.add("me/merges", {"mine.safetensors": sd15.file})
    report = run(quantize, "me/merges", file="mine.safetensors", output=tmp_path / "made")
    told = " ".join(report["warnings"])
    assert "safety_checker is not read from a single file" in told
    assert "configs come from stable-diffusion-v1-5/stable-diffusion-v1-5@" in told
    run(quantize, sd15.file, config=str(sd15.folder), output=tmp_path / "wanted")
    for name, folder in models(tmp_path / "wanted").items():
        assert differing_files(folder, tmp_path / "made" / name) == []
    made = json.loads((tmp_path / "made" / "model_index.json").read_text())
    assert made["safety_checker"] == [None, None]


def test_inspect_names_a_full_checkpoint(sd15: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(QzError):
        inspect(str(sd15.file), quiet=True)
    assert "`qz quantize FILE.safetensors` makes a pipeline of it" in capsys.readouterr().out


def without(prefix: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def test_a_component_that_the_file_lacks_comes_from_the_config_or_is_refused(sd3: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "clips.safetensors"
    save_file(without("text_encoders.t5xxl.")(load_file(sd3.file)), file)
    report = run(quantize, file, config=str(sd3.folder), output=tmp_path / "made")
    assert any("text_encoder_3 is not in the file: taken from" in text for text in report["warnings"])
    run(quantize, sd3.file, config=str(sd3.folder), output=tmp_path / "wanted")
    for name, folder in models(tmp_path / "wanted").items():
        assert differing_files(folder, tmp_path / "made" / name) == []
    bare = shutil.copytree(
        sd3.folder, tmp_path / "bare", ignore=lambda _, names: [n for n in names if "safetensors" in n]
    )
    with pytest.raises(MissingInput, match="but no text_encoder_3, which"):
        run(quantize, file, config=str(bare), output=tmp_path / "none")
    index = json.loads((bare / "model_index.json").read_text())
    (bare / "model_index.json").write_text(
        json.dumps(index | {key: [None, None] for key in ("text_encoder_3", "tokenizer_3")})
    )
    report = run(quantize, file, config=str(bare), output=tmp_path / "two")
    assert not (tmp_path / "two" / "text_encoder_3").exists()


OUT = "model.diffusion_model.out.2.weight"
CLIP = "cond_stage_model.transformer."
Q = "text_model.encoder.layers.0.self_attn.q_proj.weight"


def moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"conditioner.embedders.0.transformer.{Q}": tensors.pop(CLIP + Q), **tensors}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (without(OUT), MalformedInput, r"conv_out\.weight"),
        (without("model.diffusion_model.input_blocks.1.0."), MalformedInput, r"UNet2D.*down_blocks\.0\.resnets\.0"),
        (without(f"{CLIP}{Q}"), MalformedInput, r"self_attn\.q_proj\.weight"),
        (without("first_stage_model.decoder."), MalformedInput, "decoder"),
        (moved, MalformedInput, "text_encoder lie under several prefixes"),
        (lambda t: {**t, OUT: torch.ones(4, 4, 3, 3).half()}, MalformedInput, r"conv_out\.weight.*\(4, 4, 3, 3\)"),
        (
            lambda t: {**t, "vae.encoder.conv_in.weight": t["first_stage_model.encoder.conv_in.weight"].clone()},
            MalformedInput,
            "vae",
        ),
        (
            lambda t: {**t, f"conditioner.embedders.0.transformer.{Q}": t[CLIP + Q].clone()},
            MalformedInput,
            "several prefixes|same tensor",
        ),
        (lambda t: {**t, "out.2.weight": t[OUT].clone()}, MalformedInput, "same tensor as 'out.2.weight' and as"),
        (
            lambda t: {**t, "conditioner.embedders.1.model.ln_final.weight": torch.ones(8)},
            Unsupported,
            r"under 'conditioner\.embedders\.1\.model\.' that no component",
        ),
        (without("cond_stage_model."), MissingInput, "but no text_encoder, which"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_not_one_whole_pipeline_is_refused(
    sd15: Checkpoint, change: Any, error: type[QzError], words: str, tmp_path: Path
) -> None:
    bare = shutil.copytree(
        sd15.folder, tmp_path / "bare", ignore=lambda _, names: [n for n in names if "safetensors" in n]
    )
    save_file(change(load_file(sd15.file)), tmp_path / "bad.safetensors")
    with pytest.raises(error, match=words):
        run(quantize, tmp_path / "bad.safetensors", output=tmp_path / "made", config=str(bare))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors", "bare"]


def test_what_is_about_one_model_is_refused_for_a_full_checkpoint(sd15: Checkpoint, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"config": str(sd15.folder), "output": tmp_path / "made"}
    with pytest.raises(UsageError, match="--layout single-file writes one denoiser"):
        run(quantize, sd15.file, layout="single-file", **asked)
    with pytest.raises(UsageError, match="--experts is for one model"):
        run(quantize, sd15.file, experts=True, **asked)
    with pytest.raises(Unsupported, match="holds a whole pipeline"):
        run(quantize, sd15.file, config=str(sd15.folder / "unet"), output=tmp_path / "made")
