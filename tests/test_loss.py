"""The loss that qz reports is the one that torch computes from the two checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Qz
from converted import carried_out, method_of, quantized
from covering import in_turn
from hooks import every_disk
from json_contract import checked
from qz import MalformedInput, MissingInput, OutputRefused, Unsupported
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.folder import Folder
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.compute.cpu.cpu_arithmetic import CHUNK_BYTES
from qz.quantize.models.plan import plan_quantization
from qz.quantize.models.run import carry_out
from qz.quantize.planning.dequantization import plan_dequantization
from qz.quantize.reports.summary import Source, Summary
from qz.quantize.settings import Settings
from qz.quantize.streaming.measuring.loss import Loss, Tally
from qz.quantize.streaming.measuring.measure import AgainstOriginal, WhileQuantizing, original_checkpoint
from qz.quantize.streaming.output.output_folders import Target
from reference import tensors_of
from zoo import build

Tensors = dict[str, torch.Tensor]
FOLDERS: list[Folder] = []
NAMES = ("llama-odd", "gpt2", "mixtral", "bert", "flux", "wan")


@pytest.fixture
def qz(forked_qz: Qz) -> Qz:
    return forked_qz


@pytest.fixture(autouse=True)
def close_folders() -> Iterator[None]:
    yield
    while FOLDERS:
        FOLDERS.pop().close()


def opened(path: Path) -> LocalFolder:
    """A folder that is closed after the test."""
    folder = LocalFolder(path)
    FOLDERS.append(folder)
    return folder


def while_quantizing(
    source: Path, output: Path, method: str, *, chunk_bytes: int = CHUNK_BYTES, **settings: Any
) -> Loss:
    """``qz quantize --report``."""
    wanted = Settings(method_of(method), device="cpu", **settings)
    plan = plan_quantization(open_checkpoint(opened(source)), wanted)
    loss = carried_out(plan, output, wanted, WhileQuantizing(), chunk_bytes).loss
    assert loss is not None
    return loss


def against(packed: Path, output: Path, original: Path, **settings: Any) -> Summary:
    """``qz dequantize --against ORIGINAL``."""
    wanted = Settings(None, device="cpu", **settings)
    plan = plan_dequantization(open_checkpoint(opened(packed)), wanted)
    measure = AgainstOriginal(open_checkpoint(opened(original)))
    measure.check(plan)
    return carried_out(plan, output, wanted, measure)


def loss_against(packed: Path, output: Path, original: Path, **settings: Any) -> Loss:
    loss = against(packed, output, original, **settings).loss
    assert loss is not None
    return loss


def by_torch(
    original: dict[str, torch.Tensor], again: dict[str, torch.Tensor], name: str
) -> tuple[float, float, float]:
    """Squared error, squared norm, and largest error of one weight."""
    reference = original[name].double()
    error = again[name].double() - reference
    return float(error.square().sum()), float(reference.square().sum()), float(error.abs().max())


@pytest.mark.parametrize(("name", "method"), in_turn(NAMES, ["nf4", "int8", "fp4", "nf4-double"]))
def test_both_reports_are_what_torch_computes_from_the_files(name: str, method: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "source")
    reported = while_quantizing(tmp_path / "source", tmp_path / "packed", method)
    compared = loss_against(tmp_path / "packed", tmp_path / "output", tmp_path / "source")

    original, again = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "output")
    for loss in (reported, compared):
        assert loss.layers
        sums = {layer.name: by_torch(original, again, f"{layer.name}.weight") for layer in loss.layers}
        for layer in loss.layers:
            error, norm, largest = sums[layer.name]
            assert layer.relative_error == pytest.approx(math.sqrt(error / norm), rel=1e-9)
            assert layer.snr_db == pytest.approx(10 * math.log10(norm / error), rel=1e-9)
            assert layer.max_error == pytest.approx(largest, rel=1e-6)
            assert layer.parameters == original[f"{layer.name}.weight"].numel()
        error, norm = sum(each[0] for each in sums.values()), sum(each[1] for each in sums.values())
        assert loss.total.relative_error == pytest.approx(math.sqrt(error / norm), rel=1e-9)
        assert loss.total.max_error == pytest.approx(max(each[2] for each in sums.values()), rel=1e-6)
        errors = [layer.relative_error for layer in loss.layers]
        assert errors == sorted(errors, reverse=True), "worst first"
    assert [layer.name for layer in reported.layers] == [layer.name for layer in compared.layers]


@pytest.mark.parametrize("method", ["nf4", "nf4-double"])
def test_measuring_changes_no_byte_and_does_not_depend_on_chunks(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    quantized(tiny_llama, tmp_path / "plain", method)
    whole = while_quantizing(tiny_llama, tmp_path / "measured", method)
    pieces = while_quantizing(tiny_llama, tmp_path / "pieces", method, chunk_bytes=1024, threads=3)
    bytes_of = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "measured", "pieces")}
    assert len(set(bytes_of.values())) == 1
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        assert one.name == other.name
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-9)
        assert one.max_error == other.max_error


def test_the_loss_includes_what_a_cast_costs(tmp_path: Path) -> None:
    """Against the original in float32, not against what float16 or bfloat16 made of it."""
    build("llama-fp32").save_pretrained(tmp_path / "source")
    reported = while_quantizing(tmp_path / "source", tmp_path / "packed", "int8", dtype="bfloat16")
    compared = loss_against(tmp_path / "packed", tmp_path / "output", tmp_path / "source")
    assert compared.total.relative_error == pytest.approx(reported.total.relative_error, rel=1e-9)
    exact = while_quantizing(tmp_path / "source", tmp_path / "fp32", "int8")
    assert exact.total.relative_error < reported.total.relative_error


@pytest.mark.parametrize("act", ["quantize", "dequantize"])
def test_an_interrupted_run_reports_all_layers_when_it_is_resumed(act: str, tiny_llama: Path, tmp_path: Path) -> None:
    size = {"max_shard_bytes": 30_000}
    quantized(tiny_llama, tmp_path / "packed", "nf4-double")

    def run(output: str) -> Loss:
        if act == "quantize":
            return while_quantizing(tiny_llama, tmp_path / output, "nf4-double", **size)
        return loss_against(tmp_path / "packed", tmp_path / output, tiny_llama, **size)

    expected = run("whole")
    done: list[str] = []

    def power_cut(operation: str, path: str) -> None:
        if operation == "rename" and path.endswith(".safetensors"):
            done.append(path)
        if len(done) > 2:
            raise OSError(5, "Input/output error", path)

    with every_disk(power_cut), pytest.raises(Exception, match="nput/output"):
        run("output")
    assert run("output") == expected


def test_an_original_with_other_names_shapes_or_weights_is_noticed(tiny_llama: Path, tmp_path: Path) -> None:
    quantized(tiny_llama, tmp_path / "packed", "nf4")
    build("llama-odd").save_pretrained(tmp_path / "other shapes")
    with pytest.raises(MalformedInput, match=r"is not the original of .*: it has .* as \["):
        against(tmp_path / "packed", tmp_path / "output", tmp_path / "other shapes")
    build("bert").save_pretrained(tmp_path / "other names")
    with pytest.raises(MalformedInput, match=r"is not the original of .* not at all"):
        against(tmp_path / "packed", tmp_path / "output", tmp_path / "other names")
    with pytest.raises(Unsupported, match="already quantized"):
        against(tmp_path / "packed", tmp_path / "output", tmp_path / "packed")
    assert not (tmp_path / "output").exists()

    from safetensors.torch import save_file

    shutil.copytree(tiny_llama, tmp_path / "other weights")
    state = {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in tensors_of(tiny_llama).items()}
    save_file(state, tmp_path / "other weights/model.safetensors", metadata={"format": "pt"})
    summary = against(tmp_path / "packed", tmp_path / "output", tmp_path / "other weights")
    assert any("nothing in common" in warning for warning in summary.warnings)


def test_the_original_is_never_written_over(tiny_llama: Path, tmp_path: Path) -> None:
    original = Path(shutil.copytree(tiny_llama, tmp_path / "original"))
    quantized(original, tmp_path / "packed", "nf4")
    with pytest.raises(OutputRefused):
        against(tmp_path / "packed", original, original)
    plan = plan_dequantization(open_checkpoint(opened(tmp_path / "packed")), Settings(None))
    measure = AgainstOriginal(open_checkpoint(opened(original)))
    origin = Source("source", None, None, "transformers", "LlamaForCausalLM")
    with pytest.raises(OutputRefused):
        carry_out(plan, origin, Target(original, overwrite=True), Settings(None), measure=measure)
    assert tensors_of(original).keys() == tensors_of(tiny_llama).keys()


def test_a_pipeline_as_original_is_searched_for_the_component(tmp_path: Path) -> None:
    flux = build("flux")
    flux.save_pretrained(tmp_path / "pipeline/transformer")
    part = ["diffusers", "FluxTransformer2DModel"]
    index: dict[str, Any] = {"_class_name": "FluxPipeline", "transformer": part, "vae": [None, None]}
    index["shift"] = float("nan")  # which diffusers writes and reads
    (tmp_path / "pipeline/model_index.json").write_text(json.dumps(index))
    quantized(tmp_path / "pipeline/transformer", tmp_path / "packed", "nf4")
    packed = open_checkpoint(opened(tmp_path / "packed"))
    found = original_checkpoint(opened(tmp_path / "pipeline"), packed)
    FOLDERS.append(found.folder)
    assert found.folder.location.endswith("transformer")

    index["transformer_2"] = index["transformer"]
    (tmp_path / "pipeline/model_index.json").write_text(json.dumps(index))
    with pytest.raises(MissingInput, match="'transformer', 'transformer_2'"):
        original_checkpoint(opened(tmp_path / "pipeline"), packed)
    again = original_checkpoint(opened(tmp_path / "pipeline"), packed, "transformer")
    FOLDERS.append(again.folder)
    assert again.tensors == found.tensors


def test_what_is_no_number_comes_first_and_is_null_in_json() -> None:
    tally = Tally()
    ones = np.ones(4, np.float32)
    tally.add("same.weight", ones, "F32", ones, "F32")
    tally.add("off.weight", ones, "F32", ones * 2, "F32")
    tally.add("zero.weight", ones * 0, "F32", ones * 0, "F32")
    tally.add("nan.weight", ones, "F32", ones * np.nan, "F32")
    loss = tally.loss()
    assert [layer.name for layer in loss.layers] == ["nan", "off", "same", "zero"]
    assert [layer["relative_error"] for layer in loss.as_json()["layers"]] == [None, 1.0, 0.0, 0.0]
    assert [layer["snr_db"] for layer in loss.as_json()["layers"]] == [None, 0.0, None, None]
    assert loss.unrelated
    json.dumps(loss.as_json(), allow_nan=False)


def test_the_commands_report_the_same_loss(qz: Qz, tiny_llama: Path) -> None:
    first = qz("quantize", tiny_llama, "-o", "packed", "--report", "--json")
    again = qz("dequantize", "packed", "--against", tiny_llama, "-o", "output", "--json")
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    reported, compared = json.loads(first.stdout)["loss"], json.loads(again.stdout)["loss"]
    assert reported == compared
    assert 0.05 < reported["total"]["relative_error"] < 0.15
    assert set(reported["layers"][0]) == {"name", "parameters", "relative_error", "snr_db", "max_error"}

    dry = qz("dequantize", "packed", "--against", tiny_llama, "-o", "nothing", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "relative error" in dry.stdout
    assert reported["layers"][0]["name"] in dry.stdout
    assert json.loads(qz("dequantize", "packed", "--dry-run", "--json").stdout)["loss"] is None


def test_a_record_has_the_loss_that_was_measured_and_is_else_the_same(qz: Qz, tiny_llama: Path, tmp_path: Path) -> None:
    made = {
        name: qz("quantize", tiny_llama, "-o", name, "--threads", threads, *more, "--json")
        for name, threads, more in (("plain", "2", []), ("one", "1", ["--report"]), ("two", "2", ["--report"]))
    }
    assert all(done.returncode == 0 for done in made.values()), made
    records = {name: (tmp_path / name / "qz.json").read_bytes() for name in made}
    assert records["one"] == records["two"]
    measured, plain = json.loads(records["two"]), json.loads(records["plain"])
    found, told = measured["about"].pop("loss"), checked("quantize", made["two"].stdout)["loss"]
    assert plain["about"].pop("loss") is None
    assert plain.pop("sha256") != measured.pop("sha256"), "of the record itself"
    assert plain == measured
    assert [layer["name"] for layer in found["layers"]] == [layer["name"] for layer in told["layers"]]
    for one, other in zip([found["total"], *found["layers"]], [told["total"], *told["layers"]], strict=True):
        for key in ("parameters", "relative_error", "snr_db", "max_error"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)

    again = qz("quantize", tiny_llama, "-o", "two", "--report", "--if-exists", "skip", "--json")
    assert checked("quantize", again.stdout)["loss"] == found
    assert "not measured" not in again.stderr
    again = qz("quantize", tiny_llama, "-o", "plain", "--report", "--if-exists", "skip")
    assert "loss was not measured" in again.stderr


def test_a_record_lists_the_worst_of_many_layers_and_says_how_many_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qz.quantize.streaming.measuring.loss.RECORDED", 2)
    tally = Tally()
    for number in range(4):
        tally.add(f"{number}.weight", np.ones(4, np.float32), "F32", np.full(4, 1 + number / 7, np.float32), "F32")
    told = tally.loss().recorded()
    assert [layer["name"] for layer in told["layers"]] == ["3", "2"]
    assert (told["layers"][0]["relative_error"], told["layers_left_out"]) == (0.428571, 2)


def test_dequantized_values_are_never_better_than_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    """In float32 the report of a bfloat16 model is that of its bfloat16 values: nothing comes back by a wider dtype."""
    quantized(tiny_llama, tmp_path / "packed", "nf4")
    one = loss_against(tmp_path / "packed", tmp_path / "one", tiny_llama)
    two = loss_against(tmp_path / "packed", tmp_path / "two", tiny_llama, dtype="float32")
    assert one.total == two.total
