"""What messages tell the user to run: commands that exist, with options that they have, and extras to install."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer.main
from huggingface_hub.cli.hf import app as hf

import qz.cli
import qz.formats
import qz.quantize
from qz.cli.app import app

ROOMS = [Path(next(iter(room.__path__))) for room in (qz, qz.cli, qz.formats, qz.quantize)]
QZ: dict[str, Any] = typer.main.get_command(app()).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Every string in the code of the package but documentation, with PLACE where a value is put in."""
    return [text for room in ROOMS for path in room.rglob("*.py") for text in strings(ast.parse(path.read_bytes()))]


def strings(tree: ast.Module) -> Iterator[str]:
    parts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in node.values}
            yield "".join(str(each.value) if isinstance(each, ast.Constant) else "PLACE" for each in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def test_every_command_that_a_message_names_is_one(texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    commands = {line for text in texts for line in re.findall(r"`((?:qz|hf) [^`]+)`", text)}
    assert {"qz dequantize PLACE", "qz calibrate --scores", "hf auth login"} <= commands
    for program, *words in map(shlex.split, sorted(commands)):
        options = {word for word in words if word.startswith("-")}
        if program == "hf":
            with pytest.raises(SystemExit) as ended:
                hf([*itertools.takewhile(str.islower, words), "--help"])
            assert ended.value.code == 0, words
            offered = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        else:
            offered = {name for each in QZ[words[0]].params for name in (*each.opts, *each.secondary_opts)}
        assert options <= offered, words


def test_every_extra_that_a_message_names_is_one(texts: list[str]) -> None:
    extras = {extra for text in texts for extra in re.findall(r"pip install 'qz-cli\[(\w+)\]'", text)}
    assert {"sign"} <= extras <= set(metadata.metadata("qz-cli").get_all("Provides-Extra") or [])
