"""A pipeline that is published shard by shard, killed wherever the disk changes or the Hub is asked, and run again.

Afterwards the same bytes are in one commit, and nothing is left here. Each run is the command in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipelines
from forked import Runner, Running
from hub_server import OWNER, HubServer

CHANGES = ("write", "fsync", "rename", "truncate", "unlink", "rmdir", "mkdir", "open", "reserve")
OPTIONS = ("--max-shard-size", "60KB", "--threads", "1", "--quiet")
COMMAND = ("quantize", "flux", *OPTIONS, "--push", "me/new", "--push-only")


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer(api_user=1_000_000) as hub:
        yield hub


@pytest.fixture(scope="module")
def server(hub: HubServer, forks: Runner, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    home = str(tmp_path_factory.mktemp("home"))
    settings = {"HF_HUB_OFFLINE": "0", "GITHUB_STEP_SUMMARY": "", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return forks.within(HF_ENDPOINT=hub.url, HF_HOME=home, HF_TOKEN=OWNER, **settings)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.flux(tmp_path_factory.mktemp("flux") / "flux")


@pytest.fixture(scope="module")
def expected(server: Runner, flux: Path) -> dict[str, bytes]:
    """What the same run leaves in a folder."""
    ended = server.run("quantize", "flux", *OPTIONS, "-o", "kept", cwd=flux.parent)
    assert ended.code == 0, ended.stderr
    kept = flux.parent / "kept"
    return {str(path.relative_to(kept)): path.read_bytes() for path in kept.rglob("*") if path.is_file()}


@pytest.fixture
def place(flux: Path) -> Iterator[Path]:
    """In memory where there is such a place; none of this looks at a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        (Path(folder) / "flux").symlink_to(flux)
        yield Path(folder)


def begin_anew(hub: HubServer, place: Path) -> dict[str, str]:
    """Forget what an earlier run did, there and here; what hf_xet is to be told."""
    hub.repos.clear()
    hub.faults.clear()
    hub.commit_bodies.clear()
    hub.lose_uploads()
    shutil.rmtree(place / "xet", ignore_errors=True)
    return {"HF_XET_CACHE": str(place / "xet")}


def require_complete(hub: HubServer, server: Runner, place: Path, expected: dict[str, bytes]) -> None:
    """The run after the kill does what was left to do, and no more than one commit is made."""
    ended = server.run(*COMMAND, cwd=place, environment={"HF_XET_CACHE": str(place / "xet")})
    assert ended.code == 0, ended.stderr
    files = hub.repos["me/new"].files()
    assert {path: data for path, data in files.items() if path not in ("README.md", ".gitattributes")} == expected
    assert len(hub.commit_bodies) == 1
    assert {path.name for path in place.iterdir()} <= {"flux", "xet"}


def kill_at_changes(hub: HubServer, server: Runner, place: Path, expected: dict[str, bytes], every: int) -> None:
    undisturbed = server.run(*COMMAND, cwd=place, only=CHANGES, environment=begin_anew(hub, place))
    assert undisturbed.code == 0, undisturbed.stderr
    for at in range(every // 2, len(undisturbed.operations), every):
        environment = begin_anew(hub, place)
        ended = server.run(*COMMAND, cwd=place, at=at, only=CHANGES, environment=environment)
        assert ended.code == -signal.SIGKILL, (at, ended.stderr)
        require_complete(hub, server, place, expected)


def test_a_kill_at_some_changes_of_the_disk(
    hub: HubServer, server: Runner, place: Path, expected: dict[str, bytes]
) -> None:
    kill_at_changes(hub, server, place, expected, every=223)


@pytest.mark.soak
def test_a_kill_at_every_change_of_the_disk(
    hub: HubServer, server: Runner, place: Path, expected: dict[str, bytes]
) -> None:
    kill_at_changes(hub, server, place, expected, every=1)


@pytest.mark.parametrize(
    ("kind", "nth"),
    [
        ("preupload", 1),
        ("xorb_put", 3),
        pytest.param("shard", 1, marks=pytest.mark.soak),
        ("shard", 4),
        ("commit", 1),
        ("create", 1),
    ],
)
def test_a_kill_while_the_hub_is_asked(
    hub: HubServer, server: Runner, place: Path, expected: dict[str, bytes], kind: str, nth: int
) -> None:
    environment = begin_anew(hub, place)
    running: list[Running] = []
    hub.fail(kind, nth=nth, times=1, hang=0.2, before=lambda: running[0].kill())
    running.append(server.start(*COMMAND, cwd=place, environment=environment))
    assert running[0].wait().code == -signal.SIGKILL
    require_complete(hub, server, place, expected)


def test_a_commit_whose_answer_never_came_is_not_made_twice(
    hub: HubServer, server: Runner, place: Path, expected: dict[str, bytes]
) -> None:
    environment = begin_anew(hub, place)
    running: list[Running] = []
    # The listing after the commit, by which the run would have seen that all is there.
    hub.fail("tree", nth=2, times=1, hang=0.2, before=lambda: running[0].kill())
    running.append(server.start(*COMMAND, cwd=place, environment=environment))
    assert running[0].wait().code == -signal.SIGKILL
    assert len(hub.commit_bodies) == 1
    require_complete(hub, server, place, expected)
