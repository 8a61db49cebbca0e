"""The real command in processes that start in milliseconds: a server imports everything once, and forks for each run.

A run can be told what to do at its N-th operation on files (the hook of ``qz.formats.output.storage.disk.Disk``), and
killed from outside at any time. The server forks while it has one thread; it has computed before, but with one OpenMP
thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import IO, Any, NoReturn, Self

from pace import HANG
from preloaded import import_qz
from qz.formats.output.storage.disk import KEEP_EVERY

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
INTERRUPT = "interrupt()"
TERMINATE = "os.kill(os.getpid(), signal.SIGTERM)"


def interrupt() -> None:
    """SIGINT, which the main thread handles when it can; another thread waits until the workers are told to stop."""
    os.kill(os.getpid(), signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        work_until_told_to_stop()


def work_until_told_to_stop() -> None:
    """What takes long, in a worker. Returns at once where all have been told already: Ctrl-C may have come before."""
    from qz.quantize.streaming.workers import Workers

    going_on = [each.stop for each in gc.get_objects() if type(each) is Workers and not each.stop.is_set()]
    while going_on and not any(stop.wait(0.01) for stop in going_on):
        pass


def fail(code: int) -> str:
    """The operation fails with this ``errno``."""
    return f"raise OSError({code}, os.strerror({code}), path)"


ENOSPC, EIO, EACCES = fail(errno.ENOSPC), fail(errno.EIO), fail(errno.EACCES)


@dataclass(frozen=True)
class Ended:
    """How a run ended. ``code``: its exit code, or minus the signal that ended it."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    operations: tuple[str, ...]
    """``operation path`` of each, if it was not killed."""

    @property
    def error(self) -> list[str]:
        """The lines of the error, without the progress before it."""
        lines = self.stderr.strip().splitlines()
        first = next((number for number, line in enumerate(lines) if line.startswith("Error: ")), len(lines))
        return lines[first:]


class Running:
    """A run under way in a process of its own."""

    def __init__(self, connection: socket.socket) -> None:
        self._file: IO[str] = connection.makefile("r")
        self.socket = connection
        begun = json.loads(self._file.readline())
        self.pid: int = begun["pid"]
        self._files = [Path(name) for name in begun["files"]]
        self.begun = time.monotonic()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; a run that has ended may be gone already."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> Ended:
        with self.socket, self._file:
            found = json.loads(self._file.readline())
        stdout, stderr, operations = (file.read_bytes().decode(errors="replace") for file in self._files)
        for file in self._files:
            file.unlink()
        return Ended(found["code"], stdout, stderr, found["seconds"], tuple(operations.splitlines()))


def failure_of(address: str) -> Path:
    """What a server leaves that could not start."""
    return Path(f"{address}.failed")


class Runner:
    """Runs commands by the server at ``address``, all of them with ``environment`` added to the server's."""

    def __init__(self, address: str, **environment: str) -> None:
        self.address, self._environment = address, environment

    def within(self, **environment: str) -> Runner:
        """One whose runs have these variables, too. huggingface_hub reads those of its own again."""
        return Runner(self.address, **{**self._environment, **environment})

    def _connected(self) -> socket.socket:
        """To a server that may still be starting."""
        end = time.monotonic() + HANG
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self.address)
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                assert not failure_of(self.address).exists(), failure_of(self.address).read_text()
                assert time.monotonic() < end, "the fork server did not start"
                time.sleep(0.05)
            else:
                return connection

    def start(
        self,
        *arguments: str | Path,
        cwd: Path,
        at: int = -1,
        act: str = KILL,
        only: tuple[str, ...] = (),
        before: str = "",
        environment: dict[str, str] | None = None,
        terminal: str = "",
        keep_every: int = KEEP_EVERY,
    ) -> Running:
        """``qz ARGUMENTS`` in ``cwd``.

        At operation ``at`` (from 0; of the kinds ``only``, if any) the Python source ``act`` is executed, where
        ``operation`` and ``path`` are known; ``before`` is executed before the run.
        With ``terminal``, a path such as ``/dev/pts/7``, the run has that one instead of pipes. ``keep_every``: as
        ``Disk`` has it.
        """
        connection = self._connected()
        wish = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "at": at,
            "act": act,
            "only": only,
            "before": before,
            "environment": {**self._environment, **(environment or {})},
            "terminal": terminal,
            "keep_every": keep_every,
        }
        connection.sendall(json.dumps(wish).encode() + b"\n")
        return Running(connection)

    def warm(self, *arguments: str | Path, cwd: Path) -> None:
        """Run the command in the server itself, once: later runs find imported what it imported."""
        with self._connected() as connection:
            wish = {"warm": [str(argument) for argument in arguments], "cwd": str(cwd)}
            connection.sendall(json.dumps(wish).encode() + b"\n")
            assert connection.makefile("r").readline() == "0\n"

    def run(self, *arguments: str | Path, **how: Any) -> Ended:
        """Start, and wait for the end."""
        return self.start(*arguments, **how).wait()


class Server(Runner):
    """A context manager: the process that forks, started by ``python``. ``environment`` is added to the caller's."""

    def __init__(self, python: Sequence[str] = (sys.executable,), **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        super().__init__(str(Path(self._folder.name) / "socket"))
        alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [*python, __file__, self.address],
            env={**os.environ, **alone, **environment},
            cwd=self._folder.name,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        self.wait_until_ready()
        return self

    def wait_until_ready(self) -> None:
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        assert ready == "ready\n", "the fork server did not start"

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._folder.cleanup()


# The server's side


@dataclass
class Child:
    """A run that the server has forked. What it writes goes to files, so that nobody need read while it runs."""

    asked_by: socket.socket
    files: list[IO[bytes]]
    begun: float

    def tell(self, **what: Any) -> None:
        """Send a line to whoever asked for the run, who may be gone."""
        with contextlib.suppress(BrokenPipeError):
            self.asked_by.sendall(json.dumps(what).encode() + b"\n")

    def close(self) -> None:
        self.asked_by.close()
        for file in self.files:
            file.close()


def serve(address: str) -> None:
    """Fork for each wish, and wait for connections and ended children at once: one fork a run, as each costs 20 ms."""
    from qz.quantize.libraries.importing import work_bounds

    default_signals()
    work_bounds.set_hard()  # runs plan in their own processes, with what was imported here
    warm()
    gc.collect()
    gc.freeze()
    into_large_pages()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    ended, waker = socket.socketpair()
    for end in (ended, waker):
        end.setblocking(False)
    children: dict[int, Child] = {}
    watch_children(waker)
    print("ready", flush=True)
    for run in itertools.count():
        while listener not in select.select([listener, ended], [], [])[0]:
            ended.recv(4096)
            reap(children)
        connection, _ = listener.accept()
        wish = json.loads(connection.makefile("r").readline())
        if "warm" in wish:
            code = in_the_server(wish["warm"], wish["cwd"])
            watch_children(waker)
            with connection:
                connection.sendall(f"{code}\n".encode())
            continue
        names = [f"{address}.{run}.{kind}" for kind in ("stdout", "stderr", "operations")]
        child = Child(connection, [open(name, "wb") for name in names], time.monotonic())  # noqa: SIM115 - see close
        number = os.fork()
        if number == 0:
            become(
                child, wish, [child.asked_by, *(each.asked_by for each in children.values()), listener, ended, waker]
            )
        children[number] = child
        child.tell(pid=number, files=names)


def reap(children: dict[int, Child]) -> None:
    for number in list(children):
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            child = children.pop(number)
            child.tell(code=os.waitstatus_to_exitcode(status), seconds=time.monotonic() - child.begun)
            child.close()


def watch_children(waker: socket.socket) -> None:
    """From now on each child that ends sends a byte to ``waker``."""
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)


def become(child: Child, wish: dict[str, Any], of_the_server: list[socket.socket]) -> NoReturn:
    """In the child: let go of the server's sockets, do the wish, and end."""
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in of_the_server:
            each.close()
        code = perform(wish, *(file.fileno() for file in child.files))
    except BaseException:
        os.write(child.files[1].fileno(), traceback.format_exc().encode())
    finally:
        os._exit(code)


def in_the_server(arguments: list[str], folder: str) -> int:
    """Run a command here, in silence; afterwards there is still one thread, and signals do what they did."""
    import io

    from qz.cli.app import run

    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = run(arguments)
    default_signals()
    end = time.monotonic() + HANG
    while len(os.listdir("/proc/self/task")) > 1:  # one that has done its work takes a moment to be gone
        assert time.monotonic() < end, "a server with threads cannot fork"
        time.sleep(0.01)
    return code


def default_signals() -> None:
    """As a command finds them: see ``cli.entry``."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def warm() -> None:
    """Import, load the kernels, and go every way once."""
    import io

    import numpy as np
    import torch
    import tqdm
    from diffusers import FluxPipeline  # noqa: F401 - what a third of the runs would import, a second each
    from transformers import CLIPTextModel, LlamaConfig, LlamaForCausalLM, T5EncoderModel  # noqa: F401 - the same

    from qz.cli.app import COMMANDS, described
    from qz.quantize.compute import kernels, scale_search

    tqdm.tqdm.monitor_interval = 0  # its thread
    import_qz()

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=False, dtype="bfloat16")
        with contextlib.redirect_stderr(io.StringIO()):
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(f"{folder}/source")
        for method in (["--nf4"], ["--nf4", "--double-quant"], ["--nf4", "--scales", "search"], ["--fp4"], ["--int8"]):
            command = ["quantize", "source", *method, "-o", "out", "--overwrite", "--threads", "1"]
            assert in_the_server(command, folder) == 0
            assert in_the_server(["dequantize", "out", "-o", "back", "--overwrite", "--threads", "1"], folder) == 0
        assert in_the_server(["inspect", "--help"], folder) == 0
    for name in COMMANDS:
        described((name,), shutil.get_terminal_size().columns)

    # What --importance and --rounding gptq load besides, without the statistics that the commands would want.
    values, packed, scales = np.ones(64, np.uint16), np.empty(32, np.uint8), np.empty(1, np.float32)
    weights = scale_search.tiled_weights(np.ones(64, np.float32))
    kernels.search_4bit(values, "BF16", "nf4", weights, 0, packed, scales)
    kernels.encode_4bit(values, "BF16", "nf4", scales, packed)


def into_large_pages() -> None:
    """Put this process's memory into pages of 2 MB, if the kernel can (Linux 6.1): a fork copies a table of all pages,
    and an exit takes it down, which is most of a short run. What a run writes to is copied by 4 KB, as ever."""
    size, advice = 2 << 20, (14, 25)  # MADV_HUGEPAGE, MADV_COLLAPSE
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, kind, _, _, file, *name = line.split()
        begin, end = (int(part, 16) for part in where.split("-"))
        begin, end = -(-begin // size) * size, end // size * size
        if file == "0" and kind.startswith("rw") and name in ([], ["[heap]"]) and begin < end:
            for each in advice:
                madvise(begin, end - begin, each)


def perform(wish: dict[str, Any], stdout: int, stderr: int, operations: int) -> int:
    import huggingface_hub.constants

    from qz.cli.app import run
    from qz.formats.output.storage.disk import Disk

    os.chdir(wish["cwd"])
    os.environ.update(wish["environment"])
    if any(name.startswith("HF_") for name in wish["environment"]):
        importlib.reload(huggingface_hub.constants)
    if wish["terminal"]:
        os.setsid()
        stdin = stdout = stderr = os.open(wish["terminal"], os.O_RDWR)  # its controlling terminal from now on
        os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    log: list[str] = []

    def hook(operation: str, path: str) -> None:
        if not wish["only"] or operation in wish["only"]:
            log.append(f"{operation} {path}")
            if len(log) == wish["at"] + 1:
                exec(wish["act"], {**globals(), "operation": operation, "path": path})

    how = {"hook": hook, "keep_every": wish.get("keep_every", KEEP_EVERY), "keep_apart": 0}
    Disk.__init__ = partialmethod(Disk.__init__, **how)  # type: ignore[assignment,method-assign]
    exec(wish["before"], dict(globals()))
    code = run(wish["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(operations, "\n".join(log).encode(errors="surrogateescape"))
    return code


if __name__ == "__main__":
    try:
        serve(sys.argv[1])
    except BaseException:
        failure_of(sys.argv[1]).write_text(f"The fork server failed:\n{traceback.format_exc()}")
        raise
