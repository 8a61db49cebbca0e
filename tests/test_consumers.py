"""qz inspect --for: whether a checkpoint loads elsewhere, by rules from the code of those that load it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pipelines
import zoo
from conftest import Qz
from converted import plan_of, quantized
from qz.quantize.consumers.contents import Contents, Packed
from qz.quantize.consumers.planned import warnings
from qz.quantize.consumers.registry import CONSUMERS, judge
from qz.quantize.libraries.skip_names import named
from real_consumers.page import PAGE
from real_consumers.page import rules as rules_page
from reference import config_of

Judged = Callable[..., dict[str, Any]]


@pytest.fixture
def judged(forked_qz: Qz) -> Judged:
    """Run ``qz inspect --json --for …`` and give what it says of each consumer; the exit code must fit."""

    def run(folder: Path, *names: str) -> dict[str, Any]:
        options = [part for name in names for part in ("--for", name)]
        ended = forked_qz("inspect", folder, "--json", *options)
        told = json.loads(ended.stdout.splitlines()[0])["consumers"]
        refused = any(each["loads"] is False for each in told.values())
        assert ended.returncode == (65 if refused else 0), ended.stderr
        assert list(told) == list(names)
        found: dict[str, Any] = told
        return found

    return run


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """``nf4``, ``nf4-double``, ``fp4`` and ``int8`` of a tiny Llama."""
    root = tmp_path_factory.mktemp("llama")
    for method in ("nf4", "nf4-double", "fp4", "int8"):
        quantized(tiny_llama, root / method, method)
    return root


def rules(verdict: dict[str, Any], severity: str = "error") -> list[str]:
    return [each["rule"] for each in verdict["findings"] if each["severity"] == severity]


@pytest.mark.parametrize("method", ["nf4", "nf4-double", "fp4", "int8"])
def test_a_llama_loads_in_whatever_serves_language_models(method: str, llama: Path, judged: Judged) -> None:
    names = ("transformers", "vllm", "sglang", "peft", "unsloth", "diffusers-cpu")
    told = judged(llama / method, *names)
    assert {name: each["loads"] for name, each in told.items()} == dict.fromkeys(names, True)
    assert "tensor-parallel" in rules(told["vllm"], "note")
    assert not [rule for each in told.values() for rule in rules(each, "warning")]


def test_a_llama_is_nothing_for_programs_that_draw(llama: Path, judged: Judged) -> None:
    told = judged(llama / "nf4", "invokeai", "comfyui")
    assert [each["loads"] for each in told.values()] == [False, False]


def test_a_skip_that_splits_a_fused_group_is_told_when_quantizing_and_after(
    tiny_llama: Path, tmp_path: Path, judged: Judged
) -> None:
    summary = quantized(tiny_llama, tmp_path / "split", "nf4", skips=("q_proj",))
    [line] = [line for line in summary.warnings if line.startswith("vLLM")]
    assert "qkv_proj" in line
    assert "Skip k_proj, v_proj too" in line
    told = judged(tmp_path / "split", "vllm", "sglang")
    assert (told["vllm"]["loads"], rules(told["vllm"], "warning")) == (True, ["split-group"])
    assert (told["sglang"]["loads"], rules(told["sglang"])) == (False, ["split-group"])

    eight = plan_of(tiny_llama, "int8", skips=("gate_proj",))
    assert [line for line in warnings(eight) if "int8 codes" in line]
    of_a_pipeline = replace(eight, checkpoint=replace(eight.checkpoint, class_module="transformers"))
    assert list(warnings(of_a_pipeline)) == []
    whole = plan_of(tiny_llama, "nf4", skips=("q_proj", "k_proj", "v_proj"))
    assert list(warnings(whole)) == []


def test_vllm_fuses_groups_of_its_own(tmp_path: Path, judged: Judged) -> None:
    """Multi-head latent attention, as in DeepSeek V2 and V3."""
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, first_k_dense_replace=1,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16,
    )  # fmt: skip
    transformers.DeepseekV3ForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    summary = quantized(tmp_path / "source", tmp_path / "split", "nf4", skips=("q_a_proj",))
    [line] = [line for line in summary.warnings if line.startswith("vLLM")]
    assert "fused_qkv_a_proj" in line
    assert "Skip kv_a_proj_with_mqa too" in line
    told = judged(tmp_path / "split", "vllm", "sglang")
    assert rules(told["vllm"], "warning") == ["split-group"]
    assert "split-group" not in rules(told["sglang"])


def test_what_a_pattern_skips_is_listed_so_that_those_without_patterns_see_it(
    tiny_llama: Path, tmp_path: Path, judged: Judged
) -> None:
    quantized(tiny_llama, tmp_path / "first", "nf4", skips=(r".*\.0\..*",))
    listed = config_of(tmp_path / "first")["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.0.mlp.down_proj" in listed
    assert named("model.layers.0.mlp.down_proj", listed)
    assert judged(tmp_path / "first", "vllm", "sglang")["sglang"]["loads"]

    config = config_of(tmp_path / "first")
    config["quantization_config"]["llm_int8_skip_modules"] = [r".*\.0\..*", "lm_head"]
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    told = judged(tmp_path / "first", "vllm", "sglang")
    assert rules(told["vllm"], "warning") == ["unlisted-skip"]
    assert rules(told["sglang"]) == ["unlisted-skip"]


def test_int8_names_with_capitals_lose_their_scales(tmp_path: Path, judged: Judged) -> None:
    config = transformers.ModernBertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    transformers.ModernBertModel(config).bfloat16().save_pretrained(tmp_path / "source")
    summary = quantized(tmp_path / "source", tmp_path / "int8", "int8")
    assert any("capital letters" in line for line in summary.warnings)
    quantized(tmp_path / "source", tmp_path / "nf4", "nf4")
    told = judged(tmp_path / "int8", "vllm", "peft")
    assert rules(told["vllm"]) == ["int8-capitals"]
    assert told["peft"]["loads"]
    assert judged(tmp_path / "nf4", "vllm")["vllm"]["loads"]


def test_another_storage_and_a_stray_file_are_errors(llama: Path, tmp_path: Path, judged: Judged) -> None:
    folder = tmp_path / "bf16-storage"
    folder.mkdir()
    tensors = load_file(llama / "nf4" / "model.safetensors")
    packed = {name.removesuffix(".absmax") for name in tensors if name.endswith(".absmax")}
    stored = {name: t.reshape(-1).view(torch.bfloat16)[:, None] if name in packed else t for name, t in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = config_of(llama / "nf4")
    config["quantization_config"]["bnb_4bit_quant_storage"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, folder / "consolidated.safetensors")
    told = judged(folder, "vllm", "sglang", "transformers")
    assert rules(told["vllm"]) == ["storage", "stray-files"]
    assert rules(told["sglang"]) == ["storage", "stray-files"]
    assert told["transformers"]["loads"]


def test_diffusers_models_need_a_gpu_or_qz_load(tmp_path: Path, judged: Judged) -> None:
    zoo.build("flux").save_pretrained(tmp_path / "flux")
    quantized(tmp_path / "flux", tmp_path / "nf4", "nf4")
    told = judged(tmp_path / "nf4", *CONSUMERS)
    assert {name for name, each in told.items() if each["loads"]} == {"peft"}
    assert "qz.load(path)" in told["diffusers-cpu"]["findings"][0]["message"]
    assert "Black Forest Labs" in told["invokeai"]["findings"][0]["message"]


def test_a_file_in_the_original_names_is_what_comfyui_and_invokeai_load(tmp_path: Path, forked_qz: Qz) -> None:
    from bitsandbytes.functional import quantize_4bit

    for method, wanted in (("nf4", {"invokeai": 0, "comfyui": 0, "vllm": 65}), ("fp4", {"invokeai": 65, "comfyui": 0})):
        name = "double_blocks.0.img_attn.proj.weight"
        packed, state = quantize_4bit(torch.randn(64, 64, dtype=torch.bfloat16), quant_type=method)
        tensors = {name: packed} | {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        save_file(tensors, tmp_path / f"{method}.safetensors")
        for consumer, code in wanted.items():
            ended = forked_qz("inspect", tmp_path / f"{method}.safetensors", "--for", consumer)
            assert ended.returncode == code, (consumer, ended.stdout, ended.stderr)


def test_comfyui_takes_the_width_of_flux_from_layers_that_stay_as_they_are(tmp_path: Path, forked_qz: Qz) -> None:
    from bitsandbytes.functional import quantize_4bit

    tensors: dict[str, torch.Tensor] = {}
    for name in ("double_blocks.0.img_attn.proj.weight", "img_in.weight", "txt_in.weight"):
        packed, state = quantize_4bit(torch.randn(64, 64, dtype=torch.bfloat16), quant_type="nf4")
        tensors |= {name: packed} | {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    save_file(tensors, tmp_path / "all.safetensors")
    kept = {name: torch.ones(64, 64) for name in ("img_in.weight", "txt_in.weight")}
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(("img_in", "txt_in"))}
    save_file(rest | kept, tmp_path / "kept.safetensors")
    refused = forked_qz("inspect", tmp_path / "all.safetensors", "--for", "comfyui")
    assert refused.returncode == 65
    assert "img_in and txt_in" in " ".join(refused.stdout.split())
    taken = forked_qz("inspect", tmp_path / "kept.safetensors", "--for", "comfyui")
    assert taken.returncode == 0
    assert "choose nf4" in " ".join(taken.stdout.split())
    assert "error" not in taken.stdout, "its names are right there"
    assert "is quantized already" in " ".join(taken.stdout.split())
    taken = forked_qz("inspect", tmp_path / "kept.safetensors", "--for", "invokeai")
    assert taken.returncode == 0
    assert "such as img_in.weight, to nf4" in " ".join(taken.stdout.split())


def test_a_pipeline_is_judged_by_its_components(tmp_path: Path, judged: Judged, forked_qz: Qz) -> None:
    pipelines.flux(tmp_path / "source")
    plain = judged(tmp_path / "source", "vllm", "diffusers-cpu")
    assert [each["loads"] for each in plain.values()] == [None, None]
    assert forked_qz("quantize", tmp_path / "source", "--nf4", "-o", tmp_path / "nf4").returncode == 0
    told = judged(tmp_path / "nf4", "vllm", "diffusers-cpu", "comfyui", "invokeai")
    assert rules(told["vllm"]) == ["pipeline"]
    assert told["diffusers-cpu"]["findings"][0]["message"].startswith("transformer: ")
    assert told["invokeai"]["loads"] is None


def test_the_table_names_each_consumer_and_finding(llama: Path, forked_qz: Qz) -> None:
    ended = forked_qz("inspect", llama / "int8", "--for", "vllm", "--for", "comfyui")
    assert ended.returncode == 65
    assert "vllm-bnb-plugin 0.0.3" in ended.stdout
    assert "enforce_eager" in ended.stdout
    assert "ComfyUI (single-file)" in ended.stderr
    ended = forked_qz("inspect", llama / "int8", "--for", "llama.cpp")
    assert ended.returncode == 2
    assert "--for llama.cpp is none of" in ended.stderr


def test_a_damaged_checkpoint_loads_nowhere(llama: Path, tmp_path: Path, judged: Judged) -> None:
    tensors = load_file(llama / "nf4" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight.absmax"]
    (tmp_path / "config.json").write_bytes((llama / "nf4" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert judged(tmp_path, "peft")["peft"] == {
        "package": "peft 0.21.2",
        "loads": False,
        "findings": [
            {
                "severity": "error",
                "rule": "checkpoint",
                "message": "nothing loads it as it is (companion-missing).",
            }
        ],
    }


def test_the_page_has_the_rules_as_they_are() -> None:
    assert rules_page(CONSUMERS.values()) in PAGE.read_text(), "Run `make consumers`."


def held(*names: str, kind: Any = "nf4", shape: tuple[int, ...] = (64, 64), **more: Any) -> Contents:
    """A checkpoint with these quantized weights."""
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    packed = {name: Packed(kind, shape, "I8" if kind == "int8" else "U8") for name in names}
    return Contents("transformers", "LlamaForCausalLM", config, packed, more.pop("plain", {}), **more)


def errors(contents: Contents, consumer: str) -> list[str]:
    return [each.rule for each in judge(contents, [consumer])[consumer].errors]


GATE, UP, DOWN = (f"model.layers.0.mlp.experts.0.{name}_proj.weight" for name in ("gate", "up", "down"))


@pytest.mark.parametrize(
    ("contents", "consumer", "expected"),
    [
        (held("a.q.weight", shape=(3, 5)), "vllm", ["odd-size"]),
        (held("m.q.weight", "vision_m.q.weight"), "vllm", ["ending-names"]),
        (held("m.q.weight", "vision_m.q.weight"), "sglang", ["ending-names"]),
        (held("m.q.weight", "m.k.weight"), "sglang", []),
        (held(GATE, UP, DOWN), "vllm", []),
        (held(GATE, UP, DOWN), "sglang", ["experts"]),
        (held(GATE, UP, DOWN), "transformers", ["experts"]),
        (held(GATE, UP, DOWN, kind="fp4"), "vllm", ["experts-fp4"]),
        (held(GATE, UP, DOWN, kind="fp4"), "unsloth", []),
        (held(GATE, UP, DOWN, shape=(6, 6)), "vllm", ["experts-blocks"]),
        (held(GATE, UP, plain={DOWN: (64, 64)}), "vllm", ["experts-some"]),
        (held(UP, DOWN), "vllm", ["experts-gate"]),
        (held("a.mlp.shared_expert_gate.weight"), "vllm", ["shared-gate"]),
        (held("a.experts.gate_up_projs.0.weight"), "vllm", ["experts-layout"]),
        (held("a.experts.gate_up_proj", shape=(2, 64, 64)), "vllm", ["experts-layout"]),
        (held("a.q.weight", kind="int8", plain={GATE: (8, 8)}), "vllm", ["experts-int8"]),
        (held("a.q.weight", plain={GATE: (8, 8)}), "vllm", []),
    ],
)
def test_a_rule_of_the_loaders_code(contents: Contents, consumer: str, expected: list[str]) -> None:
    assert errors(contents, consumer) == expected
