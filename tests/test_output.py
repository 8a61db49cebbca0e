"""What people and scripts read is safe, true to size, and fits where it is shown."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pace import HANG
from qz.cli import app, output
from qz.cli.output import (
    Column,
    display_width,
    duration,
    facts,
    json_pieces,
    jsonable,
    markdown_table,
    percent,
    plain,
    size,
    table,
)
from qz.cli.progress import Display
from qz.progress import Progress

STEERING = (
    "\x00\x07\x08\r\n\x1b\x7f\x85\x9b\u061c\u200b\u200e\u202a\u202e\u2028\u2029\u2066\u2069\ufeff\udc80\U000e0001"
)


@pytest.mark.parametrize("character", STEERING)
def test_no_character_that_steers_a_terminal_is_shown(character: str) -> None:
    shown = plain(f"model{character}weight")
    assert character not in shown
    assert shown.startswith("model\\")


@given(st.text(alphabet=st.characters()))
def test_whatever_a_file_holds_is_shown_on_one_printable_line(text: str) -> None:
    shown = plain(text)
    assert not any(c in STEERING for c in shown)
    assert len(shown.splitlines()) <= 1
    assert "\x1b" not in shown


def test_ordinary_names_are_shown_as_they_are() -> None:
    for name in ("model.layers.0.self_attn.q_proj.weight", "模型", "modèle", "[bold]x[/bold]", "a [link=file:///]b"):
        assert plain(name) == name


@pytest.mark.parametrize("name", ["::stop-commands::x", "  ::add-mask::x", "##[error]x", "a ##[group]"])
def test_a_name_cannot_command_a_github_runner(name: str) -> None:
    shown = plain(name)
    assert "##[" not in shown
    assert not shown.lstrip().startswith("::")


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-of-the-environment")
    looks_like_one = "hf_" + "aB3" * 12
    output.say(f"401 for canary-of-the-environment, {looks_like_one}")
    output.show({"message": f"Bearer {looks_like_one}"}, as_json=True, text="")
    out, err = capsys.readouterr()
    assert "canary" not in out + err
    assert "aB3" not in out + err
    assert json.loads(out)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (999_949, "1000 kB"),
        (23_802_816_640, "23.8 GB"),
        (6_691_000_000, "6.69 GB"),
        (10**15, "1.00 PB"),
    ],
)
def test_sizes_are_decimal_with_three_digits(count: int, text: str) -> None:
    assert size(count) == text.replace("1000 kB", "1.00 MB")


def test_durations_and_shares_read_well() -> None:
    assert [duration(s) for s in (0.04, 9.9, 42.4, 185, 7800)] == ["0.0 s", "9.9 s", "42 s", "3 min 5 s", "2 h 10 min"]
    assert [percent(*p) for p in ((1, 2), (0, 1), (1, 1), (99_999, 100_000), (1, 100_000), (1, 0))] == [
        "50.0 %",
        "0.0 %",
        "100.0 %",
        "99.99 %",
        "0.00 %",
        "–",
    ]


COLUMNS = (Column("Tensor", foldable=True), Column("DType"), Column("Parameters", right=True))
ROWS = (
    ("model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4", "U8", 12),
    ("模型.weight", "BF16", 123_456_789),
    ("x", "F32", 1),
)


@pytest.mark.parametrize("width", range(20, 201))
def test_a_table_fits_every_width_and_loses_nothing(width: int) -> None:
    text = table(COLUMNS, ROWS, width)
    assert max(map(display_width, text.split("\n"))) <= width
    shown = Counter("".join(text.split()))
    assert all(shown >= Counter("".join(map(str, row))) for row in ROWS)
    assert sum(Counter("".join("".join(map(str, row)) for row in ROWS)).values()) <= shown.total()


def test_a_table_in_a_pipe_is_as_wide_as_it_needs_to_be() -> None:
    assert table(COLUMNS, ROWS).split("\n") == [
        "Tensor                                                                DType  Parameters",
        "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4  U8             12",
        "模型.weight                                                           BF16    123456789",
        "x                                                                     F32             1",
    ]


@pytest.mark.parametrize("width", [24, 40, 80])
def test_facts_fold_their_values(width: int) -> None:
    text = facts([("Source", "a/very/long/path/that/does/not/fit/on/one/line"), ("Bytes", "1 GB")], width)
    assert max(map(len, text.split("\n"))) <= width
    assert "Bytes   1 GB" in text


def test_markdown_cells_hold_no_markup() -> None:
    text = markdown_table((Column("Name"), Column("Bytes", right=True)), [("[x](http://a) | <img> `b` \n# c", 5)])
    assert text.split("\n") == [
        "| Name | Bytes |",
        "| --- | ---: |",
        r"| \[x\]\(http://a\) \| \<img\> \`b\` \\n\# c | 5 |",
    ]


@dataclass(frozen=True)
class Part:
    path: Path
    loss: float
    names: tuple[str, ...]


def test_dataclasses_become_json_that_every_parser_reads() -> None:
    value = {"part": Part(Path("a"), float("nan"), ("x", "\udc80")), "set": {2, 1}}
    assert jsonable(value) == {"part": {"path": "a", "loss": None, "names": ["x", "\udc80"]}, "set": [1, 2]}
    assert json.dumps(jsonable(value), allow_nan=False).isascii()
    with pytest.raises(TypeError, match="object has no JSON form"):
        jsonable(object())


def test_a_summary_that_cannot_be_written_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    output.write_step_summary("| a |")
    output.write_step_summary("| b |")
    assert page.read_text() == "| a |\n\n| b |\n\n"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    output.write_step_summary("| c |")
    assert "was not written" in capsys.readouterr().err


def test_progress_in_a_log_is_one_line_per_shard(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        for number in range(1, 101):
            shard = f"model-0000{number // 50}-of-00002.safetensors" if number % 50 == 0 else None
            display(Progress("Quantizing", number, 100, number * 10**6, 10**8, file=shard))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 2
    assert "Quantizing: 50.0 MB of 100 MB, tensor 50 of 100" in err
    assert "model-00001-of-00002.safetensors written" in err


def test_progress_tells_only_of_what_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """A calibration counts blocks; a check of files from elsewhere, bytes."""
    for step in (Progress("Calibrating", 4, 31, unit="block"), Progress("Verifying", bytes=10**6, all_bytes=10**7)):
        Display().write(step)
    assert capsys.readouterr().err == "Calibrating: block 4 of 31\nVerifying: 1.00 MB of 10.0 MB\n"


def test_the_last_line_of_a_log_is_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        display(Progress("Quantizing", 1, 10, 10**6, 10**7, file="model-00001-of-00002.safetensors"))
        display(Progress("Quantizing", 10, 10, 10**7, 10**7))
    assert capsys.readouterr().err.splitlines()[-1].startswith("Quantizing: 10.0 MB of 10.0 MB, tensor 10 of 10")
    with suppress(ZeroDivisionError), Display() as display:
        display(Progress("Quantizing", 1, 10, 10**6, 10**7, file="model-00001-of-00002.safetensors"))
        display(Progress("Quantizing", 2, 10, 2 * 10**6, 10**7))
        raise ZeroDivisionError
    assert capsys.readouterr().err.count("\n") == 1


def test_what_a_run_took_counts_from_the_start_of_its_process() -> None:
    code = (
        "import time; begun = time.monotonic(); time.sleep(0.3)\n"
        "from qz.cli.progress import since_start\n"
        "print(since_start() - (time.monotonic() - begun))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) > -0.1
    assert output.took(2.0, "cpu", 10**9) == "2.0 s on cpu (500 MB/s)"
    assert output.took(2.0, "cpu", 0) == "2.0 s on cpu"


def test_what_is_told_is_broken_at_words_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "/a/very/long/path/that-is-not-to-be-broken/because/it/could/not/be/copied/then/from/the/terminal"
    line = f"Error: {path} does not exist. " + "Give a local folder, or a repository on the Hub. " * 3
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    parts = output.wrapped(line)
    assert " ".join(parts) == line.strip()
    assert all(len(part) <= 60 or part == path for part in parts)
    output.warn("only 47% of the parameters are quantized; 11,948,928 stay in float32")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("are quantized;")
    assert second == "11,948,928 stay in float32"
    output.warn("the proxy refuses it with Authorization: Bearer abcdefghijklmnop")
    assert "abcdef" not in capsys.readouterr().err, "where a line ends hides no token"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert output.wrapped(line) == [line]


def test_on_windows_one_sentence_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr("signal.SIGALRM")
    for arguments in ([], ["--help"], ["inspect", "x"]):
        assert app.run(arguments) == 78
        assert capsys.readouterr().err.startswith("Error: qz runs on Linux and macOS. On Windows, use WSL")


def test_a_run_that_continues_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        display(Progress("Quantizing", 0, 10, 0, 10**7, kept=(3, 7)))
        display(Progress("Quantizing", 1, 10, 10**6, 10**7))
    assert capsys.readouterr().err == "Continuing: 3 of 7 shards are done.\n"


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(quiet=True) as display:
        display(Progress("Quantizing", 1, 1, 1, 1, file="model.safetensors"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_progress_in_a_terminal_is_a_bar_that_goes_away(columns: int) -> None:
    code = (
        "from qz.cli.progress import Display\n"
        "from qz.progress import Progress\n"
        "with Display() as d:\n"
        "    for i in range(50):\n"
        "        d(Progress('Quantizing', i, 50, i * 10**9, 50 * 10**9))\n"
        "    d(Progress('Generating', 49, unit='block'))\n"
        "    d(Progress('Calibrating', 49, 57, unit='block'))\n"
    )
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", code], stderr=follower, env=environment, check=True, timeout=HANG)
    os.close(follower)
    shown = io.BytesIO()
    try:
        while chunk := os.read(leader, 65536):
            shown.write(chunk)
    except OSError:
        pass  # the other end is closed
    os.close(leader)
    assert "━" in shown.getvalue().decode()
    assert shown.getvalue().rstrip().endswith(b"\x1b[2K")
    if columns >= 60:
        assert b"49/57 blocks" in shown.getvalue(), "what is not counted in bytes is not shown in them"


@pytest.mark.parametrize("count", [0, 1, 1000, 1001, 2500])
def test_a_report_that_is_written_in_pieces_is_the_same_text(count: int) -> None:
    value = {"a": 1, "tensors": [{"name": f"t{n}", "shape": (n, 2)} for n in range(count)], "é": ("x",), "last": {}}
    pieces = list(json_pieces(value))
    assert "".join(pieces) == json.dumps(jsonable(value))
    assert max(map(len, pieces)) < 60_000
    assert "".join(json_pieces({})) == "{}"
