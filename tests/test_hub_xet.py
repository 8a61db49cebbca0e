"""When the CDN refuses, files come over Xet, by the real hf_xet: the same bytes, or an error that names both ways."""

from __future__ import annotations

import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from forked import Runner
from hub_reading import CONFIG, FILES, QUICK, WEIGHTS, close_all, failure, opened, read, stream
from hub_server import READER, HubServer, connected, connected_forks
from pace import HANG
from qz import HubUnreachable, MalformedInput, QzError, TryAgain
from qz.formats.files.folder import Range
from qz.formats.hub.transport import session, xet
from qz.formats.hub.transport.backoff import Retries

Connect = Callable[..., HubServer]
HEAD = Range("model.safetensors", 0, 8)


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Connect]:
    """A Hub with Xet and these rules, which holds ``me/model``."""
    monkeypatch.setitem(xet.SETTINGS, "client.retry_base_delay", "20ms")
    monkeypatch.setattr(session, "ASKING", QUICK)
    with ExitStack() as stack:

        def start(**rules: Any) -> HubServer:
            hub = stack.enter_context(connected(monkeypatch, tmp_path / "home", xet=True, **rules))
            hub.add("me/model", FILES)
            return hub

        yield start
        close_all()


def refusing(connect: Connect, **rules: Any) -> HubServer:
    """A Hub whose CDN serves xorbs, but no files."""
    hub = connect(**rules)
    hub.fail("cdn", status=403, message="SignatureError: invalid key pair id")
    return hub


BEYOND_PATIENCE = {"RateLimit": '"resolvers";r=0;t=301'}
REFUSALS: dict[str, dict[str, Any]] = {
    "links": {"kind": "cdn", "status": 403},
    "400": {"kind": "cdn", "status": 400},
    "404": {"kind": "cdn", "status": 404},
    "no-ranges": {"kind": "cdn", "ignore_range": True},
    "compressed": {"kind": "cdn", "replace": {"Content-Encoding": "gzip"}},
    "no-content-range": {"kind": "cdn", "replace": {"Content-Range": None}},
    "cdn-429": {"kind": "cdn", "status": 429},
    "cdn-503": {"kind": "cdn", "status": 503},
    "cdn-drops": {"kind": "cdn", "drop": True},
    "resolvers": {"kind": "resolve", "status": 429, "headers": BEYOND_PATIENCE},
}


@pytest.mark.parametrize("how", REFUSALS.values(), ids=REFUSALS.keys())
@pytest.mark.parametrize("v2", [True, False], ids=["v2", "v1"])
def test_what_the_cdn_refuses_comes_over_xet(
    connect: Connect, caplog: pytest.LogCaptureFixture, how: dict[str, Any], v2: bool
) -> None:
    hub = connect(reconstructions_v2=v2)
    hub.fail(**how)
    folder = opened(hub)
    assert read(folder, HEAD) == WEIGHTS[:8]
    assert stream(folder) == WEIGHTS
    assert folder.is_verified("model.safetensors")
    assert hub.requests["xet_token"] == 1
    assert hub.requests["cdn"] <= 3
    assert len([line for line in caplog.messages if "reading it over Xet" in line]) == 1
    assert hub.tokens_seen_by_cdn == []


def test_while_the_cdn_serves_nothing_is_asked_of_xet(connect: Connect) -> None:
    hub = connect()
    assert stream(opened(hub)) == WEIGHTS
    assert hub.requests["xet_token"] == 0


PASSING: dict[str, dict[str, Any]] = {
    "503": {"status": 503},
    "403": {"status": 403},
    "429": {"status": 429},
    "drop": {"drop": True},
    "truncate": {"truncate": 100},
}


@pytest.mark.parametrize("kind", ["xet_token", "reconstruction", "xorb"])
@pytest.mark.parametrize("how", PASSING.values(), ids=PASSING.keys())
def test_a_passing_failure_of_xet_is_overcome(connect: Connect, kind: str, how: dict[str, Any]) -> None:
    hub = refusing(connect)
    fault = hub.fail(kind, nth=1, times=1, **how)
    assert stream(opened(hub)) == WEIGHTS
    assert fault.seen > 1


@pytest.mark.parametrize("kind", ["xet_token", "reconstruction", "xorb"])
@pytest.mark.parametrize("status", [401, 403, 404, 416, 429, 503])
def test_a_lasting_failure_of_both_ways_names_both(connect: Connect, kind: str, status: int) -> None:
    """hf_xet often ends such a stream without an error: what is missing is counted."""
    hub = refusing(connect)
    hub.fail(kind, status=status)
    message = failure(lambda: read(opened(hub), HEAD), TryAgain, HubUnreachable)
    assert "invalid key pair id" in message
    assert "Xet: " in message


@pytest.mark.parametrize(
    "storage", ["local://{folder}", "file://{folder}", "memory:", "/{folder}", "http://", "http://["]
)
def test_a_storage_that_is_not_on_the_web_is_none(connect: Connect, storage: str, tmp_path: Path) -> None:
    """hf_xet takes a folder of this machine for one."""
    folder = tmp_path / "storage"
    folder.mkdir()
    hub = refusing(connect)
    hub.fail("xet_token", replace={"X-Xet-Cas-Url": storage.format(folder=folder)})
    assert "not a web address" in failure(lambda: read(opened(hub), HEAD), TryAgain, HubUnreachable)
    assert not any(folder.iterdir())


def test_the_cdn_is_tried_once_more_when_xet_fails(connect: Connect) -> None:
    hub = connect()
    hub.fail("cdn", times=2, status=403)
    hub.fail("reconstruction", status=404)
    folder = opened(hub)
    assert read(folder, HEAD) == WEIGHTS[:8]
    asked = hub.requests["reconstruction"]
    assert stream(folder) == WEIGHTS
    assert hub.requests["reconstruction"] == asked  # and from then on the CDN comes first again


def test_one_flipped_byte_over_xet_is_found_by_the_hash(connect: Connect) -> None:
    hub = refusing(connect)
    hub.fail("xorb", nth=3, times=1, corrupt=True)
    assert "does not match the hash" in failure(lambda: stream(opened(hub)), MalformedInput)


def test_a_reconstruction_that_lacks_terms_is_no_success(connect: Connect) -> None:
    hub = refusing(connect)
    fault = hub.fail("reconstruction", nth=2, lacking=True)
    failure(lambda: stream(opened(hub)), TryAgain)
    hub.faults.remove(fault)
    hub.fail("reconstruction", nth=2, times=1, lacking=True)
    assert stream(opened(hub)) == WEIGHTS


def test_a_token_that_the_server_ends_early_is_asked_for_again(connect: Connect) -> None:
    hub = refusing(connect)
    folder = opened(hub)
    assert read(folder, HEAD) == WEIGHTS[:8]
    hub.pass_time(hub.rules.xet_token_seconds + 1)
    assert stream(folder) == WEIGHTS
    assert hub.requests["xet_token"] >= 2


def test_a_token_shorter_than_hf_xets_own_margin_is_renewed_by_it(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xet, "BEFORE_EXPIRY", 0)
    hub = refusing(connect, xet_token_seconds=20)
    assert stream(opened(hub)) == WEIGHTS
    assert hub.requests["xet_token"] > 1


def test_a_token_about_to_expire_is_renewed_before(connect: Connect) -> None:
    hub = refusing(connect, xet_token_seconds=xet.BEFORE_EXPIRY - 1)
    folder = opened(hub)
    read(folder, HEAD)
    assert stream(folder) == WEIGHTS
    assert hub.answers["reconstruction", 401] == 0
    assert hub.requests["xet_token"] > 2


@pytest.mark.parametrize("kind", ["xet_token", "reconstruction", "xorb"])
def test_a_silence_is_given_up_after_a_while(connect: Connect, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from huggingface_hub import constants

    hub = refusing(connect)
    folder = opened(hub)
    folder.sizes()
    monkeypatch.setattr(xet, "LONGEST_SILENCE", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.fail(kind, hang=3600)
    message = failure(lambda: read(folder, HEAD), TryAgain, HubUnreachable)
    assert "does not answer" in message if kind == "xet_token" else "no byte arrived" in message


def test_closing_ends_a_stream_that_waits(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when the silence has become too long for qz or for hf_xet; and nothing is left waiting behind."""
    monkeypatch.setattr(xet, "LONGEST_SILENCE", 2 * HANG)
    for name in ("read_timeout", "retry_max_duration"):
        monkeypatch.setitem(xet.SETTINGS, f"client.{name}", f"{2 * HANG}s")
    hub = refusing(connect)
    fault = hub.fail("xorb", hang=3600)
    folder = opened(hub)
    said: list[str] = []
    reading = threading.Thread(target=lambda: said.append(failure(lambda: read(folder, HEAD), TryAgain)), daemon=True)
    reading.start()
    while not fault.seen:
        assert reading.is_alive()
        time.sleep(0.01)
    waiting = [thread for thread in threading.enumerate() if thread.name == "qz-xet"]
    assert waiting
    folder.give_up()
    for thread in (reading, *waiting):
        thread.join(HANG)
        assert not thread.is_alive()
    assert "stopped" in said[0]


@pytest.mark.parametrize("kind", ["cdn", "reconstruction", "xorb"])
def test_an_interrupt_ends_a_command_that_waits(connect: Connect, kind: str, forks: Runner, tmp_path: Path) -> None:
    hub = connect() if kind == "cdn" else refusing(connect)
    fault = hub.fail(kind, hang=3600)
    running = connected_forks(forks).start("inspect", "me/model", cwd=tmp_path)
    while not fault.seen:
        assert not select.select([running.socket], [], [], 0)[0], running.wait()
        time.sleep(0.05)
    time.sleep(0.3)
    running.kill(signal.SIGINT)
    assert running.wait().code == 130


@pytest.mark.parametrize("why", ["stored", "disabled", "old"])
def test_why_a_file_cannot_come_over_xet_is_said(connect: Connect, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    from huggingface_hub import constants

    hub = refusing(connect, without_xet=("*.safetensors",) if why == "stored" else ())
    if why == "disabled":
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    if why == "old":
        monkeypatch.setattr("importlib.metadata.version", {"hf_xet": "1.6.3"}.__getitem__)
    said = {"stored": "not stored in Xet", "disabled": "HF_HUB_DISABLE_XET", "old": "hf_xet 1.6.3 is too old"}[why]
    message = failure(lambda: read(opened(hub), HEAD), TryAgain)
    assert said in message
    assert "--download" in message
    assert hub.requests["xet_token"] == 0


def test_a_gated_repository_is_gated_over_xet_too(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = refusing(connect)
    monkeypatch.setenv("HF_TOKEN", READER)
    folder = opened(hub)
    folder.sizes()
    hub.faults[0].before, hub.faults[0].status = lambda: setattr(hub.repos["me/model"], "gated", "auto"), 400
    failure(lambda: read(folder, HEAD), QzError)
    assert hub.answers["xet_token", 200] == 0


def test_a_download_over_xet_fills_the_cache_with_the_same_bytes(connect: Connect) -> None:
    hub = connect()
    folder = opened(hub)
    folder.download(FILES)
    assert hub.requests["reconstruction"] > 0
    assert hub.requests["cdn"] == 0
    hub.reset_counts()
    assert stream(folder) == WEIGHTS
    assert read(folder, Range("config.json", 0, len(CONFIG))) == CONFIG
    assert not hub.requests


@pytest.mark.soak
@pytest.mark.parametrize("way", ["cdn", "xet"])
def test_a_long_run_outlives_links_and_tokens(connect: Connect, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Half a minute in which everything that the server signs ends after two seconds, by the server's own clock."""
    monkeypatch.setattr(xet, "BEFORE_EXPIRY", 0.5)
    hub = connect(link_seconds=2, xet_token_seconds=2) if way == "cdn" else refusing(connect, xet_token_seconds=2)
    hub.bandwidth = 25_000
    assert stream(opened(hub, retries=Retries(attempts=20, first_wait=0.05))) == WEIGHTS
    if way == "cdn":
        assert hub.answers["cdn", 403] >= 4
        assert hub.requests["xet_token"] == 0
    else:
        assert hub.requests["xet_token"] > 5
