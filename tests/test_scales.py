"""``--scales search`` and ``--importance``: the same format and size, loaded plainly, with less error."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from commands import run
from converted import dequantized, quantized
from covering import in_turn
from forward import output_of
from qz import MalformedInput, MissingInput, OutputRefused, UsageError
from qz.cli.commands.quantize import quantize
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.recorded.record import read_record
from qz.formats.publish.model_card.card import write_card
from qz.formats.publish.model_card.card_facts import facts_of
from qz.quantize.compute.cpu import cpu_arithmetic
from qz.quantize.importance.statistics import InputSums, write_statistics
from reference import config_of, dequantized_by_bitsandbytes, differing_tensors, raw, tensors_of
from zoo import build

Qz = Callable[..., subprocess.CompletedProcess[str]]
FOUR_BIT = ("nf4", "fp4", "nf4-double", "fp4-double")
MODELS = ("llama-untied", "llama-odd", "gpt2", "t5-encoder")
"""One with odd rows, one whose weights are turned, one with float32 layers that are kept."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    for name in MODELS:
        torch.manual_seed(0)
        build(name).save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}


def statistics(source: Path, path: Path, *, tokens: int = 64, seed: int = 0, prefix: str = "") -> Path:
    """Of every linear that nf4 would quantize, with inputs that differ up to ten thousandfold."""
    from converted import plan_of

    rng = np.random.default_rng(seed)
    sums = {
        prefix + weight.name: InputSums((10 ** rng.uniform(-2, 2, weight.shape[1]) * tokens).astype(np.float32), tokens)
        for weight in plan_of(source, "nf4").quantized
    }
    write_statistics(path, sums, {})
    return path


def originals(source: Path, output: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The output's weights as bitsandbytes gives them back, and those of the source under the same names."""
    mine, stored = dequantized_by_bitsandbytes(tensors_of(output)), tensors_of(source)
    turned = config_of(source)["model_type"] == "gpt2"
    return mine, {name: stored[name].T if turned else stored[name] for name in mine}


def relative_error(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    error = sum(float((mine[name].double() - theirs[name].double()).square().sum()) for name in mine)
    return float((error / sum(float(theirs[name].double().square().sum()) for name in mine)) ** 0.5)


@pytest.mark.parametrize(("name", "method"), in_turn(MODELS, FOUR_BIT[:2], FOUR_BIT[2:]))
def test_a_searched_checkpoint_is_one_of_absmax_but_for_codes_and_scales(
    sources: dict[str, Path], name: str, method: str, tmp_path: Path
) -> None:
    source = sources[name]
    plain, better = tmp_path / "plain", tmp_path / "better"
    quantized(source, plain, method)
    summary = quantized(source, better, method, scales="search")
    assert (summary.refinement["scales"], summary.refinement["importance"]) == ("search", None)
    assert config_of(plain) == config_of(better)
    one, other = tensors_of(plain), tensors_of(better)
    assert [(key, value.dtype) for key, value in one.items()] == [(key, value.dtype) for key, value in other.items()]
    differing = differing_tensors(plain, better)
    ends = (".weight", ".absmax", ".nested_absmax", f".bitsandbytes__{method[:3]}")
    assert {key for key in differing if not key.endswith(ends)} == set()
    found, expected = originals(source, better)
    assert relative_error(found, expected) < 0.95 * relative_error(originals(source, plain)[0], expected)


@pytest.mark.parametrize("method", FOUR_BIT)
def test_it_is_loaded_plainly_and_runs(sources: dict[str, Path], method: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    source = sources["llama-untied"]
    quantized(source, tmp_path / "out", method, scales="search")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    weights = dequantized_by_bitsandbytes(tensors_of(tmp_path / "out"))
    for path, values in weights.items():
        module: Any = model.get_submodule(path.removesuffix(".weight"))
        from bitsandbytes.functional import dequantize_4bit

        loaded = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(loaded, values)
    plain = LlamaForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for path, values in weights.items():
            plain.get_parameter(path).copy_(values)
    assert torch.allclose(output_of(model).float(), output_of(plain).float(), atol=0.02)
    dequantized(tmp_path / "out", tmp_path / "back")
    assert all(torch.equal(tensors_of(tmp_path / "back")[name], values) for name, values in weights.items())


@pytest.mark.parametrize("method", ["nf4", "nf4-double"])
@pytest.mark.parametrize("name", ["llama-odd", "gpt2"])
def test_the_bytes_depend_neither_on_threads_nor_on_chunks(
    sources: dict[str, Path], name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = statistics(sources[name], tmp_path / "s.safetensors")
    how: dict[str, Any] = {"scales": "search", "importance": known}
    quantized(sources[name], tmp_path / "one", method, threads=1, **how)
    arithmetic = cpu_arithmetic.Cpu(chunk_bytes=1000)
    monkeypatch.setattr("qz.quantize.compute.devices.arithmetic_on", lambda _: arithmetic)
    quantized(sources[name], tmp_path / "two", method, threads=3, **how)
    assert differing_tensors(tmp_path / "one", tmp_path / "two") == []


@pytest.mark.parametrize("name", ["llama-untied", "gpt2"])
def test_importance_lowers_the_error_that_counts(sources: dict[str, Path], name: str, tmp_path: Path) -> None:
    source = sources[name]
    known = statistics(source, tmp_path / "s.safetensors")
    from qz.quantize.importance.statistics import read_statistics

    sums = read_statistics(known).sums
    for method in ("nf4", "fp4-double"):
        searched = quantized(source, tmp_path / "searched", method, scales="search", weights_only=True)
        warned = any("lose more than absmax" in warning for warning in searched.warnings)
        assert warned is method.startswith("fp4")
        summary = quantized(source, tmp_path / "weighted", method, scales="search", importance=known)
        told = summary.refinement["importance"]
        assert (told["file"], told["tokens"], told["weights"]) == ("s.safetensors", 64, summary.quantized_tensors)
        assert told["missing"] == told["unseen"] == []
        errors = []
        for output in ("searched", "weighted"):
            found, expected = originals(source, tmp_path / output)
            squares = {key: (values.double() - expected[key].double()).square() for key, values in found.items()}
            model = {key: next(n for n in sums if n.endswith(key)) for key in found}
            errors.append(sum(float((squares[key] * torch.from_numpy(sums[model[key]].sum2)).sum()) for key in found))
            shutil.rmtree(tmp_path / output)
        assert errors[1] < 0.85 * errors[0]


def test_what_the_file_does_not_cover_is_named_and_searched_plainly(sources: dict[str, Path], tmp_path: Path) -> None:
    source, known = sources["llama-untied"], tmp_path / "s.safetensors"
    rng = np.random.default_rng(0)
    some = rng.random(64).astype(np.float32)
    layer = "model.layers.{}.self_attn.{}_proj.weight"
    sums = {layer.format(0, "q"): InputSums(some, 9), layer.format(0, "k"): InputSums(some * 0, 0)}
    write_statistics(known, sums, {})
    summary = quantized(source, tmp_path / "weighted", "nf4", scales="search", importance=known)
    told = summary.refinement["importance"]
    assert told["weights"] == 2
    assert told["unseen"] == [layer.format(0, "k")]
    assert layer.format(1, "k") in told["missing"]
    assert len(told["missing"]) == 12
    text = " ".join(summary.warnings)
    assert "s.safetensors does not speak of 12 quantized weights" in text
    assert "s.safetensors saw no token of 1 quantized weight, " in text
    quantized(source, tmp_path / "searched", "nf4", scales="search")
    differing = differing_tensors(tmp_path / "searched", tmp_path / "weighted")
    assert {name.partition(".weight")[0] + ".weight" for name in differing} == {layer.format(0, "q")}


def test_a_file_that_does_not_belong_to_the_model_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    source, known = sources["llama-untied"], tmp_path / "s.safetensors"
    how: dict[str, Any] = {"scales": "search", "importance": known}
    with pytest.raises(MissingInput):
        quantized(source, tmp_path / "out", "nf4", **how)
    write_statistics(known, {"h.0.attn.weight": InputSums(np.ones(64, np.float32), 1)}, {})
    with pytest.raises(MalformedInput, match="none of the weights"):
        quantized(source, tmp_path / "out", "nf4", **how)
    name = "model.layers.0.mlp.down_proj.weight"
    write_statistics(known, {name: InputSums(np.ones(64, np.float32), 1)}, {})
    with pytest.raises(MalformedInput, match=r"describes 64 inputs of .*, and the weight has 128"):
        quantized(source, tmp_path / "out", "nf4", **how)
    assert not (tmp_path / "out").exists()


def test_a_weight_cut_from_a_fused_one_has_its_inputs() -> None:
    """Statistics may be named after what the checkpoint stores: q, k and v of one tensor see the same inputs."""
    from qz.quantize.importance.matching import match
    from qz.quantize.importance.statistics import Statistics
    from qz.quantize.libraries.architecture import Saved, Weight
    from qz.quantize.planning.plan import Step

    sums = InputSums(np.ones(8, np.float32), 3)
    steps = []
    for name, sources in (("q", ("qkv.weight",)), ("k", ("qkv.weight",)), ("gate_up", ("gate.weight", "up.weight"))):
        weight = Weight(f"layer.{name}.weight", sources, "float32", (8, 8), quantized=True)
        steps.append(Step(weight, (), (Saved(weight.name, "U8", (32, 1), weight, 32, "weight"),), 0))
    found = match(Statistics("s", "", {"qkv.weight": sums, "up.weight": sums}), steps)
    assert sorted(found.sums) == ["layer.gate_up.weight", "layer.k.weight", "layer.q.weight"]


def test_scales_are_part_of_what_an_output_is(forked_qz: Qz, sources: dict[str, Path], tmp_path: Path) -> None:
    source, known = sources["llama-untied"], statistics(sources["llama-untied"], tmp_path / "s.safetensors")
    command = ("quantize", source, "-o", "out", "--json", "--device", "cpu", "--if-exists", "skip")
    made = forked_qz(*command, "--importance", known)
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert (report["scales"], report["rounding"]) == ("search", "nearest")
    assert report["importance"]["weights"] == report["tensors"]["quantized"]
    assert json.loads(forked_qz(*command, "--importance", known, "--scales", "search").stdout)["up_to_date"] is True
    for other in ((), ("--scales", "search")):
        refused = forked_qz(*command, *other)
        assert (refused.returncode, "importance" in refused.stderr or "scales" in refused.stderr) == (73, True)
    statistics(source, known, seed=1)
    assert forked_qz(*command, "--importance", known).returncode == 73
    record = read_record(LocalFolder(tmp_path / "out"))
    assert record is not None
    assert str(tmp_path) not in json.dumps(record.about)
    card = write_card(facts_of(record.about, config_of(tmp_path / "out")), "me/model")
    digest = report["importance"]["sha256"]
    assert f"scales: search, importance: `s.safetensors` (SHA-256 `{digest}`)" in card
    assert "--importance s.safetensors" in card


def test_an_interrupted_run_continues_only_with_the_same_scales(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources["llama-untied"]
    how: dict[str, Any] = {"max_shard_bytes": 20_000, "threads": 1}
    quantized(source, tmp_path / "whole", "nf4-double", scales="search", **how)

    def interrupted(**settings: Any) -> None:
        calls: list[None] = []
        search = cpu_arithmetic.Cpu.search_4bit

        def failing(*arguments: Any) -> Any:
            calls.append(None)
            if len(calls) > 9:
                raise KeyboardInterrupt
            return search(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(cpu_arithmetic.Cpu, "search_4bit", failing)
            with pytest.raises(KeyboardInterrupt):
                quantized(source, tmp_path / "out", "nf4-double", scales="search", **how, **settings)

    interrupted()
    assert quantized(source, tmp_path / "out", "nf4-double", scales="search", **how).resumed
    assert differing_tensors(tmp_path / "whole", tmp_path / "out") == []
    shutil.rmtree(tmp_path / "out")
    interrupted()
    with pytest.raises(OutputRefused, match="scales"):
        quantized(source, tmp_path / "out", "nf4-double", **how)


@pytest.mark.parametrize("method", ["nf4", "nf4-double"])
def test_the_reported_loss_is_that_of_what_is_written(sources: dict[str, Path], method: str, tmp_path: Path) -> None:
    source = sources["llama-odd"]
    double = method == "nf4-double"
    told = run(
        quantize, source, output=tmp_path / "out", double_quant=double, scales="search", report=True, dtype="float16"
    )
    found, expected = originals(source, tmp_path / "out")
    assert told["loss"]["total"]["relative_error"] == pytest.approx(relative_error(found, expected), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"int8": True, "scales": "search"}, "int8 has a scale for each row"),
        ({"scales": "absmax", "importance": Path("x")}, "leave out --scales absmax"),
        ({"rounding": "gptq"}, "needs the Hessians"),
        ({"rounding": "gptq", "scales": "search"}, "needs the Hessians"),
    ],
)
def test_impossible_combinations_are_usage_errors(
    options: dict[str, Any], message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        run(quantize, sources["llama-untied"], output=tmp_path / "out", **options)


def test_absmax_stays_the_default_and_the_librarys_bytes(sources: dict[str, Path], tmp_path: Path) -> None:
    report = run(quantize, sources["llama-untied"], output=tmp_path / "out")
    assert (report["scales"], report["rounding"], report["importance"]) == ("absmax", "nearest", None)
    record = read_record(LocalFolder(tmp_path / "out"))
    assert record is not None
    assert "scales" not in record.about["settings"]
    with pytest.raises(OutputRefused):
        run(quantize, sources["llama-untied"], output=tmp_path / "out", scales="search", if_exists="skip")


def test_negative_scales_are_stored_as_they_are(sources: dict[str, Path], tmp_path: Path) -> None:
    quantized(sources["gpt2"], tmp_path / "out", "nf4", scales="search")
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as opened:
        names = [name for name in opened.keys() if name.endswith(".absmax")]  # noqa: SIM118 - not a mapping
        scales = np.concatenate([opened.get_tensor(name) for name in names])
    assert 0.3 < float((scales < 0).mean()) < 0.7
    assert raw(torch.from_numpy(np.abs(scales) > 0)) == b"\1" * scales.size
