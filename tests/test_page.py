"""The report as one HTML page: complete, escaped, readable without a screen, and in need of nothing else."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

import pipelines
from qz import IOFailed
from qz.cli.output import Column
from qz.cli.reports.markup import chart, columns, facts, page, section, table
from qz.cli.reports.new_file import store
from readers import model_folder, some_text

Qz = Callable[..., subprocess.CompletedProcess[str]]
ALONE = {"meta"}
"""Elements without an end."""
HOSTILE = '</td><script src="https://evil.example/x.js"></script>&lt;"\' \x1b[31m'


class Reader(HTMLParser):
    """The elements of a page, its text by element, and whether every element is closed where it should be."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def test_text_of_files_is_text_wherever_it_stands() -> None:
    document = page(
        HOSTILE,
        facts([(HOSTILE, HOSTILE)]),
        section(
            HOSTILE,
            table(HOSTILE, (Column(HOSTILE), Column("", right=True)), [(HOSTILE, 1)]),
            chart(HOSTILE, [(HOSTILE, 1.0, HOSTILE)]),
            columns(HOSTILE, [(HOSTILE, 0.0)]),
        ),
    )
    read = Reader(document)
    assert {tag for tag, _ in read.elements} & {"script", "img", "a", "link", "iframe"} == set()
    assert "\x1b" not in document
    assert "".join(read.text["h1"]) == HOSTILE.replace("\x1b", "\\x1b")
    for _, attributes in read.elements:
        assert not [name for name in attributes if name.startswith("on")]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_text(tmp_path_factory.mktemp("words") / "words.txt", 200)


def test_a_run_and_a_comparison_write_pages_that_need_nothing_else(
    forked_qz: Qz, tiny_llama: Path, tmp_path: Path, words: Path
) -> None:
    source = model_folder("llama-untied", tmp_path / "<model>")
    run = forked_qz(
        "quantize", source, "-o", "a&b", "--report", "--page", "a&b/report.html", "--json", "--device", "cpu"
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    compared = forked_qz(
        *("compare", source, "a&b", "--tokens", "64", "--text", words, "--device", "cpu", "--page", "compared.html")
    )
    assert compared.returncode == 0, compared.stderr
    for file in ("a&b/report.html", "compared.html"):
        document = (tmp_path / file).read_text()
        read = Reader(document)
        policy = next(each["content"] for tag, each in read.elements if each.get("http-equiv"))
        assert policy == "default-src 'none'; style-src 'unsafe-inline'"
        assert not re.search(r"https?:|url\(|@import|src=|href=", document)
        assert str(tmp_path) not in document
        assert {"html", "title", "h1", "main", "table", "caption", "svg", "figcaption"} <= {t for t, _ in read.elements}
        assert all(each.get("scope") for tag, each in read.elements if tag == "th")
        assert all(each.get("role") == "img" for tag, each in read.elements if tag == "svg")
        cells = read.text["td"]
        for layer in told["loss"]["layers"]:
            assert layer["name"] in cells
            assert f"{layer['relative_error']:.4f}" in cells
    written = (tmp_path / "a&b/report.html").read_text()
    cells = Reader(written).text["td"]
    assert {f"{told['bytes']['source']:,}", f"{told['bytes']['output']:,}", *told["skipped"]} <= set(cells)
    assert "model.layers.1" in Reader((tmp_path / "compared.html").read_text()).text["td"]


def test_the_page_of_a_pipeline_has_every_layer_and_no_place_of_a_component(forked_qz: Qz, tmp_path: Path) -> None:
    pipelines.flux(tmp_path / "flux")
    run = forked_qz("quantize", "flux", "-o", "out", "--report", "--page", "page.html", "--json", "--device", "cpu")
    assert run.returncode == 0, run.stderr
    text = Reader((tmp_path / "page.html").read_text()).text
    assert {
        layer["name"]
        for part in json.loads(run.stdout)["components"]
        if part["loss"]
        for layer in part["loss"]["layers"]
    } <= set(text["td"])
    assert "on the Hub only" not in text["td"]
    assert text["th"].count("output") == 1


def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    forked_qz: Qz, tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "there.html").write_text("mine")
    for place, code, why in (
        ("there.html", 73, "there.html exists"),
        ("nowhere/page.html", 73, "nowhere is not a folder"),
        ("x/../out", 2, "cannot be the page and the output"),
    ):
        for dry in ([], ["--dry-run"]):
            done = forked_qz("quantize", "model", "-o", "out", "--page", place, *dry)
            assert done.returncode == code
            assert why in done.stderr
            assert not (tmp_path / "out").exists()
    assert (tmp_path / "there.html").read_text() == "mine"
    done = forked_qz("quantize", "model", "-o", "out", "--page", "out/page.html", "--dry-run")
    assert (done.returncode, (tmp_path / "out").exists()) == (0, False)
    assert "the run would write out/page.html" in done.stderr
    done = forked_qz("compare", "model", "model", "--page", "one.html", "--picture", "./one.html")
    assert done.returncode == 2


def test_a_page_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(IOFailed, match="cannot be written"):
            store(tmp_path / "page.html", "x" * 5000, "--page")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
