"""Every file that is read whole has a limit, and what is no file is not waited for."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from qz import QzError, api
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.preflight import check_interrupted
from qz.formats.output.resuming.journal import Journal
from qz.formats.output.storage.directory import Directory
from qz.formats.output.storage.disk import Disk
from qz.formats.publish.checkpoint_files import own_files
from qz.formats.publish.push import _card_here

HUGE = 20_000_000_000
MEMORY = 150_000_000
"""Above the largest limit, that of an index, twice."""


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_llama, tmp_path / "model")
    return tmp_path / "model"


def inspect(folder: Path) -> None:
    found = api.inspect(folder, verify=(folder / "qz.json").exists()).as_json()
    if found["problems"]:
        raise QzError(str(found["problems"]))


def plan(folder: Path) -> None:
    api.quantize(folder, folder.parent / "out", dry_run=True, device="cpu")


def card(folder: Path) -> None:
    _card_here(LocalFolder(folder))


def own(folder: Path) -> None:
    own_files(LocalFolder(folder))


READERS: list[tuple[str, Callable[[Path], None]]] = [
    ("config.json", inspect),
    ("config.json", plan),
    ("config.json", own),
    ("model_index.json", inspect),
    ("model.safetensors.index.json", inspect),
    ("generation_config.json", plan),
    ("qz.json", inspect),
    ("qz.json", own),
    ("README.md", card),
]


@pytest.mark.parametrize(("name", "read"), READERS)
@pytest.mark.parametrize("what", ["sparse", "fifo"])
def test_a_file_of_20_gb_and_a_fifo_are_refused_at_once(
    name: str, read: Callable[[Path], None], what: str, folder: Path
) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if name.endswith("index.json"):
        (folder / ("config.json" if name == "model_index.json" else "model.safetensors")).unlink()
    if what == "fifo":
        os.mkfifo(path)
    else:
        sparse(path)
    tracemalloc.start()
    try:
        if what == "fifo" and name in ("generation_config.json", "qz.json", "README.md") and read is not inspect:
            read(folder)  # it can do without, and a FIFO is no file
        else:
            with pytest.raises(QzError):
                read(folder)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        try:
            file.truncate(HUGE)
        except OSError:
            pytest.skip("this file system has no files of 20 GB")


def test_a_journal_of_20_gb_is_none(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_bytes(b"x")
    journal = tmp_path / "out.partial.journal"
    sparse(journal)
    tracemalloc.start()
    try:
        with (
            Directory.at(Disk(), tmp_path) as folder,
            pytest.raises(QzError, match="is 20,000,000,000 bytes long, so it is not a journal of qz"),
        ):
            Journal(folder, journal.name, None)
        check_interrupted(tmp_path / "out", {}, Disk())
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert journal.stat().st_size == HUGE
