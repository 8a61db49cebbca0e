"""The repository is what its set-up says: rooms, pins, CI, version, and what an installed qz needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import qz

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("cli", "quantize", "formats")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[; ]", line)[0].lower().replace("_", "-") for line in requirements}


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_a_link_from_the_package(room: str) -> None:
    assert (ROOT / "qz" / room).is_symlink()
    assert os.readlink(ROOT / "qz" / room) == f"../{room}"
    assert PROJECT["tool"]["setuptools"]["package-dir"][f"qz.{room}"] == room


def test_every_folder_with_code_is_in_the_wheel() -> None:
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    packages = {"qz", *(".".join(("qz", *folder.parts)) for folder in folders)}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages


def test_everything_that_is_installed_is_pinned() -> None:
    project = PROJECT["project"]
    wanted = names(project["dependencies"]) | names(project["optional-dependencies"]["dev"])
    assert wanted <= pins().keys()
    assert re.fullmatch(r"\d+\.\d+\.\d+", pins()["torch"]), "a local version would pin one platform's build"


def test_every_dependency_says_what_it_is_for() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name in (*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]):
        assert re.search(rf'"{re.escape(name)}", +# \w', text), name


def test_ci_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_the_changelog_knows_this_version() -> None:
    assert f"## {qz.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_typer_is_used_by_its_public_names_only() -> None:
    """It bundles its own Click; the other one may not be there."""
    for path in (ROOT / "cli").glob("*.py"):
        assert not re.search(r"\btyper\._|import click|from click", path.read_text()), path


@pytest.mark.parametrize("module", ["qz", "qz.cli.app", "qz.formats.checkpoint.survey", "qz.formats.output.staging"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = ("torch", "transformers", "diffusers", "bitsandbytes", "huggingface_hub", "numba")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
