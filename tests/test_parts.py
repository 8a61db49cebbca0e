"""``--part`` and ``qz merge``: N runs make what one run makes, to the byte, whatever happens to them on the way."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from commands import contents
from forked import KILL, Runner
from pipelines import flux
from qz import MalformedInput, MissingInput, OutputRefused, TryAgain, UsageError, api
from qz.formats.output.shares import Share
from qz.quantize.array_task import parse_part
from qz.quantize.methods import FourBit, Int8, Method
from qz.quantize.reports.summary import Summary
from qz.quantize.streaming.output.shares import divided

SETTINGS: dict[str, Any] = {"device": "cpu", "threads": 2, "max_shard_bytes": 20_000}
PARTED = ("--max-shard-size", "20KB", "--threads", "1", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-layer Llama in several files, with a NaN that is kept, and a tokenizer of which one file is large."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=320, tie_word_embeddings=False, dtype="bfloat16")
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.layers[2].input_layernorm.weight.data[3] = float("nan")
    folder = tmp_path_factory.mktemp("parts") / "source"
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer.json").write_text(json.dumps({"padding": "x" * (1 << 20)}))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "LICENSE").write_text("You may.\n")
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux(tmp_path_factory.mktemp("parts") / "pipeline")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one run makes of the source."""
    output = tmp_path_factory.mktemp("whole") / "output"
    api.quantize(source, output, **SETTINGS)
    return contents(output)


def in_parts(make: Callable[..., Any], source: Path, output: Path, count: int, **settings: Any) -> list[Summary]:
    """Make every part, the last one first."""
    numbers = range(count, 0, -1)
    return [make(source, output, part=f"{number}/{count}", **{**SETTINGS, **settings}) for number in numbers]


def beside(output: Path) -> list[str]:
    """What there is beside the output but for what belongs to the test."""
    return sorted(name for name in os.listdir(output.parent) if name.startswith(f"{output.name}."))


# The invariant


def some(counts: Sequence[int], *here: int) -> list[Any]:
    """Those ``here``; make soak has all of them."""
    return [pytest.param(count, marks=[] if count in here else pytest.mark.soak) for count in counts]


@pytest.mark.parametrize("count", some(range(1, 8), 1, 2, 5))
def test_any_number_of_parts_makes_what_one_run_makes(
    source: Path, whole: dict[str, bytes], tmp_path: Path, count: int
) -> None:
    made = in_parts(api.quantize, source, tmp_path / "out", count)
    assert not (tmp_path / "out").exists()
    own = [shard.name for each in made for shard in each.shards]
    assert sorted(own) == sorted(name for name in whole if name.endswith(".safetensors")), "each file is made once"

    merged = api.merge(tmp_path / "out")

    assert contents(tmp_path / "out") == whole
    assert beside(tmp_path / "out") == []
    told = merged.as_json()
    assert (told["parts"], told["act"], told["up_to_date"]) == (count, "quantize", False)
    assert told["nonfinite"] == [{"name": "model.layers.2.input_layernorm.weight", "stored": 1, "overflowed": 0}]
    assert any("NaN" in warning for warning in told["warnings"])
    assert {shard["name"] for shard in told["shards"]} == set(own)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        (FourBit("nf4", double_quant=True), {}),
        (FourBit("fp4"), {"scales": "search"}),
        pytest.param(FourBit("nf4", double_quant=True), {"scales": "search"}, marks=pytest.mark.soak),
        (Int8(), {"dtype": "float16", "weights_only": True}),
    ],
)
def test_parts_of_every_method_make_what_one_run_makes(
    source: Path, tmp_path: Path, method: Method, more: dict[str, Any]
) -> None:
    api.quantize(source, tmp_path / "one", method=method, **SETTINGS, **more)
    in_parts(api.quantize, source, tmp_path / "out", 2, method=method, **more)
    api.merge(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_parts_with_importance_make_what_one_run_makes(source: Path, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    known, names = tmp_path / "imatrix.gguf", ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")
    writer = GGUFWriter(known, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["prose"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    random = np.random.default_rng(0)
    for layer in range(4):
        for name in names:
            sums = random.random((1, 64), np.float32) + 0.1
            writer.add_tensor(f"blk.{layer}.{name}.weight.in_sum2", sums)
            writer.add_tensor(f"blk.{layer}.{name}.weight.counts", np.array([[512]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    api.quantize(source, tmp_path / "one", importance=known, **SETTINGS)
    in_parts(api.quantize, source, tmp_path / "out", 2, importance=known)
    api.merge(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.mark.parametrize("count", some((1, 2, 3, 7), 2))
def test_parts_of_a_pipeline_make_what_one_run_makes(pipeline: Path, tmp_path: Path, count: int) -> None:
    how: dict[str, Any] = {"dtype": "float16", "component_methods": {"text_encoder_2": Int8()}}
    api.quantize(pipeline, tmp_path / "one", **SETTINGS, **how)
    made = in_parts(api.quantize, pipeline, tmp_path / "out", count, **how)
    api.merge(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    weights = (data for name, data in contents(tmp_path / "one").items() if name.endswith(".safetensors"))
    assert sum(part.bytes_output for part in made) == sum(map(len, weights))


def test_dequantizing_goes_in_parts_too(source: Path, tmp_path: Path) -> None:
    api.quantize(source, tmp_path / "small", **SETTINGS)
    api.dequantize(tmp_path / "small", tmp_path / "one", **SETTINGS)
    in_parts(api.dequantize, tmp_path / "small", tmp_path / "out", 2)
    api.merge(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


# Who makes what


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 12))
def test_parts_are_stretches_as_even_as_can_be(sizes: list[int], count: int) -> None:
    files = [(f"{number}", nbytes) for number, nbytes in enumerate(sizes)]
    owners = divided(files, count)
    numbers = [owners[name] for name, _ in files]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(1, len(set(numbers)) + 1))
    assert not numbers or numbers[-1] <= count
    loads = [sum(n for name, n in files if owners[name] == number) for number in range(1, count + 1)]
    assert max(loads) <= -(-sum(sizes) // count) + max(sizes, default=0)
    even = divided([(name, 5) for name, _ in files], count)
    counts = [list(even.values()).count(number) for number in range(1, count + 1)]
    assert max(counts) - min(counts) <= 1


def test_a_part_reads_its_share_only(source: Path, tmp_path: Path) -> None:
    [alone] = in_parts(api.quantize, source, tmp_path / "one", 1)
    made = in_parts(api.quantize, source, tmp_path / "out", 4)
    assert sum(each.bytes_read for each in made) <= alone.bytes_read * 1.1  # a tensor may end in two files
    assert max(each.bytes_read for each in made) < alone.bytes_read  # the large tokenizer is most of it


def test_a_dry_run_shows_the_files_of_the_part(source: Path, tmp_path: Path) -> None:
    shown = in_parts(api.quantize, source, tmp_path / "out", 3, dry_run=True)
    assert not (tmp_path / "out.parts").exists()
    made = in_parts(api.quantize, source, tmp_path / "out", 3)
    for planned, done in zip(shown, made, strict=True):
        assert [(file.name, file.bytes) for file in planned.shards] == [(file.name, file.bytes) for file in done.shards]
        assert planned.as_json()["part"] == done.as_json()["part"]
        assert planned.bytes_output == sum(file.bytes for file in done.shards)


@pytest.mark.parametrize(
    ("text", "environment", "part"),
    [
        ("3/7", {}, Share(3, 7)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "4", "MIN": "0", "MAX": "6", "COUNT": "7"}, Share(5, 7)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "4", "MIN": "1", "MAX": "4", "COUNT": "4"}, Share(4, 4)),
        ("auto/3", {"SLURM_ARRAY_TASK_ID": "8", "MIN": "4", "MAX": "8", "COUNT": "3"}, Share(3, 3)),
        ("auto/5", {"JOB_COMPLETION_INDEX": "0"}, Share(1, 5)),
        ("auto", {"CI_NODE_INDEX": "2", "CI_NODE_TOTAL": "4"}, Share(2, 4)),
        ("auto", {"CLOUD_RUN_TASK_INDEX": "2", "CLOUD_RUN_TASK_COUNT": "4"}, Share(3, 4)),
        ("auto", {"BATCH_TASK_INDEX": "0", "BATCH_TASK_COUNT": "4"}, Share(1, 4)),
        ("auto", {"AWS_BATCH_JOB_ARRAY_INDEX": "3", "AWS_BATCH_JOB_ARRAY_SIZE": "4"}, Share(4, 4)),
    ],
)
def test_the_part_is_what_was_said_or_what_the_engine_says(text: str, environment: dict[str, str], part: Share) -> None:
    assert parse_part(text, slurm(environment)) == part


@pytest.mark.parametrize(
    ("text", "environment", "why"),
    [
        ("0/3", {}, "1/N to N/N"),
        ("4/3", {}, "1/N to N/N"),
        ("3", {}, "not I/N"),
        ("1/0", {}, "1/N to N/N"),
        ("auto", {}, "no variable says so"),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}, "auto/N"),
        ("auto/2", {"JOB_COMPLETION_INDEX": "2"}, "1/N to N/N"),
        ("auto", {"CI_NODE_INDEX": "x", "CI_NODE_TOTAL": "4"}, "needs a number"),
        ("auto/3", {"CI_NODE_INDEX": "1", "CI_NODE_TOTAL": "4"}, "CI_NODE_TOTAL is 4"),
        # Two of seven tasks, started again: that they are parts of seven is no longer said.
        ("auto", {"SLURM_ARRAY_TASK_ID": "5", "MIN": "3", "MAX": "5", "COUNT": "2"}, "whole Slurm array"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "5", "MIN": "5", "MAX": "5", "COUNT": "1"}, "whole Slurm array"),
        ("auto/7", {"SLURM_ARRAY_TASK_ID": "0", "MIN": "0", "MAX": "1", "COUNT": "2"}, "whole Slurm array"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "1", "MIN": "1", "MAX": "9", "COUNT": "4"}, "whole Slurm array"),
        (
            "auto",
            {"CI_NODE_INDEX": "1", "CI_NODE_TOTAL": "4", "BATCH_TASK_INDEX": "3", "BATCH_TASK_COUNT": "4"},
            "disagree",
        ),
    ],
)
def test_a_part_that_cannot_be_told_is_refused(text: str, environment: dict[str, str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_part(text, slurm(environment))


def slurm(environment: dict[str, str]) -> dict[str, str]:
    """With the names that Slurm gives to MIN, MAX and COUNT."""
    short = ("MIN", "MAX", "COUNT")
    return {f"SLURM_ARRAY_TASK_{key}" if key in short else key: value for key, value in environment.items()}


# What goes wrong


def test_a_merge_names_what_is_missing(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(MissingInput, match="nothing to merge"):
        api.merge(output)
    api.quantize(source, output, part="2/4", **SETTINGS)
    with pytest.raises(MissingInput, match=r"Parts 1, 3, 4 of 4 are missing .* --part 1/4, and so on"):
        api.merge(output)
    for part in ("1/4", "4/4"):
        api.quantize(source, output, part=part, **SETTINGS)
    before = contents(tmp_path)
    with pytest.raises(MissingInput, match="Part 3 of 4 is missing"):
        api.merge(output)
    assert contents(tmp_path) == before


def test_a_name_that_no_part_can_have_is_named(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for number in (1, 2):
        api.quantize(source, output, part=f"{number}/2", **SETTINGS)
    for name in ("5-of-3", "0-of-2", "02-of-2", "1-of-20000", "5-of-3.partial.journal"):
        other = tmp_path / "out.parts" / name
        other.mkdir()
        why = rf"out.parts/{name.partition('.')[0]} is named like a part, but parts are 1-of-N to N-of-N.* move it away"
        with pytest.raises(MalformedInput, match=why):
            api.merge(output)
        with pytest.raises(MalformedInput, match=why):
            api.quantize(source, output, part="1/2", **SETTINGS)
        other.rmdir()


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"method": Int8()}, "method: nf4 → int8"),
    ({"max_shard_bytes": 30_000}, "max shard bytes"),
    ({"part": "2/3"}, "a part of 2, and this is one of 3"),
    ({"device": "cpu", "skip": ("lm_head",)}, "skips"),
]


def test_a_part_of_another_run_is_refused_at_once(source: Path, tmp_path: Path) -> None:
    api.quantize(source, tmp_path / "out", part="1/2", **SETTINGS)
    before = contents(tmp_path)
    for how, why in OTHERS:
        with pytest.raises(OutputRefused, match=why):
            api.quantize(source, tmp_path / "out", **{**SETTINGS, "part": "2/2", **how})
        assert contents(tmp_path) == before


def test_no_part_is_written_through_a_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "out.parts").symlink_to("others")
    for dry_run in (False, True):
        with pytest.raises(OutputRefused, match="is a symbolic link"):
            api.quantize(source, tmp_path / "out", part="1/2", dry_run=dry_run, **SETTINGS)
    assert not list((tmp_path / "others").iterdir())


def test_parts_that_were_brought_together_are_compared(source: Path, tmp_path: Path) -> None:
    """As after downloading them from machines that share no folder."""
    api.quantize(source, tmp_path / "out", part="1/2", **SETTINGS)
    api.quantize(source, tmp_path / "other", part="2/2", method=Int8(), **SETTINGS)
    shutil.move(tmp_path / "other.parts/2-of-2", tmp_path / "out.parts/2-of-2")
    with pytest.raises(MalformedInput, match=r"Parts 1/2 and 2/2 in .* were made differently: method: nf4 → int8"):
        api.merge(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_under_the_number_of_another_is_not_that_one(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """As after a download into the wrong folder: what is missing must not be taken for there."""
    for part in ("1/3", "2/3"):
        api.quantize(source, tmp_path / "out", part=part, **SETTINGS)
    shutil.copytree(tmp_path / "out.parts/1-of-3", tmp_path / "out.parts/3-of-3")
    before = contents(tmp_path)
    with pytest.raises(MalformedInput, match=r"3-of-3/part.json is damaged \(it is that of part 1/3\)"):
        api.merge(tmp_path / "out")
    assert contents(tmp_path) == before
    api.quantize(source, tmp_path / "out", part="3/3", **SETTINGS)
    api.merge(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_a_damaged_part_is_named_and_can_be_made_again(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    output, made = tmp_path / "out", tmp_path / "made"
    in_parts(api.quantize, source, output, 2)
    shutil.copytree(tmp_path / "out.parts", made)
    shard = next((tmp_path / "out.parts").rglob("*.safetensors"))
    part = shard.parent.name.replace("-of-", "/")
    with open(shard, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"spoil")
    before = contents(tmp_path)
    with pytest.raises(MalformedInput, match=rf"{shard.name} is damaged.*--part {part} --no-resume"):
        api.merge(output)
    assert contents(tmp_path) == before
    api.quantize(source, output, part=part, resume=False, **SETTINGS)
    api.merge(output)
    assert contents(output) == whole

    shutil.rmtree(output)
    made.rename(tmp_path / "out.parts")
    shard.unlink()
    with pytest.raises(MalformedInput, match="is missing"):
        api.merge(output)
    api.quantize(source, output, part=part, **SETTINGS)  # what is missing is seen without being told
    api.merge(output)
    assert contents(output) == whole


def test_a_finished_part_is_not_made_again(source: Path, tmp_path: Path) -> None:
    [first] = in_parts(api.quantize, source, tmp_path / "out", 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    [again] = in_parts(api.quantize, source, tmp_path / "out", 1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert (again.shards, again.nonfinite, again.resumed, again.bytes_read) == (first.shards, first.nonfinite, True, 0)


def test_an_output_that_is_there_is_replaced_only_when_told(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    api.quantize(source, output, method=Int8(), **SETTINGS)
    old = contents(output)
    with pytest.raises(OutputRefused, match="--overwrite"):
        api.quantize(source, output, part="1/2", **SETTINGS)
    in_parts(api.quantize, source, output, 2, if_exists="overwrite")
    assert contents(output) == old
    with pytest.raises(OutputRefused, match="--overwrite"):
        api.merge(output)
    api.merge(output, overwrite=True)
    assert contents(output) == whole
    assert api.merge(output).up_to_date


def test_files_that_are_not_of_the_parts_are_kept(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    in_parts(api.quantize, source, tmp_path / "out", 2)
    notes = (tmp_path / "out.parts/notes.txt", tmp_path / "out.parts/2-of-2/mine.txt")
    for note in notes:
        note.write_text("mine")
    api.merge(tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    assert contents(tmp_path / "out.parts") == {"notes.txt": b"mine", "2-of-2/mine.txt": b"mine"}


def test_what_parts_cannot_do_is_said(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="qz compare"):
        api.quantize(source, tmp_path / "out", part="1/2", measure_loss=True, **SETTINGS)
    with pytest.raises(UsageError, match="--push-only"):
        api.quantize(source, tmp_path / "out", part="1/2", push="me/model", **SETTINGS)


# Killed, repeated, and at the same time


def parted(number: int, count: int) -> tuple[str, ...]:
    return ("quantize", "source", "-o", "out", "--part", f"{number}/{count}", *PARTED)


@pytest.fixture
def place(source: Path, tmp_path: Path) -> Path:
    """A folder with the source in it."""
    (tmp_path / "source").symlink_to(source)
    return tmp_path


def test_a_part_that_is_killed_goes_on(forks: Runner, place: Path, whole: dict[str, bytes]) -> None:
    output = place / "out"
    for number in (1, 2):
        for at in range(3, 400, 29 if number == 1 else 61):
            if forks.run(*parted(number, 2), cwd=place, at=at, act=KILL, only=("write", "rename", "fsync")).code == 0:
                break
        else:
            pytest.fail("it never came to its end")
    merged = forks.run("merge", "out", cwd=place)
    assert merged.code == 0
    assert merged.stdout.split()[:2] == ["output", "out"], "as it was named"
    assert contents(output) == whole
    assert beside(output) == []


def test_a_part_at_the_same_time_as_itself_and_others(forks: Runner, place: Path, whole: dict[str, bytes]) -> None:
    running = [forks.start(*parted(number, 3), cwd=place) for number in (1, 2, 3, 1, 2)]
    codes = [each.wait() for each in running]
    assert {each.code for each in codes} <= {0, 75}, [each.stderr for each in codes]
    for number in (1, 2, 3):  # as an engine does with a task that said: try again
        assert forks.run(*parted(number, 3), cwd=place).code == 0
    merges = [forks.start("merge", "out", cwd=place) for _ in range(3)]
    ends = [each.wait() for each in merges]
    assert {each.code for each in ends} <= {0, 75}, [each.stderr for each in ends]
    assert contents(place / "out") == whole
    assert forks.run("merge", "out", cwd=place).code == 0
    assert beside(place / "out") == []


def test_a_merge_waits_for_a_part_that_is_being_made(forks: Runner, place: Path) -> None:
    api.quantize(place / "source", place / "out", part="1/2", **SETTINGS)
    held = forks.start(*parted(2, 2), cwd=place, at=0, only=("reserve",), act="os.kill(os.getpid(), signal.SIGSTOP)")
    while Path(f"/proc/{held.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    try:
        with pytest.raises(TryAgain, match="Part 2 of 2 is being made"):
            api.merge(place / "out")
    finally:
        held.kill()
    held.wait()


@pytest.mark.parametrize("stride", [19, pytest.param(1, marks=pytest.mark.soak)])
def test_a_merge_that_is_killed_at_any_moment_goes_on(
    forks: Runner, place: Path, source: Path, whole: dict[str, bytes], stride: int
) -> None:
    in_parts(api.quantize, source, place / "made", 2)
    kinds = ("write", "rename", "unlink", "rmdir", "mkdir")
    for at in range(0, 1000, stride):
        shutil.rmtree(place / "out", ignore_errors=True)
        shutil.copytree(place / "made.parts", place / "out.parts")
        ended = forks.run("merge", "out", cwd=place, at=at, act=KILL, only=kinds)
        if ended.code == 0:
            break
        assert ended.code == -9
        if (place / "out").exists():
            assert contents(place / "out") == whole, at
        again = forks.run("merge", "out", cwd=place)
        assert again.code == 0, (at, again.stderr)
        assert contents(place / "out") == whole, at
        assert beside(place / "out") == [], at
    assert at > 30
    assert contents(place / "out") == whole


def test_a_part_started_again_during_an_interrupted_merge_leaves_it_alone(
    forks: Runner, place: Path, source: Path, whole: dict[str, bytes]
) -> None:
    in_parts(api.quantize, source, place / "out", 2)
    killed = forks.run("merge", "out", cwd=place, at=3, act=KILL, only=("rename",))
    assert killed.code == -9
    codes = [forks.run(*parted(number, 2), cwd=place).code for number in (1, 2)]
    assert set(codes) <= {0, 75}
    assert 75 in codes, "the files of one were moved already"
    assert forks.run("merge", "out", cwd=place).code == 0
    assert contents(place / "out") == whole
