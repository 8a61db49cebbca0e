"""LoRAs fused into language models equal PEFT's own merge; what does not fit is an error that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from commands import run
from conftest import Qz
from hub_server import HubServer, connected
from qz import MalformedInput, MissingInput, OutputRefused, QzError, Unsupported, UsageError, api
from qz.cli.commands.dequantize import dequantize
from qz.cli.commands.quantize import quantize
from qz.cli.commands.verify import verify
from qz.formats.checkpoint.adapter_file import parse_scale
from reference import differing_tensors, tensors_of

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 3, ".*up_proj": 5}}  # fmt: skip


def llama_model(**changes: Any) -> LlamaForCausalLM:
    config = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).to(torch.bfloat16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lora") / "llama"
    llama_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("lora") / "gpt2"
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def trained(base: Path, config: Any, folder: Path) -> Path:
    """An adapter of ``base`` with values as after training, saved by PEFT."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
        elif parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    """``base`` with the adapter in it, merged and saved by PEFT."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(llama: Path) -> Path:
    return trained(llama, LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR), llama.with_name("adapter"))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR),
        LoraConfig(**PATTERNS),
        LoraConfig(**PATTERNS, use_rslora=True),
        LoraConfig(**PATTERNS, use_dora=True),
        LoHaConfig(r=4, alpha=8, target_modules=LINEAR),
        LoKrConfig(r=4, alpha=8, target_modules=LINEAR, rank_pattern={"q_proj": 2}),
        LoKrConfig(r=32, alpha=8, target_modules=LINEAR, decompose_both=True),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    ],
    ids=["LoRA", "patterns", "rsLoRA", "DoRA", "LoHa", "LoKr", "LoKr of full factors", "modules_to_save"],
)
def test_an_adapter_gives_the_bytes_of_its_merge_by_peft(llama: Path, config: Any, tmp_path: Path) -> None:
    torch.manual_seed(2)
    adapter = trained(llama, config, tmp_path / "adapter")
    run(quantize, merged(llama, adapter, tmp_path / "merged"), output=tmp_path / "wanted")
    report = run(quantize, llama, output=tmp_path / "made", lora=[str(adapter)])
    assert differing_tensors(tmp_path / "wanted", tmp_path / "made") == []
    assert differing_tensors(tmp_path / "made", quantized_base(llama)) != []
    assert report["loras"][0]["weights"] >= 3


def quantized_base(base: Path) -> Path:
    output = base.with_name(f"{base.name}-nf4")
    if not output.exists():
        run(quantize, base, output=output)
    return output


@pytest.mark.parametrize("dora", [False, True])
def test_the_turned_weights_of_conv1d_are_changed_as_they_lie(gpt2: Path, dora: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, use_dora=dora)
    adapter = trained(gpt2, config, tmp_path / "adapter")
    run(quantize, merged(gpt2, adapter, tmp_path / "merged"), output=tmp_path / "wanted", int8=True)
    run(quantize, gpt2, output=tmp_path / "made", int8=True, lora=[str(adapter)])
    assert differing_tensors(tmp_path / "wanted", tmp_path / "made") == []


def test_what_is_added_to_an_embedding_is_rounded_once_where_peft_rounds_it_twice(llama: Path, tmp_path: Path) -> None:
    adapter = trained(llama, LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path / "adapter")
    run(quantize, llama, output=tmp_path / "made", lora=[str(adapter)])
    theirs = load_file(merged(llama, adapter, tmp_path / "merged") / "model.safetensors")["model.embed_tokens.weight"]
    ours = tensors_of(tmp_path / "made")["model.embed_tokens.weight"]
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), adapter)
    assert torch.equal(ours, exact.merge_and_unload().model.embed_tokens.weight.to(torch.bfloat16))
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-10)


def test_the_scale_on_the_line_multiplies_the_adapters_own_and_loras_add_up(
    llama: Path, adapter: Path, tmp_path: Path
) -> None:
    made = {}
    for loras in ((0.75, -0.25), (0.5,), ()):
        output = tmp_path / str(len(loras))
        run(dequantize, quantized_base(llama), output=output, dtype="float32", lora=[f"{adapter}:{s}" for s in loras])
        made[len(loras)] = tensors_of(output)
    name = "model.layers.0.mlp.up_proj.weight"
    assert (made[1][name] - made[0][name]).abs().max() > 1e-3
    for name, tensor in made[1].items():
        torch.testing.assert_close(made[2][name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_values_that_a_lora_makes_infinite_are_laid_at_its_door(
    llama: Path, adapter: Path, method: str, tmp_path: Path
) -> None:
    loras = [f"{adapter}:{scale}" for scale in (1, 2e6)]
    with pytest.raises(MalformedInput, match=r"adapter_model\.safetensors' with scale 2e\+06 is fused"):
        run(quantize, llama, output=tmp_path / "made", method=method, dtype="float16", lora=loras)
    assert list(tmp_path.iterdir()) == []


def test_values_that_were_infinite_before_are_not(llama: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(MalformedInput, match="Repair the weights"):
        run(quantize, base, output=tmp_path / "made", lora=[str(adapter)])


def test_kept_values_that_a_lora_makes_infinite_are_told_apart(llama: Path, adapter: Path, tmp_path: Path) -> None:
    lora = f"{adapter}:2e6"
    report = run(dequantize, quantized_base(llama), output=tmp_path / "made", dtype="float16", lora=[lora])
    assert report["nonfinite"]
    assert {each["stored"] for each in report["nonfinite"]} == {0}
    assert any("a smaller scale of the LoRA" in warning for warning in report["warnings"])


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_an_adapter_trained_on_a_quantized_base_is_merged_onto_what_that_stands_for(
    llama: Path, adapter: Path, method: str, tmp_path: Path
) -> None:
    base, dtype = tmp_path / "base", "bfloat16" if method == "nf4" else "float32"
    run(quantize, llama, output=base, method=method)
    run(dequantize, base, output=tmp_path / "plain", dtype=dtype)
    wanted = merged(tmp_path / "plain", adapter, tmp_path / "merged")
    run(dequantize, base, output=tmp_path / "made", dtype=dtype, lora=[str(adapter)])
    assert differing_tensors(wanted, tmp_path / "made") == []
    run(quantize, wanted, output=tmp_path / "wanted4")
    run(quantize, base, output=tmp_path / "made4", dtype=dtype, lora=[str(adapter)])
    assert differing_tensors(tmp_path / "wanted4", tmp_path / "made4") == []


def test_a_merged_model_says_the_same_as_the_model_with_its_adapter(llama: Path, adapter: Path, tmp_path: Path) -> None:
    run(quantize, llama, output=tmp_path / "made", int8=True, lora=[str(adapter)])
    tokens = torch.arange(1, 17)[None]
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    one, other = with_adapter(tokens).logits.float(), ours(tokens).logits.float()
    assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.999


def test_the_record_the_report_and_the_command_name_the_lora_and_a_dry_run_is_exact(
    llama: Path, adapter: Path, tmp_path: Path
) -> None:
    planned = run(quantize, llama, output=tmp_path / "made", lora=[f"{adapter}:0.5"], dry_run=True)
    done = run(quantize, llama, output=tmp_path / "made", lora=[f"{adapter}:0.5"])
    assert planned["loras"] == done["loras"]
    assert planned["bytes"] == done["bytes"]
    record = json.loads((tmp_path / "made" / "qz.json").read_text())["about"]
    [lora] = record["loras"]
    assert (lora["location"], lora["file"], lora["scale"]) == ("adapter", "adapter_model.safetensors", 0.5)
    assert lora["weights"] == 14
    assert "adapter/adapter_model.safetensors:0.5" in record["command"]
    assert str(tmp_path) not in (tmp_path / "made" / "qz.json").read_text()
    assert "loras" not in json.loads((quantized_base(llama) / "qz.json").read_text())["about"]


def test_another_lora_or_scale_makes_another_output(llama: Path, adapter: Path, tmp_path: Path) -> None:
    run(quantize, llama, output=tmp_path / "made", lora=[str(adapter)])
    again = run(quantize, llama, output=tmp_path / "made", lora=[str(adapter)], if_exists="skip")
    assert again["up_to_date"]
    for other in ([f"{adapter}:0.5"], [], [str(adapter), str(adapter)]):
        with pytest.raises(OutputRefused, match="different settings"):
            run(quantize, llama, output=tmp_path / "made", lora=other, if_exists="skip")


def test_the_command_line_takes_several_and_shows_them(
    forked_qz: Qz, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    done = forked_qz("quantize", llama, "--lora", adapter, "--lora", f"{adapter}:0.5", "-o", tmp_path / "made")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter/adapter_model.safetensors") == 2
    assert "× 0.5 (fused into 14 tensors)" in done.stdout


def broken(adapter: Path, folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> Path:
    """The adapter with something changed in its tensors or its config."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"
NOWHERE = "base_model.model.model.layers.9.self_attn.q_proj"


def moved(tensors: dict[str, torch.Tensor]) -> None:
    for side in "AB":
        tensors[f"{NOWHERE}.lora_{side}.weight"] = tensors.pop(f"{Q}.lora_{side}.weight")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t, c: moved(t), MalformedInput, r"there is no 'model.layers.9.self_attn.q_proj.weight'"),
        (lambda t, c: t.pop(f"{Q}.lora_B.weight"), MalformedInput, r"q_proj' has down, but not up"),
        (lambda t, c: t.update({f"{Q}.lora_B.weight": torch.ones(48, 4)}), MalformedInput, r"\[48, 64\].*\[64, 64\]"),
        (lambda t, c: t.update({f"{Q}.lora_B.weight": torch.ones(64, 5)}), MalformedInput, "do not fit each other"),
        (lambda t, c: t.update({f"{Q}.lora_A.weight": torch.ones(0, 64)}), MalformedInput, "has no values"),
        (lambda t, c: t[f"{Q}.lora_A.weight"].fill_(torch.nan), MalformedInput, "lora_A.weight' holds NaN"),
        (lambda t, c: t.update({f"{Q}.lora_A.weight": torch.ones(4, 64).to(torch.int8)}), Unsupported, "stored as I8"),
        (lambda t, c: t.update({"base_model.model.head.weight": torch.ones(2, 9)}), MalformedInput, "no 'head.weight'"),
        (lambda t, c: c.update(r=8), MalformedInput, "says rank 8 .* have rank 4"),
        (lambda t, c: c.update(use_dora=True), MalformedInput, "says use_dora: true, but .* has no magnitudes"),
        (
            lambda t, c: t.update({f"{Q}.lora_magnitude_vector": torch.ones(64)}),
            MalformedInput,
            "says use_dora: false, but .*q_proj' has magnitudes",
        ),
        (lambda t, c: c.update(r=0), MalformedInput, "r 0 and alpha 8"),
        (lambda t, c: c.update(lora_alpha=0), MalformedInput, "alpha 0"),
        (lambda t, c: c.update(use_dora="yes"), MalformedInput, "use_dora 'yes'"),
        (lambda t, c: c.update(use_rslora=1), MalformedInput, "use_rslora 1"),
        (lambda t, c: c.update(lora_alpha="8"), MalformedInput, "alpha '8'"),
        (lambda t, c: c.update(peft_type="IA3"), Unsupported, "type 'IA3' cannot be fused"),
        (lambda t, c: c.update(init_lora_weights="pissa"), Unsupported, "init_lora_weights: 'pissa'"),
        (lambda t, c: c.update(layer_replication=[[0, 2]]), Unsupported, "repeats layers"),
        (lambda t, c: c.update(alpha_pattern={"(a+)+b": 2}), Unsupported, "too involved"),
        (lambda t, c: c.update(alpha_pattern={"[": 2}), MalformedInput, "no regular expression"),
        (lambda t, c: c.update(alpha_pattern={"a{99999999999999}": 2}), MalformedInput, "no regular expression"),
        (lambda t, c: c.update(rank_pattern=["q_proj"]), MalformedInput, "rank_pattern, which is not an object"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(
    llama: Path, adapter: Path, tmp_path: Path, change: Any, error: type[Exception], words: str
) -> None:
    bad = broken(adapter, tmp_path / "adapter", change)
    with pytest.raises(error, match=words):
        run(quantize, llama, output=tmp_path / "made", lora=[str(bad)])
    assert not (tmp_path / "made").exists()


def test_a_tied_weight_is_not_changed_behind_the_back_of_the_other(tmp_path: Path) -> None:
    llama_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    adapter = trained(tmp_path / "tied", LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path / "adapter")
    with pytest.raises(Unsupported, match=r"tied to 'lm_head.weight'|tied to 'model.embed_tokens.weight'"):
        run(quantize, tmp_path / "tied", output=tmp_path / "made", lora=[str(adapter)])


def test_a_lora_is_found_by_file_and_folder_and_what_is_none_is_named(
    llama: Path, adapter: Path, tmp_path: Path
) -> None:
    report = run(quantize, llama, lora=[str(adapter / "adapter_model.safetensors")], dry_run=True)
    assert report["loras"][0]["location"] == "adapter_model.safetensors"
    with pytest.raises(Unsupported, match="is not a LoRA"):
        run(quantize, llama, lora=[str(llama)], dry_run=True)
    with pytest.raises(MissingInput, match="does not exist"):
        run(quantize, llama, lora=[str(tmp_path / "none.safetensors")], dry_run=True)
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        shutil.copy(adapter / "adapter_model.safetensors", tmp_path / "two" / f"{name}.safetensors")
    with pytest.raises(UsageError, match=r"2 \.safetensors files: 'a.safetensors', 'b.safetensors'"):
        run(quantize, llama, lora=[str(tmp_path / "two")], dry_run=True)
    with pytest.raises(MissingInput, match=r"no adapter_config\.json"):
        run(quantize, llama, lora=[str(tmp_path / "two" / "a.safetensors")], dry_run=True)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(Unsupported, match="as a pickle only"):
        run(quantize, llama, lora=[str(tmp_path / "pickled")], dry_run=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with connected(monkeypatch, tmp_path / "home", xet=False) as hub:
        yield hub


def test_a_lora_of_a_repository_is_recorded_at_its_commit(
    hub: HubServer, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    files = {f"style/{path.name}": path for path in adapter.iterdir() if path.suffix in (".json", ".safetensors")}
    hub.add("me/loras", files)
    named = run(quantize, llama, output=tmp_path / "named", lora=["me/loras/style/adapter_model.safetensors:0.5"])
    found = run(quantize, llama, output=tmp_path / "found", lora=["me/loras/style@main:0.5"])
    run(quantize, llama, output=tmp_path / "wanted", lora=[f"{adapter}:0.5"])
    assert differing_tensors(tmp_path / "wanted", tmp_path / "named") == []
    assert named["loras"] == found["loras"]
    [lora] = named["loras"]
    assert (lora["location"], len(lora["revision"])) == ("me/loras/style", 40)
    command = json.loads((tmp_path / "named" / "qz.json").read_text())["about"]["command"]
    assert f"me/loras/style/adapter_model.safetensors@{lora['revision']}:0.5" in command
    with pytest.raises(MissingInput, match="me/none"):
        run(quantize, llama, output=tmp_path / "none", lora=["me/none"])


def test_several_loras_of_repositories_are_fused_at_once(
    hub: HubServer, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    """A folder in one at a branch, a file in another, and the only one of a third."""
    other = trained(llama, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), tmp_path / "other")
    places = {"me/styles": ("deep/inside/", adapter), "me/single": ("", other), "you/alone": ("", adapter)}
    for name, (prefix, folder) in places.items():
        files = {f"{prefix}{path.name}": path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}
        hub.add(name, files)
    there = ["me/styles/deep/inside@main:0.5", "me/single/adapter_model.safetensors", "you/alone:-0.25"]
    report = run(quantize, llama, output=tmp_path / "made", lora=there)
    run(quantize, llama, output=tmp_path / "wanted", lora=[f"{adapter}:0.5", str(other), f"{adapter}:-0.25"])
    assert differing_tensors(tmp_path / "wanted", tmp_path / "made") == []
    assert [each["location"] for each in report["loras"]] == ["me/styles/deep/inside", "me/single", "you/alone"]
    assert run(verify, tmp_path / "made", against=str(llama), lora=there)["intact"]


def test_verify_fuses_the_same_loras_again_and_no_others(llama: Path, adapter: Path, tmp_path: Path) -> None:
    other = trained(llama, LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "other")
    loras = [f"{adapter}:0.5", str(other)]
    for act, source, output in ((quantize, llama, "made"), (dequantize, tmp_path / "made", "back")):
        run(act, source, output=tmp_path / output, lora=loras)
        moved = Path(shutil.copytree(adapter, tmp_path / f"elsewhere of {output}" / "renamed"))
        assert run(verify, tmp_path / output, against=str(source), lora=[f"{moved}:0.5", str(other)])["intact"]
    for given, message in (
        ([], r"made with 2 LoRAs .* --lora \S*adapter_model.safetensors:0.5 --lora other/adapter_model.safetensors"),
        ([str(adapter), str(other)], "another scale: --lora .*:0.5"),
        (loras[::-1], "is not the LoRA that was used"),
    ):
        with pytest.raises(UsageError, match=message):
            run(verify, tmp_path / "made", against=str(llama), lora=given)
    with pytest.raises(UsageError, match="made without one"):
        run(verify, quantized_base(llama), against=str(llama), lora=loras)


def test_the_scale_is_what_follows_the_last_colon() -> None:
    assert parse_scale("owner/name:0.8", exists=False) == ("owner/name", 0.8)
    assert parse_scale("a:b:-1e-1", exists=False) == ("a:b", -0.1)
    assert parse_scale("a:1", exists=True) == ("a:1", 1.0)
    assert parse_scale("owner/name@v1.0", exists=False) == ("owner/name@v1.0", 1.0)
    for text in ("a:0", "a:1e999"):
        with pytest.raises(UsageError, match="not a usable scale"):
            parse_scale(text, exists=False)


def test_a_link_to_itself_is_no_lora(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(QzError, match="loop"):
        api.quantize(tiny_llama, tmp_path / "out", lora=(str(tmp_path / "loop"),))
