"""Ordinary mistakes at the command line, and ordinary machines: each gets the right code and a sentence that helps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forked import INTERRUPT, Ended, Runner
from qz.formats.output.preflight import check_room
from qz.formats.output.storage.disk import Disk

LONG = "x" * 300


@pytest.fixture(scope="module")
def server(forks: Runner) -> Runner:
    return forks


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Path) -> Path:
    """A folder with a model ``m`` in it, and a folder ``full`` that is none."""
    shutil.copytree(tiny_llama, tmp_path / "m")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    return tmp_path


def told(ended: Ended) -> str:
    return " ".join(ended.error)


REFUSED_OUTPUTS = {
    "a folder that is no checkpoint": (["-o", "full"], 73),
    "the same, to be replaced": (["-o", "full", "--overwrite"], 73),
    "the source": (["-o", "m"], 73),
    "a folder in the source": (["-o", "m/inside"], 73),
    "a folder around the source": (["-o", "."], 73),
    "the root": (["-o", "/"], 73),
    "the folder above": (["-o", ".."], 73),
    "nothing": (["-o", ""], 73),
    "a long name": (["-o", LONG], 73),
    "a file in the way": (["-o", "full/x/new"], 73),
    "what is no disk": (["-o", "/proc/new"], 74),
    "remains of another program": (["-o", "other"], 73),
    "a device that is not there": (["--device", "cuda:7", "-o", "new"], 2),
    "another one": (["--device", "xpu", "-o", "new"], 2),
    "nobody to push as": (["--push", "me/model", "-o", "new"], 77),
    "what names no repository": (["--push", "my model", "-o", "new"], 2),
    "nothing to push to": (["--push", "", "-o", "new"], 2),
    "five bytes": (["--max-shard-size", "5", "-o", "new"], 2),
    "a pattern of nothing": (["--skip", "q_porj", "-o", "new"], 2),
    "a component of a model": (["--components", "unet", "-o", "new"], 2),
}


@pytest.mark.parametrize("case", REFUSED_OUTPUTS)
def test_a_dry_run_refuses_what_the_run_refuses(server: Runner, place: Path, case: str) -> None:
    options, code = REFUSED_OUTPUTS[case]
    if options[-1].startswith("/proc") and sys.platform != "linux":
        pytest.skip("no such place here")
    (place / "other.partial").mkdir()
    before = sorted(place.rglob("*"))
    for dry in ([], ["--dry-run"]):
        ended = server.run("quantize", "m", "--nf4", *options, *dry, cwd=place)
        assert ended.code == code, (dry, ended.stderr)
        assert sorted(place.rglob("*")) == before


def test_a_dry_run_sees_that_the_disk_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"Not enough space for .*: it needs 1,000,000,000,000,000,000 bytes") as caught:
        check_room(tmp_path / "new/out", 10**18, Disk())
    assert caught.value.exit_code == 74  # type: ignore[attr-defined]
    for way_out in ("--output", "--part 1/N", "--push-only", "qz inspect SOURCE --plan"):
        assert way_out in str(caught.value)
    check_room(tmp_path / "new/out", 1000, Disk())
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_sees_an_interrupted_run_that_differs(server: Runner, place: Path) -> None:
    ended = server.run(
        "quantize", "m", "-o", "out", "--max-shard-size", "50KB", "--threads", "1", cwd=place, at=1,
        act=INTERRUPT, only=("rename",),
    )  # fmt: skip
    assert ended.code == 130
    assert (place / "out.partial.journal").exists(), ended.stderr
    options = ["quantize", "m", "-o", "out", "--max-shard-size"]
    for dry in ([], ["--dry-run"]):
        ended = server.run(*options, "60KB", *dry, cwd=place)
        assert ended.code == 73, ended.stderr
        assert "interrupted run that differs" in told(ended)
        same = server.run(*options, "50KB", "--dry-run", "--json", cwd=place)
        assert same.code == 0, same.stderr
        assert json.loads(same.stdout)["resumed"]
    assert "would continue an interrupted one" in server.run(*options, "50KB", "--dry-run", cwd=place).stdout
    fresh = server.run(*options, "50KB", "--dry-run", "--no-resume", "--json", cwd=place)
    assert not json.loads(fresh.stdout)["resumed"]


def test_an_output_behind_a_folder_that_is_not_there_is_told_where_it_is(server: Runner, place: Path) -> None:
    ended = server.run("quantize", "m", "-o", "nowhere/../made", cwd=place)
    assert ended.code == 0, ended.stderr
    assert "nowhere" not in ended.stdout + ended.stderr
    assert (place / "made/config.json").is_file()


def test_a_model_is_quantized_from_inside_its_folder(server: Runner, place: Path) -> None:
    ended = server.run("quantize", ".", "--nf4", "--json", cwd=place / "m")
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout)["output"] == str(place / "m-nf4")
    assert (place / "m-nf4/config.json").is_file()
    (place / "m/deep").mkdir()
    ended = server.run("quantize", "..", "--nf4", "--dry-run", "--overwrite", "--json", cwd=place / "m/deep")
    assert json.loads(ended.stdout)["output"] == str(place / "m-nf4")


@pytest.mark.parametrize("source", ["~nobody/x", "~no such user", LONG, f"a/{LONG}", f"./{LONG}", "", " ", "a/b/c"])
@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_a_source_that_cannot_be_is_missing(server: Runner, tmp_path: Path, command: str, source: str) -> None:
    ended = server.run(command, source, cwd=tmp_path)
    assert ended.code == 66, ended.stderr
    assert "does not exist" in told(ended)


def test_a_repository_that_is_not_there_might_have_been_a_folder(server: Runner, tmp_path: Path) -> None:
    ended = server.run("quantize", "modles/llama", cwd=tmp_path)
    assert ended.code in (66, 69)
    assert "There is no local folder modles/llama either" in told(ended)


EMPTY = (8).to_bytes(8, "little") + b"{}      "
NOTHING_INSIDE = {
    "m": {"model.safetensors": EMPTY, "config.json": b'{"model_type":"llama","architectures":["LlamaForCausalLM"]}'},
    "p": {"model_index.json": b'{"_class_name":"FluxPipeline"}'},
    "s": {
        "model_index.json": b'{"_class_name":"FluxPipeline","scheduler":["diffusers","EulerDiscreteScheduler"]}',
        "scheduler/scheduler_config.json": b"{}",
    },
}


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["inspect", "m"], 65, "m holds no tensor at all"),
        (["inspect", "m/model.safetensors"], 65, "m/model.safetensors holds no tensor at all"),
        (["quantize", "m", "-o", "new"], 65, "m holds no tensor at all"),
        (["quantize", "m", "-o", "new", "--dry-run"], 65, "m holds no tensor at all"),
        (["inspect", "p"], 65, "names no component"),
        (["quantize", "p", "-o", "new"], 66, "no component with weights"),
        (["quantize", "s", "-o", "new"], 66, "no component with weights"),
        (["quantize", "s", "-o", "new", "--dry-run"], 66, "no component with weights"),
        (["dequantize", "s", "-o", "new"], 78, "No component of s is quantized"),
    ],
)
def test_what_has_nothing_to_convert_inside_is_told(
    server: Runner, tmp_path: Path, words: list[str], code: int, why: str
) -> None:
    for folder, files in NOTHING_INSIDE.items():
        for name, data in files.items():
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_bytes(data)
    ended = server.run(*words, cwd=tmp_path)
    assert ended.code == code
    assert why in ended.stdout + ended.stderr
    assert not (tmp_path / "new").exists()


def test_short_names_mean_what_everybody_means_by_them(server: Runner, place: Path) -> None:
    for short, full in {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}.items():
        options = ("--dtype", short, "--compute-dtype", short)
        ended = server.run("quantize", "m", *options, "-o", short, "--json", cwd=place)
        assert json.loads(ended.stdout)["dtype"] == full
        config = json.loads((place / short / "config.json").read_text())
        assert config["quantization_config"]["bnb_4bit_compute_dtype"] == full
        assert server.run("dequantize", short, "--dtype", short, "-o", "back", "--dry-run", cwd=place).code == 0
    ended = server.run("quantize", "m", "--method", "int8", "-o", "out", "--dry-run", "--json", cwd=place)
    assert json.loads(ended.stdout)["method"] == "int8"
    ended = server.run("quantize", "m", "--method", "int8", "--fp4", cwd=place)
    assert (ended.code, "exclude each other" in told(ended)) == (2, True)


def test_help_and_version_are_commands_too(server: Runner, tmp_path: Path) -> None:
    assert server.run("version", cwd=tmp_path).stdout == server.run("--version", cwd=tmp_path).stdout
    assert server.run("help", cwd=tmp_path).stdout == server.run("--help", cwd=tmp_path).stdout
    shown = server.run("help", "quantize", cwd=tmp_path)
    assert (shown.code, "--compute-dtype" in shown.stdout) == (0, True)


@pytest.mark.parametrize("size", ["9" * 400, f"1.{'9' * 400}GB", "٥GB", "5", "999"])
def test_a_size_that_nobody_means_is_refused(server: Runner, place: Path, size: str) -> None:
    ended = server.run("quantize", "m", "--max-shard-size", size, "-o", "new", cwd=place)
    assert (ended.code, "5GB" in told(ended)) == (2, True)
    assert set(os.listdir(place)) == {"m", "full"}


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [("q_porj", "q_proj"), ("model.layers.0.self_attn.q_porj", "self_attn.q_proj"), ("nothing_like_it", "Names there")],
)
def test_a_skip_that_matches_nothing_names_what_is_near(server: Runner, place: Path, pattern: str, meant: str) -> None:
    ended = server.run("quantize", "m", "--skip", "lm_head", "--skip", pattern, "-o", "new", cwd=place)
    assert ended.code == 2, ended.stderr
    assert f"--skip {pattern} matches no module" in told(ended)
    assert meant in told(ended)


def test_a_skip_that_matches_a_module_of_any_kind_is_fine(server: Runner, place: Path) -> None:
    for skip in ("q_proj", "model.layers.1", "embed_tokens", r".*mlp\.(up|down)_proj"):
        assert server.run("quantize", "m", "--skip", skip, "--dry-run", cwd=place).code == 0, skip


def test_a_skip_of_modules_whose_linear_layers_it_does_not_match_is_told_with_what_does(
    server: Runner, place: Path
) -> None:
    """transformers would quantize all of them, and say nothing."""
    for skip in ("mlp", "self_attn", "layers.1"):
        ended = server.run("quantize", "m", "--skip", skip, "--dry-run", cwd=place)
        assert ended.code == 2, ended.stderr
        advice = re.search(r"Name the layers inside: --skip '(.+)'\.", told(ended))
        assert advice is not None
        again = server.run("quantize", "m", "--skip", advice[1], "--dry-run", "--json", cwd=place)
        assert again.code == 0, again.stderr
        skipped = json.loads(again.stdout)["skipped"]
        assert skipped.pop(0) == "lm_head"
        assert skipped
        assert all(f".{skip}." in path for path in skipped)


@pytest.mark.parametrize("skip", ["self_atn", "mpl", "q_porj"])
def test_the_nearest_name_of_a_misspelt_skip_can_be_skipped(server: Runner, place: Path, skip: str) -> None:
    ended = server.run("quantize", "m", "--skip", skip, "--dry-run", cwd=place)
    assert ended.code == 2
    advice = re.search(r"(?:Did you mean|Names there:) '?([^ ,?']+)", told(ended))
    assert advice is not None, told(ended)
    again = server.run("quantize", "m", "--skip", advice[1], "--dry-run", cwd=place)
    assert again.code == 0, (advice[1], again.stderr)


def test_a_filter_that_matches_nothing_is_an_error(server: Runner, place: Path) -> None:
    ended = server.run("inspect", "m", "--filter", "*q_porj*", cwd=place)
    assert (ended.code, ended.stdout) == (2, "")
    assert "q_proj" in told(ended)
    assert server.run("inspect", "m", "--filter", "*q_proj*", cwd=place).code == 0


def make(server: Runner, place: Path, *options: str) -> Ended:
    return server.run("quantize", "m", "-o", "out", "--if-exists", "skip", "--json", *options, cwd=place)


def test_files_that_are_not_read_do_not_matter_to_an_output(server: Runner, place: Path) -> None:
    assert make(server, place).code == 0
    (place / "m/runs").mkdir()
    (place / "m/runs/log.txt").write_text("x")
    (place / "m/notes.txt").write_text("x")
    (place / "m/lora.safetensors").write_text("x")
    shutil.copytree(place / "m", place / "copy")  # other inodes, same times
    shutil.rmtree(place / "m")
    (place / "copy").rename(place / "m")
    ended = make(server, place)
    assert (ended.code, json.loads(ended.stdout)["up_to_date"]) == (0, True), ended.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("touch m/config.json", "config.json is newer"),
        ("printf x >> m/generation_config.json", "generation_config.json has another size"),
        ("printf x > m/tokenizer.json", "tokenizer.json was added"),
        ("rm m/generation_config.json", "generation_config.json is no longer there"),
    ],
)
def test_a_change_of_what_is_read_is_told_in_words(server: Runner, place: Path, change: str, words: str) -> None:
    assert make(server, place).code == 0
    time.sleep(0.02)
    subprocess.run(["sh", "-c", change], cwd=place, check=True)
    ended = make(server, place)
    assert ended.code == 73
    assert words in told(ended)
    assert "{" not in told(ended)


def test_other_settings_are_told_in_words(server: Runner, place: Path) -> None:
    assert make(server, place).code == 0
    ended = make(server, place, "--int8")
    assert "different settings (method: nf4 → int8" in told(ended)
    ended = make(server, place, "--skip", "q_proj", "--max-shard-size", "60KB")
    assert "max shard bytes: 1000000000 → 60000" in told(ended)
    assert "skips: none → q_proj" in told(ended)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("printf x > m/log.txt && cp -p m/config.json c && mv c m/config.json", 0, ""),
        ("touch m/model.safetensors", 73, "model.safetensors has changed"),
    ],
)
def test_an_interrupted_run_goes_on_if_what_it_reads_is_the_same(
    server: Runner, place: Path, change: str, code: int, words: str
) -> None:
    command = ("quantize", "m", "-o", "out", "--max-shard-size", "50KB", "--threads", "1")
    assert server.run(*command, cwd=place, at=1, act=INTERRUPT, only=("rename",)).code == 130
    subprocess.run(["sh", "-c", change], cwd=place, check=True)
    ended = server.run(*command, cwd=place)
    assert ended.code == code, ended.stderr
    assert words in told(ended)
    assert code or "Continuing" in ended.stderr
