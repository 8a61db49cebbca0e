"""A CI job without a stored token exchanges its identity for one, which is good for one thing; the rest is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_server import READER, HubServer, connected
from pushes import failure, files_of, hurry, make, to
from qz import HubUnreachable, PermissionRefused
from qz.formats.hub.opening import open_repo
from qz.formats.publish.push import push


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    from huggingface_hub.utils import _auth

    hurry(monkeypatch)
    with connected(monkeypatch, tmp_path / "home") as hub:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(_auth, "_OIDC_TOKEN_CACHE", None)
        hub.add("big/llama", {"config.json": b'{"a": 1}'}, gated="auto", granted={"me"})
        hub.add("me/new", {}, private=True)
        yield hub


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make(tmp_path / "made")


def run_in_ci(hub: HubServer, monkeypatch: pytest.MonkeyPatch, resource: str, *trusted: str) -> None:
    for name, value in hub.trust(*trusted).environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_OIDC_RESOURCE", resource)


def read_config() -> bytes:
    folder = open_repo("big/llama")
    data = bytearray(folder.sizes()["config.json"])
    folder.read_into("config.json", 0, memoryview(data))
    return bytes(data)


def test_a_repository_that_trusts_the_job_is_pushed_to_without_a_stored_token(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_ci(hub, monkeypatch, "me/new", "me/new")
    push(made, to())
    assert files_of(made).items() <= hub.repos["me/new"].files().items()
    assert hub.requests["oauth_token"] == 1


def test_a_token_that_runs_out_during_the_push_is_exchanged_for_anew(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_ci(hub, monkeypatch, "me/new", "me/new")
    assert hub.ci is not None
    hub.ci.life = 300  # what huggingface_hub takes for over at once
    hub.fail("preupload", times=1, before=lambda: hub.pass_time(301))  # this one request comes too late
    assert "the token of this CI job has ended" in failure(lambda: push(made, to()), PermissionRefused)
    push(made, to())
    assert files_of(made).items() <= hub.repos["me/new"].files().items()
    assert hub.requests["oauth_token"] > 2


def test_a_users_token_reads_what_is_gated_and_a_repositorys_does_not(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_ci(hub, monkeypatch, "me", "me", "me/new")
    assert read_config() == b'{"a": 1}'
    monkeypatch.setenv("HF_OIDC_RESOURCE", "me/new")
    assert "gated" in failure(read_config, PermissionRefused)


def test_a_users_token_writes_nothing_and_the_message_says_why(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["me/new"].private = False
    run_in_ci(hub, monkeypatch, "me", "me")
    message = failure(lambda: push(made, to(private=False)), PermissionRefused)
    assert "HF_OIDC_RESOURCE=me" in message
    assert "writes nothing" in message
    assert not hub.commit_bodies


def test_a_repositorys_token_makes_no_other_repository(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_ci(hub, monkeypatch, "me/new", "me/new")
    assert "HF_OIDC_RESOURCE=me/new" in failure(lambda: push(made, to("me/other")), PermissionRefused)
    assert "me/other" not in hub.repos


def test_a_resource_that_does_not_trust_the_job_is_named(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_ci(hub, monkeypatch, "me/new", "me/another")
    message = failure(lambda: push(made, to()), PermissionRefused)
    assert "Trusted Publisher" in message
    assert "me/new" in message


def test_a_job_without_an_identity_is_told_what_to_grant(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_ci(hub, monkeypatch, "me/new", "me/new")
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN")
    assert "id-token: write" in failure(lambda: push(made, to()), PermissionRefused)
    monkeypatch.delenv("GITHUB_ACTIONS")
    assert "id-token: write" in failure(lambda: push(made, to()), PermissionRefused)
    assert "id-token: write" in failure(read_config, PermissionRefused)


@pytest.mark.parametrize("kind", ["id_token", "oauth_token"])
@pytest.mark.parametrize("how", [{"status": 503}, {"drop": True}, {"status": 200, "body": b"<html>"}])
def test_an_exchange_that_fails_is_a_documented_error(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch, kind: str, how: dict[str, object]
) -> None:
    run_in_ci(hub, monkeypatch, "me/new", "me/new")
    hub.fail(kind, **how)
    failure(lambda: push(made, to()), HubUnreachable)
    failure(read_config, HubUnreachable)


def test_a_stored_token_of_someone_without_rights_is_refused_by_name(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["me/new"].private = False
    monkeypatch.setenv("HF_TOKEN", READER)
    message = failure(lambda: push(made, to(private=False)), PermissionRefused)
    assert "HF_OIDC_RESOURCE" not in message
    assert "hf auth whoami" in message
