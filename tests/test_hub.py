"""Repositories on the Hub are read by range, at one commit, and what arrives is what the Hub lists, or nothing does.

The client is the real huggingface_hub; the server speaks the Hub's protocol on 127.0.0.1.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import qz as package
from hub_reading import (
    CONFIG,
    FILES,
    MB,
    SMALL,
    UNHURRIED,
    WEIGHTS,
    checkpoint_bytes,
    close_all,
    failure,
    opened,
    pieces,
    read,
    stream,
)
from hub_server import OWNER, READER, Blob, HubServer, connected
from pace import HANG
from qz import HubUnreachable, MalformedInput, MissingInput, PermissionRefused, QzError, TryAgain, UsageError
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.folder import Range
from qz.formats.hub.read_ahead import AheadFile, Pace, ReadAhead
from qz.formats.source import save_memory
from qz.formats.tensors.safetensors_layout import encode_header, layout


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with connected(monkeypatch, tmp_path / "home", xet=False) as hub:
        yield hub
        close_all()


# Reading


def test_a_streamed_file_is_the_file_and_costs_its_size_once(hub: HubServer) -> None:
    hub.add("me/model", FILES, private=True)
    folder = opened(hub, pace=UNHURRIED)
    assert stream(folder) == WEIGHTS
    assert hub.bytes_out["cdn"] == len(WEIGHTS)
    assert hub.requests["resolve"] <= SMALL.connections
    assert folder.bytes_received == len(WEIGHTS)
    folder.close()


def test_the_token_is_never_sent_to_where_the_hub_redirects_to(hub: HubServer) -> None:
    hub.add("me/model", FILES, private=True)
    folder = opened(hub)
    assert read(folder, Range("config.json", 0, len(CONFIG))) == CONFIG  # within the Hub it goes along
    assert stream(folder) == WEIGHTS
    assert hub.requests["resolve_cache"] == 1
    assert hub.requests["cdn"] > 5
    assert hub.tokens_seen_by_cdn == []


def test_looking_at_headers_downloads_no_weights(hub: HubServer) -> None:
    shards = {f"model-{n:05d}-of-00004.safetensors": checkpoint_bytes(3 * MB, n) for n in range(1, 5)}
    names = [f"layer.{n}.weight" for n in range(8)]
    shards = {file: data.replace(b"layer.", b"lay%02d." % n, 8) for n, (file, data) in enumerate(shards.items())}
    weight_map = {f"lay{n:02d}.{name[6:]}": file for n, file in enumerate(shards) for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    hub.add(
        "me/model",
        {"config.json": CONFIG, "model.safetensors.index.json": str(index).replace("'", '"').encode()} | shards,
    )
    checkpoint = open_checkpoint(opened(hub))
    assert len(checkpoint.tensors) == 32
    assert hub.bytes_out["cdn"] == 4 * 65_536
    assert hub.requests["cdn"] == 4


def test_a_header_longer_than_the_first_look_is_read_whole(hub: HubServer) -> None:
    tensors = layout((f"a.tensor.with.a.rather.long.name.{n:06d}", "F32", (200,)) for n in range(2000))
    header = encode_header(tensors)
    assert len(header) > 150_000
    hub.add("me/model", {"config.json": CONFIG, "model.safetensors": header + bytes(2000 * 800)})
    assert len(open_checkpoint(opened(hub)).tensors) == 2000
    assert hub.bytes_out["cdn"] == len(header)


def test_files_of_every_kind_are_listed_page_by_page_with_their_sizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with connected(monkeypatch, tmp_path, xet=False, page_size=3) as hub:
        files = {f"file-{n}.json": b"{}" * n for n in range(10)}
        hub.add("me/model", {**files, "one/config.json": b"1", "two/deep/config.json": b"2"})
        folder = opened(hub)
        assert folder.sizes() == {name: len(data) for name, data in files.items()}
        assert folder.subfolders() == ("one", "two")
        assert hub.requests["tree"] == 4


def test_a_subfolder_is_a_folder_and_a_missing_one_is_named_with_those_there_are(hub: HubServer) -> None:
    hub.add("me/pipe", {"model_index.json": b"{}", "transformer/config.json": b"{1}", "vae/config.json": b"{2}"})
    root = opened(hub, "me/pipe")
    inner = root.subfolder("transformer")
    assert read(inner, Range("config.json", 0, 3)) == b"{1}"
    assert inner.location == f"me/pipe@{hub.repos['me/pipe'].head[:12]}/transformer"
    assert inner.identity() == {
        "repository": "me/pipe",
        "commit": hub.repos["me/pipe"].head,
        "subfolder": "transformer",
    }
    assert "Folders there: transformer, vae" in failure(lambda: root.subfolder("unet"), MissingInput)
    assert "not a folder inside" in failure(lambda: root.subfolder("../transformer"), MalformedInput)
    assert failure(lambda: read(root, Range("../x", 0, 1)), MissingInput)


def test_what_the_repository_says_of_itself_is_known(hub: HubServer) -> None:
    card = b"---\nlicense: other\nlicense_name: flux\nlicense_link: LICENSE.md\ntags: [a]\n---\n# Card\n"
    hub.add("org/model", {**FILES, "README.md": card}, gated="auto")
    folder = opened(hub, "org/model", revision="main")
    assert (folder.private, folder.gated, folder.revision) == (False, "auto", "main")
    assert folder.license == {"license": "other", "license_name": "flux", "license_link": "LICENSE.md"}
    assert folder.subfolder is not None


def test_a_repository_is_read_at_one_commit_even_when_its_branch_moves(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    folder = opened(hub)
    commit = hub.repos["me/model"].head
    read(folder, Range("model.safetensors", 0, 8))
    hub.fail(
        "cdn", nth=4, times=1, before=lambda: hub.commit("me/model", {"model.safetensors": checkpoint_bytes(seed=9)})
    )
    assert stream(folder) == WEIGHTS
    assert folder.commit == commit != hub.repos["me/model"].head


def test_any_revision_can_be_read(hub: HubServer) -> None:
    repo = hub.add("me/model", {"config.json": b"old"})
    old = repo.head
    repo.refs["a/branch"] = hub.commit("me/model", {"config.json": b"new"}, "main")
    assert read(opened(hub, revision=old), Range("config.json", 0, 3)) == b"old"
    assert read(opened(hub, revision="a/branch"), Range("config.json", 0, 3)) == b"new"
    assert "no revision 'nope'" in failure(lambda: opened(hub, revision="nope"), MissingInput)


# Order and memory


@pytest.mark.parametrize("order", ["forward", "backward", "random", "twice", "half"])
def test_readers_in_any_order_get_their_bytes_and_nothing_hangs(order: str) -> None:
    data = {f"file-{n}": random.Random(n).randbytes(700_000 + n * 12_345) for n in range(3)}
    ranges = [part for name, content in data.items() for part in pieces(len(content), 50_000, name)]
    files = [
        AheadFile(
            name,
            len(content),
            hashlib.sha256(),
            hashlib.sha256(content).hexdigest(),
            [(part.start, part.stop) for part in ranges if part.file == name],
        )
        for name, content in data.items()
    ]
    fetched = [0]

    def fetch(name: str, start: int, view: memoryview) -> None:
        view[:] = data[name][start : start + len(view)]
        fetched[0] += len(view)

    pace = Pace(segment=40_000, window=200_000, connections=3, patience=0.02)
    ahead = ReadAhead(files, fetch, "here", pace)
    asked = {
        "forward": ranges,
        "backward": ranges[::-1],
        "random": random.Random(1).sample(ranges, len(ranges)),
        "twice": ranges + ranges,
        "half": ranges[1::2],
    }[order]

    def check(part: Range) -> bool:
        buffer = bytearray(part.stop - part.start)
        ahead.read_into(part.file, part.start, memoryview(buffer))
        return bytes(buffer) == data[part.file][part.start : part.stop]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, asked, timeout=HANG))
    ahead.finish()
    ahead.close()
    total = sum(map(len, data.values()))
    assert fetched[0] == total if order == "forward" else fetched[0] >= total


def test_the_window_narrows_while_fetching_takes_memory_of_its_own() -> None:
    data, fetched, narrow = random.Random(0).randbytes(400_000), [0], [True]
    file = AheadFile("file", len(data), hashlib.sha256(), hashlib.sha256(data).hexdigest(), [(0, len(data))])

    def fetch(name: str, start: int, view: memoryview) -> None:
        view[:] = data[start : start + len(view)]
        fetched[0] += len(view)

    pace = Pace(segment=10_000, window=200_000, narrow=30_000, connections=3)
    ahead = ReadAhead([file], fetch, "here", pace, lambda: narrow[0])
    time.sleep(0.1)
    assert fetched[0] <= 30_000
    buffer = bytearray(len(data))
    for start in range(0, len(data), 50_000):
        narrow[0] = start >= 200_000 or not start
        ahead.read_into("file", start, memoryview(buffer)[start : start + 50_000])
    ahead.finish()
    ahead.close()
    assert buffer == data


def test_a_repository_that_is_published_as_it_is_read_is_fetched_less_far_ahead(hub: HubServer) -> None:
    hub.add("me/model", {f"unet/{name}": data for name, data in FILES.items()})
    root = opened(hub, pace=Pace(segment=1 << 18, window=1 << 20, narrow=1 << 18, connections=4))
    save_memory(root)
    folder = root.subfolder("unet")
    folder.announce(pieces(len(WEIGHTS)))
    read(folder, Range("model.safetensors", 0, 8))
    time.sleep(0.3)
    assert len(hub.ranges) <= 3  # the header, and a segment or two
    folder.close()


def test_memory_is_bounded_whatever_the_file_is_long(hub: HubServer, tmp_path: Path) -> None:
    large = tmp_path / "large.safetensors"
    with large.open("wb") as file:
        for n in range(24):
            file.write(random.Random(n).randbytes(1 << 20))
    hub.add("me/model", {"model.safetensors": large})
    folder = opened(hub)
    ranges = pieces(large.stat().st_size, 1 << 20)
    folder.announce(ranges)
    buffer = memoryview(bytearray(1 << 20))
    digest = hashlib.sha256()
    tracemalloc.start()
    for part in ranges:
        folder.read_into(part.file, part.start, buffer)
        digest.update(buffer)
    folder.check()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert digest.hexdigest() == Blob.of(large).sha256
    assert peak < SMALL.window + SMALL.segment + 8 * MB, peak  # the server's own pieces are among it


def test_a_reader_slower_than_the_network_holds_up_the_network(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    folder = opened(hub)
    folder.announce(pieces(len(WEIGHTS)))
    time.sleep(0.3)
    assert folder.bytes_received <= SMALL.window
    assert hub.bytes_out["cdn"] <= SMALL.window


def test_reads_that_were_not_announced_take_nothing_from_those_that_were(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    folder = opened(hub)
    half = len(WEIGHTS) // 2
    ranges = [Range("model.safetensors", half + part.start, half + part.stop) for part in pieces(half, 50_000)]
    folder.announce(ranges)
    for place, part in enumerate(ranges):
        beside = Range("model.safetensors", place * 20_000, place * 20_000 + 20_000)  # in order, in the other half
        assert read(folder, beside) == WEIGHTS[beside.start : beside.stop]
        assert read(folder, part) == WEIGHTS[part.start : part.stop]
    folder.check()
    assert hub.bytes_out["cdn"] <= len(WEIGHTS) + half


def test_threads_that_want_the_same_again_fetch_it_once(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    folder = opened(hub)
    assert stream(folder) == WEIGHTS
    hub.reset_counts()
    hub.latency = 0.05
    with ThreadPoolExecutor(8) as pool:
        again = list(pool.map(lambda place: read(folder, Range("model.safetensors", place, place + 9)), range(8)))
    assert again == [WEIGHTS[place : place + 9] for place in range(8)]
    assert hub.requests["cdn"] == 1


def test_closing_in_the_middle_ends_every_thread(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    folder = opened(hub)
    folder.announce(pieces(len(WEIGHTS)))
    read(folder, Range("model.safetensors", 0, 10))
    folder.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "qz-hub"]


# What goes wrong on the way, and passes


@pytest.mark.parametrize("kind", ["info", "tree", "resolve", "resolve_cache", "cdn"])
@pytest.mark.parametrize(
    "how",
    [{"status": 500}, {"status": 503}, {"status": 429}, {"drop": True}, {"truncate": 10}],
    ids=["500", "503", "429", "drop", "truncate"],
)
def test_a_passing_failure_at_any_step_is_overcome(hub: HubServer, kind: str, how: dict[str, Any]) -> None:
    hub.add("me/model", FILES)
    if kind == "resolve" and "truncate" in how:
        how = {"drop": True}  # a redirect has no body
    fault = hub.fail(kind, times=1, **how)
    folder = opened(hub)
    assert read(folder, Range("config.json", 0, len(CONFIG))) == CONFIG
    assert stream(folder) == WEIGHTS
    assert fault.seen > 1


def test_a_connection_that_breaks_is_continued_where_it_broke(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    hub.fail("cdn", nth=1, times=2, truncate=100_000)
    folder = opened(hub, pace=UNHURRIED)
    assert stream(folder) == WEIGHTS
    assert hub.bytes_out["cdn"] == len(WEIGHTS)


def test_a_server_that_hangs_is_asked_again(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.add("me/model", FILES)
    hub.fail("cdn", nth=2, times=1, hang=3600)  # nobody waits for an hour
    hub.fail("cdn", nth=5, times=1, stall=3600)
    assert stream(opened(hub)) == WEIGHTS
    assert hub.requests["cdn"] >= 7


def test_a_signed_link_that_expires_is_asked_for_again(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    hub.fail("cdn", nth=6, times=1, before=hub.expire_links)
    assert stream(opened(hub)) == WEIGHTS
    assert hub.requests["resolve"] > 1


def test_a_rate_limit_is_waited_for_as_long_as_the_hub_asks(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    hub.fail("cdn", nth=2, times=1, status=429, headers={"Retry-After": "1"})
    began = time.monotonic()
    assert stream(opened(hub)) == WEIGHTS
    assert time.monotonic() - began >= 1


def test_a_renamed_repository_is_read_under_its_new_name(hub: HubServer) -> None:
    hub.add("me/old", FILES)
    hub.rename("me/old", "me/new")
    folder = opened(hub, "me/old")
    assert folder.repo_id == "me/new"
    assert stream(folder) == WEIGHTS


@pytest.mark.parametrize("how", [{"ignore_range": True}, {"replace": {"Content-Range": None}}], ids=["200", "unsaid"])
def test_a_file_without_ranges_is_copied_to_the_disk_only_when_asked_for(
    hub: HubServer, tmp_path: Path, how: dict[str, Any]
) -> None:
    hub.add("me/model", FILES)
    hub.fail("cdn", **how)
    message = failure(lambda: stream(opened(hub)), TryAgain)
    assert "--download" in message
    assert f"{len(WEIGHTS):,} bytes on disk" in message
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    folder = opened(hub)
    folder.download(["model.safetensors"])
    assert stream(folder) == WEIGHTS


def test_a_file_is_settled_when_all_of_it_was_hashed_and_not_before(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    folder = opened(hub)
    ranges = pieces(len(WEIGHTS))
    folder.announce(ranges)
    read(folder, ranges[0])
    assert not folder.is_verified("model.safetensors")
    for part in ranges[1:]:
        read(folder, part)
    folder.check()
    assert folder.is_verified("model.safetensors")


# What goes wrong and stays so


@pytest.mark.parametrize(
    ("how", "errors"),
    [
        ({"status": 401, "code": "RepoNotFound"}, (MissingInput,)),
        ({"status": 401, "message": "Invalid credentials in Authorization header"}, (PermissionRefused,)),
        ({"status": 403, "message": f"no: {OWNER}"}, (PermissionRefused,)),
        ({"status": 403, "code": "GatedRepo"}, (PermissionRefused,)),
        ({"status": 404, "code": "EntryNotFound"}, (MissingInput,)),
        ({"status": 404, "code": "RevisionNotFound"}, (MissingInput,)),
        ({"status": 404, "code": "RepoNotFound"}, (MissingInput,)),
        ({"status": 400, "message": "bad"}, (MalformedInput,)),
        ({"status": 429}, (TryAgain,)),
        ({"status": 500}, (HubUnreachable,)),
        ({"drop": True}, (HubUnreachable,)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", ["info", "tree", "resolve"])
def test_a_lasting_failure_at_any_step_is_a_documented_error(
    hub: HubServer, kind: str, how: dict[str, Any], errors: tuple[type[QzError], ...]
) -> None:
    hub.add("me/model", FILES)
    hub.fail(kind, **how)
    message = failure(lambda: stream(opened(hub)), *errors)
    assert "me/model" in message
    assert any(word in message for word in ("gain", "See ", "see ", "Run", "http", "Ask"))


@pytest.mark.parametrize(
    ("how", "errors"),
    [
        ({"status": 404}, (MissingInput,)),
        ({"status": 429}, (TryAgain,)),
        ({"status": 500}, (HubUnreachable,)),
        ({"drop": True}, (HubUnreachable,)),
        ({"truncate": 1000}, (HubUnreachable,)),
        ({"replace": {"Content-Length": "100"}}, (HubUnreachable,)),
        ({"corrupt": True}, (MalformedInput,)),
        ({"replace": {"Content-Range": "bytes 0-9/10"}}, (MalformedInput,)),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_weights_that_do_not_arrive_whole_never_become_an_output(
    hub: HubServer, how: dict[str, Any], errors: tuple[type[QzError], ...]
) -> None:
    hub.add("me/model", FILES)
    hub.fail("cdn", nth=3, **how)
    failure(lambda: stream(opened(hub)), *errors)


@pytest.mark.parametrize("nth", range(1, 13))
def test_one_wrong_byte_of_the_right_size_is_found_wherever_it_is(hub: HubServer, nth: int) -> None:
    hub.add("me/model", FILES)
    hub.fail("cdn", nth=nth, times=1, corrupt=True)
    failure(lambda: stream(opened(hub)), MalformedInput)


def test_a_header_that_arrived_wrong_is_found_when_the_file_streams(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    hub.fail("cdn", nth=1, times=1, corrupt=True)
    folder = opened(hub)
    assert read(folder, Range("model.safetensors", 0, 8)) != WEIGHTS[:8]
    assert "does not match the hash" in failure(lambda: stream(folder), MalformedInput)


def test_bytes_that_are_read_again_must_be_the_same_again(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    folder = opened(hub)
    assert stream(folder) == WEIGHTS
    assert read(folder, Range("model.safetensors", 400_000, 600_000)) == WEIGHTS[400_000:600_000]
    hub.fail("cdn", corrupt=True)
    failure(lambda: read(folder, Range("model.safetensors", 2 * MB, 2 * MB + 10)), MalformedInput)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.model"])
def test_a_small_file_that_arrives_wrong_is_refused_at_once(hub: HubServer, file: str) -> None:
    hub.add("me/model", {"config.json": CONFIG, "tokenizer.model": b"\0tokens"})
    hub.fail("cdn", corrupt=True)
    hub.fail("resolve_cache", corrupt=True)
    assert "does not match the hash" in failure(lambda: read(opened(hub), Range(file, 0, 3)), MalformedInput)


@pytest.mark.parametrize(
    "replace", [{"X-Repo-Commit": "0" * 40}, {"X-Linked-Etag": '"' + "0" * 64 + '"'}], ids=["commit", "etag"]
)
def test_an_answer_from_another_commit_is_refused(hub: HubServer, replace: dict[str, str]) -> None:
    hub.add("me/model", FILES)
    hub.fail("resolve", replace=replace)
    assert "not what the Hub lists" in failure(lambda: stream(opened(hub)), MalformedInput)


def test_a_commit_that_vanishes_while_it_is_read_is_named(hub: HubServer) -> None:
    repo = hub.add("me/model", FILES)
    folder = opened(hub)
    folder.sizes()
    hub.commit("me/model", {"config.json": b"{}"})
    del repo.commits[folder.commit]
    assert folder.commit in failure(lambda: stream(folder), MissingInput)


def test_a_rate_limit_that_lasts_too_long_is_for_the_user_to_wait(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    hub.fail("cdn", status=429, headers={"Retry-After": "3600"})
    assert "3600 s" in failure(lambda: stream(opened(hub)), TryAgain)
    assert hub.requests["cdn"] < 20, "nothing is asked again, and nobody waits for an hour"


# Who may read


def test_gated_repositories_say_where_to_ask_for_access(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("big/flux", FILES, gated="auto")
    message = failure(lambda: open_checkpoint(opened(hub, "big/flux")), PermissionRefused)
    assert f"{hub.url}/big/flux" in message
    assert "gated" in message
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in failure(lambda: open_checkpoint(opened(hub, "big/flux")), PermissionRefused)
    hub.repos["big/flux"].granted.add("reader")
    monkeypatch.setenv("HF_TOKEN", READER)
    assert stream(opened(hub, "big/flux")) == WEIGHTS


@pytest.mark.parametrize("token", [None, READER])
def test_private_and_missing_repositories_cannot_be_told_apart(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    hub.add("me/secret", FILES, private=True)
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    secret = failure(lambda: opened(hub, "me/secret"), MissingInput)
    nothing = failure(lambda: opened(hub, "me/nothing"), MissingInput)
    assert secret.replace("secret", "nothing") == nothing
    assert "private" in secret


def test_a_token_that_the_hub_does_not_know_is_an_authentication_error(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/model", FILES)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    message = failure(lambda: opened(hub), PermissionRefused)
    assert "hf auth" in message
    assert "hf_expired" not in message


def test_a_disabled_repository_and_an_impossible_name_are_told(hub: HubServer) -> None:
    hub.add("me/gone", FILES, disabled=True)
    assert "disabled" in failure(lambda: opened(hub, "me/gone"), PermissionRefused)
    assert "owner/name" in failure(lambda: opened(hub, "me/a/b"), UsageError)


# Without the Hub, and with its cache


def test_nobody_there_is_told_as_such(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert "does not answer" in failure(lambda: opened(hub), HubUnreachable)


def test_files_in_the_cache_are_not_asked_for_again(hub: HubServer) -> None:
    hub.add("me/model", {**FILES, "other.json": b"{}"})
    opened(hub).download(FILES)
    hub.reset_counts()
    folder = opened(hub)
    assert stream(folder) == WEIGHTS
    assert read(folder, Range("config.json", 0, len(CONFIG))) == CONFIG
    assert read(folder, Range("other.json", 0, 2)) == b"{}"
    assert set(hub.requests) == {"info", "tree", "resolve", "resolve_cache"}
    assert hub.requests["resolve"] == 1
    assert folder.bytes_received == 2


def test_a_cached_file_of_another_size_is_not_used(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/model", FILES)
    opened(hub).download(FILES)
    next(tmp_path.glob("home/hub/models--me--model/snapshots/*/model.safetensors")).resolve().write_bytes(WEIGHTS[:99])
    assert stream(opened(hub)) == WEIGHTS


def test_a_cached_file_that_changes_while_it_is_read_is_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/model", FILES)
    folder = opened(hub)
    folder.download(FILES)
    read(folder, Range("model.safetensors", 0, 8))
    path = next(tmp_path.glob("home/hub/models--me--model/snapshots/*/model.safetensors")).resolve()
    path.write_bytes(WEIGHTS[::-1])
    failure(folder.check, MalformedInput)


def test_a_download_fills_the_cache_and_reports_each_file(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    folder, arrived = opened(hub), list[tuple[str, int]]()
    folder.download(FILES, lambda file, size: arrived.append((file, size)))
    assert sorted(arrived) == [("config.json", len(CONFIG)), ("model.safetensors", len(WEIGHTS))]
    hub.reset_counts()
    assert stream(folder) == WEIGHTS
    assert not hub.requests


@pytest.mark.parametrize("how", [{"corrupt": True}, {"status": 403}, {"status": 404}, {"status": 500}, {"drop": True}])
@pytest.mark.parametrize("way", ["cdn", "xorb"])
def test_a_download_that_fails_leaves_nothing_in_the_cache(
    hub: HubServer, tmp_path: Path, how: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", way == "cdn")
    hub.add("me/model", FILES)
    hub.fail(way, **how)
    failure(lambda: opened(hub).download(["model.safetensors"]), QzError)
    found = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size > MB]
    assert found == []


def test_offline_the_cache_is_all_there_is(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add("me/model", {**FILES, "sub/config.json": b"{3}", "not-cached.json": b"{}"})
    folder = opened(hub)
    folder.download(FILES)
    folder.subfolder("sub").download(["config.json"])
    commit = folder.commit
    from huggingface_hub import hf_hub_download

    hf_hub_download("me/model", "config.json")  # which notes what main is
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.reset_counts()
    folder = opened(hub)
    assert (folder.commit, folder.private) == (commit, None)
    assert stream(folder) == WEIGHTS
    assert folder.subfolders() == ("sub",)
    assert read(folder.subfolder("sub"), Range("config.json", 0, 3)) == b"{3}"
    assert "HF_HUB_OFFLINE" in failure(lambda: read(folder, Range("not-cached.json", 0, 2)), MissingInput)
    assert "HF_HUB_OFFLINE" in failure(lambda: opened(hub, "me/other"), HubUnreachable)
    assert not hub.requests


@pytest.mark.parametrize("answer", [{"status": 503}, {"drop": True}])
def test_when_the_hub_does_not_answer_a_complete_copy_in_the_cache_is_used_and_that_is_said(
    hub: HubServer, answer: dict[str, Any]
) -> None:
    from huggingface_hub import snapshot_download

    hub.add("me/model", FILES)
    snapshot_download("me/model")
    fault = hub.fail("info", **answer)
    folder = opened(hub)
    assert fault.seen
    assert stream(folder) == WEIGHTS
    assert folder.note is not None
    assert f"Used instead: {folder.location} from the Hub cache" in folder.note
    assert "main may name a newer commit" in folder.note
    assert "newer" not in str(opened(hub, revision=folder.commit).note)
    assert "does not exist in the cache, and the Hub does not answer" in failure(
        lambda: read(folder, Range("other.json", 0, 2)), MissingInput
    )
    failure(lambda: opened(hub, cached=False), HubUnreachable)


def test_a_copy_in_the_cache_that_is_not_known_to_be_complete_is_not_used(hub: HubServer, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download

    hub.add("me/parts", FILES)
    hf_hub_download("me/parts", "config.json")
    hub.add("me/broken", FILES)
    next(Path(snapshot_download("me/broken")).glob("model.safetensors")).unlink()
    hub.add("me/unlisted", FILES)
    listings = Path(snapshot_download("me/unlisted")).parent.parent / "trees"
    for listing in listings.iterdir():
        listing.write_text("{}")
    hub.fail("info", status=503)
    for name in ("me/parts", "me/broken", "me/unlisted", "me/never"):
        failure(lambda name=name: opened(hub, name), HubUnreachable)  # type: ignore[misc]


def test_a_failure_while_headers_are_read_is_not_blamed_on_the_checkpoint(hub: HubServer) -> None:
    hub.add("me/model", FILES)
    hub.fail("cdn", status=503)
    failure(lambda: open_checkpoint(opened(hub)), HubUnreachable)


def test_the_environment_alone_decides_where_the_hub_is(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/model", FILES, private=True)
    script = (
        "from qz.formats.hub.opening import open_repo\n"
        "folder = open_repo('me/model')\n"
        "data = bytearray(8); folder.read_into('model.safetensors', 0, memoryview(data))\n"
        "print(data.hex(), folder.private)\n"
    )
    root = Path(package.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.stdout.split() == [WEIGHTS[:8].hex(), "True"], done.stderr
    assert OWNER not in done.stderr
