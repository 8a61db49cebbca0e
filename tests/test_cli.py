"""The command line: what it offers, how it fails, and how fast it starts."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import qz as package
from conftest import Qz
from pace import HANG
from qz import QzError
from qz.cli.app import EXAMPLES, app, explain
from qz.cli.options.values import parse_size
from qz.quantize.methods import FourBit, Int8
from qz.quantize.settings import Settings

GROUP: Any = typer.main.get_command(app())
ERRORS = {error.__name__: error for error in QzError.__subclasses__()}

# A command that behaves as its argument says, under the app's own error handling.
SCRIPT = """
import os, signal, sys, time
import qz.cli.app
from qz.cli.entry import main
from qz.cli.options.reports import JsonOpt
from qz.formats.output.storage.signals import defer_signals

def act(what: str, as_json: JsonOpt = False) -> None:
    if what == "sleep":
        try:
            print("ready", flush=True)
            time.sleep(3600)
        except KeyboardInterrupt as stop:
            stop.add_note("It goes on later.")
            raise
    if what == "stubborn":
        while True:
            try:
                print("ready", flush=True)
                time.sleep(3600)
            except KeyboardInterrupt:
                print("still here", flush=True)
    if what == "twice, deferred":
        with defer_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            print("put down", flush=True)
    if what == "twice":
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
            print("put down", flush=True)
            raise
    if what == "bug":
        raise ZeroDivisionError("hf_" + "aB3" * 12)
    if what == "long":
        raise qz.MalformedInput(*(f"line {i} \\x1b[31m" for i in range(20)))
    if what == "write":
        for _ in range(10_000):
            print("x" * 100)
    print("done")

sys.modules["qz.cli.commands.act"] = sys.modules[__name__]
qz.cli.app.COMMANDS["act"] = "Act."
qz.cli.app.EXAMPLES["act"] = ()
main()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "act.py"
    path.write_text(SCRIPT)
    return path


def act(script: Path, *arguments: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), "act", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False, **keywords)


@pytest.mark.parametrize(
    "name", ["quantize", "inspect", "dequantize", "push", "calibrate", "compare", "merge", "verify", "attest"]
)
def test_the_contracts_commands_are_there(name: str) -> None:
    assert name in GROUP.commands


@pytest.mark.parametrize("name", GROUP.commands)
def test_every_command_and_every_option_has_help(name: str) -> None:
    command = GROUP.commands[name]
    assert len(command.help.split()) >= 4
    for param in command.params:
        assert param.help, param.name
        assert param.help.endswith("."), param.name
    options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    assert 2 <= len(EXAMPLES[name]) <= 3
    for program, verb, *words in map(shlex.split, EXAMPLES[name]):
        assert (program, verb) == ("qz", name)
        assert {word for word in words if word.startswith("-")} <= options


def test_an_option_means_the_same_in_every_command() -> None:
    """Options are declared once. Where some mean another thing, they say so: --output is a file of `qz calibrate`."""
    helps: dict[str, set[str]] = {}
    for command in GROUP.commands.values():
        for param in command.params:
            for name in param.opts if param.param_type_name == "option" else ():
                helps.setdefault(name, set()).add(param.help)
    assert {name for name, texts in helps.items() if len(texts) > 1} <= {
        *("--subfolder", "--dtype", "--revision", "--output", "-o", "--overwrite", "--against", "--importance"),
        *("--scores", "--method", "--experts"),  # `qz calibrate` makes them, for a method; and records experts
    }


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (
            "quantize",
            """--nf4 --fp4 --int8 --subfolder --revision -o --output --double-quant --compute-dtype --threshold --skip
            --no-default-skips --dtype --max-shard-size --device --threads --dry-run --json --quiet --overwrite
            --resume --no-resume --push""",
        ),
        ("inspect", "--subfolder --revision --json --tensors --filter"),
        ("dequantize", "--dtype --output --subfolder --revision --max-shard-size --device --json"),
        (
            "push",
            "--subfolder --private --public --revision --branch --create-pr --message --json --dry-run",
        ),
    ],
)
def test_the_contracts_options_are_there(command: str, names: str) -> None:
    params = GROUP.commands[command].params
    offered = {name for param in params for name in (*param.opts, *param.secondary_opts)}
    assert set(names.split()) <= offered


def test_defaults_are_the_contracts() -> None:
    defaults = {param.name: param.default for param in GROUP.commands["quantize"].params}
    shown = {param.name: param.show_default for param in GROUP.commands["quantize"].params}
    assert shown["compute_dtype"] == FourBit("nf4").compute_dtype == "bfloat16"
    assert float(shown["threshold"]) == Int8().threshold == 6.0
    assert parse_size(shown["max_shard_size"]) == Settings(None).max_shard_bytes == 1_000_000_000
    assert defaults["dtype"] == defaults["device"] == "auto"
    assert defaults["resume"] is True
    assert defaults["if_exists"] == "error"


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("500 mb", 500 * 10**6), ("2GiB", 2 * 2**30), ("1.5GB", 1_500_000_000), ("4096", 4096)],
)
def test_sizes_are_read_as_the_libraries_read_them(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5 PBs", "5GB5", "1e9", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="5GB, 500MB or 2GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "x", "--nf4", "--int8"], "--nf4 and --int8 exclude each other"),
        (["quantize", "x", "--nf4", "--fp4", "--int8"], "--nf4 and --fp4 and --int8 exclude each other"),
        (["quantize", "x", "--dtype", "float15"], "'auto', 'float16', 'bfloat16', 'float32'"),
        (["quantize", "x", "--compute-dtype", "int8"], "'bfloat16', 'float16', 'float32'"),
        (["quantize", "x", "--if-exists", "maybe"], "'error', 'skip', 'overwrite'"),
        (["quantize", "x", "--device", "gpu"], "auto, cpu, cuda, cuda:N, xpu, xpu:N, mps"),
        (["quantize", "x", "--max-shard-size", "big"], "5GB, 500MB or 2GiB"),
        (["quantize", "x", "--threads", "0"], "not a number of threads from 1 to 1024"),
        (["quantize", "x", "--threshold", "six"], "--threshold"),
        (["quantize", "x", "--nf5"], "No such option: --nf5"),
        (["--quiet", "quantize", "x"], "Options come after the command"),
        (["quantize"], "Missing argument 'SOURCE'"),
        (["quantize", "x", "y"], "unexpected extra argument"),
        (["quantise", "x"], "Did you mean 'quantize'"),
        (["quantize", "x", "--component", "a=int9"], "NAME=METHOD"),
        (["quantize", "x", "--components", "a,,b"], "transformer,text_encoder_2"),
        (["quantize", "x", "--overwrite", "--if-exists", "skip"], "exclude each other"),
    ],
)
def test_wrong_use_is_answered_with_what_is_right(
    qz_here: Qz, arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    result = qz_here(*arguments, "--json")
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) <= 5
    assert "Traceback" not in result.stderr
    *before, last = result.stdout.splitlines()
    assert before == []
    assert json.loads(last) == {"type": "exit_error", "code": 2, "message": json.loads(last)["message"]}
    assert os.listdir(tmp_path) == ["x"]


def test_qz_alone_shows_its_help_and_fails(qz: Qz) -> None:
    result = qz()
    assert result.returncode == 2
    assert "quantize" in result.stdout


def test_the_version_is_shown(qz: Qz) -> None:
    result = qz("--version")
    assert (result.returncode, result.stdout) == (0, f"qz {package.__version__}\n")


@pytest.mark.parametrize(("flag", "width"), [("--help", 40), ("-h", 60), ("-h", 72)])
def test_help_reads_well_in_a_narrow_pipe(qz: Qz, flag: str, width: int) -> None:
    result = qz("quantize", flag, COLUMNS=str(width), TERMINAL_WIDTH=str(width))
    assert result.returncode == 0
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "--no-default-skips" in result.stdout, "whole names"
    assert "…" not in result.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_in_a_narrow_terminal_can_be_pasted(qz: Qz, name: str) -> None:
    result = qz(name, "--help", COLUMNS="40", TERMINAL_WIDTH="40")
    shown = result.stdout.partition("Examples:")[2]
    assert max(map(len, shown.splitlines())) <= 40
    pasted = [shlex.split(example.replace("\\\n", "")) for example in shown.strip().split("\n\n")]
    assert pasted == [shlex.split(example) for example in EXAMPLES[name]]


SIGNS_OF_LIFE = """
import sys
from qz.cli import progress
from qz.cli.app import run

class Stop(BaseException): ...

def show(display, step):
    shown.append((step.doing, sorted(heavy & set(sys.modules))))
    if step.doing == until:
        raise Stop

progress.Display.__call__ = show
heavy = {"torch", "huggingface_hub.hf_api", "transformers", "diffusers", "bitsandbytes"}
source = sys.argv[1]
for until, command in (
    ("Planning", ["quantize", source, "-o", "out"]),
    ("Planning", ["inspect", source, "--plan"]),
    *(("Reading headers", [*arguments]) for arguments in (
        ["inspect", "some/model"], ["dequantize", source, "-o", "out"], ["push", source, "some/model"],
        ["calibrate", source, "-o", "file"], ["compare", source, source], ["merge", "out"],
    )),
):
    shown = []
    try:
        run(command)
    except Stop:
        pass
    assert shown[0][0] == "Reading headers" and shown[-1][0] == until, (command, shown)
    assert not any(imported for _, imported in shown), (command, shown)
"""


def test_each_command_says_what_it_does_before_it_imports_the_libraries(tiny_llama: Path, tmp_path: Path) -> None:
    code = [sys.executable, "-c", SIGNS_OF_LIFE, str(tiny_llama)]
    ended = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(("name", "code"), [(e.__name__, e.exit_code) for e in ERRORS.values()])
def test_every_error_of_qz_has_its_documented_exit_code(name: str, code: int) -> None:
    documented = (Path(__file__).parent.parent / "docs/reference/exit-codes.md").read_text()
    assert explain(ERRORS[name]("what, where, why, what next")) == (code, "what, where, why, what next")
    assert f"| {code} |" in documented


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 77),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), 66),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 74),
        (OSError(errno.EIO, "Input/output error", "/x"), 74),
        (ConnectionResetError("reset"), 69),
        (TimeoutError("timed out"), 69),
        (MemoryError(), 75),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 78),
        (ModuleNotFoundError("No module named 'qz.quantize.nothing'", name="qz.quantize.nothing"), 1),
        (RuntimeError("what"), 1),
    ],
)
def test_what_the_core_did_not_foresee_still_has_an_exit_code(error: Exception, code: int) -> None:
    found, message = explain(error)
    assert found == code
    assert message.endswith((".", "shows."))


def test_a_bug_says_that_it_is_one_and_hides_its_traceback(script: Path) -> None:
    result = act(script, "bug", "--json")
    assert result.returncode == 1
    assert "bug in qz" in result.stderr
    assert "Traceback" not in result.stderr
    assert "aB3" not in result.stdout + result.stderr
    assert json.loads(result.stdout)["code"] == 1


def test_debug_shows_the_traceback_wherever_it_stands(script: Path) -> None:
    for arguments in (["bug", "--debug"], ["--debug", "bug"]):
        result = act(script, *arguments)
        assert result.returncode == 1
        assert "Traceback (most recent call last)" in result.stderr
        assert "ZeroDivisionError" in result.stderr
        assert "aB3" * 3 not in result.stderr


def test_a_long_message_is_cut_on_stderr_and_whole_in_json(script: Path) -> None:
    result = act(script, "long", "--json")
    assert result.returncode == 65
    assert len(result.stderr.splitlines()) == 5
    assert "16 more lines" in result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    assert "line 19" in json.loads(result.stdout)["message"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_with_its_code_and_says_how_to_go_on(script: Path, number: int, code: int) -> None:
    command = [sys.executable, str(script), "act", "sleep", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == code
    assert err == "Error: Interrupted. It goes on later.\n"
    assert json.loads(out) == {"type": "exit_error", "code": code, "message": "Interrupted. It goes on later."}


@pytest.mark.parametrize("what", ["twice", "twice, deferred"])
def test_an_interrupt_that_comes_twice_at_once_is_one(script: Path, what: str) -> None:
    """A terminal sends it to all, and ``uv run``, ``npm`` or ``timeout`` hands on what it got."""
    result = act(script, what)
    assert (result.returncode, result.stdout, result.stderr) == (130, "put down\n", "Error: Interrupted.\n")


def test_the_second_interrupt_ends_at_once(script: Path) -> None:
    command = [sys.executable, str(script), "act", "stubborn"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "still here\n"
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)  # the command would go on for an hour
    process.communicate(timeout=HANG)
    assert process.returncode == 143


def test_an_ignored_signal_stays_ignored(script: Path) -> None:
    """As under nohup, or in the background of a script."""
    command = [sys.executable, str(script), "act", "sleep"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HANG)
    assert process.returncode == 143


def test_a_reader_that_goes_away_is_no_bug(script: Path) -> None:
    command = f"{sys.executable} {script} act write | head -n 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=HANG, check=False)
    assert result.returncode == 74
    assert result.stdout == "x" * 100 + "\n"
    assert result.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_an_io_error(script: Path) -> None:
    command = f"{sys.executable} {script} act write > /dev/full"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=HANG, check=False)
    assert result.returncode == 74
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_ascii_terminal_does_not_fail_a_run(script: Path) -> None:
    result = act(script, "long", env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 65
    assert "\n... and 16 more lines" in result.stderr


def asked(line: str, shell: str) -> dict[str, str]:
    """The environment in which ``shell`` runs qz to ask what it offers after ``line``."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    of_typer = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    return {"_QZ_COMPLETE": f"complete_{shell}", **words, **of_typer}


def offered(said: str) -> list[str]:
    return [re.sub(r"^plain,", "", entry) for entry in said.split()]


@pytest.fixture
def complete(qz_here: Qz, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What the shell offers after a line."""

    def complete(line: str, shell: str = "bash") -> list[str]:
        with monkeypatch.context() as patch:
            for name, value in asked(line, shell).items():
                patch.setenv(name, value)
            ended = qz_here()
        assert ended.returncode == 0, ended.stderr
        return offered(ended.stdout)

    return complete


def test_completion_works_as_a_shell_asks_for_it(qz: Qz) -> None:
    assert offered(qz(**asked("qz quan", "bash")).stdout) == ["quantize"]


def test_completion_knows_commands_folders_and_components(tmp_path: Path, complete: Callable[..., list[str]]) -> None:
    for component in ("transformer", "text_encoder"):
        (tmp_path / "flux" / component).mkdir(parents=True)
        (tmp_path / "flux" / component / "config.json").write_text("{}")
    (tmp_path / "flux" / "scheduler").mkdir()
    assert complete("qz quan") == ["quantize"]
    assert complete("qz quantize fl") == ["flux"]
    assert complete("qz quantize flux --subfolder ") == ["text_encoder", "transformer"]
    assert complete("qz quantize flux --subfolder tr") == ["transformer"]
    assert complete("qz quantize nothing --subfolder ") == []
    assert "--double-quant" in complete("qz quantize flux --dou")


OFFERED = {
    "qz quantize flux --device ": {"auto", "cpu", "cuda", "xpu", "mps"},
    "qz calibrate flux --device cp": {"cpu"},
    "qz quantize flux --method ": {"nf4", "fp4", "int8"},
    "qz quantize flux --if-exists ": {"error", "overwrite", "skip"},
    "qz dequantize flux --dtype bf": {"bfloat16"},
    "qz inspect flux --for vl": {"vllm"},
}
"""By line what completion offers."""


@pytest.mark.parametrize(
    ("shell", "lines"),
    [
        ("bash", list(OFFERED)),
        *((shell, ["qz quantize flux --device ", "qz inspect flux --for vl"]) for shell in ("zsh", "fish")),
    ],
    ids=["bash", "zsh", "fish"],
)
def test_completion_knows_the_values_of_options(
    shell: str, lines: list[str], complete: Callable[..., list[str]]
) -> None:
    for line in lines:
        found = set(re.findall(r"[\w:-]+", " ".join(complete(line, shell))))
        assert OFFERED[line] <= found - {"_arguments"}


def test_completion_can_be_shown_for_installation(qz: Qz) -> None:
    result = qz("--show-completion", SHELL="/bin/bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert result.returncode == 2  # without detection the shell is named
    result = qz("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert result.returncode == 0
    assert "_QZ_COMPLETE" in result.stdout


def test_a_run_with_few_file_descriptors_starts(qz: Qz) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        assert qz("--version").returncode == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"),
            False,
        ),
        (ValueError("out of memory"), False),
    ],
)
def test_every_way_to_run_out_of_memory_is_worth_another_try(error: Exception, is_memory: bool) -> None:
    code, message = explain(error)
    assert (code == 75) is is_memory
    assert message.startswith("Out of memory") is is_memory


def test_a_step_whose_length_is_not_known_yet_is_only_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qz.cli import progress
    from qz.progress import Progress

    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.Display() as display:
        display(Progress("Reading headers"))
        display(Progress("Generating", 12, unit="block"))
        display(Progress("Calibrating", 3, 57, unit="block"))
    assert capsys.readouterr().err == "Reading headers …\nGenerating: 12 blocks …\nCalibrating: block 3 of 57\n"
