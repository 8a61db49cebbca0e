"""The Hub as it is in 2026, line by line of ``hub_server.rules``, and what a hostile server may answer beyond that."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import qz as package
from hub_reading import (
    CONFIG,
    FILES,
    MB,
    SMALL,
    WEIGHTS,
    checkpoint_bytes,
    close_all,
    failure,
    opened,
    read,
    stream,
)
from hub_server import OWNER, HubServer, connected
from hub_server.behaviours import BEHAVIOURS
from hub_server.contents import Blob
from hub_server.rules import table
from pace import HANG
from qz import HubUnreachable, IOFailed, MalformedInput, PermissionRefused, QzError, TryAgain, Unsupported
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.folder import Range
from qz.formats.hub.transport import backoff, limits
from qz.formats.hub.transport.backoff import Retries

Connect = Callable[..., HubServer]


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Connect]:
    """A Hub with these rules, which holds ``me/model``."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(**rules: Any) -> HubServer:
            hub = stack.enter_context(connected(monkeypatch, tmp_path / "home", xet=False, **rules))
            hub.add("me/model", FILES)
            return hub

        yield start
        close_all()


@pytest.fixture
def hub(connect: Connect) -> HubServer:
    return connect()


def sharded(count: int) -> dict[str, bytes | Path]:
    shards = {f"model-{n:05d}-of-{count:05d}.safetensors": checkpoint_bytes(2 * MB, n) for n in range(1, count + 1)}
    shards = {name: data.replace(b"layer.", b"lay%02d." % n, 8) for n, (name, data) in enumerate(shards.items())}
    names = [f"layer.{n}.weight" for n in range(8)]
    index = {
        "metadata": {},
        "weight_map": {f"lay{n:02d}.{name[6:]}": file for n, file in enumerate(shards) for name in names},
    }
    return {"config.json": CONFIG, "model.safetensors.index.json": json.dumps(index).encode(), **shards}


def test_every_rule_of_the_real_hub_has_its_source() -> None:
    for name, _, what, source in table():
        assert what, name
        assert source, name


def test_every_behaviour_has_a_source_is_handled_somewhere_and_has_a_test() -> None:
    rows = [row for group in BEHAVIOURS.values() for row in group]
    assert len(BEHAVIOURS) == 14
    for row in rows:
        assert row.what, row
        assert row.source, row
        module, _, name = row.handled.partition(":")
        attrgetter(name)(import_module(f"qz.formats.{module}"))
        file, _, test = row.tests.partition(":")
        assert f"def test_{test}(" in (Path(__file__).parent / f"test_{file}.py").read_text(), row
    assert {rule for row in rows for rule in row.rules} == {name for name, *_ in table()}


# Links


def test_a_link_serves_every_range_since_it_was_asked_for_without_one(connect: Connect) -> None:
    hub = connect(binding_hosts=("aws", "gcp"))
    hub.add("me/sharded", sharded(3))
    folder = opened(hub, "me/sharded")
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.tensors) == 24
    for n in range(1, 4):
        assert stream(folder, f"model-{n:05d}-of-00003.safetensors")
    # A config, an index and three shards: the FLUX.1-dev transformer has as many files.
    assert hub.requests["resolve"] == 5
    assert hub.answers["cdn", 403] == 0
    assert hub.answers["cdn", 206] == hub.requests["cdn"]


def test_threads_that_begin_together_ask_for_a_link_once(hub: HubServer) -> None:
    folder = opened(hub)
    folder.sizes()
    hub.fail("resolve", hang=0.3)
    assert stream(folder) == WEIGHTS
    assert hub.requests["resolve"] == 1


def test_an_old_link_is_not_missed_when_a_newer_one_is_there(hub: HubServer) -> None:
    """Refusals that arrive late count against the link that was refused, not against the one that took its place."""
    folder = opened(hub)
    read(folder, Range("model.safetensors", 0, 8))
    hub.expire_links()
    hub.fail("cdn", nth=2, times=2, hang=0.3)
    assert stream(folder) == WEIGHTS
    assert hub.requests["resolve"] == 2


def test_links_of_a_host_whose_keys_are_broken_are_asked_for_again(connect: Connect) -> None:
    hub = connect(outage=("aws",))
    assert stream(opened(hub)) == WEIGHTS
    assert hub.answers["cdn", 403] <= SMALL.connections


def test_an_outage_of_the_cdn_is_told_in_its_own_words_and_takes_two_links(connect: Connect) -> None:
    hub = connect(outage=("aws", "gcp"))
    message = failure(lambda: read(opened(hub), Range("model.safetensors", 0, 8)), TryAgain)
    assert "(403: SignatureError: invalid key pair id)" in message  # without the tags and codes around it
    assert hub.requests["resolve"] == 2


def test_a_400_is_no_expired_link(connect: Connect) -> None:
    hub = connect()
    hub.fail("cdn", status=400, message="The file is too large")
    assert "The file is too large" in failure(lambda: read(opened(hub), Range("model.safetensors", 0, 8)), TryAgain)
    assert hub.requests["resolve"] == 1


def test_nothing_is_asked_of_the_cdn_without_a_range(connect: Connect) -> None:
    hub = connect(largest_unranged=10)
    hub.add("me/tokens", {**FILES, "tokenizer.model": b"\0tokens of a tokenizer"})
    folder = opened(hub, "me/tokens")
    assert read(folder, Range("tokenizer.model", 1, 7)) == b"tokens"
    assert stream(folder) == WEIGHTS
    assert hub.answers["cdn", 400] == 0


def test_links_are_minted_by_get(connect: Connect) -> None:
    assert stream(opened(connect(head_links_serve_get=False))) == WEIGHTS


@pytest.mark.parametrize("relays", [("gcp",), ("relative",), ("gcp", "relative", "aws")], ids="-".join)
def test_redirects_beyond_the_hub_are_followed_with_the_range_and_without_the_token(
    connect: Connect, relays: tuple[str, ...]
) -> None:
    hub = connect(relays=relays, binding_hosts=("aws", "gcp"))
    assert stream(opened(hub)) == WEIGHTS
    assert hub.requests["relay"] > 0
    assert hub.requests["resolve"] == 1
    assert hub.tokens_seen_by_cdn == []


NO_ADDRESSES = [
    "file:///etc/passwd",
    "ftp://127.0.0.1/x",
    "javascript:0",
    "http://[",
    "http://:99999/",
    "http://[v1.x]/",
    "http://127.0.0.1:99999/",
    "https://" + "x" * 70_000,
    "http://a\x7fb/",
    "//",
]


@pytest.mark.parametrize("target", NO_ADDRESSES, ids=range(len(NO_ADDRESSES)))
def test_a_redirect_to_no_web_address_is_an_error_of_the_hub(hub: HubServer, target: str) -> None:
    hub.fail("resolve", replace={"Location": target})
    message = failure(lambda: read(opened(hub), Range("model.safetensors", 0, 8)), HubUnreachable)
    assert "redirects to something other than a web address" in message or not target.startswith(("f", "j"))


def test_a_file_that_has_become_shorter_is_told(hub: HubServer) -> None:
    folder = opened(hub)
    folder.sizes()
    sha256 = Blob.of(WEIGHTS).sha256
    hub.objects[sha256] = Blob(10, "", sha256, data=WEIGHTS[:10])
    assert "shorter" in failure(lambda: read(folder, Range("model.safetensors", 2 * MB, 2 * MB + 8)), MalformedInput)


@pytest.mark.parametrize("said", [None, "bytes 0-9/*", "bytes */3000688", "items 0-9/10", "bytes 0-9/" + "9" * 5000])
def test_content_range_is_believed_only_if_it_is_one(hub: HubServer, said: str | None) -> None:
    hub.fail("cdn", replace={"Content-Range": said})
    assert "does not say which bytes" in failure(lambda: stream(opened(hub)), TryAgain)


def test_a_run_outlives_its_links_by_the_servers_own_clock(hub: HubServer) -> None:
    for nth in (3, 7, 11):
        hub.fail("cdn", nth=nth, times=1, before=lambda: hub.pass_time(3601))
    one_by_one = replace(SMALL, connections=1)  # or the clock would jump before a fresh link has served once
    assert stream(opened(hub, pace=one_by_one)) == WEIGHTS
    assert hub.answers["cdn", 403] >= 3
    assert hub.requests["resolve"] <= 4


def test_one_fetch_outlives_several_links_that_have_served(hub: HubServer) -> None:
    hub.fail("cdn", truncate=20_000)
    for nth in (3, 5, 8):
        hub.fail("cdn", nth=nth, times=1, before=hub.expire_links)
    folder = opened(hub, retries=Retries(attempts=60, first_wait=0.001, longest_wait=0.01))
    assert read(folder, Range("model.safetensors", MB, MB + 250_000)) == WEIGHTS[MB : MB + 250_000]
    assert hub.answers["cdn", 403] == 3


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_lines_that_check_the_real_hub_say_of_this_one_what_the_page_says(connect: Connect) -> None:
    hub = connect(binding_hosts=("aws", "gcp"))
    hub.add("openai-community/gpt2", FILES)
    page = (Path(package.__file__).parent.parent / "docs/explanation/hub.md").read_text()
    lines = page.split("```text\n")[1].split("```")[0].replace("https://huggingface.co", hub.url)
    assert len(lines.splitlines()) == 3
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, timeout=HANG, check=True)
    assert done.stdout.split() == ["206", "206", "403"]
    assert "206, 206 and 403" in page


# Limits of rates


def test_the_windows_of_the_rate_limit_are_waited_out_and_said(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backoff, "TOLD_FROM", 0.5)
    hub = connect(rate_window=1, resolvers_anonymous=3, resolvers_user=0)
    hub.add("me/sharded", sharded(3))
    monkeypatch.delenv("HF_TOKEN")
    folder = opened(hub, "me/sharded", retries=Retries(attempts=6, first_wait=0.01, longest_wait=0.02, longest_asked=4))
    assert len(open_checkpoint(folder).tensors) == 24
    assert hub.answers["resolve", 429] + hub.answers["resolve_cache", 429] > 0
    assert "asks to wait" in caplog.text


def test_a_second_more_than_the_rest_of_the_window_is_waited(hub: HubServer) -> None:
    hub.fail("resolve", times=1, status=429, headers={"RateLimit": '"resolvers";r=0;t=1'})
    began = time.monotonic()
    folder = opened(hub, retries=Retries(attempts=3, longest_asked=3))
    assert read(folder, Range("model.safetensors", 0, 8)) == WEIGHTS[:8]
    assert time.monotonic() - began >= 2


def test_connections_do_not_come_back_together_after_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(backoff.Backoff, "_pause", lambda _, seconds: waits.append(seconds))
    for _ in range(4):
        backoff.Backoff("here", Retries(longest_asked=9)).back_off(
            backoff.Failed("busy", status=429, wait=5.0), 1, "file"
        )
    assert all(4.9 < wait < 6 for wait in waits)
    assert max(waits) - min(waits) > 0.005


@pytest.mark.parametrize("headers", [{"RateLimit": '"resolvers";r=0;t=301'}, {"Retry-After": "3600"}])
@pytest.mark.parametrize(("status", "kind"), [(429, TryAgain), (503, HubUnreachable)])
def test_a_wait_beyond_patience_is_left_to_the_user(
    hub: HubServer, headers: dict[str, str], status: int, kind: type[QzError]
) -> None:
    hub.fail("resolve", status=status, headers=headers)
    message = failure(lambda: read(opened(hub), Range("model.safetensors", 0, 8)), kind)
    assert "302 s" in message or "3600 s" in message
    assert hub.requests["resolve"] <= 2, "nothing is asked again"


@pytest.mark.parametrize("headers", [
    {"Retry-After": "\u00b2".encode("latin-1").decode("latin-1")}, {"Retry-After": "soon"}, {"Retry-After": "9" * 5000},
    {"Retry-After": "Fri, 99 Xyz 99999 99:99:99 GMT"}, {"RateLimit": "\"resolvers\";r=0;t=" + "9" * 5000},
    {"RateLimit": "\"resolvers\";r=0;t=0"}, {"RateLimit": "nonsense", "Retry-After": "-1"}],
    ids=["superscript", "word", "digits", "date", "t-digits", "t-0", "negative"])  # fmt: skip
def test_odd_limits_are_limits(hub: HubServer, headers: dict[str, str]) -> None:
    hub.fail("resolve", status=429, headers=headers)
    failure(lambda: read(opened(hub), Range("model.safetensors", 0, 8)), TryAgain)


# Connections


def test_a_reset_in_mid_body_is_continued_where_it_broke(hub: HubServer) -> None:
    fault = hub.fail("cdn", nth=2, times=2, truncate=100_000, reset=True)
    assert stream(opened(hub)) == WEIGHTS
    assert fault.seen > 3
    assert hub.bytes_out["cdn"] < len(WEIGHTS) + 200_000


def test_a_connection_that_brings_something_each_time_may_break_more_often_than_one_that_does_not(
    hub: HubServer,
) -> None:
    hub.fail("cdn", truncate=1 << 20)
    folder = opened(hub, retries=Retries(attempts=2, first_wait=0.001))
    assert read(folder, Range("model.safetensors", 0, len(WEIGHTS))) == WEIGHTS
    hub.fail("cdn", truncate=1 << 10)
    failure(lambda: read(folder, Range("model.safetensors", 0, len(WEIGHTS))), HubUnreachable)


def test_connections_that_the_server_closes_between_requests_are_opened_again(connect: Connect) -> None:
    hub = connect(requests_per_connection=2)
    assert stream(opened(hub)) == WEIGHTS


@pytest.mark.parametrize("kind", ["info", "tree", "resolve", "resolve_cache", "cdn"])
@pytest.mark.parametrize("status", [408, 504])
def test_a_page_of_html_from_a_gateway_is_a_failure_that_passes(hub: HubServer, kind: str, status: int) -> None:
    page = b"<!DOCTYPE html><html><body><h1>Gateway Time-out</h1></body></html>"
    hub.fail(kind, times=1, status=status, body=page, headers={"Content-Type": "text/html"})
    folder = opened(hub)
    assert read(folder, Range("config.json", 0, 4)) == CONFIG[:4]
    assert stream(folder) == WEIGHTS


def test_a_burst_of_failures_is_outlasted(hub: HubServer) -> None:
    folder = opened(hub, retries=Retries(attempts=6, first_wait=0.1, longest_wait=0.4))
    read(folder, Range("config.json", 0, 8))
    hub.fail("*", status=503, seconds=0.5)
    assert stream(folder) == WEIGHTS
    assert hub.answers["cdn", 503] + hub.answers["resolve", 503] > 0


@pytest.mark.parametrize("kind", ["info", "tree", "resolve_cache", "cdn"])
def test_a_trickle_is_given_up_and_asked_for_again(hub: HubServer, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(limits, "SLOW_SECONDS", 0.3)
    hub.fail(kind, times=1, trickle=80)
    folder = opened(hub)
    assert read(folder, Range("config.json", 0, 4)) == CONFIG[:4]
    assert stream(folder) == WEIGHTS
    if kind == "cdn":
        hub.fail(kind, trickle=80)
        assert "KB/s arrived" in failure(lambda: stream(opened(hub)), HubUnreachable)


@pytest.mark.parametrize("rules", [{"weak_etags": True}, {"gzip_anyway": True}], ids=lambda rules: next(iter(rules)))
def test_what_proxies_do_to_answers_changes_nothing(connect: Connect, rules: dict[str, bool]) -> None:
    folder = opened(connect(**rules))
    assert read(folder, Range("config.json", 0, len(CONFIG))) == CONFIG
    assert stream(folder) == WEIGHTS


def test_a_weak_etag_of_the_linked_file_is_its_hash_all_the_same(hub: HubServer) -> None:
    hub.fail("resolve", matching="safetensors", replace={"X-Linked-Etag": f'W/"{Blob.of(WEIGHTS).sha256}"'})
    assert stream(opened(hub)) == WEIGHTS


# Who may read, and what changes meanwhile


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "gated": ({"status": 403, "code": "GatedRepo"}, "me/model is gated"),
    "disabled": ({"status": 403, "message": "Access to this resource is disabled."}, "me/model is disabled on the Hub"),
    "missing": ({"status": 404, "code": "RepoNotFound"}, "me/model is not on the Hub, or it is private"),
    "revision": ({"status": 404, "code": "RevisionNotFound"}, "me/model has no revision"),
    "entry": ({"status": 404, "code": "EntryNotFound"}, "is not in me/model at revision"),
    "token": ({"status": 401, "message": "Invalid credentials in Authorization header"}, "does not accept your token"),
    "gone": ({"status": 410}, "does not have it (410"),
    "forbidden": ({"status": 403, "message": "not from here"}, "was refused (403: not from here)"),
}


@pytest.mark.parametrize(("how", "words"), REFUSALS.values(), ids=REFUSALS.keys())
@pytest.mark.parametrize("kind", ["tree", "resolve"])
def test_each_refusal_is_told_for_what_it_is(hub: HubServer, kind: str, how: dict[str, Any], words: str) -> None:
    hub.fail(kind, **how)
    assert words in failure(lambda: stream(opened(hub)), QzError)


def test_a_token_that_is_revoked_while_it_is_used_is_told(hub: HubServer) -> None:
    def revoke() -> None:
        hub.users.pop(OWNER)
        hub.expire_links()

    hub.fail("cdn", nth=4, times=1, before=revoke)
    message = failure(lambda: stream(opened(hub)), PermissionRefused)
    assert "expired or been revoked" in message
    assert "hf auth login" in message


@pytest.mark.parametrize("kind", ["tree", "resolve"])
def test_a_repository_that_is_renamed_while_it_is_read_is_followed(hub: HubServer, kind: str) -> None:
    hub.repos["me/model"].private = True  # so the token must go along
    hub.fail(kind, times=1, before=lambda: hub.rename("me/model", "me/new-name"))
    assert stream(opened(hub)) == WEIGHTS


# Answers that no Hub gives

DEEP = b"[" * 200_000
INFO: dict[str, Any] = {"id": "me/model", "modelId": "me/model", "sha": "a" * 40, "private": False, "gated": False}
ODD_INFOS: list[dict[str, Any]] = [
    *({"sha": value} for value in (5, None, "../../x")),
    *({"id": value} for value in (5, None, "../x/y")),
    *({"cardData": value} for value in ([1], "x")),
    *({key: 5} for key in ("lastModified", "siblings", "tags", "gguf")),
    {"siblings": [None]},
    {"safetensors": {"parameters": 5}},
]
INFOS = [b"", b"{}", b"[]", b"5", b"null", DEEP, b"not json", b"<html>", b"\xff\xfe"]
INFOS += [json.dumps(INFO | change).encode() for change in ODD_INFOS]
ENTRY: dict[str, Any] = {"type": "file", "path": "config.json", "oid": "b" * 40, "size": 2}
ODD_ENTRIES: list[dict[str, Any]] = [
    *({"size": value} for value in (-1, "719", None, 1.5, 1e19, True, 1 << 80)),
    *({"path": value} for value in (5, None, "")),
    *({"oid": value} for value in (None, "x")),
    *({"lfs": value} for value in (5, {"size": 1}, {"oid": "x"})),
]
TREES = [b"", b"null", b"{}", b"5", DEEP, b"[null]", b"[5]", b"[[]]", b"[{}]", b"not json"]
TREES += [json.dumps([ENTRY | change]).encode() for change in ODD_ENTRIES]


@pytest.mark.parametrize("body", INFOS, ids=range(len(INFOS)))
def test_model_info_of_a_wrong_shape_is_a_documented_error_or_does_no_harm(hub: HubServer, body: bytes) -> None:
    hub.fail("info", status=200, body=body)
    try:
        folder = opened(hub)
    except QzError as error:
        assert isinstance(error, HubUnreachable | package.UsageError), error  # noqa: PT017 - either may be
    else:
        failure(lambda: stream(folder), package.MissingInput)  # there is no such commit


@pytest.mark.parametrize("body", TREES, ids=range(len(TREES)))
def test_a_listing_of_a_wrong_shape_is_a_documented_error(hub: HubServer, body: bytes) -> None:
    folder = opened(hub)
    hub.fail("tree", status=200, body=body)
    failure(lambda: folder.sizes(), HubUnreachable)


def test_a_listing_without_end_is_refused(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from qz.formats.hub import listing

    monkeypatch.setattr(listing, "MOST_PAGES", 20)
    link = f'<{hub.url}/api/models/me/model/tree/main>; rel="next"'
    hub.fail("tree", status=200, body=b"[]", headers={"Link": link})
    assert "does not end" in failure(lambda: opened(hub).sizes(), HubUnreachable)
    assert hub.requests["tree"] == 20


def test_the_token_does_not_follow_a_listing_to_another_server(hub: HubServer) -> None:
    hub.fail("tree", replace={"Link": f'<{hub.cdn_url}/api/models/me/model/tree/main?cursor=1>; rel="next"'})
    assert "another server" in failure(lambda: opened(hub).sizes(), HubUnreachable)
    assert hub.requests["unknown"] == 0


@pytest.mark.parametrize("kind", ["info", "tree"])
def test_a_small_answer_that_unpacks_to_gigabytes_is_refused(hub: HubServer, kind: str) -> None:
    bomb = gzip.compress(bytes(64 * MB))
    hub.fail(kind, status=200, body=bomb, headers={"Content-Encoding": "gzip"})
    tracemalloc.start()
    failure(lambda: opened(hub).sizes(), HubUnreachable)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * MB, peak


def test_a_config_of_gigabytes_is_refused_by_its_size(hub: HubServer) -> None:
    body = json.dumps([ENTRY | {"size": 6 << 30}]).encode()
    hub.fail("tree", status=200, body=body)
    assert "10 MB at most" in failure(lambda: read(opened(hub), Range("config.json", 0, 8)), MalformedInput)


def test_a_body_longer_than_listed_shows_no_signed_link(hub: HubServer) -> None:
    folder = opened(hub)
    folder.sizes()
    sha256 = Blob.of(WEIGHTS).sha256
    longer = WEIGHTS + bytes(1000)
    hub.objects[sha256] = Blob(len(longer), "", sha256, data=longer)
    hub.fail("cdn", ignore_range=True)
    assert "number of bytes received" in failure(lambda: folder.download(["model.safetensors"]), MalformedInput)
    failure(lambda: stream(folder), TryAgain, MalformedInput)


# Copies


def test_a_download_that_does_not_fit_is_refused_before_it_begins(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    message = failure(lambda: opened(hub).download(["model.safetensors"]), IOFailed)
    assert f"{len(WEIGHTS):,}" in message
    assert "--download" in message
    assert hub.requests["cdn"] == 0


def test_a_file_too_large_for_a_regular_download_says_what_to_install(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", MB)
    assert "hf_xet" in failure(lambda: opened(hub).download(["model.safetensors"]), Unsupported)


# The environment


def test_a_token_with_a_typographic_quote_is_told(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abc\u2019")
    assert "token" in failure(lambda: opened(hub), PermissionRefused)


def test_an_endpoint_or_a_proxy_that_is_no_address_is_told(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://[")
    failure(lambda: opened(hub), HubUnreachable)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HTTP_PROXY", "junk://x")
    close_session()
    failure(lambda: opened(hub), HubUnreachable)


def test_a_variable_that_huggingface_hub_cannot_read_is_a_usage_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qz", "inspect", "me/model"],
        env={**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "abc"},
        cwd=Path(package.__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert (done.returncode, "'abc'" in done.stderr) == (2, True), done.stderr


# Anything


def mutated(chance: random.Random, body: bytes) -> bytes:
    """``body`` with a few of its bytes, or JSON values, replaced by something else."""
    if chance.random() < 0.4:
        data = bytearray(body)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data) + 1)
            data[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        return bytes(data)
    odd: list[Any] = [
        None,
        True,
        -1,
        1e400,
        1 << 70,
        "",
        "\ud800",
        "x" * 5000,
        [],
        [[]],
        {},
        {"a": None},
        "../..",
        "0" * 64,
        0.5,
    ]

    def change(value: Any) -> Any:
        if chance.random() < 0.08:
            return chance.choice(odd)
        if isinstance(value, dict):
            return {key: change(inner) for key, inner in value.items() if chance.random() > 0.04}
        return [change(inner) for inner in value] if isinstance(value, list) else value

    return json.dumps(change(json.loads(body))).encode()


def ask_with_odd_answers(hub: HubServer, count: int, seed: int) -> None:
    """No answer of the Hub ends in anything but an error of the package, or in the right bytes."""
    chance, folder = random.Random(seed), opened(hub)
    tree = [entry.described(path) for path, entry in hub.repos["me/model"].commits[folder.commit].items()]
    info = INFO | {"sha": folder.commit, "cardData": {"license": "mit"}}
    bodies = {"info": json.dumps(info).encode(), "tree": json.dumps(tree).encode()}
    headers = ("Location", "Content-Range", "X-Repo-Commit", "X-Linked-Etag", "Content-Encoding", "Link", "ETag")
    values = ("", "x", "bytes 0-7/8", "gzip", "//", "/", "http://127.0.0.1:1/", "9" * 30, "\x80", "<a>; rel=next")
    messages: list[str] = []
    for _ in range(count):
        kind = chance.choice(["info", "tree", "tree", "resolve", "cdn", "resolve_cache"])
        if kind in bodies:
            fault = hub.fail(kind, status=200, body=mutated(chance, bodies[kind]))
        elif chance.random() < 0.3:
            fault = hub.fail(kind, status=chance.choice([200, 206, 301, 302, 404, 418, 599]))
        else:
            fault = hub.fail(kind, replace={chance.choice(headers): chance.choice(values)})
        try:
            one = opened(hub)
            assert read(one, Range("config.json", 0, 4)) == CONFIG[:4]
            assert read(one, Range("model.safetensors", 0, 8)) == WEIGHTS[:8]
        except QzError as error:
            messages.append(str(error))
        finally:
            close_all()
            hub.faults.remove(fault)
    assert messages
    assert not [text for text in messages if "Signature=" in text or OWNER in text]


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.soak)])
def test_odd_answers_never_look_like_a_bug(hub: HubServer, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub_reading.QUICK", Retries(attempts=1, first_wait=0.001, longest_asked=0.1))
    ask_with_odd_answers(hub, count, seed=1)
