"""``qz verify``: against the recorded hashes, and against what the source becomes, computed once more."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Qz
from hub_server import connected
from mixtures import mixture
from pipelines import flux
from qz import MalformedInput, UsageError, api
from qz.formats.output.recorded.record import WrittenFile, encode_record
from qz.formats.tensors.safetensors import read_header
from qz.progress import Progress
from qz.quantize.methods import FourBit, Int8, Method
from qz.quantize.verification import recomputation
from qz.quantize.verification.compared_output import explained
from qz.quantize.verification.report import Verification
from test_gptq import calibrated as calibrated
from test_scales import statistics

SETTINGS: dict[str, Any] = {"device": "cpu", "max_shard_bytes": 30_000}
ON_CPU: dict[str, Any] = {"device": "cpu", "threads": 2}


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("verify") / "made"
    api.quantize(tiny_llama, output, **SETTINGS)
    return output


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def differing(found: Verification) -> list[str]:
    assert found.recomputed is not None
    return [each.name for each in found.recomputed.differences]


def change(folder: Path, tensor: str, offset: int) -> None:
    """Turn over one bit of a tensor."""
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        header = read_header(lambda start, length: data[start : start + length], len(data), str(path))  # noqa: B023
        if tensor in header.tensors:
            position = header.data_start + header.tensors[tensor].start + offset
            data[position] ^= 1
            path.write_bytes(data)
            return
    raise AssertionError(tensor)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        (FourBit("nf4"), {}),
        (FourBit("fp4", double_quant=True), {"dtype": "float16", "skip": ("model.layers.0.self_attn",)}),
        (FourBit("nf4", double_quant=True), {"scales": "search"}),
        (Int8(threshold=5.0), {"weights_only": True}),
    ],
)
def test_what_a_source_becomes_is_intact(
    tiny_llama: Path, tmp_path: Path, method: Method, more: dict[str, Any]
) -> None:
    api.quantize(tiny_llama, tmp_path / "out", method=method, **SETTINGS, **more)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    found = api.verify(tmp_path / "out", tiny_llama, **ON_CPU)
    assert (found.intact, found.explained, found.notes) == (True, False, ())
    assert found.recomputed is not None
    assert found.recomputed.tensors[0] == found.recomputed.tensors[1] > 20
    assert api.verify(tmp_path / "out").intact
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before, "nothing is written"


def test_a_pipeline_and_the_way_back_are_verified(tmp_path: Path) -> None:
    source = flux(tmp_path / "flux")
    how: dict[str, Any] = {"component_methods": {"text_encoder_2": Int8()}, "dtype": "float16"}
    api.quantize(source, tmp_path / "out", **SETTINGS, **how)
    found = api.verify(tmp_path / "out", source, **ON_CPU)
    assert found.intact
    api.dequantize(tmp_path / "out", tmp_path / "back", **SETTINGS)
    assert api.verify(tmp_path / "back", tmp_path / "out", **ON_CPU).intact
    config = tmp_path / "out/vae/config.json"
    config.write_text(config.read_text() + "\n")
    change(tmp_path / "out/transformer", "proj_out.weight", 3)
    found = api.verify(tmp_path / "out", source, **ON_CPU)
    assert differing(found) == ["transformer/proj_out.weight"]
    assert found.recomputed is not None
    assert found.recomputed.unlike_files[0] == "vae/config.json"


def test_one_bit_is_found_and_named(tiny_llama: Path, copy: Path, forked_qz: Qz) -> None:
    change(copy, "model.layers.1.mlp.up_proj.weight", 17)
    change(copy, "model.norm.weight", 5)
    (copy / "generation_config.json").write_text("{}")
    assert api.verify(copy, tiny_llama, **ON_CPU).explained is False

    result = forked_qz("verify", copy, "--against", tiny_llama, "--device", "cpu", "--json")
    report, error = map(json.loads, result.stdout.splitlines())
    assert (result.returncode, error["code"]) == (65, 65)
    assert [(each["name"], each["bytes"], each["first"], each["explained"]) for each in report["differs"]] == [
        ("model.layers.1.mlp.up_proj.weight", 1, 17, None),
        ("model.norm.weight", 1, 5, None),
    ]
    assert report["files_differ"] == ["generation_config.json"]
    assert report["tensors"]["compared"] == report["tensors"]["all"]

    result = forked_qz("verify", copy)
    assert result.returncode == 65
    assert "SHA-256" in result.stdout


def about_of(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "qz.json").read_text())["about"])


def tell(output: Path, **about: object) -> None:
    """The record says so from now on, as if qz had written that."""
    files = [WrittenFile(**file) for file in json.loads((output / "qz.json").read_text())["files"]]
    (output / "qz.json").write_bytes(encode_record(files, about_of(output) | about))


def test_another_source_is_not_it(tiny_llama: Path, made: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    change(other, "lm_head.weight", 1)
    assert differing(api.verify(made, other, **ON_CPU)) == ["lm_head.weight"]


def test_what_is_elsewhere_or_missing_is_named(tiny_llama: Path, copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    settings = about_of(copy)["settings"]
    tell(copy, settings={**settings, "max_shard_bytes": 50_000})
    found = api.verify(copy, tiny_llama, **ON_CPU)
    assert not found.intact
    assert found.recomputed is not None
    assert any("it lies in" in str(each.missing) for each in found.recomputed.differences)
    assert index.name in found.recomputed.unlike_files
    assert any(name.endswith(".safetensors") for name in found.recomputed.unlike_files)


def test_what_qz_did_not_write_is_not_said_to_differ(tiny_llama: Path, forked_qz: Qz) -> None:
    result = forked_qz("verify", tiny_llama)
    assert result.returncode == 65
    assert "qz did not write it" in result.stderr
    assert "not known" in result.stdout


def test_a_sample_looks_at_a_share(tiny_llama: Path, made: Path, forked_qz: Qz) -> None:
    found = api.verify(made, tiny_llama, sample=0.2, **ON_CPU)
    assert found.intact
    assert found.recomputed is not None
    compared, whole = found.recomputed.tensors
    assert 0 < compared < whole
    result = forked_qz("verify", made, "--against", tiny_llama, "--sample", "20%", "--device", "cpu")
    assert result.returncode == 0
    assert f"of {whole} tensors" in result.stdout
    for wrong in ("0%", "101%", "x", "5"):
        assert forked_qz("verify", made, "--against", tiny_llama, "--sample", wrong).returncode == 2


def test_a_sample_finds_what_it_looks_at(tiny_llama: Path, copy: Path) -> None:
    change(copy, "model.norm.weight", 5)
    found = api.verify(copy, tiny_llama, sample=1.0, **ON_CPU)
    assert differing(found) == ["model.norm.weight"]


def test_importance_has_to_be_the_same_file(tiny_llama: Path, tmp_path: Path) -> None:
    known = statistics(tiny_llama, tmp_path / "known.safetensors")
    api.quantize(tiny_llama, tmp_path / "out", importance=known, **SETTINGS)
    with pytest.raises(UsageError, match=r"known\.safetensors"):
        api.verify(tmp_path / "out", tiny_llama, **ON_CPU)
    other = statistics(tiny_llama, tmp_path / "other.safetensors", seed=1)
    with pytest.raises(UsageError, match="SHA-256 differs"):
        api.verify(tmp_path / "out", tiny_llama, importance=other, **ON_CPU)
    moved = known.rename(tmp_path / "moved.safetensors")
    assert api.verify(tmp_path / "out", tiny_llama, importance=moved, **ON_CPU).intact


def test_gptq_and_experts_are_verified(calibrated: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    source, known, _ = calibrated
    api.quantize(source, tmp_path / "gptq", importance=known, rounding="gptq", **SETTINGS)
    assert api.verify(tmp_path / "gptq", source, importance=known, **ON_CPU).intact
    mixture("qwen3_moe", tmp_path / "moe")
    api.quantize(tmp_path / "moe", tmp_path / "experts", experts=True, **SETTINGS)
    assert api.verify(tmp_path / "experts", tmp_path / "moe", **ON_CPU).intact


# Interrupted comparisons


def interrupt(output: Path, source: Path, **more: Any) -> None:
    """Stop a comparison when half of it is done."""

    def stop(step: Progress) -> None:
        if step.all_bytes and step.bytes > step.all_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        api.verify(output, source, on_progress=stop, **{**ON_CPU, **more})
    kept = os.environ["QZ_CACHE"] != ""
    assert [("goes on" in note) for note in getattr(caught.value, "__notes__", ())] == [True] * kept


def before(found: Verification) -> int:
    assert found.recomputed is not None
    assert found.recomputed.tensors[0] == found.recomputed.tensors[1]
    return found.recomputed.tensors_before


def test_an_interrupted_comparison_goes_on(tiny_llama: Path, copy: Path, forked_qz: Qz) -> None:
    interrupt(copy, tiny_llama, threads=1)
    result = forked_qz("verify", copy, "--against", tiny_llama, "--device", "cpu", "--json")
    report = json.loads(result.stdout)
    assert 0 < report["tensors_before"] < report["tensors"]["all"]
    assert report["tensors"]["compared"] == report["tensors"]["all"]
    assert "Continuing: " in result.stderr
    assert before(api.verify(copy, tiny_llama, **ON_CPU)) == 0, "what is finished is not gone on with"


def test_what_differs_is_told_by_the_comparison_that_goes_on(tiny_llama: Path, copy: Path) -> None:
    change(copy, "model.embed_tokens.weight", 3)
    change(copy, "model.norm.weight", 5)
    interrupt(copy, tiny_llama, threads=1)
    found = api.verify(copy, tiny_llama, **ON_CPU)
    assert before(found) > 0
    assert differing(found) == ["model.embed_tokens.weight", "model.norm.weight"]


def test_it_goes_on_with_the_same_files_only(tiny_llama: Path, copy: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    api.quantize(source, tmp_path / "own", **SETTINGS)
    output = tmp_path / "own"
    for changed, tensor in ((output, "model.embed_tokens.weight"), (source, "lm_head.weight")):
        interrupt(output, source, threads=1)
        change(changed, tensor, 3)
        found = api.verify(output, source, **ON_CPU)
        assert (before(found), tensor in differing(found)) == (0, True)
        change(changed, tensor, 3)
    interrupt(output, source, threads=1)
    assert before(api.verify(output, source, resume=False, **ON_CPU)) == 0
    interrupt(output, source, threads=1)
    assert api.verify(output, source, sample=0.5, **ON_CPU).intact
    assert before(api.verify(output, source, **ON_CPU)) > 0
    assert before(api.verify(output, source, **ON_CPU)) == 0


def test_a_file_in_a_folder_of_a_component_is_among_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recomputation, "LARGE", 100)
    source, runs = flux(tmp_path / "flux"), set[int]()
    inside = [f"{name}/voice/adapter_config.json" for name in ("text_encoder", "transformer")]
    for name in inside:
        (source / name).parent.mkdir()
        (source / name).write_text(json.dumps({"text": "0" * 100}))
    api.quantize(source, tmp_path / "out", **SETTINGS)

    def stop(step: Progress) -> None:
        runs.add(step.all_bytes)
        if len(runs - {0}) > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.verify(tmp_path / "out", source, on_progress=stop, **ON_CPU)
    for name in inside:
        (tmp_path / "out" / name).write_text(json.dumps({"text": "1" * 100}))
    found = api.verify(tmp_path / "out", source, **ON_CPU)
    assert found.recomputed is not None
    assert list(found.recomputed.unlike_files) == inside


def test_what_is_kept_of_it_may_be_damaged_and_need_not_be_kept(
    tiny_llama: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QZ_CACHE", str(tmp_path / "cache"))
    interrupt(copy, tiny_llama, threads=1)
    [journal] = (tmp_path / "cache/verified").iterdir()
    journal.write_bytes(journal.read_bytes()[:-7] + b"\0\xff[1]")
    assert before(api.verify(copy, tiny_llama, **ON_CPU)) > 0
    assert not journal.exists()
    monkeypatch.setenv("QZ_CACHE", "")
    interrupt(copy, tiny_llama, threads=1)
    assert before(api.verify(copy, tiny_llama, **ON_CPU)) == 0


def test_what_nobody_recorded_cannot_be_recomputed(tiny_llama: Path, copy: Path) -> None:
    with pytest.raises(UsageError, match="--against"):
        api.verify(copy, sample=0.5)
    settings = about_of(copy)["settings"]
    for damage in ({"method": {"name": "nf5"}}, {"skips": 3}, {"dtype": None}):
        tell(copy, settings={**settings, **damage})
        with pytest.raises(MalformedInput):
            api.verify(copy, tiny_llama, **ON_CPU)
    tell(copy, settings={**settings, "from_the_future": True})
    with pytest.raises(Exception, match="from_the_future"):
        api.verify(copy, tiny_llama, **ON_CPU)
    (copy / "qz.json").unlink()
    with pytest.raises(MalformedInput, match=r"has no qz\.json"):
        api.verify(copy, tiny_llama, **ON_CPU)


# What another device explains


def explain(method: str, kind: str, there: Any, wanted: Any, dtype: str = "u1", *, double: bool = False) -> str | None:
    one, other = (np.array(values, dtype).view(np.uint8) for values in (there, wanted))
    return explained(method, double, kind, one, other)


def test_known_differences_of_devices_are_explained_and_no_others() -> None:
    zeros, sevens = [0x00] * 32, [0x77] * 32
    assert explain("nf4", "weight", [*zeros, *[0x12] * 32], [*sevens, *[0x12] * 32])
    assert not explain("nf4", "weight", [0x00, *sevens[1:]], sevens), "one value of a block is the block's minimum"
    assert not explain("nf4", "weight", [0x12] * 32, [0x13] * 32)
    assert explain("fp4", "weight", [0x80, 0x08, 0x88], [0x00, 0x00, 0x08])
    assert not explain("fp4", "weight", [0x90], [0x10])
    assert explain("int8", "weight", [-3, 4], [-2, 4], "i1")
    assert not explain("int8", "weight", [-3, 4], [-1, 4], "i1")
    assert not explain("int8", "SCB", [1.0], [1.5], "f4")
    assert explain("nf4", "weight.absmax", [3, 4], [4, 4], double=True)
    assert not explain("nf4", "weight.absmax", [3, 4], [5, 4], double=True)
    assert not explain("nf4", "weight.absmax", [3, 4], [4, 4]), "plain scales are the same everywhere"
    next_to_one = np.nextafter(np.float32(1), np.float32(2))
    assert explain("nf4", "weight.nested_absmax", [1.0], [next_to_one], "f4", double=True)
    assert not explain("nf4", "", [3], [4])


def test_they_are_told_where_the_output_is_of_another_device_only(tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    api.quantize(tiny_llama, output, method=Int8(), device="cpu")
    change(output, "model.layers.1.mlp.up_proj.weight", 8)
    assert not api.verify(output, tiny_llama, **ON_CPU).explained
    tell(output, device="cuda:0")
    found = api.verify(output, tiny_llama, **ON_CPU)
    assert (found.intact, found.explained) == (False, True)


# On the Hub


def test_both_may_lie_on_the_hub_and_a_sample_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=320, dtype="bfloat16")).bfloat16().save_pretrained(
        tmp_path / "model"
    )
    source, made = tmp_path / "model", tmp_path / "made"
    api.quantize(source, made, **ON_CPU)
    with connected(monkeypatch, tmp_path / "home") as hub:
        hub.add("org/model", {path.name: path.read_bytes() for path in source.iterdir()})
        hub.add("me/model-nf4", {path.name: path.read_bytes() for path in made.iterdir()})
        found = api.verify("me/model-nf4", "org/model", **ON_CPU)
        assert found.intact
        assert found.revision == hub.repos["org/model"].refs["main"]
        assert api.verify("me/model-nf4").intact
        before = sum(hub.bytes_out.values())
        assert api.verify("me/model-nf4", "org/model", sample=0.01, **ON_CPU).intact
        assert sum(hub.bytes_out.values()) - before < before / 2
        assert not api.verify("org/model").intact
