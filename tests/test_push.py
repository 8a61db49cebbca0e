"""What is pushed becomes visible in one commit, to those it was meant for, or nothing does.

The client is the real huggingface_hub; the server speaks the Hub's protocol on 127.0.0.1.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from covering import in_turn
from hub_server import OWNER, READER, HubServer, connected
from pushes import ABOUT, COMMIT, CONFIG, card_of, failure, files_of, hurry, make, shard, to
from qz import (
    HubUnreachable,
    MalformedInput,
    MissingInput,
    OutputRefused,
    PermissionRefused,
    QzError,
    TryAgain,
    UsageError,
)
from qz.cli.reports.markup import page, section
from qz.formats.output.recorded.record import RECORD
from qz.formats.publish import upload
from qz.formats.publish.destination import PushResult
from qz.formats.publish.model_card.card import write_card
from qz.formats.publish.model_card.card_facts import CardFacts, facts_of, inherit
from qz.formats.publish.model_card.snippet import OnHub, snippet
from qz.formats.publish.push import push, require_possible
from qz.progress import Progress


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    hurry(monkeypatch)
    with connected(monkeypatch, tmp_path / "home", multipart_from=900_000, part_size=400_000) as hub:
        card = b"---\nlicense: llama3\nlanguage: en\npipeline_tag: text-generation\n---\n# Llama\n"
        hub.add("big/llama", {"README.md": card, "config.json": b"{}"})
        yield hub


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make(tmp_path / "made")


XET = ["xet_token", "xorb_grant", "xorb_put", "xorb_commit", "shard"]
LFS = ["lfs_batch", "lfs_put", "lfs_part", "lfs_complete", "lfs_verify"]
WRITES = {"create", "branch", "preupload", "commit", *XET, *LFS}


def use(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upload by the way that a step belongs to: Xet, unless it is one of LFS."""
    from huggingface_hub import constants

    if way.startswith("lfs"):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


# What a push does


@pytest.mark.parametrize("way", ["xet", "lfs"])
def test_a_checkpoint_becomes_visible_in_one_commit_of_a_private_repository(
    hub: HubServer, made: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(way, monkeypatch)
    seen: list[Progress] = []
    result = push(made, to(), progress=seen.append)
    repo = hub.repos["me/new"]
    there = repo.files()
    assert {name: data for name, data in there.items() if name not in ("README.md", ".gitattributes")} == files_of(made)
    assert repo.private
    assert (result.private, result.created, result.commit) == (True, True, repo.head)
    assert len(hub.commit_bodies) == 1
    header = hub.commit_bodies[0][0]["value"]
    assert header["parentCommit"] == repo.parents[repo.head]
    assert header["summary"].startswith("Add LlamaForCausalLM, NF4 (4 bit), made by qz")
    assert hub.tokens_seen_by_cdn == []
    sizes = sum(len(data) for name, data in files_of(made).items() if name.endswith(".safetensors"))
    if way == "lfs":
        assert result.bytes_uploaded == hub.bytes_in["lfs_put"] + hub.bytes_in["lfs_part"] == sizes
    else:
        assert not set(LFS) & set(hub.requests)
        assert result.bytes_uploaded == hub.bytes_in["xorb_put"] + hub.bytes_in["shard"]
        assert sizes <= result.bytes_uploaded < 1.01 * sizes  # random numbers cannot be packed
    assert [step.doing for step in seen][:1] == ["Verifying"]
    assert (seen[-1].done, seen[-1].bytes) == (seen[-1].total, seen[-1].all_bytes)
    assert result.as_json()["bytes"]["uploaded"] == result.bytes_uploaded


def test_a_hub_that_calls_weights_small_does_not_get_them_inside_the_commit(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent inside the commit is held in memory, several times."""
    monkeypatch.setattr(upload, "LARGEST_REGULAR", 200_000)
    files = [{"path": path, "uploadMode": "regular"} for path in files_of(made)]
    hub.fail("preupload", status=200, body=json.dumps({"files": files}).encode())
    push(made, to())
    kinds = {line["value"]["path"]: line["key"] for line in hub.commit_bodies[0] if line["key"] != "header"}
    assert {kinds[name] for name in kinds if name.endswith(".safetensors")} == {"lfsFile"}
    assert kinds["config.json"] == "file"


def test_public_is_public_only_when_it_is_said(hub: HubServer, made: Path) -> None:
    assert push(made, to("me/one", private=False)).private is False
    assert not hub.repos["me/one"].private
    push(made, to("org/two", private=True))
    assert hub.repos["org/two"].private


def test_a_name_without_owner_is_ones_own(hub: HubServer, made: Path) -> None:
    assert push(made, to("new")).to.repo_id == "me/new"
    assert "me/new" in hub.repos


def test_a_repository_that_was_renamed_is_pushed_to_under_its_new_name(hub: HubServer, made: Path) -> None:
    hub.add("me/new", {}, private=True)
    hub.rename("me/new", "me/newer")
    result = push(made, to())
    assert (result.to.repo_id, result.created) == ("me/newer", False)
    assert files_of(made).items() <= hub.repos["me/newer"].files().items()
    assert "me/newer" in card_of(hub, "me/newer")[1]


def test_a_dry_run_changes_nothing_and_shows_everything(hub: HubServer, made: Path) -> None:
    result = push(made, to(), dry_run=True)
    assert not WRITES & set(hub.requests)
    assert "me/new" not in hub.repos
    assert (result.dry_run, result.commit, result.created, result.private) == (True, None, True, True)
    assert {file.path for file in result.files} == {*files_of(made), "README.md"}
    assert "qz quantize big/llama" in result.card


def test_a_subfolder_a_branch_and_a_message_are_where_they_were_asked_for(hub: HubServer, made: Path) -> None:
    hub.add("me/new", {"README.md": b"# Mine\n", "text_encoder/config.json": b"{}"}, private=True)
    result = push(made, to(folder="text_encoder_2", branch="nf4", message="Half the size"))
    repo = hub.repos["me/new"]
    assert "text_encoder_2/config.json" in repo.files("nf4")
    assert "text_encoder_2/config.json" not in repo.files("main")
    assert repo.files("nf4")["README.md"].startswith(b"---\n")
    assert repo.messages[repo.refs["nf4"]] == "Half the size"
    assert result.commit == repo.refs["nf4"]
    assert result.as_json()["subfolder"] == "text_encoder_2"


def test_a_pull_request_leaves_the_branch_as_it_is(hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = hub.add("big/new", {"model.safetensors": shard("a", 10)})
    before = repo.head
    monkeypatch.setenv("HF_TOKEN", READER)  # whoever can read can open one
    result = push(made, to("big/new", create_pr=True, private=False))
    assert repo.head == before
    assert result.pull_request == f"{hub.url}/big/new/discussions/1"
    assert "model.safetensors" in result.removed or "model.safetensors" in repo.files("refs/pr/1")
    assert "config.json" in repo.files("refs/pr/1")
    assert "nothing to open" in failure(lambda: push(made, to("big/none", create_pr=True)), MissingInput)
    assert "no branch" in failure(lambda: push(made, to("big/new", create_pr=True, branch="x")), MissingInput)


def test_pushing_again_sends_nothing_and_commits_nothing(hub: HubServer, made: Path) -> None:
    first = push(made, to())
    hub.reset_counts()
    second = push(made, to())
    assert second.commit == first.commit
    assert second.bytes_uploaded == 0
    assert not {"commit", *XET, *LFS} & set(hub.requests)


@pytest.mark.parametrize(("way", "nth"), [("shard", 2), ("lfs_part", 4)])
def test_an_interrupted_push_continues_with_the_files_that_are_missing(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, nth: int
) -> None:
    use(way, monkeypatch)
    monkeypatch.setattr(upload, "SMALL", 100_000)
    made = make(tmp_path / "many", shards=3)
    fault = hub.fail(way, nth=nth, status=403)
    failure(lambda: push(made, to()), PermissionRefused)
    assert hub.commit_bodies == []
    shards = {path.name: path.read_bytes() for path in made.glob("*.safetensors")}
    there = [name for name, data in shards.items() if hashlib.sha256(data).hexdigest() in hub.objects]
    assert there
    hub.faults.remove(fault)
    hub.reset_counts()
    result = push(made, to())
    missing = sum(len(data) for name, data in shards.items() if name not in there)
    assert result.bytes_uploaded <= 1.01 * missing
    assert files_of(made).items() <= hub.repos["me/new"].files().items()


def test_only_the_checkpoints_own_files_go_up(hub: HubServer, made: Path) -> None:
    strangers = ["modeling.py", "pytorch_model.bin", "notes.txt", ".env", "optimizer.pt", "other.safetensors"]
    for name in strangers:
        (made / name).write_bytes(b"stranger")
    (made / "old.partial").mkdir()
    (made / "LICENSE.txt").write_text("free")
    result = push(made, to())
    there = hub.repos["me/new"].files()
    assert not set(strangers) & set(there)
    assert there["LICENSE.txt"] == b"free"
    assert set(result.left_out) == {*strangers, "old.partial/"}


def test_a_checkpoint_of_other_tools_is_pushed_by_its_headers(hub: HubServer, made: Path) -> None:
    (made / RECORD).unlink()
    (made / "modeling.py").write_text("import os")
    push(made, to())
    assert set(hub.repos["me/new"].files()) == {*files_of(made), "README.md", ".gitattributes"} - {"modeling.py"}
    head, text = card_of(hub)
    assert head["tags"] == ["bitsandbytes", "4-bit", "nf4"]
    assert "base_model" not in head
    assert "LlamaForCausalLM.from_pretrained" in text


def test_a_pipeline_goes_up_with_all_its_components(hub: HubServer, made: Path, tmp_path: Path) -> None:
    root = tmp_path / "pipeline"
    root.mkdir()
    (root / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (made / RECORD).unlink()
    shutil.move(made, root / "text_encoder_2")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text("{}")
    (root / "junk").mkdir()
    (root / "junk" / "x.py").write_text("")
    result = push(root, to())
    assert {*files_of(root)} - {"junk/x.py"} <= set(hub.repos["me/new"].files())
    assert result.left_out == ("junk/",)


@pytest.mark.parametrize("way", ["xet", "lfs"])
def test_a_gitignore_over_there_leaves_no_file_out(
    hub: HubServer, made: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(way, monkeypatch)
    hub.add("me/new", {".gitignore": b"*.json\n*.safetensors\n"}, private=True)
    push(made, to())
    assert files_of(made).items() <= hub.repos["me/new"].files().items()


# What is refused before anything is sent


def test_a_damaged_checkpoint_is_not_pushed(hub: HubServer, made: Path) -> None:
    path = made / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert path.name in failure(lambda: push(made, to()), MalformedInput)
    path.unlink()
    assert path.name in failure(lambda: push(made, to()), MalformedInput)
    (made / RECORD).unlink()
    assert path.name in failure(lambda: push(made, to()), MissingInput)
    assert "no config.json" in failure(lambda: push(made.parent, to()), MissingInput)
    assert not hub.requests


def test_without_a_token_there_is_no_push(hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is no model is told first: with a token it would be of no use, either."""
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in failure(lambda: push(made, to()), PermissionRefused)
    assert "no config.json" in failure(lambda: push(made.parent, to()), MissingInput)
    failure(lambda: push(made / "none", to()), MissingInput)
    assert not hub.requests


@pytest.mark.parametrize("repo_id", ["me/a/b", "me/..", "me/ spaces"])
def test_an_impossible_destination_is_a_usage_error(hub: HubServer, made: Path, repo_id: str) -> None:
    failure(lambda: push(made, to(repo_id)), UsageError)
    failure(lambda: to(folder="../x"), UsageError)


def test_someone_elses_repository_is_refused(hub: HubServer, made: Path) -> None:
    hub.add("big/new", {})
    assert "403" in failure(lambda: push(made, to("big/new", private=False)), PermissionRefused)
    assert "403" in failure(lambda: push(made, to("big/none")), PermissionRefused)
    assert hub.commit_bodies == []


def test_weights_that_qz_did_not_make_are_replaced_only_when_told(hub: HubServer, made: Path) -> None:
    original = {"model.safetensors": shard("w", 100), "config.json": b"{}", "adapter_model.safetensors": shard("a", 10)}
    repo = hub.add("me/new", original, private=True)
    message = failure(lambda: push(made, to()), OutputRefused)
    assert "model.safetensors" in message
    assert repo.files() == original
    assert not WRITES & set(hub.requests)
    result = push(made, to(replace=True))
    assert result.removed == ("model.safetensors",)
    assert "model.safetensors" not in repo.files()
    assert "adapter_model.safetensors" in repo.files()


def test_shards_of_an_earlier_push_do_not_stay_behind(hub: HubServer, made: Path, tmp_path: Path) -> None:
    push(make(tmp_path / "three", shards=3, seed=7), to())
    result = push(made, to())
    weights = {name for name in hub.repos["me/new"].files() if name.endswith(".safetensors")}
    assert weights == {path.name for path in made.glob("*.safetensors")}
    assert len(result.removed) == 3
    assert len(hub.commit_bodies) == 2


# Who may see it


@pytest.mark.parametrize("how", [{"private": True}, {"gated": "auto"}, {"gone": True}])
def test_what_came_from_a_restricted_source_becomes_public_only_when_told(
    hub: HubServer, made: Path, how: dict[str, Any]
) -> None:
    if how.pop("gone", False):
        del hub.repos["big/llama"]
    for name, value in how.items():
        setattr(hub.repos["big/llama"], name, value)
    open_repo = hub.add("me/new", {}, private=False)
    before = open_repo.head
    assert "--public" in failure(lambda: push(made, to()), PermissionRefused)
    assert open_repo.head == before
    push(made, to("me/other"))
    assert hub.repos["me/other"].private
    push(made, to(private=False))
    assert open_repo.head != before


def test_what_was_made_of_a_local_copy_remembers_where_that_came_from(hub: HubServer, tmp_path: Path) -> None:
    local = {**ABOUT["source"], "location": "my-nf4", "revision": None}
    origin = {"location": "big/llama", "revision": COMMIT}
    about = {**ABOUT, "source": local, "origin": origin, "command": ["qz", "quantize", "my-nf4", "--nf4"]}
    made = make(tmp_path / "made", about=about)
    hub.repos["big/llama"].gated = "auto"
    hub.add("me/new", {}, private=False)
    assert "--public" in failure(lambda: push(made, to()), PermissionRefused)
    push(made, to(private=False))
    head, text = card_of(hub)
    assert (head["base_model"], head["license"]) == ("big/llama", "llama3")
    assert "This is my-nf4 (from [big/llama]" in text
    assert "qz quantize my-nf4" in text


def test_the_caller_may_know_that_the_source_is_restricted(hub: HubServer, made: Path) -> None:
    hub.add("me/new", {}, private=False)
    failure(lambda: push(made, to(), source_private=True), PermissionRefused)
    push(made, to())


def test_what_cannot_be_pushed_is_known_before_the_work(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/open", {}, private=False)
    require_possible(to("me/new"))
    require_possible(to("me/open"), source_private=False)
    require_possible(to("me/open", private=False), source_private=True)
    failure(lambda: require_possible(to("me/open"), source_private=True), PermissionRefused)
    failure(lambda: require_possible(to("me/open", private=True)), PermissionRefused)
    failure(lambda: require_possible(to("me/none", create_pr=True)), MissingInput)
    assert not WRITES & set(hub.requests)
    monkeypatch.delenv("HF_TOKEN")
    failure(lambda: require_possible(to("me/new")), PermissionRefused)


def test_private_is_not_pushed_to_a_public_repository(hub: HubServer, made: Path) -> None:
    hub.add("me/new", {}, private=False)
    assert "is public" in failure(lambda: push(made, to(private=True)), PermissionRefused)
    assert hub.commit_bodies == []


def test_a_private_repository_stays_private_even_with_public(hub: HubServer, made: Path) -> None:
    hub.add("me/new", {}, private=True)
    result = push(made, to(private=False))
    assert result.private
    assert "stays private" in result.notes[0]


@pytest.mark.parametrize("exists", [True, False])
def test_a_repository_that_becomes_public_during_the_push_gets_no_commit(
    hub: HubServer, made: Path, exists: bool
) -> None:
    if exists:
        hub.add("me/new", {}, private=True)
    hub.fail("xorb_put", times=1, before=lambda: setattr(hub.repos["me/new"], "private", False))
    assert "became public" in failure(lambda: push(made, to()), PermissionRefused)
    assert hub.commit_bodies == []
    push(made, to("me/new", private=False))


# What goes wrong on the way


def test_another_commit_meanwhile_is_not_overwritten(hub: HubServer, made: Path) -> None:
    repo = hub.add("me/new", {}, private=True)
    hub.fail("commit", times=1, before=lambda: hub.commit("me/new", {"theirs.txt": b"x"}))
    assert "changed meanwhile" in failure(lambda: push(made, to()), TryAgain)
    assert hub.requests["commit"] == 1  # a second one could not be made either
    assert set(repo.files()) == {"theirs.txt"}
    push(made, to())
    assert files_of(made).items() <= repo.files().items()
    assert repo.files()["theirs.txt"] == b"x"


def test_a_commit_whose_answer_is_lost_was_made_once(hub: HubServer, made: Path) -> None:
    hub.fail("commit", times=1, lose_answer=True)
    result = push(made, to())
    assert result.commit == hub.repos["me/new"].head
    assert len(hub.commit_bodies) == 1


def test_a_file_that_changes_during_the_push_stops_it(hub: HubServer, made: Path) -> None:
    hub.fail("xorb_put", times=1, before=lambda: (made / "config.json").write_text("{}"))
    assert "config.json changed" in failure(lambda: push(made, to()), OutputRefused)
    assert hub.commit_bodies == []


def test_a_commit_that_lacks_a_file_is_noticed(hub: HubServer, made: Path) -> None:
    def lose() -> None:
        repo = hub.repos["me/new"]
        tree = repo.commits[repo.head]
        tree.pop("config.json")

    hub.fail("tree", times=1, before=lose)
    assert "config.json" in failure(lambda: push(made, to()), HubUnreachable)


STEPS = ["info", "create", "validate_yaml", "preupload", *XET, *LFS, "commit", "tree"]


@pytest.mark.parametrize(("kind", "how"), in_turn(STEPS, [{"status": 500}, {"status": 503}, {"drop": True}]), ids=str)
def test_a_passing_failure_at_any_step_is_overcome(
    hub: HubServer, made: Path, kind: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(kind, monkeypatch)
    fault = hub.fail(kind, times=1, **how)
    push(made, to())
    assert fault.seen > 1
    assert files_of(made).items() <= hub.repos["me/new"].files().items()
    assert len([body for body in hub.commit_bodies if body]) == 1


LASTING: dict[str, tuple[dict[str, Any], type[QzError]]] = {
    "401": ({"status": 401, "message": "Invalid credentials in Authorization header"}, PermissionRefused),
    "403": ({"status": 403, "message": f"not with {OWNER}"}, PermissionRefused),
    "404": ({"status": 404}, MissingInput),
    "400": ({"status": 400, "message": "no"}, MalformedInput),
    "429": ({"status": 429}, TryAgain),
    "500": ({"status": 500}, HubUnreachable),
    "drop": ({"drop": True}, HubUnreachable),
}
HUB_STEPS = ["info", "create", "validate_yaml", "preupload", "xet_token", "branch", "commit", "tree"]


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *(
            pair
            for pair in in_turn(HUB_STEPS, ["401", "403", "404", "400"], ["429", "500", "drop"])
            if pair.values != ("xet_token", "404")
        ),
        *in_turn(LFS, ["401", "404"], ["500", "drop"]),
    ],
)
def test_a_lasting_failure_at_any_step_is_a_documented_error_and_no_commit(
    hub: HubServer, made: Path, kind: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, error = LASTING[case]
    use(kind, monkeypatch)
    branch = "nf4" if kind == "branch" else "main"
    hub.fail(kind, **how)
    message = failure(lambda: push(made, to(branch=branch)), error)
    assert hub.commit_bodies == [] or kind == "tree"
    assert any(word in message for word in ("gain", "See ", "see ", "Run", "http"))


@pytest.mark.parametrize(
    ("kind", "status", "error"),
    in_turn(
        ["xorb_grant", "xorb_put", "xorb_commit", "shard"],
        [(401, PermissionRefused), (403, PermissionRefused)],
        [(400, HubUnreachable), (429, TryAgain), (503, HubUnreachable)],
    ),
)
def test_a_lasting_refusal_of_the_xet_storage_is_a_documented_error_and_no_commit(
    hub: HubServer, made: Path, kind: str, status: int, error: type[QzError]
) -> None:
    hub.fail(kind, status=status)
    hub.fail("xorb_post", status=status)  # what hf_xet does where the granted link fails
    message = failure(lambda: push(made, to()), error)
    assert str(status) in message or status == 429
    assert "again" in message
    assert hub.commit_bodies == []


def test_an_answer_that_is_no_json_is_not_a_bug(hub: HubServer, made: Path) -> None:
    hub.fail("validate_yaml", replace={"Content-Length": "0"}, truncate=0)
    assert "not return a valid Hub response" in failure(lambda: push(made, to()), HubUnreachable)


# The card


def test_a_new_card_says_where_it_comes_from_and_how_it_was_made(hub: HubServer, made: Path) -> None:
    push(made, to())
    head, text = card_of(hub)
    assert head == {
        "base_model": "big/llama",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "llama3",
        "language": "en",
        "pipeline_tag": "text-generation",
        "tags": ["bitsandbytes", "4-bit", "nf4"],
    }
    for part in (
        "# llama, NF4 (4 bit)",
        f"commit `{COMMIT[:12]}`",
        "| weights on disk | 2 MB | 700 kB |",
        "90.0% of 1,000,000 parameters",
        "`lm_head`",
        f"qz quantize big/llama --revision {COMMIT} --nf4 --skip proj_out",
        "qz 0.1.0, torch 2.13.0, bitsandbytes 0.50.2",
        'LlamaForCausalLM.from_pretrained("me/new", device_map="auto")',
    ):
        assert part in text, part
    compile(text.split("```python\n")[1].split("```")[0], "snippet", "exec")


@pytest.mark.parametrize("folder", ["", "nf4"])
def test_a_page_of_qz_goes_up_and_is_linked_from_the_card_and_no_page_of_others(
    folder: str, hub: HubServer, made: Path
) -> None:
    (made / "report.html").write_text("<html>mine")
    assert push(made, to(folder=folder)).left_out == ("report.html",)
    assert "report.html" not in card_of(hub)[1]
    (made / "report.html").write_text(page("made", section("Sizes")))
    assert push(made, to(folder=folder)).left_out == ()
    place = f"{folder}/report.html" if folder else "report.html"
    assert b"Sizes" in hub.repos["me/new"].files()[place]
    assert f"[report.html](<{place}>)" in card_of(hub)[1]


def test_the_text_and_the_head_of_an_existing_card_are_kept(hub: HubServer, made: Path) -> None:
    mine = "---\nlicense: mit\ntags:\n- cats\nbase_model: my/other\n---\n\n# Mine\n\nHand-written.\n"
    hub.add("me/new", {"README.md": mine.encode()}, private=True)
    push(made, to())
    head, text = card_of(hub)
    assert head["license"] == "mit"
    assert head["base_model"] == "my/other"
    assert "base_model_relation" not in head
    assert head["tags"] == ["cats", "bitsandbytes", "4-bit", "nf4"]
    assert text.startswith("\n# Mine\n\nHand-written.\n\n<!-- qz:begin -->")
    hub.commit("me/new", {"README.md": hub.repos["me/new"].files()["README.md"] + b"\nAfterword.\n"})
    changed = replace(facts_of(ABOUT, CONFIG), method="int8")
    again = write_card(changed, "me/new", existing=hub.repos["me/new"].files()["README.md"].decode())
    assert "Hand-written." in again
    assert again.endswith("Afterword.\n")
    assert again.count("qz:begin") == again.count("qz:end") == 1
    assert "LLM.int8()" in again
    assert "NF4" not in again


def test_each_folder_of_a_repository_has_its_own_section(hub: HubServer, made: Path, tmp_path: Path) -> None:
    push(made, to(folder="text_encoder"))
    push(make(tmp_path / "second", seed=5), to(folder="text_encoder_2"))
    _, text = card_of(hub)
    assert text.count("<!-- qz:begin text_encoder -->") == text.count("<!-- qz:begin text_encoder_2 -->") == 1
    assert text.index("qz:end text_encoder -->") < text.index("qz:begin text_encoder_2 -->")


def test_the_folders_own_card_is_the_text_where_the_repository_has_none(hub: HubServer, made: Path) -> None:
    (made / "README.md").write_text("# From the folder\n")
    push(made, to())
    assert card_of(hub)[1].startswith("# From the folder") or "# From the folder" in card_of(hub)[1]


def test_a_card_that_cannot_be_read_is_refused_before_anything_is_sent(hub: HubServer, made: Path) -> None:
    hub.add("me/new", {"README.md": b"---\na: [b\n---\nText\n"}, private=True)
    assert "README.md" in failure(lambda: push(made, to()), MalformedInput)
    assert not WRITES & set(hub.requests)


def test_a_license_link_inside_the_source_becomes_a_full_one() -> None:
    facts = inherit(facts_of(ABOUT, CONFIG), {"license": "other", "license_name": "x", "license_link": "LICENSE.md"})
    assert facts.inherited["license_link"] == "https://huggingface.co/big/llama/blob/main/LICENSE.md"
    assert inherit(facts, {"license_link": "https://x.org"}).inherited["license_link"] == "https://x.org"


def test_a_card_names_the_other_half_of_a_pipeline_as_the_sources_does() -> None:
    facts = inherit(facts_of(ABOUT, CONFIG), {"prior": ["big/prior"]})
    assert "prior:\n- big/prior\n" in write_card(facts, "me/x")


@pytest.mark.parametrize(
    ("facts", "lines"),
    [
        (
            CardFacts("diffusers", "FluxTransformer2DModel", "nf4", "big/flux", COMMIT, subfolder="transformer"),
            [
                'transformer = FluxTransformer2DModel.from_pretrained("me/x", subfolder="transformer", torch_dtype=',
                '"big/flux", transformer=transformer',
            ],
        ),
        (
            CardFacts(
                "transformers",
                "T5EncoderModel",
                "int8",
                "big/flux",
                COMMIT,
                subfolder="text_encoder_2",
                dtype="float16",
            ),
            [
                "from transformers import T5EncoderModel",
                'text_encoder_2 = T5EncoderModel.from_pretrained("me/x", subfolder="text_encoder_2", dtype=torch.',
                '"big/flux", text_encoder_2=text_encoder_2',
            ],
        ),
        (
            CardFacts(
                "diffusers",
                "WanTransformer3DModel",
                "nf4",
                "big/wan",
                COMMIT,
                subfolder="transformer",
                pipeline_class="WanPipeline",
            ),
            ["from diffusers import WanPipeline, WanTransformer3DModel", "pipeline = WanPipeline.from_pretrained("],
        ),
        (
            CardFacts(
                "transformers",
                "ChatGLMModel",
                "int8",
                "big/kolors",
                COMMIT,
                subfolder="text_encoder",
                module="diffusers.pipelines.kolors.text_encoder",
            ),
            ["from diffusers.pipelines.kolors.text_encoder import ChatGLMModel", "text_encoder = ChatGLMModel.from_"],
        ),
        (
            CardFacts("transformers", "LlamaForCausalLM", "none", "local", tokenizer=True),
            ['LlamaForCausalLM.from_pretrained("me/x", subfolder=', "AutoTokenizer.from_pretrained"],
        ),
    ],
)
def test_the_snippet_fits_the_model_and_is_python(facts: CardFacts, lines: list[str]) -> None:
    code = snippet(facts, OnHub("me/x", facts.subfolder or "sub"))
    compile(code, "snippet", "exec")
    for line in lines:
        assert line in code


def test_a_pipelines_card_lists_its_components_and_loads_it_whole() -> None:
    components = [
        {"name": "transformer", "architecture": "FluxTransformer2DModel", "method": "nf4"}
        | {"bytes": {"source": 4_000_000, "output": 1_000_000}},
        {"name": "vae", "architecture": "AutoencoderKL", "method": "none", "bytes": {"source": 7_000, "output": 7_000}},
        {"name": "scheduler", "architecture": None, "method": "none", "bytes": {"source": 0, "output": 0}},
    ]
    source = {**ABOUT["source"], "library": "diffusers", "architecture": "FluxPipeline"}
    command = ["qz", "quantize", "big/flux", "--nf4", "--components", "transformer", "--component", "vae=none"]
    about = {**ABOUT, "source": source, "components": components, "command": command}
    card = write_card(facts_of(about, {}), "me/new")
    assert "| `transformer` | FluxTransformer2DModel | nf4 | 4 MB | 1 MB |" in card
    assert "| `vae` | AutoencoderKL | none | 7 kB | 7 kB |" in card
    assert "scheduler" not in card
    assert 'DiffusionPipeline.from_pretrained("me/new", torch_dtype=torch.bfloat16)' in card
    assert "--components transformer --component vae=none" in card


def test_the_loss_of_each_layer_is_told_where_it_was_measured() -> None:
    layers = [{"name": "layer.1", "relative_error": 0.0931}, {"name": "layer.0", "relative_error": None}]
    card = write_card(facts_of({**ABOUT, "loss": {"total": {}, "layers": layers}}, CONFIG), "me/new")
    assert "| `layer.1` | 0.0931 |" in card
    assert "layer.0" not in card
    assert "By module, largest first" in card

    layers = [{"name": f"layer.{number}", "relative_error": 0.5 - number / 100} for number in range(40)]
    loss = {"total": {"relative_error": 0.25}, "layers": layers, "layers_left_out": 960}
    card = write_card(facts_of({**ABOUT, "loss": loss}, CONFIG), "me/new")
    assert "Of all together: 0.2500. By module, the 30 largest of 1,000:" in card
    assert "`layer.29`" in card
    assert "`layer.30`" not in card


def test_sentences_of_a_card_are_whole_and_what_is_cut_says_so() -> None:
    why = "one GPU, or pipeline parallelism. " * 6 + "And the last word"
    told = {"name": "vLLM", "package": "v 1", "loads": True, "why": why}
    card = write_card(facts_of({**ABOUT, "loads_in": [told], "skipped": ["layer." * 40]}, CONFIG), "me/new")
    assert f"| yes | {why} |" in card
    assert f"`{('layer.' * 40)[:119]}…`" in card


def test_names_from_a_checkpoint_cannot_become_markup() -> None:
    about = {
        **ABOUT,
        "skipped": ["a`](http://x)<script>\x1b[2J\u202e"],
        "source": {**ABOUT["source"], "revision": None},
    }
    about["source"]["location"] = "x\n```\n# Heading <b>"
    card = write_card(facts_of(about, CONFIG), "me/new")
    for bad in ("<script>", "\x1b", "\u202e", "](http://x)", "\n# Heading"):
        assert bad not in card
    assert "<b>" not in card
    assert card.count("```") == 4


def test_a_result_is_json(hub: HubServer, made: Path) -> None:
    result: PushResult = push(made, to(), dry_run=True)
    value = json.loads(json.dumps(result.as_json()))
    assert {"repository", "url", "branch", "private", "commit", "files", "bytes", "dry_run"} <= set(value)
