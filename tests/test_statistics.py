"""The file of input statistics: what is written is read back, and whatever is not right is refused by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from qz import MalformedInput, MissingInput, api
from qz.formats.malformed import Malformed
from qz.formats.output.storage.whole_file import remove_remains, write_whole
from qz.quantize.importance.hessian_reader import HessianPlace
from qz.quantize.importance.statistics import (
    InputSums,
    read_statistics,
    write_hessians,
    write_statistics,
)

GOOD = {"q.weight.in_sum2": np.ones(8, np.float32), "q.weight.counts": np.array(4, np.int64)}
SAYS = {"format": "qz-importance", "version": "1"}


def inputs() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)


def test_statistics_are_read_back_with_the_hessians_that_linears_share(tmp_path: Path) -> None:
    x = inputs()
    hessian = x.T @ x
    sums = {f"{name}.weight": InputSums(hessian.diagonal().copy(), 32) for name in "qk"}
    digest = write_hessians(tmp_path / "stats.hessians-00001.safetensors", {"q.weight": hessian})
    place = HessianPlace("stats.hessians-00001.safetensors", "q.weight.hessian")
    path = tmp_path / "stats.safetensors"
    write_statistics(path, sums, {"model": "m"}, dict.fromkeys(sums, place), {place.file: digest})
    read = read_statistics(path)
    assert (read.tokens, read.metadata["model"], read.hessian("v.weight")) == (32, "m", None)
    for name, each in sums.items():
        assert np.array_equal(read.sums[name].sum2, each.sum2)
        kept = read.hessian(name)
        assert kept is not None
        assert np.array_equal(kept, hessian)
    with safe_open(path, "np") as opened:  # the official reader's view
        assert opened.metadata()["format"] == "qz-importance"
        assert sorted(opened.keys()) == sorted(f"{n}.weight.{s}" for n in "qk" for s in ("counts", "in_sum2"))
    write_statistics(path, {"q.weight": InputSums(hessian.diagonal().copy(), 32)}, {})  # replaced as a whole
    assert list(read_statistics(path).sums) == ["q.weight"]
    assert read_statistics(path).sha256 != read.sha256
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_that_is_not_written_whole_leaves_what_was_there(tmp_path: Path) -> None:
    mine = {"stats": b"old", "stats.partial": b"of others", "stats.0123abcd.partial": b"of a process that was killed"}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)

    def pieces() -> Iterator[memoryview]:
        yield memoryview(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "stats", pieces())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == mine
    remove_remains(tmp_path / "stats")
    write_whole(tmp_path / "stats", [memoryview(b"new")])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "stats": b"new",
        "stats.partial": b"of others",
    }


@pytest.mark.parametrize(
    ("tensors", "says", "message"),
    [
        (GOOD, {"format": "pt"}, "not a file of input statistics"),
        (GOOD, SAYS | {"version": "9"}, "version '9'"),
        ({}, SAYS, "no statistics"),
        ({"q.weight.in_sum2": np.ones(8, np.float32)}, SAYS, "without the I64 number of its tokens"),
        (GOOD | {"q.weight": np.ones(3, np.float32)}, SAYS, "'q.weight', which is not a statistic"),
        (GOOD | {"k.weight.counts": np.array(4, np.int64)}, SAYS, "'k.weight.counts', which is not a statistic"),
        (GOOD | {"q.weight.in_sum2": np.ones((2, 4), np.float32)}, SAYS, "F32 [2, 4], not F32 [inputs]"),
        (GOOD | {"q.weight.in_sum2": np.array([1, -1], np.float32)}, SAYS, "not sums of squares"),
        (GOOD | {"q.weight.in_sum2": np.array([1, np.nan], np.float32)}, SAYS, "not sums of squares"),
        (GOOD | {"q.weight.counts": np.array(-1, np.int64)}, SAYS, "over -1 tokens"),
        (GOOD, SAYS | {"hessians": '{"files": {}}'}, "has no files"),
        (GOOD, SAYS | {"hessians": '{"files": {}, "of": {"q.weight": ["f", "t"]}}'}, "'q.weight' is listed without"),
        (GOOD, SAYS | {"hessians": '{"files": {"f": "0"}, "of": {}}'}, "needs f beside it"),
        (GOOD, SAYS | {"hessians": "[]"}, "a list where an object is expected"),
    ],
)
def test_what_is_not_right_is_refused_by_name(
    tensors: dict[str, Any], says: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "stats.safetensors"
    save_file(tensors, path, metadata=says)
    with pytest.raises(Malformed) as refused:
        read_statistics(path)
    assert message in str(refused.value)


def test_a_truncated_file_and_none_at_all_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    with pytest.raises(MissingInput):
        read_statistics(path)
    save_file(GOOD, path, metadata=SAYS)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(Malformed, match="truncated"):
        read_statistics(path)


def test_a_hessian_that_is_not_that_of_the_sums_is_refused(tmp_path: Path) -> None:
    x = inputs()
    path, place = tmp_path / "stats.safetensors", HessianPlace("h.safetensors", "q.weight.hessian")
    sums = {"q.weight": InputSums((x * x).sum(0), 32)}
    for wrong in (2 * x.T @ x, (x.T @ x)[:4, :4]):
        digest = write_hessians(tmp_path / place.file, {"q.weight": wrong})
        write_statistics(path, sums, {}, {"q.weight": place}, {place.file: digest})
        with pytest.raises(Malformed, match=r"diagonal|not F32 \[8, 8\]"):
            read_statistics(path).hessian("q.weight")
    (tmp_path / place.file).write_bytes((tmp_path / place.file).read_bytes()[:-1] + b"?")
    with pytest.raises(Malformed, match="its hash differs"):
        read_statistics(path).hessian("q.weight")


def test_sums_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    """As of a model that runs to infinity."""
    with pytest.raises(MalformedInput, match="become NaN or infinite"):
        write_statistics(tmp_path / "stats", {"q.weight": InputSums(np.array([1, np.inf], np.float32), 3)}, {})
    assert not list(tmp_path.iterdir())


NO_STATISTICS = {
    "a folder": "is a folder",
    "a fifo": "is a FIFO or a device",
    "nothing": "is empty",
    "text": "is text",
    "json": "is JSON",
    "binary": "is no safetensors file",
    "weights": "is not a file of input statistics",
    "absent": "does not exist",
    "a loop": "is a link that leads back to itself",
    "zeros": "is no safetensors file",
    "under/a file": "does not exist",
}


@pytest.mark.parametrize(("kind", "told"), NO_STATISTICS.items())
@pytest.mark.parametrize("option", ["importance", "scores"])
def test_what_is_named_instead_of_statistics_is_told(
    tiny_llama: Path, tmp_path: Path, option: str, kind: str, told: str
) -> None:
    named = tmp_path / kind
    content = {
        "nothing": b"",
        "zeros": bytes(99),
        "text": b"words " * 200,
        "json": b'{"a": 1}',
        "binary": b"\xff\xfe\0\x80" * 200,
    }
    if kind in content:
        named.write_bytes(content[kind])
    elif kind == "under/a file":
        named.parent.touch()
    elif kind == "a folder":
        named.mkdir()
    elif kind == "a fifo":
        os.mkfifo(named)
    elif kind == "a loop":
        named.symlink_to(named)
    elif kind == "weights":
        named.symlink_to(tiny_llama / "model.safetensors")
    size = {} if option == "importance" else {"target_size": "1MB"}
    none = kind in ("absent", "under/a file")
    with pytest.raises(MissingInput if none else MalformedInput, match=told) as raised:
        api.quantize(tiny_llama, tmp_path / "out", **{option: named}, **size, dry_run=True)  # type: ignore[arg-type]
    if kind != "weights":
        assert "`qz calibrate`" in str(raised.value)
