"""``qz attest``: statements that in-toto's own classes take, signatures that model-signing makes and checks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement

from conftest import Qz
from hub_server import connected
from pipelines import flux
from qz import MalformedInput, MissingInput, OutputRefused, PermissionRefused, Unsupported, UsageError, api
from qz.cli.reports.markup import page, section
from qz.formats.attestation.attest import _require_no_other_signature
from qz.formats.attestation.signing import require_signed
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.recorded.record import encode_record, read_record
from qz.formats.publish.checkpoint_files import IN_MEMORY, own_files
from test_scales import statistics

ON_CPU: dict[str, Any] = {"device": "cpu", "threads": 2}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private key and its public key, as model-signing's documentation has them made."""
    private = tmp_path_factory.mktemp("keys") / "key.pem"
    public = private.with_name("key.pub")
    commands: list[list[str | Path]] = [
        ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private],
        ["ec", "-in", private, "-pubout", "-out", public],
    ]
    for command in commands:
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    return private, public


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("attest") / "made"
    known = statistics(tiny_llama, output.with_name("known.safetensors"))
    api.quantize(tiny_llama, output, importance=known, max_shard_bytes=30_000, **ON_CPU)
    return output


@pytest.fixture
def made(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / "made"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stated(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "qz.statement.json").read_text())
    return value


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


Theirs = Callable[[Path, Path], subprocess.CompletedProcess[str]]


@pytest.fixture
def theirs(python_with_libraries: list[str]) -> Theirs:
    """The command of model-signing."""

    def verify(folder: Path, public: Path) -> subprocess.CompletedProcess[str]:
        words = ["verify", "key", str(folder), "--signature", str(folder / "model.sig"), "--public_key", str(public)]
        command = [*python_with_libraries, "-m", "model_signing", *words]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    return verify


def test_the_statement_names_every_file_and_what_it_was_made_of(tiny_llama: Path, made: Path) -> None:
    files = {path.name: sha256(path) for path in made.iterdir()}
    report = api.attest(made, tiny_llama)
    value = stated(made)
    Statement.copy_from_pb(ParseDict(value, statement_pb2.Statement())).validate()
    assert {each["name"]: each["digest"]["sha256"] for each in value["subject"]} == files
    definition = value["predicate"]["buildDefinition"]
    found = {each["name"].rpartition("/")[2]: each.get("digest") for each in definition["resolvedDependencies"]}
    assert found["model.safetensors"] == {"sha256": sha256(tiny_llama / "model.safetensors")}
    assert found["importance: known.safetensors"]
    assert definition["externalParameters"]["command"][:2] == ["qz", "quantize"]
    assert {"qz", "torch", "bitsandbytes", "transformers"} <= value["predicate"]["runDetails"]["builder"][
        "version"
    ].keys()
    assert report.subjects == len(files)
    before = (made / "qz.statement.json").read_bytes()
    api.attest(made, tiny_llama)
    assert (made / "qz.statement.json").read_bytes() == before, "the same bytes each time"
    api.attest(made)
    dependencies = stated(made)["predicate"]["buildDefinition"]["resolvedDependencies"]
    [weights] = [each for each in dependencies if each["name"].endswith("model.safetensors")]
    assert "digest" not in weights
    assert weights["annotations"]["bytes"] == (tiny_llama / "model.safetensors").stat().st_size


def test_a_statement_is_verified_and_what_differs_is_named(made: Path, tmp_path: Path, forked_qz: Qz) -> None:
    api.attest(made)
    statement = (made / "qz.statement.json").rename(tmp_path / "statement.json")
    assert forked_qz("verify", made, "--statement", statement).returncode == 0
    (made / "generation_config.json").unlink()
    flip(made / "qz.json")
    shard = next(made.glob("*.safetensors"))
    flip(shard)
    result = forked_qz("verify", made, "--statement", statement, "--json")
    report = json.loads(result.stdout.splitlines()[0])
    assert (result.returncode, report["intact"]) == (65, False)
    assert {each["where"] for each in report["problems"]} == {"generation_config.json", "qz.json", shard.name}


def test_what_a_statement_or_a_signature_does_not_cover_is_named(
    made: Path, keys: tuple[Path, Path], tmp_path: Path, forked_qz: Qz
) -> None:
    (made / "notes").mkdir()
    (made / "notes/mine.txt").write_text("mine")
    api.attest(made, sign_key=keys[0])
    (made / "README.md").write_text("as a push adds one")
    others = ["README.md", "notes/"]
    for option, file, kind in (
        ("--public-key", keys[1], "file-unsigned"),
        ("--statement", made / "qz.statement.json", "file-unstated"),
    ):
        result = forked_qz("verify", made, option, file, "--json")
        problems = json.loads(result.stdout)["problems"]
        assert [(each["severity"], each["kind"], each["where"]) for each in problems] == [
            ("warning", kind, name) for name in others
        ]
        assert result.returncode == 0
    value = stated(made)
    value["subject"] = [each for each in value["subject"] if each["name"] != "config.json"]
    (tmp_path / "statement.json").write_text(json.dumps(value))
    found = api.verify(made, statement=tmp_path / "statement.json")
    assert {each.where for each in found.problems} == {*others, "config.json"}


def test_what_is_no_statement_is_refused(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "statement.json"
    with pytest.raises(MissingInput):
        api.verify(made, statement=file)
    subject = {"name": "../config.json", "digest": {"sha256": "0" * 64}}
    statement: dict[str, Any] = {"_type": "https://in-toto.io/Statement/v1", "predicateType": "x", "subject": [subject]}
    values: list[dict[str, Any]] = [
        {},
        {"_type": "https://in-toto.io/Statement/v0.1"},
        {"dsseEnvelope": {}},
        statement,
        {**statement, "subject": [{"name": "config.json", "digest": {"sha1": "0" * 40}}]},
        {**statement, "subject": 3},
        {**statement, "subject": []},
        {**statement, "subject": [{**subject, "name": name} for name in ("config.json", "config.json")]},
        {**statement, "subject": [{**subject, "name": "config.json", "annotations": {"bytes": ""}}]},
    ]
    for value in values:
        file.write_text(json.dumps(value))
        with pytest.raises(MalformedInput, match=r"statement\.json"):
            api.verify(made, statement=file)
    os.truncate(file, 1 << 40)
    os.mkfifo(tmp_path / "fifo")
    for other in (file, tmp_path / "fifo"):
        with pytest.raises(MalformedInput, match="is no statement"):
            api.verify(made, statement=other)


def test_files_beside_an_output_of_any_length_are_read_no_further_than_their_kind_calls_for(made: Path) -> None:
    api.attest(made)
    (made / "report.html").touch()
    os.truncate(made / "report.html", 1 << 40)
    own = own_files(LocalFolder(made))
    assert "report.html" in own.left_out
    own.require_stated()
    with (made / "qz.statement.json").open("ab") as file:
        file.write(b" " * IN_MEMORY)
    with pytest.raises(MalformedInput, match="too many for a statement"):
        own_files(LocalFolder(made)).require_stated()
    (made / "model.sig").touch()
    os.truncate(made / "qz.statement.json", 1 << 40)
    with pytest.raises(OutputRefused, match="is of another statement"):
        _require_no_other_signature(made, b"{}", None)
    os.truncate(made / "model.sig", 1 << 40)
    with pytest.raises(MalformedInput, match="too many for a signature"):
        require_signed(made, made / "key")


def test_an_output_that_is_not_as_it_was_written_is_not_attested(tiny_llama: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(MalformedInput, match="qz did not write it"):
        api.attest(tiny_llama)
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    (other / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="not the recorded source"):
        api.attest(made, other)
    flip(next(made.glob("*.safetensors")))
    with pytest.raises(MalformedInput, match="is not what was written"):
        api.attest(made)
    assert not (made / "qz.statement.json").exists()


def test_a_folder_that_takes_no_new_file_is_told(quantized: Path) -> None:
    user = os.geteuid()
    with TemporaryDirectory() as place:  # pytest's own are closed to others
        Path(place).chmod(0o755)
        output = Path(shutil.copytree(quantized, Path(place) / "made"))
        api.attest(output)  # imports what another user may not read
        output.chmod(0o555)
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(PermissionRefused, match="attest a copy of it"):
                api.attest(output)
        finally:
            os.seteuid(user)
            output.chmod(0o755)


def test_model_signing_checks_what_is_signed(
    made: Path, keys: tuple[Path, Path], forked_qz: Qz, theirs: Theirs
) -> None:
    private, public = keys
    (made / "notes.txt").write_text("mine")
    report = api.attest(made, sign_key=private)
    assert report.left_out == ("notes.txt",)
    (made / "README.md").write_text("as a push adds one")
    assert theirs(made, public).returncode == 0
    assert api.verify(made, public_key=public).intact
    result = forked_qz("verify", made, "--statement", made / "qz.statement.json", "--public-key", public)
    assert result.returncode == 0
    with pytest.raises(UsageError, match=r"key\.pem is not a public key"):
        api.verify(made, public_key=private)

    flip(made / "qz.statement.json")
    assert theirs(made, public).returncode != 0
    result = forked_qz("verify", made, "--public-key", public, "--json")
    [problem] = json.loads(result.stdout.splitlines()[0])["problems"]
    assert (result.returncode, problem["kind"]) == (65, "signature-invalid")
    assert "qz.statement.json" in problem["message"]

    with pytest.raises(UsageError, match="leave out --against"):
        api.verify(made, made, public_key=public)
    with pytest.raises(UsageError, match="--source SOURCE"):
        api.attest(made, revision="main")
    (made / "model.sig").write_text("{}")
    assert not api.verify(made, public_key=public).intact
    (made / "model.sig").unlink()
    with pytest.raises(MissingInput, match=r"model\.sig"):
        api.verify(made, public_key=public)


def test_what_lies_in_a_component_and_is_not_its_own_is_neither_signed_nor_pushed(
    keys: tuple[Path, Path], theirs: Theirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download

    made = tmp_path / "made"
    api.quantize(flux(tmp_path / "flux"), made, **ON_CPU)
    strangers = ("transformer/.DS_Store", "transformer/notes.txt", "vae/old/")
    for name in ("transformer/notes.txt", "transformer/.DS_Store", "vae/old/notes.txt"):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text("mine")
    assert api.attest(made, sign_key=keys[0]).left_out == strangers
    with connected(monkeypatch, tmp_path / "home"):
        assert api.push(made, "me/flux-nf4").left_out == strangers
        copy = Path(snapshot_download("me/flux-nf4", local_dir=tmp_path / "copy"))
    assert theirs(copy, keys[1]).returncode == 0
    assert api.verify(copy, public_key=keys[1]).intact


def test_a_key_of_another_is_not_the_signer(made: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", other], check=True)
    api.attest(made, sign_key=other)
    assert not api.verify(made, public_key=keys[1]).intact
    (made / "qz.statement.json").write_text("{}")
    with pytest.raises(OutputRefused, match="another statement"):
        api.attest(made)
    other.write_text("no key")
    with pytest.raises(UsageError, match="openssl ecparam"):
        api.attest(made, sign_key=other)


def test_without_the_package_the_extra_is_named(made: Path, keys: tuple[Path, Path], qz: Qz) -> None:
    blocked = made.parent / "blocked"
    blocked.mkdir()
    (blocked / "model_signing.py").write_text("raise ImportError('not here')")
    result = qz("attest", made, "--sign-key", keys[0], PYTHONPATH=str(blocked))
    assert result.returncode == 78
    assert "pip install 'qz-cli[sign]'" in result.stderr


def test_a_push_takes_both_along_and_a_download_is_verified(
    tiny_llama: Path, keys: tuple[Path, Path], theirs: Theirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download

    with connected(monkeypatch, tmp_path / "home") as hub:
        hub.add("org/model", {path.name: path.read_bytes() for path in tiny_llama.iterdir()})
        made = tmp_path / "made"
        api.quantize("org/model", made, **ON_CPU)
        api.attest(made, "org/model", sign_key=keys[0])
        found = stated(made)["predicate"]["buildDefinition"]["resolvedDependencies"]
        commit = hub.repos["org/model"].refs["main"]
        assert found[0] == {
            "name": "org/model",
            "uri": f"pkg:huggingface/org/model@{commit}",
            "digest": {"gitCommit": commit},
        }
        hashes = {each["name"]: each["digest"] for each in found[1:]}
        assert hashes["org/model/model.safetensors"] == {"sha256": sha256(tiny_llama / "model.safetensors")}
        assert hashes["org/model/config.json"].keys() == {"gitBlob"}
        api.push(made, "me/model-nf4")
        assert api.verify("me/model-nf4", statement=made / "qz.statement.json").intact
        with pytest.raises(Unsupported, match="hf download"):
            api.verify("me/model-nf4", public_key=keys[1])
        copy = Path(snapshot_download("me/model-nf4", local_dir=tmp_path / "copy"))
        assert theirs(copy, keys[1]).returncode == 0
        assert api.verify(copy, public_key=keys[1]).intact
        record = read_record(LocalFolder(made))
        assert record is not None
        (made / "qz.json").write_bytes(encode_record(record.files, {**record.about, "warnings": ["Another."]}))
        with pytest.raises(MalformedInput, match=r"statement\.json describes other files"):
            api.push(made, "me/model-nf4")
    api.quantize(tiny_llama, made, if_exists="overwrite", **ON_CPU)
    assert not (made / "model.sig").exists(), "a new output has no old statement"


def test_a_page_is_pushed_whether_it_was_there_when_the_statement_was_made_or_not(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(monkeypatch, tmp_path / "home") as hub:
        api.attest(made)
        (made / "report.html").write_text(page("made", section("Sizes")))
        api.push(made, "me/later")
        api.attest(made)
        api.push(made, "me/stated")
        for name in ("me/later", "me/stated"):
            assert "report.html" in hub.repos[name].files()
        (made / "report.html").write_text(page("made", section("Other sizes")))
        with pytest.raises(MalformedInput, match=r"report\.html differs"):
            api.push(made, "me/stated")


@pytest.mark.parametrize("device", ["a FIFO", "/dev/zero"])
def test_a_key_that_is_no_file_is_neither_waited_for_nor_read_without_end(
    made: Path, tmp_path: Path, device: str
) -> None:
    named = Path(device)
    if device == "a FIFO":
        named = tmp_path / "fifo"
        os.mkfifo(named)
    with pytest.raises(UsageError, match="is not a private key"):
        api.attest(made, sign_key=named)
