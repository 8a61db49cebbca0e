"""qz inspect: everything about a checkpoint, at once, and safe on anything that was downloaded."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
import qz
import zoo
from conftest import Qz
from converted import quantized
from hub_server import HubServer, connected
from pace import stopwatch
from qz import api
from qz.cli.app import run
from qz.cli.reports.tensors import pattern_of, ranges
from qz.formats.checkpoint.problems import ERRORS
from qz.formats.tensors.safetensors_layout import encode_header, layout
from reference import diffusers_model, transformers_model
from test_malformed import FOLDERS, build, place

__all__ = ["place"]

KEYS = {
    "source", "format", "parameters", "bytes", "dtypes", "quantization", "memory_footprint", "estimates", "files",
    "problems",
}  # fmt: skip
"""The contract: what scripts rely on."""
METHODS = ("nf4", "fp4", "nf4-double", "int8")
HEAVY = ("torch", "transformers", "diffusers", "bitsandbytes", "numpy", "numba", "huggingface_hub", "httpx", "rich")


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run ``qz inspect`` in this process: its exit code, stdout and stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def act(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(["inspect", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    yield act
    for number, handler in handlers.items():
        signal.signal(number, handler)


Inspect = Callable[..., tuple[int, str, str]]


def told(result: tuple[int, str, str]) -> dict[str, Any]:
    """The object of a run that went well."""
    code, out, err = result
    assert (code, err) == (0, "")
    value: dict[str, Any] = json.loads(out)
    return value


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models, and what qz makes of them by each method: ``flux``, ``flux-nf4`` …"""
    root = tmp_path_factory.mktemp("inspected")
    for name in ("llama-tied", "flux"):
        zoo.build(name).save_pretrained(root / name)
        for method in METHODS:
            quantized(root / name, root / f"{name}-{method}", method)
    pipelines.flux(root / "pipeline")
    return root


# What it says


def test_the_json_is_the_contracts(models: Path, inspect: Inspect) -> None:
    found = told(inspect(models / "flux", "--json"))
    assert found.keys() >= KEYS
    assert found["source"] == {
        "location": str(models / "flux"),
        "revision": None,
        "subfolder": None,
        "library": "diffusers",
        "architecture": "FluxTransformer2DModel",
    }
    model = zoo.build("flux")
    assert found["format"] == "safetensors"
    assert found["parameters"] == model.num_parameters()
    assert found["bytes"] == (models / "flux" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert found["memory_footprint"] == model.get_memory_footprint()
    assert found["dtypes"] == {
        "BF16": {"tensors": 76, "parameters": found["parameters"], "bytes": 2 * found["parameters"]}
    }
    assert found["quantization"] is None
    assert set(found["estimates"]) == {"nf4", "nf4_double_quant", "fp4", "int8"}
    for estimate in found["estimates"].values():
        assert set(estimate) == {"bytes", "memory_footprint", "quantized_parameters", "exact"}
    assert [file["name"] for file in found["files"]] == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert found["problems"] == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["flux", "llama-tied"])
def test_how_it_is_quantized_is_told(name: str, method: str, models: Path, inspect: Inspect) -> None:
    plain, found = (told(inspect(models / each, "--json")) for each in (name, f"{name}-{method}"))
    how = found["quantization"]
    assert how["method"] == method.removesuffix("-double")
    assert how["double_quant"] == (method == "nf4-double")
    four_bit = method != "int8"
    assert how["block_size"] == (64 if four_bit else None)
    assert how["compute_dtype"] == ("bfloat16" if four_bit else None)
    assert how["storage"] == ("uint8" if four_bit else None)
    assert how["threshold"] == (None if four_bit else 6.0)
    key = "nf4_double_quant" if method == "nf4-double" else method
    assert how["quantized_parameters"] == plain["estimates"][key]["quantized_parameters"]
    assert found["parameters"] == plain["parameters"] == sum(each["parameters"] for each in found["dtypes"].values())
    assert found["estimates"] is None
    # Double quant's estimate is an upper bound, by at most 25 bytes a weight.
    assert 0 <= plain["estimates"][key]["bytes"] - found["bytes"] <= 25 * how["quantized_tensors"] * how["double_quant"]


@pytest.mark.parametrize("method", ["nf4-double", "int8"])
def test_what_the_libraries_save_is_understood_and_its_footprint_is_theirs(
    method: str, models: Path, tmp_path: Path, inspect: Inspect
) -> None:
    from diffusers import FluxTransformer2DModel
    from transformers import LlamaForCausalLM

    llama = transformers_model(LlamaForCausalLM, models / "llama-tied", method)
    flux = diffusers_model(FluxTransformer2DModel, models / "flux", method, torch.bfloat16)
    for name, model in (("llama-tied", llama), ("flux", flux)):
        model.save_pretrained(tmp_path / name)
        found = told(inspect(tmp_path / name, "--json", "--plan"))
        assert found["problems"] == []
        assert found["quantization"]["method"] == method.removesuffix("-double")
        assert found["memory_footprint"] == model.get_memory_footprint()
        assert found["memory_footprint_exact"]
        # What qz wrote knows its footprint without the library.
        ours = told(inspect(models / f"{name}-{method}", "--json"))
        assert ours["memory_footprint"] == model.get_memory_footprint()
        assert ours["memory_footprint_exact"]


def test_a_config_of_another_tool_over_plain_weights_is_named(tmp_path: Path, models: Path, inspect: Inspect) -> None:
    shutil.copytree(models / "llama-tied", tmp_path / "awq")
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    (tmp_path / "awq" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    found = told(inspect(tmp_path / "awq", "--json"))
    assert found["quantization"]["method"] == "awq"
    assert found["quantization"]["quantized_parameters"] is None
    assert found["estimates"] is None
    assert [problem["kind"] for problem in found["problems"]] == ["quantization-left-over"]


def test_ties_are_shown(models: Path, inspect: Inspect) -> None:
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    assert told(inspect(models / "llama-tied", "--json"))["ties"] == tied
    code, out, _ = inspect(models / "llama-tied")
    assert code == 0
    assert "lm_head.weight = model.embed_tokens.weight" in out


def test_a_pipeline_has_a_row_for_each_component_and_a_total(models: Path, inspect: Inspect) -> None:
    found = told(inspect(models / "pipeline", "--json"))
    assert found.keys() >= KEYS
    parts = {component["name"]: component for component in found["components"]}
    assert list(parts) == [
        "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae",
    ]  # fmt: skip
    assert {name for name, part in parts.items() if part["chosen"]} == {"transformer", "text_encoder_2"}
    for figure in ("parameters", "bytes", "memory_footprint"):
        assert found[figure] == sum(part[figure] or 0 for part in parts.values())
    kept = sum(parts[name]["bytes"] for name in ("text_encoder", "vae"))
    both = (parts["transformer"]["estimates"]["nf4"], parts["text_encoder_2"]["estimates"]["nf4"])
    assert found["estimates"]["nf4"]["bytes"] == kept + sum(each["bytes"] for each in both)
    assert [problem["kind"] for problem in found["problems"]] == ["pickle-files", "custom-code"]
    _, out, _ = inspect(models / "pipeline")
    for name in ("text_encoder_2", "transformer", "vae"):
        assert re.search(rf"^{name} ", out, re.MULTILINE)


def test_a_component_is_inspected_alone(models: Path, inspect: Inspect) -> None:
    whole = told(inspect(models / "pipeline", "--json"))
    part = next(each for each in whole["components"] if each["name"] == "transformer")
    alone = told(inspect(models / "pipeline", "--subfolder", "transformer", "--json"))
    assert alone["source"]["subfolder"] == "transformer"
    for key in ("parameters", "bytes", "dtypes", "estimates", "files"):
        assert alone[key] == part[key]


def test_a_broken_component_breaks_the_pipeline_and_only_its_row(
    models: Path, tmp_path: Path, inspect: Inspect
) -> None:
    shutil.copytree(models / "pipeline", tmp_path / "broken")
    shard = next((tmp_path / "broken" / "transformer").glob("*-00003-of-*"))
    os.truncate(shard, shard.stat().st_size - 1)
    shutil.rmtree(tmp_path / "broken" / "vae")
    code, out, err = inspect(tmp_path / "broken", "--json")
    report, end = map(json.loads, out.splitlines())
    assert code == end["code"] == 65
    assert {problem["kind"] for problem in report["problems"]} >= {"truncated", "component-missing"}
    assert report["problems"][0]["severity"] == "error"
    assert f"transformer/{shard.name}" in {problem["where"] for problem in report["problems"]}
    assert report["estimates"] is None
    assert next(each for each in report["components"] if each["name"] == "text_encoder")["problems"] == []
    assert "Traceback" not in err


def test_a_single_file_is_inspected_by_itself(models: Path, inspect: Inspect) -> None:
    found = told(inspect(models / "flux-nf4" / "diffusion_pytorch_model.safetensors", "--json"))
    assert found["source"]["library"] is None
    assert found["quantization"]["method"] == "nf4"
    assert found["quantization"]["block_size"] == 64
    assert found["parameters"] == told(inspect(models / "flux", "--json"))["parameters"]
    assert found["estimates"] is None


def test_a_single_file_of_another_tool_is_named_with_what_to_do(tmp_path: Path, inspect: Inspect) -> None:
    placed = layout([("double_blocks.0.img_attn.qkv.weight", "BF16", (8, 8))])
    (tmp_path / "flux1-dev.safetensors").write_bytes(encode_header(placed) + bytes(128))
    code, out, _ = inspect(tmp_path / "flux1-dev.safetensors")
    assert code == 65
    assert "Black Forest Labs" in out
    assert "from_single_file()" in out
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(50))
    code, out, _ = inspect(tmp_path / "model.gguf")
    assert code == 65
    assert "GGUF" in out


# Tensors


def test_like_tensors_are_one_line(models: Path, inspect: Inspect) -> None:
    code, out, _ = inspect(models / "llama-tied-nf4", "--tensors")
    assert code == 0
    line = next(line for line in out.splitlines() if "q_proj" in line)
    assert re.fullmatch(
        r"model\.layers\.\{0,1\}\.self_attn\.q_proj\.weight \+ absmax, quant_map, quant_state +2 +nf4 +64×64 +4\.89 kB",
        line,
    )


def test_a_model_of_400_layers_reads_in_one_screen(tmp_path: Path, inspect: Inspect) -> None:
    modules = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
    entries = [(f"model.layers.{n}.{module}.weight", "BF16", (2, 2)) for n in range(400) for module in modules]
    placed = layout([*entries, ("model.embed_tokens.weight", "BF16", (4, 2))])
    (tmp_path / "model.safetensors").write_bytes(encode_header(placed) + bytes(placed[-1].stop))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    _, out, _ = inspect(tmp_path, "--tensors")
    assert "model.layers.{0..399}.mlp.up_proj.weight" in out
    assert len(out.splitlines()) < 24


def test_a_filter_lists_each_tensor_that_matches(models: Path, inspect: Inspect) -> None:
    found = told(inspect(models / "flux-nf4", "--json", "--filter", "*.attn.to_q.weight*"))
    names = [tensor["name"] for tensor in found["tensors"]]
    assert len(names) == 3 * 4
    assert all(".attn.to_q.weight" in name for name in names)
    _, out, _ = inspect(models / "flux-nf4", "--filter", "*.attn.to_q.weight*")
    assert all(name in out for name in names)
    code, out, err = inspect(models / "flux-nf4", "--filter", "nothing*")
    assert (code, out) == (2, "")
    assert "--filter nothing* matches no tensor" in err


def test_the_json_lists_every_tensor(models: Path, inspect: Inspect) -> None:
    found = told(inspect(models / "flux-nf4", "--json", "--tensors"))
    assert len(found["tensors"]) == sum(share["tensors"] for share in found["dtypes"].values())
    assert sum(tensor["bytes"] for tensor in found["tensors"]) == sum(s["bytes"] for s in found["dtypes"].values())
    weight = next(tensor for tensor in found["tensors"] if tensor["name"] == "x_embedder.weight")
    assert (weight["quantized"], weight["original"], weight["dtype"]) == ("nf4", [64, 64], "U8")
    absmax = next(tensor for tensor in found["tensors"] if tensor["name"] == "x_embedder.weight.absmax")
    assert absmax["part_of"] == "x_embedder.weight"
    assert "tensors" not in told(inspect(models / "flux-nf4", "--json"))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({7}, "7"),
        ({0, 1}, "{0,1}"),
        (set(range(80)), "{0..79}"),
        ({0, 1, 2, 5}, "{0..2,5}"),
        (set(range(0, 40, 2)), "{0,2,4,…,36,38}"),
    ],
)
def test_ranges_are_short(numbers: set[int], text: str) -> None:
    assert ranges(numbers) == text


def test_two_numbers_in_a_name_are_two_ranges() -> None:
    names = [f"layers.{layer}.experts.{expert}.w1" for layer in range(3) for expert in range(8)]
    assert pattern_of(["layers", "#", "experts", "#", "w1"], names) == "layers.{0..2}.experts.{0..7}.w1"


# Problems and exit codes


def test_a_missing_nested_absmax_is_an_error_above_all(models: Path, tmp_path: Path, inspect: Inspect) -> None:
    """Both libraries load that without a word."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(models / "llama-tied-nf4-double", tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight.nested_absmax"]
    save_file(tensors, file, {"format": "pt"})
    code, out, _ = inspect(tmp_path / "x", "--json")
    report, end = map(json.loads, out.splitlines())
    assert code == 65
    assert end == {"type": "exit_error", "code": 65, "message": end["message"]}
    assert "nested-absmax-missing" in end["message"]
    assert report["problems"][0]["kind"] == "nested-absmax-missing"
    code, out, err = inspect(tmp_path / "x")
    assert code == 65
    assert "computes nonsense" in out
    assert len(err.splitlines()) <= 5


def test_a_folder_that_is_not_there_is_66(tmp_path: Path, inspect: Inspect) -> None:
    code, out, err = inspect(tmp_path / "nothing", "--json")
    assert code == 66
    assert json.loads(out)["code"] == 66
    assert "does not exist" in err


def test_a_subfolder_that_is_not_there_names_those_that_are(models: Path, inspect: Inspect) -> None:
    code, _, err = inspect(models / "pipeline", "--subfolder", "unet")
    assert code == 66
    assert "transformer" in err


def test_code_in_a_folder_is_never_run_and_warned_of(models: Path, tmp_path: Path, inspect: Inspect) -> None:
    shutil.copytree(models / "llama-tied", tmp_path / "x")
    ran = tmp_path / "ran"
    (tmp_path / "x" / "modeling_x.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.Evil"}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    for option in ((), ("--plan",)):
        code, out, _ = inspect(tmp_path / "x", *option)
        assert code == 0
        assert "code of its own" in out
    assert not ran.exists()


def test_a_plan_that_the_library_cannot_make_leaves_estimates(models: Path, tmp_path: Path, inspect: Inspect) -> None:
    shutil.copytree(models / "llama-tied", tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"architectures": ["NewModelForRegression"]}))
    found = told(inspect(tmp_path / "x", "--plan", "--json"))
    assert [problem["kind"] for problem in found["problems"]] == ["no-plan"]
    assert not found["estimates"]["nf4"]["exact"]


def test_tensors_that_do_not_fit_the_class_are_an_error_with_the_plan(
    models: Path, tmp_path: Path, inspect: Inspect
) -> None:
    shutil.copytree(models / "llama-tied", tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    code, out, _ = inspect(tmp_path / "x", "--plan", "--json")
    assert code == 65
    assert json.loads(out.splitlines()[0])["problems"][0]["kind"] == "class-mismatch"


# Verification


def test_verify_finds_a_changed_byte_and_a_lost_file(models: Path, tmp_path: Path, inspect: Inspect) -> None:
    shutil.copytree(models / "flux-int8", tmp_path / "x")
    found = told(inspect(tmp_path / "x", "--verify", "--json"))
    assert found["verified"]["intact"]
    assert found["verified"]["bytes"] > found["bytes"]
    file = tmp_path / "x" / "diffusion_pytorch_model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-100_000, os.SEEK_END)
        last = opened.read(1)
        opened.seek(-100_000, os.SEEK_END)
        opened.write(bytes([last[0] ^ 1]))
    code, out, _ = inspect(tmp_path / "x", "--verify", "--json")
    report = json.loads(out.splitlines()[0])
    assert code == 65
    assert [problem["kind"] for problem in report["problems"]] == ["hash-differs"]
    assert not report["verified"]["intact"]
    code, out, _ = inspect(models / "flux", "--verify")
    assert code == 65
    assert "nothing to compare it with" in out


@pytest.mark.parametrize("entry", [{"bytes": -1}, {"sha256": "x"}, {"name": "n" * 300}, {"name": "../x"}], ids=str)
def test_a_damaged_record_is_told_without_being_asked_for(
    entry: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    listed = {"name": "config.json", "bytes": 1, "sha256": "0" * 64, **entry}
    (folder / "qz.json").write_text(json.dumps({"version": 1, "about": {}, "files": [listed]}))
    found = api.inspect(folder)
    assert [(each.severity, each.kind) for each in found.problems] == [("warning", "record-malformed")]


def test_a_component_of_a_verified_pipeline_is_checked_by_the_pipelines_record(
    tmp_path: Path, models: Path, forked_qz: Qz, inspect: Inspect
) -> None:
    done = forked_qz("quantize", models / "pipeline", "-o", tmp_path / "out", "--quiet")
    assert done.returncode == 0, done.stderr
    found = told(inspect(tmp_path / "out", "--verify", "--json", "--quiet"))
    assert found["verified"]["intact"]
    assert found["quantization"]["method"] == "nf4"
    assert found["memory_footprint_exact"]
    exact = told(inspect(tmp_path / "out", "--plan", "--json"))
    assert found["memory_footprint"] == exact["memory_footprint"]
    assert told(inspect(tmp_path / "out", "--subfolder", "transformer", "--verify", "--json"))["verified"]["intact"]


# Safety


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """root may read everything; others may not."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture(scope="module")
def all_modules() -> None:
    """Imported: others may not read where they lie."""
    for module in pkgutil.walk_packages(qz.__path__, "qz."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


FIRST = {kinds: name for name, (_, _, kinds) in reversed(FOLDERS.items())}.values()
"""Of each kind of problem; test_malformed has them all."""


@pytest.mark.usefixtures("all_modules")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FIRST else [pytest.mark.soak]) for name in FOLDERS]
)
def test_a_malformed_checkpoint_is_reported_safely(name: str, place: Path, inspect: Inspect) -> None:
    base, changes, kinds = FOLDERS[name]
    build(place / "checkpoint", base, changes)
    for arguments in ((), ("--json", "--tensors")):
        with stopwatch() as watch, unprivileged():
            code, out, err = inspect(place / "checkpoint", *arguments)
        assert watch.loops < 50
        broken = not ERRORS.keys().isdisjoint(kinds)
        assert code in ((65, 74, 77) if broken else (0,))
        assert "Traceback" not in err
        assert "Internal error" not in err
        assert len(err.splitlines()) <= 5
        for line in (out + err).splitlines():
            assert line.isprintable()
        if arguments:
            report, *end = map(json.loads, out.splitlines())
            assert bool(end) == (code != 0)
            if "pipeline-root" not in kinds:
                assert {problem["kind"] for problem in report["problems"]} == set(kinds)
        elif broken:
            assert "error" in out


@pytest.mark.parametrize(
    "name",
    ["config: FIFO", "weights: link to itself", "name: ESC", "quantized double: no nested_absmax", "shard: cut off"],
)
def test_a_malformed_checkpoint_is_reported_safely_by_the_command(name: str, place: Path, forked_qz: Qz) -> None:
    cases = {case: value for case, value in FOLDERS.items() if case == name or name.split(": ")[-1] in case}
    base, changes, _ = cases.get(name) or next(iter(cases.values()))
    build(place / "checkpoint", base, changes)
    done = forked_qz("inspect", place / "checkpoint")
    assert done.returncode == 65
    assert "Traceback" not in done.stderr
    assert (done.stdout + done.stderr).replace("\n", "").isprintable()


INDEXES: dict[str, tuple[Any, str]] = {
    "a list": ([], "json-malformed"),
    "100,000 lists deep": ("[" * 100_000, "json-malformed"),
    "no class": ({"vae": ["diffusers", "AutoencoderKL"]}, "index-malformed"),
    "no component": ({"_class_name": "FluxPipeline"}, "index-malformed"),
    "a component outside": ({"_class_name": "X", "../vae": ["diffusers", "AutoencoderKL"]}, "unsafe-name"),
    "a component that is the folder": ({"_class_name": "X", ".": ["diffusers", "AutoencoderKL"]}, "unsafe-name"),
    "a component that steers the terminal": ({"_class_name": "\x1b[2J", "\x1b[2J": ["a", "b"]}, "unsafe-name"),
    "3,000 components that are not there": (
        {"_class_name": "X", **{f"c{n}": ["diffusers", "Y"] for n in range(3000)}},
        "component-missing",
    ),
    "a component of 5,000 letters": ({"_class_name": "X", "a" * 5000: ["diffusers", "Y"]}, "component-missing"),
    "a pipeline and a component of its own code": (
        {"_class_name": ["pipe", "Evil"], "unet": ["unet", "Evil"]},
        "component-missing",
    ),
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_malformed_pipeline_is_reported_safely(name: str, tmp_path: Path, inspect: Inspect) -> None:
    index, kind = INDEXES[name]
    (tmp_path / "model_index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    for arguments in ((), ("--json",), ("--plan", "--tensors")):
        code, out, err = inspect(tmp_path, *arguments)
        assert code == 65
        assert "Internal error" not in err
        assert (out + err).replace("\n", "").isprintable()
        if "--json" in arguments:
            assert json.loads(out.splitlines()[0])["problems"][0]["kind"] == kind


def test_names_that_steer_a_terminal_are_spelled_out(models: Path, tmp_path: Path, inspect: Inspect) -> None:
    evil = "\x1b[2J\u202e[red]x::"
    shutil.copytree(models / "llama-tied", tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    said = {"quant_method": evil, "llm_int8_skip_modules": [evil]}
    config |= {"architectures": [evil], "quantization_config": said, "dtype": evil}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    for arguments in ((), ("--json",), ("--plan",)):
        _, out, err = inspect(tmp_path / "x", *arguments)
        assert (out + err).replace("\n", "").isprintable()
        assert "\\x1b[2J" in out.replace("\\u001b", "\\x1b")


@pytest.mark.parametrize("extra", [[], ["--tensors"]])
@pytest.mark.parametrize("name", ["llama-tied-nf4", "pipeline"])
def test_a_narrow_terminal_is_never_overrun(name: str, extra: list[str], models: Path) -> None:
    """At 40 columns, on a real terminal, without a single escape sequence."""
    reader, writer = pty.openpty()
    environment = {**os.environ, "COLUMNS": "40", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "qz", "inspect", name, *extra]
    with subprocess.Popen(command, cwd=models, stdout=writer, stderr=writer, env=environment) as process:
        os.close(writer)
        text = b""
        with contextlib.suppress(OSError):
            while piece := os.read(reader, 65536):
                text += piece
    os.close(reader)
    assert process.returncode == 0
    lines = text.decode().replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 40
    assert "\x1b" not in text.decode()


# Speed


@pytest.mark.parametrize("name", ["flux", "llama-tied-nf4", "pipeline"])
def test_a_local_folder_needs_no_framework(name: str, models: Path) -> None:
    code = (
        "import sys; from qz.cli.app import run; code = run(['inspect', sys.argv[1]]);"
        f"print(sorted(set({HEAVY}) & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, models / name], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Far away


def test_a_repository_is_inspected_by_its_headers(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inspect: Inspect
) -> None:
    """Of 50 MB of weights a few heads are sent; the report is that of the local folder."""
    big = tmp_path / "big"
    big.mkdir()
    weight_map: dict[str, str] = {}
    for shard in range(2):
        name = f"model-{shard + 1:05d}-of-00002.safetensors"
        placed = layout([(f"model.layers.{shard}.mlp.up_proj.weight", "BF16", (2048, 6144))])
        (big / name).write_bytes(encode_header(placed) + bytes(placed[-1].stop))
        weight_map |= {info.name: name for info in placed}
    index = {"metadata": {"total_size": 2 * 2048 * 6144 * 2}, "weight_map": weight_map}
    (big / "model.safetensors.index.json").write_text(json.dumps(index))
    (big / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with connected(monkeypatch, tmp_path / "home") as hub:
        add(hub, "me/big", big)
        add(hub, "me/pipe", models / "pipeline")
        add(hub, "me/nf4", models / "flux-nf4")
        here, there = told(inspect(big, "--json")), told(inspect("me/big", "--json"))
        sent = sum(hub.bytes_out.values())
        assert re.fullmatch("[0-9a-f]{40}", there["source"]["revision"])
        assert {**there, "source": here["source"]} == here
        assert hub.bytes_out["cdn"] <= 2 * 65_536
        assert sent < 200_000
        for repo, folder in (("me/pipe", "pipeline"), ("me/nf4", "flux-nf4")):
            here, there = told(inspect(models / folder, "--json")), told(inspect(repo, "--json"))
            assert [each["kind"] for each in there["problems"]] == [each["kind"] for each in here["problems"]]
            for key in KEYS - {"source", "problems"}:
                assert there[key] == here[key], key
        assert told(inspect("me/pipe", "--subfolder", "vae", "--json"))["source"]["subfolder"] == "vae"
        assert told(inspect("me/nf4", "--verify", "--json"))["verified"]["intact"]
        code, _, err = inspect("me/nothing")
        assert code == 66
        assert "me/nothing" in err


def add(hub: HubServer, name: str, folder: Path) -> None:
    hub.add(name, {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()})
