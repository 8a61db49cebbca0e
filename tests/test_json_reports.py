"""What every command prints with ``--json`` is what its JSON Schema says, which is made of the same types."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import pipelines
import readers
from conftest import Qz
from forked import Runner
from hub_server import connected
from json_contract import checked
from qz.cli.commands.push import push
from qz.json_reports import OF_COMMANDS


@pytest.fixture(scope="module")
def place(forks: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, a text, and a pipeline."""
    place = tmp_path_factory.mktemp("place")
    readers.model_folder("llama-untied", place / "llama")
    readers.some_text(place / "prose.txt")
    pipelines.flux(place / "flux")
    forks.warm("quantize", "flux", "--dry-run", "--quiet", cwd=place)
    return place


RUNS = (
    "quantize llama --dry-run --target-size 170kB",
    "quantize llama --report",
    "quantize llama --if-exists skip",
    "quantize flux --dry-run --component text_encoder_2=int8",
    "dequantize llama-nf4 --against llama",
    "quantize llama --part 1/2 -o whole",
    "quantize llama --part 2/2 -o whole",
    "merge whole",
    "merge whole",
    "verify llama-nf4",
    "verify llama-nf4 --against llama",
    "attest llama-nf4",
    "calibrate llama -o statistics.safetensors --tokens 64 --text prose.txt --hessians --scores",
    "quantize llama --importance statistics.safetensors --rounding gptq --max-loss 1 -o better",
    "compare llama llama-nf4 --text prose.txt --tokens 64",
    "inspect llama --tensors",
    "inspect llama-nf4 --verify --for vllm",
    "inspect flux --plan",
)


def test_every_command_keeps_the_contract(place: Path, forked_qz: Qz) -> None:
    for line in RUNS:
        command, *arguments = line.split()
        done = forked_qz(command, *arguments, "--json", cwd=place)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        checked(command, done.stdout)
    failed = forked_qz("verify", "nowhere", "--json", cwd=place)
    assert checked("error", failed.stdout.splitlines()[-1])["code"] == failed.returncode == 66


def test_a_push_keeps_the_contract(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with connected(monkeypatch, tmp_path / "home"):
        push(place / "llama", "me/new", as_json=True)
    assert checked("push", capsys.readouterr().out)["repository"] == "me/new"


@pytest.mark.parametrize("change", [{"new": 1}, {"subjects": "1"}, {"subjects": None}])
def test_what_breaks_the_contract_is_found(change: dict[str, Any]) -> None:
    told: dict[str, Any] = {"output": "x", "statement": "y", "signature": None, "subjects": 1, "materials": 1}
    checked("attest", json.dumps(told | {"left_out": []}))
    with pytest.raises(ValidationError):
        checked("attest", json.dumps(told | {"left_out": []} | change))
    with pytest.raises(ValidationError):
        checked("attest", json.dumps(told))


@pytest.mark.parametrize("command", OF_COMMANDS)
def test_every_key_is_explained(command: str) -> None:
    page = (Path(__file__).parent.parent / "docs/reference/json.md").read_text()
    explained = {name.split(".")[0] for name in re.findall(r"`([a-z_0-9.]+)`", page)}
    report = OF_COMMANDS[command]
    keys = {key for each in getattr(report, "__args__", (report,)) for key in each.__annotations__}
    assert keys
    assert keys <= explained
