"""``qz compare``: its figures are those of the two models, loaded whole."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qz import MalformedInput, MissingInput, OutputRefused, Unsupported, UsageError, api
from qz.cli.reports.new_file import store
from qz.quantize.calibration.running import text
from readers import model_folder, some_text, with_tokenizer
from reference import dequantized_by_bitsandbytes, tensors_of

Qz = Callable[..., subprocess.CompletedProcess[str]]


def whole(model_class: Any, folder: Path, weights: Path | None = None) -> Any:
    """The model in float32, with the weights that bitsandbytes computes from those of another folder."""
    from transformers.pytorch_utils import Conv1D

    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    if weights is not None:
        for name, value in dequantized_by_bitsandbytes(tensors_of(weights)).items():
            parameter = model.get_parameter(name)
            owner = model.get_submodule(name.removesuffix(".weight"))
            parameter.data = (value.T if isinstance(owner, Conv1D) else value).float()
    return model


def rows_of(folder: Path, words: Path, tokens: int) -> list[torch.Tensor]:
    from transformers import AutoTokenizer

    rows = text.sequences(AutoTokenizer.from_pretrained(folder), words.read_text(), 512, tokens)
    return [torch.tensor([row]) for row in rows]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_the_figures_of_a_language_model_are_those_of_the_whole_models(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, words = model_folder(name, tmp_path / "model"), some_text(tmp_path / "words.txt", 900)
    api.quantize(folder, tmp_path / "nf4", device="cpu")
    found = api.compare(folder, tmp_path / "nf4", text=words, tokens=700, device="cpu")
    one, two = whole(AutoModelForCausalLM, folder), whole(AutoModelForCausalLM, folder, tmp_path / "nf4")
    kl, same, surprise = [], [], []
    with torch.no_grad():
        for ids in rows_of(folder, words, 700):
            first, second = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (one, two))
            kl.append(float((first.exp() * (first - second)).sum(-1).mean()))
            same.append(float((first.argmax(-1) == second.argmax(-1)).double().mean()))
            surprise.append([float(-each[:-1].gather(1, ids[0, 1:, None]).mean()) for each in (first, second)])
    assert (found.tokens, found.sequences, found.cosine_loss) == (700, 2, None)
    assert found.kl == pytest.approx(sum(kl) / 2, rel=1e-3)
    assert found.kl_error is not None
    assert found.same_top == pytest.approx(sum(same) / 2, abs=0.005)
    expected = torch.tensor(surprise).mean(0).exp()
    assert found.perplexity_original == pytest.approx(float(expected[0]), rel=1e-4)
    assert found.perplexity_other == pytest.approx(float(expected[1]), rel=1e-4)
    assert 0.05 < found.loss.total.relative_error < 0.15


def test_the_error_of_a_block_is_that_of_what_it_returns_in_the_whole_models(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, words = model_folder("llama-untied", tmp_path / "model"), some_text(tmp_path / "words.txt", 900)
    api.quantize(folder, tmp_path / "nf4", device="cpu")
    found = api.compare(folder, tmp_path / "nf4", text=words, tokens=600, device="cpu")
    errors: dict[str, list[torch.Tensor]] = {}
    one, two = whole(AutoModelForCausalLM, folder), whole(AutoModelForCausalLM, folder, tmp_path / "nf4")
    with torch.no_grad():
        for ids in rows_of(folder, words, 600):
            states = [model.model(input_ids=ids, output_hidden_states=True).hidden_states for model in (one, two)]
            for number, (before, after) in enumerate(zip(*states, strict=True)):
                square = (after - before).double().square().sum(-1) / before.double().square().sum(-1)
                errors.setdefault(f"model.layers.{number - 1}", []).append(square.flatten())
    assert list(found.blocks) == ["model.layers.0", "model.layers.1"]
    first = "model.layers.0"  # after the last block transformers gives the normalized states
    assert found.blocks[first] == pytest.approx(float(torch.cat(errors[first]).mean()), rel=1e-3)


def test_the_picture_is_an_svg_with_a_bar_for_each_block(forked_qz: Qz, tmp_path: Path) -> None:
    from xml.etree import ElementTree

    folder = model_folder("llama-untied", tmp_path / "<model>")
    api.quantize(folder, tmp_path / "a&b", device="cpu")
    asked = ("compare", "<model>", "a&b", "--tokens", "64", "--device", "cpu", "--picture", "blocks.svg")
    done = forked_qz(*asked)
    assert done.returncode == 0, done.stderr
    drawn = ElementTree.parse(tmp_path / "blocks.svg").getroot()
    inside = "{http://www.w3.org/2000/svg}"
    assert drawn.tag == f"{inside}svg"
    titles = [str(bar.text) for bar in drawn.iter(f"{inside}title")]
    assert [title.split(":")[0] for title in titles] == ["model.layers.0", "model.layers.1"]
    assert any("a&b" in str(text.text) for text in drawn.iter(f"{inside}text"))
    assert forked_qz(*asked).returncode == 73


def test_what_comes_into_the_place_of_a_picture_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "blocks.svg").symlink_to("precious")
    with pytest.raises(OutputRefused, match="appeared in the meantime"):
        store(tmp_path / "blocks.svg", "<svg/>", "--picture")
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_encoder_is_compared_by_its_last_hidden_states(tmp_path: Path) -> None:
    from transformers import BertModel

    folder, words = model_folder("bert", tmp_path / "model"), some_text(tmp_path / "words.txt", 900)
    api.quantize(folder, tmp_path / "nf4", device="cpu")
    found = api.compare(folder, tmp_path / "nf4", text=words, tokens=300, device="cpu")
    one, two = whole(BertModel, folder), whole(BertModel, folder, tmp_path / "nf4")
    (ids,) = rows_of(folder, words, 300)
    with torch.no_grad():
        first, second = (model(input_ids=ids).last_hidden_state[0].double().mean(0) for model in (one, two))
    expected = 1 - float(torch.nn.functional.cosine_similarity(first, second, dim=0))
    assert found.cosine_loss == pytest.approx(expected, rel=1e-2, abs=1e-7)
    assert (found.kl, found.perplexity_original, found.same_top) == (None, None, None)


def test_a_classifier_is_scored_and_compared_by_the_states_of_its_encoder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForSequenceClassification(BertConfig(vocab_size=100, **small)).save_pretrained(tmp_path / "model")
    given: dict[str, Any] = {"text": some_text(tmp_path / "words.txt"), "tokens": 200, "device": "cpu"}
    folder, scores = with_tokenizer(tmp_path / "model"), tmp_path / "scores"
    found = api.calibrate(folder, scores, scores=True, **given).scores
    assert found is not None
    assert found.loss == "cosine"
    api.quantize(folder, tmp_path / "nf4", device="cpu")
    lost = api.compare(folder, tmp_path / "nf4", **given).cosine_loss
    assert lost == pytest.approx(found.total, rel=2e-2)
    one, two = (whole(BertForSequenceClassification, folder, *more) for more in ((), (tmp_path / "nf4",)))
    (ids,) = rows_of(folder, given["text"], 200)
    with torch.no_grad():
        first, second = (model.bert(ids).last_hidden_state[0].double().mean(0) for model in (one, two))
    assert lost == pytest.approx(1 - float(torch.nn.functional.cosine_similarity(first, second, dim=0)), rel=1e-2)


def test_int8_loses_less_than_4_bits_and_the_command_says_so(forked_qz: Qz, tmp_path: Path) -> None:
    folder = model_folder("llama-untied", tmp_path / "model")
    found = {}
    for method in (api.Nf4(), api.Int8()):
        api.quantize(folder, tmp_path / method.name, method=method, device="cpu")
        done = forked_qz("compare", "model", method.name, "--json", "--quiet", "--device", "cpu")
        assert done.returncode == 0, done.stderr
        found[method.name] = json.loads(done.stdout)
    assert 0 < found["int8"]["kl"] < found["nf4"]["kl"]
    assert found["nf4"]["text"] == "default"
    page = (Path(__file__).parent.parent / "docs/reference/json.md").read_text()
    assert all(f"`{key}`" in page for key in found["nf4"])
    shown = forked_qz("compare", "model", "nf4", "--device", "cpu")
    assert "KL divergence" in shown.stdout
    assert "perplexity" in shown.stdout


def test_what_cannot_be_compared_is_refused_by_name(tmp_path: Path) -> None:
    folder, other = model_folder("llama-untied", tmp_path / "model"), model_folder("llama-odd", tmp_path / "odd")
    api.quantize(folder, tmp_path / "nf4", device="cpu")
    with pytest.raises(Unsupported, match="is not quantized"):
        api.compare(folder, folder, device="cpu")
    with pytest.raises(Unsupported, match="already quantized"):
        api.compare(tmp_path / "nf4", tmp_path / "nf4", device="cpu")
    with pytest.raises(MalformedInput, match="is not the original"):
        api.compare(other, tmp_path / "nf4", device="cpu")
    with pytest.raises(UsageError, match="not a number of tokens"):
        api.compare(folder, tmp_path / "nf4", tokens=0)
    with pytest.raises(MissingInput):
        api.compare(folder, tmp_path / "absent")
