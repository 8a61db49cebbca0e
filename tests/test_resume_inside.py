"""An interrupted run of one shard: what is kept of it, and that the next run ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from forked import INTERRUPT, Ended, Runner
from mixtures import mixture
from pipelines import flux
from qz.quantize.importance.hessian_reader import HessianPlace
from qz.quantize.importance.statistics import InputSums, write_hessians, write_statistics
from reference import tensors_of

KEEP_EVERY = 6000
"""Bytes: of the smallest linear's output a few, so that a run of one shard keeps something a dozen times."""
QUANTIZE = ("quantize", "source", "-o", "out", "--threads", "1", "--report")
SEARCH = (*QUANTIZE, "--scales", "search")
WAYS: dict[str, tuple[str, ...]] = {
    "nf4": QUANTIZE,
    "nf4-double": (*QUANTIZE, "--double-quant"),
    "int8": (*QUANTIZE, "--int8"),
    "search-double": (*SEARCH, "--double-quant"),
    "gptq": (*SEARCH, "--importance", "statistics.safetensors", "--rounding", "gptq"),
    "lora": (*QUANTIZE, "--lora", "adapter:0.5", "--lora", "other/adapter_model.safetensors"),
    "experts": ("quantize", "mixture", *QUANTIZE[2:], "--experts"),
    "dequantize": ("dequantize", "quantized", "-o", "out", "--threads", "1", "--against", "source"),
}
STORES = ("write", "fsync", "rename")
FROM_RUN_TO_RUN = {"seconds", "resumed", "bytes_read"}
FILE = "model.safetensors"
PARTIAL = f"out.partial/{FILE}.tmp"
REST = re.compile(r"Continuing: 0 of 1 shard is done, and ([\d.]+) kB of the rest\.")

Run = Callable[..., Ended]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def files(folder: Path) -> dict[str, str]:
    """Those below a folder, but for the record, which says when it was made."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def figures(ended: Ended) -> dict[str, Any]:
    """What a run says of itself, but for what differs from run to run."""
    assert ended.code == 0, ended.stderr
    return {key: value for key, value in json.loads(ended.stdout).items() if key not in FROM_RUN_TO_RUN}


def write_adapter(folder: Path, linears: Iterable[str], base: Path, seed: int) -> None:
    """A LoRA of the linear layers, as PEFT saves one."""
    random, weights = torch.Generator().manual_seed(seed), tensors_of(base)
    tensors = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight": torch.randn(shape, generator=random) / 10
        for name in linears
        for side, shape in (("A", (2, weights[name].shape[1])), ("B", (weights[name].shape[0], 2)))
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def models(tiny_llama: Path, forks: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, statistics of its inputs with Hessians, and the model quantized."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_llama, folder / "source")
    linears = {name: each.shape[1] for name, each in tensors_of(tiny_llama).items() if "_proj" in name}
    inputs = {
        name: np.random.default_rng(number).standard_normal((256, columns)).astype(np.float32)
        for number, (name, columns) in enumerate(linears.items())
    }
    hessians = {name: each.T @ each for name, each in inputs.items()}
    digest = write_hessians(folder / "hessians.safetensors", hessians)
    sums = {name: InputSums(each.diagonal().astype(np.float64), 256) for name, each in hessians.items()}
    places = {name: HessianPlace("hessians.safetensors", f"{name}.hessian") for name in hessians}
    write_statistics(folder / "statistics.safetensors", sums, {}, places, {"hessians.safetensors": digest})
    mixture("gpt_oss", folder / "mixture")
    for number, name in enumerate(("adapter", "other")):
        write_adapter(folder / name, linears, tiny_llama, number)
    assert forks.run("quantize", "source", "-o", "quantized", cwd=folder).code == 0
    for way in ("search-double", "gptq"):  # their kernels are compiled once
        forks.warm(*WAYS[way], "--overwrite", cwd=folder)
    shutil.rmtree(folder / "out")
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Path:
    for path in models.iterdir():  # Hessians are not followed through links
        (tmp_path / path.name).symlink_to(path) if path.is_dir() else shutil.copy(path, tmp_path)
    return tmp_path


@pytest.fixture
def run(forks: Runner, place: Path) -> Run:
    return lambda *arguments, **how: forks.run(*arguments, **{"cwd": place, "keep_every": KEEP_EVERY, **how})


def kill_late(run: Run, *command: str) -> None:
    """Most of the shard is written, and it is not finished."""
    assert run(*command, at=60, only=("write",)).code == -signal.SIGKILL


@pytest.mark.parametrize(("kills", "least"), [(2, 2), pytest.param(12, 4, marks=pytest.mark.soak)])
@pytest.mark.parametrize("way", WAYS)
def test_kills_within_a_shard_then_the_same_bytes_and_the_same_figures(
    run: Run, place: Path, way: str, kills: int, least: int
) -> None:
    command, output = (*WAYS[way], "--json"), place / "out"
    undisturbed = run(*command, only=STORES)
    report, expected = figures(undisturbed), contents(output)
    assert "layers" in json.dumps(report)
    kept = []
    whole = undisturbed.operations.index(f"rename {place}/out.partial/{FILE}")
    for number in range(whole // kills, whole + 1, whole // kills):
        shutil.rmtree(output)
        assert run(*command, at=number, only=STORES).code == -signal.SIGKILL
        continued = run(*command)
        assert figures(continued) == report
        assert contents(output) == expected
        assert not (place / "out.partial.journal").exists()
        if found := REST.search(continued.stderr):
            assert json.loads(continued.stdout)["resumed"] is True
            kept.append(float(found[1]))
    assert kept == sorted(kept), "a later kill keeps as much"
    assert len(set(kept)) >= least


def test_a_run_that_is_killed_again_and_again_comes_to_its_end(run: Run, place: Path) -> None:
    assert run(*QUANTIZE).code == 0
    expected = contents(place / "out")
    shutil.rmtree(place / "out")
    kills = 0
    while (ended := run(*QUANTIZE, at=25, only=("write",))).code != 0:
        assert ended.code == -signal.SIGKILL
        kills += 1
        assert kills < 30, "each run gets farther than the one before"
    assert kills > 2
    assert contents(place / "out") == expected


HEARD = f"""
import sys, time
{INTERRUPT}
while sys.unraisablehook.__self__.first is None:  # of the command's ``Interruption``
    time.sleep(0.01)
time.sleep(0.5)
"""
"""The thread that writes goes on only when the one that is interrupted has heard of it."""


def test_an_interrupted_run_says_that_it_keeps_a_part_and_goes_on_with_other_threads(run: Run, place: Path) -> None:
    ended = run(*QUANTIZE, at=60, only=("write",), act=HEARD)
    assert ended.code == 130
    told = "Error: Interrupted. Most of what was done of 1 shard is kept: run the same command again to continue, "
    assert ended.error == [told + "or start over with --no-resume."]
    assert {path.name for path in (place / "out.partial").iterdir()} == {f"{FILE}.tmp"}
    again = run(*QUANTIZE, "--threads", "3")
    assert again.code == 0
    assert REST.search(again.stderr)


def test_a_kill_while_the_whole_shard_is_read_back_keeps_almost_all_of_it(run: Run, place: Path) -> None:
    undisturbed = run(*QUANTIZE, only=("rename",))
    expected, size = contents(place / "out"), (place / "out" / FILE).stat().st_size
    assert undisturbed.operations[0].endswith(FILE)
    shutil.rmtree(place / "out")
    assert run(*QUANTIZE, at=0, only=("rename",)).code == -signal.SIGKILL
    continued = run(*QUANTIZE)
    found = REST.search(continued.stderr)
    assert found
    assert float(found[1]) * 1000 > 0.8 * size
    assert contents(place / "out") == expected


def test_what_is_damaged_is_noticed_and_made_again(run: Run, place: Path) -> None:
    assert run(*QUANTIZE).code == 0
    expected = contents(place / "out")
    shutil.rmtree(place / "out")
    kill_late(run, *QUANTIZE)
    whole = (place / PARTIAL).read_bytes()
    shutil.copytree(place / "out.partial", place / "saved")
    shutil.copy(place / "out.partial.journal", place / "saved.journal")
    before = float(REST.search(run(*QUANTIZE).stderr)[1])  # type: ignore[index]
    first = json.loads((place / "saved.journal").read_text().splitlines()[1].split(" ", 1)[1])["chunks"][0]
    for damage in ("a bit", "zeros", "cut off"):
        shutil.rmtree(place / "out")
        shutil.copytree(place / "saved", place / "out.partial")
        shutil.copy(place / "saved.journal", place / "out.partial.journal")
        with (place / PARTIAL).open("r+b") as file:
            file.seek(first[0])
            if damage == "cut off":
                file.truncate()
            else:
                file.write(bytes([whole[first[0]] ^ 1]) if damage == "a bit" else bytes(first[1] - first[0]))
        continued = run(*QUANTIZE)
        assert continued.code == 0, damage
        found = REST.search(continued.stderr)
        assert (float(found[1]) if found else 0) < before, damage
        assert contents(place / "out") == expected, damage


def test_a_journal_that_another_user_wrote_counts_for_nothing(run: Run, place: Path) -> None:
    kill_late(run, *QUANTIZE)
    other = {"environment": {"QZ_CACHE": str(place / "another-cache")}}
    continued = run(*QUANTIZE, **other)
    assert "Continuing" not in continued.stderr
    assert continued.code == 0
    assert "1 file of an interrupted run was made again: the journal's lines" in continued.stderr


def test_other_settings_are_refused_and_no_resume_starts_over(run: Run, place: Path) -> None:
    kill_late(run, *QUANTIZE)
    for dry in ((), ("--dry-run",)):
        refused = run(*QUANTIZE, "--double-quant", *dry)
        assert refused.code == 73
        assert "holds an interrupted run that differs: method use double quant: no → yes" in refused.stderr
    anew = run(*QUANTIZE, "--double-quant", "--no-resume")
    assert anew.code == 0
    assert "Continuing" not in anew.stderr


def test_an_interrupted_run_of_whole_shards_is_refused_even_where_no_shard_would_be_the_same(
    run: Run, place: Path
) -> None:
    sharded = (*QUANTIZE, "--max-shard-size", "20KB")
    assert run(*sharded, at=3, only=("rename",)).code == -signal.SIGKILL
    refused = run(*QUANTIZE)
    assert refused.code == 73
    assert "max shard bytes: 20,000 → " in refused.stderr or "max shard bytes: 20000 → " in refused.stderr


def test_a_lora_is_a_part_of_the_run_between_shards_too(run: Run, place: Path) -> None:
    command = (*QUANTIZE, "--max-shard-size", "60KB", "--lora")
    undisturbed = run(*command, "adapter", only=STORES)
    assert undisturbed.code == 0, undisturbed.stderr
    expected = contents(place / "out")
    shutil.rmtree(place / "out")
    second = [n for n, each in enumerate(undisturbed.operations, start=1) if each.startswith("rename")][1]
    assert run(*command, "adapter", at=second + 1, only=STORES).code == -signal.SIGKILL
    for other in ("other", "adapter:0.5"):
        refused = run(*command, other)
        assert refused.code == 73
        assert "holds an interrupted run that differs: loras 1" in refused.stderr
    continued = run(*command, "adapter", "--json")
    assert continued.code == 0, continued.stderr
    assert json.loads(continued.stdout)["resumed"] is True
    assert contents(place / "out") == expected
    shutil.rmtree(place / "out")
    assert run(*command, "adapter", at=second + 1, only=STORES).code == -signal.SIGKILL
    (place / "adapter").unlink()
    shutil.copytree(place / "other", place / "adapter")  # the name is the same, and what it holds is not
    refused = run(*command, "adapter")
    assert refused.code == 73
    assert "loras 1 sha256" in refused.stderr


def test_a_source_that_changed_meanwhile_is_named(run: Run, place: Path, models: Path) -> None:
    (place / "source").unlink()
    shutil.copytree(models / "source", place / "source")
    kill_late(run, *QUANTIZE)
    os.utime(place / "source" / FILE)
    refused = run(*QUANTIZE)
    assert refused.code == 73
    assert f"{FILE} has changed" in refused.stderr


def test_without_fsync_what_is_noted_is_kept_too_and_the_disk_is_not_waited_for(run: Run, place: Path) -> None:
    kill_late(run, *QUANTIZE, "--no-fsync")
    continued = run(*QUANTIZE, "--no-fsync")
    assert REST.search(continued.stderr)
    assert not any(operation.startswith("fsync ") for operation in continued.operations)


def test_what_is_noted_is_stored_before(run: Run, place: Path) -> None:
    """The data, and the name of its file, then the line of the journal."""
    operations = run(*QUANTIZE, only=STORES).operations
    journal, partial = f"write {place}/out.partial.journal", f"fsync {place}/{PARTIAL}"
    lines = [number for number, each in enumerate(operations) if each == journal][1:-1]  # the first: the fingerprint
    assert len(lines) > 5
    assert f"fsync {place}/out.partial" in operations[: lines[0]]
    for line in lines:
        stored = max(number for number, each in enumerate(operations[:line]) if each == partial)
        assert not any("out.partial/" in each for each in operations[stored + 1 : line] if each.startswith("write"))


PIPELINE = ("quantize", "pipeline", "-o", "out", "--threads", "1")
LATER = re.compile(r"Continuing: (\d+) of \d+ shards are done, and ([\d.]+) kB of the rest\.")


def test_a_kill_within_a_shard_of_a_later_component_keeps_the_earlier_ones_and_what_it_had_of_that(
    run: Run, place: Path
) -> None:
    flux(place / "pipeline")
    undisturbed = run(*PIPELINE, only=STORES)
    output = place / "out"
    expected = files(output)
    shards = [
        f"rename {place}/out.partial/{name}.safetensors"
        for name in ("text_encoder_2/model", "transformer/diffusion_pytorch_model")
    ]
    first, second = map(undisturbed.operations.index, shards)
    kept = []
    for number in (first + (second - first) // 2, second):
        shutil.rmtree(output)
        assert run(*PIPELINE, at=number, only=STORES).code == -signal.SIGKILL
        continued = run(*PIPELINE, only=STORES)
        assert continued.code == 0
        found = LATER.search(continued.stderr)
        assert found, continued.stderr
        assert found[1] == "1"
        kept.append(float(found[2]))
        assert shards[0] not in continued.operations, "the first component is not made again"
        assert shards[1] in continued.operations
        assert files(output) == expected
    assert 0 < kept[0] < kept[1]
