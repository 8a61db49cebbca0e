"""What is on disk when a run ends, however it ends."""

# ruff: noqa: PT012 - a run that fails is a `with Staging` inside a `with raises`

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from qz import IOFailed, OutputRefused, PermissionRefused, QzError, TryAgain
from qz.formats.files.local_folder import LocalFolder
from qz.formats.malformed import Malformed
from qz.formats.output import staging
from qz.formats.output.preflight import check_room
from qz.formats.output.recorded.record import read_record, record_of, verify_record
from qz.formats.output.refusals import refuse_overlap
from qz.formats.output.resuming.journal import Journal
from qz.formats.output.resuming.seal import user_key
from qz.formats.output.shards.checksums import HASHED, page_checksum
from qz.formats.output.shards.shard_layout import ShardLayout
from qz.formats.output.staging import Staging
from qz.formats.output.storage import disk
from qz.formats.output.storage.descriptors import Descriptors
from qz.formats.output.storage.directory import Directory
from qz.formats.output.storage.disk import Disk
from qz.formats.tensors.safetensors import TensorInfo
from qz.formats.tensors.safetensors_layout import encode_header, layout
from small_process import in_small_process

Array = np.ndarray[Any, Any]
FINGERPRINT = {"source": {"commit": "0123abcd"}, "method": "nf4", "device": "cpu", "skip": ("lm_head",)}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
VALUES: dict[str, dict[str, Array]] = {
    SHARDS[0]: {"a": np.arange(5000, dtype=np.float32), "b": np.arange(77, dtype=np.uint8)},
    SHARDS[1]: {
        "c": np.full((3, 50), -1, np.int8),
        "empty": np.zeros((0, 4), np.float32),
        "one": np.array(7, np.uint8),
    },
}
DTYPES = {"float32": "F32", "uint8": "U8", "int8": "I8"}


COPIED = bytes(range(256)) * 20
hooks: list[Callable[[str, str], None]] = [lambda operation, path: None]
"""The last one is called before each operation on files of ``make``."""


def read_copied(offset: int, buffer: memoryview) -> None:
    buffer[:] = COPIED[offset : offset + len(buffer)]


def shard_layout(file: str, values: dict[str, Array], variable: int = 0) -> ShardLayout:
    tensors = layout((name, DTYPES[str(array.dtype)], array.shape) for name, array in values.items())
    if variable:
        tensors.append(TensorInfo("state", "U8", (variable,), tensors[-1].stop, tensors[-1].stop + variable))
    return ShardLayout(file, tuple(tensors), len(encode_header(tensors)), frozenset({"state"} if variable else ()))


def write_shard(staging: Staging, file: str) -> None:
    """One shard from opening to its name. The second has a tensor of variable length."""
    shard = staging.open_shard(shard_layout(file, VALUES[file], variable=100 if file == SHARDS[1] else 0))
    for name, array in VALUES[file].items():
        shard.write(name, array)
    if file == SHARDS[1]:
        shard.write_variable("state", b'{"quant_type": "nf4"}')
    shard.finish()


def make(output: Path, *, config: bytes = b'{"new": 1}', needed: int = 30_000, **options: object) -> Staging:
    """One whole run: two shards, a tokenizer, index and config. Even small copies are resumed."""
    staging.RESUMABLE = len(COPIED)
    options.setdefault("disk", Disk(hook=hooks[-1]))
    with Staging(output, FINGERPRINT, needed=needed, **options) as run:  # type: ignore[arg-type]
        run.write_file("config.json", config)
        for file in SHARDS:
            if file not in run.finished:
                write_shard(run, file)
        run.copy_file("part/of/weights.safetensors", len(COPIED), read_copied)
        run.write_file("tokenizer/vocab.json", b"{}")
        run.write_file("model.safetensors.index.json", b'{"weight_map": {}}')
        run.commit()
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True, scope="module")
def the_size_from_which_copies_are_resumed() -> Iterator[None]:
    before = staging.RESUMABLE
    yield
    staging.RESUMABLE = before


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: these tests sync some ten thousand times, and none looks at a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    output = tmp_path_factory.mktemp("reference") / "out"
    make(output)
    return contents(output)


@contextmanager
def hooked(hook: Callable[[str, str], None]) -> Iterator[Disk]:
    """Inside, what ``make`` writes goes through a disk with this hook."""
    hooks.append(hook)
    try:
        yield Disk(hook=hook)
    finally:
        hooks.pop()


class At:
    """Acts at operation ``number`` (from 0), once; ``count`` is how many there were."""

    def __init__(self, number: int, act: Callable[[str], None]) -> None:
        self.number, self.act, self.count, self.where = number, act, 0, ""

    def __call__(self, operation: str, path: str) -> None:
        self.count += 1
        if self.count == self.number + 1:
            self.where = f"{operation} {path}"
            self.act(path)


@dataclass(frozen=True)
class FailWith:
    """Fails as an operation on a file does."""

    code: int

    def __call__(self, path: str) -> None:
        raise OSError(self.code, os.strerror(self.code), path)


def die(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ACTS = (die, FailWith(errno.EIO))


def in_child(run: Callable[[], object]) -> int:
    """Run it in a forked process: 0, minus the signal that ended it, or the exit code of its QzError."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            run()
            code = 0
        except QzError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def strides(here: int) -> list[Any]:
    """Of operations that ``moments`` chooses from: some ``here``, and all of them in ``make soak``."""
    return [here, pytest.param(1, marks=pytest.mark.soak)]


FEW = 0
"""A stride: see ``moments``."""


def moments(run: Callable[[], object], stride: int) -> list[int]:
    """Which operations of a run, from 0: the first of each kind, a folder's rename, as it decides, and those beside
    it; but for ``FEW`` each other rename, too, and each ``stride``-th operation."""
    kinds: list[str] = []
    folders: set[int] = set()

    def note(operation: str, path: str) -> None:
        if operation == "rename" and ".partial/" not in path:
            folders.update(range(len(kinds) - 1, len(kinds) + 2))
        kinds.append(operation)

    with hooked(note):
        run()
    first = {kinds.index(kind) for kind in kinds}
    more = {n for n, kind in enumerate(kinds) if stride != FEW and (n % stride == 0 or kind == "rename")}
    return sorted(first | folders | more)


def assert_absent_or_complete(output: Path, *complete: dict[str, bytes]) -> None:
    assert not output.exists() or contents(output) in complete


def assert_nothing_beside(output: Path) -> None:
    assert os.listdir(output.parent) == [output.name]


# The happy path


def test_an_output_holds_the_files_and_one_record(reference: dict[str, bytes]) -> None:
    assert set(reference) == {
        *SHARDS, "config.json", "model.safetensors.index.json", "tokenizer/vocab.json",
        "part/of/weights.safetensors", "qz.json",
    }  # fmt: skip


def test_the_record_is_literally_this(reference: dict[str, bytes]) -> None:
    record = json.loads(reference["qz.json"])
    assert list(record) == ["version", "about", "files", "sha256"]
    assert record["version"] == 1
    with_zeros = reference["qz.json"].replace(record["sha256"].encode(), b"0" * 64)
    assert record["sha256"] == hashlib.sha256(with_zeros).hexdigest()
    assert record["files"] == [
        {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(reference.items())
        if name != "qz.json"
    ]


def test_the_record_keeps_what_the_caller_says_and_no_path(tmp_path: Path) -> None:
    make(tmp_path / "out", about={"method": "nf4", "device": "cpu"})
    record = read_record(LocalFolder(tmp_path / "out"))
    assert record is not None
    assert record.about == {"method": "nf4", "device": "cpu"}
    assert str(tmp_path) not in (tmp_path / "out/qz.json").read_text()


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    make(tmp_path / "out")
    for file, values in VALUES.items():
        with safe_open(tmp_path / "out" / file, "numpy") as opened:
            for name, array in values.items():
                assert opened.get_tensor(name).tobytes() == array.tobytes()
                assert opened.get_tensor(name).shape == array.shape
    with safe_open(tmp_path / "out" / SHARDS[1], "numpy") as opened:
        assert opened.get_tensor("state").tobytes() == b'{"quant_type": "nf4"}'


def test_nothing_is_left_beside_the_output(tmp_path: Path) -> None:
    make(tmp_path / "out")
    assert_nothing_beside(tmp_path / "out")


def test_config_is_the_last_file_of_the_model_to_get_its_name(tmp_path: Path) -> None:
    renamed: list[str] = []
    with hooked(lambda operation, path: renamed.append(Path(path).name) if operation == "rename" else None):
        make(tmp_path / "out")
    last = ["model.safetensors.index.json", "config.json", "qz.json"]
    assert renamed == [*SHARDS, "weights.safetensors", "vocab.json", *last, "out"]


def test_every_file_and_folder_is_durable_before_the_output_gets_its_name(tmp_path: Path) -> None:
    log: list[tuple[str, str]] = []
    with hooked(lambda operation, path: log.append((operation, path.removeprefix(f"{tmp_path}/")))):
        make(tmp_path / "out")
    for file in (*SHARDS, "config.json"):
        written = max(i for i, (op, path) in enumerate(log) if op == "write" and path == f"out.partial/{file}.tmp")
        synced = log.index(("fsync", f"out.partial/{file}.tmp"))
        renamed = log.index(("rename", f"out.partial/{file}"))
        assert written < synced < renamed < log.index(("fsync", "out.partial"), renamed)
    last = log.index(("rename", "out"))
    assert ("fsync", "out.partial") in log[:last]
    assert ("fsync", str(tmp_path)) in log[last:]


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, expected: int) -> None:
    before = os.umask(umask)
    try:
        make(tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*") if p.is_file()} == {expected}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


def test_an_existing_empty_folder_may_be_the_output(tmp_path: Path, reference: dict[str, bytes]) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert contents(tmp_path / "out") == reference


def test_missing_parents_are_made(tmp_path: Path, reference: dict[str, bytes]) -> None:
    make(tmp_path / "a/b/out")
    assert contents(tmp_path / "a/b/out") == reference


def test_threads_write_one_shard_together(tmp_path: Path) -> None:
    values = {"t": np.frombuffer(random.Random(0).randbytes(6_000_000), np.uint8)}
    with Staging(tmp_path / "out", {}, needed=0) as staging:
        shard = staging.open_shard(shard_layout("m.safetensors", values))
        starts = list(range(0, 6_000_000, 70_001))
        random.Random(1).shuffle(starts)

        def work() -> None:
            while starts:
                start = starts.pop()
                shard.write("t", values["t"][start : start + 70_001], start)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        written = shard.finish()
        staging.commit()
    data = (tmp_path / "out/m.safetensors").read_bytes()
    assert data.endswith(values["t"].tobytes())
    assert (written.bytes, written.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_shard_is_finished_with_two_small_buffers(tmp_path: Path) -> None:
    values = {"t": np.zeros(64 << 20, np.uint8)}
    with Staging(tmp_path / "out", {}, needed=0) as staging:
        shard = staging.open_shard(shard_layout("m.safetensors", values))
        tracemalloc.start()
        shard.write("t", values["t"])
        shard.finish()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 * HASHED + (2 << 20)


def write_500_shards(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    values = {"t": np.arange(64, dtype=np.uint8)}
    with Staging(folder / "out", {}, needed=0) as staging:
        shards = [staging.open_shard(shard_layout(f"m{i}.safetensors", values)) for i in range(500)]

        def work(part: int) -> None:
            for half in (slice(0, 32), slice(32, 64)):
                for shard in shards[part::24]:
                    shard.write("t", values["t"][half], half.start)

        threads = [threading.Thread(target=work, args=(part,)) for part in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for shard in shards:
            shard.finish()
        staging.commit()


@in_small_process
def test_500_shards_in_progress_need_few_descriptors(tmp_path: Path) -> None:
    """Where no earlier test has left anything open."""
    write_500_shards(tmp_path)
    assert len(list((tmp_path / "out").iterdir())) == 501


def test_a_finished_shard_keeps_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    with Staging(tmp_path / "out", {}, needed=0) as staging:
        write_shard(staging, SHARDS[0])
        assert len(os.listdir("/dev/fd")) == before + 3  # the journal, the folder that is staged, and the one around it
        staging.commit()
    assert len(os.listdir("/dev/fd")) == before


def test_descriptors_are_opened_again_on_demand(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(5)]
    for path in paths:
        path.write_bytes(b"x")
    opened: list[str] = []
    disk = Disk(hook=lambda operation, path: opened.append(Path(path).name) if operation == "open" else None)
    folder = Directory.at(disk, tmp_path)
    opened.clear()
    descriptors = Descriptors(folder, limit=2)
    for path in (*paths, paths[4], paths[0]):
        with descriptors.use(path.name) as descriptor:
            assert os.pread(descriptor, 1, 0) == b"x"
    descriptors.close_all()
    folder.close()
    assert opened == ["0", "1", "2", "3", "4", "0"]


def test_a_write_after_the_run_ended_fails_and_hits_no_other_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Staging(tmp_path / "out", {}, needed=0) as staging:
        first, late = (staging.open_shard(shard_layout(file, VALUES[file])) for file in SHARDS)
        first.write("a", VALUES[SHARDS[0]]["a"])
        raise ZeroDivisionError
    with open(tmp_path / "other", "w+b") as other:
        with pytest.raises(RuntimeError, match="after the run ended"):
            first.write("b", VALUES[SHARDS[0]]["b"])
        with pytest.raises(RuntimeError, match="after the run ended"):
            late.write("c", VALUES[SHARDS[1]]["c"])
        assert other.read() == b""
    assert os.listdir(tmp_path) == ["other"]


# What is checked before a shard gets its name


def test_a_byte_that_changed_on_disk_is_found(tmp_path: Path) -> None:
    with pytest.raises(IOFailed, match="reads back different") as caught, Staging(tmp_path / "o", {}, needed=0) as run:
        shard = run.open_shard(shard_layout(SHARDS[0], VALUES[SHARDS[0]]))
        for name, array in VALUES[SHARDS[0]].items():
            shard.write(name, array)
        with open(tmp_path / "o.partial" / f"{SHARDS[0]}.tmp", "r+b") as file:
            file.seek(1000)
            file.write(b"\xff")
        shard.finish()
    assert SHARDS[0] in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_tensor_not_written_whole_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="are missing"), Staging(tmp_path / "out", {}, needed=0) as staging:
        shard = staging.open_shard(shard_layout(SHARDS[0], VALUES[SHARDS[0]]))
        shard.write("a", VALUES[SHARDS[0]]["a"][1:], 4)
        shard.write("b", VALUES[SHARDS[0]]["b"])
        shard.finish()
    assert os.listdir(tmp_path) == []


def test_bytes_written_twice_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="written twice"), Staging(tmp_path / "out", {}, needed=0) as staging:
        shard = staging.open_shard(shard_layout(SHARDS[0], VALUES[SHARDS[0]]))
        for name in "abb":
            shard.write(name, VALUES[SHARDS[0]][name])
        shard.finish()


def test_a_shard_left_open_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not finished"), Staging(tmp_path / "out", {}, needed=0) as staging:
        staging.open_shard(shard_layout(SHARDS[0], VALUES[SHARDS[0]]))
        staging.commit()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "qz.json", "a//b", "./a", "a\0b"])
def test_no_file_gets_a_name_outside_the_output(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError), Staging(tmp_path / "out", {}, needed=0) as staging:
        staging.write_file(name, b"x")
    assert os.listdir(tmp_path) == []


def test_page_sums_see_what_moves_and_what_changes() -> None:
    data = bytearray(random.Random(0).randbytes(3 * 4096 + 100))
    whole = page_checksum(memoryview(data))
    assert page_checksum(memoryview(data)[4096:], page_checksum(memoryview(data)[:4096])) == whole
    swapped = data[4096:8192] + data[:4096] + data[8192:]
    assert page_checksum(memoryview(swapped)) != whole
    for position in random.Random(1).sample(range(len(data)), 200):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        assert page_checksum(memoryview(changed)) != whole


# What is refused before any work


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_place_of_the_output_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputRefused, match="not a folder"):
        make(tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path) == {"out": b"mine"}


def test_a_folder_that_is_not_empty_is_refused_naming_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("mine")
    with pytest.raises(OutputRefused, match=r"--overwrite.*-o/--output"):
        make(tmp_path / "out")
    assert contents(tmp_path) == {"out/config.json": b"mine"}


MODEL = ("config.json", "model.safetensors", "tokenizer.json", "LICENSE")
PIPELINE = ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json")


@pytest.mark.parametrize(
    ("held", "named"),
    [
        (("thesis.tex",), "thesis.tex"),
        (("config.json", ".git/HEAD"), ".git/"),
        (("config.json", "src/a.js", "photos/b.jpg"), "photos/"),
        (("qz.json", "src/a.js"), "src/"),
        ((*MODEL, "notes.txt"), "notes.txt"),
        ((*MODEL, "runs/1/events"), "runs/"),
        ((*MODEL, "src/config.json"), "src/"),
        ((*MODEL, "model.safetensors.bak"), "model.safetensors.bak"),
        ((*MODEL, "pytorch_model.bin"), "pytorch_model.bin"),
        ((*PIPELINE, "unet/sample.png"), "unet/sample.png"),
        ((*PIPELINE, "vae/deep/config.json"), "vae/deep/"),
        (("config.json",), "no weights"),
        (("model_index.json", "LICENSE"), "no weights"),
    ],
)
def test_overwrite_removes_nothing_that_is_not_a_checkpoint(tmp_path: Path, held: tuple[str, ...], named: str) -> None:
    put(tmp_path / "out", held)
    with pytest.raises(OutputRefused, match="does not remove") as caught:
        make(tmp_path / "out", overwrite=True)
    assert named in str(caught.value)
    assert set(contents(tmp_path / "out")) == set(held)
    assert_nothing_beside(tmp_path / "out")


@pytest.mark.parametrize("extra", ["notes.txt", "README.md", "tokenizer.json", "part/mine", "mine/", "link"])
def test_overwrite_beside_files_that_qz_did_not_write_is_refused(tmp_path: Path, extra: str) -> None:
    make(tmp_path / "out")
    if extra == "link":
        (tmp_path / "out/link").symlink_to(tmp_path)
    elif extra.endswith("/"):
        (tmp_path / "out" / extra).mkdir()
    else:
        (tmp_path / "out" / extra).write_text("mine")
    before = contents(tmp_path / "out")
    with pytest.raises(OutputRefused, match=extra):
        make(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before
    assert (tmp_path / "out" / extra).exists()


@pytest.mark.parametrize(
    "held",
    [
        MODEL,
        PIPELINE,
        ("config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "1_Pooling/config.json"),
        (*MODEL, "additional_chat_templates/tool.jinja"),
        (*MODEL, "qz.json"),  # damaged
    ],
)
def test_overwrite_replaces_what_is_nothing_but_a_checkpoint(
    tmp_path: Path, reference: dict[str, bytes], held: tuple[str, ...]
) -> None:
    put(tmp_path / "out", held)
    make(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == reference
    assert_nothing_beside(tmp_path / "out")


def put(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


@pytest.mark.parametrize("target", ["folder", "nowhere"])
def test_a_link_in_the_place_of_the_output_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    with pytest.raises(OutputRefused, match="symbolic link"):
        make(tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["folder", "out"]


def test_a_parent_that_is_a_link_is_fine(tmp_path: Path, reference: dict[str, bytes]) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    make(tmp_path / "link/out")
    assert contents(tmp_path / "real/out") == reference


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputRefused, match="-o/--output"):
        make(tmp_path / "file/out")


@pytest.mark.parametrize("output", ["/", "..", "x" * 260])
def test_an_impossible_name_is_refused(tmp_path: Path, output: str) -> None:
    with pytest.raises(OutputRefused):
        make(tmp_path / output)


def test_someone_elses_partial_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine.txt").write_text("mine")
    with pytest.raises(OutputRefused, match="not an interrupted run of qz"):
        make(tmp_path / "out")
    assert contents(tmp_path) == {"out.partial/mine.txt": b"mine"}


def test_a_read_only_parent_is_a_question_of_permission() -> None:
    parent = Path(tempfile.mkdtemp())
    try:
        os.chmod(parent, 0o555)

        def run() -> None:
            if os.geteuid() == 0:
                os.seteuid(65534)
            make(parent / "out")

        assert in_child(run) == PermissionRefused.exit_code == 77
        assert os.listdir(parent) == []
    finally:
        os.chmod(parent, 0o755)
        shutil.rmtree(parent)


def test_a_dry_run_names_the_folder_that_cannot_be_made_as_the_run_does(tmp_path: Path) -> None:
    def refuse(operation: str, path: str) -> None:
        if operation == "mkdir":
            raise PermissionError(errno.EACCES, "Permission denied", path)

    output, disk = tmp_path / "inner/out", Disk(hook=refuse)
    for begin in (Staging(output, FINGERPRINT, needed=0, disk=disk).__enter__, lambda: check_room(output, 0, disk)):
        with pytest.raises(PermissionRefused, match=r"cannot mkdir \S+/inner\. Change"):
            begin()
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_found_before_work_and_named(tmp_path: Path) -> None:
    with pytest.raises(IOFailed, match=r"needs 10,000,000,000,000,000 bytes, [\d,]+ are free.*-o/--output"):
        make(tmp_path / "out", needed=10**16)
    assert os.listdir(tmp_path) == []


def test_overlap_of_source_and_output_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (tmp_path / "link").symlink_to("model")
    for output in ("model", "model/out", "link", "link/out", ".", "other/../model"):
        with pytest.raises(OutputRefused, match="overlap"):
            refuse_overlap(source, tmp_path / output, Disk())
    (tmp_path / "x.partial").mkdir()
    with pytest.raises(OutputRefused, match="overlap"):
        refuse_overlap(tmp_path / "x.partial", tmp_path / "x", Disk())
    for output in ("model-nf4", "mode", "other/model"):
        refuse_overlap(source, tmp_path / output, Disk())


# Resume


def interrupted(output: Path, after: int = 1) -> None:
    """A run that failed after so many shards."""
    with pytest.raises(KeyboardInterrupt), Staging(output, FINGERPRINT, needed=0) as staging:
        for file in SHARDS[:after]:
            if file not in staging.finished:
                write_shard(staging, file)
        raise KeyboardInterrupt


@pytest.mark.parametrize("mine", [False, True])
def test_parents_made_for_an_output_that_failed_are_removed(tmp_path: Path, mine: bool) -> None:
    """But not if something else lies in them by then."""
    with pytest.raises(ZeroDivisionError), Staging(tmp_path / "new/sub/out", FINGERPRINT, needed=0):
        if mine:
            (tmp_path / "new/mine").mkdir()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == (["new", "mine"] if mine else [])
    with pytest.raises(IOFailed, match="Not enough space"):
        make(tmp_path / "new/sub/out", needed=10**18)
    assert [path.name for path in tmp_path.rglob("*")] == (["new", "mine"] if mine else [])
    make(tmp_path / "new/sub/out")
    assert (tmp_path / "new/sub/out/config.json").is_file()


def test_a_failed_run_without_a_finished_shard_leaves_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", after=0)
    assert os.listdir(tmp_path) == []


def test_a_failed_run_leaves_no_checkpoint_but_its_finished_shards(tmp_path: Path, reference: dict[str, bytes]) -> None:
    with pytest.raises(KeyboardInterrupt), Staging(tmp_path / "out", FINGERPRINT, needed=0) as staging:
        write_shard(staging, SHARDS[0])
        staging.write_file("tokenizer.json", b"{}")
        staging.open_shard(shard_layout(SHARDS[1], VALUES[SHARDS[1]]))
        raise KeyboardInterrupt
    assert sorted(os.listdir(tmp_path)) == ["out.partial", "out.partial.journal"]
    assert contents(tmp_path / "out.partial") == {SHARDS[0]: reference[SHARDS[0]]}


def test_the_same_command_continues_and_gives_the_same_bytes(tmp_path: Path, reference: dict[str, bytes]) -> None:
    interrupted(tmp_path / "out")
    staging = make(tmp_path / "out")
    assert staging.resumed
    assert list(staging.finished) == [SHARDS[0]]
    assert contents(tmp_path / "out") == reference
    assert_nothing_beside(tmp_path / "out")


def test_another_command_is_refused_naming_the_difference(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    before = contents(tmp_path)
    other = {**FINGERPRINT, "method": "int8", "source": {"commit": "4567ef"}, "threshold": 6.0}
    with pytest.raises(OutputRefused) as caught, Staging(tmp_path / "out", other, needed=0):
        pass
    message = str(caught.value)
    assert "method: nf4 → int8, commit: 0123abcd → 4567ef, threshold: none → 6.0. " in message
    assert "--no-resume" in message
    assert contents(tmp_path) == before


def test_no_resume_starts_over(tmp_path: Path, reference: dict[str, bytes]) -> None:
    interrupted(tmp_path / "out")
    staging = make(tmp_path / "out", resume=False)
    assert not staging.resumed
    assert contents(tmp_path / "out") == reference


def test_a_finished_shard_of_another_size_is_made_anew(tmp_path: Path, reference: dict[str, bytes]) -> None:
    interrupted(tmp_path / "out")
    os.truncate(tmp_path / "out.partial" / SHARDS[0], 100)
    assert not make(tmp_path / "out").finished
    assert contents(tmp_path / "out") == reference


def test_a_damaged_finished_shard_never_gets_into_the_output(tmp_path: Path, reference: dict[str, bytes]) -> None:
    interrupted(tmp_path / "out", after=2)
    with open(tmp_path / "out.partial" / SHARDS[1], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(IOFailed, match="damaged"):
        make(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert SHARDS[1] not in make(tmp_path / "out").finished
    assert contents(tmp_path / "out") == reference


def test_what_others_put_into_the_partial_folder_stays_out_of_the_output(
    tmp_path: Path, reference: dict[str, bytes]
) -> None:
    interrupted(tmp_path / "out")
    (tmp_path / "out.partial/evil.py").write_text("import os")
    make(tmp_path / "out")
    assert contents(tmp_path / "out") == reference
    with pytest.raises(IOFailed, match="changed by someone else"), Staging(tmp_path / "o", {}, needed=0) as staging:
        (tmp_path / "o.partial/evil.py").write_text("import os")
        staging.commit()


@pytest.mark.parametrize("stride", [29, pytest.param(11, marks=pytest.mark.soak)])
def test_a_torn_or_damaged_journal_costs_time_but_never_bytes(
    tmp_path: Path, reference: dict[str, bytes], stride: int
) -> None:
    interrupted(tmp_path / "model", after=2)
    journal = (tmp_path / "model.partial.journal").read_bytes()
    kept = set()
    chosen = random.Random(0)
    damaged = [journal[:stop] for stop in range(0, len(journal), stride)]
    damaged += [
        journal[:i] + bytes([journal[i] ^ 1]) + journal[i + 1 :] for i in chosen.sample(range(25, len(journal)), 20)
    ]
    deep, half = b"[" * 100_000 + b"]" * 100_000, b'{"bytes": 8, "name": "\\ud800", "sha256": "0"}'
    entries = ({"name": "n" * 300, "bytes": 8}, {"name": "n", "bytes": -8}, {"name": "n", "bytes": 8, "sha256": "x"})
    odd = [json.dumps({"sha256": "0" * 64, **entry}).encode() for entry in entries]
    damaged += [journal + b"%08x %b\n" % (zlib.crc32(line), line) for line in (deep, half, b"9" * 5000, b"[]", *odd)]
    damaged += [journal + b"\0" * 50, journal + b"{", b"\0" * 4096]
    for text in damaged:
        output = tmp_path / "out"
        shutil.copytree(tmp_path / "model.partial", tmp_path / "out.partial")
        (tmp_path / "out.partial.journal").write_bytes(text)
        kept.add(len(make(output).finished))
        assert contents(output) == reference
        shutil.rmtree(output)
        assert sorted(os.listdir(tmp_path)) == ["model.partial", "model.partial.journal"]
    assert kept == {0, 1, 2}


@pytest.mark.parametrize(
    "text", [b"my diary\n", b"[" * 100_000, b"\n\n", b"deadbeef", b"\0" * 100 + b"x", b'deadbeef {"format']
)
def test_a_file_that_does_not_begin_as_a_journal_is_not_qzs(tmp_path: Path, text: bytes) -> None:
    journal = tmp_path / "out.partial.journal"
    journal.write_bytes(text)
    for resume in (True, False):
        with pytest.raises(OutputRefused, match="is not a journal of qz"):
            make(tmp_path / "out", overwrite=True, resume=resume)
        assert contents(tmp_path) == {"out.partial.journal": text}


def test_a_journal_that_is_a_link_or_has_another_name_is_not_qzs(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"")
    journal = tmp_path / "out.partial.journal"
    places: list[Callable[[], None]] = [
        lambda: journal.symlink_to("mine"),
        lambda: os.link(tmp_path / "mine", journal),
        journal.mkdir,
    ]
    for place in places:
        place()
        with pytest.raises(OutputRefused):
            make(tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["mine", "out.partial.journal"]
        journal.rmdir() if journal.is_dir() else journal.unlink()
    os.mkfifo(journal)
    with pytest.raises(OutputRefused, match="is not a file"):
        make(tmp_path / "out")


# What others put there


def lines_of(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line.partition(b" ")[2]) for line in journal.read_bytes().splitlines()]


def rewrite(journal: Path, lines: list[dict[str, Any]]) -> None:
    """A journal whose every line has the checksum that it ought to have."""
    texts = [json.dumps(line, sort_keys=True).encode() for line in lines]
    journal.write_bytes(b"".join(b"%08x %b\n" % (zlib.crc32(text), text) for text in texts))


@pytest.mark.parametrize("seals", ["kept", "dropped", "of the other line", "of another key"])
def test_a_shard_and_its_line_both_altered_give_the_same_bytes_as_without(
    tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, seals: str
) -> None:
    if seals == "of another key":
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("QZ_CACHE", str(tmp_path / "cache"))
            interrupted(tmp_path / "out", after=2)
        shutil.rmtree(tmp_path / "cache")
    else:
        interrupted(tmp_path / "out", after=2)
    journal, shard = tmp_path / "out.partial.journal", tmp_path / "out.partial" / SHARDS[0]
    data = shard.read_bytes()[:-1] + b"!"
    shard.write_bytes(data)
    lines = lines_of(journal)
    lines[1]["sha256"] = hashlib.sha256(data).hexdigest()
    if seals == "dropped":
        lines = [{key: value for key, value in line.items() if key != "seal"} for line in lines]
    elif seals == "of the other line":
        lines[1]["seal"] = lines[2]["seal"]
    rewrite(journal, lines)
    made = make(tmp_path / "out")
    assert contents(tmp_path / "out") == reference
    assert set(made.finished) == ({SHARDS[1]} if seals in ("kept", "of the other line") else set())
    assert "made again" in made.notes[0]


def test_lines_of_another_run_count_for_nothing(tmp_path: Path, reference: dict[str, bytes]) -> None:
    """Shards and lines that qz itself wrote, for another source, below the first line of this run."""
    interrupted(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), Staging(tmp_path / "other", {"source": "other"}, needed=0) as staging:
        shard = staging.open_shard(shard_layout(SHARDS[0], VALUES[SHARDS[0]]))
        for name, array in VALUES[SHARDS[0]].items():
            shard.write(name, np.zeros_like(array))
        shard.finish()
        raise KeyboardInterrupt
    first, other = (lines_of(tmp_path / f"{name}.partial.journal") for name in ("out", "other"))
    rewrite(tmp_path / "out.partial.journal", [first[0], other[1]])
    shutil.copy(tmp_path / "other.partial" / SHARDS[0], tmp_path / "out.partial")
    assert not make(tmp_path / "out").finished
    assert contents(tmp_path / "out") == reference


def test_of_an_earlier_run_only_what_this_one_would_make_is_kept(tmp_path: Path, reference: dict[str, bytes]) -> None:
    with pytest.raises(KeyboardInterrupt), Staging(tmp_path / "out", FINGERPRINT, needed=0) as staging:
        for file in SHARDS:
            write_shard(staging, file)
        staging.copy_file("evil.safetensors", len(COPIED), read_copied)
        raise KeyboardInterrupt
    layouts = {file: shard_layout(file, VALUES[file], variable=100 if file == SHARDS[1] else 0) for file in SHARDS}
    other = shard_layout(SHARDS[0], {"a": VALUES[SHARDS[0]]["a"].astype(np.int8), "b": VALUES[SHARDS[0]]["b"]})
    made = make(tmp_path / "out", resumable={**layouts, SHARDS[0]: other})
    assert list(made.finished) == [SHARDS[1]]
    assert contents(tmp_path / "out") == reference


def test_without_a_place_for_a_key_hashes_alone_count(
    tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QZ_CACHE", "")
    interrupted(tmp_path / "out")
    assert "seal" not in lines_of(tmp_path / "out.partial.journal")[1]
    assert make(tmp_path / "out").resumed
    assert contents(tmp_path / "out") == reference


def test_the_key_is_made_once_and_nobody_else_can_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ_CACHE", str(tmp_path))
    key = user_key()
    assert key is not None
    assert user_key() == key
    assert [path.name for path in tmp_path.iterdir()] == ["journal.key"]
    assert stat.S_IMODE((tmp_path / "journal.key").stat().st_mode) == 0o600
    (tmp_path / "journal.key").chmod(0o644)
    assert user_key() is None


@pytest.mark.parametrize("stride", strides(10))
@pytest.mark.parametrize("kind", ["link", "folder", "empty folder"])
def test_whatever_is_put_in_the_place_of_the_staged_folder_nothing_is_written_there_or_lost(
    tmp_path: Path, reference: dict[str, bytes], kind: str, stride: int
) -> None:
    """At any operation of the run, by somebody who may write in the folder around it."""

    def replace(partial: Path, victim: Path) -> None:
        if partial.is_dir() and not partial.is_symlink() and not (partial.parent / "moved").exists():
            partial.rename(partial.parent / "moved")
            if kind == "link":
                partial.symlink_to(victim)
            else:
                partial.mkdir()
                if kind == "folder":
                    (partial / "precious").write_text("mine")

    numbers, complete = moments(lambda: make(tmp_path / "count/out"), stride), 0
    for number in numbers:
        place = tmp_path / str(number)
        (place / "victim").mkdir(parents=True)
        (place / "victim/precious").write_text("mine")
        at = At(number, lambda _, place=place: replace(place / "out.partial", place / "victim"))  # type: ignore[misc]
        code = None
        with hooked(at):
            try:
                make(place / "out")
            except QzError as error:
                code = error.exit_code
        assert code in {None, 73, 74}, at.where
        assert contents(place / "victim") == {"precious": b"mine"}, at.where
        if code is None:
            assert not (place / "out").is_symlink(), at.where
            assert contents(place / "out") == reference, at.where
            complete += 1
        else:
            assert not os.path.lexists(place / "out"), at.where
            assert (place / "out.partial").is_symlink() == (kind == "link"), at.where
            assert kind != "folder" or (place / "out.partial/precious").read_text() == "mine", at.where
        shutil.rmtree(place)
    assert 0 < complete < len(numbers) / 2


@pytest.mark.parametrize("stride", strides(8))
def test_a_parent_that_is_moved_away_gets_the_output_or_none(
    tmp_path: Path, reference: dict[str, bytes], stride: int
) -> None:
    codes = set()
    for number in moments(lambda: make(tmp_path / "count/out"), stride):
        place = tmp_path / str(number)
        (place / "parent").mkdir(parents=True)
        (place / "other").mkdir()

        def move(_: str, place: Path = place) -> None:
            (place / "parent").rename(place / "moved")
            (place / "parent").symlink_to("other")

        code = 0
        with hooked(At(number, move)):
            try:
                make(place / "parent/out")
            except QzError as error:
                code = error.exit_code
        codes.add(code)
        if (place / "other/out").exists():  # before the parent was opened
            assert contents(place / "other/out") == reference
        else:
            assert os.listdir(place / "other") == []
        moved = place / "moved/out"
        assert not moved.exists() or contents(moved) == reference
        shutil.rmtree(place)
    assert codes == {0, 74}


def test_folders_of_any_depth_are_removed(tmp_path: Path, reference: dict[str, bytes]) -> None:
    interrupted(tmp_path / "out")
    here = os.open(tmp_path / "out.partial", os.O_RDONLY)
    for depth in range(2100):  # longer than a path may be
        os.mkdir("x", dir_fd=here)
        if depth % 500 == 0:
            os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        inner = os.open("x", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    assert make(tmp_path / "out").resumed
    assert contents(tmp_path / "out") == reference
    assert_nothing_beside(tmp_path / "out")


@pytest.mark.parametrize("torn", [b'{"name": "model-0', b"\0" * 4096, b"1234 {}\n", b"\n"])
def test_a_torn_last_line_keeps_the_lines_before_and_can_be_continued(tmp_path: Path, torn: bytes) -> None:
    interrupted(tmp_path / "out")
    path = tmp_path / "out.partial.journal"
    path.write_bytes(path.read_bytes() + torn)
    interrupted(tmp_path / "out", after=2)
    with Directory.at(Disk(), tmp_path) as folder:
        journal = Journal(folder, path.name, user_key())
        journal.close()
    assert list(journal.finished) == list(SHARDS)
    assert path.read_bytes().count(b"\n") == 3


def test_no_resume_leaves_nothing_when_it_cannot_begin(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    with pytest.raises(IOFailed, match="Not enough space"):
        make(tmp_path / "out", resume=False, needed=10**16)
    assert os.listdir(tmp_path) == []


# Locks


def test_a_second_run_is_told_at_once_to_try_again(tmp_path: Path) -> None:
    """Had it waited for the lock, which this thread holds, it would wait for ever."""
    with Staging(tmp_path / "out", FINGERPRINT, needed=0), pytest.raises(TryAgain, match="Another qz is writing out"):
        make(tmp_path / "out")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_a_lock_that_the_file_system_refuses_leaves_nothing_and_says_where_to_write(tmp_path: Path, code: int) -> None:
    def refuse(operation: str, path: str) -> None:
        if operation == "lock":
            raise OSError(code, os.strerror(code), path)

    kind, advice = (
        (IOFailed, "run the same command again") if code == errno.EIO else (OutputRefused, "on another file system")
    )
    for begin in (
        Staging(tmp_path / "new/out", FINGERPRINT, needed=0, disk=Disk(hook=refuse)).__enter__,
        lambda: check_room(tmp_path / "new/out", 0, Disk(hook=refuse)),
    ):
        with pytest.raises(kind, match=advice):
            begin()
        assert os.listdir(tmp_path) == []


def test_whatever_fails_while_a_run_begins_leaves_nothing(tmp_path: Path) -> None:
    """A lock, a look, the journal's first line, the staged folder; with new parents, and without."""
    for output in (tmp_path / "new/out", tmp_path / "out"):
        counter = At(-1, die)
        with Staging(output, FINGERPRINT, needed=0, disk=Disk(hook=counter)):
            total = counter.count
        for number in range(total):
            at = At(number, FailWith(errno.EIO))
            with pytest.raises(IOFailed), Staging(output, FINGERPRINT, needed=0, disk=Disk(hook=at)):
                pass
            assert os.listdir(tmp_path) == [], at.where


def test_a_dead_run_holds_no_lock(tmp_path: Path, reference: dict[str, bytes]) -> None:
    def run() -> None:
        with Staging(tmp_path / "out", FINGERPRINT, needed=0) as staging:
            die(str(staging.output))

    assert in_child(run) == -signal.SIGKILL
    make(tmp_path / "out")
    assert contents(tmp_path / "out") == reference
    assert_nothing_beside(tmp_path / "out")


def test_a_lock_on_a_journal_that_its_owner_just_removed_does_not_count(tmp_path: Path) -> None:
    journal = tmp_path / "out.partial.journal"
    removed: list[str] = []

    def remove_once(operation: str, path: str) -> None:
        if operation == "lock" and not removed:
            removed.append(path)
            os.unlink(path)

    with Staging(tmp_path / "out", FINGERPRINT, needed=0, disk=Disk(hook=remove_once)):
        assert removed == [str(journal)]
        with pytest.raises(TryAgain), Staging(tmp_path / "out", FINGERPRINT, needed=0):
            pass


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.soak)])
@in_small_process
def test_of_8_concurrent_starts_exactly_one_works(tmp_path: Path, reference: dict[str, bytes], rounds: int) -> None:
    for round_ in range(rounds):
        output = tmp_path / str(round_) / "out"
        output.parent.mkdir()
        start, finish = os.pipe(), os.pipe()
        results = os.pipe()

        def run(output: Path = output, start: int = start[0], finish: int = finish[0], out: int = results[1]) -> None:
            os.read(start, 1)
            try:
                with Staging(output, FINGERPRINT, needed=0):
                    os.write(out, b"0")
                    os.read(finish, 1)
                    raise KeyboardInterrupt
            except TryAgain:
                os.write(out, b"7")
            except KeyboardInterrupt:
                make(output)

        children = []
        for _ in range(8):
            child = os.fork()
            if child == 0:
                try:
                    run()
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        os.write(start[1], b"." * 8)
        assert sorted(b"".join(os.read(results[0], 1) for _ in range(8))) == sorted(b"07777777")
        os.write(finish[1], b".")
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
        for pipe in (start, finish, results):
            os.close(pipe[0])
            os.close(pipe[1])
        assert contents(output) == reference
        assert_nothing_beside(output)


@pytest.mark.parametrize("rounds", [2, pytest.param(10, marks=pytest.mark.soak)])
@in_small_process
def test_runs_that_race_without_waiting_leave_one_output(
    tmp_path: Path, reference: dict[str, bytes], rounds: int
) -> None:
    for round_ in range(rounds):
        output = tmp_path / str(round_) / "out"
        output.parent.mkdir()
        children = []
        for _ in range(8):
            child = os.fork()
            if child == 0:
                try:
                    make(output)
                    os._exit(0)
                except QzError as error:
                    os._exit(error.exit_code)
                finally:
                    os._exit(1)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes.count(0) == 1
        assert set(codes) <= {0, 73, 75}
        assert contents(output) == reference
        assert_nothing_beside(output)


# Failures and kills at every operation


ERRORS = [
    ((errno.ENOSPC, errno.EIO, errno.EACCES), 10),
    *(pytest.param((code,), 1, marks=pytest.mark.soak) for code in (errno.ENOSPC, errno.EIO, errno.EACCES)),
]


@pytest.mark.parametrize(("codes", "stride"), ERRORS, ids=str)
def test_an_error_at_any_operation_leaves_no_half_output(
    tmp_path: Path, reference: dict[str, bytes], codes: tuple[int, ...], stride: int
) -> None:
    """With one of the errors each, or with the same all of them."""
    for turn, number in enumerate(moments(lambda: make(tmp_path / "count/out"), stride)):
        code = codes[turn % len(codes)]
        exit_code = 77 if code == errno.EACCES else 74
        output = tmp_path / str(number) / "out"
        output.parent.mkdir()
        at = At(number, FailWith(code))
        with hooked(at), pytest.raises(QzError) as caught:
            make(output)
        assert caught.value.exit_code == exit_code, at.where
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
        if code == errno.ENOSPC:
            assert "bytes, " in str(caught.value)
        assert_absent_or_complete(output, reference)
        if output.exists():
            with pytest.raises(OutputRefused, match="--overwrite"):
                make(output)
        else:
            make(output)
        assert contents(output) == reference, at.where
        assert_nothing_beside(output)
        shutil.rmtree(output.parent)


def after_a_kill(output: Path, number: int, reference: dict[str, bytes], where: str) -> None:
    assert_absent_or_complete(output, reference)
    if output.exists():
        with pytest.raises(OutputRefused, match="--overwrite"):
            make(output)
    else:
        make(output)
    assert contents(output) == reference, where
    assert_nothing_beside(output)


@pytest.mark.parametrize("stride", strides(20))
@in_small_process
def test_a_kill_at_any_operation_is_recovered_by_the_same_command(
    tmp_path: Path, reference: dict[str, bytes], stride: int
) -> None:
    for number in moments(lambda: make(tmp_path / "count/out"), stride):
        output = tmp_path / str(number) / "out"
        output.parent.mkdir()
        with hooked(At(number, die)):
            assert in_child(lambda output=output: make(output)) == -signal.SIGKILL  # type: ignore[misc]
        after_a_kill(output, number, reference, f"operation {number}")
        shutil.rmtree(output.parent)


@pytest.mark.parametrize("stride", strides(20))
@in_small_process
def test_a_kill_at_any_operation_of_a_resumed_run_is_recovered(
    tmp_path: Path, reference: dict[str, bytes], stride: int
) -> None:
    interrupted(tmp_path / "model")

    def interrupted_in(place: Path) -> Path:
        place.mkdir()
        shutil.copytree(tmp_path / "model.partial", place / "out.partial")
        shutil.copy(tmp_path / "model.partial.journal", place / "out.partial.journal")
        return place / "out"

    whole = interrupted_in(tmp_path / "whole")
    numbers = moments(lambda: make(whole), stride)
    assert numbers[-1] > 50
    for number in numbers:
        output = interrupted_in(tmp_path / str(number))
        with hooked(At(number, die)):
            assert in_child(lambda output=output: make(output)) == -signal.SIGKILL  # type: ignore[misc]
        after_a_kill(output, number, reference, f"operation {number}")
        shutil.rmtree(output.parent)


@pytest.mark.parametrize("rounds", [2, pytest.param(15, marks=pytest.mark.soak)])
@in_small_process
def test_many_kills_in_a_row_are_recovered(tmp_path: Path, reference: dict[str, bytes], rounds: int) -> None:
    chosen = random.Random(5)
    for round_ in range(rounds):
        output = tmp_path / str(round_) / "out"
        output.parent.mkdir()
        kills = 0
        while not output.exists():
            with hooked(At(chosen.randrange(140) if kills < 8 else -1, die)):
                ended = in_child(lambda output=output: make(output))  # type: ignore[misc]
            assert ended in {0, -signal.SIGKILL}
            kills += 1
            assert_absent_or_complete(output, reference)
        with pytest.raises(OutputRefused):
            make(output)
        assert_nothing_beside(output)


class Platter:
    """What of a folder survives a power cut: the data of files as of their last fsync, and their names.

    Names are either durable ``at once``, or ``late``, when their folder is synced; but even then folders may appear,
    and files disappear, earlier. To be called before each operation of the writer, as the hook of a ``Disk`` is.
    """

    def __init__(self, root: Path, names: str) -> None:
        self.root, self.at_once = root, names == "at once"
        self.data: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.last = ("", root, 0)
        for path in (root, *root.rglob("*")):
            self.fsync(path)

    def __call__(self, operation: str, path: str) -> None:
        done, where, inode = self.last
        if done == "fsync":
            self.fsync(where)
        elif done in {"mkdir", "unlink", "rmdir"} and where.parent.exists():
            names = self.names.setdefault(where.parent.stat().st_ino, {})
            names.pop(where.name, None)
            self.data.pop(inode, None)
            if done == "mkdir":
                names[where.name] = where.stat().st_ino
        there = os.path.lexists(path)
        self.last = (operation, Path(path), os.lstat(path).st_ino if there else 0)

    def fsync(self, path: Path) -> None:
        if path.is_dir():
            self.names[path.stat().st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.data[path.stat().st_ino] = path.read_bytes()

    def restore(self, to: Path) -> None:
        """Build what would be found after the power is back; a file never synced is empty."""
        folders = {path.stat().st_ino: path for path in (self.root, *self.root.rglob("*")) if path.is_dir()}

        def build(inode: int, to: Path) -> None:
            to.mkdir()
            names = self.names.get(inode, {})
            if self.at_once:
                names = {entry.name: entry.inode() for entry in os.scandir(folders[inode])}
            for name, inner in names.items():
                if inner in folders or inner in self.names:
                    build(inner, to / name)
                else:
                    (to / name).write_bytes(self.data.get(inner, b""))

        build(self.root.stat().st_ino, to)


@pytest.mark.parametrize("names", ["late", "at once"])
@pytest.mark.parametrize(
    ("overwrite", "stride"),
    [(False, 8), (True, 16), *(pytest.param(overwrite, 1, marks=pytest.mark.soak) for overwrite in (False, True))],
)
def test_a_power_cut_at_any_operation_is_recovered(
    tmp_path: Path, reference: dict[str, bytes], overwrite: bool, stride: int, names: str
) -> None:
    root, state = tmp_path / "root", tmp_path / "state"
    root.mkdir()
    old = {}
    if overwrite:
        make(root / "out", config=b'{"old": 1}')
        old = contents(root / "out")
    shutil.copytree(root, tmp_path / "whole")
    chosen = moments(lambda: make(tmp_path / "whole/out", overwrite=overwrite), stride)
    platter, number = Platter(root, names), itertools.count()
    resumed = set()

    def cut(operation: str, path: str) -> None:
        platter(operation, path)
        if next(number) not in chosen:
            return
        platter.restore(state)
        output = state / "out"
        assert_absent_or_complete(output, reference, old)
        if not output.exists() or contents(output) == old:
            resumed.add(len(make(output, overwrite=overwrite, disk=Disk()).finished))
        elif set(os.listdir(state)) != {"out"}:
            with pytest.raises(OutputRefused):
                make(output, disk=Disk())
        assert contents(output) == reference, f"{operation} {path}"
        assert_nothing_beside(output)
        shutil.rmtree(state)

    with hooked(cut):
        make(root / "out", overwrite=overwrite)
    assert resumed == {0, 1, 2, 3}


def make_piece_by_piece(output: Path, disk: Disk) -> Staging:
    """A run of one shard that keeps each of its tensors at once."""
    file = SHARDS[0]
    planned = shard_layout(file, VALUES[file], variable=100)
    with Staging(output, FINGERPRINT, needed=30_000, disk=disk, resumable={file: planned}) as staging:
        if file not in staging.finished:
            done = staging.begun[file].tensors if staging.begun else frozenset()
            shard = staging.open_shard(planned)
            for name in sorted(VALUES[file].keys() - done):
                shard.write(name, VALUES[file][name])
                staging.keep(shard, [name], lambda: True)
            if "state" not in done:
                shard.write_variable("state", b"of any length")
                staging.keep(shard, ["state"], lambda: True)
            shard.finish()
        staging.commit()
    return staging


@pytest.mark.parametrize("names", ["late", "at once"])
def test_a_power_cut_while_a_shard_is_kept_piece_by_piece_is_recovered(tmp_path: Path, names: str) -> None:
    make_piece_by_piece(tmp_path / "reference/out", Disk())
    reference = contents(tmp_path / "reference/out")
    root, state = tmp_path / "root", tmp_path / "state"
    root.mkdir()
    platter, kept = Platter(root, names), set()

    def cut(operation: str, path: str) -> None:
        platter(operation, path)
        platter.restore(state)
        assert_absent_or_complete(state / "out", reference)
        if not (state / "out").exists():
            begun = make_piece_by_piece(state / "out", Disk()).begun
            kept.add(frozenset[str]().union(*(each.tensors for each in begun.values())))
            assert_nothing_beside(state / "out")
        assert contents(state / "out") == reference, f"{operation} {path}"
        shutil.rmtree(state)

    make_piece_by_piece(root / "out", Disk(hook=cut))
    assert kept == {frozenset(each) for each in ((), ("a",), ("a", "b"), ("a", "b", "state"))}


# Overwriting


@pytest.fixture
def old_and_new(tmp_path: Path, reference: dict[str, bytes]) -> tuple[Path, dict[str, bytes]]:
    """A finished output, with another config, to copy and overwrite; and its contents."""
    make(tmp_path / "model", config=b'{"old": 1}')
    return tmp_path / "model", contents(tmp_path / "model")


def test_overwrite_replaces_and_leaves_nothing(
    tmp_path: Path, old_and_new: tuple[Path, dict[str, bytes]], reference: dict[str, bytes]
) -> None:
    make(old_and_new[0], overwrite=True)
    assert contents(old_and_new[0]) == reference
    assert_nothing_beside(old_and_new[0])


def test_a_failed_overwrite_keeps_the_old_output(old_and_new: tuple[Path, dict[str, bytes]]) -> None:
    model, old = old_and_new
    with pytest.raises(ZeroDivisionError), Staging(model, FINGERPRINT, needed=0, overwrite=True):
        raise ZeroDivisionError
    assert contents(model) == old
    assert_nothing_beside(model)


@pytest.mark.parametrize(
    ("act", "stride"),
    [(die, 40), (FailWith(errno.EIO), FEW), *(pytest.param(act, 1, marks=pytest.mark.soak) for act in ACTS)],
)
@in_small_process
def test_old_or_new_can_be_reached_whenever_an_overwrite_is_interrupted(
    tmp_path: Path,
    old_and_new: tuple[Path, dict[str, bytes]],
    reference: dict[str, bytes],
    act: Callable[[str], None],
    stride: int,
) -> None:
    model, old = old_and_new
    shutil.copytree(model, tmp_path / "whole/out")
    numbers = moments(lambda: make(tmp_path / "whole/out", overwrite=True), stride)
    assert numbers[-1] > 100
    for number in numbers:
        output = tmp_path / str(number) / "out"
        shutil.copytree(model, output)
        with hooked(At(number, act)):
            ended = in_child(lambda output=output: make(output, overwrite=True))  # type: ignore[misc]
        assert ended in {-signal.SIGKILL, IOFailed.exit_code}
        complete = [contents(path) in (old, reference) for path in output.parent.glob("out*") if path.is_dir()]
        assert any(complete), f"operation {number}"
        if output.exists():
            assert contents(output) in (old, reference), f"operation {number}"
        else:  # killed between the two renames
            assert contents(output.parent / "out.partial.old") == old
            assert contents(output.parent / "out.partial") == reference
            with pytest.raises(OutputRefused, match="--overwrite"):
                make(output)
            assert contents(output) == old
        make(output, overwrite=True)
        assert contents(output) == reference
        assert_nothing_beside(output)
        shutil.rmtree(output.parent)


@pytest.mark.parametrize(
    ("killed_at", "stride"),
    [
        ("the second rename", FEW),
        ("the removal of the old", 40),
        *(pytest.param(at, 1, marks=pytest.mark.soak) for at in ("the second rename", "the removal of the old")),
    ],
)
@in_small_process
def test_an_error_while_recovering_an_overwrite_is_recovered(
    tmp_path: Path, old_and_new: tuple[Path, dict[str, bytes]], reference: dict[str, bytes], killed_at: str, stride: int
) -> None:
    model = old_and_new[0]

    def kill(operation: str, path: str) -> None:
        if killed_at == "the second rename" and (operation, path) == ("rename", str(model)):
            die(path)
        if killed_at == "the removal of the old" and operation == "unlink":
            die(path)

    with hooked(kill):
        assert in_child(lambda: make(model, overwrite=True)) == -signal.SIGKILL
    assert (tmp_path / "model.partial.old").is_dir()

    def interrupted_in(state: Path) -> Path:
        state.mkdir()
        for name in ("model", "model.partial", "model.partial.old"):
            if (tmp_path / name).exists():
                shutil.copytree(tmp_path / name, state / name)
        shutil.copy(tmp_path / "model.partial.journal", state)
        return state

    whole = interrupted_in(tmp_path / "whole")
    numbers = moments(lambda: make(whole / "model", overwrite=True), stride)
    assert numbers[-1] > 50
    for number in numbers:
        state = interrupted_in(tmp_path / str(number))
        with hooked(At(number, FailWith(errno.EIO))):
            ended = in_child(lambda state=state: make(state / "model", overwrite=True))  # type: ignore[misc]
        assert ended in {0, 74}
        make(state / "model", overwrite=True)
        assert contents(state / "model") == reference
        assert_nothing_beside(state / "model")
        shutil.rmtree(state)


def test_a_folder_made_while_the_old_output_was_aside_is_not_removed(
    tmp_path: Path, old_and_new: tuple[Path, dict[str, bytes]]
) -> None:
    model, old = old_and_new

    def at_the_second_rename(operation: str, path: str) -> None:
        if operation == "rename" and path == str(model):
            die(path)

    with hooked(at_the_second_rename):
        assert in_child(lambda: make(model, overwrite=True)) == -signal.SIGKILL
    model.mkdir()
    (model / "config.json").write_text("mine")
    with pytest.raises(OutputRefused, match="Move one of them away"):
        make(model, overwrite=True)
    assert (model / "config.json").read_text() == "mine"
    assert contents(tmp_path / "model.partial.old") == old


# A real disk that is full


@in_small_process
def test_real_file_systems_of_20_sizes(tmp_path: Path, reference: dict[str, bytes]) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    codes = set()
    for pages in range(2, 42, 2):
        command = ["mount", "-t", "tmpfs", "-o", f"size={pages * 4096}", "tmpfs", str(mounted)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            code = in_child(lambda: make(mounted / "out", needed=0))
            codes.add(code)
            assert code in {0, 74}
            assert_absent_or_complete(mounted / "out", reference)
            assert (mounted / "out").exists() == (code == 0)
            if code == 74 and pages > 20:
                subprocess.run(["mount", "-o", "remount,size=1m", str(mounted)], check=True)
                make(mounted / "out", needed=0)
                assert contents(mounted / "out") == reference
        finally:
            subprocess.run(["umount", str(mounted)], check=True)
    assert codes == {0, 74}


def test_a_file_system_without_reservation_is_fine(
    tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_fallocate", None)
    make(tmp_path / "out")
    assert contents(tmp_path / "out") == reference


def test_in_memory_no_page_is_taken_before_it_is_written(tmp_path: Path) -> None:
    """To reserve 40 GB there took as long as to write them, in one thread, before the first weight was read."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True).stdout
    path = tmp_path / "shard"
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    disk.Disk().reserve(descriptor, path, 1 << 20)
    os.close(descriptor)
    assert path.stat().st_size == 1 << 20
    assert (path.stat().st_blocks == 0) == (kind.strip() == "tmpfs")


# Checking a finished output again


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    make(tmp_path / "out")
    return tmp_path / "out"


def test_an_untouched_output_verifies(finished: Path, reference: dict[str, bytes]) -> None:
    read: list[int] = []
    assert verify_record(LocalFolder(finished), read.append) == ()
    assert sum(read) == sum(len(data) for name, data in reference.items() if name != "qz.json")


def test_every_way_an_output_can_differ_from_its_record_is_found(finished: Path) -> None:
    with open(finished / SHARDS[0], "r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    (finished / "config.json").write_text('{"new": 12}')
    (finished / "tokenizer/vocab.json").unlink()
    (finished / "extra.safetensors").write_text("")
    found = {(problem.severity, problem.kind, problem.where) for problem in verify_record(LocalFolder(finished))}
    assert found == {
        ("error", "hash-differs", SHARDS[0]),
        ("error", "size-differs", "config.json"),
        ("error", "file-missing", "tokenizer/vocab.json"),
        ("warning", "file-unrecorded", "extra.safetensors"),
    }


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ("{", "json-malformed"),
        ("[]", "json-malformed"),
        ("{}", "record-malformed"),
        ('{"version": 2, "about": {}, "files": []}', "record-malformed"),
        ('{"version": 1, "about": {}, "files": [{}]}', "record-malformed"),
        ('{"version": 1, "about": {}, "files": [3]}', "record-malformed"),
        ('{"version": 1, "about": {}, "files": [{"name": "../x", "bytes": 0, "sha256": ""}]}', "record-malformed"),
        ('{"version": 1, "about": {}, "files": [{"name": "a", "bytes": true, "sha256": ""}]}', "record-malformed"),
        (" " * 10_000_001, "record-malformed"),
    ],
)
def test_a_damaged_record_is_a_problem_not_a_crash(finished: Path, record: str, kind: str) -> None:
    (finished / "qz.json").write_text(record)
    assert [problem.kind for problem in verify_record(LocalFolder(finished))] == [kind]


def test_a_record_that_was_changed_anywhere_is_damaged(reference: dict[str, bytes]) -> None:
    """Each bit of its end, where its own hash is, and one of every other byte; a space; and parts of it left out."""
    data, bits = reference["qz.json"], random.Random(0)
    record_of(data, "qz.json")
    flips = [(at, bit) for at in range(len(data)) for bit in (range(8) if at > len(data) - 90 else [bits.randrange(8)])]
    changed = [data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] for at, bit in flips]
    value = json.loads(data)
    changed += [data + b" ", data[:-1], data[1:], json.dumps(value).encode()]
    wrong: tuple[object, ...] = ("", None, "0" * 64, [])
    changed += [json.dumps(value | {"sha256": own}, indent=2).encode() for own in wrong]
    for each in changed:
        with pytest.raises(Malformed):
            record_of(each, "qz.json")


def test_a_record_of_an_earlier_qz_has_no_hash_which_is_told(finished: Path) -> None:
    record = json.loads((finished / "qz.json").read_text())
    del record["sha256"]
    (finished / "qz.json").write_text(json.dumps(record))
    told = [(problem.severity, problem.kind) for problem in verify_record(LocalFolder(finished))]
    assert told == [("warning", "record-unhashed")]
    (finished / "qz.json").write_text(json.dumps(record | {"sha257": "0" * 64}))
    assert [problem.severity for problem in verify_record(LocalFolder(finished))] == ["error"]


def test_a_checkpoint_of_others_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert [problem.kind for problem in verify_record(LocalFolder(tmp_path))] == ["record-missing"]
