"""The commands as functions: they return what ``--json`` prints, raise what ends a command, and leave no trace."""

from __future__ import annotations

import inspect as introspection
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from commands import contents
from conftest import Qz
from hub_server.client import connected
from qz import MissingInput, OutputRefused, QzError, UsageError, api
from qz.api import Fp4, Int8, Nf4, Progress
from qz.cli.commands import dequantize, inspect, push, quantize
from qz.quantize.provenance.fingerprints import settings_fingerprint
from qz.quantize.provenance.up_to_date import UpToDate
from qz.quantize.reports.summary import Summary
from qz.quantize.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
COMMANDS: dict[str, Callable[..., Any]] = {
    "quantize": quantize.quantize,
    "dequantize": dequantize.dequantize,
    "inspect": inspect.inspect,
    "push": push.push,
}
OF_THE_COMMAND_ONLY = {"as_json", "quiet", "nf4", "fp4", "int8", "double_quant", "compute_dtype", "threshold"}
"""Options that are the method's, or that say how the report is shown."""
OTHERWISE_NAMED = {
    "no_default_skips": "default_skips",
    "component": "component_methods",
    "max_shard_size": "max_shard_bytes",
    "overwrite": "if_exists",
    "report": "measure_loss",
    "tensors": "",
    "pattern": "",
    "page": "",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_an_argument_of_its_function(name: str) -> None:
    options = {OTHERWISE_NAMED.get(each, each) for each in introspection.signature(COMMANDS[name]).parameters}
    arguments = introspection.signature(getattr(api, name)).parameters
    assert options - OF_THE_COMMAND_ONLY - {""} <= arguments.keys()
    positional = [each for each in arguments.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert [each.name for each in positional] == list(arguments)[: len(positional)]
    assert len(positional) <= 2


@pytest.mark.parametrize(
    "method", [Nf4(), Nf4(double_quant=True), Fp4(), Int8()], ids=lambda it: f"{it.name}{it.double_quant}"
)
def test_a_function_returns_what_its_command_prints(
    tiny_llama: Path, tmp_path: Path, forked_qz: Qz, method: Any
) -> None:
    summary = api.quantize(tiny_llama, tmp_path / "api", method=method)
    flags = [f"--{method.name}", *(["--double-quant"] if method.double_quant else [])]
    printed = json.loads(forked_qz("quantize", tiny_llama, *flags, "-o", "cli", "--json").stdout)
    returned = json.loads(json.dumps(summary.as_json()))
    for report in (printed, returned):
        del report["seconds"], report["output"]
    assert returned == printed
    assert contents(tmp_path / "api") == contents(tmp_path / "cli")


def test_there_and_back_with_progress(tiny_llama: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    summary = api.quantize(tiny_llama, tmp_path / "q", measure_loss=True, on_progress=seen.append)
    assert isinstance(summary, Summary)
    assert {step.doing for step in seen} == {"Reading headers", "Planning", "Quantizing"}
    assert (seen[-1].done, seen[-1].bytes) == (seen[-1].total, seen[-1].all_bytes)
    found = api.inspect(tmp_path / "q", verify=True)
    assert found.verified is not None
    assert found.verified.intact
    back = api.dequantize(tmp_path / "q", tmp_path / "back", against=tiny_llama)
    assert isinstance(back, Summary)
    assert back.loss == summary.loss


def test_what_is_up_to_date_is_not_made_again(tiny_llama: Path, tmp_path: Path) -> None:
    api.quantize(tiny_llama, tmp_path / "q")
    again = api.quantize(tiny_llama, tmp_path / "q", if_exists="skip")
    assert isinstance(again, UpToDate)
    assert again.as_json()["up_to_date"] is True
    with pytest.raises(OutputRefused):
        api.quantize(tiny_llama, tmp_path / "q", dry_run=True)


def test_what_was_made_of_another_variant_is_not_up_to_date(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    shutil.copy(source / "model.safetensors", source / "model.fp16.safetensors")
    api.quantize(source, tmp_path / "q")
    with pytest.raises(OutputRefused, match="variant"):
        api.quantize(source, tmp_path / "q", variant="fp16", if_exists="skip")
    api.quantize(source, tmp_path / "q", variant="fp16", if_exists="overwrite")
    assert isinstance(api.quantize(source, tmp_path / "q", variant="fp16", if_exists="skip"), UpToDate)
    assert api.verify(tmp_path / "q", against=source).intact
    with pytest.raises(OutputRefused, match="variant"):
        api.quantize(source, tmp_path / "q", if_exists="skip")


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ({}, {"method": Int8()}),
        ({}, {"dtype": "float16"}),
        ({}, {"skips": ("a",)}),
        ({}, {"default_skips": False}),
        ({}, {"max_shard_bytes": 10**6}),
        ({}, {"keep_nonfinite": True}),
        ({}, {"weights_only": True}),
        ({}, {"components": ("unet",)}),
        ({}, {"component_methods": {"unet": None}}),
        ({}, {"scales": "search"}),
        ({}, {"target_size": 10**6}),
        ({}, {"max_loss": 0.1}),
        ({}, {"experts": True}),
        ({}, {"variant": "fp16"}),
        ({}, {"layout": "single-file"}),
        ({}, {"file": "model.safetensors"}),
        ({}, {"config": "folder"}),
        ({"scales": "search"}, {"importance": ROOT / "README.md"}),
        ({"scales": "search", "importance": ROOT / "README.md"}, {"importance": ROOT / "LICENSE"}),
        ({"scales": "search", "importance": ROOT / "README.md"}, {"rounding": "gptq"}),
        ({"target_size": 10**6}, {"split_groups": True}),
        ({"target_size": 10**6}, {"scores": ROOT / "README.md"}),
    ],
    ids=lambda each: "+".join(each),
)
def test_a_setting_that_decides_bytes_makes_another_output(given: dict[str, Any], other: dict[str, Any]) -> None:
    before = Settings(Nf4(), **given)
    assert settings_fingerprint(before) != settings_fingerprint(replace(before, **other))


def test_errors_are_raised(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInput):
        api.quantize(tmp_path / "nothing")
    with pytest.raises(UsageError):
        api.quantize(tiny_llama, tmp_path / "q", components=["transformer"])
    with pytest.raises(QzError) as caught:
        api.dequantize(tiny_llama, tmp_path / "q")
    assert caught.value.exit_code == 78
    assert not (tmp_path / "q").exists()


def test_the_libraries_settings_are_left_as_they_were(tiny_llama: Path, tmp_path: Path) -> None:
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    before = (of_transformers.get_verbosity(), of_diffusers.get_verbosity(), logging.getLogger("bitsandbytes").level)
    try:
        api.quantize(tiny_llama, tmp_path / "q", skip=["mlp.down_proj"])
        assert not of_transformers.is_progress_bar_enabled()
    finally:
        of_transformers.enable_progress_bar()
    assert before == (
        of_transformers.get_verbosity(),
        of_diffusers.get_verbosity(),
        logging.getLogger("bitsandbytes").level,
    )


def test_the_hub_clients_settings_are_left_as_they_were(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its logging, its bars group by group, and the session that all of the process shares; also after an error."""
    from huggingface_hub import constants, get_session

    bars_of, of_the_client = import_module("huggingface_hub.utils.tqdm"), logging.getLogger("huggingface_hub")

    def settings() -> tuple[object, ...]:
        hooks = {kind: list(found) for kind, found in get_session().event_hooks.items()}
        return of_the_client.level, dict(bars_of.progress_bar_states), get_session().timeout, hooks

    meanwhile = []

    def on_progress(step: Progress) -> None:
        if step.doing != "Reading headers":
            meanwhile.append(of_the_client.level)

    with connected(monkeypatch, tmp_path / "home") as hub:
        for module in (constants, bars_of):
            monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", None)
        monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
        monkeypatch.setattr(bars_of, "progress_bar_states", {})
        hub.add("some/model", {path.name: path for path in tiny_llama.iterdir()})
        bars_of.enable_progress_bars()
        bars_of.disable_progress_bars("peft.adapters")
        of_the_client.setLevel(logging.INFO)
        before = settings()
        capfd.readouterr()
        api.quantize("some/model", tmp_path / "out", download=True, on_progress=on_progress)
        assert settings() == before
        assert set(meanwhile) == {logging.ERROR}
        with pytest.raises(QzError):
            api.inspect("some/other-model")
        api.push(tmp_path / "out", "pushed")
        assert settings() == before
        assert "it/s" not in capfd.readouterr().err
        of_the_client.setLevel(logging.WARNING)


def test_the_example_in_the_docs_runs(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    (tmp_path / "model").symlink_to(tiny_llama)
    monkeypatch.chdir(tmp_path)
    for example in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(example, "python.md", "exec"), {})
    assert (tmp_path / "model-again" / "config.json").exists()
