"""Scripts beside the package understand how pages and targets call them: without arguments, or with those required."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"benchmarks": "benchmarks.", "tests": "", "tests/hub_server": "hub_server.", "tests/whole_zoo": "whole_zoo."}
REQUIRED = {
    "benchmarks.gpu": ["compare", "folder", "output"],
    "hub_server.__main__": ["folder"],
}


def scripts() -> list[str]:
    """Modules that read arguments when they are run."""
    reads = re.compile(r"^ +\w+ = argparse\.ArgumentParser\(", re.MULTILINE)
    return [
        f"{package}{file.stem}"
        for folder, package in FOLDERS.items()
        for file in sorted((ROOT / folder).glob("*.py"))
        if reads.search(file.read_text())
    ]


class Parsed(Exception):
    """Raised in place of the work."""


@pytest.mark.parametrize("name", scripts())
def test_a_script_understands_how_it_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        assert parser.format_help().startswith("usage: ")
        raise Parsed(vars(parse(parser, *arguments)))

    script = importlib.import_module(name)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [name, *REQUIRED.get(name, [])])
    with pytest.raises(Parsed):
        script.main()


def test_there_are_scripts() -> None:
    assert {"benchmarks.inspect", "benchmarks.quality", "fuzz_headers", "whole_zoo.__main__"} <= set(scripts())
