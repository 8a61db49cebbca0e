"""``qz calibrate`` and ``qz compare`` of pipelines: as hooks on the libraries' own pipelines see it."""

from __future__ import annotations

import functools
import inspect
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

import pipelines
from conftest import Qz
from qz import MalformedInput, MissingInput, TryAgain, Unsupported, UsageError, api
from qz.formats.checkpoint.pipeline import open_pipeline
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.calibration.pipelines import memory
from qz.quantize.calibration.pipelines.components import opened_models
from qz.quantize.calibration.pipelines.denoising import Call, Drawn, in_order
from qz.quantize.calibration.pipelines.text_scores import exchanges
from qz.quantize.importance.statistics import read_statistics, write_statistics

PROMPTS = ("a red cat on the moon", "two foxes in the snow")
DRAWN: dict[str, Any] = {"steps": 2, "resolution": 32, "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def short_prompts() -> Iterator[None]:
    """Unless asked otherwise, pipelines pad a prompt to 32 tokens. Of the usual 512, nearly all would be padding."""
    functions = [
        inspect.unwrap(function)
        for pipeline in (diffusers.FluxPipeline, diffusers.StableDiffusion3Pipeline, diffusers.WanPipeline)
        for function in (pipeline.__call__, pipeline.encode_prompt)
    ]
    with pytest.MonkeyPatch.context() as patch:
        for function in functions:
            given = [each for each in inspect.signature(function).parameters.values() if each.default is not each.empty]
            assert any(each.name == "max_sequence_length" for each in given)
            short = [32 if each.name == "max_sequence_length" else each.default for each in given]
            patch.setattr(function, "__defaults__", tuple(short))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    (folder / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n  {PROMPTS[1]}\n")
    (folder / "prompt.txt").write_text(PROMPTS[0])
    return folder


@pytest.fixture(scope="module")
def flux(root: Path) -> Path:
    return pipelines.flux(root / "flux", halvings=2)


@pytest.fixture(scope="module")
def calibrated(flux: Path, root: Path) -> Any:
    """What is said of ``known``."""
    return api.calibrate(flux, root / "flux.safetensors", text=root / "prompts.txt", hessians=True, **DRAWN)


@pytest.fixture(scope="module")
def known(calibrated: Any, root: Path) -> Path:
    """Statistics of the pipeline's models, with Hessians."""
    return root / "flux.safetensors"


@pytest.fixture(scope="module")
def four_bit(flux: Path, known: Path, root: Path) -> Path:
    """Transformer and T5 by GPTQ; the others are as they were."""
    components = ("transformer", "text_encoder_2")
    api.quantize(flux, root / "nf4", importance=known, rounding="gptq", components=components, device="cpu")
    return root / "nf4"


def stable_cascade(folder: Path) -> Path:
    """The prior of Stable Cascade, whose UNet has lists of lists of blocks."""
    torch.manual_seed(3)
    words = pipelines.clip_tokenizer(folder.with_name("clip-files"))
    prior = diffusers.StableCascadeUNet(
        conditioning_dim=64, block_out_channels=(64, 64), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), switch_level=(False,), clip_image_in_channels=64, clip_text_in_channels=32,
        clip_text_pooled_in_channels=32, dropout=(0.0, 0.0),
    )  # fmt: skip
    encoder = pipelines.clip(words, 32, projected=True)
    scheduler = diffusers.DDPMWuerstchenScheduler()
    pipeline = diffusers.StableCascadePriorPipeline(words, encoder, prior, scheduler, resolution_multiple=8)
    pipeline.save_pretrained(folder)
    return folder


def stable_diffusion(folder: Path) -> Path:
    """Stable Diffusion with the checker that most of its repositories have, whose class only diffusers knows."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    torch.manual_seed(0)
    tokenizer = pipelines.clip_tokenizer(folder.with_name("clip-files"))
    part = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    seen = {**part, "image_size": 32, "patch_size": 16}
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=32, attention_head_dim=2, sample_size=8,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=pipelines.vae(4, 2),
        text_encoder=pipelines.clip(tokenizer, 32, projected=False),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=StableDiffusionSafetyChecker(CLIPConfig(text_config=part, vision_config=seen)),
        feature_extractor=CLIPImageProcessor(),
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    return folder


def whole(folder: Path, **models: Any) -> Any:
    """The pipeline in float32, as diffusers loads it."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **models)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, seed: int) -> list[torch.Tensor]:
    how = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    noise = [torch.Generator().manual_seed(seed + number) for number in range(len(PROMPTS))]
    return [pipeline(prompt, generator=each, **how)[0] for prompt, each in zip(PROMPTS, noise, strict=True)]


def seen_by_hooks(pipeline: Any) -> dict[str, tuple[torch.Tensor, int]]:
    """COMPONENT/WEIGHT → float64[in, in] sums of outer products, and tokens, of every linear that is called."""
    sums: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def see(_: Any, args: Any) -> None:
            x = args[0].flatten(0, -2).double()
            before, count = sums.get(name, (0, 0))
            sums[name] = (before + x.T @ x, count + len(x))

        return see

    for component, model in pipeline.components.items():
        for path, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(hook(f"{component}/{path}.weight"))
    draw(pipeline, 0)
    return sums


def test_what_is_recorded_of_flux_is_what_hooks_on_the_whole_pipeline_see(
    flux: Path, calibrated: Any, known: Path
) -> None:
    assert_that_hooks_see_the_same(flux, calibrated, known)


@pytest.mark.parametrize("name", ["sd3", "sdxl", "stable_cascade"])
def test_what_is_recorded_is_what_hooks_on_the_whole_pipeline_see(name: str, root: Path, tmp_path: Path) -> None:
    build: dict[str, Callable[[Path], Path]] = {
        "sd3": partial(pipelines.sd3, halvings=2),
        "sdxl": partial(pipelines.sdxl, halvings=2),
        "stable_cascade": stable_cascade,
    }
    folder, output = build[name](tmp_path / name), tmp_path / "stats.safetensors"
    found = api.calibrate(folder, output, text=root / "prompts.txt", hessians=True, **DRAWN)
    assert_that_hooks_see_the_same(folder, found, output)


def assert_that_hooks_see_the_same(folder: Path, found: Any, output: Path) -> None:
    stats, expected = read_statistics(output), seen_by_hooks(whole(folder))
    assert set(expected) == {weight for weight, sums in stats.sums.items() if sums.tokens}
    assert set(found.unseen) == set(stats.sums) - set(expected)
    assert set(found.components) == {weight.partition("/")[0] for weight in expected}
    for weight, (product, tokens) in expected.items():
        assert stats.sums[weight].tokens == tokens, weight
        np.testing.assert_allclose(stats.sums[weight].sum2, product.diagonal().numpy(), rtol=1e-3, atol=1e-4)
        kept = stats.hessian(weight)
        assert kept is not None
        np.testing.assert_allclose(kept, product.numpy(), rtol=1e-3, atol=1e-3 * float(product.abs().max()))
    assert not any("cannot be run block by block" in warning for warning in found.warnings)
    assert found.weights_at_once is not None
    assert found.weights_at_once < 0.7 * whole_bytes(folder)


def whole_bytes(folder: Path) -> int:
    """Of all parameters in float32."""
    models = [each for each in whole(folder).components.values() if isinstance(each, torch.nn.Module)]
    return sum(4 * weight.numel() for model in models for weight in model.parameters())


def test_a_model_that_reads_a_block_before_it_calls_it_is_loaded_whole(
    flux: Path, known: Path, root: Path, tmp_path: Path
) -> None:
    forward = diffusers.FluxTransformer2DModel.forward

    def reads_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["hidden_states"] = kwargs["hidden_states"] + 0 * self.transformer_blocks[0].attn.to_q.weight.sum()
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.FluxTransformer2DModel, "forward", reads_first)
        stats = tmp_path / "stats.safetensors"
        found = api.calibrate(flux, stats, text=root / "prompts.txt", hessians=True, **DRAWN)
    assert any("transformer cannot be run block by block" in warning for warning in found.warnings)
    one, two = read_statistics(known).sums, read_statistics(stats).sums
    for name, sums in one.items():
        np.testing.assert_allclose(two[name].sum2, sums.sum2, rtol=1e-4, atol=1e-6)


def test_a_denoiser_that_cannot_be_scored_beside_one_that_can_is_named(root: Path, tmp_path: Path) -> None:
    """Wan 2.2: one transformer draws the first steps, and another the last."""
    nets = [
        diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=32, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2,
            rope_max_seq_len=64,
        )
        for _ in range(2)
    ]  # fmt: skip
    vae = diffusers.AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    words = pipelines.t5_tokenizer()
    whole = diffusers.WanPipeline(words, pipelines.t5(words, 32), vae, scheduler, *nets, boundary_ratio=0.875)
    whole.save_pretrained(tmp_path / "wan")
    forward = diffusers.WanTransformer3DModel.forward

    @functools.wraps(forward)
    def reads_first(self: Any, hidden_states: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if timestep.max() >= 875:
            hidden_states = hidden_states + 0 * self.blocks[0].attn1.to_q.weight.sum()
        return forward(self, hidden_states, timestep, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.WanTransformer3DModel, "forward", reads_first)
        text, stats = root / "prompt.txt", tmp_path / "stats.safetensors"
        found = api.calibrate(tmp_path / "wan", stats, text=text, scores=True, **DRAWN)
    assert list(found.component_scores) == ["transformer_2", "text_encoder"]
    assert [warning for warning in found.warnings if "has no scores" in warning] == [
        "transformer cannot be run block by block: all of its weights were in memory, and it has no scores"
    ]


def test_one_block_of_one_model_is_in_memory_at_a_time(flux: Path, root: Path, tmp_path: Path) -> None:
    from qz.quantize.calibration.running.weights import Weights

    held, release = [], Weights.release

    def watched(self: Weights, path: str, module: Any) -> None:
        if path:
            names = {name for name, each in self.runnable.model.named_parameters() if each.device.type != "meta"}
            held.append({".".join(name.split(".")[:2]) for name in names if "blocks." in name})
        release(self, path, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "release", watched)
        api.calibrate(flux, tmp_path / "stats.safetensors", text=root / "prompts.txt", **DRAWN)
    assert max(map(len, held)) == 1
    assert {"transformer_blocks.0"} in held


def test_weights_that_a_gpu_has_room_for_are_read_once_for_all_steps(flux: Path, root: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"text": root / "prompts.txt", **DRAWN}
    read_again = api.calibrate(flux, tmp_path / "again", **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory.Room, "_has_room", lambda _: True)
        once = api.calibrate(flux, tmp_path / "once", **given)
    assert (tmp_path / "once").read_bytes() == (tmp_path / "again").read_bytes()
    denoiser = sum(file.stat().st_size for file in (flux / "transformer").glob("*.safetensors"))
    assert once.bytes_read < read_again.bytes_read - denoiser / 2
    assert once.weights_at_once is not None
    assert read_again.weights_at_once is not None
    assert once.weights_at_once > read_again.weights_at_once


def test_the_seed_decides_what_is_drawn(flux: Path, root: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        found = api.calibrate(flux, tmp_path / name, text=root / "prompts.txt", seed=seed, **{**DRAWN, "steps": 1})
        assert found.seed == seed
    assert (tmp_path / "one").read_bytes() == (tmp_path / "same").read_bytes()
    one, other = (read_statistics(tmp_path / name) for name in ("one", "other"))
    assert (one.metadata["seed"], other.metadata["seed"]) == ("5", "6")
    assert one.metadata["resolution"] == "32"
    embedder = "transformer/x_embedder.weight"
    assert not np.array_equal(one.sums[embedder].sum2, other.sums[embedder].sum2)


@pytest.fixture(scope="module")
def scored(flux: Path, root: Path) -> Path:
    """Statistics of the denoiser with scores."""
    given: dict[str, Any] = {"text": root / "prompts.txt", **DRAWN}
    api.calibrate(flux, root / "scored.safetensors", subfolder="transformer", scores=True, **given)
    return root / "scored.safetensors"


def test_a_denoisers_score_is_what_its_output_loses_when_bitsandbytes_quantizes_a_part_alone(
    flux: Path, scored: Path
) -> None:
    file = read_statistics(scored)
    assert file.scores is None
    scores = file.component_scores["transformer"]
    pipeline, calls = whole(flux), []
    model = pipeline.transformer
    keep = lambda _, __, given, found: calls.append((dict(given), found[0].double()))  # noqa: E731
    hook = model.register_forward_hook(keep, with_kwargs=True)
    draw(pipeline, 0)
    hook.remove()

    def lost(names: list[str]) -> float:
        before = {name: model.get_parameter(name).data.clone() for name in names}
        for name, weight in before.items():
            codes, state = quantize_4bit(weight.flatten(), blocksize=64, quant_type="nf4")
            model.get_parameter(name).data.copy_(dequantize_4bit(codes, state).view_as(weight))
        with torch.no_grad():
            changes = [(model(**given)[0].double() - found, found) for given, found in calls]
        for name, weight in before.items():
            model.get_parameter(name).data.copy_(weight)
        return sum(float(change.square().sum() / found.square().sum()) for change, found in changes) / len(calls)

    assert (scores.loss, scores.method) == ("output", "nf4")
    assert scores.total == pytest.approx(lost(list(scores.of)), rel=1e-2)
    units: dict[str, list[str]] = {}
    for name in scores.of:
        units.setdefault(".".join(name.split(".")[:2]) if "blocks." in name else name, []).append(name)
    for names in units.values():
        assert sum(scores.of[name] for name in names) == pytest.approx(lost(names), rel=2e-2), names
    assert len(units) < len(scores.of)


def test_scores_of_its_denoiser_choose_what_a_pipeline_keeps(flux: Path, scored: Path, tmp_path: Path) -> None:
    scores = read_statistics(scored).component_scores["transformer"]
    most = max(scores.of, key=lambda name: scores.of[name]).removesuffix(".weight")
    plain: Any = api.quantize(flux, dry_run=True, components=("transformer",), device="cpu")
    target = int(plain.footprint_after + 0.3 * (plain.footprint_before - plain.footprint_after))
    methods = {"text_encoder_2": None}
    told: list[Any] = []
    for how in ({"scores": scored}, {"importance": scored}, {}):
        given: dict[str, Any] = {"target_size": target, "component_methods": methods, "dry_run": True, **how}
        rows = api.quantize(flux, device="cpu", **given).as_json()["components"]
        told.append(next(row["kept_layers"] for row in rows if row["name"] == "transformer"))
    assert told[0] == told[1]
    assert told[0]["scores"]["loss"] == "output"
    assert most in told[0]["kept"]
    assert told[0]["expected_loss"] < 0.5 * scores.total
    assert told[2]["scores"] is None
    both: dict[str, Any] = {"dry_run": True, "device": "cpu"}
    both["component_methods"] = {"transformer": api.Nf4(), "text_encoder_2": api.Nf4()}
    sizes: Any = api.quantize(flux, **both)
    room = (sizes.footprint_before + sizes.footprint_after) // 2
    warnings = api.quantize(flux, scores=scored, target_size=room, **both).as_json()["warnings"]
    assert [text.split(":")[0] for text in warnings if "no scores of this component" in text] == ["text_encoder_2"]
    alone: dict[str, Any] = {"subfolder": "transformer", "max_loss": 0.5 * scores.total, "device": "cpu"}
    done: Any = api.quantize(flux, tmp_path / "kept", scores=scored, **alone)
    assert most in done.kept_layers.kept
    with pytest.raises(UsageError, match="no scores of text_encoder_2"):
        api.quantize(flux, **{**alone, "subfolder": "text_encoder_2"}, scores=scored)
    with pytest.raises(
        UsageError, match=r"has scores of transformer, and none of what is quantized .*\(text_encoder_2\)"
    ):
        api.quantize(flux, scores=scored, target_size=target, components=("text_encoder_2",), device="cpu")


@pytest.fixture(scope="module")
def all_scored(flux: Path, root: Path) -> Path:
    """Scores of the denoiser and the text encoders."""
    given: dict[str, Any] = {"text": root / "prompts.txt", **DRAWN}
    found = api.calibrate(flux, root / "all.safetensors", scores=True, **given)
    weights = sum(file.stat().st_size for file in flux.rglob("*.safetensors"))
    assert found.bytes_read > 2 * weights, "what is read again for scores counts"
    return root / "all.safetensors"


def test_a_text_encoders_score_is_what_the_denoiser_makes_of_its_prompts(flux: Path, all_scored: Path) -> None:
    scored = read_statistics(all_scored).component_scores
    assert set(scored) == {"transformer", "text_encoder", "text_encoder_2"}
    scores = scored["text_encoder_2"]
    assert (scores.loss, scores.method) == ("output", "nf4")
    assert sum(scores.of.values()) == pytest.approx(scores.total, rel=1e-4)
    pipeline, calls = whole(flux), []
    model = pipeline.transformer
    keep = lambda _, __, given, found: calls.append((dict(given), found[0].double()))  # noqa: E731
    hook = model.register_forward_hook(keep, with_kwargs=True)
    draw(pipeline, 0)
    hook.remove()
    for name in scores.of:
        weight = pipeline.text_encoder_2.get_parameter(name).data
        codes, state = quantize_4bit(weight.flatten(), blocksize=64, quant_type="nf4")
        weight.copy_(dequantize_4bit(codes, state).view_as(weight))
    lost = []
    with torch.no_grad():
        states = [pipeline.encode_prompt(prompt, prompt)[0] for prompt in PROMPTS]
        for number, (given, found) in enumerate(calls):
            changed = model(**{**given, "encoder_hidden_states": states[number // 2]})[0].double()
            lost.append(float((changed - found).square().sum() / found.square().sum()))
    assert scores.total == pytest.approx(sum(lost) / len(lost), rel=5e-2)
    assert scores.total > 0


def test_what_a_denoiser_is_given_in_another_shape_is_no_loss_of_zero(flux: Path) -> None:
    """As where a text encoder writes the prompt itself."""
    given = {"encoder_hidden_states": torch.ones(1, 3), "pooled_projections": torch.ones(4)}
    before = Drawn(calls={"transformer": [Call(0, given, 1.0), Call(0, given, 0.5)]})
    after = {**given, "pooled_projections": torch.zeros(4)}
    with opened_models(open_pipeline(LocalFolder(flux)), torch.float32, torch.device("cpu")) as models:
        found = exchanges(models, before, "text_encoder", {"transformer": [Call(0, after, 1.0)]})
        assert [each.after for each in found[0]] == [after["pooled_projections"]]
        for other in ({**after, "encoder_hidden_states": torch.ones(1, 2)}, {"pooled_projections": torch.zeros(4)}):
            with pytest.raises(Unsupported, match="transformer is given tensors of other shapes when text_encoder is"):
                exchanges(models, before, "text_encoder", {"transformer": [Call(0, other, 1.0)]})


def test_a_loss_is_shared_among_the_components_of_a_pipeline(
    flux: Path, scored: Path, all_scored: Path, tmp_path: Path, forked_qz: Qz
) -> None:
    of = read_statistics(all_scored).component_scores
    methods: dict[str, Any] = {"transformer": api.Nf4(), "text_encoder_2": api.Nf4()}
    how: dict[str, Any] = {"scores": all_scored, "component_methods": methods, "device": "cpu"}
    loose: Any = api.quantize(flux, dry_run=True, max_loss=10.0, **how)
    points = loose.kept_layers.curve
    assert loose.kept_layers.kept == ()
    assert points[0].loss == pytest.approx(of["transformer"].total + of["text_encoder_2"].total)
    assert (points[0].size, points[-1].size) == (loose.footprint_after, loose.footprint_before)
    assert points[-1].loss == pytest.approx(0, abs=1e-9)
    assert [point.loss for point in points] == sorted((point.loss for point in points), reverse=True)
    most = 0.4 * points[0].loss
    done: Any = api.quantize(flux, tmp_path / "out", max_loss=most, **how)
    kept = done.kept_layers
    assert kept.loss <= most
    chosen = next(point for point in points if point.loss <= most)
    assert (len(kept.kept), kept.loss) == (chosen.kept, chosen.loss)
    assert done.footprint_after >= chosen.size, "a library's list of names may match more"
    assert {path.partition("/")[0] for path in kept.kept} <= {"transformer", "text_encoder_2"}
    assert set(kept.kept) <= set(done.skipped)
    rows = {row["name"]: row for row in done.as_json()["components"]}
    assert sum(rows[name]["kept_layers"]["expected_loss"] for name in methods) == pytest.approx(kept.loss)
    room: Any = api.quantize(flux, dry_run=True, target_size=done.footprint_after, **how)
    assert room.footprint_after <= done.footprint_after
    rows = {row["name"]: row["kept_layers"] for row in room.as_json()["components"] if row["name"] in methods}
    assert sum(row["expected_loss"] for row in rows.values()) < points[0].loss
    assert any(row["kept"] for row in rows.values())
    with pytest.raises(UsageError, match=r"none of text_encoder_2\. Make it with .* --component text_encoder_2=none"):
        api.quantize(flux, dry_run=True, max_loss=most, **{**how, "scores": scored})
    with pytest.raises(UsageError, match="Use it unquantized, or allow more"):
        api.quantize(flux, dry_run=True, max_loss=0.0, **{**how, "component_methods": {}})
    with pytest.raises(UsageError, match="Allow one of them more"):
        api.quantize(flux, dry_run=True, max_loss=most, target_size=done.footprint_after - 1, **how)
    mixed: dict[str, Any] = {
        "component_methods": {**methods, "transformer": api.Int8()},
        "dry_run": True,
        "device": "cpu",
    }
    plain: Any = api.quantize(flux, **mixed)
    size = (plain.footprint_after + plain.footprint_before) // 2
    of_int8 = {name: replace(each, method="int8") for name, each in of.items()}
    write_statistics(tmp_path / "int8", read_statistics(all_scored).sums, {}, component_scores=of_int8)
    by_names: Any = api.quantize(flux, target_size=size, importance=tmp_path / "int8", **mixed)
    assert plain.footprint_after < by_names.footprint_after <= size, "importance says nothing of int8"
    told = forked_qz("quantize", flux, "--max-loss", most, "--scores", all_scored, "--dry-run", "--device", "cpu")
    assert told.returncode == 0, told.stderr
    assert "expected loss" in told.stdout


class Killed(BaseException):
    """As a signal would end it: nothing of qz sees it."""


@pytest.mark.parametrize("hessians", [False, True])
def test_an_interrupted_run_goes_on_where_it_was_and_finds_the_same(
    hessians: bool, flux: Path, known: Path, root: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"text": root / "prompts.txt", "hessians": hessians, **DRAWN}

    def run(output: str, stop: tuple[str, int] | None = None, **how: Any) -> Any:
        def look(progress: Any) -> None:
            if stop is not None and progress.doing == stop[0] and progress.done >= stop[1]:
                raise Killed

        return api.calibrate(flux, tmp_path / output, on_progress=look, **{**given, **how})

    whole = run("whole")
    for stop in (("Generating", 9), ("Generating", 4), *([("Calibrating transformer", 2)] if hessians else [])):
        with pytest.raises(Killed):  # in the first step, in the second, and after the first block once more
            run("cut", stop)
        assert not (tmp_path / "cut").exists()
    if not hessians:
        shutil.copytree(tmp_path / "cut.unfinished", tmp_path / "other.unfinished")
        assert not run("other", seed=1).resumed
    kept = {each["part"] for each in json.loads((tmp_path / "cut.unfinished/journal.json").read_text())["blocks"]}
    assert {"call 1 of text_encoder", "call 1 of transformer"} < kept
    assert ("transformer/transformer_blocks.0" in kept) == hessians
    again = run("cut")
    assert (again.resumed, whole.resumed) == (True, False)
    assert again.bytes_read < whole.bytes_read
    assert sorted(each.name.replace("cut", "whole") for each in tmp_path.glob("cut*")) == sorted(
        each.name for each in tmp_path.glob("whole*")
    )
    one, two, three = (read_statistics(path) for path in (tmp_path / "whole", tmp_path / "cut", known))
    assert one.sums.keys() == two.sums.keys() == three.sums.keys()
    for weight, sums in one.sums.items():
        assert sums.tokens == two.sums[weight].tokens == three.sums[weight].tokens
        assert hessians or np.array_equal(sums.sum2, two.sums[weight].sum2)  # how BLAS rounds, depends on addresses
        for other in (two, three):
            np.testing.assert_allclose(sums.sum2, other.sums[weight].sum2, rtol=1e-5, atol=1e-6)
        if hessians:
            one_hessian, other_hessian = one.hessian(weight), two.hessian(weight)
            assert one_hessian is not None
            assert other_hessian is not None
            np.testing.assert_allclose(one_hessian, other_hessian, rtol=1e-4, atol=1e-6 * float(one_hessian.max()))


def test_a_run_that_goes_on_sums_its_calls_in_the_same_order() -> None:
    """It makes the calls that it knows a prompt at a time, where the first run has all prompts make each of them."""
    together = [Call(prompt, {"step": step}, None) for step in range(3) for prompt in range(2)]
    one_by_one = [Call(prompt, {"step": step}, None) for prompt in range(2) for step in range(3)]
    assert in_order(one_by_one) == in_order(together) == together


def test_calibrate_quantize_and_compare_from_the_command_line(
    forked_qz: Qz, flux: Path, root: Path, tmp_path: Path
) -> None:
    drawn = ("--resolution", "32", "--device", "cpu", "--steps")
    done = forked_qz("calibrate", flux, "-o", "stats.safetensors", *drawn, "1", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["text"], found["sequences"], found["steps"], found["seed"]) == ("default", 16, 1, 0)
    assert found["resolution"] == 32
    assert found["components"] == ["text_encoder", "text_encoder_2", "transformer"]
    made = forked_qz("quantize", flux, "-o", "nf4", "--importance", "stats.safetensors", "--json", "--quiet")
    assert made.returncode == 0, made.stderr
    used = [each["importance"] for each in json.loads(made.stdout)["components"] if each.get("importance")]
    assert [each["missing"] for each in used] == [[]] * len(used)
    assert used
    asked = ("compare", flux, "nf4", *drawn, "2", "--picture", "steps.svg", "--text", root / "prompts.txt")
    done = forked_qz(*asked, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["seed"] != 0
    assert [each["timestep"] for each in found["timesteps"]] == [1.0, 0.5]
    assert 0 < found["denoiser"]["relative_error"] < 0.1
    page = (Path(__file__).parent.parent / "docs/reference/json.md").read_text()
    assert all(f"`{key}`" in page for key in found)
    picture = (tmp_path / "steps.svg").read_text()
    assert "2 timesteps, from the first to the last" in picture
    assert "transformer.transformer_blocks.0" in picture
    shown = forked_qz("compare", flux, "nf4", *drawn, "1", "--text", root / "prompt.txt")
    assert "at 32 × 32" in shown.stdout
    assert "denoiser's output" in shown.stdout
    assert "last latents" in shown.stdout


def test_a_component_is_calibrated_in_its_pipeline(flux: Path, root: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    found = api.calibrate(flux, stats, subfolder="transformer", text=root / "prompts.txt", **DRAWN)
    assert found.components == ("transformer",)
    assert {name.partition("/")[0] for name in read_statistics(stats).sums} == {"transformer"}
    alone: Any = api.quantize(flux, tmp_path / "alone", subfolder="transformer", importance=stats, device="cpu")
    assert alone.as_json()["importance"]["missing"] == []
    with pytest.raises(MalformedInput, match="covers none of the weights"):
        api.quantize(flux, tmp_path / "no", importance=stats, components=("text_encoder_2",), device="cpu")
    compared = api.compare(flux, tmp_path / "alone", subfolder="transformer", text=root / "prompts.txt", **DRAWN)
    assert all(layer.name.startswith("transformer.") for layer in compared.loss.layers)
    with pytest.raises(UsageError, match="--subfolder"):
        api.compare(flux, tmp_path / "alone", text=root / "prompts.txt", **DRAWN)


@pytest.fixture(scope="module")
def compared(flux: Path, four_bit: Path, root: Path) -> Any:
    return api.compare(flux, four_bit, text=root / "prompts.txt", seed=7, **DRAWN)


@pytest.fixture
def dequantized(four_bit: Path, tmp_path: Path) -> Path:
    api.dequantize(four_bit, tmp_path / "back", dtype="float32", device="cpu")
    return tmp_path / "back"


def test_what_is_compared_is_what_the_whole_pipelines_draw(flux: Path, compared: Any, dequantized: Path) -> None:
    found = compared
    one, two = whole(flux), whole(dequantized)
    calls: list[Any] = []
    keep = one.transformer.register_forward_hook(
        lambda _, __, k, out: calls.append((dict(k), out[0])), with_kwargs=True
    )
    before = draw(one, 7)
    keep.remove()

    def relative(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x.double() - y.double()).square().sum() / x.double().square().sum())

    with torch.no_grad():
        errors = [relative(out, two.transformer(**given)[0]) for given, out in calls]
    assert found.denoiser is not None
    assert found.latents is not None
    per_prompt = [sum(errors[:2]) / 2, sum(errors[2:]) / 2]
    assert found.denoiser.relative_error == pytest.approx(np.mean(per_prompt), rel=1e-3)
    assert found.denoiser.noise == pytest.approx(np.std(per_prompt, ddof=1) / math.sqrt(2), rel=1e-2)
    by_timestep = [each.error.relative_error for each in found.timesteps]
    assert by_timestep == pytest.approx([(errors[0] + errors[2]) / 2, (errors[1] + errors[3]) / 2], rel=1e-3)
    changed = [relative(x, y) for x, y in zip(before, draw(two, 7), strict=True)]
    assert found.latents.relative_error == pytest.approx(np.mean(changed), rel=1e-3)
    assert {name.partition(".")[0] for name in found.blocks} == {"transformer"}
    assert {layer.name.partition(".")[0] for layer in found.loss.layers} == {"transformer", "text_encoder_2"}


def test_gptq_and_importance_lose_less_of_what_the_denoiser_returns(
    flux: Path, compared: Any, known: Path, root: Path, tmp_path: Path
) -> None:
    components = ("transformer", "text_encoder_2")
    lost = {}
    for name, importance in (("absmax", None), ("importance", known)):
        api.quantize(flux, tmp_path / name, importance=importance, components=components, device="cpu")
        found = api.compare(flux, tmp_path / name, text=root / "prompts.txt", seed=7, **DRAWN).denoiser
        assert found is not None
        lost[name] = found.relative_error
    assert compared.denoiser.relative_error < lost["importance"] < lost["absmax"]


def test_what_cannot_be_drawn_is_refused_by_name(flux: Path, four_bit: Path, root: Path, tmp_path: Path) -> None:
    output, prompts = tmp_path / "stats.safetensors", root / "prompts.txt"
    given: dict[str, Any] = {"text": prompts, **DRAWN}
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UsageError, match="has no prompts"):
        api.calibrate(flux, output, text=tmp_path / "empty.txt", **DRAWN)
    with pytest.raises(MissingInput, match="plain text"):
        api.calibrate(flux, output, text=tmp_path / "absent.txt", **DRAWN)
    (tmp_path / "many.txt").write_text("a cat\n" * 600)
    with pytest.raises(UsageError, match="fewer lines"):
        api.calibrate(flux, output, text=tmp_path / "many.txt", **DRAWN)
    wrong: dict[str, Any]
    for wrong in ({"tokens": 9, "text": prompts}, {"generate": True}):
        with pytest.raises(UsageError, match="models that read text"):
            api.calibrate(flux, output, **wrong, **DRAWN)
    with pytest.raises(UsageError, match="--steps 0"):
        api.calibrate(flux, output, steps=0)
    with pytest.raises(UsageError, match="for pipelines"):
        api.calibrate(flux, output, subfolder="text_encoder", steps=3)
    with pytest.raises(Unsupported, match="already quantized"):
        api.calibrate(four_bit, output, **given)
    with pytest.raises(Unsupported, match="without its pipeline"):
        api.calibrate(flux / "transformer", output, device="cpu")
    with pytest.raises(Unsupported, match="does not use vae"):
        api.calibrate(flux, output, subfolder="vae", **given)
    index = json.loads((flux / "model_index.json").read_text())
    for name, said in (("FluxImg2ImgPipeline", "from a prompt alone"), ("DiTPipeline", "needs class_labels")):
        other = Path(shutil.copytree(flux, tmp_path / name))
        (other / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        with pytest.raises(Unsupported, match=said):
            api.calibrate(other, output, **given)
    assert not list(tmp_path.glob("stats*"))


def test_a_pipeline_draws_without_the_optional_component_that_cannot_be_run(root: Path, tmp_path: Path) -> None:
    pipeline = stable_diffusion(tmp_path / "sd")
    given: dict[str, Any] = {"text": root / "prompt.txt", **DRAWN, "steps": 1}
    api.quantize(pipeline, tmp_path / "nf4", device="cpu")
    found = api.compare(pipeline, tmp_path / "nf4", **given)
    assert any("safety_checker has no part in this" in warning for warning in found.warnings)
    assert found.denoiser is not None
    index = tmp_path / "nf4" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"safety_checker": [None, None]}))
    (tmp_path / "nf4" / "qz.json").unlink()
    one_has_it = api.compare(pipeline, tmp_path / "nf4", **given)
    assert one_has_it.warnings == found.warnings, "either's are told"
    stats = tmp_path / "stats.safetensors"
    calibrated = api.calibrate(pipeline, stats, **given)
    assert calibrated.components == ("text_encoder", "unet")
    assert any("safety_checker has no part in this" in warning for warning in calibrated.warnings)


def test_a_resolution_that_a_pipeline_cannot_be_asked_for_is_refused_and_not_ignored(
    flux: Path, root: Path, tmp_path: Path
) -> None:
    draws = diffusers.FluxPipeline.__call__

    def in_one_size(self: Any, prompt: Any, num_inference_steps: int, generator: Any, output_type: str) -> Any:
        how = {"num_inference_steps": num_inference_steps, "generator": generator, "output_type": output_type}
        return draws(self, prompt, height=32, width=32, **how)

    given: dict[str, Any] = {"text": root / "prompts.txt", "steps": 2, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.FluxPipeline, "__call__", in_one_size)
        with pytest.raises(UsageError, match="Leave out --resolution"):
            api.calibrate(flux, tmp_path / "stats", resolution=32, **given)
        found = api.calibrate(flux, tmp_path / "stats", **given)
    assert (found.steps, found.resolution) == (2, None)
    assert "resolution" not in read_statistics(tmp_path / "stats").metadata


def test_a_pipeline_that_does_not_fit_into_memory_is_refused_before_it_runs(
    flux: Path, root: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_free", lambda _: 100_000)
        with pytest.raises(TryAgain, match="GB of weights at once"):
            api.calibrate(flux, tmp_path / "stats.safetensors", text=root / "prompts.txt", **DRAWN)
    assert not list(tmp_path.iterdir())


def test_files_in_the_page_cache_of_a_limited_container_count_as_free(tmp_path: Path) -> None:
    """Its whole limit is soon full of the checkpoint that was read, which gives way to what is computed."""
    assert memory.left_in(tmp_path) is None
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("7900\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 6900\nactive_file 2000\ninactive_file 4500\n")
    assert memory.left_in(tmp_path) == 6600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.left_in(tmp_path) is None


def test_a_denoiser_that_returns_zeros_has_an_error_that_is_a_number(flux: Path, root: Path, tmp_path: Path) -> None:
    """As one whose last layer is zero when its training begins."""
    untrained = Path(shutil.copytree(flux, tmp_path / "untrained"))
    for file in (untrained / "transformer").glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors.keys() & {"proj_out.weight", "proj_out.bias"}:
            tensors[name].zero_()
        save_file(tensors, file, {"format": "pt"})
    api.quantize(untrained, tmp_path / "nf4", components=("transformer",), device="cpu")
    found = api.compare(untrained, tmp_path / "nf4", text=root / "prompt.txt", **DRAWN)
    assert found.denoiser is not None
    assert found.denoiser.relative_error == 0
    assert {each.error.relative_error for each in found.timesteps} == {0}


def test_what_is_not_the_same_pipeline_is_not_compared(flux: Path, four_bit: Path, root: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"text": root / "prompts.txt", **DRAWN}
    with pytest.raises(Unsupported, match="nothing to compare"):
        api.compare(flux, flux, **given)
    with pytest.raises(Unsupported, match="already quantized"):
        api.compare(four_bit, four_bit, **given)
    with pytest.raises(MalformedInput, match="two different pipelines"):
        api.compare(pipelines.sd3(tmp_path / "sd3"), four_bit, **given)
    with pytest.raises(MalformedInput, match="two different models"):
        api.compare(flux, four_bit / "text_encoder_2", subfolder="transformer", **given)
    less = Path(shutil.copytree(flux, tmp_path / "less"))
    index = json.loads((less / "model_index.json").read_text())
    (less / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": [None, None]}))
    with pytest.raises(MalformedInput, match="no weights of text_encoder_2"):
        api.compare(less, four_bit, **given)
