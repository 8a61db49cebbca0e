"""Closed, full and broken streams, and signals from outside: the work's result and the true exit code."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from commands import contents
from forked import Runner
from pace import HANG
from qz import IOFailed, QzError
from qz.cli import output
from qz.formats.output.storage import disk
from test_cli import SCRIPT, script

__all__ = ["script"]

QZ = f"exec {sys.executable} -m qz"


def shell(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``command`` in bash, offline; what it prints and how it ends."""
    own = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GITHUB_STEP_SUMMARY": "", **environment}
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=own, capture_output=True, text=True, timeout=HANG, check=False
    )


@pytest.fixture(scope="module")
def made(tiny_llama: Path, forks: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model ``m`` and its output ``out`` of an ordinary run."""
    place = tmp_path_factory.mktemp("streams")
    (place / "m").symlink_to(tiny_llama)
    assert forks.run("quantize", "m", "-o", "out", cwd=place).code == 0
    return place


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">/dev/full"])
def test_a_run_without_streams_makes_the_same_output(made: Path, tmp_path: Path, closed: str) -> None:
    """Nothing that a library prints gets into a file, although its descriptor would have had the stream's number."""
    (tmp_path / "m").symlink_to(made / "m")
    result = shell(f"{QZ} quantize m -o out {closed}", tmp_path)
    assert contents(tmp_path / "out") == contents(made / "out")
    assert result.returncode == (74 if "full" in closed else 0)
    if "full" in closed:
        assert "out is complete. There is nothing to run again." in result.stderr
        assert "Free some space" not in result.stderr
        assert "No space left on device: the report could not be written to stdout." in result.stderr


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("inspect m >&-", 0),
        ("--help >&-", 0),
        ("inspect out --verify 2>&-", 0),
        ("inspect nosuch/a/b --json >&-", 66),
        ("inspect nosuch/a/b >&- 2>&-", 66),
        ("inspect nosuch/a/b 2>/dev/full", 66),
        pytest.param("inspect nosuch 2>&-", 66, marks=pytest.mark.soak),  # asks the Hub's cache, whose library is slow
    ],
)
def test_a_closed_stream_does_not_change_how_a_command_ends(made: Path, command: str, code: int) -> None:
    result = shell(f"{QZ} {command}", made)
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    if ">&-" in command.split("2>")[0] and code == 66 and "2>" not in command:
        assert result.stderr.startswith("Error: ")


def test_the_error_of_a_run_without_stderr_is_in_its_json(made: Path) -> None:
    result = shell(f"{QZ} inspect nosuch/a/b --json 2>&-", made)
    assert json.loads(result.stdout)["code"] == result.returncode == 66


def test_talk_that_cannot_be_written_does_not_end_the_work(script: Path, tmp_path: Path) -> None:
    script.write_text(SCRIPT.replace('"write"', '"talk"').replace("print(", "qz.cli.output.say("))
    result = shell(f"{sys.executable} act.py act talk 2> >(head -n 1 > first); exit $?", tmp_path)
    assert result.returncode == 0


@pytest.mark.parametrize("kind", ["fifo", "folder", "/dev/full"])
def test_a_summary_that_is_no_file_neither_hangs_nor_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    page = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(page)
    elif kind == "folder":
        page.mkdir()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    output.write_step_summary("| a |")
    assert capsys.readouterr().err.startswith(f"Warning: the summary was not written to {page}: ")


def test_a_fifo_that_is_read_is_no_summary_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its reader may stop at any time, and the run would wait for it."""
    page = tmp_path / "fifo"
    os.mkfifo(page)
    reader = os.open(page, os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    output.write_step_summary("| a |")
    assert os.read(reader, 10) == b""
    os.close(reader)
    assert "not a regular file" in capsys.readouterr().err


def test_an_alarm_from_outside_ends_the_process_by_its_signal(script: Path) -> None:
    command = [sys.executable, str(script), "act", "sleep"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGALRM)
    process.communicate(timeout=HANG)
    assert process.returncode == -signal.SIGALRM


RESERVE = """
import os, pathlib, sys
from qz.formats.output.storage import disk
path = pathlib.Path(sys.argv[1])
descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
disk.Disk().reserve(descriptor, path, 1 << 20)
"""
INTERRUPTED = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
static int calls;
int fallocate64(int descriptor, int mode, long offset, long length) {
    if (calls++ < 3) { errno = EINTR; return -1; }
    return ((int (*)(int, int, long, long))dlsym(RTLD_NEXT, "fallocate64"))(descriptor, mode, offset, length);
}
"""
IN_PYTHON = """
import ctypes, errno
from qz.formats.output.storage import disk
real, calls = disk._fallocate, []
def interrupted(*arguments):
    calls.append(arguments)
    if len(calls) > 3:
        return real(*arguments)
    ctypes.set_errno(errno.EINTR)
    return -1
disk._fallocate = real and interrupted
"""


def test_a_signal_while_space_is_reserved_changes_nothing(tmp_path: Path) -> None:
    """The C library's function is put in front of by one that is interrupted three times, or qz's name for it is."""
    preload, first = {}, IN_PYTHON
    if sys.platform == "linux" and shutil.which("gcc"):
        (tmp_path / "eintr.c").write_text(INTERRUPTED)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", "eintr.so", "eintr.c", "-ldl"], cwd=tmp_path, check=True)
        preload, first = {"LD_PRELOAD": str(tmp_path / "eintr.so")}, ""
    environment = {**os.environ, **preload}
    subprocess.run([sys.executable, "-c", first + RESERVE, tmp_path / "file"], env=environment, check=True)
    assert (tmp_path / "file").stat().st_size == 1 << 20


def refused(folder: Path) -> QzError:
    """What is raised when files are made until there is no room for one."""
    number = 0
    while True:
        try:
            with disk.Disk().operation("open", folder):
                os.mknod(folder / str(number))
        except QzError as error:
            return error
        number += 1


def test_a_file_system_without_inodes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system says it where a file system can be mounted, else with its figures changed."""
    folder = tmp_path / "few"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=4", "few", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            found = refused(folder)
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    else:
        figures = list(os.statvfs(folder))
        figures[5:8] = 4, 0, 0
        monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(figures))
        found = disk.failure(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "open", folder / "x")
    assert isinstance(found, IOFailed)
    assert "needs an inode, and the file system has none left" in str(found)
    assert "bytes" not in str(found)
