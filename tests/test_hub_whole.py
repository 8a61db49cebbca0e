"""From the Hub and back to it with whole models: streamed, quantized, pushed, and loaded from there."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
from hub_server import READER, HubServer, connected
from qz import api
from qz.cli.app import run
from qz.formats.hub.transport import backoff, session
from qz.formats.hub.transport.backoff import Retries
from readers import model_folder
from reference import differing_files, diffusers_model, tensors_of

Command = Callable[..., dict[str, Any]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    for module in (session, backoff):
        monkeypatch.setattr(module, "Retries", lambda: Retries(attempts=3, first_wait=0.01, longest_asked=1))
    monkeypatch.setattr(session, "ASKING", Retries(attempts=3, first_wait=0.01))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.chdir(tmp_path)
    with connected(monkeypatch, tmp_path / "home") as hub:
        yield hub


@pytest.fixture
def qz(capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Run a command in this process; its JSON, with the exit code as ``code``."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def command(*words: str | Path) -> dict[str, Any]:
        capsys.readouterr()
        code = run([*map(str, words), "--json"])
        lines = capsys.readouterr().out.strip().splitlines()
        return {"code": code, **json.loads(lines[-1])}

    yield command
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards, 14 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("llama") / "llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="3600KB")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Llama\n")
    return folder


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.flux(tmp_path_factory.mktemp("flux") / "flux")


def files_of(folder: Path) -> dict[str, bytes | Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def differing(one: Path, other: Path) -> list[str]:
    """Files that differ, but for the record: it names the source."""
    return [name for name in differing_files(one, other) if name != "qz.json"]


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_a_sharded_llama_from_the_hub_to_the_hub_and_loaded_from_there(
    hub: HubServer, llama: Path, qz: Command, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    hub.add("big/llama", files_of(llama))
    done = qz("quantize", "big/llama", "--nf4", "-o", "nf4")
    assert done["source"]["revision"] == hub.repos["big/llama"].head
    # Every weight once, and a first look at each header; nothing on the disk but the output.
    assert hub.bytes_out["cdn"] == weights(llama) + 4 * 65_536
    assert not (tmp_path / "home").exists()
    qz("quantize", llama, "--nf4", "-o", "local")
    assert differing(tmp_path / "local", tmp_path / "nf4") == []

    pushed = qz("push", "nf4", "me/llama-nf4")
    assert pushed["private"]
    assert pushed["commit"] == hub.repos["me/llama-nf4"].head
    card = hub.repos["me/llama-nf4"].files()["README.md"].decode()
    assert "license: apache-2.0" in card
    scope: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], scope)
    local = LlamaForCausalLM.from_pretrained(tmp_path / "local", device_map="cpu")
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(scope["model"](tokens).logits, local(tokens).logits)

    back = qz("dequantize", "me/llama-nf4", "-o", "back")
    assert back["code"] == 0
    original = tensors_of(llama)
    assert all(original[name].shape == tensor.shape for name, tensor in tensors_of(tmp_path / "back").items())


def test_a_flux_shaped_pipeline_from_the_hub_to_the_hub(
    hub: HubServer, flux: Path, qz: Command, tmp_path: Path
) -> None:
    from diffusers import FluxTransformer2DModel
    from huggingface_hub import snapshot_download

    hub.add("big/flux", files_of(flux), gated="auto").granted.add("me")
    assert qz("quantize", "big/flux", "--subfolder", "transformer", "--nf4", "-o", "part")["code"] == 0
    part_of_pipeline = "transformer"
    assert hub.bytes_out["cdn"] < 3 * weights(flux / part_of_pipeline)
    assert qz("push", "part", "me/flux-nf4", "--subfolder", part_of_pipeline)["code"] == 0
    assert hub.repos["me/flux-nf4"].private
    there = Path(snapshot_download("me/flux-nf4"))
    model = diffusers_model(FluxTransformer2DModel, there / part_of_pipeline, None)
    local = diffusers_model(FluxTransformer2DModel, tmp_path / "part", None)
    ours, theirs = model.state_dict(), local.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    whole = qz("quantize", "big/flux", "--nf4", "--components", "transformer,text_encoder_2", "-o", "whole")
    assert whole["code"] == 0
    qz("quantize", flux, "--nf4", "--components", "transformer,text_encoder_2", "-o", "local")
    for name in ("transformer", "text_encoder_2", "vae", "text_encoder"):
        assert differing(tmp_path / "local" / name, tmp_path / "whole" / name) == []
    pushed = qz("push", "whole", "me/flux-whole")
    assert pushed["code"] == 0
    assert "transformer/config.json" in hub.repos["me/flux-whole"].files()
    assert (
        "| `transformer` | FluxTransformer2DModel | nf4 |" in hub.repos["me/flux-whole"].files()["README.md"].decode()
    )


def test_one_command_quantizes_and_publishes(hub: HubServer, llama: Path, qz: Command, tmp_path: Path) -> None:
    hub.add("big/llama", files_of(llama))
    done = qz("quantize", "big/llama", "--nf4", "-o", "nf4", "--push", "me/llama-nf4")
    assert (done["code"], done["method"]) == (0, "nf4")
    assert done["push"]["commit"] == hub.repos["me/llama-nf4"].head
    assert hub.repos["me/llama-nf4"].private
    again = qz("quantize", "big/llama", "--nf4", "-o", "nf4", "--if-exists", "skip", "--push", "me/llama-nf4")
    assert (again["code"], again["push"]["bytes"]["uploaded"]) == (0, 0)
    back = qz("dequantize", "me/llama-nf4", "-o", "back", "--push", "me/llama-back")
    assert back["push"]["commit"] == hub.repos["me/llama-back"].head


def test_a_push_that_cannot_be_is_refused_before_the_work(
    hub: HubServer, llama: Path, qz: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("big/llama", files_of(llama), gated="auto").granted.add("me")
    hub.add("me/open", {})
    hub.reset_counts()
    assert qz("quantize", "big/llama", "-o", "out", "--push", "me/open")["code"] == 77
    assert qz("quantize", "big/llama", "-o", "out", "--public")["code"] == 2
    monkeypatch.delenv("HF_TOKEN")
    assert qz("quantize", llama, "-o", "out", "--push", "me/new")["code"] == 77
    assert hub.bytes_out["cdn"] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_with_push_makes_nothing_anywhere(hub: HubServer, llama: Path, qz: Command, tmp_path: Path) -> None:
    hub.add("big/llama", files_of(llama))
    done = qz("quantize", "big/llama", "--dry-run", "--push", "me/new", "--download")
    assert (done["code"], done["dry_run"], "push" in done) == (0, True, False)
    assert "me/new" not in hub.repos
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_pushes_no_output_that_is_there(hub: HubServer, llama: Path, qz: Command) -> None:
    assert qz("quantize", llama, "-o", "nf4")["code"] == 0
    there = qz("quantize", llama, "-o", "nf4", "--if-exists", "skip", "--dry-run", "--push", "me/new")
    assert (there["code"], there["up_to_date"], "push" in there) == (0, True, False)
    assert "me/new" not in hub.repos


def test_download_fills_the_cache_once_and_reads_from_there(
    hub: HubServer, llama: Path, flux: Path, qz: Command, tmp_path: Path
) -> None:
    hub.add("big/llama", files_of(llama))
    assert qz("quantize", "big/llama", "--nf4", "-o", "one", "--download")["code"] == 0
    cached = tmp_path / "home" / "hub" / "models--big--llama" / "snapshots" / hub.repos["big/llama"].head
    assert weights(cached) == weights(llama)
    hub.reset_counts()
    assert qz("quantize", "big/llama", "--int8", "-o", "two")["code"] == 0
    assert hub.bytes_out["cdn"] == 0
    hub.add("big/flux", files_of(flux))
    assert qz("quantize", "big/flux", "--nf4", "-o", "three", "--download", "--components", "transformer")["code"] == 0
    qz("quantize", llama, "--nf4", "-o", "local")
    assert differing(tmp_path / "local", tmp_path / "one") == []


def test_whatever_comes_from_the_cache_because_the_hub_does_not_answer_is_told_of(
    hub: HubServer, qz: Command, tmp_path: Path
) -> None:
    from huggingface_hub import snapshot_download
    from safetensors.torch import save_file

    folder, adapter = model_folder("llama-tied", tmp_path / "model"), tmp_path / "adapter"
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    adapter.mkdir()
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    for name, files in (("me/model", folder), ("me/adapter", adapter)):
        hub.add(name, files_of(files), private=True)
        snapshot_download(name)
    assert qz("quantize", folder, "-o", "packed", "--device", "cpu")["warnings"] == []
    hub.fail("info", status=503)
    for words in (
        ("calibrate", "me/model", "-o", "statistics.safetensors", "--tokens", "64"),
        ("compare", "me/model", "packed", "--tokens", "64"),
        ("dequantize", "packed", "-o", "back", "--against", "me/model"),
        ("quantize", folder, "-o", "fused", "--lora", "me/adapter"),
        ("verify", "fused", "--against", folder, "--lora", "me/adapter"),
    ):
        found = qz(*words, "--device", "cpu")
        assert found["code"] == 0, found
        assert [text for text in found["warnings"] if "from the Hub cache" in text], words
    # Only the Hub knows who may see the LoRA, and with --push that is asked.
    hub.faults.clear()
    hub.fail("info", status=503, matching="me/adapter")
    refused = qz("quantize", folder, "-o", "sent", "--lora", "me/adapter", "--push", "me/sent", "--public")
    assert (refused["code"], (tmp_path / "sent").exists(), "me/sent" in hub.repos) == (69, False, False)


def test_what_came_from_a_gated_repository_is_not_made_public_by_mistake(
    hub: HubServer, llama: Path, qz: Command
) -> None:
    hub.add("big/llama", files_of(llama), gated="auto").granted.add("me")
    hub.add("me/open", {})
    assert qz("quantize", "big/llama", "-o", "nf4")["code"] == 0
    refused = qz("push", "nf4", "me/open")
    assert (refused["code"], "--public" in refused["message"]) == (77, True)
    assert hub.commit_bodies == []
    assert qz("dequantize", "nf4", "-o", "back")["code"] == 0
    assert qz("push", "back", "me/open")["code"] == 77
    assert qz("push", "nf4", "me/open", "--public")["code"] == 0


@pytest.fixture
def only_the_cdn(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CDN of ``hub`` refuses would come over Xet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture(scope="module")
def int8(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run makes of the folder itself."""
    output = tmp_path_factory.mktemp("int8") / "local"
    api.quantize(llama, output, method=api.Int8(), device="cpu")
    return output


FAILURES: list[tuple[dict[str, Any], int]] = [
    ({"kind": "cdn", "nth": 7, "times": 1, "corrupt": True}, 65),
    ({"kind": "cdn", "nth": 6, "truncate": 5000}, 69),
    ({"kind": "cdn", "nth": 6, "status": 500}, 69),
    ({"kind": "cdn", "nth": 6, "status": 429}, 75),
    ({"kind": "cdn", "nth": 6, "status": 404}, 66),
    ({"kind": "resolve", "nth": 5, "status": 403, "code": "GatedRepo"}, 77),
    ({"kind": "info", "status": 404, "code": "RepoNotFound"}, 66),
    ({"kind": "tree", "status": 500}, 69),
]


@pytest.mark.usefixtures("only_the_cdn")
@pytest.mark.parametrize(("fault", "code"), FAILURES, ids=lambda value: str(value))
def test_a_run_that_fails_leaves_no_output_and_the_next_one_makes_the_same_bytes(
    hub: HubServer,
    llama: Path,
    int8: Path,
    qz: Command,
    tmp_path: Path,
    fault: dict[str, Any],
    code: int,
) -> None:
    hub.add("big/llama", files_of(llama))
    ordered = hub.fail(**fault)
    failed = qz("quantize", "big/llama", "--int8", "-o", "out")
    assert (failed["code"], failed["type"]) == (code, "exit_error")
    assert not (tmp_path / "out").exists()
    hub.faults.remove(ordered)
    assert qz("quantize", "big/llama", "--int8", "-o", "out")["code"] == 0
    assert differing(int8, tmp_path / "out") == []
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.usefixtures("only_the_cdn")
def test_a_resumed_run_fetches_only_what_its_unfinished_shards_need(
    hub: HubServer, llama: Path, qz: Command, tmp_path: Path
) -> None:
    hub.add("big/llama", files_of(llama))
    last = next(path for path in llama.iterdir() if "00004-of" in path.name)
    options = ("--nf4", "-o", "out", "--max-shard-size", "1300KB", "--threads", "1")
    from hub_server import Blob

    ordered = hub.fail("cdn", nth=2, matching=Blob.of(last).sha256, status=500)
    assert qz("quantize", "big/llama", *options)["code"] == 69
    hub.faults.remove(ordered)
    hub.reset_counts()
    done = qz("quantize", "big/llama", *options)
    assert (done["code"], done["resumed"]) == (0, True)
    assert hub.bytes_out["cdn"] < weights(llama) * 0.8
    qz("quantize", llama, *options[:1], "-o", "local", *options[3:])
    assert differing(tmp_path / "local", tmp_path / "out") == []


@pytest.mark.usefixtures("only_the_cdn")
def test_a_run_is_not_resumed_with_another_commit(hub: HubServer, llama: Path, qz: Command) -> None:
    hub.add("big/llama", files_of(llama))
    options = ("--nf4", "-o", "out", "--max-shard-size", "1300KB", "--threads", "1")
    ordered = hub.fail("cdn", nth=7, status=500)
    assert qz("quantize", "big/llama", *options)["code"] == 69
    hub.faults.remove(ordered)
    old = hub.repos["big/llama"].head
    hub.commit("big/llama", {"config.json": (llama / "config.json").read_bytes() + b" "})
    again = qz("quantize", "big/llama", *options)
    assert again["code"] in (0, 73)
    assert not again.get("resumed")
    assert qz("quantize", "big/llama", *options, "--revision", old, "--overwrite")["code"] == 0


def test_nothing_of_a_repository_without_access_is_made(
    hub: HubServer, llama: Path, qz: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("big/llama", files_of(llama), gated="manual")
    monkeypatch.setenv("HF_TOKEN", READER)
    refused = qz("quantize", "big/llama")
    assert (refused["code"], "gated" in refused["message"]) == (77, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", [["--nf4", "--double-quant"], ["--int8"]], ids=["nf4-double", "int8"])
def test_the_way_back_is_streamed_and_compared_with_an_original_on_the_hub(
    hub: HubServer, llama: Path, qz: Command, method: list[str], tmp_path: Path
) -> None:
    made = qz("quantize", llama, *method, "--report", "-o", "packed", "--max-shard-size", "2MB")
    hub.add("big/llama", files_of(llama))
    hub.add("me/packed", files_of(tmp_path / "packed"))
    done = qz("dequantize", "me/packed", "--against", "big/llama", "-o", "back")
    assert done["loss"] == made["loss"]
    # Scales lie apart from their codes, and are fetched once more where the stream has passed them.
    shards = len(list((tmp_path / "packed").glob("*.safetensors"))) + 4
    most = 2 * weights(tmp_path / "packed") + weights(llama) + shards * 65_536
    assert hub.bytes_out["cdn"] <= most
    qz("dequantize", "packed", "-o", "local")
    assert differing(tmp_path / "local", tmp_path / "back") == []
