"""A whole pipeline becomes one folder that diffusers loads as it is, with the parts that are worth it quantized."""

from __future__ import annotations

import errno
import inspect
import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5EncoderModel

import pipelines
import qz.api
import reference
from commands import contents, run
from hooks import every_disk
from hub_server import connected
from qz import IOFailed, MalformedInput, MissingInput, OutputRefused, QzError, Unsupported, UsageError
from qz.cli.commands.dequantize import dequantize
from qz.cli.commands.quantize import quantize
from qz.formats.checkpoint.pipeline import Component, Pipeline, open_pipeline
from qz.formats.checkpoint.pipeline_class import arguments_of
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.recorded.record import verify_record
from qz.formats.publish.model_card.card_facts import facts_here
from qz.formats.publish.model_card.snippet import Here, loading
from qz.formats.tensors.decoded import StoredTensor
from qz.quantize.methods import FourBit, Int8
from qz.quantize.planning.components import choose

NF4 = FourBit("nf4")
DENOISERS = {"flux": FluxTransformer2DModel, "sd3": SD3Transformer2DModel, "sdxl": UNet2DConditionModel}
DTYPES = {"flux": torch.bfloat16, "sd3": torch.float16, "sdxl": torch.float32}
CHOSEN = {"flux": {"transformer", "text_encoder_2"}, "sd3": {"transformer", "text_encoder_3"}, "sdxl": {"unet"}}
NAMES = list(CHOSEN)


@pytest.fixture(autouse=True)
def _no_job_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three pipelines. Not to be changed by a test."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: getattr(pipelines, name)(root / name) for name in NAMES}


@pytest.fixture(scope="module")
def quantized(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """``qz quantize PIPELINE --nf4 --json`` of each: the output and the report. Not to be changed by a test."""
    root = tmp_path_factory.mktemp("quantized")
    return {name: (root / name, run(quantize, source, output=root / name)) for name, source in sources.items()}


def text_encoders(name: str) -> set[str]:
    return {part for part in CHOSEN[name] if part.startswith("text_encoder")}


def drawn(folder: Path, name: str, **parts: Any) -> np.ndarray:
    """A picture by the pipeline in ``folder``, with ``parts`` loaded by the caller."""
    for part in parts.values():
        for module in part.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # that kernel wants widths that small models do not have
                module.support_avx512bf16_for_cpu = False
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=DTYPES[name], **parts)
    pipeline.set_progress_bar_config(disable=True)
    more = {} if name == "sdxl" else {"max_sequence_length": 32}
    generator = torch.Generator("cpu").manual_seed(7)
    picture = pipeline(
        pipelines.PROMPT,
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="np",
        generator=generator,
        **more,
    ).images[0]
    assert np.isfinite(picture).all()
    return np.asarray(picture)


def denoiser_name(name: str) -> str:
    return "unet" if name == "sdxl" else "transformer"


@pytest.mark.parametrize("name", ["flux", "sdxl", pytest.param("sd3", marks=pytest.mark.soak)])
def test_the_output_draws_what_parts_draw_that_the_libraries_quantized_themselves(
    name: str, sources: dict[str, Path], quantized: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    source, output = sources[name], quantized[name][0]
    denoiser, model_class = denoiser_name(name), DENOISERS[name]
    ours = {denoiser: reference.diffusers_model(model_class, output / denoiser, None, DTYPES[name])}
    theirs = {denoiser: reference.diffusers_model(model_class, source / denoiser, "nf4", DTYPES[name])}
    for part in text_encoders(name):
        ours[part] = T5EncoderModel.from_pretrained(output / part, device_map="cpu")
        theirs[part] = reference.transformers_model(T5EncoderModel, source / part, "nf4")
    picture = drawn(output, name, **ours)
    assert np.array_equal(picture, drawn(source, name, **theirs))
    assert not np.array_equal(picture, drawn(source, name)), "quantization changed nothing"


@pytest.mark.parametrize("name", NAMES)
def test_each_component_is_byte_for_byte_what_its_library_saves(
    name: str, sources: dict[str, Path], quantized: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    output = quantized[name][0]
    denoiser = denoiser_name(name)
    reference.diffusers_model(DENOISERS[name], sources[name] / denoiser, "nf4", DTYPES[name]).save_pretrained(
        tmp_path / denoiser
    )
    assert not reference.differing_tensors(tmp_path / denoiser, output / denoiser)
    for part in text_encoders(name):
        reference.transformers_model(T5EncoderModel, sources[name] / part, "nf4").save_pretrained(tmp_path / part)
        assert not reference.differing_files(tmp_path / part, output / part)


@pytest.mark.parametrize("name", NAMES)
def test_everything_else_is_carried_over_unchanged_and_nothing_more(
    name: str, sources: dict[str, Path], quantized: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    source, output = contents(sources[name]), contents(quantized[name][0])
    untouched = {path: data for path, data in output.items() if path.split("/")[0] not in CHOSEN[name]}
    untouched.pop("qz.json")
    assert untouched == {path: source[path] for path in untouched}
    left = {path for path in source if path.split("/")[0] not in CHOSEN[name]} - untouched.keys()
    assert left == {
        "README.md",
        "dev_grid.jpg",
        "flux1-dev.safetensors",
        "pipeline.py",
        "vae/diffusion_pytorch_model.bin",
    }
    assert {
        "model_index.json",
        "LICENSE.md",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
    } <= untouched.keys()
    assert not verify_record(LocalFolder(quantized[name][0]))


@pytest.mark.parametrize("name", NAMES)
def test_the_report_has_a_row_for_each_component_and_totals_that_add_up(
    name: str, sources: dict[str, Path], quantized: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    output, report = quantized[name]
    index = json.loads((output / "model_index.json").read_text())
    rows = {row["name"]: row for row in report["components"]}
    assert rows.keys() == {key for key, value in index.items() if isinstance(value, list) and value[0]}
    assert {part for part, row in rows.items() if row["converted"]} == CHOSEN[name]
    assert all(row["reason"] for row in rows.values())
    for total in ("bytes", "memory_footprint"):
        for side in report[total].keys() - {"all_files"}:
            assert report[total][side] == sum(row[total][side] for row in rows.values())
    assert report["bytes"]["all_files"] == sum(
        len(data) for path, data in contents(output).items() if path != "qz.json"
    )
    assert report["source"]["architecture"] == index["_class_name"]
    assert {shard["name"] for shard in report["shards"]} == {
        path for path in contents(output) if path.endswith(".safetensors")
    }


def test_a_report_measures_each_component_as_a_run_of_its_own_does(sources: dict[str, Path], tmp_path: Path) -> None:
    made = run(quantize, sources["flux"], output=tmp_path / "out", report=True)
    planned = run(quantize, sources["flux"], output=tmp_path / "planned", report=True, dry_run=True)
    assert made["loss"] == planned["loss"]
    names = set()
    for row in made["components"]:
        assert (row["loss"] is not None) == row["converted"]
        if row["converted"]:
            alone = run(
                quantize, sources["flux"], output=tmp_path / "x", subfolder=row["name"], report=True, dry_run=True
            )
            assert row["loss"] == alone["loss"]
            names |= {f"{row['name']}.{layer['name']}" for layer in alone["loss"]["layers"]}
    assert {layer["name"] for layer in made["loss"]["layers"]} == names
    recorded = json.loads((tmp_path / "out/qz.json").read_text())["about"]
    for told, row in zip([recorded, *recorded["components"]], [made, *made["components"]], strict=True):
        one, other = ((each["loss"] or {"layers": []})["layers"] for each in (told, row))
        assert [each["name"] for each in one] == [each["name"] for each in other]
        errors = [[each["relative_error"] for each in side] for side in (one, other)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_footprint_is_the_sum_of_what_the_libraries_say(
    name: str, sources: dict[str, Path], quantized: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    output, report = quantized[name]
    index = json.loads((output / "model_index.json").read_text())
    before = after = 0
    for row in report["components"]:
        if not row["bytes"]["source"]:
            continue
        part, (library, class_name) = row["name"], index[row["name"]]
        model_class = getattr(__import__(library), class_name)
        keywords = {"dtype": "auto"} if library == "transformers" else {"dtype": DTYPES[name]}
        plain = model_class.from_pretrained(sources[name] / part, **keywords).get_memory_footprint()
        before += plain
        if not row["converted"]:
            after += plain
        elif library == "diffusers":
            after += reference.diffusers_model(model_class, output / part, None, DTYPES[name]).get_memory_footprint()
        else:
            after += model_class.from_pretrained(output / part, device_map="cpu").get_memory_footprint()
    assert report["memory_footprint"] == {"before": before, "after": after}


def test_a_dry_run_says_the_same_and_writes_nothing(
    sources: dict[str, Path], quantized: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    planned = run(quantize, sources["flux"], output=tmp_path / "out", dry_run=True)
    done = quantized["flux"][1]
    assert not list(tmp_path.iterdir())
    differing = {key for key in planned if planned[key] != done[key]}
    assert differing <= {"output", "dry_run", "seconds", "shards", "device"}
    sizes = [{shard["name"]: shard["bytes"] for shard in report["shards"]} for report in (planned, done)]
    assert sizes[0] == sizes[1]


def test_the_user_decides_what_is_quantized_and_how(sources: dict[str, Path], tmp_path: Path) -> None:
    report = run(
        quantize,
        sources["sd3"],
        output=tmp_path / "out",
        int8=True,
        double_quant=True,
        components="transformer",
        component=["text_encoder_2=nf4", "text_encoder_3=none"],
        skip=["transformer/proj_out"],
    )
    methods = {row["name"]: row["method"] for row in report["components"] if row["converted"]}
    assert methods == {"transformer": "int8", "text_encoder_2": "nf4"}
    assert report["method"] == "int8+nf4"
    config = {part: reference.config_of(tmp_path / "out" / part) for part in ("transformer", "text_encoder_2")}
    assert config["transformer"]["quantization_config"]["load_in_8bit"]
    assert config["transformer"]["quantization_config"]["llm_int8_skip_modules"] == ["proj_out"]
    assert config["text_encoder_2"]["quantization_config"]["bnb_4bit_use_double_quant"]
    assert config["text_encoder_2"]["quantization_config"]["llm_int8_skip_modules"] is None
    assert "quantization_config" not in reference.config_of(tmp_path / "out" / "text_encoder_3")
    transformer = reference.tensors_of(tmp_path / "out" / "transformer")
    assert transformer["proj_out.weight"].dtype == torch.float16


def test_a_vae_is_quantized_where_the_user_insists_and_is_told_how_little_that_is(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(quantize, sources["flux"], output=tmp_path / "out", components="vae")
    assert [row["name"] for row in report["components"] if row["converted"]] == ["vae"]
    assert "vae: only" in capsys.readouterr().err
    assert any(warning.startswith("vae: only") for warning in report["warnings"])


WRONG: dict[str, tuple[dict[str, Any], type[QzError], str]] = {
    "skip-nowhere": ({"skip": ["to_qq"]}, UsageError, r"matches no module of .*Did you mean to_q\b(?!.* or to_q\b)"),
    "skip-not-there": ({"skip": ["transformer/to_qq"]}, UsageError, r"matches no module of transformer"),
    "no-such-component": ({"components": "transfromer"}, UsageError, "no component transfromer"),
    "no-such-own-method": ({"component": ["te=int8"]}, UsageError, "no component te"),
    "nothing-left": ({"component": ["transformer=none", "text_encoder_2=none"]}, UsageError, "--components"),
    "without-weights": ({"components": "scheduler"}, UsageError, "no weights"),
    "weights-only": ({"weights_only": True}, UsageError, "--weights-only"),
    "skip-in-nothing": ({"skip": ["unet/proj_out"]}, UsageError, "no component unet"),
    "no-such-variant": ({"variant": "fp16"}, MissingInput, "fp16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    case: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    options, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        run(quantize, sources["flux"], output=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("component", "skip"),
    [
        ("", "DenseRelu"),
        ("transformer/", "atn"),
        ("transformer/", "transformer_blocks.0.attn.to_qq"),
        ("text_encoder_2/", "DenseRelu"),
        ("text_encoder_2/", "encoder.block.0.layer.0.k"),
    ],
)
def test_what_a_skip_that_matches_nothing_is_told_can_be_typed(
    component: str, skip: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=rf"--skip '?{component}{skip}'? ") as raised:
        run(quantize, sources["flux"], output=tmp_path / "out", dry_run=True, skip=[component + skip])
    advice = re.search(r"(?:Did you mean|Names there:|Name the layers inside: --skip) (.+)[?.]\Z", str(raised.value))
    assert advice is not None
    for each in re.split(" or |, ", advice[1]):
        report = run(quantize, sources["flux"], output=tmp_path / "out", dry_run=True, skip=shlex.split(each))
        assert report["skipped"]


@pytest.fixture
def changed(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the FLUX-shaped pipeline that a test may change."""
    return Path(shutil.copytree(sources["flux"], tmp_path / "flux"))


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_component_that_is_not_there_is_named(changed: Path, tmp_path: Path) -> None:
    shutil.rmtree(changed / "tokenizer_2")
    with pytest.raises(MissingInput, match=r"names tokenizer_2, but there is no such folder.* \[null, null\] there"):
        run(quantize, changed, output=tmp_path / "out")
    rewrite(changed / "model_index.json", tokenizer_2=[None, None])
    run(quantize, changed, output=tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer_2").exists()


@pytest.mark.parametrize(("name", "made"), [("LongCatAudioDiTPipeline", "scheduler"), ("LLaDA2Pipeline", "tokenizer")])
def test_a_component_that_its_class_makes_itself_needs_no_folder(
    name: str, made: str, changed: Path, tmp_path: Path
) -> None:
    _, optional = getattr(diffusers, name)._get_signature_keys(getattr(diffusers, name))
    assert made in optional  # what diffusers neither saves nor loads
    shutil.rmtree(changed / made)
    rewrite(changed / "model_index.json", _class_name=name)
    run(quantize, changed, output=tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert made in index
    assert not (tmp_path / "out" / made).exists()
    assert qz.api.inspect(str(tmp_path / "out")).errors == ()


@pytest.mark.parametrize("entry", [{"text_encoder": [None, None]}, {}])
def test_a_component_that_its_class_requires_and_the_index_does_not_give_is_told_and_passed(
    entry: dict[str, Any], changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = CLIPTextModel.from_pretrained(changed / "text_encoder")
    shutil.rmtree(changed / "text_encoder")
    index = json.loads((changed / "model_index.json").read_text())
    del index["text_encoder"]
    (changed / "model_index.json").write_text(json.dumps(index | entry))
    report = run(quantize, changed, output=tmp_path / "out")
    (told,) = (warning for warning in report["warnings"] if "gives no text_encoder, which FluxPipeline req" in warning)
    assert told in {problem.message for problem in qz.api.inspect(changed).problems}
    with pytest.raises(MissingInput, match="text_encoder=text_encoder"):
        qz.load(tmp_path / "out", device="cpu")
    monkeypatch.chdir(tmp_path)
    made = {"text_encoder": encoder}
    exec("\n".join(loading(facts_here(tmp_path / "out"), Here("./out", gpu=False))), made)
    assert made["pipeline"].text_encoder is encoder


def emptied(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "scheduler")
    (pipeline / "scheduler").mkdir()


def with_a_misnamed_processor(pipeline: Path) -> None:
    rewrite(pipeline / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    (pipeline / "feature_extractor").mkdir()
    (pipeline / "feature_extractor" / "image_processor.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (emptied, MissingInput, "scheduler is empty"),
        (with_a_misnamed_processor, MissingInput, "no preprocessor_config.json, which CLIPImageProcessor is loaded"),
        (
            lambda pipeline: (pipeline / "scheduler" / "scheduler_config.json").rename(
                pipeline / "scheduler" / "a.json"
            ),
            MissingInput,
            "has no scheduler_config.json, which FlowMatchEulerDiscreteScheduler is loaded from",
        ),
        (
            lambda pipeline: rewrite(pipeline / "model_index.json", vae=["diffusers", "AutoencoderKL", {}]),
            MalformedInput,
            "it gives vae as something else than its library and class",
        ),
    ],
)
def test_a_component_that_from_pretrained_could_not_load_is_refused(
    change: Any, error: type[QzError], told: str, changed: Path, tmp_path: Path
) -> None:
    change(changed)
    with pytest.raises((OSError, ValueError)):
        DiffusionPipeline.from_pretrained(changed)
    with pytest.raises(error, match=told):
        run(quantize, changed, output=tmp_path / "out")
    assert told in " ".join(problem.message for problem in qz.api.inspect(changed).errors)


def test_settings_that_look_like_components_are_none(changed: Path, tmp_path: Path) -> None:
    """As from_pretrained: what the class of the pipeline does not take as a component is a setting, or is ignored."""
    rewrite(changed / "model_index.json", sizes=["small", "large"])
    run(quantize, changed, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["sizes"] == ["small", "large"]
    assert qz.api.inspect(tmp_path / "out").problems == ()


@pytest.mark.parametrize(
    "name", ["FluxPipeline", "StableDiffusionPipeline", "WanPipeline", "LLaDA2Pipeline", "KandinskyCombinedPipeline"]
)
def test_what_a_pipeline_takes_is_read_as_the_library_has_it(name: str) -> None:
    found, known = arguments_of(name), getattr(diffusers, name)
    assert found is not None
    parameters = inspect.signature(known.__init__).parameters.values()
    required = {each.name for each in parameters if each.default is each.empty} - {"self"}
    optional = set(known._optional_components)
    assert found.components == required | optional
    connected = {each for each in required if known._load_connected_pipes and each.startswith("prior_")}
    assert set(found.needed) == required - optional - connected


def test_all_damaged_components_are_named_at_once(changed: Path, tmp_path: Path) -> None:
    (changed / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    (changed / "text_encoder" / "model.safetensors").unlink()
    for number in (1, 2):
        next((changed / "transformer").glob(f"*-0000{number}-of-*.safetensors")).unlink()
    with pytest.raises(MissingInput) as raised:
        run(quantize, changed, output=tmp_path / "out")
    assert "3 components" in str(raised.value)
    assert "transformer has 2 problems, the first: " in str(raised.value)
    assert "text_encoder" in str(raised.value)
    assert "vae" in str(raised.value)


def test_code_of_its_own_is_refused(changed: Path, tmp_path: Path) -> None:
    rewrite(changed / "model_index.json", transformer=["my_transformer", "MyTransformer"])
    (changed / "transformer" / "my_transformer.py").write_text("raise SystemExit\n")
    with pytest.raises(Unsupported, match=r"my_transformer\.py"):
        run(quantize, changed, output=tmp_path / "out")
    rewrite(changed / "model_index.json", _class_name=["pipeline", "MyPipeline"])
    with pytest.raises(Unsupported, match="code of its own"):
        run(quantize, changed, output=tmp_path / "out")


@pytest.mark.parametrize("asked", [{}, {"components": "vae"}, {"component": ["vae=none"]}])
@pytest.mark.parametrize("parts", [{}, {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}])
def test_a_pipeline_without_weights_is_a_missing_input(
    parts: dict[str, Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = tmp_path / "empty"
    (pipeline / "scheduler").mkdir(parents=True)
    (pipeline / "scheduler" / "scheduler_config.json").write_text("{}")
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
    with pytest.raises(MissingInput, match="no component with weights"):
        run(quantize, pipeline, output=tmp_path / "out", **asked)


def test_names_that_lead_out_of_the_pipeline_are_refused(changed: Path, tmp_path: Path) -> None:
    rewrite(changed / "model_index.json", **{"../flux/vae": ["diffusers", "AutoencoderKL"]})
    with pytest.raises(MalformedInput, match="names a component"):
        run(quantize, changed, output=tmp_path / "out")


def test_a_class_that_the_library_lacks_is_refused_if_asked_for_by_name_and_kept_if_not(
    changed: Path, tmp_path: Path
) -> None:
    rewrite(changed / "model_index.json", transformer=["diffusers", "FluxOfTomorrowTransformer2DModel"])
    with pytest.raises(Unsupported, match="--component transformer=none"):
        run(quantize, changed, output=tmp_path / "out", component=["transformer=nf4"])
    report = run(quantize, changed, output=tmp_path / "out")
    assert any("transformer is kept as it is: diffusers" in warning for warning in report["warnings"])
    assert contents(tmp_path / "out" / "transformer") == contents(changed / "transformer")
    assert [part["name"] for part in report["components"] if part["method"] != "none"] == ["text_encoder_2"]


@pytest.mark.parametrize("named", [["T5ForConditionalGeneration"], ["T5WithLMHeadModel"], None])
def test_the_class_in_the_pipelines_index_decides(
    named: list[str] | None, changed: Path, quantized: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    right, output = quantized["flux"][0], tmp_path / "out"
    rewrite(changed / "text_encoder_2" / "config.json", architectures=named)
    run(quantize, changed, output=output, component=["transformer=none"])
    assert contents(output / "text_encoder_2") == contents(right / "text_encoder_2")


def test_the_class_in_the_pipelines_index_is_enough(
    changed: Path, quantized: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    """As diffusers loads it: where config.json names no class at all, of a model of either library."""
    right, output = quantized["flux"][0], tmp_path / "out"
    for name, keys in (("transformer", ["_class_name"]), ("text_encoder_2", ["architectures", "model_type"])):
        path = changed / name / "config.json"
        path.write_text(
            json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in keys})
        )
    run(quantize, changed, output=output)
    for name in ("transformer", "text_encoder_2"):
        assert contents(output / name) == contents(right / name)
    assert not qz.api.inspect(changed, plan=True).errors


def test_a_class_in_the_pipelines_index_that_the_weights_are_not_of_is_told(changed: Path, tmp_path: Path) -> None:
    index = changed / "model_index.json"
    rewrite(index, text_encoder_2=["transformers", "UMT5EncoderModel"])
    with pytest.raises(
        MalformedInput, match=r"does not fit UMT5EncoderModel: .* Check the class that model_index.json"
    ):
        run(quantize, changed, output=tmp_path / "out")


@pytest.mark.parametrize("config", [True, False])
def test_a_component_of_onnx_goes_along(config: bool, changed: Path, tmp_path: Path) -> None:
    """Its class reads model.onnx, and weights that are too large for that lie beside it."""
    rewrite(changed / "model_index.json", vae=["diffusers", "OnnxRuntimeModel"])
    (changed / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    if not config:
        (changed / "vae" / "config.json").unlink()
    files = {name: name.encode() for name in ("model.onnx", "model.onnx_data", "weights.pb")}
    for name, data in files.items():
        (changed / "vae" / name).write_bytes(data)
    run(quantize, changed, output=tmp_path / "out")
    assert files.items() <= contents(tmp_path / "out" / "vae").items()


def test_a_pipeline_of_onnx_is_refused_with_what_to_get_instead(changed: Path, tmp_path: Path) -> None:
    names = [name for name in json.loads((changed / "model_index.json").read_text()) if (changed / name).is_dir()]
    for name in (name for name in names if any((changed / name).glob("*.safetensors"))):
        shutil.rmtree(changed / name)
        (changed / name).mkdir()
        (changed / name / "model.onnx").write_bytes(b"onnx")
        rewrite(changed / "model_index.json", **{name: ["diffusers", "OnnxRuntimeModel"]})
    with pytest.raises(Unsupported, match=r"pipeline of ONNX files.*safetensors"):
        run(quantize, changed, output=tmp_path / "out")


def test_a_pipeline_class_that_the_library_lacks_is_told(changed: Path, tmp_path: Path) -> None:
    rewrite(changed / "model_index.json", _class_name="FluxOfTomorrowPipeline")
    report = run(quantize, changed, output=tmp_path / "out")
    assert any("has no pipeline class FluxOfTomorrowPipeline" in warning for warning in report["warnings"])


def test_pickles_alone_are_refused(changed: Path, tmp_path: Path) -> None:
    (changed / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(MalformedInput, match="pickle"):
        run(quantize, changed, output=tmp_path / "out")


def test_a_variant_gets_the_plain_names_that_loaders_look_for(changed: Path, tmp_path: Path) -> None:
    plain = run(quantize, changed, output=tmp_path / "plain", components="transformer")
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        for path in sorted((changed / part).glob("*.safetensors")):
            head, dash, tail = path.name.partition("-")
            path.rename(path.with_name(f"{head}.fp16-{tail}" if dash else path.name.replace(".saf", ".fp16.saf")))
        for path in (changed / part).glob("*.safetensors.index.json"):
            index = json.loads(path.read_text())
            index["weight_map"] = {key: file.replace("-", ".fp16-", 1) for key, file in index["weight_map"].items()}
            path.unlink()
            path.with_name(path.name.replace("safetensors.", "safetensors.", 1).replace(
                "index.json", "index.fp16.json"
            )).write_text(json.dumps(index))  # fmt: skip
    report = run(quantize, changed, output=tmp_path / "variant", components="transformer", variant="fp16")
    assert report["bytes"]["output"] == plain["bytes"]["output"]
    one, other = contents(tmp_path / "plain"), contents(tmp_path / "variant")
    assert one.keys() == other.keys()
    differing = {path for path in one if one[path] != other[path]} - {"qz.json"}
    assert not {path for path in differing if not path.endswith(".index.json")}
    T5EncoderModel.from_pretrained(tmp_path / "variant" / "text_encoder_2")
    assert [text for text in report["warnings"] if "variant" in text] == [
        f"{changed}/vae has no weights of the variant 'fp16'; the plain ones are taken"
    ]
    unasked = run(quantize, changed, dry_run=True, components="transformer")
    assert {text.rpartition("/")[2] for text in unasked["warnings"] if "variant" in text} == {
        f"{part} has no plain weights; those of the variant fp16 are taken"
        for part in ("transformer", "text_encoder", "text_encoder_2")
    }


class Stopped(Exception):
    """The power cut of a test."""


@pytest.mark.parametrize("moment", ["text_encoder_2/model.safetensors", "transformer/config.json", "vae/config.json"])
def test_a_run_that_stopped_goes_on_and_ends_in_the_same_bytes(
    moment: str,
    sources: dict[str, Path],
    quantized: dict[str, tuple[Path, dict[str, Any]]],
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"

    def stop(operation: str, path: str) -> None:
        if operation == "rename" and path.endswith(moment):
            raise Stopped

    with every_disk(stop), pytest.raises(Stopped):
        run(quantize, sources["flux"], output=output)
    assert not output.exists()
    report = run(quantize, sources["flux"], output=output)
    assert report["resumed"] is (moment != "text_encoder_2/model.safetensors")
    assert contents(output) == contents(quantized["flux"][0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("faults", [4, pytest.param(64, marks=pytest.mark.soak)])
def test_whatever_operation_fails_nothing_half_made_is_left_and_the_next_run_ends_right(
    sources: dict[str, Path],
    quantized: dict[str, tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    faults: int,
) -> None:
    expected, writing = contents(quantized["flux"][0]), str(tmp_path)
    seen: list[str] = []

    def count(operation: str, path: str) -> None:
        if path.startswith(writing) and operation != "close":
            seen.append(operation)

    def fail(number: int, operation: str, path: str) -> None:
        if path.startswith(writing) and operation != "close":
            seen.append(operation)
            if len(seen) == number:
                raise OSError(errno.EIO, "Input/output error")

    with every_disk(count):
        run(quantize, sources["flux"], output=tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    total = len(seen)
    for number in range(total // (2 * faults), total, total // faults):
        seen.clear()
        with every_disk(partial(fail, number)), pytest.raises(IOFailed, match="Input/output error"):
            run(quantize, sources["flux"], output=tmp_path / "out", threads=1)
        assert len(seen) >= number, "the fault was never met"
        assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == expected
        if not (tmp_path / "out").exists():
            run(quantize, sources["flux"], output=tmp_path / "out")
        assert contents(tmp_path / "out") == expected
        shutil.rmtree(tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_untouched_weights_of_some_size_are_not_copied_twice(changed: Path, tmp_path: Path) -> None:
    path = changed / "text_encoder" / "model.safetensors"
    config = changed / "text_encoder" / "config.json"
    rewrite(config, vocab_size=60_000)
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    tensors[name] = torch.zeros(60_000, tensors[name].shape[1], dtype=torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    copied: list[str] = []

    def watch(operation: str, path: str) -> None:
        if operation == "rename":
            copied.append(path)
            if "transformer" in path and path.endswith(".safetensors") and len(copied) < 100:
                raise Stopped

    with every_disk(watch):
        with pytest.raises(Stopped):
            run(quantize, changed, output=tmp_path / "out")
        copied[:] = [""] * 100
        report = run(quantize, changed, output=tmp_path / "out")
    assert report["resumed"]
    assert not any(path.endswith("text_encoder/model.safetensors") for path in copied)
    assert (tmp_path / "out" / "text_encoder" / "model.safetensors").read_bytes() == path.read_bytes()


def test_dequantize_undoes_it(
    sources: dict[str, Path], quantized: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    output = quantized["flux"][0]
    report = run(dequantize, output, output=tmp_path / "back")
    assert report["act"] == "dequantize"
    assert {row["name"] for row in report["components"] if row["converted"]} == CHOSEN["flux"]
    back, source = contents(tmp_path / "back"), contents(sources["flux"])
    kept = {path for path in back if path.split("/")[0] not in CHOSEN["flux"]} - {"qz.json"}
    assert all(back[path] == source[path] for path in kept)
    for part in CHOSEN["flux"]:
        assert "quantization_config" not in reference.config_of(tmp_path / "back" / part)
        one, other = reference.tensors_of(sources["flux"] / part), reference.tensors_of(tmp_path / "back" / part)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert other[name].dtype == tensor.dtype
            assert (other[name] - tensor).norm() <= 0.12 * tensor.norm(), name
    drawn(tmp_path / "back", "flux")  # without a word about quantization, and without a GPU
    with pytest.raises(Unsupported, match="nothing to dequantize"):
        run(dequantize, tmp_path / "back", output=tmp_path / "again")
    with pytest.raises(Unsupported, match="already quantized"):
        run(quantize, output, output=tmp_path / "again")


def test_configs_that_outlived_their_quantization_are_told_of_every_component(changed: Path, tmp_path: Path) -> None:
    """Whether it would be quantized or not. With what the warnings tell done, there is nothing left to tell."""
    left = {"transformer": {"quant_method": "torchao"}, "text_encoder": {}, "vae": [1]}
    for name, stated in left.items():
        rewrite(changed / name / "config.json", quantization_config=stated)
    dry = partial(run, quantize, changed, output=tmp_path / "out", dry_run=True)
    told = dry()["warnings"]
    pattern = r"(\w+) is kept as it is: \S+/\1/config.json .*quantiz.* remove \S+"
    assert {found[1] for each in told if (found := re.match(pattern, each))} == left.keys()
    with pytest.raises(Unsupported, match="quantized with torchao, but none of its weights is"):
        dry(components="transformer")
    rewrite(changed / "text_encoder_2" / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(Unsupported, match="nothing can be quantized as it is:") as refused:
        dry()
    assert len(str(refused.value).splitlines()) == 1 + len(left) + 1
    for config in changed.glob("*/config.json"):
        told = json.loads(config.read_text())
        told.pop("quantization_config", None)
        config.write_text(json.dumps(told))
    assert dry()["warnings"] == []


def test_an_index_without_metadata_is_written_as_loaders_read_it(changed: Path, tmp_path: Path) -> None:
    """Of a component that is kept; transformers and diffusers raise KeyError for such a source."""
    (index,) = (changed / "text_encoder_2").glob("*.index.json")
    told = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": told["weight_map"]}))
    assert "index-metadata" in {problem.kind for problem in qz.api.inspect(changed).problems}
    with pytest.raises(KeyError, match="metadata"):
        T5EncoderModel.from_pretrained(changed / "text_encoder_2")
    run(quantize, changed, output=tmp_path / "out", component=["text_encoder_2=none"])
    written = json.loads((tmp_path / "out" / "text_encoder_2" / index.name).read_text())
    assert (written["metadata"]["total_size"], written["weight_map"]) == (
        told["metadata"]["total_size"],
        told["weight_map"],
    )
    T5EncoderModel.from_pretrained(tmp_path / "out" / "text_encoder_2")


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("text_encoder/model", ".fc1.weight", ".fc1.weight", "holds I8 codes, but nothing that says what they stand"),
        ("text_encoder/model", ".fc1.weight", ".fc1._weight_qdata", "does not fit CLIPTextModel: missing: "),
        ("vae/diffusion_pytorch_model", ".to_q.weight", ".to_q.SCB", "already quantized with bitsandbytes"),
    ],
)
def test_packed_weights_of_a_kept_component_are_told_where_no_config_says_how(
    file: str, old: str, new: str, told: str, changed: Path, tmp_path: Path
) -> None:
    path = changed / f"{file}.safetensors"
    tensors = load_file(path).items()
    codes = {name.replace(old, new): each.char() if name.endswith(old) else each for name, each in tensors}
    save_file(codes, path, metadata={"format": "pt"})
    (warning,) = run(quantize, changed, output=tmp_path / "out", dry_run=True)["warnings"]
    assert warning.startswith(f"{file.partition('/')[0]} is kept as it is: ")
    assert told in warning


def test_a_second_run_with_nothing_to_do_says_so(
    changed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    first = run(quantize, changed, output=output, if_exists="skip")
    assert first["up_to_date"] is False
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "page.md"))
    again = run(quantize, changed, output=output, if_exists="skip")
    assert again["up_to_date"] is True
    assert "up to date" in capsys.readouterr().err
    assert "up to date" in (tmp_path / "page.md").read_text()
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    same = set(first) - {"up_to_date", "seconds", "resumed", "nonfinite"}
    assert (first["nonfinite"], again["nonfinite"]) == ([], None), "nothing was read to tell"
    assert {key: again[key] for key in same} == {key: first[key] for key in same}


def test_skip_does_not_pass_off_another_output_as_done(changed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(quantize, changed, output=output)
    for options in ({"fp4": True}, {"component": ["text_encoder_2=int8"]}, {"compute_dtype": "float16"}):
        with pytest.raises(
            OutputRefused,
            match=r"different settings \((method: nf4 → fp4|component methods text_encoder_2|method compute dtype: )",
        ):
            run(quantize, changed, output=output, if_exists="skip", **options)
    weights = output / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(OutputRefused, match="damaged"):
        run(quantize, changed, output=output, if_exists="skip")
    weights.write_bytes(whole)
    shard = next((changed / "transformer").glob("*-00001-of-*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(OutputRefused, match="newer"):
        run(quantize, changed, output=output, if_exists="skip")
    run(quantize, changed, output=output, if_exists="overwrite")
    assert run(quantize, changed, output=output, if_exists="skip")["up_to_date"]
    with pytest.raises(OutputRefused, match="exists and is not empty"):
        run(quantize, changed, output=output)


def test_skip_refuses_what_qz_did_not_make(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(OutputRefused, match="was not written by qz"):
        run(quantize, sources["flux"], output=tmp_path / "out", if_exists="skip")


def test_the_table_and_the_page_of_a_job_have_a_row_for_each_model(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "page.md"))
    quantize(str(sources["flux"]), output=tmp_path / "out", device="cpu")
    table, page = capsys.readouterr().out, (tmp_path / "page.md").read_text()
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        assert f"\n{part} " in table
        assert part.replace("_", r"\_") in page
    assert "denoiser" in table
    assert "unchanged   scheduler, tokenizer, tokenizer_2" in table


def test_a_pipeline_on_the_hub_becomes_the_same_bytes(
    sources: dict[str, Path],
    quantized: dict[str, tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with connected(monkeypatch, tmp_path / "home") as hub:
        hub.add("me/flux", contents(sources["flux"]))
        output = tmp_path / "out"
        report = run(quantize, "me/flux", output=output)
        assert run(quantize, "me/flux", output=output, if_exists="skip")["up_to_date"]
        hub.commit("me/flux", {"transformer/config.json": contents(sources["flux"])["transformer/config.json"] + b"\n"})
        with pytest.raises(OutputRefused, match="commit"):
            run(quantize, "me/flux", output=output, if_exists="skip")
    assert len(report["source"]["revision"]) == 40
    one, other = contents(output), contents(quantized["flux"][0])
    assert {path: data for path, data in one.items() if path != "qz.json"} == {
        path: data for path, data in other.items() if path != "qz.json"
    }


def test_pipeline_options_are_refused_for_one_model(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a pipeline"):
        run(quantize, sources["flux"], subfolder="transformer", components="transformer", output=tmp_path / "out")


# What is chosen at the sizes of real pipelines

SHAPES: dict[str, dict[str, tuple[str, str, float, float]]] = {
    "FLUX.1-dev": {
        "transformer": ("diffusers", "FluxTransformer2DModel", 11.9, 0),
        "text_encoder": ("transformers", "CLIPTextModel", 0.123, 0),
        "text_encoder_2": ("transformers", "T5EncoderModel", 4.76, 0),
        "vae": ("diffusers", "AutoencoderKL", 0.084, 0.97),
    },
    "SD3-medium": {
        "transformer": ("diffusers", "SD3Transformer2DModel", 2.03, 0),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection", 0.124, 0),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", 0.695, 0),
        "text_encoder_3": ("transformers", "T5EncoderModel", 4.76, 0),
        "vae": ("diffusers", "AutoencoderKL", 0.084, 0.97),
    },
    "SDXL": {
        "unet": ("diffusers", "UNet2DConditionModel", 2.57, 0.13),
        "text_encoder": ("transformers", "CLIPTextModel", 0.123, 0),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", 0.695, 0),
        "vae": ("diffusers", "AutoencoderKL", 0.084, 0.97),
    },
    "SD1.5": {
        "unet": ("diffusers", "UNet2DConditionModel", 0.86, 0.68),
        "text_encoder": ("transformers", "CLIPTextModel", 0.123, 0),
        "safety_checker": ("transformers", "CLIPSafetyChecker", 0.304, 0),
        "vae": ("diffusers", "AutoencoderKL", 0.084, 0.97),
    },
    "Qwen-Image": {
        "transformer": ("diffusers", "QwenImageTransformer2DModel", 20.4, 0),
        "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration", 8.29, 0),
        "vae": ("diffusers", "AutoencoderKLQwenImage", 0.127, 0.99),
    },
    "Wan2.2-I2V": {
        "transformer": ("diffusers", "WanTransformer3DModel", 14.3, 0),
        "transformer_2": ("diffusers", "WanTransformer3DModel", 14.3, 0),
        "text_encoder": ("transformers", "UMT5EncoderModel", 5.68, 0),
        "image_encoder": ("transformers", "CLIPVisionModel", 0.63, 0),
        "vae": ("diffusers", "AutoencoderKLWan", 0.127, 0.99),
    },
    "PixArt-Sigma": {
        "transformer": ("diffusers", "PixArtTransformer2DModel", 0.61, 0),
        "text_encoder": ("transformers", "T5EncoderModel", 4.76, 0),
        "vae": ("diffusers", "AutoencoderKL", 0.084, 0.97),
    },
    "StableAudio": {
        "transformer": ("diffusers", "StableAudioDiTModel", 1.06, 0),
        "text_encoder": ("transformers", "T5EncoderModel", 0.11, 0),
        "projection_model": ("diffusers", "StableAudioProjectionModel", 0.001, 0),
        "vae": ("diffusers", "AutoencoderOobleck", 0.156, 0.99),
    },
}
REAL = {
    "FLUX.1-dev": {"transformer", "text_encoder_2"},
    "SD3-medium": {"transformer", "text_encoder_3"},
    "SDXL": {"unet"},
    "SD1.5": {"unet"},
    "Qwen-Image": {"transformer", "text_encoder"},
    "Wan2.2-I2V": {"transformer", "transformer_2", "text_encoder"},
    "PixArt-Sigma": {"transformer", "text_encoder"},
    "StableAudio": {"transformer"},
}


def shaped(name: str) -> Pipeline:
    """A pipeline of the real one's sizes (10^9 parameters, share of convolutions), as its headers show it."""
    folder: Any = SimpleNamespace(location=name)

    def component(part: str, library: Any, class_name: str, billions: float, convolutions: float) -> Component:
        shapes: dict[str, tuple[int, ...]] = {
            "linear.weight": (round(billions * (1 - convolutions) * 1e6), 1000),
            "conv.weight": (round(billions * convolutions * 1e6), 1000, 1, 1),
        }
        tensors = {name: StoredTensor(name, "BF16", shape, "f", 0, 0) for name, shape in shapes.items()}
        checkpoint = Checkpoint(folder, {}, library, class_name, None, ("f",), {"f": 1}, tensors)
        return Component(part, library, class_name, folder, checkpoint)

    scheduler = Component("scheduler", "diffusers", "EulerDiscreteScheduler", folder)
    return Pipeline(folder, name, (scheduler, *(component(part, *facts) for part, facts in SHAPES[name].items())))


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_worth_it_at_the_size_of_real_pipelines(name: str) -> None:
    choices = choose(shaped(name), NF4)
    assert {choice.name for choice in choices if choice.method is not None} == REAL[name]
    assert choices[0].reason == "has no weights"


def test_a_method_of_its_own_adds_to_the_choice_and_none_takes_from_it() -> None:
    choices = choose(shaped("FLUX.1-dev"), NF4, methods={"text_encoder": Int8(), "text_encoder_2": None})
    methods = {choice.name: choice.method for choice in choices if choice.method is not None}
    assert methods == {"transformer": NF4, "text_encoder": Int8()}


def test_names_given_replace_the_choice() -> None:
    choices = choose(shaped("FLUX.1-dev"), NF4, ("text_encoder_2",), {"vae": Int8()})
    assert {choice.name for choice in choices if choice.method is not None} == {"text_encoder_2", "vae"}
    assert {choice.name: choice.reason for choice in choices}["transformer"] == "not asked for"


def test_the_readers_do_not_import_the_libraries() -> None:
    for module in (choose, open_pipeline):
        text = Path(inspect.getfile(module)).read_text()
        assert "import torch" not in text
        assert "import diffusers" not in text
