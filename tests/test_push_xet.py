"""A push goes over Xet, whose client is the real one: seen on the way, stopped at once, and never half there."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forked import Runner
from hub_server import OWNER, HubServer, connected, connected_forks
from pace import HANG
from pushes import failure, files_of, hurry, make, shard, to
from qz import HubUnreachable, OutputRefused, PermissionRefused, TryAgain
from qz.formats.hub.transport import session
from qz.formats.output.recorded.record import WrittenFile, encode_record
from qz.formats.publish import upload, xet
from qz.formats.publish.blobs import Blob
from qz.formats.publish.push import push
from qz.formats.publish.verified_file import VerifiedFile
from qz.formats.publish.xet import XetUploads
from qz.progress import Progress, ignore

MB = 1_000_000


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    hurry(monkeypatch)
    with connected(monkeypatch, tmp_path / "home") as hub:
        hub.add("big/llama", {"config.json": b"{}"})
        yield hub


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make(tmp_path / "made")


def is_there(made: Path, hub: HubServer, name: str = "me/new") -> bool:
    return files_of(made).items() <= hub.repos[name].files().items()


@pytest.mark.parametrize(("rule", "way"), [("xet", "lfs_put"), ("xorb_grants", "xorb_post")])
def test_a_hub_that_has_less_gets_the_same_files(hub: HubServer, made: Path, rule: str, way: str) -> None:
    setattr(hub.rules, rule, False)
    result = push(made, to())
    assert is_there(made, hub)
    assert hub.requests["xet_token"]
    assert hub.bytes_in[way] >= result.bytes_uploaded - hub.bytes_in["shard"] > MB


def test_nothing_is_written_into_a_folder_that_the_hub_names_as_its_storage(
    hub: HubServer, made: Path, tmp_path: Path
) -> None:
    (tmp_path / "storage").mkdir()
    hub.fail("xet_token", replace={"X-Xet-Cas-Url": f"local://{tmp_path}/storage"})
    assert "not a web address" in failure(lambda: push(made, to()), HubUnreachable)
    assert not any((tmp_path / "storage").iterdir())


def test_an_old_hf_xet_is_not_used(hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qz.formats.hub.transport.xet.metadata.version", {"hf_xet": "1.6.3"}.__getitem__)
    push(made, to())
    assert is_there(made, hub)
    assert not hub.requests["xet_token"]


def test_a_storage_of_the_first_version_takes_shards_too(hub: HubServer, made: Path) -> None:
    hub.fail("shard", matching="/v2/", status=404)
    push(made, to())
    assert is_there(made, hub)


def test_how_far_a_push_is_shows_inside_a_file(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qz.formats.publish.xet.REPORTS", 20)
    made = make(tmp_path / "one", shards=1)
    data = shard("layer.0.weight", 70 * MB)  # two of the pieces that hf_xet sends
    (made / "model-00001-of-00001.safetensors").write_bytes(data)
    (made / "qz.json").unlink()
    hub.fail("xorb_put", hang=0.3)
    seen: list[Progress] = []
    push(made, to(), progress=seen.append)
    inside = {step.bytes for step in seen if step.doing == "Uploading" and step.file is None}
    assert [step for step in inside if 0.05 * len(data) < step < 0.95 * len(data)]


def test_what_was_swept_out_before_the_commit_is_sent_once_more(hub: HubServer, made: Path) -> None:
    hub.fail("commit", times=1, before=hub.lose_uploads)
    result = push(made, to())
    assert is_there(made, hub)
    sizes = sum(path.stat().st_size for path in made.glob("*.safetensors"))
    assert result.bytes_uploaded > 2 * sizes
    assert hub.requests["commit"] == 2


def test_a_storage_that_keeps_nothing_gets_no_commit(hub: HubServer, made: Path) -> None:
    hub.fail("commit", before=hub.lose_uploads)
    assert "does not hold" in failure(lambda: push(made, to()), TryAgain)
    assert hub.requests["commit"] == 2
    assert hub.repos["me/new"].messages[hub.repos["me/new"].head] == "first"


def test_what_hf_xet_remembers_to_have_sent_does_not_keep_a_file_from_being_sent(hub: HubServer, made: Path) -> None:
    push(made, to())
    del hub.repos["me/new"]
    hub.lose_uploads()
    push(made, to())
    assert is_there(made, hub)
    assert not list((Path(os.environ["HF_XET_CACHE"])).glob("*/afresh-*"))


@pytest.mark.parametrize("kind", ["xorb_grant", "shard"])
def test_a_token_for_the_storage_that_runs_out_is_asked_for_again(hub: HubServer, made: Path, kind: str) -> None:
    hub.fail(kind, times=1, before=lambda: hub.pass_time(3601))
    push(made, to())
    assert is_there(made, hub)
    assert hub.requests["xet_token"] > 1


def test_a_token_for_the_storage_that_is_about_to_end_is_renewed_before(hub: HubServer, made: Path) -> None:
    hub.rules.xet_token_seconds = 20  # hf_xet renews what is good for less than 30
    push(made, to())
    assert is_there(made, hub)
    assert hub.requests["xet_token"] > 1
    assert not hub.answers["shard", 401]


def test_where_memory_is_short_a_file_is_handed_over_no_faster_than_it_goes_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(xet, "LONGEST_STILL", 600.0)
    sent, fed = xet._Sent(), 0

    def feed() -> None:
        nonlocal fed
        for _ in range(10):
            sent.wait(10, 25)
            fed += 10

    feeding = threading.Thread(target=feed)
    feeding.start()
    for gone in range(0, 70, 10):
        sent.move(gone)
        while fed < gone + 20:
            assert fed <= gone + 20
            time.sleep(0.001)
    assert feeding.is_alive()
    sent.end()  # as when the upload is stopped
    feeding.join(HANG)
    assert fed == 100


def test_a_storage_that_waits_for_more_of_a_file_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xet, "LONGEST_STILL", 0.01)
    sent = xet._Sent()
    for _ in range(10):
        sent.wait(10, 25)


@pytest.mark.parametrize("kind", ["preupload", "xet_token", "xorb_put", "commit"])
def test_a_token_that_is_revoked_on_the_way_is_what_the_message_is_about(hub: HubServer, made: Path, kind: str) -> None:
    hub.fail(kind, times=1, before=lambda: hub.users.pop(OWNER))
    message = failure(lambda: push(made, to()), PermissionRefused)
    assert "401" in message
    assert "hf auth login" in message
    assert not hub.commit_bodies


@pytest.mark.parametrize("kind", ["preupload", "xet_token", "xorb_put", "commit", "tree"])
def test_a_repository_that_is_renamed_on_the_way_gets_the_commit_all_the_same(
    hub: HubServer, made: Path, kind: str
) -> None:
    hub.add("me/new", {}, private=True)
    hub.fail(kind, nth=1, times=1, before=lambda: hub.rename("me/new", "me/newer"))
    push(made, to())
    assert is_there(made, hub, "me/newer")
    assert len(hub.commit_bodies) == 1


def test_a_shard_that_changes_before_it_is_sent_stops_the_push(hub: HubServer, made: Path) -> None:
    path = made / "model-00002-of-00002.safetensors"
    changed = path.read_bytes()[:-1] + b"!"
    hub.fail("xet_token", times=1, before=lambda: path.write_bytes(changed))
    assert f"{path.name} changed" in failure(lambda: push(made, to()), OutputRefused)
    assert not hub.commit_bodies


def test_bytes_that_are_not_those_that_were_verified_are_not_committed(hub: HubServer, made: Path) -> None:
    hub.add("me/new", {}, private=True)
    path = made / "model-00002-of-00002.safetensors"
    file = VerifiedFile.of(path)
    uploads = XetUploads(hub.url, "me/new", "main", create_pr=False)
    blob = Blob("model.safetensors", file.size, file, sha256="0" * 64)
    assert "not what was verified" in failure(lambda: uploads.send([blob], ignore), OutputRefused)


@pytest.mark.parametrize("how", [{"status": 429, "headers": {"RateLimit": '"commits";r=0;t=0'}}, {"status": 503}])
def test_a_limit_on_commits_that_passes_is_waited_for(
    hub: HubServer,
    made: Path,
    how: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("qz.formats.publish.remote.TOLD_FROM", 0.5)
    hub.fail("commit", times=2, **how)
    push(made, to())
    assert is_there(made, hub)
    assert ("before the commit" in caplog.text) == ("headers" in how)


def test_a_limit_on_commits_that_lasts_is_told_and_what_was_sent_stays(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "You have exceeded the rate limit for repository commits (128 per hour)"
    fault = hub.fail("commit", status=429, message=said, headers={"Retry-After": "3000"})
    began = time.monotonic()
    assert said in failure(lambda: push(made, to()), TryAgain)
    assert time.monotonic() - began < session.ASKING.longest_asked  # an hour is for the user to wait, not for qz
    hub.faults.remove(fault)
    hub.reset_counts()
    assert push(made, to()).bytes_uploaded < 100_000
    assert is_there(made, hub)


def test_files_are_commits_of_their_own_so_that_no_large_one_is_sent_twice(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "SMALL", 100_000)
    push(make(tmp_path / "three", shards=3), to())
    assert hub.requests["shard"] == 3


@pytest.mark.parametrize("way", ["xorb_put", "lfs_put"])
def test_ctrl_c_ends_a_push_at_once(hub: HubServer, made: Path, way: str, forks: Runner, tmp_path: Path) -> None:
    """The storage takes an hour for an answer; nobody is to wait for that."""
    fault = hub.fail(way, hang=3600)
    environment = {"HF_HUB_DISABLE_XET": "1"} if way == "lfs_put" else {}
    running = connected_forks(forks).start("push", made, "me/new", "--quiet", cwd=tmp_path, environment=environment)
    while not fault.seen and not select.select([running.socket], [], [], 0)[0]:
        time.sleep(0.05)
    running.kill(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert not hub.commit_bodies


def test_a_record_is_of_no_other_bytes_than_those_that_were_sent(hub: HubServer, tmp_path: Path) -> None:
    """A checkpoint whose record names other hashes does not get as far as the Hub."""
    made = make(tmp_path / "made", shards=1)
    names = [path.name for path in made.iterdir() if path.name != "qz.json"]
    wrong = [WrittenFile(name, (made / name).stat().st_size, "0" * 64) for name in names]
    (made / "qz.json").write_bytes(encode_record(wrong, {}))
    with pytest.raises(Exception, match="SHA-256"):
        push(made, to())
    assert not hub.requests
