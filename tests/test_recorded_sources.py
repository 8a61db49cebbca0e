"""A source that qz wrote: what is made of it is made of the bytes that its record names, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import HubServer, connected
from pipelines import flux
from qz import MalformedInput, QzError, api
from qz.formats.files import promised
from qz.formats.output.recorded.record import RECORD
from readers import model_folder

ON_CPU: dict[str, Any] = {"device": "cpu", "threads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of three layouts, their sources, and one made back. Not to be changed by a test."""
    place = tmp_path_factory.mktemp("recorded")
    model_folder("llama-untied", place / "llama")
    api.quantize(place / "llama", place / "single", device="cpu")
    api.quantize(place / "llama", place / "shards", device="cpu", max_shard_bytes=30_000)
    api.quantize(flux(place / "flux"), place / "pipeline", device="cpu", components=("transformer",))
    api.dequantize(place / "single", place / "back", device="cpu")
    return place


@pytest.fixture(params=[promised.SMALL, 4096], ids=["hashed at once", "hashed beside"])
def _hashed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promised, "SMALL", request.param)


def files_of(output: Path) -> list[str]:
    return [file["name"] for file in json.loads((output / RECORD).read_text())["files"]]


def flip(file: Path) -> None:
    """Turn over one bit, which depends on the file's name; of weights, beyond the header."""
    data = bytearray(file.read_bytes())
    first = len(data) // 2 if file.suffix == ".safetensors" else 0
    at = first + sum(file.name.encode()) * 7919 % (len(data) - first)
    data[at] ^= 1 << at % 8
    file.write_bytes(data)


def flipped(output: Path, copy: Path, name: str) -> Path:
    shutil.copytree(output, copy)
    flip(copy / name)
    return copy


def refused(file: Path | str, make: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(QzError) as raised:
        make(*arguments, **options)
    assert raised.value.exit_code == 65
    message = str(raised.value)
    assert f"{file} is not as qz wrote it" in message
    assert "`qz verify`" in message
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("_hashed")
@pytest.mark.parametrize("layout", ["single", "shards", "pipeline"])
def test_one_bit_anywhere_in_any_file_is_refused(place: Path, tmp_path: Path, layout: str) -> None:
    names = files_of(place / layout)
    if layout == "pipeline":  # one of each kind: weights that change and that are kept, and what is carried along
        names = ["model_index.json", "transformer/config.json", *(name for name in names if "_pytorch_model" in name)]
        names += ["tokenizer/vocab.json", "text_encoder/model.safetensors", "LICENSE.md"]
    for number, name in enumerate(names):
        copy = flipped(place / layout, tmp_path / str(number), name)
        refused(copy / name, api.dequantize, copy, tmp_path / "out", **ON_CPU)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        (tmp_path / "out.partial.journal").unlink(missing_ok=True)


@pytest.mark.usefixtures("_hashed")
def test_whoever_reads_the_weights_refuses(place: Path, tmp_path: Path) -> None:
    weights = "model.safetensors"
    output = flipped(place / "single", tmp_path / "quantized", weights)
    original = flipped(place / "back", tmp_path / "plain", weights)
    out = tmp_path / "out"
    refused(output / weights, api.compare, place / "llama", output, tokens=32, device="cpu")
    refused(original / weights, api.compare, original, place / "single", tokens=32, device="cpu")
    refused(original / weights, api.calibrate, original, out, tokens=32, device="cpu")
    refused(original / weights, api.quantize, original, out, **ON_CPU)
    refused(original / weights, api.dequantize, place / "single", out, against=original, **ON_CPU)
    assert not out.exists()


@pytest.mark.parametrize("at", [5, 20, 300, 700])
def test_a_large_file_whose_header_is_damaged_is_one_that_qz_verify_tells_of(
    place: Path, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promised, "SMALL", 4096)
    copy = Path(shutil.copytree(place / "single", tmp_path / "copy"))
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[at] ^= 1 << at % 8
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(MalformedInput, match=r"`qz verify .*`"):
        api.dequantize(copy, tmp_path / "back", device="cpu")
    assert [problem.kind for problem in api.verify(copy).problems] == ["hash-differs"]


def test_a_component_is_compared_with_the_record_of_the_whole(place: Path, tmp_path: Path) -> None:
    copy = flipped(place / "pipeline", tmp_path / "copy", "transformer/diffusion_pytorch_model.safetensors")
    file = copy / "transformer/diffusion_pytorch_model.safetensors"
    for source, subfolder in ((copy, "transformer"), (copy / "transformer", None)):
        told = refused(file, api.dequantize, source, tmp_path / "out", subfolder=subfolder, **ON_CPU)
        assert str(copy / RECORD) in told
    refused(file, api.compare, place / "flux", copy, steps=1, resolution=16, device="cpu")


def test_what_is_not_read_does_not_matter_and_a_folder_without_its_record_is_taken_as_it_is(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promised, "SMALL", 4096)
    copy = flipped(place / "single", tmp_path / "copy", "model.safetensors")
    (copy / "README.md").write_text("mine")
    api.dequantize(copy, tmp_path / "out", dry_run=True, **ON_CPU)  # reads headers alone
    assert not api.inspect(copy).errors
    (copy / RECORD).unlink()
    (tmp_path / RECORD).write_text("of another program")
    api.dequantize(copy, tmp_path / "out", **ON_CPU)
    intact = Path(shutil.copytree(place / "single", tmp_path / "intact"))
    (intact / "README.md").write_text("mine")
    api.dequantize(intact, tmp_path / "back", **ON_CPU)
    assert (tmp_path / "back/model.safetensors").read_bytes() == (place / "back/model.safetensors").read_bytes()


def test_weights_that_were_not_there_are_not_taken(place: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(place / "shards", tmp_path / "copy"))
    shutil.copy(place / "single/model.safetensors", copy)
    with pytest.raises(QzError, match="was not there when qz finished"):
        api.dequantize(copy, tmp_path / "out", **ON_CPU)


def test_a_run_keeps_nothing_that_was_made_of_a_damaged_file(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promised, "SMALL", 4096)
    names = [name for name in files_of(place / "shards") if name.endswith(".safetensors")]
    copy = flipped(place / "shards", tmp_path / "copy", names[-1])
    refused(copy / names[-1], api.dequantize, copy, tmp_path / "out", max_shard_bytes=30_000, **ON_CPU)
    (tmp_path / "copy" / names[-1]).write_bytes((place / "shards" / names[-1]).read_bytes())
    api.dequantize(copy, tmp_path / "out", max_shard_bytes=30_000, resume=False, **ON_CPU)
    assert api.verify(tmp_path / "out", place / "shards", **ON_CPU).intact


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with connected(monkeypatch, tmp_path / "home", xet=False) as hub:
        yield hub


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json", "generation_config.json"])
def test_a_repository_is_compared_with_its_record(place: Path, tmp_path: Path, hub: HubServer, name: str) -> None:
    """Whose files are as the Hub lists them, but not as qz wrote them; streamed, and from the cache."""
    copy = flipped(place / "shards", tmp_path / "copy", name)
    hub.add("me/damaged", {path.name: path.read_bytes() for path in copy.iterdir()})
    hub.add("me/intact", {path.name: path.read_bytes() for path in (place / "shards").iterdir()})
    refused(name, api.dequantize, "me/damaged", tmp_path / "out", **ON_CPU)
    refused(name, api.dequantize, "me/damaged", tmp_path / "out", download=True, **ON_CPU)
    api.dequantize("me/intact", tmp_path / "out", **ON_CPU)
    api.dequantize("me/intact", tmp_path / "again", download=True, **ON_CPU)
    for cached in (tmp_path / "home/hub").glob(f"models--me--intact/snapshots/*/{name}"):
        flip(cached.resolve())
        refused(name, api.dequantize, "me/intact", tmp_path / "third", **ON_CPU)
