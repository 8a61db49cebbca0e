"""With --push-only each finished shard is sent and deleted: no output is here, and all of it is in one commit there."""

from __future__ import annotations

import errno
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import pipelines
from forked import Runner
from hooks import every_disk
from hub_server import HubServer, connected, connected_forks
from pushes import failure, hurry
from qz import IOFailed, OutputRefused, PermissionRefused, TryAgain, UsageError
from qz.api import Int8, Nf4, dequantize, quantize
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.models.plan import plan_quantization
from qz.quantize.settings import Settings
from qz.quantize.streaming.output.shard_order import by_shard, shard_order

SHARD = 500_000
COMMAND = ("quantize", "--push", "me/new", "--push-only", "--max-shard-size", "500KB", "--quiet")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    hurry(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with connected(monkeypatch, tmp_path / "home") as hub:
        yield hub


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 MB in two shards, of which six come out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("llama") / "llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="3MB")
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture(scope="module")
def kept(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the same run leaves in a folder."""
    output = tmp_path_factory.mktemp("kept") / "output"
    quantize(llama, output, max_shard_bytes=SHARD)
    return files_in(output)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def there(hub: HubServer, name: str = "me/new") -> dict[str, bytes]:
    return {path: data for path, data in hub.repos[name].files().items() if path not in ("README.md", ".gitattributes")}


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "home")


def on_disk(path: Path) -> int:
    """Bytes that it takes there."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def run(llama: Path | str, **options: Any) -> Any:
    return quantize(llama, push="me/new", push_only=True, max_shard_bytes=SHARD, threads=2, **options)


def test_what_is_pushed_is_what_would_have_been_kept(
    hub: HubServer, llama: Path, kept: dict[str, bytes], tmp_path: Path
) -> None:
    summary = run(llama)
    assert there(hub) == kept
    assert len([name for name in kept if name.endswith(".safetensors")]) >= 5
    assert left(tmp_path) == []
    assert len(hub.commit_bodies) == 1
    assert hub.commit_bodies[0][0]["value"]["parentCommit"] == hub.repos["me/new"].parents[hub.repos["me/new"].head]
    assert hub.repos["me/new"].private
    assert summary.as_json()["output"] is None
    assert summary.as_json()["push"]["commit"] == hub.repos["me/new"].head
    assert summary.as_json()["push"]["bytes"]["uploaded"] > 1_000_000
    assert "nf4" in hub.repos["me/new"].files()["README.md"].decode()


def test_from_the_hub_to_the_hub_neither_source_nor_output_is_on_the_disk(
    hub: HubServer, llama: Path, kept: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("big/llama", {path.name: path for path in llama.iterdir()})
    run("big/llama")
    weights = {name: data for name, data in there(hub).items() if name.endswith(".safetensors")}
    assert weights == {name: data for name, data in kept.items() if name.endswith(".safetensors")}
    assert left(tmp_path) == []


def test_no_more_than_two_shards_are_on_the_disk(hub: HubServer, llama: Path, tmp_path: Path) -> None:
    """However slow the network is: what is made waits."""
    hub.fail("xorb_put", hang=0.2)
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, sum(on_disk(path) > 125_000 for path in tmp_path.glob("*.partial/*.safetensors*")))
            time.sleep(0.005)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        run(llama)
    finally:
        over.set()
        watching.join()
    assert 1 <= most <= 2


def test_a_source_whose_tensors_lie_in_another_order_is_no_deadlock(hub: HubServer, tmp_path: Path) -> None:
    """layers.10 lies before layers.2, in one file that is read from its beginning: more than two shards are open."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=12, vocab_size=64, tie_word_embeddings=False, dtype="bfloat16")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    hub.add("big/llama", {path.name: path for path in (tmp_path / "model").iterdir()})
    quantize("big/llama", tmp_path / "kept", max_shard_bytes=50_000)
    summary = quantize("big/llama", push="me/new", push_only=True, max_shard_bytes=50_000, threads=4)
    plan = plan_quantization(open_checkpoint(LocalFolder(tmp_path / "model")), Settings(Nf4(), max_shard_bytes=50_000))
    assert shard_order(plan).at_once > 2
    assert shard_order(by_shard(plan)).at_once == 2
    assert len(summary.as_json()["shards"]) > 4
    assert there(hub) == files_in(tmp_path / "kept")


def test_int8_and_the_way_back_go_the_same_way(hub: HubServer, llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "int8", method=Int8())
    dequantize(tmp_path / "int8", tmp_path / "back", max_shard_bytes=SHARD)
    dequantize(tmp_path / "int8", push="me/new", push_only=True, max_shard_bytes=SHARD)
    assert there(hub) == files_in(tmp_path / "back")


def test_a_pipeline_goes_component_by_component(
    hub: HubServer, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flux = pipelines.flux(tmp_path_factory.mktemp("flux") / "flux")
    quantize(flux, tmp_path / "kept", max_shard_bytes=100_000)
    quantize(flux, push="me/new", push_only=True, max_shard_bytes=100_000)
    assert there(hub) == files_in(tmp_path / "kept")
    assert left(tmp_path) == ["kept"]


@pytest.mark.parametrize(
    ("kind", "nth", "sent"),
    [
        ("info", 3, False),
        ("xet_token", 3, True),
        ("xorb_grant", 3, True),
        ("xorb_put", 3, True),
        ("xorb_commit", 3, True),
        ("shard", 3, True),
        ("preupload", 1, True),
        ("validate_yaml", 1, True),
        ("commit", 1, True),
        ("tree", 2, True),
    ],
)
def test_a_run_that_ends_at_any_step_is_continued(
    hub: HubServer, llama: Path, kept: dict[str, bytes], tmp_path: Path, kind: str, nth: int, sent: bool
) -> None:
    hub.fail(kind, nth=nth, status=403, message="not now")
    hub.fail("xorb_post", status=403)  # what hf_xet does where the granted link fails
    failure(lambda: run(llama), PermissionRefused)
    hub.faults.clear()
    hub.reset_counts()
    summary = run(llama)
    assert there(hub) == kept
    assert summary.resumed is sent
    assert not sent or hub.requests["xorb_put"] <= 4
    assert left(tmp_path) == []
    assert len(hub.commit_bodies) == 1


@pytest.mark.parametrize(
    ("threads", "writes"),
    [
        *((threads, (45, 75)) for threads in (1, 3)),
        *(pytest.param(threads, range(40, 80, 5), marks=pytest.mark.soak) for threads in (1, 3)),
    ],
)
def test_a_run_that_ends_inside_a_shard_is_continued_there(
    hub: HubServer, llama: Path, kept: dict[str, bytes], tmp_path: Path, threads: int, writes: Sequence[int]
) -> None:
    """Shards that were begun are here already when their turn comes, whatever is written first."""
    told = []
    for number, last in enumerate(writes):
        numbers = count()

        def hook(operation: str, _: str, last: int = last, numbers: Iterator[int] = numbers) -> None:
            if operation == "write" and next(numbers) == last:
                raise OSError(errno.EIO, "worn out")

        def go(name: str = f"me/new-{number}", **options: Any) -> Any:
            return quantize(llama, push=name, push_only=True, max_shard_bytes=SHARD, threads=threads, **options)

        with every_disk(hook, keep_every=25_000), pytest.raises(IOFailed):
            go()
        summary = go(on_progress=lambda step: told.append(step.kept_bytes))
        assert summary.resumed
        assert there(hub, f"me/new-{number}") == kept
        assert left(tmp_path) == []
    assert any(told)


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_uploads_that_the_hub_swept_out_are_made_once_more(
    hub: HubServer, llama: Path, kept: dict[str, bytes], xet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    hub.fail("commit", times=1, before=hub.lose_uploads)
    run(llama)
    assert there(hub) == kept
    assert hub.requests["commit"] == 2
    assert bool(hub.requests["lfs_put"]) is not xet


def test_a_hub_that_keeps_nothing_is_told_and_may_be_tried_again(hub: HubServer, llama: Path) -> None:
    hub.fail("commit", before=hub.lose_uploads)
    assert "no longer holds" in failure(lambda: run(llama), TryAgain)
    assert hub.requests["commit"] == 2


def test_another_commit_meanwhile_is_not_overwritten(hub: HubServer, llama: Path, kept: dict[str, bytes]) -> None:
    hub.add("me/new", {}, private=True)
    hub.fail("commit", times=1, before=lambda: hub.commit("me/new", {"theirs.txt": b"x"}))
    assert "changed meanwhile" in failure(lambda: run(llama), TryAgain)
    hub.reset_counts()
    run(llama)
    assert there(hub) == kept | {"theirs.txt": b"x"}
    assert hub.requests["xorb_put"] == 0


def test_what_cannot_be_published_is_known_before_the_work(hub: HubServer, llama: Path) -> None:
    hub.add("me/new", {"model.safetensors": b"theirs"}, private=True)
    assert "other weights" in failure(lambda: run(llama), OutputRefused)
    assert "other weights" in failure(lambda: run(llama, dry_run=True), OutputRefused)
    hub.add("someone/else", {}, private=False)
    failure(lambda: quantize(llama, push="someone/else", push_only=True, public=True), PermissionRefused)
    assert not hub.requests["shard"]
    failure(lambda: quantize(llama, push_only=True), UsageError)
    failure(lambda: run(llama, if_exists="skip"), UsageError)


def test_another_destination_does_not_go_on_with_what_was_sent_elsewhere(hub: HubServer, llama: Path) -> None:
    hub.fail("commit", status=403)
    failure(lambda: run(llama), PermissionRefused)
    hub.faults.clear()
    message = failure(lambda: quantize(llama, push="me/other", push_only=True, max_shard_bytes=SHARD), OutputRefused)
    assert "repository: me/new → me/other" in message


def test_a_dry_run_sends_nothing(hub: HubServer, llama: Path, tmp_path: Path) -> None:
    summary = run(llama, dry_run=True)
    assert summary.as_json()["output"] is None
    assert "me/new" not in hub.repos
    assert left(tmp_path) == []


def test_a_dry_run_says_what_the_run_would_go_on_with(
    hub: HubServer, llama: Path, kept: dict[str, bytes], tmp_path: Path
) -> None:
    """Of a run for the same place, with the same settings; of another one it refuses to, as the run does."""
    assert not run(llama, dry_run=True).resumed
    hub.fail("commit", status=403)
    failure(lambda: run(llama), PermissionRefused)
    hub.faults.clear()
    before = left(tmp_path)
    assert run(llama, dry_run=True).as_json()["resumed"]
    assert not run(llama, dry_run=True, resume=False).resumed
    other_size = {"push": "me/new", "max_shard_bytes": SHARD + 1}
    other_place = {"push": "me/other", "max_shard_bytes": SHARD}
    for options, said in ((other_size, "max shard bytes"), (other_place, "repository: me/new → me/other")):
        for dry in (False, True):
            again = partial(quantize, llama, push_only=True, dry_run=dry, **options)  # type: ignore[arg-type]
            assert said in failure(again, OutputRefused)
    assert left(tmp_path) == before
    assert run(llama).resumed
    assert there(hub) == kept


def test_only_this_users_lines_say_what_was_sent_where_there_is_a_key(
    hub: HubServer, llama: Path, kept: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was sent no byte is here to be compared: a line in the journal is all there is."""
    for number, (cache, resumed) in enumerate([(str(tmp_path / "home/other"), False), ("", True)]):
        place, failing = f"me/new-{number}", hub.fail("commit", status=403)
        monkeypatch.setenv("QZ_CACHE", str(tmp_path / "home/cache"))
        again = partial(quantize, llama, push=place, push_only=True, max_shard_bytes=SHARD)
        failure(again, PermissionRefused)
        hub.faults.remove(failing)
        monkeypatch.setenv("QZ_CACHE", cache)
        assert again(dry_run=True).as_json()["resumed"] is resumed
        assert again().as_json()["resumed"] is resumed
        assert there(hub, place) == kept


def test_a_dry_run_of_a_part_says_that_it_is_made(hub: HubServer, llama: Path, tmp_path: Path) -> None:
    def part(**options: Any) -> Any:
        return quantize(llama, tmp_path / "out", part="1/2", max_shard_bytes=SHARD, **options)

    assert not part(dry_run=True).resumed
    part()
    assert part(dry_run=True).resumed
    assert part().resumed


def test_ctrl_c_ends_it_at_once_and_what_was_sent_is_kept(
    hub: HubServer, llama: Path, tmp_path: Path, forks: Runner
) -> None:
    fault = hub.fail("xorb_put", nth=3, hang=120)
    running = connected_forks(forks).start(*COMMAND, llama, cwd=tmp_path)
    while fault.seen < 3 and not select.select([running.socket], [], [], 0)[0]:
        time.sleep(0.05)
    began = time.monotonic()
    running.kill(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - began < 30
    assert "kept" in ended.stderr
