"""What is said of an adapter that cannot be fused is run as it stands, and gives what the adapter gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaForCausalLM

import zoo
from commands import run
from qz import Unsupported
from qz.cli.commands.quantize import quantize

PROJECTIONS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "llama"
    zoo.build("llama-fp32").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(llama: Path) -> Path:
    run(quantize, llama, output=llama.with_name("quantized"))
    return llama.with_name("quantized")


def lora(**how: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, **{**PROJECTIONS, **how})


def trained(base: Path, config: Any, **call: Any) -> torch.Tensor:
    """The logits of ``base`` with an adapter of that kind, which is saved as it begins and as after training."""
    torch.manual_seed(1)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained("INITIAL")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained("adapter")
        return logits(model, **call)


@torch.no_grad()
def logits(model: Any, **call: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(IDS, **call).logits
    return found


def refused(base: Path, adapter: str = "adapter") -> list[str]:
    """The code in the message."""
    with pytest.raises(Unsupported) as raised:
        run(quantize, base, output=Path("out"), lora=[adapter])
    return re.findall(r"`(.+?)`", str(raised.value))


def merge(model: Any) -> None:
    model.merge_and_unload().save_pretrained("MERGED")


MERGED: dict[str, Any] = {
    "AdaLoRA": lambda: peft.AdaLoraConfig(**PROJECTIONS, init_r=4, total_step=10),
    "OFT": lambda: peft.OFTConfig(**PROJECTIONS, oft_block_size=32),
    "VeRA": lambda: peft.VeraConfig(**PROJECTIONS, r=4),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "OLoRA": lambda: lora(init_lora_weights="olora"),
    "KaSA": lambda: lora(kasa_config=peft.tuners.lora.config.KasaConfig()),
    "MonteCLoRA": lambda: lora(monteclora_config=peft.tuners.lora.config.MontecloraConfig()),
    "single rows": lambda: lora(trainable_token_indices=[1, 2]),
    "BD-LoRA": lambda: lora(
        use_bdlora=peft.tuners.lora.config.BdLoraConfig(
            nblocks=2, target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"]
        )
    ),
    "QA-LoRA": lambda: lora(use_qalora=True, qalora_group_size=16),
    "VeLoRA": lambda: lora(velora_config=peft.tuners.lora.config.VeloraConfig()),
    "DoRA of an embedding": lambda: lora(target_modules=["embed_tokens"], use_dora=True),
}


@pytest.mark.parametrize("kind", MERGED)
def test_what_peft_merges_is_merged_by_the_code_that_is_told(
    kind: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = trained(llama, MERGED[kind]())
    (code,) = refused(llama)
    exec(code, {"model": PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), "adapter")})
    assert torch.allclose(logits(LlamaForCausalLM.from_pretrained("MERGED")), expected, atol=1e-5)
    assert "loras" not in run(quantize, "MERGED", output=Path("out"))


BESIDE: dict[str, tuple[Any, dict[str, Any]]] = {
    "aLoRA": (lambda: lora(alora_invocation_tokens=[3, 4]), {}),
    "layers repeated": (lambda: lora(layer_replication=[[0, 2], [1, 2]]), {}),
    "a prefix": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), {}),
    "Cartridge": (lambda: peft.CartridgeConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), {}),
    "BEFT": (lambda: peft.BeftConfig(**PROJECTIONS), {}),
    "Lily": (lambda: peft.LilyConfig(**PROJECTIONS, r=4), {}),
    "Poly": (lambda: peft.PolyConfig(**PROJECTIONS, r=4, n_tasks=2), {"task_ids": torch.tensor([0])}),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_peft_does_not_merge_is_loaded_beside_the_quantized_model(
    kind: str, llama: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, call = BESIDE[kind]
    expected = trained(llama, config(), **call)
    with pytest.raises((NotImplementedError, AttributeError, ValueError, RuntimeError)):  # how each kind says no
        merge(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), "adapter"))
    (code,) = refused(llama)
    model = LlamaForCausalLM.from_pretrained(quantized, device_map="cpu")
    found = logits(eval(code, {"PeftModel": PeftModel, "model": model, "ADAPTER": "adapter"}), **call)
    assert (found - expected).norm() < 0.5 * expected.norm()


def test_a_base_that_changed_when_training_began_is_converted_with_the_adapter_of_then(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PiSSA by few iterations begins with other random numbers each time, so that no base is the one of then."""
    monkeypatch.chdir(tmp_path)
    expected = trained(llama, lora(init_lora_weights="pissa_niter_4"))
    (code,) = refused(llama)
    exec(code, {"model": PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), "adapter")})
    with_lora = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), "LORA")
    assert torch.allclose(logits(with_lora), expected, atol=1e-5)
    assert run(quantize, llama, output=Path("out"), lora=["LORA"])["loras"][0]["weights"] == 4


def test_a_router_of_adapters_is_put_on_top_of_the_quantized_model(
    llama: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        peft.get_peft_model(LlamaForCausalLM.from_pretrained(llama), lora(init_lora_weights=False)).save_pretrained(
            name
        )
    names = {"ADAPTERS": ["one", "two"], "create_arrow_model": peft.create_arrow_model, "ArrowConfig": peft.ArrowConfig}
    plain = LlamaForCausalLM.from_pretrained(llama)
    peft.create_arrow_model(plain, ["one", "two"], peft.ArrowConfig(top_k=1)).save_pretrained("routed")
    (code,) = refused(llama, "routed/arrow_router")
    model = LlamaForCausalLM.from_pretrained(quantized, device_map="cpu")
    routed = eval(code.replace("…", "1"), {**names, "model": model})
    assert logits(routed).isfinite().all()


def test_one_that_leaves_its_base_alone_is_fused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained(llama, lora(init_lora_weights="mica"))
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), "adapter")
    model.merge_and_unload().save_pretrained("merged")
    run(quantize, "merged", output=Path("wanted"))
    run(quantize, llama, output=Path("made"), lora=["adapter"])
    assert (Path("made") / "model.safetensors").read_bytes() == (Path("wanted") / "model.safetensors").read_bytes()


def test_an_adapter_in_a_pickle_is_fused_once_it_is_converted(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(llama), lora(init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    with pytest.raises(Unsupported, match="as a pickle only") as raised:
        run(quantize, llama, output=tmp_path / "out", lora=[str(tmp_path / "adapter")])
    (code,) = re.findall(r'python -c "(.+)"', str(raised.value))
    monkeypatch.chdir(tmp_path / "adapter")
    exec(code, {})
    report = run(quantize, llama, output=tmp_path / "out", lora=[str(tmp_path / "adapter")])
    assert report["loras"][0]["weights"] == 4
