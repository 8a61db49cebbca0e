"""What a command imports before it works: as little as it needs, so that its answer is there at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from converted import quantized
from qz.cli.app import COMMANDS, app
from qz.cli.entry import HELP, WIDTH

LIBRARIES = {"torch", "transformers", "diffusers", "bitsandbytes", "accelerate", "safetensors", "numba", "gguf"}
HUB = {"huggingface_hub", "httpx2", "httpx", "hf_xet"}
HEAVY = LIBRARIES | HUB | {"numpy", "rich", "yaml", "pydantic"}
OF_OTHERS = {
    "qz.quantize.calibration",
    "qz.quantize.consumers",
    "qz.quantize.planning",
    "qz.quantize.streaming",
    "qz.quantize.compute",
    "qz.formats.hub",
    "qz.formats.publish",
    "qz.formats.pickles",
}
"""Rooms that a look into a folder does not enter."""
MAIN = """
import os, sys
end = os._exit
def told(code):
    sys.stderr.write("\\n" + " ".join(sys.modules))
    sys.stderr.flush()
    end(code)
os._exit = told
from qz.cli.entry import main
main()
"""


def imported(*arguments: str, **environment: str) -> set[str]:
    """The modules that are there when a command ends."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments],
        env={**os.environ, "COLUMNS": str(WIDTH), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if arguments else 2), done.stderr
    assert done.stdout
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_the_help_of_qz_needs_nothing_but_its_text(arguments: tuple[str, ...]) -> None:
    found = imported(*arguments)
    assert found & (HEAVY | {"typer", "inspect", "dataclasses", "json", "logging"}) == set()
    assert {name for name in found if name.startswith("qz")} == {"qz", "qz.cli", "qz.cli.entry", "qz.cli.streams"}


def test_that_text_is_what_typer_shows_on_every_wider_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    group = typer.main.get_command(app())
    group.rich_markup_mode = None  # type: ignore[attr-defined]
    for columns in (WIDTH, WIDTH + 1, 132, 400):
        monkeypatch.setenv("COLUMNS", str(columns))
        with group.make_context("qz", ["inspect"]) as context:
            assert group.get_help(context) + "\n" == HELP.read_text(), "Run `make docs` and commit cli/help.txt."


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_help_that_cannot_be_written_is_an_io_error_in_words() -> None:
    command = [sys.executable, "-m", "qz", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 74
    assert done.stderr.startswith("Error: The help cannot be written: No space left on device.")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("columns", ["60", "79"])
def test_a_narrower_terminal_gets_narrower_help(columns: str) -> None:
    command = [sys.executable, "-m", "qz", "--help"]
    environment = {**os.environ, "COLUMNS": columns}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert max(map(len, done.stdout.splitlines())) <= int(columns) - 2
    assert done.stdout.split() == HELP.read_text().split()


@pytest.fixture(scope="module")
def output(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output") / "nf4"
    quantized(tiny_llama, folder, "nf4")
    return folder


@pytest.mark.parametrize("which", ["the source", "its output", "one file", "the source, as JSON"])
def test_a_look_into_a_folder_imports_no_library_and_no_room_of_other_commands(
    which: str, tiny_llama: Path, output: Path
) -> None:
    looks: dict[str, list[str | Path]] = {
        "the source": [tiny_llama],
        "its output": [output],
        "one file": [tiny_llama / "model.safetensors"],
        "the source, as JSON": [tiny_llama, "--json", "--tensors"],
    }
    found = imported("inspect", *map(str, looks[which]))
    assert found & (HEAVY | OF_OTHERS) == set()


def test_a_source_that_does_not_exist_is_told_before_any_library_is_imported(tmp_path: Path) -> None:
    asked = [
        ["quantize", "nowhere"],
        ["inspect", "nowhere"],
        ["dequantize", "nowhere"],
        ["push", "nowhere", "me/model", "--dry-run"],
        ["merge", "nowhere"],
        ["verify", "nowhere"],
        ["attest", "nowhere"],
        ["calibrate", "nowhere", "-o", "statistics"],
        ["compare", "nowhere", "nowhere"],
        ["compare", "here", "nowhere"],
    ]
    assert {command for command, *_ in asked} == set(COMMANDS)
    (tmp_path / "here").mkdir()
    script = f"import sys\nfrom qz.cli.app import run\nprint([run(each) for each in {asked}], *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_of_nobody"},
        capture_output=True,
        text=True,
        check=True,
    )
    codes, _, modules = done.stdout.partition("]")
    assert set(codes.strip("[").split(", ")) == {"66"}, done.stderr
    assert set(modules.split()) & LIBRARIES == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--part", "1/2", "--threads", "1", "--max-shard-size", "1MB", "--dtype", "bf16"],
        ["--method", "nf4", "--scales", "absmax", "--skip", "lm_head", "--compute-dtype", "fp16"],
        ["--nf4", "-o", "there", "--no-fsync", "--dry-run", "--max-loss", "0.5"],
    ],
)
def test_values_that_are_right_as_they_stand_are_not_given_to_pydantic(arguments: list[str], tmp_path: Path) -> None:
    """Such as these of every kind; the missing source ends the command before it begins."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "quantize", str(tmp_path / "missing"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 66
    assert "pydantic" not in done.stderr.splitlines()[-1].split()


def test_garbage_is_collected_again_once_a_command_runs(tiny_llama: Path) -> None:
    """It is off while modules are imported, which are not garbage, and which no later collection looks through."""
    told = MAIN.replace('" ".join(sys.modules)', 'f"{gc.isenabled()} {gc.get_freeze_count() > 10_000}"')
    done = subprocess.run(
        [sys.executable, "-c", f"import gc{told}", "inspect", str(tiny_llama)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "True True"
