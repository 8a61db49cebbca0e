"""``qz calibrate``: what is recorded block by block is what hooks on the whole model see, and quantization reads it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mixtures import mixture
from qz import MalformedInput, MissingInput, OutputRefused, QzError, Unsupported, UsageError, api
from qz.quantize.calibration.running import text
from qz.quantize.calibration.running.unfinished import Unfinished
from qz.quantize.importance.statistics import read_statistics
from readers import model_folder, some_text, with_tokenizer
from reference import config_of, differing_tensors

Qz = Callable[..., subprocess.CompletedProcess[str]]


def seen_by_hooks(folder: Path, rows: list[list[int]]) -> dict[str, tuple[torch.Tensor, int]]:
    """float64[in, in] sums of outer products, and tokens, at every linear of the plainly loaded float32 model."""
    from transformers.pytorch_utils import Conv1D

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, Any] = {}

    def hook(path: str) -> Any:
        def see(_: Any, args: Any) -> None:
            x = args[0].flatten(0, -2).double()
            before, count = sums.get(path, (0, 0))
            sums[path] = (before + x.T @ x, count + len(x))

        return see

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_pre_hook(hook(f"{path}.weight"))
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return sums


def rows_of(folder: Path, path: Path, length: int, tokens: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    return text.varied_sequences(AutoTokenizer.from_pretrained(folder), path.read_text(), length, tokens)


def test_a_longer_text_is_taken_from_all_over(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = model_folder("llama-tied", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = some_text(tmp_path / "words.txt").read_text() * 8
    every = text.sequences(tokenizer, words, 16, 1 << 20)
    assert len(every) > 20
    assert text.sequences(tokenizer, words, 16, 64) == [every[at * len(every) // 4] for at in range(4)]
    assert sum(map(len, text.sequences(tokenizer, words, 16, 57))) == 57
    assert text.sequences(tokenizer, words, 16, sum(map(len, every))) == every


@pytest.mark.parametrize("tokens", [1, 4, 57, 600])
def test_a_quarter_of_what_hessians_are_made_of_is_qzs_own_text_of_many_kinds(tokens: int, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama-tied", tmp_path / "model"))
    words = some_text(tmp_path / "words.txt", 3000).read_text()
    rows = text.varied_sequences(tokenizer, words, 64, tokens)
    own = text.sequences(tokenizer, text.default_text(), 64, tokens // 4) if tokens >= 4 else []
    assert rows == text.sequences(tokenizer, words, 64, tokens - tokens // 4) + own
    assert sum(map(len, rows)) == tokens


def test_the_report_says_that_qzs_own_text_was_read_too(forked_qz: Qz, tmp_path: Path) -> None:
    model_folder("llama-tied", tmp_path / "model")
    some_text(tmp_path / "words.txt")
    how = ("--text", "words.txt", "--tokens", "900", "--device", "cpu")
    alone = forked_qz("calibrate", "model", "-o", "one", *how)
    mixed = forked_qz("calibrate", "model", "-o", "two", *how, "--hessians")
    assert "qz's own" not in alone.stdout + alone.stderr
    assert "words.txt and qz's own: 900 tokens" in " ".join(mixed.stdout.split()), mixed.stderr


WITHOUT_ACCELERATE = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch._dynamo  # once, for both: what the libraries import before they fail
from qz.cli.app import run
from qz.quantize.libraries.importing import work_bounds
work_bounds.set_hard()  # as in the process that would be asked
for how in (["calibrate", "model", "-o", "sums"], ["quantize", "model", "--nf4", "--dry-run"]):
    if os.fork() == 0:
        os._exit(run(how))
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_a_package_that_cannot_be_imported_is_named(python_with_torch: list[str], tmp_path: Path) -> None:
    """As a torchvision made for another torch, which transformers imports where it is there."""
    model_folder("llama-tied", tmp_path / "model")
    (tmp_path / "installed/accelerate").mkdir(parents=True)
    (tmp_path / "installed/accelerate/__init__.py").write_text("raise RuntimeError('made for another torch')")
    environment = {**os.environ, "QZ_LEAN": "0", "QZ_CACHE": ""}
    done = subprocess.run(
        [*python_with_torch, "-c", WITHOUT_ACCELERATE, tmp_path / "installed"],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["78", "78"], done.stderr
    told = "Error: accelerate is installed, and cannot be imported: RuntimeError: made for another torch. Install the"
    assert " ".join(done.stderr.split()).count(told) == 2


def test_of_a_very_long_text_only_pieces_are_made_tokens_of() -> None:
    words = "".join(f"{number:06} " for number in range(2_000_000 // 7 * 4))
    pieces = text.excerpts(words, 64_000).split()
    assert 63_000 < sum(map(len, pieces)) + len(pieces) <= 64_000
    assert (int(pieces[0]), int(pieces[-1][:6])) > (0, 1_000_000)
    assert text.excerpts(words[:64_000], 64_000) == words[:64_000]


@pytest.mark.parametrize(
    "name", ["llama-tied", "llama-untied", "gpt2", "mixtral", "qwen3-moe", "bert", "t5-encoder", "clip"]
)
def test_what_is_recorded_block_by_block_is_what_hooks_on_the_whole_model_see(name: str, tmp_path: Path) -> None:
    folder = model_folder(name, tmp_path / "model")
    words = some_text(tmp_path / "words.txt")
    length = 77 if name == "clip" else 512
    expected = seen_by_hooks(folder, rows_of(folder, words, length, 600))
    found = api.calibrate(folder, tmp_path / "stats.safetensors", text=words, tokens=600, device="cpu", hessians=True)
    stats = read_statistics(tmp_path / "stats.safetensors")
    assert (found.tokens, found.linears, found.unseen) == (600, len(expected), ())
    assert set(stats.sums) == set(expected)
    for weight, (product, tokens) in expected.items():
        assert stats.sums[weight].tokens == tokens, weight
        np.testing.assert_allclose(stats.sums[weight].sum2, product.diagonal().numpy(), rtol=1e-4, atol=1e-4)
        kept = stats.hessian(weight)
        assert kept is not None
        np.testing.assert_allclose(kept, product.numpy(), rtol=1e-3, atol=1e-3 * float(product.abs().max()))
    if name == "llama-tied":
        shares = [stats.hessians[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
        assert len(set(shares)) == 1
    assert not list(tmp_path.glob("*.partial"))


def multiplied_by_experts(folder: Path, rows: list[list[int]]) -> dict[str, tuple[torch.Tensor, int]]:
    """Σx² and tokens that the whole model routes to each expert, by the names of the experts' weights in ``folder``."""
    model = getattr(transformers, config_of(folder)["architectures"][0]).from_pretrained(folder, dtype=torch.float32)
    listed = model.config.model_type == "gpt_oss"
    found: dict[str, tuple[torch.Tensor, int]] = {}

    def add(name: str, x: torch.Tensor) -> None:
        before = found.get(name, (torch.zeros(x.shape[1], dtype=torch.float64), 0))
        found[name] = (before[0] + x.double().square().sum(0), before[1] + len(x))

    def hook(path: str) -> Any:
        def look(layer: Any, args: Any, kwargs: Any) -> None:
            states, chosen = (*args, *kwargs.values())[:2]
            for number in range(len(layer.down_proj)):
                x = states.reshape(-1, states.shape[-1])[(chosen == number).any(-1)]
                wide = x @ layer.gate_up_proj[number] if listed else x @ layer.gate_up_proj[number].T
                wide = wide + layer.gate_up_proj_bias[number] if listed else wide
                middle = layer._apply_gate(wide)
                for part, inputs in (("gate_up", x), ("down", middle)) if listed else (
                    ("gate", x), ("up", x), ("down", middle)
                ):  # fmt: skip
                    add(f"{path}.{part}_projs.{number}" if listed else f"{path}.{number}.{part}_proj", inputs)

        return look

    for path, module in model.named_modules():
        if hasattr(module, "is_transposed"):
            module.register_forward_pre_hook(hook(path), with_kwargs=True)
    with torch.inference_mode():
        for row in rows:
            model(torch.tensor([row]))
    return {f"{name}.weight": each for name, each in found.items()}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_what_experts_are_multiplied_with_is_recorded_and_decides_their_scales(name: str, tmp_path: Path) -> None:
    folder = with_tokenizer(mixture(name, tmp_path / "model"))
    stats, words = tmp_path / "stats", some_text(tmp_path / "words.txt")
    found = api.calibrate(folder, stats, text=words, tokens=300, device="cpu", experts=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = multiplied_by_experts(folder, text.sequences(tokenizer, words.read_text(), 512, 300))
    recorded = read_statistics(stats).sums
    experts = {weight: sums for weight, sums in recorded.items() if ".experts." in weight}
    assert experts.keys() == expected.keys()
    assert found.linears == len(recorded) > len(experts)
    for weight, (squares, tokens) in expected.items():
        assert experts[weight].tokens == tokens, weight
        np.testing.assert_allclose(experts[weight].sum2, squares.numpy(), rtol=2e-3, atol=1e-6)

    done: Any = api.quantize(folder, tmp_path / "nf4", importance=stats, experts=True, device="cpu")
    told = done.as_json()["importance"]
    assert (told["missing"], told["weights"]) == ([], len(recorded) - ("lm_head.weight" in recorded))
    api.quantize(folder, tmp_path / "searched", scales="search", experts=True, device="cpu")
    assert any(".experts." in each for each in differing_tensors(tmp_path / "nf4", tmp_path / "searched"))


@pytest.mark.parametrize("how", ["eager", "batched_mm"])
def test_experts_whose_inputs_are_not_seen_are_refused(how: str, tmp_path: Path) -> None:
    from qz.quantize.calibration.running.experts import watched
    from qz.quantize.libraries.transformers.runnable import ExpertLayer

    model = transformers.AutoModelForCausalLM.from_pretrained(mixture("mixtral", tmp_path / "model"))
    model.set_experts_implementation(how)
    path = "model.layers.0.mlp.experts"
    names = {leaf: [()] * 4 for leaf in ("gate_up_proj", "down_proj")}
    seen: list[str] = []
    with watched({path: ExpertLayer(model.get_submodule(path), names)}, lambda key, _: seen.append(key)):
        if how == "eager":
            model(torch.tensor([[5, 6]]))
        else:
            with pytest.raises(Unsupported, match="--experts"):
                model(torch.tensor([[5, 6]]))
    assert bool(seen) == (how == "eager")


def test_experts_that_were_not_recorded_or_are_not_there_are_told_of(tmp_path: Path) -> None:
    folder = with_tokenizer(mixture("qwen3_moe", tmp_path / "model"))
    api.calibrate(folder, tmp_path / "stats", tokens=100, device="cpu")
    done: Any = api.quantize(folder, tmp_path / "nf4", importance=tmp_path / "stats", experts=True, device="cpu")
    assert done.warnings[-1] == "experts are recorded by `qz calibrate --experts`"
    with pytest.raises(Unsupported, match=r"has no experts .* leave out --experts"):
        api.calibrate(model_folder("bert", tmp_path / "bert"), tmp_path / "none", device="cpu", experts=True)
    assert not (tmp_path / "none").exists()


def llava(folder: Path) -> Path:
    """A language model that sees pictures: text alone does not come to its vision tower."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**small, image_size=28, patch_size=14, projection_dim=64)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**small, vocab_size=100), image_token_index=99)
    LlavaForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    return with_tokenizer(folder)


def test_linears_that_no_token_comes_to_are_named_and_quantized_all_the_same(tmp_path: Path) -> None:
    folder, stats = llava(tmp_path / "model"), tmp_path / "stats.safetensors"
    found = api.calibrate(folder, stats, device="cpu")
    assert found.unseen
    assert all("vision" in name or "multi_modal" in name for name in found.unseen)
    assert f"no token came to {len(found.unseen)} linears" in found.warnings[-1]
    assert {read_statistics(stats).sums[name].tokens for name in found.unseen} == {0}
    done: Any = api.quantize(folder, tmp_path / "nf4", importance=stats, device="cpu")
    assert set(done.as_json()["importance"]["unseen"]) <= set(found.unseen)


def test_calibrate_then_quantize_from_the_command_line(forked_qz: Qz, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model_folder("llama-untied", tmp_path / "model")
    done = forked_qz("calibrate", "model", "-o", "stats.safetensors", "--json", "--quiet", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["text"], found["tokens"], found["linears"], found["unseen"]) == ("default", 1024, 15, [])
    assert forked_qz("calibrate", "model", "-o", "stats.safetensors").returncode == OutputRefused.exit_code
    assert forked_qz("quantize", "model", "-o", "nf4", "--importance", "stats.safetensors", "--quiet").returncode == 0
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "nf4")
    original = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(2, 40).unsqueeze(0)
    near, plain = loaded(input_ids=ids).logits.float(), original(input_ids=ids).logits.float()
    assert torch.nn.functional.cosine_similarity(near.flatten(), plain.flatten(), dim=0) > 0.9


def test_pickles_are_run_and_compared_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = model_folder("llama-tied", tmp_path / "model")
    api.quantize(folder, tmp_path / "nf4", device="cpu")
    words = some_text(tmp_path / "words.txt")
    pickled = Path(shutil.copytree(folder, tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(MalformedInput, match="With --allow-pickle qz reads them"):
        api.calibrate(pickled, tmp_path / "refused", text=words, device="cpu")
    for source, name in ((folder, "theirs"), (pickled, "ours")):
        api.calibrate(source, tmp_path / name, text=words, tokens=300, device="cpu", allow_pickle=source == pickled)
    ours, theirs = (read_statistics(tmp_path / name).sums for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name].sum2, theirs[name].sum2) for name in ours)
    given: dict[str, Any] = {"text": words, "tokens": 300, "device": "cpu"}
    of_pickles = api.compare(pickled, tmp_path / "nf4", allow_pickle=True, **given)
    assert of_pickles.kl == api.compare(folder, tmp_path / "nf4", **given).kl


def test_a_language_model_is_calibrated_on_its_own_text(tmp_path: Path) -> None:
    folder = model_folder("llama-untied", tmp_path / "model")
    before = torch.random.get_rng_state()
    seen: set[str] = set()
    for name in ("one", "two"):
        found = api.calibrate(
            folder,
            tmp_path / name,
            generate=True,
            tokens=250,
            hessians=True,
            device="cpu",
            on_progress=lambda progress: seen.add(progress.doing),
        )
        assert (found.text, found.tokens) == ("generated", 250)
    assert "Writing a text" in seen
    assert torch.equal(torch.random.get_rng_state(), before)
    one, two = (read_statistics(tmp_path / name) for name in ("one", "two"))
    assert one.metadata["text"] == "generated"
    for weight, sums in one.sums.items():
        np.testing.assert_array_equal(sums.sum2, two.sums[weight].sum2)
    with pytest.raises(UsageError, match="exclude each other"):
        api.calibrate(folder, tmp_path / "three", generate=True, text=tmp_path / "one")
    for kind in ("bert", "t5-encoder"):
        reader = model_folder(kind, tmp_path / kind)
        with pytest.raises(Unsupported, match="does not write text"):
            api.calibrate(reader, tmp_path / "three", generate=True, device="cpu")


def test_hessians_of_calibrate_round_by_gptq(tmp_path: Path) -> None:
    folder, words = model_folder("llama-odd", tmp_path / "model"), some_text(tmp_path / "words.txt")
    stats = tmp_path / "stats.safetensors"
    found = api.calibrate(folder, stats, text=words, hessians=True, device="cpu")
    assert any("fewer than the 16,384 asked for" in warning for warning in found.warnings)
    api.quantize(folder, tmp_path / "nf4", importance=stats, rounding="gptq", device="cpu")


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    folder, words = model_folder("llama-untied", tmp_path / "model"), some_text(tmp_path / "words.txt")
    (tmp_path / "stats.hessians-00002.safetensors").write_text("mine")
    with pytest.raises(OutputRefused, match="hessians-00002"):
        api.calibrate(folder, tmp_path / "stats.safetensors", text=words, hessians=True, device="cpu")
    assert sorted(path.name for path in tmp_path.glob("stats*")) == ["stats.hessians-00002.safetensors"]
    assert (tmp_path / "stats.hessians-00002.safetensors").read_text() == "mine"


class Killed(BaseException):
    """As a signal would end it: nothing of qz sees it."""


@pytest.mark.parametrize("name", ["llama-untied", "t5-encoder", "qwen3-moe", "bert"])
def test_an_interrupted_run_goes_on_at_the_last_finished_block_and_finds_the_same(name: str, tmp_path: Path) -> None:
    folder, words = model_folder(name, tmp_path / "model"), some_text(tmp_path / "words.txt")

    def run(output: str, before_end: int = 0) -> Any:
        def look(progress: Any) -> None:
            if before_end and progress.total and progress.done >= progress.total - before_end:
                raise Killed

        how: dict[str, Any] = {"hessians": True, "experts": name == "qwen3-moe", "device": "cpu"}
        return api.calibrate(folder, tmp_path / output, text=words, tokens=600, on_progress=look, **how)

    whole = run("whole")
    for before_end in (2, 1):
        with pytest.raises(Killed) as killed:
            run("cut", before_end)
        assert not (tmp_path / "cut").exists()
    journal = json.loads((tmp_path / "cut.unfinished" / "journal.json").read_text())
    assert journal["blocks"]
    [told] = killed.value.__notes__
    assert "kept: run the same command again to continue" in told
    again = run("cut")
    assert (again.resumed, whole.resumed) == (True, False)
    assert again.bytes_read < whole.bytes_read
    assert sorted(each.name.replace("cut", "whole") for each in tmp_path.glob("cut*")) == sorted(
        each.name for each in tmp_path.glob("whole*")
    )
    one, two = (read_statistics(tmp_path / output) for output in ("whole", "cut"))
    assert set(one.sums) == set(two.sums)
    for weight, sums in one.sums.items():
        assert sums.tokens == two.sums[weight].tokens
        np.testing.assert_array_equal(sums.sum2, two.sums[weight].sum2)
        np.testing.assert_array_equal(one.hessian(weight), two.hessian(weight))


def test_an_interrupt_before_anything_is_kept_leaves_nothing(tmp_path: Path) -> None:
    from qz.quantize.calibration.running.unfinished import unfinished

    with pytest.raises(Killed) as killed, unfinished(tmp_path / "stats", resume=True):
        raise Killed
    assert not hasattr(killed.value, "__notes__")
    assert not list(tmp_path.iterdir())


def unfinished(tmp_path: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A calibration that was killed after a block: how to run it again, and its journal."""
    folder, words = model_folder("llama-untied", tmp_path / "model"), some_text(tmp_path / "words.txt")

    def stop(progress: Any) -> None:
        if progress.done >= 2:
            raise Killed

    def run(**how: Any) -> Any:
        return api.calibrate(folder, tmp_path / "stats", text=words, tokens=90, hessians=True, device="cpu", **how)

    with pytest.raises(Killed):
        run(on_progress=stop)
    return run, json.loads((tmp_path / "stats.unfinished" / "journal.json").read_text())


@pytest.mark.parametrize("change", ["text", "damage", "option", "files"])
def test_what_another_run_left_is_not_gone_on_with(change: str, tmp_path: Path) -> None:
    run, _ = unfinished(tmp_path)
    words = tmp_path / "words.txt"
    kept = sorted((tmp_path / "stats.unfinished").glob("block-*"))
    assert kept
    if change == "text":
        words.write_text(words.read_text() + " ferry")
    elif change == "damage":
        kept[0].write_bytes(kept[0].read_bytes()[:-1] + b"?")
    elif change == "files":
        next(tmp_path.glob("stats.hessians-*")).unlink()
    found = run(resume=change != "option")
    assert not found.resumed
    assert not (tmp_path / "stats.unfinished").exists()
    assert {file.name for file in tmp_path.glob("stats.hessians-*")} == set(found.hessian_files)


def test_what_cannot_be_calibrated_is_refused_by_name(tmp_path: Path) -> None:
    output, folder = tmp_path / "stats.safetensors", model_folder("llama-untied", tmp_path / "model")
    with pytest.raises(UsageError, match=r"--text FILE"):
        api.calibrate(folder, output, hessians=True)
    with pytest.raises(UsageError, match="not a number of tokens"):
        api.calibrate(folder, output, tokens=0)
    with pytest.raises(MissingInput, match="plain text"):
        api.calibrate(folder, output, text=tmp_path / "absent.txt", device="cpu")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        api.calibrate(folder, output, text=tmp_path / "bytes.txt", device="cpu")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match="is empty"):
        api.calibrate(folder, output, text=tmp_path / "empty.txt", device="cpu")
    with pytest.raises(OutputRefused, match="not a folder"):
        api.calibrate(folder, tmp_path / "absent" / "stats.safetensors")
    api.quantize(folder, tmp_path / "nf4", device="cpu")
    with pytest.raises(Unsupported, match="already quantized"):
        api.calibrate(tmp_path / "nf4", output)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(MissingInput, match="no tokenizer"):
        api.calibrate(folder, output, device="cpu")
    with pytest.raises(Unsupported, match="not made from text"):
        api.calibrate(model_folder("vit", tmp_path / "vit"), output, device="cpu")
    assert not output.exists()


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    from qz.quantize.calibration.running.weights import Weights

    folder, held = model_folder("llama-untied", tmp_path / "model"), []
    release = Weights.release

    def watched(self: Weights, path: str, module: Any) -> None:
        model = self.runnable.model
        held.append({name for name, each in model.named_parameters() if each.device.type != "meta"})
        release(self, path, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "release", watched)
        api.calibrate(folder, tmp_path / "stats.safetensors", device="cpu")
    parts = [{name.rpartition("layers.")[2].partition(".")[0] for name in each if "layers." in name} for each in held]
    assert parts == [set(), {"0"}, {"1"}]
    assert not any("lm_head" in name for each in held for name in each)
    assert ["embed" in "".join(each) for each in held] == [True, False, False]


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "names a file of others": lambda journal: {**journal, "claimed": [*journal["claimed"], "words.txt"]},
    "names a block elsewhere": lambda journal: {
        **journal,
        "blocks": [{**each, "file": f"../stats.unfinished/{each['file']}"} for each in journal["blocks"]],
    },
    "has no mark": lambda journal: {name: value for name, value in journal.items() if name != "mark"},
    "has other tokens": lambda journal: {**journal, "rows": [[0] * 90]},
    "is a list": lambda _: [],
    "has sums that are none": lambda journal: {**journal, "sums": 5},
    "has blocks that are none": lambda journal: {**journal, "blocks": [5]},
}


def test_a_journal_that_another_wrote_counts_for_nothing_and_no_file_of_others_is_removed(tmp_path: Path) -> None:
    run, journal = unfinished(tmp_path)
    place, kept = tmp_path / "stats.unfinished", tmp_path / "kept"
    place.rename(kept)
    texts = {name: json.dumps(forge(journal)) for name, forge in FORGED.items()} | {"is deep": "[" * 100_000}
    for name, forged in texts.items():
        for each in tmp_path.glob("stats*"):
            each.unlink()
        shutil.copytree(kept, place)
        (place / "journal.json").write_text(forged)
        found = run()
        assert not found.resumed, name
        assert (tmp_path / "words.txt").exists(), name
        assert {each.name for each in tmp_path.glob("stats.hessians-*")} == set(found.hessian_files)
        assert not place.exists()


@pytest.mark.parametrize("kind", ["a file", "a file of others", "a folder", "a link", "a FIFO"])
def test_what_others_put_where_an_unfinished_calibration_is_kept_is_left_alone(kind: str, tmp_path: Path) -> None:
    folder, words = model_folder("llama-untied", tmp_path / "model"), some_text(tmp_path / "words.txt")
    place = tmp_path / "stats.unfinished"
    if kind == "a link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to("elsewhere")
    elif kind == "a file":
        place.touch()
    else:
        place.mkdir()
        name = "mine" if kind == "a file of others" else "journal.json"
        if kind == "a FIFO":
            os.mkfifo(place / name)
        elif kind == "a folder":
            (place / name).mkdir()
        else:
            (place / name).touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputRefused, match="Move it away"):
        api.calibrate(folder, tmp_path / "stats", text=words, tokens=90, device="cpu")
    assert sorted(tmp_path.rglob("*")) == before


def test_where_there_are_no_locks_a_calibration_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OutputRefused, match="has no locks"):
        Unfinished(tmp_path / "stats", resume=True)
    assert os.listdir(tmp_path) == []


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 10**10)


NO_TEXT = {
    "FIFO": (os.mkfifo, UsageError, "is a FIFO or a device"),
    "device": (lambda path: path.symlink_to("/dev/zero"), UsageError, "is a FIFO or a device"),
    "loop": (lambda path: path.symlink_to(path), UsageError, "is a link that leads back to itself"),
    "socket": (lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), UsageError, "is a socket or a device"),
    "in a file": (lambda path: path.parent.touch(), MissingInput, "does not exist"),
    "long": (sparse, UsageError, "is larger than"),
}


@pytest.mark.parametrize(("make", "kind", "told"), NO_TEXT.values(), ids=NO_TEXT.keys())
def test_a_text_that_is_none_or_has_no_end_is_refused_at_once(
    make: Callable[[Path], object], kind: type[QzError], told: str, tiny_llama: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text" if told != "does not exist" else tmp_path / "file" / "text"
    make(text)
    with pytest.raises(kind, match=told):
        api.calibrate(tiny_llama, tmp_path / "stats", text=text, device="cpu")
    assert not (tmp_path / "stats").exists()
