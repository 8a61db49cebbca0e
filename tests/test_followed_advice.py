"""What an error tells to change is changed as it says, taken from the message; then the command works."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import original_names
import readers
import zoo
from conftest import Qz
from forked import Runner
from mixtures import mixture

UP = "model.layers.0.mlp.up_proj.weight"
MLX = {"group_size": 64, "bits": 4}
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def sources(forks: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sources")
    readers.model_folder("llama-untied", place / "llama")
    zoo.build("llama-tied").save_pretrained(place / "tied")
    original_names.sd3_model().save_pretrained(place / "sd3")
    mixture("qwen3_moe", place / "moe")
    forks.warm("quantize", "llama", "--dry-run", "--quiet", cwd=place)
    return place


@pytest.fixture
def model(sources: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sources / "llama", tmp_path / "model"))


def config(**changes: Any) -> Change:
    """Entries of config.json; None takes one out."""

    def change(folder: Path) -> None:
        known = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in known.items() if v is not None}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def rewrite(folder: Path) -> None:
        made = change(load_file(folder / "model.safetensors"))
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def stored_as(dtype: torch.dtype, *names: str) -> Change:
    return tensors(lambda held: {n: t.to(dtype) if not names or n in names else t for n, t in held.items()})


def index_beside(folder: Path) -> None:
    where = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def follow(message: str, folder: Path, words: list[str], original: Path) -> list[str]:
    """Do what the message says to ``folder``; the words of the next command."""
    if named := re.search(r"[Rr]emove ([`\w ]+?) (?:from it\.|and run this again)", message):
        config(**dict.fromkeys(re.findall(r"`(\w+)`", named[1]) or ["quantization_config"]))(folder)
    elif named := re.search(r'Add the class that .*?(\{.*?\}|"architectures": \[.*?\])', message):
        config(**json.loads("{" + named[1] + "}"))(folder)
    elif "Leave the one that the weights belong to" in message:
        config(architectures=["LlamaForCausalLM"])(folder)
    elif named := re.search(r"All names in the files begin with '(.*?)'.* take that off the names", message):
        prefix = named[1]
        tensors(lambda held: {name.removeprefix(prefix): part for name, part in held.items()})(folder)
    elif named := re.search(r"no (\S+), which transformers loads, but '(\S+)'. Rename it", message):
        (folder / named[2]).rename(folder / named[1])
    elif "Convert it to one of them first" in message:
        stored_as(torch.bfloat16)(folder)
    elif "Choose one with --dtype" in message:
        return [*words, "--dtype", re.findall(r"computes with (\w+)", message)[0].lower()]
    elif named := re.search(r"Put the files of its tokenizer there, such as (\S+),", message):
        shutil.copy(original / named[1], folder)
    elif named := re.search(r"`qz (.+?)`", message):
        return shlex.split(named[1])
    elif "Leave it out" in message or "Leave some of them out" in message:
        return words[:-1] if words[-1].startswith("--no-") else words[:-2]
    else:
        raise AssertionError(message)
    return words


@pytest.mark.parametrize(
    ("change", "line", "steps"),
    [
        (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantize model", 1),
        (config(compression_config={"quant_method": "compressed-tensors"}), "quantize model", 1),
        (config(quantization=MLX, quantization_config=MLX), "quantize model", 1),
        (config(quantization_config="nf4"), "quantize model", 1),
        (config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "dequantize model", 2),
        (config(architectures=["LlamaForCausalLM"] * 100), "quantize model", 1),
        (tensors(lambda held: {f"module.{name}": part for name, part in held.items()}), "quantize model", 1),
        (lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors"), "quantize model", 1),
        (stored_as(torch.int16, UP), "quantize model", 1),
        (stored_as(torch.int16, "model.embed_tokens.weight"), "quantize model", 1),
        (lambda folder: (config(dtype="float64")(folder), stored_as(torch.float64)(folder)), "quantize model", 1),
        (without_tokenizer, "calibrate model --tokens 64 --text prose.txt -o s.safetensors", 1),
        (lambda folder: None, "quantize model --skip lm_head --skip model", 1),
        (lambda folder: None, "dequantize model", 1),
    ],
    ids=[
        *("of GPTQ", "of compressed-tensors", "of MLX", "no object", "of bitsandbytes", "many classes"),
        "a wrapper's names",
        *("another name", "whole numbers", "a table of whole numbers", "float64", "no tokenizer", "all skipped"),
        "not quantized",
    ],
)
def test_a_model_that_is_refused_is_taken_once_the_advice_is_followed(
    change: Change, line: str, steps: int, model: Path, sources: Path, forked_qz: Qz, tmp_path: Path
) -> None:
    readers.some_text(tmp_path / "prose.txt")
    change(model)
    words = line.split()
    for _ in range(steps):
        refused = forked_qz(*words)
        assert refused.returncode not in (0, 1), refused.stderr
        words = follow(refused.stderr, model, words, sources / "llama")
    done = forked_qz(*words)
    assert done.returncode == 0, done.stderr


def test_a_model_of_several_possible_classes_is_taken_with_the_class_that_is_told(
    sources: Path, tmp_path: Path, forked_qz: Qz
) -> None:
    """Of a tied model, whose head is not in the file, several classes would have all they need."""
    model = Path(shutil.copytree(sources / "tied", tmp_path / "model"))
    config(architectures=None)(model)
    refused = forked_qz("quantize", "model")
    assert refused.returncode == 78, refused.stderr
    assert forked_qz(*follow(refused.stderr, model, ["quantize", "model"], model)).returncode == 0


def test_a_tied_head_is_quantized_once_it_is_untied(sources: Path, tmp_path: Path, forked_qz: Qz) -> None:
    refused = forked_qz("quantize", sources / "tied", "--no-default-skips", "-o", "out")
    assert "Leave it out, or untie the weights first" in refused.stderr
    assert forked_qz("quantize", sources / "tied", "-o", "left-out").returncode == 0
    model = AutoModelForCausalLM.from_pretrained(sources / "tied")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.save_pretrained(tmp_path / "untied")
    done = forked_qz("quantize", "untied", "--no-default-skips", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert "lm_head.weight.absmax" in load_file(tmp_path / "out" / "model.safetensors")


def test_of_two_layouts_the_other_is_deleted(model: Path, forked_qz: Qz) -> None:
    index_beside(model)
    warned = forked_qz("quantize", "model", "-o", "both")
    (other,) = re.findall(r"has both \S+ and (\S+);.*Delete the other", warned.stderr)
    (model / other).unlink()
    alone = forked_qz("quantize", "model", "-o", "one")
    assert "Delete the other" not in alone.stderr
    assert alone.returncode == 0


@pytest.mark.parametrize("limit", [6, 12, 15])
def test_with_too_few_open_files_the_limit_is_raised(limit: int, model: Path, forks: Runner, tmp_path: Path) -> None:
    """Wherever it is met: before the work, in the writer, and while what was written is read back."""
    low = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))"
    refused = forks.run("quantize", "model", "-o", "out", cwd=tmp_path, before=low)
    assert refused.code == 74, refused.stderr
    assert "Raise the limit (ulimit -n), then run the same command again." in refused.stderr.replace("\n", " ")
    assert forks.run("quantize", "model", "-o", "out", cwd=tmp_path).code == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out")


def other_options(finding: str, options: list[str]) -> list[str]:
    """The options of the next run, as a finding of ``qz inspect --for`` tells them."""
    told = re.findall(r"--(?:layout|skip) [\w-]+|--nf4", finding)
    if named := re.search(r"Skip (.+?) too, or", finding):
        told = [f"--skip {name}" for name in re.split(r", | and ", named[1])]
    kept = [each for each in options if each not in ("--nf4", "--fp4", "--int8") or not {"--nf4"} & set(told)]
    return [*kept, *told]


@pytest.mark.parametrize(
    ("source", "options", "consumer"),
    [
        ("sd3", "--nf4", "comfyui"),
        ("sd3", "--int8", "comfyui"),
        ("llama", "--int8;--skip q_proj", "vllm"),
        ("llama", "--nf4;--skip gate_proj", "sglang"),
        ("moe", "--fp4;--experts", "vllm"),
    ],
)
def test_what_a_program_does_not_load_it_loads_once_it_is_made_as_told(
    source: str, options: str, consumer: str, sources: Path, tmp_path: Path, forked_qz: Qz
) -> None:
    made, errors = options.split(";"), ["not made yet"]
    for number in range(4):
        done = forked_qz("quantize", sources / source, *shlex.split(" ".join(made)), "-o", str(number))
        assert done.returncode == 0, (made, done.stderr)
        (output,) = (tmp_path / f"{number}").glob("*.safetensors") if "--layout single-file" in made else (f"{number}",)
        report = forked_qz("inspect", output, "--for", consumer, "--json").stdout.splitlines()[0]
        (verdict,) = json.loads(report)["consumers"].values()
        errors = [each["message"] for each in verdict["findings"] if each["severity"] == "error"]
        if not errors:
            break
        made = other_options(errors[0], made)
    assert errors == []
    assert number, "there was no advice to follow"


@pytest.mark.parametrize("consumer", ["comfyui", "invokeai"])
def test_no_program_tells_to_make_what_cannot_be_made(consumer: str, sources: Path, forked_qz: Qz) -> None:
    assert forked_qz("quantize", sources / "llama", "-o", "out").returncode == 0
    assert "--layout" not in forked_qz("inspect", "out", "--for", consumer).stdout
