"""What a command says to do next can be pasted: the Python loads what was made, and the commands run."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.utils._validators import validate_repo_id

import original_names
import pipelines
import readers
from conftest import Qz
from forked import Runner
from hub_server import connected
from mixtures import mixture
from qz.cli.commands.calibrate import next_command
from qz.cli.commands.push import push
from qz.cli.reports.next_step import after_output, repository_name
from qz.formats.publish.model_card.card_facts import facts_here
from qz.formats.publish.model_card.snippet import Here, loading
from qz.quantize.planning.budget.sensitivity import Scores


@pytest.fixture(scope="module")
def sources(forks: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sources")
    readers.model_folder("llama-untied", place / "llama")
    readers.some_text(place / "prose.txt")
    mixture("qwen3_moe", place / "moe")
    pipelines.flux(place / "flux")
    original_names.sd3_model().save_pretrained(place / "sd3")
    forks.warm("quantize", "flux", "--dry-run", "--quiet", cwd=place)
    return place


def steps(stderr: str) -> dict[str, str]:
    """The paragraphs that end what a command says: comment → what is to be pasted."""
    found = re.findall(r"^(# .*)\n((?:.+\n)+)", stderr, re.MULTILINE)
    assert found, stderr
    return dict(found)


def load(told: dict[str, str]) -> dict[str, Any]:
    """The names that the Python makes."""
    made: dict[str, Any] = {}
    exec(told["# Load it, in Python:"], made)
    return made


@pytest.mark.parametrize(
    ("arguments", "variable", "class_name"),
    [
        ("quantize llama -o ./out", "model", "LlamaForCausalLM"),
        ("quantize llama --int8 -o 'a b/ü $x'", "model", "LlamaForCausalLM"),
        ("quantize moe --experts", "model", "Qwen3MoeForCausalLM"),
        ("quantize flux --subfolder transformer", "transformer", "FluxTransformer2DModel"),
        ("quantize flux --subfolder text_encoder_2 --int8", "text_encoder_2", "T5EncoderModel"),
        ("quantize flux", "pipeline", "FluxPipeline"),
        ("dequantize flux-transformer-nf4", "transformer", "FluxTransformer2DModel"),
        ("dequantize flux-nf4", "pipeline", "FluxPipeline"),
    ],
)
def test_what_was_made_is_loaded_by_the_lines_that_are_told(
    arguments: str,
    variable: str,
    class_name: str,
    sources: Path,
    tmp_path: Path,
    forked_qz: Qz,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = forked_qz(*shlex.split(arguments), cwd=sources)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(sources)
    told = steps(done.stderr)
    made = load(told)
    assert type(made[variable]).__name__ == class_name
    assert ("tokenizer" in made) == (variable == "model" and "moe" not in arguments)
    program, verb, folder, repository = shlex.split(told["# Publish it:"])
    assert (program, verb) == ("qz", "push")
    assert Path(folder).is_dir()
    assert re.fullmatch(r"YOUR_NAME/[\w.-]+", repository)


def test_parts_say_how_they_become_one(
    sources: Path, tmp_path: Path, forked_qz: Qz, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        done = forked_qz("quantize", sources / "llama", "--part", f"{number}/2", "-o", "./whole")
        assert done.returncode == 0, done.stderr
    merged = forked_qz(*shlex.split(steps(done.stderr)["# When all parts are made:"])[1:])
    assert merged.returncode == 0, merged.stderr
    monkeypatch.chdir(tmp_path)
    assert type(load(steps(merged.stderr))["model"]).__name__ == "LlamaForCausalLM"


def test_a_file_in_original_names_says_how_to_see_who_loads_it(sources: Path, tmp_path: Path, forked_qz: Qz) -> None:
    done = forked_qz("quantize", sources / "sd3", "--layout", "single-file", "-o", "./one")
    (line,) = steps(done.stderr).values()
    judged = forked_qz(*shlex.split(line)[1:])
    assert judged.returncode == 0, judged.stdout + judged.stderr
    assert "comfyui   loads" in judged.stdout or "comfyui  loads" in judged.stdout


def test_a_calibration_says_how_it_is_used(sources: Path, tmp_path: Path, forked_qz: Qz) -> None:
    file = tmp_path / "my statistics.safetensors"
    options = ("--tokens", "64", "--text", "prose.txt", "--hessians", "--scores")
    done = forked_qz("calibrate", "llama", *options, "-o", file, cwd=sources)
    assert done.returncode == 0, done.stderr
    words = shlex.split(steps(done.stderr)["# Use it:"])
    used = forked_qz(*words[1:], "-o", tmp_path / "out", cwd=sources)
    assert used.returncode == 0, used.stderr
    assert file.name in used.stdout
    assert "rounded by GPTQ" in used.stdout
    assert "kept" in used.stdout


def test_the_command_that_uses_a_calibration_names_the_same_source() -> None:
    asked: Any = {"subfolder": "text_encoder", "revision": None, "variant": "fp16", "allow-pickle": True}
    scores = Scores({}, "int8", "kl", 1.0, 64)
    given: dict[str, Any] = {"source": "big/flux", "output": "x.safetensors", "hessian_files": ("h",)}
    found: Any = SimpleNamespace(**given, scores=scores, component_scores={})
    assert next_command(found, asked)[1] == (
        "qz quantize big/flux --subfolder text_encoder --variant fp16 --allow-pickle --int8 --scores x.safetensors "
        "--max-loss 0.5"
    )
    given |= {"scores": None, "components": ("text_encoder", "transformer")}
    drawn: Any = SimpleNamespace(**given, component_scores={"transformer": replace(scores, method="nf4")})
    assert next_command(drawn, {"subfolder": None, "revision": None})[1] == (
        "qz quantize big/flux --subfolder transformer --nf4 --importance x.safetensors --rounding gptq --max-loss 0.5"
    )
    drawn.component_scores["text_encoder"] = replace(scores, method="nf4", total=2.0)
    assert next_command(drawn, {"subfolder": None, "revision": None})[1] == (
        "qz quantize big/flux --nf4 --importance x.safetensors --rounding gptq --max-loss 1.5"
    )


@pytest.mark.parametrize("how", ["--quiet", "--json"])
def test_scripts_are_told_nothing(how: str, sources: Path, tmp_path: Path, forked_qz: Qz) -> None:
    done = forked_qz("quantize", sources / "llama", how, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "# " not in done.stdout + done.stderr


def test_a_push_says_how_it_is_loaded_from_where_it_went(
    sources: Path,
    tmp_path: Path,
    forked_qz: Qz,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the main branch, from another one, and from a pull request; models and pipelines, also in a folder."""
    assert forked_qz("quantize", sources / "llama", "-o", tmp_path / "nf4").returncode == 0
    with connected(monkeypatch, tmp_path / "home") as hub:
        hub.add("me/there", {}, private=True)
        for repository, how in (
            ("me/new", {}),
            ("me/new", {"subfolder": "inner"}),
            ("me/new", {"branch": "other"}),
            ("me/there", {"create_pr": True}),
        ):
            push(tmp_path / "nf4", repository, **how)
            model = load(steps(capsys.readouterr().err))["model"]
            assert type(model).__name__ == "LlamaForCausalLM"
        push(sources / "flux", "me/flux", subfolder="whole/of-it")
        pipeline = load(steps(capsys.readouterr().err))["pipeline"]
        assert type(pipeline).__name__ == "FluxPipeline"


def test_with_a_gpu_diffusers_own_call_is_told(sources: Path, tmp_path: Path, forked_qz: Qz) -> None:
    assert forked_qz("quantize", sources / "flux", "-o", tmp_path / "out").returncode == 0
    lines = loading(facts_here(tmp_path / "out"), Here("./out", gpu=True))
    assert lines[-1] == 'pipeline = DiffusionPipeline.from_pretrained("./out", dtype=torch.bfloat16)'


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("llama-nf4", "llama-nf4"),
        ("mein Modell ü-nf4", "mein-Modell-nf4"),
        ("a..b--c.git", "a-b-c"),
        ("-.é", "model"),
        ("x" * 200, None),
    ],
)
def test_the_repository_that_is_proposed_has_a_name_that_the_hub_takes(folder: str, name: str | None) -> None:
    proposed = repository_name(folder)
    validate_repo_id(f"YOUR_NAME/{proposed}")
    assert name in (proposed, None)


def test_an_output_that_is_gone_or_damaged_by_then_fails_no_run(tmp_path: Path) -> None:
    assert after_output(tmp_path / "gone") == []
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "qz.json").write_text("damaged")
    assert after_output(tmp_path) == []
