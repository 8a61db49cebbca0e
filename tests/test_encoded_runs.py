"""Whole runs on what other tools stored: from the Hub, killed and continued, in bounded memory, with merged experts."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from converted import dequantized
from encoded import State, compressed, fp8_blocks, gptq, rewritten, said_by_compressed_tensors
from forked import Runner
from hub_server import HubServer
from qz import api
from qz.formats.tensors.safetensors_layout import encode_header, layout
from reference import tensors_of
from test_gguf import write_llama
from test_reliability import BOUNDED, anonymous
from zoo import llama, qwen3_moe

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
PACKED = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
FORMS = ("fp8", "compressed-tensors", "gptq", "gguf", "pickle")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each form, of the same small Llama but for the GGUF file."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    llama(tied=False, inner=192).save_pretrained(folder / "plain")
    said = said_by_compressed_tensors("pack-quantized", PACKED)
    rewritten(folder / "plain", folder / "fp8", lambda state: fp8_blocks(state, (32, 32)), FP8)
    rewritten(folder / "plain", folder / "compressed-tensors", lambda s: compressed(s, "pack-quantized", PACKED), said)
    rewritten(folder / "plain", folder / "gptq", lambda s: gptq(s, 4, 32), {"quant_method": "gptq", "bits": 4})
    (folder / "gguf").mkdir()
    write_llama(folder / "gguf/model.gguf", "Q4_K")
    (folder / "pickle").mkdir()
    torch.save(load_file(folder / "plain/model.safetensors"), folder / "pickle/pytorch_model.bin")
    (folder / "pickle/config.json").write_bytes((folder / "plain/config.json").read_bytes())
    return folder


def arguments(form: str, source: str | Path) -> tuple[str | Path, ...]:
    more = ("--allow-pickle",) if form == "pickle" else ()
    return ("quantize", source, "-o", "out", "--max-shard-size", "60KB", "--device", "cpu", *more)


def contents(folder: Path) -> dict[str, str]:
    found = sorted(path for path in folder.iterdir() if path.name != "qz.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.parametrize("form", FORMS)
def test_a_killed_run_goes_on_to_the_same_bytes(forks: Runner, sources: Path, tmp_path: Path, form: str) -> None:
    command = arguments(form, sources / form)
    (tmp_path / "one").mkdir()
    whole = forks.run(*command, cwd=tmp_path / "one")
    assert whole.code == 0, whole.stderr
    assert len(list((tmp_path / "one/out").glob("*.safetensors"))) > 1
    writes = sum(operation.startswith("write ") for operation in whole.operations)
    (tmp_path / "two").mkdir()
    killed = forks.run(*command, cwd=tmp_path / "two", at=writes * 2 // 3, only=("write",))
    assert killed.code == -9
    assert not (tmp_path / "two/out").exists()
    assert forks.run(*command, cwd=tmp_path / "two").code == 0
    assert contents(tmp_path / "two/out") == contents(tmp_path / "one/out")
    found = api.verify(tmp_path / "two/out", sources / form, device="cpu", allow_pickle=form == "pickle")
    assert found.intact
    assert found.recomputed is not None
    assert found.recomputed.tensors[0] > 20


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


def test_what_comes_from_the_hub_is_what_comes_from_a_disk(
    hub: HubServer, sources: Path, tmp_path: Path, forks: Runner
) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    for form in FORMS:
        hub.add(f"big/{form}", {path.name: path for path in (sources / form).iterdir()})
    server = forks.within(**settings)
    for form in FORMS:
        for name, source in (("local", sources / form), ("remote", f"big/{form}")):
            (tmp_path / f"{form}-{name}").mkdir()
            done = server.run(*arguments(form, source), cwd=tmp_path / f"{form}-{name}")
            assert done.code == 0, done.stderr
        assert contents(tmp_path / f"{form}-local/out") == contents(tmp_path / f"{form}-remote/out")
    assert not (tmp_path / "home/hub").exists()


def sparse(folder: Path, change: Callable[[str, tuple[int, ...]], dict[str, tuple[str, tuple[int, ...]]]]) -> int:
    """A Llama of 0.15 billion zeros in another form, without a byte on the disk; the bytes of its largest weight."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 9, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, vocab_size=1000, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    kept: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in state.items():
        inside = name.endswith("proj.weight")
        kept |= change(name, tuple(tensor.shape)) if inside else {name: ("BF16", tuple(tensor.shape))}
    placed = layout((name, *spec) for name, spec in kept.items())
    header = encode_header(placed)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + placed[-1].stop)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return 2 * max(int(tensor.numel()) for tensor in state.values())


def as_fp8(name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: ("F8_E4M3", shape), f"{name}_scale_inv": ("F32", (shape[0] // 128, shape[1] // 128))}


def as_gptq(name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    (out, inner), module = shape, name.removesuffix("weight")
    return {
        f"{module}qweight": ("I32", (inner // 8, out)),
        f"{module}qzeros": ("I32", (inner // 128, out // 8)),
        f"{module}scales": ("F16", (inner // 128, out)),
        f"{module}g_idx": ("I32", (inner,)),
    }


@pytest.mark.parametrize(("method", "change"), [("fp8", as_fp8), ("gptq", as_gptq)])
def test_memory_stays_below_three_times_the_largest_tensor_and_256_mb(
    forks: Runner, tmp_path: Path, method: str, change: Any
) -> None:
    largest = sparse(tmp_path / "model", change)
    config = json.loads((tmp_path / "model/config.json").read_text())
    said = {"quant_method": method, "bits": 4, "weight_block_size": [128, 128]}
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "quantization_config": said}))
    allowed = 3 * largest + 256 * 1_000_000
    assert 9 * 8 * largest > allowed, "the weights would fit into the bound"
    command = ("quantize", "model", "-o", "out", "--threads", "4", "--quiet", "--no-fsync", "--device", "cpu")
    running = forks.start(*command, cwd=tmp_path, before=BOUNDED.format(more=allowed))
    begun = peak = anonymous(running.pid)
    while (now := anonymous(running.pid)) > 0:
        peak = max(peak, now)
        time.sleep(0.005)
    ended = running.wait()
    assert ended.code == 0, ended.stderr
    assert peak - begun < allowed
    print(f"{method}: {peak - begun:,} of {allowed:,} bytes allowed")


def test_experts_that_the_library_merges(tmp_path: Path) -> None:
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(0)
    qwen3_moe().save_pretrained(tmp_path / "plain")
    said = {**FP8, "activation_scheme": "dynamic", "dequantize": True}

    def change(state: State) -> None:
        fp8_blocks(state, (32, 32))
        assert sum(re.search(r"experts\.\d+\..*weight_scale_inv", name) is not None for name in state) == 24

    source = rewritten(tmp_path / "plain", tmp_path / "fp8", change, said)
    theirs = Qwen3MoeForCausalLM.from_pretrained(source)
    theirs.config.__dict__.pop("quantization_config", None)
    plain = Qwen3MoeForCausalLM(theirs.config).bfloat16()
    plain.load_state_dict(theirs.state_dict())
    plain.save_pretrained(tmp_path / "reference")
    dequantized(source, tmp_path / "output")
    ours, expected = tensors_of(tmp_path / "output"), tensors_of(tmp_path / "reference")
    assert ours.keys() == expected.keys()
    assert [name for name, mine in ours.items() if not mine.equal(expected[name])] == []
    assert os.listdir(tmp_path / "output")
