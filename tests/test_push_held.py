"""What is pushed is what was verified, whatever becomes of the folder meanwhile."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from hub_server import HubServer, connected
from qz import MalformedInput, OutputRefused
from qz.formats.output.recorded.record import RECORD, WrittenFile, encode_record
from qz.formats.publish.destination import Destination
from qz.formats.publish.push import push
from qz.formats.publish.verified_file import VerifiedFile
from qz.formats.tensors.safetensors_layout import encode_header, layout

SECRET = b"-----BEGIN OPENSSH PRIVATE KEY-----"
WEIGHTS = "model.safetensors"
FILES = {
    WEIGHTS: encode_header(layout([("weight", "U8", (300_000,))])) + bytes(range(250)) * 1_200,
    "config.json": b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with connected(monkeypatch, tmp_path / "home") as hub:
        yield hub


def make(folder: Path, *, recorded: bool = True) -> Path:
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    if recorded:
        written = [WrittenFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()]
        (folder / RECORD).write_bytes(encode_record(written, {}))
    return folder


def sent(hub: HubServer) -> bytes:
    """All bytes that reached the Hub."""
    inline = [
        base64.b64decode(line["value"]["content"])
        for body in hub.commit_bodies
        for line in body
        if line["key"] == "file"
    ]
    return b"".join([*inline, *(blob.read() for blob in hub.objects.values())])


def rewrite(name: str, folder: Path) -> None:
    """Other bytes of the same length, and the times set back."""
    path = folder / name
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-20:] = SECRET[:20]
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_link(name: str, folder: Path) -> None:
    (folder.parent / "secret").write_bytes(SECRET)
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent / "secret")


def replace_folder(name: str, folder: Path) -> None:
    aside = folder.rename(folder.with_name(f"{folder.name}-aside"))
    shutil.copytree(aside, folder)
    (folder / name).write_bytes(SECRET)


def replace_by_fifo(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


ACTS = (rewrite, replace_by_link, replace_folder, replace_by_fifo)
HERE = [
    (rewrite, "config.json", True),
    (rewrite, WEIGHTS, True),
    (replace_by_link, WEIGHTS, True),
    (replace_folder, "config.json", True),
    (replace_by_fifo, WEIGHTS, True),
    (replace_by_link, "config.json", False),
]
"""What `make test` tries: each act, on a file in the commit and on one that is uploaded, with a record and without."""


@pytest.mark.parametrize(
    ("act", "name", "recorded"),
    [
        *HERE,
        *(
            pytest.param(act, name, recorded, marks=pytest.mark.soak)
            for act, name, recorded in product(ACTS, ("config.json", WEIGHTS), (True, False))
            if (act, name, recorded) not in HERE
        ),
    ],
)
def test_what_changes_at_any_question_to_the_hub_is_not_committed(
    hub: HubServer, tmp_path: Path, act: Callable[[str, Path], None], name: str, recorded: bool
) -> None:
    push(make(tmp_path / "count", recorded=recorded), Destination("me/count"))
    questions = sum(hub.requests.values())
    committed = 0
    for number in range(1, questions + 1):
        folder, repo_id = make(tmp_path / str(number), recorded=recorded), f"me/new-{number}"
        hub.faults.clear()
        hub.commit_bodies.clear()
        hub.fail("*", nth=number, times=1, before=lambda folder=folder: act(name, folder))
        refused = None
        try:
            push(folder, Destination(repo_id))
        except OutputRefused as error:
            refused = str(error)
        if refused is None:  # it was asked about the commit, or to make it
            committed += 1
            assert FILES.items() <= hub.repos[repo_id].files().items()
        else:
            assert re.match(rf"{re.escape(str(folder))}/\S+ changed during the push. Nothing was committed", refused)
            assert hub.commit_bodies == []
        assert SECRET[:20] not in sent(hub)
    assert 0 < committed < questions / 2


def test_what_changes_between_verification_and_the_first_question_is_not_committed(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, moments = make(tmp_path / "made"), 0

    def progress(now: Any) -> None:
        nonlocal moments
        moments += 1
        if now.doing == "Verifying" and now.bytes == sum(map(len, FILES.values())):
            rewrite("config.json", folder)

    with pytest.raises((OutputRefused, MalformedInput), match="changed"):
        push(folder, Destination("me/new"), progress=progress)
    assert moments
    assert hub.commit_bodies == []


def test_a_file_is_the_same_only_as_long_as_nothing_about_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    file = VerifiedFile.of(path)
    assert file.read() == b"content"
    assert file.hashed() == hashlib.sha256(b"content").hexdigest()
    before = path.stat()
    path.write_bytes(b"CONTENT")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for use in (file.read, file.require_same, file.hashed):
        with pytest.raises(OutputRefused, match="changed during the push"):
            use()


def test_a_pushed_model_has_the_files_that_quantizing_would_carry(hub: HubServer, tmp_path: Path) -> None:
    """What belongs to a model is decided in one place, also for a checkpoint that qz has no record of."""
    folder = make(tmp_path / "made", recorded=False)
    belong = ["tekken.json", "vocab.bpe", "source.spm", "modules.json", "COPYING", "LICENSE", "chat_template.jinja"]
    strangers = ["LICENSE.env", "NOTICE-credentials.json", "id_rsa", "token", ".env", "aws_config.json"]
    for name in [*belong, *strangers]:
        (folder / name).write_text(json.dumps([]))
    for name in ("1_Pooling/config.json", "additional_chat_templates/rag.jinja"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    result = push(folder, Destination("me/new"))
    there = hub.repos["me/new"].files().keys()
    assert there >= {*FILES, *belong, "1_Pooling/config.json", "additional_chat_templates/rag.jinja"}
    assert set(result.left_out) == set(strangers)
