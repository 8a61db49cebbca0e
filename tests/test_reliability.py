"""What a user finds on disk and on the terminal after a run of the command, however it ended.

Each run is the whole command in a process of its own, see ``forked``. The writer's own tests are in ``test_staging``.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from covering import in_turn
from forked import EACCES, EIO, ENOSPC, INTERRUPT, TERMINATE, Ended, Runner
from hub_server import OWNER, HubServer
from pace import HANG
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.recorded.record import verify_record
from qz.formats.tensors.safetensors_layout import encode_header, layout

CODES = {0, 1, 2, 65, 66, 69, 73, 74, 75, 77, 78, 130, 143}
"""Documented in docs/reference/exit-codes.md; 1 is a bug, which no test here forgives unless it made one."""
QUANTIZE = ("quantize", "source", "-o", "out", "--max-shard-size", "20KB", "--threads", "2")
WAYS: dict[str, tuple[str, ...]] = {
    "nf4": (*QUANTIZE, "--nf4"),
    "nf4-double": (*QUANTIZE, "--nf4", "--double-quant"),
    "int8": (*QUANTIZE, "--int8"),
    "dequantize": ("dequantize", "quantized", "-o", "out", "--max-shard-size", "40KB", "--threads", "2"),
}
STORES = ("write", "fsync", "rename")
CHANGES = (*STORES, "truncate", "unlink", "rmdir", "mkdir", "open", "reserve")
"""Operations after which the disk differs, or may."""
Run = Callable[..., Ended]


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def state(folder: Path) -> dict[str, tuple[int, str]]:
    return {name: ((folder / name).stat().st_mtime_ns, digest) for name, digest in contents(folder).items()}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def server(hub: HubServer, forks: Runner, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    home = tmp_path_factory.mktemp("home")
    settings = {"HF_HUB_OFFLINE": "0", "GITHUB_STEP_SUMMARY": ""}
    return forks.within(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_TOKEN=OWNER, **settings)


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: these tests sync some ten thousand times, and none looks at a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def save_llama(folder: Path, *, layers: int = 2, shard: str = "60KB") -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=320, tie_word_embeddings=False, dtype="bfloat16")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    (folder / "LICENSE").write_text("Do what you like.")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, server: Runner) -> Path:
    """A folder with ``source``, ``small`` (one layer), ``quantized``, and what undisturbed runs make of them."""
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "source")
    (folder / "source/tokenizer.json").write_text(json.dumps({"noise": random.Random(0).randbytes(600_000).hex()}))
    save_llama(folder / "small", layers=1)
    made = server.run("quantize", "source", "-o", "quantized", "--max-shard-size", "20KB", cwd=folder)
    assert made.code == 0, made.stderr
    for way, command in WAYS.items():
        assert server.run(*command, cwd=folder).code == 0
        (folder / "out").rename(folder / way)
    return folder


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, dict[str, str]]:
    """What an undisturbed run writes, by way."""
    return {way: contents(models / way) for way in WAYS}


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Path:
    """A working directory with links to the sources."""
    for name in ("source", "small", "quantized"):
        (tmp_path / name).symlink_to(models / name)
    return tmp_path


@pytest.fixture
def run(server: Runner, place: Path) -> Iterator[Run]:
    """Run a command in ``place``. Always: a documented code, few lines, no token, and the inputs as they were."""
    before = {name: state(place / name) for name in ("source", "small", "quantized")}

    def checked(*arguments: str | Path, bug: bool = False, **how: Any) -> Ended:
        ended = server.run(*arguments, **{"cwd": place, **how})
        check(ended, bug=bug)
        return ended

    yield checked
    assert {name: state(place / name) for name in before} == before


def check(ended: Ended, *, bug: bool = False) -> None:
    told = f"{ended.code}: {ended.stderr}"
    assert ended.code in CODES | {-signal.SIGKILL}, told
    assert bug or ended.code != 1, told
    assert OWNER not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.error) <= 5
    assert (ended.code in (0, -signal.SIGKILL)) == (not ended.error), told


def left_beside(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()} - {"source", "small", "quantized"}


def finish(run: Run, place: Path, command: tuple[str, ...], expected: dict[str, str]) -> Ended | None:
    """Whatever happened before: the output is absent or complete, and the same command completes it."""
    ended = None
    if (place / "out").exists():
        assert contents(place / "out") == expected
        refused = run(*command)
        assert refused.code == 73
        assert "--overwrite" in refused.stderr
    else:
        ended = run(*command)
        assert ended.code == 0, ended.stderr
    assert contents(place / "out") == expected
    assert left_beside(place) == {"out"}
    return ended


def clear(place: Path) -> None:
    for name in left_beside(place):
        shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()


# Kills


class Moments:
    """Random moments of a run, on a machine whose other work makes it sometimes fast and sometimes slow."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.typical = 0.1

    def wait(self) -> None:
        time.sleep(self.typical * self.random.uniform(0.1, 0.9))

    def learn(self, ended: Ended) -> None:
        """From a run that was not disturbed."""
        self.typical = 0.7 * self.typical + 0.3 * ended.seconds


SPREAD = (2, 4, 7)
"""Renames of a run to NF4 with one thread, from 0: before them one, three and all of its six shards are finished."""


def shards_kept(shown: str) -> str | None:
    """How many shards a run says that it need not make."""
    found = re.search(r"Continuing: (\d+) of (\d+) shards are done", shown)
    return found.group(1) if found else None


def kill_at_random(server: Runner, run: Run, place: Path, expected: dict[str, dict[str, str]], kills: int) -> None:
    """Runs killed at random moments, one to three times each, then completed by the same command.

    They keep what is finished inside a shard, too. The first are killed at moments that are known to be far apart, so
    that different numbers of shards are kept on any machine.
    """
    moments = Moments(7)
    landed, resumed, kept = 0, 0, set()
    for at in SPREAD:
        command = (*WAYS["nf4"], "--threads", "1")
        ended = server.run(*command, cwd=place, keep_every=4000, at=at, only=("rename",))
        assert ended.code == -signal.SIGKILL
        done = finish(run, place, command, expected["nf4"])
        kept.add(shards_kept(done.stderr) if done else None)
        clear(place)
    while landed < kills:
        way = moments.random.choice(list(WAYS))
        command, clean = WAYS[way], True
        for _ in range(moments.random.randint(1, 3)):
            if (place / "out").exists():
                break
            running = server.start(*command, cwd=place, keep_every=4000)
            moments.wait()
            running.kill()
            ended = running.wait()
            assert ended.code in (0, -signal.SIGKILL)
            landed += ended.code != 0
            clean = clean and ended.code == 0
            assert not (place / "out").exists() or contents(place / "out") == expected[way]
        if clean:
            moments.learn(ended)
            clear(place)
            continue
        done = finish(run, place, command, expected[way])
        if done is not None:
            moments.learn(done)
        if done is not None and (shards := shards_kept(done.stderr)) is not None:
            resumed += 1
            kept.add(shards)
        clear(place)
    assert resumed > kills // 20, f"only {resumed} of {landed} kills left something to continue"
    assert len(kept - {None}) > 2


def test_6_kills_at_random_moments_then_the_same_bytes(
    server: Runner, run: Run, place: Path, expected: dict[str, dict[str, str]]
) -> None:
    kill_at_random(server, run, place, expected, 6)


ONE_LINEAR = ("--skip", ".*mlp.*", "--skip", "k_proj", "--skip", "v_proj", "--skip", "o_proj")  # has every operation
SMALL = ("quantize", "small", "-o", "out", "--max-shard-size", "60KB", "--threads", "1", *ONE_LINEAR)


@pytest.fixture
def small(run: Run, place: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """What an undisturbed run writes, and its operations."""
    ended = run(*SMALL)
    assert ended.code == 0
    expected = contents(place / "out")
    clear(place)
    return expected, ended.operations


def decides(operation: str) -> bool:
    """Whether a shard gets its name here, or the output. (At the other files' renames ``test_staging`` tries.)"""
    return re.fullmatch(r"rename .*(\.safetensors|/out)", operation) is not None


def moments_among(operations: tuple[str, ...], kinds: tuple[str, ...], stride: int) -> list[int]:
    """Which operations of these kinds, counted from 0: all that decide, and each ``stride``-th other."""
    chosen = [operation for operation in operations if operation.split()[0] in kinds]
    return [number for number, each in enumerate(chosen) if number % stride == 0 or decides(each)]


def kill_at_every(
    kinds: tuple[str, ...], run: Run, place: Path, small: tuple[dict[str, str], tuple[str, ...]], stride: int = 1
) -> None:
    expected, operations = small
    assert sum(operation.split()[0] in kinds for operation in operations) > 40
    for number in moments_among(operations, kinds, stride):
        assert run(*SMALL, at=number, only=kinds).code == -signal.SIGKILL
        assert not (place / "out").exists() or contents(place / "out") == expected
        finish(run, place, SMALL, expected)
        clear(place)


def kill_a_resumed_run_at_every(
    kinds: tuple[str, ...], run: Run, place: Path, small: tuple[dict[str, str], tuple[str, ...]], stride: int = 1
) -> None:
    expected, operations = small
    renames = [path for path in operations if path.startswith("rename") and path.endswith(".safetensors")]
    assert len(renames) == 3, renames
    assert run(*SMALL, at=2, only=("rename",)).code == -signal.SIGKILL  # the first shard is finished
    with tempfile.TemporaryDirectory(dir=place.parent) as saved:
        for name in ("out.partial", "out.partial.journal"):
            (place / name).rename(Path(saved) / name)

        def resumed(**how: Any) -> Ended:
            shutil.copytree(Path(saved) / "out.partial", place / "out.partial")
            shutil.copy(Path(saved) / "out.partial.journal", place)
            return run(*SMALL, only=kinds, **how)

        whole = resumed()
        assert whole.code == 0
        assert "Continuing: 1 of 3 shards are done." in whole.stderr
        assert contents(place / "out") == expected
        clear(place)
        assert len(whole.operations) > 30
        for number in moments_among(whole.operations, kinds, stride):
            assert resumed(at=number).code == -signal.SIGKILL
            assert not (place / "out").exists() or contents(place / "out") == expected
            finish(run, place, SMALL, expected)
            clear(place)


def test_a_kill_at_writes_syncs_and_renames_then_the_same_bytes(
    run: Run, place: Path, small: tuple[dict[str, str], tuple[str, ...]]
) -> None:
    kill_at_every(STORES, run, place, small, stride=32)


def test_a_kill_at_writes_syncs_and_renames_of_a_resumed_run_then_the_same_bytes(
    run: Run, place: Path, small: tuple[dict[str, str], tuple[str, ...]]
) -> None:
    kill_a_resumed_run_at_every(STORES, run, place, small, stride=32)


# Failing operations


def fail_everywhere(
    run: Run,
    place: Path,
    small: tuple[dict[str, str], tuple[str, ...]],
    errors: tuple[tuple[str, int], ...],
    stride: int = 1,
) -> None:
    """Every operation of a run fails once, with the next of ``errors``; with ``stride``, the first of each kind, every
    ``stride``-th after it, and all that decide."""
    expected, operations = small
    seen: Counter[str] = Counter()
    tried = 0
    for number, operation in enumerate(operations):
        kind, path = operation.split(" ", 1)
        seen[kind] += 1
        if (seen[kind] - 1) % stride and not decides(operation):
            continue
        act, code = errors[tried % len(errors)]
        tried += 1
        ended = run(*SMALL, "--json", at=number, act=act)
        assert ended.code == code, f"{operation}: {ended.stderr}"
        told = json.loads(ended.stdout.splitlines()[-1])
        assert told["type"] == "exit_error"
        assert told["code"] == code
        assert Path(path).name in told["message"]
        finish(run, place, SMALL, expected)
        clear(place)
    assert seen.keys() >= {
        "write",
        "fsync",
        "rename",
        "read",
        "open",
        "close",
        "reserve",
        "lock",
        "truncate",
        "mkdir",
        "list",
    }


def test_an_error_at_an_operation_of_any_kind_is_told_and_leaves_nothing_half_done(
    run: Run, place: Path, small: tuple[dict[str, str], tuple[str, ...]]
) -> None:
    fail_everywhere(run, place, small, ((ENOSPC, 74), (EIO, 74), (EACCES, 77)), stride=96)


def test_a_source_that_cannot_be_read_is_an_io_error_that_names_it(
    run: Run, place: Path, expected: dict[str, dict[str, str]]
) -> None:
    """A read of weights fails, as on a disk with a bad sector."""
    broken = """
import qz.formats.files.folder as f
def preadv(descriptor, buffers, offset, real=os.preadv, count=[0]):
    wanted = "/source/model" in os.readlink(f"/proc/self/fd/{descriptor}")
    count[0] += wanted
    if count[0] >= 20: raise OSError(5, os.strerror(5))
    return real(descriptor, buffers, offset)
os.preadv = preadv
"""
    ended = run(*QUANTIZE, before=broken)
    assert ended.code == 74
    assert re.search(r"source/model-0000.-of-0000.\.safetensors cannot be read: input/output error", ended.stderr)
    finish(run, place, QUANTIZE, expected["nf4"])


@pytest.mark.parametrize("way", ["nf4", "nf4-double", "dequantize"])
def test_without_fsync_the_output_is_the_same_and_the_disk_is_not_waited_for(
    run: Run, place: Path, expected: dict[str, dict[str, str]], way: str
) -> None:
    ended = run(*WAYS[way], "--no-fsync")
    assert ended.code == 0, ended.stderr
    assert not any(operation.startswith("fsync ") for operation in ended.operations)
    assert contents(place / "out") == expected[way]
    clear(place)
    assert any(operation.startswith("fsync ") for operation in run(*WAYS[way]).operations)


# Signals


def check_interrupted(ended: Ended, place: Path, expected: dict[str, str]) -> None:
    """The output is there; or finished shards and nothing else, and how many; or nothing at all."""
    if (place / "out").exists():
        return
    assert ended.error[0].startswith("Error: Interrupted.")
    beside = left_beside(place)
    assert beside in (set(), {"out.partial", "out.partial.journal"})
    if beside:
        kept = re.search(r"(\d+) finished shards? (is|are) kept: run the same command again", ended.stderr)
        assert kept, ended.stderr
        files = contents(place / "out.partial")
        assert len(files) == int(kept.group(1))
        assert files.items() <= expected.items()


INTERRUPTED_AT = """
import re, sys
left = {number}
def trace(frame, event, argument):
    global left
    code = frame.f_code
    if "/qz/" not in code.co_filename and not code.co_filename.endswith(("/contextlib.py", "/threading.py")):
        return None
    if event in ("call", "line") and re.fullmatch({functions!r}, code.co_name):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)
    return trace
from qz.formats.output.staging import Staging
def begin(self, *arguments, real=Staging.__init__, **options):
    real(self, *arguments, **options)
    sys.settrace(trace)
Staging.__init__ = begin
"""
"""Before a run: SIGINT at the ``number``-th line of these functions (a regular expression) that its main thread comes
to once its output is begun."""
LOCKS = "use|__exit__|wait|_acquire_restore"


@pytest.mark.parametrize(
    ("functions", "numbers"),
    [
        pytest.param("_staging|__enter__", range(1, 32, 4), id="begins"),
        pytest.param(LOCKS, range(1, 240, 24), id="locks"),
        pytest.param("_staging|__enter__", range(1, 32), id="begins, any line", marks=pytest.mark.soak),
        pytest.param(LOCKS, range(1, 240, 6), id="locks, more lines", marks=pytest.mark.soak),
        pytest.param(".*", random.Random(1).sample(range(30_000), 700), id="anywhere", marks=pytest.mark.soak),
    ],
)
def test_an_interrupt_at_any_line_ends_cleanly_and_the_same_command_continues(
    run: Run, place: Path, expected: dict[str, dict[str, str]], functions: str, numbers: Sequence[int]
) -> None:
    """Also where Python code takes and lets go of what others wait for."""
    codes = []
    for number in numbers:
        ended = run(*QUANTIZE, before=INTERRUPTED_AT.format(number=number, functions=functions))
        codes.append(ended.code)
        assert ended.code in (0, 130)
        if ended.code:
            check_interrupted(ended, place, expected["nf4"])
        clear(place)
    assert 130 in codes
    finish(run, place, QUANTIZE, expected["nf4"])


def test_an_interrupt_at_any_moment_ends_cleanly_and_the_same_command_continues(
    server: Runner, run: Run, place: Path, expected: dict[str, dict[str, str]]
) -> None:
    """Two interrupted runs of each way at least, one by each signal, and each signal's own exit code."""
    moments = Moments(3)
    codes: list[int] = []
    for turn, (way, number) in enumerate(itertools.cycle(itertools.product(WAYS, (signal.SIGINT, signal.SIGTERM)))):
        if turn >= 8 and min(codes.count(130), codes.count(143)) > 2:
            break
        assert turn < 100, codes
        running = server.start(*WAYS[way], cwd=place)
        moments.wait()
        running.kill(number)
        ended = running.wait()
        codes.append(ended.code)
        if ended.code == -number:  # before qz looks after signals
            clear(place)
            continue
        check(ended)
        assert ended.code in (0, 128 + number)
        if ended.code:
            check_interrupted(ended, place, expected[way])
        moments.learn(finish(run, place, WAYS[way], expected[way]) or ended)
        clear(place)


@pytest.mark.parametrize(("act", "code"), [(INTERRUPT, 130), (TERMINATE, 143)])
def test_an_interrupted_run_says_how_to_go_on_and_then_goes_on(
    run: Run, place: Path, expected: dict[str, dict[str, str]], act: str, code: int
) -> None:
    ended = run(*QUANTIZE, "--json", at=5, only=("rename",), act=act)
    assert ended.code == code
    kept = len(contents(place / "out.partial"))
    told = f"Error: Interrupted. {kept} finished shards are kept: run the same command again to continue, "
    assert ended.error == [told + "or start over with --no-resume."]
    assert json.loads(ended.stdout) == {"type": "exit_error", "code": code, "message": ended.error[0][7:]}
    again = run(*QUANTIZE, "--json")
    assert again.code == 0
    assert again.stderr.startswith(f"Continuing: {kept} of 6 shards are done.\n")
    assert json.loads(again.stdout)["resumed"] is True
    assert contents(place / "out") == expected["nf4"]
    assert left_beside(place) == {"out"}


def test_an_interrupt_before_any_shard_leaves_nothing_at_all(run: Run, place: Path) -> None:
    ended = run(*QUANTIZE, at=0, only=("reserve",), act=INTERRUPT)
    assert ended.code == 130
    told = "Error: Interrupted. No shard was finished, so nothing is left behind: the same command starts over."
    assert ended.error == [told]
    assert left_beside(place) == set()


def test_an_interrupt_while_the_output_gets_its_name_waits_until_it_has_it(
    run: Run, place: Path, expected: dict[str, dict[str, str]]
) -> None:
    last = len(expected["nf4"])  # one rename for each file, then that of the folder
    ended = run(*QUANTIZE, at=last, only=("rename",), act=INTERRUPT)
    assert ended.code == 130
    assert ended.error == [f"Error: Interrupted. {place / 'out'} is complete."]
    assert contents(place / "out") == expected["nf4"]
    assert left_beside(place) == {"out"}


@pytest.mark.parametrize("operation", ["write", "rename"])
def test_the_second_interrupt_ends_a_run_that_is_stuck(
    server: Runner, run: Run, place: Path, expected: dict[str, dict[str, str]], operation: str
) -> None:
    """A write hangs, as on a dead network disk: the first signal waits for it, the second does not."""
    stuck = "open('stuck', 'w').close(); time.sleep(3600)"
    last = len(expected["nf4"]) if operation == "rename" else 5
    running = server.start(*QUANTIZE, cwd=place, at=last, only=(operation,), act=stuck)
    while not (place / "stuck").exists():
        time.sleep(0.01)
    running.kill(signal.SIGINT)
    time.sleep(0.3)
    running.kill(signal.SIGTERM)
    assert running.wait().code == 143
    assert not (place / "out").exists()
    (place / "stuck").unlink()
    finish(run, place, QUANTIZE, expected["nf4"])


# Two runs at once


@pytest.mark.parametrize("rounds", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_of_8_concurrent_starts_one_works_and_the_others_are_told_at_once(
    server: Runner, place: Path, expected: dict[str, dict[str, str]], rounds: int
) -> None:
    wait = "while not os.path.exists('go'): time.sleep(0.01)"
    for _ in range(rounds):
        runs = [server.start(*QUANTIZE, cwd=place, at=0, only=("reserve",), act=wait) for _ in range(8)]
        done: list[Ended] = []
        while len(done) < 7:  # one is at work until we say so
            readable, _, _ = select.select([run.socket for run in runs], [], [], HANG)
            assert readable, "fewer than seven were refused"
            for each in [each for each in runs if each.socket in readable]:
                done.append(each.wait())
                runs.remove(each)
        assert [ended.code for ended in done] == [75] * 7
        assert all("Another qz is writing out in" in ended.stderr for ended in done)
        (place / "go").touch()
        assert runs[0].wait().code == 0
        (place / "go").unlink()
        assert contents(place / "out") == expected["nf4"]
        assert left_beside(place) == {"out"}
        clear(place)


@pytest.mark.parametrize("rounds", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_runs_that_race_without_waiting_leave_one_output(
    server: Runner, place: Path, expected: dict[str, dict[str, str]], rounds: int
) -> None:
    for _ in range(rounds):
        runs = [server.start(*QUANTIZE, cwd=place) for _ in range(8)]
        codes = sorted(each.wait().code for each in runs)
        assert codes[0] == 0
        assert set(codes[1:]) <= {73, 75}
        assert contents(place / "out") == expected["nf4"]
        assert left_beside(place) == {"out"}
        clear(place)


def test_a_second_run_is_refused_before_it_plans(server: Runner, place: Path) -> None:
    """Planning may take minutes; the other run's lock and an existing output are seen first."""
    stuck = "open('stuck', 'w').close(); time.sleep(3600)"
    first = server.start(*QUANTIZE, cwd=place, at=0, only=("reserve",), act=stuck)
    while not (place / "stuck").exists():
        time.sleep(0.01)
    no_plan = "import qz.quantize.models.plan as c\ndef never(*_): raise AssertionError\nc.plan_quantization = never"
    for command in (QUANTIZE, (*QUANTIZE, "--overwrite"), (*QUANTIZE, "--no-resume")):
        ended = server.run(*command, cwd=place, before=no_plan)
        check(ended)
        assert ended.code == 75
    first.kill()
    first.wait()
    (place / "out").mkdir()
    (place / "out/config.json").write_text("{}")
    clear_partial(place)
    assert server.run(*QUANTIZE, cwd=place, before=no_plan).code == 73


def clear_partial(place: Path) -> None:
    shutil.rmtree(place / "out.partial", ignore_errors=True)
    (place / "out.partial.journal").unlink(missing_ok=True)


# Pipelines


@pytest.fixture(scope="module")
def pipeline(server: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``flux``, a small pipeline, and ``nf4``, what an undisturbed run makes of it."""
    import pipelines

    folder = tmp_path_factory.mktemp("pipeline")
    pipelines.flux(folder / "flux")
    server.warm("quantize", "flux", "-o", "nf4", "--threads", "1", cwd=folder)
    return folder


def kill_a_pipeline(server: Runner, place: Path, pipeline: Path, every: int) -> None:
    """At every so many changes of the disk, then the same command."""
    (place / "flux").symlink_to(pipeline / "flux")
    expected, command = contents(pipeline / "nf4"), ("quantize", "flux", "-o", "out", "--threads", "2")
    number, resumed = 0, 0
    while (killed := server.run(*command, cwd=place, at=number, only=CHANGES)).code != 0:
        assert killed.code == -signal.SIGKILL
        if not (place / "out").exists():
            again = server.run(*command, cwd=place)
            check(again)
            assert again.code == 0
            resumed += "Continuing: " in again.stderr
        assert contents(place / "out") == expected
        shutil.rmtree(place / "out")
        clear_partial(place)
        number += every
    assert resumed


def test_kills_during_a_pipeline_then_the_same_bytes(server: Runner, place: Path, pipeline: Path) -> None:
    kill_a_pipeline(server, place, pipeline, every=197)


# A source that changes

CHANGED: dict[str, tuple[str, int, str]] = {
    "touched": ("os.utime(file)", 65, "changed while it was read"),
    "longer": ("open(file, 'ab').write(b'x')", 65, "changed while it was read"),
    "overwritten": ("open(file, 'r+b').write(bytes(8))", 65, "changed while it was read"),
    "truncated": ("os.truncate(file, 5000)", 65, "truncated|changed while it was read"),
    "replaced": ("open('new', 'wb').write(open(file, 'rb').read()); os.replace('new', file)", 65, "changed while"),
    "gone": ("os.unlink(file)", 66, "does not exist|disappeared while it was read"),
    "a folder": ("os.unlink(file); os.mkdir(file)", 65, "is a folder|changed while it was read"),
}
MOMENTS = {"before anything is read": (0, "reserve"), "in the middle": (15, "write"), "near the end": (5, "rename")}
FILE = "model-00002-of-00004.safetensors"


@pytest.fixture
def own_source(place: Path, models: Path) -> Path:
    """A copy of the source, which may be changed, in the place of the link."""
    (place / "source").unlink()
    shutil.copytree(models / "source", place / "source")
    assert (place / "source" / FILE).is_file()
    return place / "source"


@pytest.mark.parametrize(("way", "moment"), in_turn(CHANGED, list(MOMENTS)))
def test_a_source_that_changes_during_the_run_is_named_and_makes_no_output(
    server: Runner, place: Path, own_source: Path, models: Path, way: str, moment: str
) -> None:
    change, code, words = CHANGED[way]
    at, operation = MOMENTS[moment]
    act = f"file = {str(own_source / FILE)!r}; {change}"
    ended = server.run(*QUANTIZE, cwd=place, at=at, only=(operation,), act=act)
    check(ended)
    assert ended.code == code, ended.stderr
    assert FILE in ended.stderr
    assert re.search(words, ended.stderr), ended.stderr
    assert not (place / "out").exists()
    shutil.rmtree(own_source / FILE) if way == "a folder" else (own_source / FILE).unlink(missing_ok=True)
    shutil.copy(models / "source" / FILE, own_source)
    again = server.run(*QUANTIZE, cwd=place)
    if again.code == 73:  # what was finished was made of the file as it was before
        assert way == "gone"
        assert f"{FILE} has changed" in again.stderr
        again = server.run(*QUANTIZE, "--no-resume", cwd=place)
    assert again.code == 0, again.stderr
    assert contents(place / "out") == contents(models / "nf4")


def test_a_source_that_changed_between_two_runs_is_refused_naming_the_file(
    server: Runner, place: Path, own_source: Path, expected: dict[str, dict[str, str]]
) -> None:
    assert server.run(*QUANTIZE, cwd=place, at=5, only=("rename",)).code == -signal.SIGKILL
    os.utime(own_source / FILE)
    ended = server.run(*QUANTIZE, cwd=place)
    check(ended)
    assert ended.code == 73
    assert f"{FILE} has changed" in ended.stderr
    assert server.run(*QUANTIZE, "--no-resume", cwd=place).code == 0
    assert contents(place / "out") == expected["nf4"]


# Another run than the interrupted one

OTHER: dict[str, tuple[tuple[str, ...], str, str]] = {
    "another method": (("--int8",), "", "differs: method: nf4 → int8. "),
    "another dtype": (("--dtype", "float16"), "", "dtype: auto → float16"),
    "another skip": (("--skip", ".*mlp.*"), "", "skips: none → .*mlp.*"),
    "another qz": ((), "import qz; qz.__version__ = '9.9'", " → 9.9"),
    "another torch": (
        (),
        (
            "import qz.quantize.libraries.examine as e\n"
            "e._version = lambda name, of=e._version: '9.9' if name == 'torch' else of(name)"
        ),
        "torch: ",
    ),
    "another device": (
        (),
        (
            "import qz.quantize.compute.devices as d, qz.quantize.streaming.quantizing_device as q\n"
            "q.arithmetic_on = lambda _, gpu=d.Cpu('cuda', 'NVIDIA H100'): gpu"
        ),
        "device: cpu → cuda (NVIDIA H100)",
    ),
}


def interrupt(run: Run) -> None:
    """A run that is killed after a few shards."""
    assert run(*QUANTIZE, at=5, only=("rename",)).code == -signal.SIGKILL


def test_another_run_into_the_same_place_is_refused_naming_the_difference(
    run: Run, place: Path, expected: dict[str, dict[str, str]]
) -> None:
    interrupt(run)
    journal = (place / "out.partial.journal").read_bytes()
    for what, (options, patch, difference) in OTHER.items():
        ended = run(*QUANTIZE, *options, before=patch)
        assert ended.code == 73, what
        assert f"{place}/out.partial holds an interrupted run that differs: " in ended.stderr, what
        assert difference in ended.stderr, what
        assert "Repeat that run to continue it, or start over with --no-resume." in ended.stderr, what
        assert (place / "out.partial.journal").read_bytes() == journal, what
    assert shards_kept(run(*QUANTIZE).stderr) == str(journal.count(b"\n") - 1)
    assert contents(place / "out") == expected["nf4"]


def test_no_resume_starts_over_with_other_settings(run: Run, place: Path, expected: dict[str, dict[str, str]]) -> None:
    interrupt(run)
    ended = run(*WAYS["int8"], "--no-resume")
    assert ended.code == 0
    assert "Continuing" not in ended.stderr
    assert contents(place / "out") == expected["int8"]
    assert left_beside(place) == {"out"}


def test_threads_may_differ_when_a_run_is_continued(run: Run, place: Path, expected: dict[str, dict[str, str]]) -> None:
    interrupt(run)
    ended = run(*QUANTIZE, "--threads", "7")
    assert ended.code == 0
    assert "Continuing:" in ended.stderr
    assert contents(place / "out") == expected["nf4"]


# From the Hub

HUB = ("quantize", "big/llama", "-o", "out", "--max-shard-size", "20KB", "--threads", "2", "--nf4")


@pytest.fixture(scope="module")
def repository(hub: HubServer, models: Path) -> str:
    hub.add("big/llama", {path.name: path for path in (models / "source").iterdir()})
    return "big/llama"


def same_weights(folder: Path, expected: dict[str, str]) -> bool:
    """All is the same but for the record, which names the source."""
    return {**contents(folder), "qz.json": ""} == {**expected, "qz.json": ""}


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize("renames", [(0, 5), pytest.param(range(8), marks=pytest.mark.soak)], ids=["some", "all"])
def test_a_run_from_the_hub_that_is_killed_is_continued(
    server: Runner, place: Path, expected: dict[str, dict[str, str]], renames: Iterable[int]
) -> None:
    resumed = 0
    for number in renames:
        assert server.run(*HUB, cwd=place, at=number, only=("rename",)).code == -signal.SIGKILL
        ended = server.run(*HUB, cwd=place)
        check(ended)
        assert ended.code == 0, ended.stderr
        resumed += "Continuing" in ended.stderr
        assert same_weights(place / "out", expected["nf4"])
        clear(place)
    assert resumed


@pytest.mark.parametrize("renames", [(2, 4, 99), pytest.param((2, 3, 4, 5, 6, 99), marks=pytest.mark.soak)])
def test_bytes_that_arrived_wrong_never_get_into_an_output_not_even_by_resuming(
    server: Runner, place: Path, hub: HubServer, renames: Sequence[int]
) -> None:
    """A byte of a file is wrong, and its shard is finished before the whole file has come and its hash is known.

    The run is killed at a rename then, or ends with the error; the same command goes on.
    """
    options = ("-o", "out", "--max-shard-size", "20KB", "--threads", "2")
    one = save_llama(place / "one", shard="1GB")
    assert server.run("quantize", "one", *options, cwd=place).code == 0
    expected = contents(place / "out")
    shutil.rmtree(place / "out")
    hub.add("big/one", {path.name: path.read_bytes() for path in one.iterdir()})
    weights = hashlib.sha256((one / "model.safetensors").read_bytes()).hexdigest()
    slowly = "import qz.formats.hub.read_ahead as r; r.Pace = lambda p=r.Pace: p(segment=16384, connections=1)\n"
    slowly += "import qz.formats.hub.repository as h; h.WHOLE = 1 << 16"  # the weights come by ranges
    codes = []
    for number in renames:
        # In the embeddings, which stay as they are: 64 KB of them came with the header.
        fault = hub.fail("cdn", matching=weights, nth=6, times=1, corrupt=True)
        hub.latency = 0.03
        command = ("quantize", "big/one", *options)
        codes.append(server.run(*command, cwd=place, at=number, only=("rename",), before=slowly).code)
        hub.latency = 0
        hub.faults.remove(fault)
        assert not (place / "out").exists()
        again = server.run(*command, cwd=place)
        assert again.code == 0, again.stderr
        assert same_weights(place / "out", expected)
        clear_partial(place)
        shutil.rmtree(place / "out")
    # How many renames come before the hash is known depends on the machine's speed; the first does, the 99th never.
    assert codes[0] == -signal.SIGKILL
    assert codes[-1] == 65
    assert set(codes) == {-signal.SIGKILL, 65}


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("nth", "before", "options"),
    [(3, "", ()), (6, "import qz.formats.hub.repository as h; h.WHOLE = 1 << 12", ()), (3, "", ("--download",))],
    ids=["small files", "weights by ranges", "downloads"],
)
def test_an_interrupt_while_the_hub_is_silent_ends_soon(
    server: Runner,
    place: Path,
    hub: HubServer,
    expected: dict[str, dict[str, str]],
    nth: int,
    before: str,
    options: tuple[str, ...],
) -> None:
    """Before the requests that are under way time out: each may wait 10 seconds for the next byte."""
    fault = hub.fail("cdn", nth=nth, stall=3600)
    running = server.start(*HUB, *options, cwd=place, before=before)
    while fault.seen < nth:
        time.sleep(0.01)
    time.sleep(0.5)
    seen = fault.seen
    running.kill(signal.SIGINT)
    ended = running.wait()
    assert fault.seen == seen  # none was repeated
    hub.faults.remove(fault)
    check(ended)
    assert ended.code == 130
    assert left_beside(place) <= {"out.partial", "out.partial.journal"}
    assert server.run(*HUB, cwd=place).code == 0
    assert same_weights(place / "out", expected["nf4"])


# Exit codes and messages

CASES: dict[str, tuple[int, tuple[str, ...], dict[str, Any], str]] = {
    "a bug": (
        1,
        QUANTIZE,
        {"act": "raise ZeroDivisionError(os.environ['HF_TOKEN'])", "at": 40},
        "report what it shows",
    ),
    "a bug while planning": (
        1,
        QUANTIZE,
        {"before": "import qz.quantize.planning.plan as p; p.shard_layout = None"},
        "Run the command again with --debug",
    ),
    "two methods": (2, (*QUANTIZE, "--nf4", "--int8"), {}, "exclude each other"),
    "an impossible skip": (2, (*QUANTIZE, "--skip", "layers.(0"), {}, "regular expression"),
    "a truncated source": (65, ("quantize", "short", "-o", "out"), {}, "model.safetensors"),
    "a source that is not finite": (65, ("quantize", "nan", "-o", "out"), {}, "--keep-nonfinite"),
    "no source": (66, ("quantize", "./nowhere", "-o", "out"), {}, "./nowhere does not exist"),
    "no such repository": (66, ("quantize", "big/nothing", "-o", "out"), {}, "big/nothing"),
    "no Hub": (
        69,
        ("quantize", "big/nothing", "-o", "out"),
        {"before": "import huggingface_hub.constants as c; c.HF_HUB_OFFLINE = True"},
        "HF_HUB_OFFLINE is set",
    ),
    "an output that exists": (73, (*QUANTIZE, "-o", "taken"), {}, "--overwrite"),
    "a disk that is full": (74, QUANTIZE, {"act": ENOSPC, "at": 5, "only": ("write",)}, "Free some space"),
    "a broken disk": (74, QUANTIZE, {"act": EIO, "at": 1, "only": ("fsync",)}, "run the same command again"),
    "another run": (75, (*QUANTIZE, "-o", "busy"), {}, "Wait until it is done"),
    "no memory": (75, QUANTIZE, {"act": "raise MemoryError", "at": 40}, "--threads 1"),
    "an output without permission": (77, QUANTIZE, {"act": EACCES, "at": 0, "only": ("open",)}, "permissions"),
    "a source without permission": (77, QUANTIZE, {"before": "os.seteuid(65534)"}, "ermission"),
    "a quantized source": (78, ("quantize", "quantized", "-o", "out"), {}, "qz dequantize"),
    "a plain source": (78, ("dequantize", "source", "-o", "out"), {}, "qz quantize"),
    "Ctrl-C": (
        130,
        QUANTIZE,
        {"act": INTERRUPT, "at": 5, "only": ("rename",)},
        "run the same command again to continue",
    ),
    "SIGTERM": (
        143,
        QUANTIZE,
        {"act": TERMINATE, "at": 5, "only": ("rename",)},
        "run the same command again to continue",
    ),
}


@pytest.mark.parametrize(("case", "debug"), in_turn(CASES, [False, True]))
def test_every_end_has_its_code_its_advice_and_its_json_and_never_the_token(
    server: Runner, place: Path, models: Path, case: str, debug: bool
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    code, command, how, words = CASES[case]
    if case == "a source without permission" and os.geteuid():
        pytest.skip("only root can become someone else")
    (place / "taken").mkdir()
    (place / "taken/config.json").write_text("{}")
    if "short" in command or "nan" in command:
        name = command[1]
        (place / name).mkdir()
        for path in (models / "small").iterdir():
            if "safetensors" not in path.name:
                shutil.copy(path, place / name)
        tensors = {
            key: tensor for path in (models / "small").glob("*.safetensors") for key, tensor in load_file(path).items()
        }
        if name == "nan":
            tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
        save_file(tensors, place / name / "model.safetensors", metadata={"format": "pt"})
        if name == "short":
            os.truncate(place / name / "model.safetensors", 100_000)
    before = state(place)
    with open(place / "busy.partial.journal", "w") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        ended = server.run(*command, "--json", *(["--debug"] if debug else []), cwd=place, **how)
    (place / "busy.partial.journal").unlink()
    assert ended.code == code, ended.stderr
    assert OWNER not in ended.stdout + ended.stderr
    assert ("Traceback" in ended.stderr) == debug
    assert words in " ".join(ended.error)
    assert len(ended.error) <= 5
    last = json.loads(ended.stdout.splitlines()[-1])
    assert last.keys() == {"type", "code", "message"}
    assert (last["type"], last["code"]) == ("exit_error", code)
    assert words in last["message"]
    clear_partial(place)
    assert state(place) == before


def test_a_token_is_in_no_file_and_no_message_of_a_run_from_a_private_repository(
    server: Runner, place: Path, hub: HubServer, models: Path
) -> None:
    files = {path.name: path for path in (models / "small").iterdir()}
    hub.add("me/secret", files, private=True)
    command = ("quantize", "me/secret", "-o", "out", "--max-shard-size", "40KB", "--json", "--debug")
    killed = server.run(*command, cwd=place, at=3, only=("rename",))
    failed = server.run(*command, cwd=place, at=30, act="raise OSError(5, os.environ['HF_TOKEN'], path)")
    ended = [killed, failed, server.run(*command, cwd=place)]
    assert [each.code for each in ended] == [-signal.SIGKILL, 74, 0]
    assert not any(OWNER in each.stdout + each.stderr for each in ended)
    (place / "source").unlink()
    (place / "small").unlink()
    (place / "quantized").unlink()
    assert not [path for path in place.rglob("*") if path.is_file() and OWNER.encode() in path.read_bytes()]


# Limits


@pytest.mark.parametrize(("shards", "layers"), [(100, 15), pytest.param(500, 72, marks=pytest.mark.soak)])
def test_64_descriptors_are_enough_for_more_shards_in_and_out(
    server: Runner, place: Path, shards: int, layers: int
) -> None:
    save_llama(place / "many", layers=layers, shard="1KB")
    sources = len(list((place / "many").glob("*.safetensors")))
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    command = ("quantize", "many", "-o", "out", "--max-shard-size", "2KB", "--threads", "8")
    ended = server.run(*command, "--quiet", cwd=place, before=few)
    check(ended)
    assert ended.code == 0, ended.stderr
    assert sources > shards
    assert len(list((place / "out").glob("*.safetensors"))) > shards
    assert verify_record(LocalFolder(place / "out")) == ()


def test_an_output_where_nothing_may_be_written_is_a_question_of_permission(server: Runner, place: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can become someone else")
    shutil.copytree(place / "source", place / "open")
    for path in (place, place / "open", *(place / "open").iterdir()):
        path.chmod(0o755)
    ended = server.run("quantize", "open", "-o", "out", cwd=place, before="os.seteuid(65534)")
    check(ended)
    assert ended.code == 77
    assert "cannot open" in ended.stderr
    assert "write elsewhere with -o/--output" in ended.stderr
    assert left_beside(place) == {"open"}


def sparse_model(folder: Path, config: Any, model_class: Any) -> tuple[int, int]:
    """A checkpoint in bfloat16 of zeros that take no place on disk; its bytes, and those of its largest tensor."""
    import torch

    with torch.device("meta"):
        state = model_class(config).state_dict()
    tensors = layout((name, "BF16", tuple(tensor.shape)) for name, tensor in state.items())
    header = encode_header(tensors)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + tensors[-1].stop)
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    return tensors[-1].stop, max(tensor.nbytes for tensor in tensors)


BOUNDED = """
import re, resource
found = re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
limit = int(found[1]) * 1024 + {more}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
"""


def anonymous(pid: int) -> int:
    """RssAnon in bytes, 0 if the process is gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found.group(1)) * 1024 if found else 0


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_memory_stays_below_three_times_the_largest_tensor_and_256_mb(server: Runner, place: Path, shape: str) -> None:
    """Llama streams in chunks; GPT-2's weights are turned, so each is in memory as a whole: one at a time."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if shape == "llama":
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 9, "num_attention_heads": 8}
        config = LlamaConfig(**sizes, vocab_size=1000, tie_word_embeddings=False, dtype="bfloat16")
        total, largest = sparse_model(place / "model", config, LlamaForCausalLM)
    else:
        config = GPT2Config(n_embd=2560, n_layer=3, n_head=8, vocab_size=1000, dtype="bfloat16")
        total, largest = sparse_model(place / "model", config, GPT2LMHeadModel)
    allowed = 3 * largest + 256 * 1_000_000
    assert total > allowed, "the model would fit into the bound"
    command = ("quantize", "model", "-o", "out", "--threads", "8", "--quiet")
    running = server.start(*command, cwd=place, before=BOUNDED.format(more=allowed))
    begun = peak = anonymous(running.pid)
    while (now := anonymous(running.pid)) > 0:
        peak = max(peak, now)
        time.sleep(0.002)
    ended = running.wait()
    check(ended)
    assert ended.code == 0, ended.stderr
    assert peak - begun < allowed
    print(f"{shape}: {peak - begun:,} of {allowed:,} bytes allowed, source {total:,}")


# The same bytes


@pytest.mark.parametrize("way", WAYS)
def test_threads_do_not_change_a_byte(run: Run, place: Path, expected: dict[str, dict[str, str]], way: str) -> None:
    for threads in (1, 4, 8):
        assert run(*WAYS[way], "--threads", str(threads)).code == 0
        assert contents(place / "out") == expected[way]
        clear(place)


def seeded(place: Path, expected: dict[str, dict[str, str]], seeds: str, ways: Sequence[str]) -> None:
    """The real command in fresh processes. (The other tests' server has a seed of its own, which changes.)"""
    for seed, way in zip(seeds, ways, strict=True):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "HF_TOKEN": OWNER, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "qz", *WAYS[way]]
        ended = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert contents(place / "out") == expected[way]
        clear(place)


def test_a_hash_seed_does_not_change_a_byte(place: Path, expected: dict[str, dict[str, str]]) -> None:
    seeded(place, expected, "1", ["nf4"])  # the others import torch: make soak


# Real file systems


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.soak)])
def test_real_disks_of_many_sizes_and_the_same_command_once_there_is_room(
    server: Runner, place: Path, expected: dict[str, dict[str, str]], step: int
) -> None:
    mounted = place / "mounted"
    mounted.mkdir()
    whole = sum(path.stat().st_size for path in (place / "source").iterdir())
    codes = []
    for number in range(1, 21, step):
        size = whole * number // 16 // 4096 * 4096
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            # Without the look at the free space beforehand, the disk is full somewhere in the middle.
            module = "qz.formats.output.storage.disk"
            blind = f"import {module} as f; f.Disk.free_bytes = lambda *_: 1 << 50; f._fallocate = None"
            command = (*QUANTIZE, "-o", "mounted/out")
            ended = server.run(*command, cwd=place, before=blind if number % 2 else "")
            check(ended)
            codes.append(ended.code)
            assert ended.code in (0, 74), ended.stderr
            if ended.code == 74:
                assert "pace" in ended.stderr
                assert re.search(r"needs [\d,]+ bytes, [\d,]+ are free", ended.stderr), ended.stderr
                assert not (mounted / "out").exists()
                subprocess.run(["mount", "-o", "remount,size=64m", str(mounted)], check=True)
                again = server.run(*command, cwd=place)
                check(again)
                assert again.code == 0, again.stderr
            assert contents(mounted / "out") == expected["nf4"]
            assert {path.name for path in mounted.iterdir()} == {"out"}
        finally:
            subprocess.run(["umount", str(mounted)], check=True)
    assert set(codes) == {0, 74}


def test_what_a_run_wrote_can_be_verified_and_a_flipped_bit_is_found(run: Run, place: Path) -> None:
    assert run(*QUANTIZE).code == 0
    assert run("inspect", "out", "--verify").code == 0
    file = max((place / "out").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)
    ended = run("inspect", "out", "--verify")
    assert ended.code == 65
    assert file.name in ended.stderr + ended.stdout


# A terminal


INTERRUPTED_BAR = """
from rich.live import Live
def stop(self, real=Live.stop):
    os.kill(os.getpid(), signal.SIGINT)
    real(self)
Live.stop = stop
"""


def in_terminal(
    server: Runner, place: Path, command: tuple[str, ...], key_at: str = "", held: Path | None = None, **how: Any
) -> tuple[int, str]:
    """Run in a terminal, and press Ctrl-C when a text has appeared and, if a file is given, that is there: the exit
    code, and all that was shown."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    before = termios.tcgetattr(other)
    environment = {"TERM": "xterm-256color"}
    running = server.start(*command, cwd=place, terminal=os.ttyname(other), environment=environment, **how)
    shown, pressed = b"", not key_at
    end = time.monotonic() + HANG
    while time.monotonic() < end:
        readable: list[int] = select.select([main, running.socket.fileno()], [], [], 60)[0]
        if main in readable:
            shown += os.read(main, 65536)
            if not pressed and key_at.encode() in shown and (held is None or held.exists()):
                os.write(main, b"\x03")
                pressed = True
        elif readable:
            break
    else:
        running.kill()
        raise TimeoutError(shown.decode())
    assert termios.tcgetattr(other) == before
    os.close(main)
    os.close(other)
    assert pressed, shown.decode()
    return running.wait().code, shown.decode()


def last_lines(shown: str) -> list[str]:
    """The lines that can be read in the end: without colours, and without a bar that was erased."""
    plain = re.sub(r"[^\n]*\n(\x1b\[\?25h)?\r?\x1b\[1A\x1b\[2K", "", shown)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", plain).replace("\r\n", "\n").strip().split("\n")


@pytest.mark.parametrize(("text", "rename"), [("Quantizing", 0), ("B/s", 4)])
def test_ctrl_c_during_the_progress_bar_leaves_a_clean_terminal_and_the_next_run_continues(
    server: Runner, place: Path, expected: dict[str, dict[str, str]], text: str, rename: int
) -> None:
    """When a file is about to get its name: before any shard is finished, and after some."""
    command = (*WAYS["nf4"], "--threads", "1")
    held = place / "held"
    hold = f"open({str(held)!r}, 'x').close(); work_until_told_to_stop()"
    code, shown = in_terminal(server, place, command, text, held, at=rename, only=("rename",), act=hold)
    held.unlink()
    assert code == 130, shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0, shown  # the cursor is there again
    _, interrupted, error = " ".join(last_lines(shown)).rpartition("Error: Interrupted.")
    assert interrupted, shown
    kept = re.search(r"(\d+) finished shards? (is|are) kept", error)
    assert kept if rename else "No shard was finished" in error, shown
    code, shown = in_terminal(server, place, command)
    assert code == 0, shown
    assert shards_kept(shown) == (kept.group(1) if kept else None)
    assert any(line.startswith("took ") for line in last_lines(shown)), shown
    assert verify_record(LocalFolder(place / "out")) == ()
    assert contents(place / "out") == expected["nf4"]
    assert left_beside(place) == {"out"}


def test_ctrl_c_while_the_bar_goes_away_leaves_a_clean_terminal(
    server: Runner, place: Path, expected: dict[str, dict[str, str]]
) -> None:
    code, shown = in_terminal(server, place, WAYS["nf4"], before=INTERRUPTED_BAR)
    assert code == 130, shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0, shown
    assert last_lines(shown) == ["Error: Interrupted."]
    assert contents(place / "out") == expected["nf4"]


# Long runs: make soak


@pytest.mark.soak
def test_1000_kills_at_random_moments_then_the_same_bytes(
    server: Runner, run: Run, place: Path, expected: dict[str, dict[str, str]]
) -> None:
    kill_at_random(server, run, place, expected, 1000)


@pytest.mark.soak
def test_a_kill_at_every_change_of_the_disk_then_the_same_bytes(
    run: Run, place: Path, small: tuple[dict[str, str], tuple[str, ...]]
) -> None:
    kill_at_every(CHANGES, run, place, small)
    clear(place)
    kill_a_resumed_run_at_every(CHANGES, run, place, small)


@pytest.mark.soak
def test_a_kill_at_every_change_of_the_disk_by_a_pipeline(server: Runner, place: Path, pipeline: Path) -> None:
    kill_a_pipeline(server, place, pipeline, every=1)


@pytest.mark.soak
def test_interrupts_at_any_moment_of_a_real_process_imports_and_all(
    place: Path, expected: dict[str, dict[str, str]]
) -> None:
    """But for the first moments, in which Python itself still starts: it then ends with its own words."""
    moments = random.Random(1)

    def hear() -> None:  # also where this test runs in the background of a shell, which has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    for _ in range(60):
        number = moments.choice([signal.SIGINT, signal.SIGTERM])
        process = subprocess.Popen(
            [sys.executable, "-m", "qz", *QUANTIZE],
            cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hear,
        )
        time.sleep(moments.uniform(0.2, 5))
        process.send_signal(number)
        stderr = process.communicate()[1]
        if process.returncode == 1 and "Fatal Python error: init_" in stderr:
            assert number == signal.SIGINT
            continue
        started = "Error: Interrupted." in stderr
        assert process.returncode in ((128 + number,) if started else (0, 73, -number)), stderr
        if (place / "out").exists():
            assert contents(place / "out") == expected["nf4"]
            clear(place)


@pytest.mark.soak
@pytest.mark.parametrize("error", [(ENOSPC, 74), (EIO, 74), (EACCES, 77)], ids=["ENOSPC", "EIO", "EACCES"])
def test_each_error_at_every_operation(
    run: Run, place: Path, small: tuple[dict[str, str], tuple[str, ...]], error: tuple[str, int]
) -> None:
    fail_everywhere(run, place, small, (error,))


@pytest.mark.soak
def test_5_hash_seeds_do_not_change_a_byte(place: Path, expected: dict[str, dict[str, str]]) -> None:
    for way in WAYS:
        seeded(place, expected, "01234", [way] * 5)


@pytest.mark.soak
def test_8_real_commands_at_once_20_rounds(place: Path, expected: dict[str, dict[str, str]]) -> None:
    command = [sys.executable, "-m", "qz", *QUANTIZE]
    environment = {**os.environ, "HF_TOKEN": OWNER, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for _ in range(20):
        runs = [
            subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(8)
        ]
        codes = sorted(each.wait() for each in runs)
        assert codes[0] == 0
        assert set(codes[1:]) <= {73, 75}
        assert contents(place / "out") == expected["nf4"]
        assert left_beside(place) == {"out"}
        clear(place)
