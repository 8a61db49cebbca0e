"""What messages tell the user to run: commands that exist, with options that they have, and extras to install."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer.main
from huggingface_hub.cli.hf import app as hf

import qz.cli
import qz.formats
import qz.quantize
from qz import MalformedInput
from qz.cli.app import app
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder

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

    @cache
    def offered_by_hf(*words: str) -> set[str]:
        with pytest.raises(SystemExit) as ended:
            hf([*words, "--help"])
        assert ended.value.code == 0, words
        return set(re.findall(r"--[\w-]+", capsys.readouterr().out))

    for program, *words in map(shlex.split, sorted(commands)):
        options = {word for word in words if word.startswith("-")}
        if program == "hf":
            offered = offered_by_hf(*itertools.takewhile(str.islower, words))
        else:
            offered = {name for each in QZ[words[0]].params for name in (*each.opts, *each.secondary_opts)}
        assert options <= offered, words


def test_every_extra_that_a_message_names_is_one(texts: list[str]) -> None:
    extras = {extra for text in texts for extra in re.findall(r"pip install 'qz-cli\[(\w+)\]'", text)}
    assert {"sign"} <= extras <= set(metadata.metadata("qz-cli").get_all("Provides-Extra") or [])


def test_every_package_that_a_message_says_to_install_is_one(texts: list[str]) -> None:
    """Installed here, all but one that serves models on a GPU and is named for those who have that."""
    packages = {name for text in texts for name in re.findall(r"pip install (?:-U )?'?([a-z][\w-]*)", text)}
    assert {"hf_xet", "qz-cli", "vllm-bnb-plugin"} <= packages
    assert all(metadata.distribution(name).version for name in packages - {"vllm-bnb-plugin"})


@pytest.mark.skipif(shutil.which("git-lfs") is None, reason="needs git-lfs")
def test_git_lfs_pull_brings_what_a_clone_holds_pointers_to(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"NAME": "a", "EMAIL": "a@b"}.items():
        monkeypatch.setenv(f"GIT_AUTHOR_{key}", value)
        monkeypatch.setenv(f"GIT_COMMITTER_{key}", value)
    monkeypatch.setenv("HOME", str(tmp_path))

    def git(*words: str | Path, cwd: Path = tmp_path) -> None:
        subprocess.run(["git", *words], cwd=cwd, check=True, capture_output=True)

    git("lfs", "install", "--skip-repo")
    source = tmp_path / "source"
    git("init", "-q", "--bare", "remote")
    git("init", "-q", source)
    shutil.copytree(tiny_llama, source, dirs_exist_ok=True)
    git("lfs", "track", "*.safetensors", "config.json", cwd=source)
    git("add", "-A", cwd=source)
    git("commit", "-qm", "a model", cwd=source)
    git("remote", "add", "origin", tmp_path / "remote", cwd=source)
    git("push", "-q", "origin", "HEAD:refs/heads/main", cwd=source)
    monkeypatch.setenv("GIT_LFS_SKIP_SMUDGE", "1")
    git("clone", "-q", "-b", "main", tmp_path / "remote", "clone")
    with pytest.raises(MalformedInput, match="Run `git lfs pull`"):
        open_checkpoint(LocalFolder(tmp_path / "clone"))
    git("lfs", "pull", cwd=tmp_path / "clone")
    assert open_checkpoint(LocalFolder(tmp_path / "clone")).tensors
