"""Parts that share no folder: each sends its weights to the Hub and leaves a receipt; the merge makes one commit."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch
import yaml

from commands import contents
from forked import Runner
from hub_server import HubServer, connected
from pushes import hurry
from qz import MissingInput, OutputRefused, UsageError, api
from qz.quantize.methods import Int8

PAGE = Path(__file__).parent.parent / "docs/how-to/many-machines.md"
SETTINGS: dict[str, Any] = {"device": "cpu", "threads": 2, "max_shard_bytes": 200_000}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    hurry(monkeypatch)
    with connected(monkeypatch, tmp_path / "home") as hub:
        yield hub


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 MB in four files, with a tokenizer of which one file is large."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("hub-parts") / "source"
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000, tie_word_embeddings=False, dtype="bfloat16"))
    model.bfloat16().save_pretrained(folder, max_shard_size="500KB")
    (folder / "tokenizer.json").write_text("{" + " " * (1 << 20) + "}")
    return folder


def on_its_own(source: Path, place: Path, number: int, count: int, **more: Any) -> Path:
    """A part on a machine of its own; its receipt."""
    how = {"push": "me/model", "push_only": True, "part": f"{number}/{count}"}
    api.quantize(source, place / f"machine-{number}" / "out", **{**SETTINGS, **how, **more})
    return place / f"machine-{number}" / "out.parts" / f"{number}-of-{count}"


def gathered(receipts: list[Path], place: Path) -> Path:
    for receipt in receipts:
        shutil.copytree(receipt, place / "out.parts" / receipt.name)
    return place / "out"


def files_of(hub: HubServer, repo: str) -> dict[str, bytes]:
    return {name: data for name, data in hub.repos[repo].files().items() if name != ".gitattributes"}


@pytest.mark.parametrize("count", [1, 3])
def test_parts_that_share_nothing_make_the_commit_of_one_run(
    hub: HubServer, source: Path, tmp_path: Path, count: int
) -> None:
    api.quantize(source, tmp_path / "one", **SETTINGS)
    whole = contents(tmp_path / "one")

    receipts = [on_its_own(source, tmp_path, number, count) for number in range(1, count + 1)]
    assert all(not name.endswith(".safetensors") for receipt in receipts for name in contents(receipt))
    assert not any(name.endswith(".safetensors") for name in files_of(hub, "me/model")), (
        "nothing shows before the merge"
    )
    output = gathered(receipts, tmp_path / "merge")
    with pytest.raises(UsageError, match="--push me/model"):
        api.merge(output)
    with pytest.raises(UsageError, match="not to me/other"):
        api.merge(output, push="me/other")

    merged = api.merge(output, push="me/model")

    assert merged.pushed is not None
    assert (merged.parts, merged.as_json()["output"], merged.pushed.private) == (count, None, True)
    there = files_of(hub, "me/model")
    assert there.pop("README.md")
    assert there == whole
    assert list((tmp_path / "merge").iterdir()) == [], "neither receipts nor an output are left"


def test_the_workflow_on_the_page_makes_the_commit_of_one_run(
    hub: HubServer, source: Path, tmp_path: Path, forks: Runner
) -> None:
    """As GitHub runs it: a job for each value of the matrix, in folders of their own, and artifacts between them."""
    workflow = next(
        yaml.safe_load(block)
        for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
        if "jobs:" in block
    )
    hub.add("org/model", {path.name: path.read_bytes() for path in source.iterdir()})
    part, merge = workflow["jobs"]["part"], workflow["jobs"]["merge"]
    environment = {**workflow["env"], "COMMIT": hub.repos["org/model"].refs["main"]}
    numbers = part["strategy"]["matrix"]["part"]
    assert numbers == list(range(1, len(numbers) + 1))
    assert merge["needs"] == "part"
    artifacts = tmp_path / "artifacts"

    def expanded(text: str, number: int) -> str:
        return Template(text.replace("${{ matrix.part }}", str(number))).substitute(environment)

    def job(steps: list[dict[str, Any]], place: Path, number: int = 0) -> None:
        place.mkdir()
        for step in steps:
            action, told = step.get("uses", "").partition("@")[0], step.get("with", {})
            if action == "actions/upload-artifact":
                shutil.copytree(place / expanded(told["path"], number), artifacts / expanded(told["name"], number))
            elif action == "actions/download-artifact":
                shutil.copytree(artifacts, place / told["path"])
            elif not step["run"].startswith("pip install "):
                words = shlex.split(expanded(step["run"], number))
                settings = ["--max-shard-size", "200KB", "--device", "cpu"] if words[1] == "quantize" else []
                done = runner.run(*words[1:], *settings, cwd=place)
                assert done.code == 0, done.stderr

    settings = {name: value for name, value in os.environ.items() if name.startswith("HF_")}
    runner = forks.within(**{**settings, "HF_HUB_OFFLINE": "0"})
    for number in numbers:
        job(part["steps"], tmp_path / f"job-{number}", number)
    job(merge["steps"], tmp_path / "merge")

    api.quantize(source, tmp_path / "one", **SETTINGS)
    there, whole = files_of(hub, environment["REPOSITORY"]), contents(tmp_path / "one")
    weights = {name for name in whole if name.endswith(".safetensors")}
    assert len(weights) == len(numbers)
    assert {name: there[name] for name in weights} == {name: whole[name] for name in weights}
    assert there.keys() == whole.keys() | {"README.md"}


def test_a_part_that_was_sent_is_not_sent_again(hub: HubServer, source: Path, tmp_path: Path) -> None:
    receipt = on_its_own(source, tmp_path, 2, 3)
    before = contents(receipt), sum(hub.bytes_in.values())
    assert on_its_own(source, tmp_path, 2, 3) == receipt
    assert contents(receipt) == before[0]
    assert sum(hub.bytes_in.values()) - before[1] < 10_000
    with pytest.raises(OutputRefused, match="method"):
        on_its_own(source, tmp_path, 2, 3, method=Int8())


def test_the_merge_names_the_receipts_that_are_missing(hub: HubServer, source: Path, tmp_path: Path) -> None:
    receipts = [on_its_own(source, tmp_path, number, 3) for number in (1, 2, 3)]
    output = gathered(receipts[:2], tmp_path / "merge")
    with pytest.raises(MissingInput, match="Part 3 of 3 is missing"):
        api.merge(output, push="me/model")
    gathered(receipts[2:], tmp_path / "merge")
    assert api.merge(output, push="me/model").parts == 3


def test_a_merge_on_one_disk_can_publish_too(hub: HubServer, source: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        api.quantize(source, tmp_path / "out", part=f"{number}/2", **SETTINGS)
    merged = api.merge(tmp_path / "out", push="me/both")
    assert merged.pushed is not None
    there = files_of(hub, "me/both")
    assert there.pop("README.md")
    assert there == contents(tmp_path / "out")
