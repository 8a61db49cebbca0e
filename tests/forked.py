"""The real command in processes that start in milliseconds: a server imports everything once, and forks for each run.

A run can be told what to do at its N-th operation on files (the hook of ``qz.formats.output.storage.disk.Disk``), and
killed from outside at any time. The server forks while it has one thread; it has computed before, but with one OpenMP
thread.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import IO, Any, Self

from pace import HANG
from qz.formats.output.storage.disk import KEEP_EVERY

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
INTERRUPT = "interrupt()"
TERMINATE = "os.kill(os.getpid(), signal.SIGTERM)"


def interrupt() -> None:
    """SIGINT, which the main thread handles when it can; another thread waits until the workers are told to stop."""
    os.kill(os.getpid(), signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        from qz.quantize.streaming.workers import Workers

        told = [each.stop for each in gc.get_objects() if type(each) is Workers]
        while not any(stop.wait(0.01) for stop in told):
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
        self.pid = int(json.loads(self._file.readline())["pid"])
        self.begun = time.monotonic()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; a run that has ended may be gone already."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> Ended:
        with self.socket, self._file:
            found = json.loads(self._file.readline())
        return Ended(**{**found, "operations": tuple(found["operations"])})


class Server:
    """A context manager: the process that forks. ``environment`` is added to the caller's."""

    def __init__(self, **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.address = str(Path(self._folder.name) / "socket")
        alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, self.address],
            env={**os.environ, **alone, **environment},
            cwd=self._folder.name,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        assert ready == "ready\n", "the fork server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._folder.cleanup()

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
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        wish = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "at": at,
            "act": act,
            "only": only,
            "before": before,
            "environment": environment or {},
            "terminal": terminal,
            "keep_every": keep_every,
        }
        connection.sendall(json.dumps(wish).encode() + b"\n")
        return Running(connection)

    def warm(self, *arguments: str | Path, cwd: Path) -> None:
        """Run the command in the server itself, once: later runs find imported what it imported."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.address)
            wish = {"warm": [str(argument) for argument in arguments], "cwd": str(cwd)}
            connection.sendall(json.dumps(wish).encode() + b"\n")
            assert connection.makefile("r").readline() == "0\n"

    def run(self, *arguments: str | Path, **how: Any) -> Ended:
        """Start, and wait for the end."""
        return self.start(*arguments, **how).wait()


# The server's side


def serve(address: str) -> None:
    import gc

    from qz.quantize.libraries.importing import work_bounds

    work_bounds.set_hard()  # runs plan in their own processes, with what was imported here
    warm()
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rw") as file:
            wish = json.loads(file.readline())
            if "warm" in wish:
                file.write(f"{in_the_server(wish['warm'], wish['cwd'])}\n")
            elif os.fork() == 0:
                try:
                    listener.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    supervise(wish, file)
                finally:
                    os._exit(0)


def in_the_server(arguments: list[str], folder: str) -> int:
    """Run a command here, in silence; afterwards there is still one thread, and signals do what they did."""
    import io

    from qz.cli.app import run

    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = run(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    end = time.monotonic() + HANG
    while len(os.listdir("/proc/self/task")) > 1:  # one that has done its work takes a moment to be gone
        assert time.monotonic() < end, "a server with threads cannot fork"
        time.sleep(0.01)
    return code


def warm() -> None:
    """Import, load the kernels, and go every way once."""
    import io

    import torch
    import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM

    tqdm.tqdm.monitor_interval = 0  # its thread

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=False, dtype="bfloat16")
        with contextlib.redirect_stderr(io.StringIO()):
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(f"{folder}/source")
        for method in (["--nf4"], ["--nf4", "--double-quant"], ["--fp4"], ["--int8"]):
            command = ["quantize", "source", *method, "-o", "out", "--overwrite", "--threads", "1"]
            assert in_the_server(command, folder) == 0
            assert in_the_server(["dequantize", "out", "-o", "back", "--overwrite", "--threads", "1"], folder) == 0


def supervise(wish: dict[str, Any], file: IO[str]) -> None:
    """Fork a process that does the wish, and tell how it ended."""
    streams = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 - closed with this process
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = perform(wish, *(stream.fileno() for stream in streams))
        except BaseException:
            os.write(streams[1].fileno(), traceback.format_exc().encode())
        finally:
            os._exit(code)
    file.write(json.dumps({"pid": child}) + "\n")
    file.flush()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - begun
    for stream in streams:
        stream.seek(0)
    stdout, stderr, operations = (stream.read().decode(errors="replace") for stream in streams)
    ended = {"code": code, "stdout": stdout, "stderr": stderr, "seconds": seconds}
    file.write(json.dumps({**ended, "operations": operations.splitlines()}) + "\n")
    file.flush()


def perform(wish: dict[str, Any], stdout: int, stderr: int, operations: int) -> int:
    from qz.cli.app import run
    from qz.formats.output.storage.disk import Disk

    os.chdir(wish["cwd"])
    os.environ.update(wish["environment"])
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

    how = {"hook": hook, "keep_every": wish.get("keep_every", KEEP_EVERY)}
    Disk.__init__ = partialmethod(Disk.__init__, **how)  # type: ignore[assignment,method-assign]
    exec(wish["before"], dict(globals()))
    code = run(wish["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(operations, "\n".join(log).encode(errors="surrogateescape"))
    return code


if __name__ == "__main__":
    serve(sys.argv[1])
