"""What goes along with a quantized model, so that it works wherever the original did, and what never does."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import pipelines
from commands import contents, run
from hub_server import connected
from qz import IOFailed, MalformedInput, api
from qz.cli.commands.dequantize import dequantize
from qz.cli.commands.quantize import quantize
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output import companions, copying, file_names
from qz.formats.output.section import Section
from qz.formats.output.staging import Staging
from qz.formats.output.storage.disk import Disk

TEXT = "The quick brown fox jumps over the lazy dog. Small boats on a blue lake."
TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"

GOES = """
tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt vocab.txt
tokenizer.model spiece.model sentencepiece.bpe.model spm.model source.spm target.spm qwen.tiktoken tekken.json
tokenizer.4.0.json tokenizer.model.v3 tiktoken.model preprocessor_config.json processor_config.json
video_preprocessor_config.json chat_template.jinja
chat_template.json generation_config.json LICENSE LICENSE.md LICENSE.txt LICENCE license.txt LICENSE-MODEL
MODEL_LICENSE.md NOTICE NOTICE.txt Notice USE_POLICY.md COPYING bpe.codes normalizer.json modules.json
config_sentence_transformers.json sentence_bert_config.json
""".split()  # noqa: SIM905  a list of names reads better so
STAYS = """
README.md modeling_my.py tokenization_my.py LICENSE.py LICENSE.bin NOTICE.pkl pytorch_model.bin model.pt
optimizer.pt training_args.bin model.safetensors.bak tf_model.h5 flax_model.msgpack model.onnx model-Q4.gguf
tokenizer.pkl my.model rng_state.pth trainer_state.json original.safetensors image.jpg .gitattributes .env
handler.py requirements.txt events.out adapter_config.json adapter_model.safetensors model.fp16.safetensors
consolidated.00.pth params.json tokenizer.json.py
""".split()  # noqa: SIM905  a list of names reads better so

OF_A_COMPONENT = ("my.model", "params.json", "adapter_config.json")
"""Data that nobody reads beside a model, but that the class of a component without weights may read."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model as people publish it: with tokenizer, templates, licence, card, code, other weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "chat"
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel()
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE + "{{ tools }}"}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("LICENSE", "NOTICE.txt", "README.md", "modeling_my.py", "model-Q4.gguf"):
        (folder / name).write_text(name)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"other weights")
    return folder


@pytest.mark.parametrize("name", GOES)
def test_goes_along(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    assert [each.name for each in companions.companions(LocalFolder(tmp_path))] == [name]


@pytest.mark.parametrize("name", STAYS)
def test_stays_behind(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    assert not companions.companions(LocalFolder(tmp_path))
    settings = [each.name for each in companions.settings(LocalFolder(tmp_path))]
    assert settings == ([name] if name in OF_A_COMPONENT else [])


def test_every_tokenizer_file_that_transformers_knows_goes_along() -> None:
    import transformers

    package = Path(transformers.__file__).parent
    names: set[str] = set()
    for path in package.rglob("tokenization_*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", path.read_text(), re.DOTALL):
            names |= set(re.findall(r':\s*"([^"]+)"', table))
    utils = importlib.import_module("transformers.utils")
    names |= {utils.FEATURE_EXTRACTOR_NAME, utils.PROCESSOR_NAME, utils.VIDEO_PROCESSOR_NAME, utils.CHAT_TEMPLATE_FILE}
    assert len(names) > 20
    allowed = (file_names.TOKENIZER, file_names.PROCESSOR)
    assert not {name for name in names if not any(pattern.fullmatch(name) for pattern in allowed)}


def test_the_output_works_as_the_repository_did(repository: Path, tmp_path: Path) -> None:
    report = run(quantize, repository, output=tmp_path / "out")
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (repository, tmp_path / "out"))
    assert one(TEXT).input_ids == other(TEXT).input_ids
    messages = [{"role": "user", "content": "boats?"}]
    for template in (None, "tool_use"):
        texts = [each.apply_chat_template(messages, chat_template=template, tokenize=False) for each in (one, other)]
        assert texts[0] == texts[1] != ""
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert model.generation_config.max_new_tokens == 5
    assert {"LICENSE", "NOTICE.txt", "tokenizer.json", "additional_chat_templates/tool_use.jinja"} <= set(
        report["carried"]
    )


def test_what_goes_along_is_unchanged_and_the_rest_stays_behind(repository: Path, tmp_path: Path) -> None:
    report = run(quantize, repository, output=tmp_path / "out")
    source, output = contents(repository), contents(tmp_path / "out")
    assert all(output[name] == source[name] for name in report["carried"])
    assert output.keys() - set(report["carried"]) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qz.json",
    }
    left = {"README.md", "modeling_my.py", "model-Q4.gguf", "pytorch_model.bin", "original/consolidated.safetensors"}
    assert source.keys() - output.keys() == left


def test_weights_only_writes_the_model_alone(repository: Path, tmp_path: Path) -> None:
    report = run(quantize, repository, output=tmp_path / "out", weights_only=True)
    assert report["carried"] == []
    written = {"config.json", "generation_config.json", "model.safetensors", "qz.json"}
    assert contents(tmp_path / "out").keys() == written


def test_the_way_back_carries_too(repository: Path, tmp_path: Path) -> None:
    run(quantize, repository, output=tmp_path / "out")
    report = run(dequantize, tmp_path / "out", output=tmp_path / "back")
    assert set(report["carried"]) == {name for name in contents(tmp_path / "back") if name not in (
        "config.json", "generation_config.json", "model.safetensors", "qz.json")}  # fmt: skip
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(TEXT).input_ids


def test_the_sizes_reported_are_those_of_the_model(repository: Path, tmp_path: Path) -> None:
    with_them = run(quantize, repository, output=tmp_path / "one")
    without = run(quantize, repository, output=tmp_path / "other", weights_only=True)
    for key in ("bytes", "bits_per_weight", "memory_footprint", "shards"):
        assert with_them[key] == without[key]


def test_a_dry_run_lists_what_would_go_along(repository: Path, tmp_path: Path) -> None:
    planned = run(quantize, repository, output=tmp_path / "out", dry_run=True)
    done = run(quantize, repository, output=tmp_path / "out")
    assert planned["carried"] == done["carried"]


def test_a_component_takes_the_licence_of_its_repository_along(repository: Path, tmp_path: Path) -> None:
    root = tmp_path / "repository"
    root.mkdir()
    (root / "LICENSE.md").write_text("of the whole")
    (root / "tokenizer.json").write_text("{}")
    shutil.copytree(repository, root / "part")
    report = run(quantize, root, subfolder="part", output=tmp_path / "out")
    assert "LICENSE.md" in report["carried"]
    assert (tmp_path / "out" / "LICENSE.md").read_text() == "of the whole"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (repository / "tokenizer.json").read_bytes()


def test_the_modules_of_sentence_transformers_go_along(tmp_path: Path) -> None:
    for name in ("1_Pooling", "2_Dense", "onnx", "openvino"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text("weights")
        (tmp_path / name / "pytorch_model.bin").write_text("pickle")
    assert not companions.companions(LocalFolder(tmp_path))
    (tmp_path / "modules.json").write_text("[]")
    names = {each.name for each in companions.companions(LocalFolder(tmp_path))}
    assert names == {
        "modules.json", "1_Pooling/config.json", "1_Pooling/model.safetensors", "2_Dense/config.json",
        "2_Dense/model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a\nb.json", "\u202etxt.json", "a\udcff.json"])
def test_a_name_that_no_output_may_have_is_told_before_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / name).write_text("{}")
    with pytest.raises(MalformedInput, match=r"a name that no output may have.* Rename the file, or remove it\."):
        companions.companions(LocalFolder(tmp_path))


def test_links_out_of_the_folder_do_not_go_along(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the user")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    (folder / "additional_chat_templates").symlink_to(tmp_path, target_is_directory=True)
    try:
        found = companions.companions(LocalFolder(folder))
    except MalformedInput:
        return
    assert not found


def carried(folder: LocalFolder, name: str) -> companions.Companion:
    return companions.Companion(folder, name, name, folder.sizes()[name])


def copied_and_stopped(output: Path, those: list[companions.Companion]) -> None:
    """A run that copies and then ends without a commit."""
    with Staging(output, {}, needed=0) as staging:
        copying.copy(those, Section(staging, "part"))
    assert not output.exists()


def test_a_file_that_changes_while_it_is_copied_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model" / "tokenizer.model"
    path.parent.mkdir()
    path.write_bytes(b"a" * 10_000_000)
    folder = LocalFolder(path.parent)
    done: list[int] = []

    def change(nbytes: int) -> None:
        if not done:
            path.write_bytes(b"b" * 10_000_000)
        done.append(nbytes)

    with Staging(tmp_path / "out", {}, needed=0) as staging, pytest.raises(MalformedInput, match="changed"):
        copying.copy([carried(folder, "tokenizer.model")], Section(staging, ""), change)
    assert sum(done) == 10_000_000
    assert not (tmp_path / "out").exists()


def test_large_copies_are_kept_for_the_next_run_and_small_ones_are_made_again(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(bytes(range(256)) * 8_000)
    (source / "vocab.txt").write_bytes(b"small")
    folder = LocalFolder(source)
    both = [carried(folder, "tokenizer.model"), carried(folder, "vocab.txt")]
    copied_and_stopped(tmp_path / "out", both)
    renamed: list[str] = []
    watched = Disk(hook=lambda operation, path: renamed.append(path) if operation == "rename" else None)
    copied: list[int] = []
    with Staging(tmp_path / "out", {}, needed=0, disk=watched) as staging:
        assert staging.resumed
        copying.copy(both, Section(staging, "part"), copied.append)
        staging.write_file("config.json", b"{}")
        staging.commit()
    assert copied == [5]
    assert not any(path.endswith("tokenizer.model") for path in renamed)
    assert contents(tmp_path / "out").keys() == {"part/tokenizer.model", "part/vocab.txt", "config.json", "qz.json"}
    assert (tmp_path / "out" / "part" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_a_copy_that_was_damaged_between_two_runs_is_found(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(bytes(range(256)) * 8_000)
    folder = LocalFolder(source)
    copied_and_stopped(tmp_path / "out", [carried(folder, "tokenizer.model")])
    staged = tmp_path / "out.partial" / "part" / "tokenizer.model"
    staged.write_bytes(b"x" + staged.read_bytes()[1:])
    with Staging(tmp_path / "out", {}, needed=0) as staging:
        copying.copy([carried(folder, "tokenizer.model")], Section(staging, "part"))
        with pytest.raises(IOFailed, match="damaged"):
            staging.commit()
    assert not (tmp_path / "out").exists()


def test_a_repository_on_the_hub_is_carried_over_by_its_hashes(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(quantize, repository, output=tmp_path / "local")
    with connected(monkeypatch, tmp_path / "home") as hub:
        hub.add("me/chat", contents(repository))
        run(quantize, "me/chat", output=tmp_path / "hub")
    one, other = contents(tmp_path / "local"), contents(tmp_path / "hub")
    assert {name for name in one | other if one.get(name) != other.get(name)} == {"qz.json"}


def test_the_record_holds_no_path_of_this_machine(repository: Path, tmp_path: Path) -> None:
    run(quantize, repository, output=tmp_path / "out")
    record: dict[str, Any] = json.loads((tmp_path / "out" / "qz.json").read_text())
    assert str(repository.parent) not in json.dumps(record)
    assert record["about"]["source"]["location"] == "chat"


def test_the_record_is_the_same_for_a_copy_of_the_source_elsewhere(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository, tmp_path / "elsewhere" / "chat")
    run(quantize, repository, output=tmp_path / "one")
    run(quantize, tmp_path / "elsewhere" / "chat", output=tmp_path / "other")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 466062\n"
DAMAGED = {
    "a pointer": (
        "tokenizer.json",
        POINTER,
        r"tokenizer\.json is a Git-LFS pointer, not the file\. Run `git lfs pull`",
    ),
    "a pointer to what is no JSON": ("tokenizer.model", POINTER, r"tokenizer\.model is a Git-LFS pointer"),
    "empty": ("tokenizer_config.json", "", r"tokenizer_config\.json is not valid JSON"),
    "cut off": ("tokenizer_config.json", '{"tokenizer_class": "Llama', r"tokenizer_config\.json is not valid JSON"),
    "large and cut off": ("tokenizer.json", '{"a": "' + "x" * 300_000, r"tokenizer\.json is not valid JSON"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_would_be_copied_damaged_is_refused(name: str, repository: Path, tmp_path: Path) -> None:
    """No loader reads it; with the weights alone the same run is possible."""
    file, text, told = DAMAGED[name]
    source = Path(shutil.copytree(repository, tmp_path / "source"))
    (source / file).write_text(text)
    with pytest.raises(MalformedInput, match=told):
        run(quantize, source, output=tmp_path / "out", dry_run=True)
    (error,) = api.inspect(source).errors
    assert (error.where, re.search(told, error.message) is not None) == (file, True)
    run(quantize, source, output=tmp_path / "out", dry_run=True, weights_only=True)


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_on_the_hub_is_refused(
    name: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its publisher has put it there: small files before the run, large ones as soon as they have come."""
    file, text, told = DAMAGED[name]
    with connected(monkeypatch, tmp_path / "home") as hub:
        hub.add("me/chat", {**contents(repository), file: text.encode()})
        small = len(text) < 100_000
        if small:
            with pytest.raises(MalformedInput, match=told):
                run(quantize, "me/chat", output=tmp_path / "out", dry_run=True)
        else:
            run(quantize, "me/chat", output=tmp_path / "out", dry_run=True)
        assert [error.where for error in api.inspect("me/chat").errors] == [file] * small
        with pytest.raises(MalformedInput, match=told):
            run(quantize, "me/chat", output=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_damage_inside_of_modules_and_components_is_found(tmp_path: Path) -> None:
    """A module's weights, a scheduler, a tokenizer: by the commands that would copy them, and by inspect."""
    torch.manual_seed(0)
    model = tmp_path / "sentences"
    BertModel(BertConfig(vocab_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        model
    )
    (model / "modules.json").write_text(json.dumps([{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]))
    (model / "2_Dense").mkdir()
    (model / "2_Dense" / "config.json").write_text("{}")
    whole = save({"linear.weight": torch.zeros(8, 64)})
    (model / "2_Dense" / "model.safetensors").write_bytes(whole[:-1])
    pipeline = pipelines.flux(tmp_path / "pipeline")
    (pipeline / "scheduler" / "scheduler_config.json").write_text('{"shift": ')
    for source, file, told in (
        (model, "2_Dense/model.safetensors", r"cut off, or no safetensors file\. Download it again"),
        (pipeline, "scheduler/scheduler_config.json", "not valid JSON"),
    ):
        with pytest.raises(MalformedInput, match=f"{file} is {told}"):
            run(quantize, source, output=tmp_path / "out", dry_run=True)
        assert [error.where for error in api.inspect(source).errors] == [file]
    (model / "2_Dense" / "model.safetensors").write_bytes(whole)
    run(quantize, model, output=tmp_path / "out")
    assert contents(tmp_path / "out")["2_Dense/model.safetensors"] == whole


def test_what_no_loader_reads_may_be_anything(repository: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(repository, tmp_path / "source"))
    (source / "results.json").write_text("")
    (source / "tokenizer_config.json").write_text('{"model_max_length": Infinity}')
    run(quantize, source, output=tmp_path / "out", dry_run=True)
