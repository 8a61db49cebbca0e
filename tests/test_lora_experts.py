"""LoRAs on the experts of MoE models: fused equal PEFT's own merge, however the checkpoint stores the experts."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from commands import run
from covering import in_turn
from forked import Runner
from mixtures import mixture
from pace import HANG
from qz import MalformedInput, Unsupported
from qz.cli.commands.dequantize import dequantize
from qz.cli.commands.quantize import quantize
from reference import differing_tensors, tensors_of
from test_gguf import write_llama

EXPERTS = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["o_proj"]}


def loaded(folder: Path, dtype: Any = torch.float32) -> Any:
    """In float32, as qz computes."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype)


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    """``base`` with the adapter in it, merged and saved by PEFT, rounded once."""
    model = PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload()
    rounded = loaded(base, "auto")
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(folder)
    return folder


def on_all_experts(base: Path, folder: Path, **changes: Any) -> Path:
    """An adapter of the parameters that hold the experts, with values as after training, saved by PEFT."""
    model = loaded(base)
    names = [name for name, parameter in model.named_parameters() if ".experts." in name and parameter.ndim == 3]
    parameters = sorted({name.partition("layers.")[2].partition(".")[2] for name in names})
    torch.manual_seed(1)
    config = LoraConfig(**EXPERTS, target_parameters=parameters, **changes)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


NAMES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe_text"]


@pytest.mark.parametrize(("name", "way"), in_turn(NAMES, ["quantize", "quantize --experts", "dequantize"]))
def test_an_adapter_of_all_experts_gives_the_bytes_of_its_merge_by_peft(name: str, way: str, tmp_path: Path) -> None:
    base = mixture(name, tmp_path / "base")
    rank = {"rank_pattern": {r".*experts\.down_proj": 4}, "alpha_pattern": {r".*experts\.down_proj": 3}}
    adapter = on_all_experts(base, tmp_path / "adapter", **rank)
    if way != "dequantize":
        experts = way.endswith("--experts")
        wanted = merged(base, adapter, tmp_path / "merged")
        run(quantize, wanted, output=tmp_path / "wanted", experts=experts)
        run(quantize, base, output=tmp_path / "made", experts=experts, lora=[str(adapter)])
        assert differing_tensors(tmp_path / "wanted", tmp_path / "made") == []
        return
    run(quantize, base, output=tmp_path / "base4", experts=True)
    run(dequantize, tmp_path / "base4", output=tmp_path / "plain")
    run(dequantize, tmp_path / "base4", output=tmp_path / "back", lora=[str(adapter)])
    onto = merged(tmp_path / "plain", adapter, tmp_path / "onto")
    assert differing_tensors(onto, tmp_path / "back") == []
    assert differing_tensors(tmp_path / "plain", tmp_path / "back") != []


@pytest.mark.parametrize(
    ("name", "block", "parts"),
    [("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")), ("mixtral", "block_sparse_moe", ("w1", "w3", "w2"))],
)
def test_an_adapter_of_single_experts_is_fused_where_the_class_has_them_in_one(
    name: str, block: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    """As it was trained before transformers 5; PEFT joins the factors when it loads it."""
    base = mixture(name, tmp_path / "base")
    torch.manual_seed(2)
    tensors = {
        f"base_model.model.{stem}.lora_{side}.weight": torch.randn(shape) * 0.1
        for path, weight in tensors_of(base).items()
        if f".{block}.experts." in path
        for stem in [path.removesuffix(".weight")]
        for side, shape in (("A", (2, weight.shape[1])), ("B", (weight.shape[0], 2)))
    }
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    LoraConfig(r=2, lora_alpha=6, target_modules=list(parts)).save_pretrained(tmp_path / "adapter")
    run(quantize, merged(base, tmp_path / "adapter", tmp_path / "merged"), output=tmp_path / "wanted", experts=True)
    done = run(quantize, base, output=tmp_path / "made", experts=True, lora=[str(tmp_path / "adapter")])
    assert differing_tensors(tmp_path / "wanted", tmp_path / "made") == []
    assert done["loras"][0]["weights"] == len(tensors) // 2


def test_a_whole_tensor_of_experts_is_not_put_into_one_of_them(tmp_path: Path) -> None:
    base = mixture("gpt_oss", tmp_path / "base")
    adapter = on_all_experts(base, tmp_path / "adapter")
    file, name = adapter / "adapter_model.safetensors", "model.layers.1.mlp.experts.down_proj_bias"
    save_file(load_file(file) | {f"base_model.model.{name}": torch.ones(4, 64)}, file)
    run(quantize, base, output=tmp_path / "made", lora=[str(adapter)])
    assert torch.equal(tensors_of(tmp_path / "made")[name], torch.ones(4, 64, dtype=torch.bfloat16))
    with pytest.raises(Unsupported, match=r"down_proj_bias' as a whole, which --experts writes expert by expert"):
        run(quantize, base, experts=True, lora=[str(adapter)], dry_run=True)


COMMANDS = """
import json, sys
from qz.cli.entry import run_command
from qz.quantize.libraries.importing import work_bounds
first, second = json.loads(sys.argv[1])
codes = [run_command(first)]
work_bounds.set_hard()  # as in the process that would be asked for an architecture
print([*codes, run_command(second)])
"""


def test_commands_of_their_own_find_the_experts_of_a_model_that_is_remembered_and_read_gguf(
    python_with_torch: list[str], forks: Runner, tmp_path: Path
) -> None:
    """With what of transformers the first imports for the experts alone, and the second for its file."""
    base = mixture("qwen3_moe", tmp_path / "base")
    adapter = on_all_experts(base, tmp_path / "adapter")
    memory = {"QZ_CACHE": str(tmp_path / "cache")}
    first = forks.run("quantize", base, "--dry-run", cwd=tmp_path, environment=memory)
    assert first.code == 0, first.stderr
    assert list((tmp_path / "cache/architectures").iterdir())
    write_llama(tmp_path / "tiny.gguf", "Q5_0")
    commands = [
        ["quantize", str(base), "--lora", str(adapter), "--dry-run", "--quiet"],
        ["quantize", "tiny.gguf", "--device", "cpu", "--quiet"],
    ]
    done = subprocess.run(
        [*python_with_torch, "-c", COMMANDS, json.dumps(commands)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **memory},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "[0, 0]", done.stderr
    assert (tmp_path / "tiny-nf4/model.safetensors").is_file()


def test_an_adapter_of_other_experts_is_refused(tmp_path: Path) -> None:
    base = mixture("qwen3_moe", tmp_path / "base")
    adapter = on_all_experts(base, tmp_path / "adapter")
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, told = load_file(file), json.loads(config.read_text())
    down = "base_model.model.model.layers.1.mlp.experts.lora_{}.weight"
    changes: list[tuple[dict[str, torch.Tensor], Any, type[Exception], str]] = [
        ({down.format("A"): torch.ones(8, 48)}, told, MalformedInput, r"\[64, 48\] for each expert"),
        ({down.format("A"): torch.ones(6, 32), down.format("B"): torch.ones(64, 6)}, told, Unsupported, "4 experts"),
        ({}, told | {"target_parameters": ["mlp.experts.down_proj"]}, MalformedInput, "says rank 2 for .*base_layer"),
        ({}, told | {"target_parameters": "all"}, MalformedInput, "target_parameters, which is not a list"),
    ]
    for changed, config_of, error, words in changes:
        save_file(tensors | changed, file)
        config.write_text(json.dumps(config_of))
        with pytest.raises(error, match=words):
            run(quantize, base, lora=[str(adapter)], dry_run=True)
