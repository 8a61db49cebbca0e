"""What a library said is used again for the same question, and for no other."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers.models.llama import modeling_llama

import qz as package
from forked import Runner
from pace import HANG
from qz.cli.app import run
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.compute.cpu.jit import has_place_for_cache
from qz.quantize.libraries import answer_cache
from qz.quantize.libraries.architecture import Architecture, LoadRequest, Saved
from qz.quantize.libraries.diffusers import on_diffusers
from qz.quantize.libraries.examine import examine
from qz.quantize.libraries.transformers import on_transformers
from qz.quantize.methods import FourBit, Int8, Method
from reference import differing_files
from zoo import DIFFUSERS, TRANSFORMERS, build

ANSWERED = """
import sys
from qz.cli.app import run
from qz.quantize.libraries.process import asking
asked, really = [], asking.ask
asking.ask = lambda *question: asked.append(question) or really(*question)
assert run(sys.argv[1:]) == 0
assert "torch" not in sys.modules
print("asked" if asked else "remembered")
"""
DOUBLE = FourBit("fp4", double_quant=True)
GRID = [
    *((name, DOUBLE) for name in (*TRANSFORMERS, *DIFFUSERS)),
    *(("llama-untied", method) for method in (None, FourBit("nf4"), Int8())),
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QZ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "architectures"


@pytest.fixture
def source(tmp_path: Path, tiny_llama: Path) -> Path:
    shutil.copytree(tiny_llama, tmp_path / "source")
    return tmp_path / "source"


Answered = Callable[..., str]


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Answered:
    """Whether a dry run in this process asked the library, or remembered what it said."""
    asked: list[str] = []

    def watched(library: ModuleType) -> Callable[..., Architecture]:
        really = library.examine

        def examine(*arguments: Any) -> Architecture:
            asked.append(library.__name__)
            told: Architecture = really(*arguments)
            return told

        return examine

    for library in (on_transformers, on_diffusers):
        monkeypatch.setattr(library, "examine", watched(library))

    def answered(source: Path, *options: str) -> str:
        asked.clear()
        assert run(["quantize", str(source), "--dry-run", "--quiet", *options]) == 0
        return "asked" if asked else "remembered"

    return answered


def answered_alone(source: Path, output: Path) -> str:
    """The same of a process of its own that writes, and does not import torch: another one would ask the library."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWERED, "quantize", str(source), "-o", str(output), "--quiet"],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(("name", "method"), GRID, ids=str)
def test_what_is_recalled_is_what_was_said(name: str, method: Method | None, cache: Path, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "source")
    checkpoint = open_checkpoint(LocalFolder(tmp_path / "source"))
    said = examine(checkpoint, LoadRequest(method))
    if not cache.exists():  # it holds functions of the library, which cannot be kept
        assert any(saved.weight.conversion for saved in said.saved)
        return
    [kept] = cache.iterdir()
    recalled = answer_cache.recall(kept.name)
    assert recalled == said
    assert recalled is not None
    assert _sharing(recalled.saved) == _sharing(said.saved)


def _sharing(saved: tuple[Saved, ...]) -> list[int]:
    first: dict[int, int] = {}
    return [first.setdefault(id(each.weight), number) for number, each in enumerate(saved)]


def test_a_second_run_imports_no_library_and_writes_the_same_folder(source: Path, tmp_path: Path, cache: Path) -> None:
    """The first is one of this process; what a command keeps that asks another one is in ``test_planning_process``."""
    assert run(["quantize", str(source), "-o", str(tmp_path / "first"), "--quiet"]) == 0
    assert len(list(cache.iterdir())) == 1
    assert answered_alone(source, tmp_path / "second") == "remembered"
    assert differing_files(tmp_path / "first", tmp_path / "second") == []


def test_another_wish_config_or_tensor_is_another_question(source: Path, cache: Path, answered: Answered) -> None:
    assert answered(source) == "asked"
    assert answered(source, "--max-shard-size", "1MB", "--threads", "1") == "remembered"
    for options in (["--int8"], ["--fp4"], ["--double-quant"], ["--dtype", "float16"], ["--skip", "q_proj"]):
        assert answered(source, *options) == "asked", options
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert answered(source) == "asked"
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "do_sample": True}))
    assert answered(source) == "asked"
    assert answered(source) == "remembered"
    assert len(list(cache.iterdir())) == 8


RECALLED = """
import json, os, sys
from qz.quantize.libraries import answer_cache
question, *answer = sys.argv[1:]
for each in answer:
    answer_cache.keep(question, json.loads(each))
assert answer_cache.__file__.startswith(os.getcwd())
print("remembered" if answer_cache.recall(question) is not None else "asked")
assert "torch" not in sys.modules
"""


def test_changed_code_is_asked_again(source: Path, cache: Path, tmp_path: Path, answered: Answered) -> None:
    said = examine(open_checkpoint(LocalFolder(source)), LoadRequest(FourBit("nf4")))
    [kept] = cache.iterdir()
    [code] = cache.with_name("code").iterdir()
    assert {on_transformers.__file__, modeling_llama.__file__} <= json.loads(code.read_bytes()).keys()
    root = Path(package.__file__).resolve().parent
    shutil.copytree(root, tmp_path / "qz", ignore=shutil.ignore_patterns("__pycache__"))
    answer = json.dumps(answer_cache.encoded(said))

    def recalled(*answer: str) -> str:
        """What a process with the copied package remembers, once it has kept the ``answer``, if there is one."""
        done = subprocess.run(
            [sys.executable, "-c", RECALLED, kept.name, *answer],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=HANG,
            check=True,
        )
        return done.stdout.strip()

    assert recalled(answer) == "remembered"
    module = tmp_path / "qz" / "quantize" / "libraries" / "answer_cache.py"
    before = module.stat().st_mtime_ns
    os.utime(module, ns=(1, 1))
    assert recalled() == "asked"
    assert recalled(answer) == "remembered"
    os.utime(module, ns=(before, before))
    assert recalled() == "asked"
    assert answered(source) == "asked"  # another installation, whose code may differ
    assert answered(source) == "remembered"
    assert len(list(cache.iterdir())) == 1


def test_answers_that_depend_on_values_are_not_kept(tmp_path: Path, cache: Path, answered: Answered) -> None:
    """Both sides of a tie are stored: whether they are tied depends on their values."""
    from safetensors.torch import load_file, save_file

    build("llama-tied").save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    assert [answered(tmp_path / "source") for _ in range(2)] == ["asked", "asked"]
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "folder"])
def test_a_damaged_answer_is_asked_for_again(damage: str, source: Path, cache: Path, answered: Answered) -> None:
    assert answered(source) == "asked"
    [kept] = cache.iterdir()
    data = kept.read_bytes()
    if damage == "folder":
        kept.unlink()
        kept.mkdir()
    else:
        changed = data.replace(b'"quantized_', b'"quantised_', 1).replace(b"F32", b"F16", 1)
        kept.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "changed": changed}[damage])
    assert answered(source) == "asked"
    assert answered(source) == ("asked" if damage == "folder" else "remembered")


TOLD = """
from qz.quantize.libraries.transformers import on_transformers
def examine(*arguments, really=on_transformers.examine):
    print("asked", file=sys.stderr)
    return really(*arguments)
on_transformers.examine = examine
"""


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_an_answer_whose_state_of_the_code_is_damaged_is_asked_for_again(
    damage: str, source: Path, tmp_path: Path, cache: Path, forks: Runner
) -> None:
    def answered_in_a_fork() -> str:
        own = {"QZ_CACHE": str(cache.parent)}
        done = forks.run("quantize", source, "--dry-run", "--quiet", cwd=tmp_path, before=TOLD, environment=own)
        assert done.code == 0, done.stderr
        return done.stderr.strip() or "remembered"

    assert answered_in_a_fork() == "asked"
    [state] = cache.with_name("code").iterdir()
    data = state.read_bytes()
    state.unlink() if damage == "gone" else state.write_bytes(data[:-20] + b" " * 20 * (damage == "changed"))
    assert [answered_in_a_fork() for _ in range(2)] == ["asked", "remembered"]


@pytest.mark.parametrize("chosen", ["", "/dev/null/nowhere", "/proc/nowhere"])
def test_where_nothing_can_be_kept_the_library_is_asked(
    chosen: str, source: Path, monkeypatch: pytest.MonkeyPatch, answered: Answered
) -> None:
    monkeypatch.setenv("QZ_CACHE", chosen)
    assert [answered(source) for _ in range(2)] == ["asked", "asked"]


def test_the_oldest_answers_make_room(source: Path, cache: Path, answered: Answered) -> None:
    cache.mkdir(parents=True)
    for number in range(answer_cache.MOST_KEPT):
        path = cache / f"{number:064x}"
        path.write_bytes(b"old")
        os.utime(path, ns=(number, number))
    assert answered(source) == "asked"
    names = {path.name for path in cache.iterdir()}
    assert len(names) == answer_cache.MOST_KEPT
    assert f"{0:064x}" not in names
    assert f"{1:064x}" in names
    assert answered(source) == "remembered"


@pytest.mark.parametrize("environment", [{}, {"HOME": "here"}, {"XDG_CACHE_HOME": "caches"}])
def test_without_a_home_nothing_is_kept_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """A container under a bare number: no HOME, and no entry in the list of users."""

    def nobody(_: int) -> None:
        raise KeyError("no such user")

    for name in ("HOME", "QZ_CACHE", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    assert answer_cache._folder() is None
    assert not has_place_for_cache(tmp_path / "read-only")
    assert has_place_for_cache(tmp_path)
    monkeypatch.setenv("QZ_CACHE", "chosen")
    assert answer_cache._folder() == Path("chosen/architectures")
