"""--target-size and --max-loss: the most sensitive linears stay unquantized, and what is promised is what is loaded."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers.pytorch_utils import Conv1D

import pipelines
import reference
from qz import MalformedInput, UsageError, api
from qz.cli.reports.model import kept_sections
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.recorded.record import read_record
from qz.quantize.calibration.running import text
from qz.quantize.calibration.running.blocks import parts_of
from qz.quantize.importance.statistics import read_statistics, write_statistics
from qz.quantize.planning.budget.fused_groups import FUSED
from qz.quantize.planning.budget.kept_layers import Point
from qz.quantize.planning.budget.sensitivity import Scores
from qz.quantize.planning.budget.shared_loss import Curve, shared_room, walk
from readers import model_folder, some_text
from zoo import build

Qz = Callable[..., subprocess.CompletedProcess[str]]


def loaded(folder: Path, **how: Any) -> Any:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, **how).eval()


def kept_in(folder: Path) -> set[str]:
    """The linears of a plainly loaded output that are not quantized."""
    model = loaded(folder)
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and getattr(module.weight, "quant_state", None) is None
    }


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.flux(tmp_path_factory.mktemp("flux") / "flux")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, a text, and the scores of the one on the other. Not to be changed by a test."""
    root = tmp_path_factory.mktemp("scored")
    folder, words = model_folder("llama-untied", root / "model"), some_text(root / "words.txt")
    api.calibrate(folder, root / "scores.safetensors", text=words, tokens=600, scores=True, device="cpu")
    return folder, words, root / "scores.safetensors"


def by_bitsandbytes(weight: torch.Tensor, *, turned: bool) -> torch.Tensor:
    codes, state = quantize_4bit(weight.T.contiguous() if turned else weight, blocksize=64, quant_type="nf4")
    again: torch.Tensor = dequantize_4bit(codes, state)
    return again.T if turned else again


def loss(before: Any, after: Any) -> float:
    """KL divergence of predictions, or 1 − cosine of mean states."""
    if hasattr(before, "logits"):
        one, two = (each.logits[0].double().log_softmax(-1) for each in (before, after))
        return float((one.exp() * (one - two)).sum(-1).mean())
    one, two = (each.last_hidden_state[0].double().mean(0) for each in (before, after))
    return float(1 - torch.nn.functional.cosine_similarity(one, two, dim=0))


@pytest.mark.parametrize("name", ["llama-untied", "gpt2", "bert", "t5-encoder", "mixtral"])
def test_a_score_is_a_linears_share_of_what_is_lost_when_bitsandbytes_quantizes_its_block(
    name: str, tmp_path: Path
) -> None:
    folder, words = model_folder(name, tmp_path / "model"), some_text(tmp_path / "words.txt")
    scores = api.calibrate(folder, tmp_path / "scores", text=words, tokens=80, scores=True, device="cpu").scores
    assert scores is not None
    model = loaded(folder, dtype=torch.float32)
    ids = torch.tensor(text.sequences(transformers.AutoTokenizer.from_pretrained(folder), words.read_text(), 512, 80))
    blocks = {path: [n for n in scores.of if n.startswith(f"{path}.")] for path in parts_of(model)}
    blocks = {path: names for path, names in blocks.items() if names}
    outputs: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            outputs[path] = output if torch.is_tensor(output) else output[0]

        return hook

    def run(quantized: list[str]) -> tuple[Any, dict[str, torch.Tensor]]:
        """With some weights quantized: the answer, and the output of every block."""
        kept = {weight: model.get_parameter(weight).data.clone() for weight in quantized}
        for weight, value in kept.items():
            turned = isinstance(model.get_submodule(weight.removesuffix(".weight")), Conv1D)
            model.get_parameter(weight).data.copy_(by_bitsandbytes(value, turned=turned))
        with torch.no_grad():
            answer = model(input_ids=ids)
        for weight, value in kept.items():
            model.get_parameter(weight).data.copy_(value)
        return answer, dict(outputs)

    for path in blocks:
        model.get_submodule(path).register_forward_hook(keep(path))
    plain, before = run([])
    assert scores.total == pytest.approx(loss(plain, run(list(scores.of))[0]), rel=2e-2, abs=1e-9)
    for path, names in blocks.items():
        expected = before[path].double()
        errors = {}
        for weight in names:
            change = run([weight])[1][path].double() - expected
            errors[weight] = float((change.square().sum(-1) / expected.square().sum(-1)).mean())
        lost = loss(plain, run(names)[0])
        for weight in names:
            share = lost * errors[weight] / sum(errors.values())
            assert scores.of[weight] == pytest.approx(share, rel=5e-2, abs=1e-9), weight


def test_the_loss_of_all_is_what_compare_finds_in_the_quantized_model(
    scored: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder, words, file = scored
    scores = read_statistics(file).scores
    assert scores is not None
    assert (scores.method, scores.loss, scores.tokens) == ("nf4", "kl", 600)
    api.quantize(folder, tmp_path / "nf4", device="cpu")
    found = api.compare(folder, tmp_path / "nf4", text=words, tokens=600, device="cpu")
    assert found.kl == pytest.approx(scores.total, rel=0.1)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama-tied", api.Nf4()),
        ("llama-fp32", api.Fp4()),
        ("gpt2", api.Nf4()),
        ("bert", api.Int8()),
        ("qwen3-moe", api.Nf4()),
    ],
)
def test_the_loaded_model_fills_the_size_as_far_as_whole_groups_allow(name: str, method: Any, tmp_path: Path) -> None:
    folder = model_folder(name, tmp_path / "model")
    least: Any = api.quantize(folder, tmp_path / "x", method=method, dry_run=True, device="cpu")
    target = (3 * least.footprint_after + 2 * least.footprint_before) // 5
    done: Any = api.quantize(folder, tmp_path / "out", method=method, target_size=target, device="cpu")
    kept = set(done.kept_layers.kept)
    assert kept
    model = loaded(tmp_path / "out")
    assert model.get_memory_footprint() == done.footprint_after <= target
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert kept <= set(config["llm_int8_skip_modules"])
    assert kept <= set(done.skipped)
    for path in kept:
        parent, _, leaf = path.rpartition(".")
        group = {f"{parent}.{each}" for names in FUSED if leaf in names for each in names} & set(least_linears(model))
        assert group <= kept
    assert not any("fuses" in warning for warning in done.warnings)
    sizes = [after.size - before.size for before, after in pairwise(done.kept_layers.curve)]
    assert target - done.footprint_after < max(sizes)


def least_linears(model: Any) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]


def test_a_size_that_cannot_be_is_refused_with_the_least_that_can_and_one_that_needs_nothing_too(
    scored: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder, _, _ = scored
    plain: Any = api.quantize(folder, tmp_path / "x", dry_run=True, device="cpu")
    least = plain.footprint_after
    with pytest.raises(UsageError) as refused:
        api.quantize(folder, tmp_path / "out", target_size=least - 1, device="cpu")
    assert "takes at least" in str(refused.value)
    assert f"({least:,} bytes)" in str(refused.value)
    with pytest.raises(UsageError, match="With --nf4 it would be smaller"):
        api.quantize(folder, tmp_path / "out", target_size=least, method=api.Int8(), device="cpu")
    with pytest.raises(UsageError, match="fits as it is"):
        api.quantize(folder, tmp_path / "out", target_size=plain.footprint_before, device="cpu")
    done: Any = api.quantize(folder, tmp_path / "out", target_size=least, device="cpu")
    assert (done.footprint_after, done.kept_layers.kept) == (least, ())
    assert not (tmp_path / "x").exists()


def test_scores_decide_which_linears_are_kept(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, _, _ = scored
    plain: Any = api.quantize(folder, tmp_path / "x", dry_run=True, device="cpu")
    target = plain.footprint_after + (plain.footprint_before - plain.footprint_after) // 2
    for layer in ("0.mlp.down_proj", "1.self_attn.o_proj"):
        wanted = f"model.layers.{layer}.weight"
        statistics = read_statistics(scored[2])
        of = {name: 1.0 if name == wanted else 1e-9 for name in statistics.scores.of}  # type: ignore[union-attr]
        file = tmp_path / f"{layer}.safetensors"
        write_statistics(file, statistics.sums, {}, scores=Scores(of, "nf4", "kl", 0.5, 10))
        done: Any = api.quantize(folder, target_size=target, scores=file, dry_run=True, device="cpu")
        assert wanted.removesuffix(".weight") in done.kept_layers.kept
        assert done.kept_layers.kept[0] == wanted.removesuffix(".weight")
        assert done.kept_layers.loss < 0.01
        weighed: Any = api.quantize(folder, target_size=target, importance=file, dry_run=True, device="cpu")
        assert weighed.kept_layers.kept == done.kept_layers.kept


def test_a_loss_is_kept_by_as_few_linears_as_it_needs(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, _, file = scored
    scores = read_statistics(file).scores
    assert scores is not None
    most = scores.total * 0.6
    done: Any = api.quantize(folder, tmp_path / "out", max_loss=most, scores=file, split_groups=True, device="cpu")
    curve = done.kept_layers.curve
    here = next(n for n, point in enumerate(curve) if point.kept == len(done.kept_layers.kept))
    assert curve[here].loss <= most < curve[here - 1].loss
    assert done.kept_layers.loss == pytest.approx(curve[here].loss)
    assert kept_in(tmp_path / "out") == {*done.kept_layers.kept, "lm_head"}
    with pytest.raises(UsageError, match="to lose no more"):
        api.quantize(folder, max_loss=most, target_size=done.footprint_after - 1, scores=file, split_groups=True)
    with pytest.raises(UsageError, match=r"all that .* has would have to stay"):
        api.quantize(folder, max_loss=0.0, scores=file)
    with pytest.raises(UsageError, match="tells what nf4 loses, and not fp4"):
        api.quantize(folder, max_loss=most, scores=file, method=api.Fp4())
    with pytest.raises(UsageError, match="needs to know what each linear loses"):
        api.quantize(folder, max_loss=most)
    with pytest.raises(UsageError, match="--scores is for"):
        api.quantize(folder, scores=file)


def test_from_the_command_line_with_a_picture_and_the_same_again(
    forked_qz: Qz, scored: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder, _, file = scored
    before: Any = api.quantize(folder, tmp_path / "x", dry_run=True, device="cpu")
    target = str((before.footprint_after + before.footprint_before) // 2)
    asked = ("quantize", folder, "-o", "out", "--target-size", target, "--scores", file)
    shown = forked_qz(*asked, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "expected loss" in shown.stdout
    assert "→ " in shown.stdout
    bars = [line.count("█") for line in shown.stdout.splitlines() if "█" in line]
    assert bars == sorted(bars, reverse=True)
    assert bars[0] > bars[-1]
    done = forked_qz(*asked, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["kept_layers"]
    assert report["scores"]["file"] == file.name
    record = read_record(LocalFolder(tmp_path / "out"))
    assert record is not None
    command: Any = record.about["command"]
    assert [*command[3:]] == ["--nf4", "--target-size", target, "--scores", file.name]
    assert forked_qz(*asked, "--if-exists", "skip").returncode == 0
    assert forked_qz(*asked[:-2], "--if-exists", "skip").returncode == 73
    refused = forked_qz("quantize", folder, "-o", "other", "--target-size", "1MB", "--split-groups", "--max-loss", "-1")
    assert refused.returncode == 2


def test_what_was_kept_is_verified_without_the_scores(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, _, file = scored
    plain: Any = api.quantize(folder, tmp_path / "x", dry_run=True, device="cpu")
    target = (plain.footprint_after + plain.footprint_before) // 2
    api.quantize(folder, tmp_path / "out", target_size=target, scores=file, device="cpu")
    assert api.verify(tmp_path / "out", folder, device="cpu").intact


@pytest.mark.parametrize("share", [3, pytest.param(8, marks=pytest.mark.soak)])
def test_what_was_kept_of_a_pipeline_is_verified(share: int, flux: Path, tmp_path: Path) -> None:
    whole: Any = api.quantize(flux, tmp_path / "x", dry_run=True, device="cpu")
    target = whole.footprint_after + share * (whole.footprint_before - whole.footprint_after) // 10
    api.quantize(flux, tmp_path / "out", target_size=target, device="cpu")
    assert api.verify(tmp_path / "out", flux, device="cpu").intact


@pytest.mark.parametrize("change", ["total", "method", "score"])
def test_scores_that_are_none_are_refused(change: str, scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    statistics = read_statistics(scored[2])
    name = next(iter(statistics.sums))
    wrong = {
        "total": Scores({name: 1.0}, "nf4", "kl", float("nan"), 1),
        "method": Scores({name: 1.0}, "q4_k", "kl", 1.0, 1),
        "score": Scores({name: -1.0}, "nf4", "kl", 1.0, 1),
    }[change]
    write_statistics(tmp_path / "wrong", statistics.sums, {}, scores=wrong)
    with pytest.raises(MalformedInput, match="score"):
        read_statistics(tmp_path / "wrong")


def test_a_denoiser_keeps_linears_by_names_that_match_no_other(tmp_path: Path) -> None:
    """diffusers takes a key for a whole path, or for a part of one that a dot follows."""
    import diffusers

    for name in ("flux", "sd3"):
        folder = tmp_path / name
        build(name).save_pretrained(folder)
        plain: Any = api.quantize(folder, tmp_path / "x", dry_run=True, device="cpu")
        target = (plain.footprint_after + plain.footprint_before) // 2
        done: Any = api.quantize(folder, tmp_path / f"{name}-nf4", target_size=target, device="cpu")
        model_class = getattr(diffusers, done.source.architecture)
        model = reference.diffusers_model(model_class, tmp_path / f"{name}-nf4", None, getattr(torch, done.dtype))
        assert model.get_memory_footprint() == done.footprint_after <= target
        kept = {
            path
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and getattr(module.weight, "quant_state", None) is None
        }
        assert kept >= set(done.kept_layers.kept) > set()
        assert kept == set(done.skipped)


def test_what_is_worth_most_for_its_bytes_is_kept_first_whichever_component_it_is_of() -> None:
    one = (Point(0, 100, 1.0), Point(1, 110, 0.4), Point(2, 200, 0.0))
    other = (Point(0, 50, 2.0), Point(3, 60, 1.9), Point(4, 80, 1.9))
    assert shared_room({"one": one, "other": other}, 0) == {"one": 100, "other": 50}
    assert shared_room({"one": one, "other": other}, 20) == {"one": 110, "other": 60}
    assert shared_room({"one": one, "other": other}, 95) == {"one": 110, "other": 60}, "90 bytes are too much"
    assert shared_room({"one": one, "other": other}, 1000) == {"one": 200, "other": 60}, "worth nothing"
    curves = [Curve(one), Curve(other)]
    points, chosen = walk(curves, 7, 2.4)
    assert (chosen, [curve.at for curve in curves]) == (Point(1, 167, 2.4), [1, 0])
    assert [point.kept for point in points] == [0, 1, 4, 5, 6]
    assert walk([Curve(one)], 0, -1.0)[1] == one[-1]


def footprint(pipeline: Path, row: dict[str, Any]) -> int:
    """``get_memory_footprint()`` of a component as its library loads it."""
    library, name = json.loads((pipeline / "model_index.json").read_text())[row["name"]]
    if not row["bytes"]["source"]:
        return 0
    model_class, folder = getattr(__import__(library), name), pipeline / row["name"]
    if library == "transformers":
        return int(model_class.from_pretrained(folder, device_map="cpu", dtype="auto").get_memory_footprint())
    if not row["converted"]:
        return int(model_class.from_pretrained(folder, torch_dtype=torch.bfloat16).get_memory_footprint())
    return int(reference.diffusers_model(model_class, folder, None, torch.bfloat16).get_memory_footprint())


@pytest.mark.parametrize("share", [0.05, 0.7, pytest.param(0.4, marks=pytest.mark.soak)])
def test_a_pipelines_size_chooses_each_components_method(share: float, flux: Path, tmp_path: Path) -> None:
    plain: Any = api.quantize(flux, tmp_path / "x", dry_run=True, device="cpu")
    target = int(plain.footprint_after + share * (plain.footprint_before - plain.footprint_after))
    done: Any = api.quantize(flux, tmp_path / "out", target_size=target, device="cpu")
    report = done.as_json()
    assert done.footprint_after <= target
    methods = {row["name"]: row["method"] for row in report["components"]}
    best = [each for each in report["combinations"] if each["size"] <= target][-1]
    assert {name: methods[name] for name in best["methods"]} == best["methods"]
    assert sorted(each["size"] for each in report["combinations"]) == [e["size"] for e in report["combinations"]]
    errors = [each["expected_weight_error"] for each in report["combinations"]]
    assert errors == sorted(errors, reverse=True)
    assert done.footprint_after == sum(footprint(tmp_path / "out", row) for row in report["components"])
    dry: Any = api.quantize(flux, tmp_path / "y", target_size=target, device="cpu", dry_run=True)
    tables = [[column.title for column in section.columns] for section in kept_sections(dry)]
    wanted = [f"{model.source.subfolder} in memory" for model in dry.models if model.kept_layers is not None]
    assert tables == [[title, "kept", ""] for title in wanted], "no loss is known, and each says of what it is"
    if share == 0.05:
        with pytest.raises(UsageError, match=rf"at least .*\({plain.footprint_after:,} bytes\)"):
            api.quantize(flux, target_size=plain.footprint_after - 1)
        with pytest.raises(UsageError, match="fits as it is"):
            api.quantize(flux, target_size=plain.footprint_before)
        with pytest.raises(UsageError, match="needs to know what each linear loses"):
            api.quantize(flux, max_loss=0.1)
