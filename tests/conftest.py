"""Shared fixtures: running the command, and two-layer models built on the spot."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import isolated_environment
import portable_cpu
from forked import Runner, Server
from pace import HANG
from preloaded import Preloaded
from qz.quantize.libraries.importing import gpu_driver, work_bounds
from rewritten import compile_once

if TYPE_CHECKING:
    from zoo import Saved

isolated_environment.enter()
if not gpu_driver.may_have_a_gpu():
    work_bounds.set_hard()  # models are planned in this process: another one for each test would take seconds
if os.environ.get("QZ_TEST_CPU") == "portable":
    portable_cpu.pretend()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

Qz = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure(config: pytest.Config) -> None:
    """The process that starts xdist's workers makes what they share: the libraries, a cache, a server that forks, and
    compiled code."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        cache = tempfile.TemporaryDirectory(prefix="qz-cache-")
        config.add_cleanup(cache.cleanup)
        python: Sequence[str] = (sys.executable,)
        if sys.platform == "linux" and not gpu_driver.may_have_a_gpu():  # which a fork could not use
            preloaded = Preloaded()
            config.add_cleanup(preloaded.end)
            python = preloaded.python_with_qz
            os.environ["QZ_TEST_PYTHON"] = shlex.join(preloaded.python)
            os.environ["QZ_TEST_PYTHON_WITH_TORCH"] = shlex.join(preloaded.python_with_torch)
            config.option.tx = [f"popen//python={shlex.join(python)}"] * len(config.option.tx)
        server = Server(python, QZ_CACHE=cache.name)
        config.add_cleanup(server.end)
        os.environ |= {"QZ_TEST_CACHE": cache.name, "QZ_TEST_FORKS": server.address}
        compile_once(config)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported with the tests is no garbage, and is not looked through again; what tests leave is collected
    seldom. A quarter of the time of tests that build models went into collections."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000)
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_memory_of_other_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the libraries said is remembered as it is for users, but only from test to test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QZ_CACHE", os.environ.get("QZ_TEST_CACHE") or str(tmp_path_factory.mktemp("cache")))
        yield


def started_by(python: Sequence[str], folder: Path) -> Qz:
    """``qz ARGUMENTS`` as a process of this Python."""

    def run(*arguments: str | Path, cwd: Path = folder, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*python, "-m", "qz", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
        )

    return run


@pytest.fixture
def qz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Qz:
    """Run ``qz ARGUMENTS`` as a process in ``tmp_path``, with no terminal and without a runner's settings."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return started_by([sys.executable], tmp_path)


@pytest.fixture
def qz_with_torch(python_with_torch: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Qz:
    """As ``qz``, with torch imported before, in two seconds less: for what of the libraries a command imports."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return started_by(python_with_torch, tmp_path)


@pytest.fixture(scope="session")
def python_with_libraries() -> list[str]:
    """The command of a Python for programs that import the libraries whole: with xdist, one that has them already."""
    return shlex.split(os.environ.get("QZ_TEST_PYTHON", shlex.quote(sys.executable)))


@pytest.fixture(scope="session")
def python_with_torch() -> list[str]:
    """As ``python_with_libraries``, with torch alone: for programs of which it matters how they import the others."""
    return shlex.split(os.environ.get("QZ_TEST_PYTHON_WITH_TORCH", shlex.quote(sys.executable)))


@pytest.fixture(scope="session")
def forks() -> Iterator[Runner]:
    """A process that has imported everything, and forks for each run: shared, or made for the first test that asks."""
    if "QZ_TEST_FORKS" in os.environ:
        yield Runner(os.environ["QZ_TEST_FORKS"])
        return
    with Server() as server:
        yield server


@pytest.fixture
def forked_qz(tmp_path: Path, forks: Runner) -> Qz:
    """As ``qz``, in milliseconds: for what does not depend on how the command starts or on its environment."""

    def run(*arguments: str | Path, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        ended = forks.run(*arguments, cwd=cwd)
        return subprocess.CompletedProcess(arguments, ended.code, ended.stdout, ended.stderr)

    return run


@pytest.fixture
def qz_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Qz]:
    """As ``forked_qz``, in this process and a tenth of its time: for what is refused and leaves nothing."""
    from qz.cli.app import run

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = run([*map(str, arguments)])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    yield command
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def plain_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama, 64 wide and 192 inside, to be stored in the forms of other tools. Not to be changed by a test."""
    import torch

    from zoo import llama

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain") / "source"
    llama(tied=False, inner=192).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """The models of ``zoo`` by name, each built and saved once. Not to be changed by a test."""
    from zoo import build

    @cache
    def saved(name: str) -> Saved:
        folder = tmp_path_factory.mktemp("source") / name
        built = build(name)
        built.save_pretrained(folder)
        return type(built), built.dtype, folder

    return saved


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer bf16 Llama with an untied head, saved by transformers. Not to be changed by a test."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
