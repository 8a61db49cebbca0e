"""--experts: what transformers leaves in 16 bit is quantized, too, and it loads, runs, trains and comes back."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qz
import qz.api
from conftest import Qz
from converted import dequantized, plan_of, quantized
from mixtures import MADE, mixture
from qz import MalformedInput, QzError, Unsupported, UsageError
from qz.quantize.methods import FourBit, Int8
from qz.quantize.settings import Settings
from reference import config_of, dequantized_by_bitsandbytes, differing_tensors, tensors_of

TOKENS = torch.arange(12).reshape(2, 6) + 3


@pytest.fixture(scope="module", params=MADE)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``source``, ``nf4`` (with experts) and ``back``, what is dequantized from that."""
    root = tmp_path_factory.mktemp(request.param)
    mixture(request.param, root / "source")
    quantized(root / "source", root / "nf4", "nf4", experts=True)
    dequantized(root / "nf4", root / "back")
    return root


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture("qwen3_moe", tmp_path_factory.mktemp("qwen") / "source")


def class_of(folder: Path) -> Any:
    return getattr(transformers, config_of(folder)["architectures"][0])


def experts_of(model: Any) -> dict[str, torch.Tensor]:
    """The parameters that hold all experts of a layer, as a forward reads them."""
    found = {}
    for path, module in model.named_modules():
        for leaf in ("gate_up_proj", "down_proj"):
            value = getattr(module, leaf, None) if hasattr(module, "is_transposed") else None
            if isinstance(value, torch.Tensor) and value.ndim == 3:
                found[f"{path}.{leaf}"] = value
    return found


def test_it_loads_with_the_memory_promised_and_computes_as_the_dequantized_model(made: Path) -> None:
    model = qz.load(made / "nf4", device="cpu")
    back = class_of(made / "source").from_pretrained(made / "back")
    ours, theirs = experts_of(model), experts_of(back)
    assert len(ours) >= 2
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    told = json.loads((made / "nf4" / "qz.json").read_text())["about"]
    assert model.get_memory_footprint() == told["memory_footprint"]["after"]
    assert told["parameters"]["quantized"] > 0.7 * told["parameters"]["total"]
    for each in (model, back):
        each.set_experts_implementation("eager")
    with torch.no_grad():
        one, two = model(TOKENS)[0].float(), back(TOKENS)[0].float()
    assert ((one - two).norm() / two.norm()).item() < 0.02  # bitsandbytes rounds otherwise in its matrix products


def test_it_comes_back_under_the_originals_names_as_bitsandbytes_dequantizes_it(made: Path) -> None:
    source, packed, back = (tensors_of(made / each) for each in ("source", "nf4", "back"))
    assert source.keys() == back.keys()
    assert {name: tensor.shape for name, tensor in source.items()} == {name: t.shape for name, t in back.items()}
    values = dequantized_by_bitsandbytes(packed)
    same = [name for name in values if name in back and torch.equal(values[name], back[name])]
    elsewhere = [name for name in values if name not in same]
    assert same
    assert all(".experts." in name or "block_sparse_moe" in name for name in elsewhere)
    error = sum((source[n].float() - back[n].float()).norm() ** 2 for n in source) ** 0.5
    assert error / sum(source[n].float().norm() ** 2 for n in source) ** 0.5 < 0.12


def test_plain_transformers_refuses_it_and_inspect_says_so(made: Path, forked_qz: Qz) -> None:
    with suppress(RuntimeError, ValueError):  # of sizes; for gpt-oss it makes random experts, with a warning
        _, loaded = class_of(made / "source").from_pretrained(made / "nf4", output_loading_info=True)
        assert any(".experts." in name for name in loaded["missing_keys"])
    ended = forked_qz("inspect", made / "nf4", "--plan", "--json", "--for", "transformers")
    assert ended.returncode == 65
    told = json.loads(ended.stdout.splitlines()[0])
    assert told["consumers"]["transformers"]["findings"][0]["rule"] == "experts"
    assert "qz.load" in told["consumers"]["transformers"]["findings"][0]["message"]
    recorded = json.loads((made / "nf4" / "qz.json").read_text())["about"]
    assert told["parameters"] == recorded["parameters"]["total"]
    assert (told["memory_footprint"], told["memory_footprint_exact"]) == (recorded["memory_footprint"]["after"], True)
    assert [problem["kind"] for problem in told["problems"]] == ["experts-quantized"]


@pytest.mark.parametrize("method", ["fp4", "nf4-double"])
def test_each_experts_weight_is_what_bitsandbytes_makes_of_it(qwen: Path, tmp_path: Path, method: str) -> None:
    quantized(qwen, tmp_path / "output", method, experts=True)
    source, packed = tensors_of(qwen), tensors_of(tmp_path / "output")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    codes, state = bnb.quantize_4bit(
        source[name], quant_type=method.removesuffix("-double"), compress_statistics=method.endswith("-double")
    )
    assert torch.equal(codes, packed[name])
    assert torch.equal(state.absmax.cpu(), packed[f"{name}.absmax"])
    model = qz.load(tmp_path / "output", device="cpu")
    again = bnb.dequantize_4bit(codes, bnb.QuantState.from_dict(state.as_dict(), torch.device("cpu")))
    inside = experts_of(model)["model.layers.1.mlp.experts.gate_up_proj"][2, 32:]
    assert torch.equal(inside, again.reshape(inside.shape))


def test_a_dry_run_is_exact_and_the_record_names_the_option(qwen: Path, tmp_path: Path, forked_qz: Qz) -> None:
    plan = plan_of(qwen, "nf4", experts=True)
    arguments = ("quantize", qwen, "--nf4", "--experts", "-o", tmp_path / "output")
    dry = forked_qz(*arguments, "--dry-run", "--json")
    ran = forked_qz(*arguments, "--json")
    assert (dry.returncode, ran.returncode) == (0, 0), dry.stderr + ran.stderr
    promised, told = (json.loads(each.stdout.splitlines()[-1]) for each in (dry, ran))
    assert promised["bytes"] == told["bytes"]
    assert told["bytes"]["output"] == plan.bytes_output
    assert any("qz.load" in line for line in told["warnings"])
    record = json.loads((tmp_path / "output" / "qz.json").read_text())["about"]
    assert "--experts" in record["command"]
    again = forked_qz(*arguments, "--if-exists", "skip", "--json")
    assert json.loads(again.stdout.splitlines()[-1])["up_to_date"]
    without = forked_qz("quantize", qwen, "--nf4", "-o", tmp_path / "output", "--if-exists", "skip")
    assert without.returncode == 73
    assert "experts" in without.stderr


def test_the_card_says_how_to_load_it_and_where_by_which_rules(qwen: Path, tmp_path: Path) -> None:
    from qz.formats.publish.model_card.card import write_card
    from qz.formats.publish.model_card.card_facts import facts_of

    quantized(qwen, tmp_path / "nf4", "nf4", experts=True)
    about = json.loads((tmp_path / "nf4" / "qz.json").read_text())["about"]
    card = write_card(facts_of(about, config_of(tmp_path / "nf4")), "me/moe-nf4").replace("\\", "")
    assert 'qz.load(snapshot_download("me/moe-nf4"))' in card
    assert "| vLLM (vllm-bnb-plugin 0.0.3) | yes |" in card
    assert "| SGLang (sglang 0.5.23) | no |" in card
    assert "they were not run on this checkpoint" in card


def test_a_run_without_the_option_says_what_it_leaves(qwen: Path) -> None:
    notes = plan_of(qwen, "nf4").architecture.notes
    assert notes == ("the experts stay in bfloat16, as in the library; --experts quantizes them, too",)
    assert plan_of(qwen, "int8").architecture.notes == ()


def test_routers_and_gates_are_listed_for_those_who_read_the_config_only(tmp_path: Path) -> None:
    mixture("qwen2_moe", tmp_path / "source")
    quantized(tmp_path / "source", tmp_path / "nf4", "nf4", experts=True)
    listed = config_of(tmp_path / "nf4")["quantization_config"]["llm_int8_skip_modules"]
    assert {"lm_head", "shared_expert_gate", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"} == set(listed)
    assert "model.layers.0.mlp.shared_expert_gate.weight.absmax" not in tensors_of(tmp_path / "nf4")


def test_experts_of_a_layer_are_skipped_together(qwen: Path, tmp_path: Path) -> None:
    tensors = load_file(qwen / "model.safetensors")
    tensors["model.layers.0.mlp.experts.3.up_proj.weight"][5, 5] = torch.nan
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    (tmp_path / "source" / "config.json").write_bytes((qwen / "config.json").read_bytes())
    skipped: dict[Path, dict[str, Any]] = {
        qwen: {"skips": ("model.layers.0.mlp.experts",)},
        tmp_path / "source": {"keep_nonfinite": True},
    }
    for source, more in skipped.items():
        plan = plan_of(source, "nf4", experts=True, **more)
        packed = {weight.name for weight in plan.quantized if ".experts." in weight.name}
        assert packed
        assert all(name.startswith("model.layers.1.") for name in packed)
    quantized(qwen, tmp_path / "output", "nf4", experts=True, skips=("model.layers.0.mlp.experts",))
    model = qz.load(tmp_path / "output", device="cpu")
    assert "parametrizations" not in str(model.model.layers[0].mlp.experts)
    with torch.no_grad():
        assert model(TOKENS)[0].isfinite().all()


def test_what_has_no_experts_or_odd_ones_is_refused(tiny_llama: Path, tmp_path: Path, forked_qz: Qz) -> None:
    with pytest.raises(Unsupported, match="has no experts"):
        plan_of(tiny_llama, "nf4", experts=True)
    with pytest.raises(UsageError, match="int8"):
        Settings(Int8(), experts=True)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=40, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=512,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path / "odd")
    with pytest.raises(Unsupported, match="no whole number of blocks"):
        plan_of(tmp_path / "odd", "nf4", experts=True)


def test_experts_that_are_missing_are_told(qwen: Path, tmp_path: Path) -> None:
    quantized(qwen, tmp_path / "nf4", "nf4", experts=True)
    tensors = load_file(tmp_path / "nf4" / "model.safetensors")
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if not n.startswith(lost)}, tmp_path / "nf4" / "model.safetensors")
    with pytest.raises(QzError, match="do not make up"):
        qz.load(tmp_path / "nf4", device="cpu")


def test_one_experts_weight_too_many_is_not_left_out(qwen: Path, tmp_path: Path) -> None:
    quantized(qwen, tmp_path / "nf4", "nf4", experts=True)
    tensors = load_file(tmp_path / "nf4" / "model.safetensors")
    gate = "model.layers.1.mlp.experts.{}.gate_proj.weight"
    for name in [name for name in tensors if name.startswith(gate.format(0))]:
        tensors[name.replace(gate.format(0), gate.format(99))] = tensors[name].clone()
    save_file(tensors, tmp_path / "nf4" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MalformedInput, match="do not make up whole experts"):
        qz.load(tmp_path / "nf4", device="cpu")


@pytest.mark.parametrize("change", [lambda bias: bias[:8].clone(), lambda bias: bias.float()], ids=["shape", "dtype"])
def test_experts_that_are_not_alike_are_not_stacked(tmp_path: Path, change: Any) -> None:
    quantized(mixture("gpt_oss", tmp_path / "source"), tmp_path / "nf4", "nf4", experts=True)
    tensors = load_file(tmp_path / "nf4" / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_projs.1.bias"
    save_file(tensors | {name: change(tensors[name])}, tmp_path / "nf4" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MalformedInput, match=re.escape(name)):
        dequantized(tmp_path / "nf4", tmp_path / "back")


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_parts_of_it_are_what_one_run_makes_and_are_verified_against_the_source(name: str, tmp_path: Path) -> None:
    source = mixture(name, tmp_path / "source")
    method = FourBit("nf4", double_quant=True)
    how: dict[str, Any] = {"method": method, "experts": True, "max_shard_bytes": 60_000, "device": "cpu"}
    qz.api.quantize(source, tmp_path / "whole", **how)
    for part in ("2/2", "1/2"):
        qz.api.quantize(source, tmp_path / "parts", part=part, **how)
    qz.api.merge(tmp_path / "parts")
    assert differing_tensors(tmp_path / "whole", tmp_path / "parts") == []
    checked = qz.api.verify(tmp_path / "parts", against=source, device="cpu").as_json()
    assert checked["tensors"] == {"compared": len(tensors_of(tmp_path / "whole")), "all": checked["tensors"]["all"]}
    one, other = (experts_of(qz.load(tmp_path / each, device="cpu")) for each in ("whole", "parts"))
    assert one
    assert all(torch.equal(one[each], other[each]) for each in one)


def test_an_adapter_trains_on_top(qwen: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    quantized(qwen, tmp_path / "nf4", "nf4", experts=True)
    base = qz.load(tmp_path / "nf4", device="cpu")
    model = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    before = experts_of(model)["base_model.model.model.layers.0.mlp.experts.gate_up_proj"].clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(5):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    after = experts_of(model)["base_model.model.model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(before, after)
