"""What a user finds on disk and on the terminal after a run of the command, however it ended.

Each run is the whole command in a process of its own, see ``forked``. The writer's own tests are in ``test_staging``.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forked import EACCES, EIO, ENOSPC, INTERRUPT, TERMINATE, Ended, Server
from hub_server import OWNER, HubServer

CODES = {0, 1, 2, 65, 66, 69, 73, 74, 75, 77, 78, 130, 143}
"""Documented in docs/reference/exit-codes.md; 1 is a bug, which no test here forgives unless it made one."""
QUANTIZE = ("quantize", "source", "-o", "out", "--max-shard-size", "20KB", "--threads", "2")
WAYS: dict[str, tuple[str, ...]] = {
    "nf4": (*QUANTIZE, "--nf4"),
    "nf4-double": (*QUANTIZE, "--nf4", "--double-quant"),
    "int8": (*QUANTIZE, "--int8"),
    "dequantize": ("dequantize", "quantized", "-o", "out", "--max-shard-size", "40KB", "--threads", "2"),
}
CHANGES = ("write", "fsync", "rename", "truncate", "unlink", "rmdir", "mkdir", "open", "reserve")
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
def server(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    settings = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "GITHUB_STEP_SUMMARY": ""}
    with Server(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_TOKEN=OWNER, **settings) as server:
        yield server


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
def models(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
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
def run(server: Server, place: Path) -> Iterator[Run]:
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


def kill_at_random(server: Server, run: Run, place: Path, expected: dict[str, dict[str, str]], kills: int) -> None:
    """Runs killed at random moments, one to three times each, then completed by the same command."""
    chosen = random.Random(7)
    landed, resumed, kept = 0, 0, set()
    while landed < kills:
        way = chosen.choice(list(WAYS))
        command, clean = WAYS[way], True
        for _ in range(chosen.randint(1, 3)):
            if (place / "out").exists():
                break
            running = server.start(*command, cwd=place)
            time.sleep(chosen.uniform(0.02, 0.11))
            running.kill()
            ended = running.wait()
            assert ended.code in (0, -signal.SIGKILL)
            landed += ended.code != 0
            clean = clean and ended.code == 0
            assert not (place / "out").exists() or contents(place / "out") == expected[way]
        if clean:
            clear(place)
            continue
        done = finish(run, place, command, expected[way])
        if done is not None and (found := re.search(r"Continuing: (\d+) of (\d+) shards are done", done.stderr)):
            resumed += 1
            kept.add(found.group(1))
        clear(place)
    assert resumed > kills // 20, f"only {resumed} of {landed} kills left something to continue"
    assert len(kept) > 2


def test_100_kills_at_random_moments_then_the_same_bytes(
    server: Server, run: Run, place: Path, expected: dict[str, dict[str, str]]
) -> None:
    kill_at_random(server, run, place, expected, 100)


SMALL = ("quantize", "small", "-o", "out", "--max-shard-size", "40KB", "--threads", "1")
SMALL += ("--skip", "mlp", "--skip", "k_proj", "--skip", "v_proj")  # two linears are enough to see every operation


@pytest.fixture
def small(run: Run, place: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """What an undisturbed run writes, and its operations."""
    ended = run(*SMALL)
    assert ended.code == 0
    expected = contents(place / "out")
    clear(place)
    return expected, ended.operations


def test_a_kill_at_every_change_of_the_disk_then_the_same_bytes(
    run: Run, place: Path, small: tuple[dict[str, str], tuple[str, ...]]
) -> None:
    expected, operations = small
    total = sum(operation.split()[0] in CHANGES for operation in operations)
    assert total > 40
    for number in range(total):
        assert run(*SMALL, at=number, only=CHANGES).code == -signal.SIGKILL
        assert not (place / "out").exists() or contents(place / "out") == expected
        finish(run, place, SMALL, expected)
        clear(place)


def test_a_kill_at_every_change_of_the_disk_in_a_resumed_run_then_the_same_bytes(
    run: Run, place: Path, tmp_path: Path, small: tuple[dict[str, str], tuple[str, ...]]
) -> None:
    expected, operations = small
    renames = [path for path in operations if path.startswith("rename") and path.endswith(".safetensors")]
    assert len(renames) == 3
    assert run(*SMALL, at=2, only=("rename",)).code == -signal.SIGKILL  # the first shard is finished
    with tempfile.TemporaryDirectory(dir=tmp_path.parent) as saved:
        for name in ("out.partial", "out.partial.journal"):
            (place / name).rename(Path(saved) / name)
        number = 0
        while True:
            shutil.copytree(Path(saved) / "out.partial", place / "out.partial")
            shutil.copy(Path(saved) / "out.partial.journal", place)
            ended = run(*SMALL, at=number, only=CHANGES)
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL
            assert not (place / "out").exists() or contents(place / "out") == expected
            finish(run, place, SMALL, expected)
            clear(place)
            number += 1
    assert "Continuing: 1 of 3 shards are done." in ended.stderr
    assert contents(place / "out") == expected
    assert number > 30


# Failing operations


def fail_everywhere(
    run: Run, place: Path, small: tuple[dict[str, str], tuple[str, ...]], errors: tuple[tuple[str, int], ...]
) -> None:
    """Every operation of a run fails once, with each of ``errors`` or, if they are few, with the next."""
    expected, operations = small
    seen = set()
    for number, operation in enumerate(operations):
        for act, code in errors if len(errors) == 1 else [errors[number % len(errors)]]:
            ended = run(*SMALL, "--json", at=number, act=act)
            assert ended.code == code, f"{operation}: {ended.stderr}"
            told = json.loads(ended.stdout.splitlines()[-1])
            assert told["type"] == "exit_error"
            assert told["code"] == code
            kind, path = operation.split(" ", 1)
            assert Path(path).name in told["message"]
            seen.add(kind)
            finish(run, place, SMALL, expected)
            clear(place)
    assert seen >= {"write", "fsync", "rename", "read", "open", "close", "reserve", "lock", "truncate", "mkdir", "list"}


def test_an_error_at_every_operation_is_told_and_leaves_nothing_half_done(
    run: Run, place: Path, small: tuple[dict[str, str], tuple[str, ...]]
) -> None:
    fail_everywhere(run, place, small, ((ENOSPC, 74), (EIO, 74), (EACCES, 77)))


def test_a_source_that_cannot_be_read_is_an_io_error_that_names_it(
    run: Run, place: Path, expected: dict[str, dict[str, str]]
) -> None:
    """The fifth read of weights fails, as on a disk with a bad sector."""
    broken = """
import qz.formats.folder as f
def preadv(descriptor, buffers, offset, real=os.preadv, count=[0]):
    count[0] += ".safetensors" in os.readlink(f"/proc/self/fd/{descriptor}")
    if count[0] == 20: raise OSError(5, os.strerror(5))
    return real(descriptor, buffers, offset)
os.preadv = preadv
"""
    ended = run(*QUANTIZE, before=broken)
    assert ended.code == 74
    assert re.search(r"source/model-0000.-of-0000.\.safetensors cannot be read: input/output error", ended.stderr)
    finish(run, place, QUANTIZE, expected["nf4"])


# Signals


def test_an_interrupt_at_any_moment_ends_cleanly_and_the_same_command_continues(
    server: Server, run: Run, place: Path, expected: dict[str, dict[str, str]]
) -> None:
    chosen = random.Random(3)
    codes = []
    for _ in range(30):
        way = chosen.choice(list(WAYS))
        number = chosen.choice([signal.SIGINT, signal.SIGTERM])
        running = server.start(*WAYS[way], cwd=place)
        time.sleep(chosen.uniform(0.03, 0.1))
        running.kill(number)
        ended = running.wait()
        codes.append(ended.code)
        if ended.code == -number:  # before qz looks after signals
            clear(place)
            continue
        check(ended)
        assert ended.code in (0, 128 + number)
        if ended.code and not (place / "out").exists():
            assert ended.error[0].startswith("Error: Interrupted.")
            beside = left_beside(place)
            assert beside in (set(), {"out.partial", "out.partial.journal"})
            if beside:  # finished shards and nothing else
                kept = re.search(r"(\d+) finished shards? (is|are) kept: run the same command again", ended.stderr)
                assert kept, ended.stderr
                files = contents(place / "out.partial")
                assert len(files) == int(kept.group(1))
                assert files.items() <= expected[way].items()
        finish(run, place, WAYS[way], expected[way])
        clear(place)
    assert codes.count(130) > 3
    assert codes.count(143) > 3


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
    server: Server, run: Run, place: Path, expected: dict[str, dict[str, str]], operation: str
) -> None:
    """A write hangs, as on a dead network disk: the first signal waits for it, the second does not."""
    stuck = "open('stuck', 'w').close(); time.sleep(60)"
    last = len(expected["nf4"]) if operation == "rename" else 5
    running = server.start(*QUANTIZE, cwd=place, at=last, only=(operation,), act=stuck)
    while not (place / "stuck").exists():
        time.sleep(0.01)
    running.kill(signal.SIGINT)
    time.sleep(0.3)
    begun = time.monotonic()
    running.kill(signal.SIGTERM)
    assert running.wait().code == 143
    assert time.monotonic() - begun < 1
    assert not (place / "out").exists()
    (place / "stuck").unlink()
    finish(run, place, QUANTIZE, expected["nf4"])


# Two runs at once


def test_of_8_concurrent_starts_one_works_and_the_others_are_told_at_once(
    server: Server, place: Path, expected: dict[str, dict[str, str]]
) -> None:
    wait = "while not os.path.exists('go'): time.sleep(0.01)"
    for _ in range(5):
        runs = [server.start(*QUANTIZE, cwd=place, at=0, only=("reserve",), act=wait) for _ in range(8)]
        done = []
        while len(done) < 7:  # one is at work until we say so
            readable, _, _ = select.select([run.socket for run in runs], [], [], 20)
            assert readable, "fewer than seven were refused"
            for each in [each for each in runs if each.socket in readable]:
                done.append(each.wait())
                runs.remove(each)
        assert [ended.code for ended in done] == [75] * 7
        assert all("Another qz is writing out in" in ended.stderr for ended in done)
        assert max(ended.seconds for ended in done) < 5
        (place / "go").touch()
        assert runs[0].wait().code == 0
        (place / "go").unlink()
        assert contents(place / "out") == expected["nf4"]
        assert left_beside(place) == {"out"}
        clear(place)


def test_runs_that_race_without_waiting_leave_one_output(
    server: Server, place: Path, expected: dict[str, dict[str, str]]
) -> None:
    for _ in range(3):
        runs = [server.start(*QUANTIZE, cwd=place) for _ in range(8)]
        codes = sorted(each.wait().code for each in runs)
        assert codes[0] == 0
        assert set(codes[1:]) <= {73, 75}
        assert contents(place / "out") == expected["nf4"]
        assert left_beside(place) == {"out"}
        clear(place)


def test_a_second_run_is_refused_before_it_plans(server: Server, place: Path) -> None:
    """Planning may take minutes; the other run's lock and an existing output are seen first."""
    stuck = "open('stuck', 'w').close(); time.sleep(60)"
    first = server.start(*QUANTIZE, cwd=place, at=0, only=("reserve",), act=stuck)
    while not (place / "stuck").exists():
        time.sleep(0.01)
    no_plan = "import qz.quantize.convert as c; c.plan_quantization = None"
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


# A source that changes

CHANGED: dict[str, tuple[str, int, str]] = {
    "touched": ("os.utime(file)", 65, "changed while it was read"),
    "longer": ("open(file, 'ab').write(b'x')", 65, "changed while it was read"),
    "overwritten": ("open(file, 'r+b').write(bytes(8))", 65, "changed while it was read"),
    "truncated": ("os.truncate(file, 5000)", 65, "truncated|changed while it was read"),
    "replaced": ("open('new', 'wb').write(open(file, 'rb').read()); os.replace('new', file)", 65, "changed while"),
    "gone": ("os.unlink(file)", 66, "does not exist|vanished while it was read"),
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


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("way", CHANGED)
def test_a_source_that_changes_during_the_run_is_named_and_makes_no_output(
    server: Server, place: Path, own_source: Path, models: Path, way: str, moment: str
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
        assert f"source.files.{FILE}" in again.stderr
        again = server.run(*QUANTIZE, "--no-resume", cwd=place)
    assert again.code == 0, again.stderr
    assert contents(place / "out") == contents(models / "nf4")


def test_a_source_that_changed_between_two_runs_is_refused_naming_the_file(
    server: Server, place: Path, own_source: Path, expected: dict[str, dict[str, str]]
) -> None:
    assert server.run(*QUANTIZE, cwd=place, at=5, only=("rename",)).code == -signal.SIGKILL
    os.utime(own_source / FILE)
    ended = server.run(*QUANTIZE, cwd=place)
    check(ended)
    assert ended.code == 73
    assert f"source.files.{FILE}: [" in ended.stderr
    assert server.run(*QUANTIZE, "--no-resume", cwd=place).code == 0
    assert contents(place / "out") == expected["nf4"]


# Another run than the interrupted one

OTHER: dict[str, tuple[tuple[str, ...], str, str]] = {
    "another method": (("--int8",), "", 'settings.method.name: "nf4" → "int8"'),
    "another dtype": (("--dtype", "float16"), "", 'settings.dtype: "auto" → "float16"'),
    "another skip": (("--skip", "mlp"), "", 'settings.skips: [] → ["mlp"]'),
    "another qz": ((), "import qz; qz.__version__ = '9.9'", '→ "9.9"'),
    "another torch": (
        (),
        "import importlib.metadata as m; m.version = lambda n, old=m.version: '9.9' if n == 'torch' else old(n)",
        "versions.torch:",
    ),
    "another device": (
        (),
        "import qz.quantize.devices as d; d.arithmetic_on = lambda _, gpu=d.Cpu('cuda', 'NVIDIA H100'): gpu",
        'device: "cpu" → "cuda (NVIDIA H100)"',
    ),
}


def interrupt(run: Run) -> None:
    """A run that is killed after a few shards."""
    assert run(*QUANTIZE, at=5, only=("rename",)).code == -signal.SIGKILL


@pytest.mark.parametrize("what", OTHER)
def test_another_run_into_the_same_place_is_refused_naming_the_difference(
    run: Run, place: Path, expected: dict[str, dict[str, str]], what: str
) -> None:
    interrupt(run)
    options, patch, difference = OTHER[what]
    ended = run(*QUANTIZE, *options, before=patch)
    assert ended.code == 73
    assert f"{place}/out.partial holds an interrupted run that differs: " in ended.stderr
    assert difference in ended.stderr
    assert "Repeat that run to continue it, or start over with --no-resume." in ended.stderr
    again = run(*QUANTIZE)
    assert "Continuing: " in again.stderr
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
def test_a_run_from_the_hub_that_is_killed_is_continued(
    server: Server, place: Path, expected: dict[str, dict[str, str]]
) -> None:
    resumed = 0
    for number in range(8):
        assert server.run(*HUB, cwd=place, at=number, only=("rename",)).code == -signal.SIGKILL
        ended = server.run(*HUB, cwd=place)
        check(ended)
        assert ended.code == 0, ended.stderr
        resumed += "Continuing" in ended.stderr
        assert same_weights(place / "out", expected["nf4"])
        clear(place)
    assert resumed


@pytest.mark.usefixtures("repository")
def test_bytes_that_arrived_wrong_never_get_into_an_output_not_even_by_resuming(
    server: Server, place: Path, hub: HubServer, expected: dict[str, dict[str, str]]
) -> None:
    """A weight file arrives with a wrong byte. The run is killed at a rename, or ends with the error; and goes on."""
    refused = 0
    for number in (*range(8), 99):
        fault = hub.fail("cdn", nth=5 + number % 4, times=1, corrupt=True)
        ended = server.run(*HUB, cwd=place, at=number, only=("rename",))
        hub.faults.remove(fault)
        assert ended.code in (-signal.SIGKILL, 65), ended.stderr
        if ended.code == 65:
            refused += 1
            assert "arrived with another content than the Hub lists" in ended.stderr
        assert not (place / "out").exists()
        again = server.run(*HUB, cwd=place)
        assert again.code == 0, again.stderr
        assert same_weights(place / "out", expected["nf4"])
        clear(place)
    assert refused


@pytest.mark.usefixtures("repository")
def test_an_interrupt_while_the_hub_is_silent_ends_soon(
    server: Server, place: Path, hub: HubServer, expected: dict[str, dict[str, str]]
) -> None:
    fault = hub.fail("cdn", nth=5, stall=20)
    running = server.start(*HUB, cwd=place)
    time.sleep(1)
    begun = time.monotonic()
    running.kill(signal.SIGINT)
    ended = running.wait()
    hub.faults.remove(fault)
    check(ended)
    assert ended.code == 130
    assert time.monotonic() - begun < 3
    assert left_beside(place) <= {"out.partial", "out.partial.journal"}
    assert server.run(*HUB, cwd=place).code == 0
    assert same_weights(place / "out", expected["nf4"])
