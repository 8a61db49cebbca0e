"""What the files beside a model name, and what those are loaded from: told exactly where the library cannot load it, or
loads something else without a word."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

import pipelines
from commands import run
from qz import MissingInput, api
from qz.cli.commands.dequantize import dequantize
from qz.cli.commands.quantize import quantize
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.libraries.companions.named_classes import needed_packages
from qz.quantize.libraries.companions.notes import notes_on_component, require_vocabulary
from qz.quantize.libraries.companions.tokenizer_classes import automatic_class, tokenizer_class

CANINE = "CanineTokenizer"
"""It makes a table of all of Unicode twice whenever it is loaded: seconds. ByT5's and Perceiver's are of bytes, too."""
ROOT = Path(transformers.__file__).parent
BASES = ("SentencePieceBackend", "PreTrainedTokenizerBase")
TEXT = "hello world, the quick brown fox jumps over the lazy dog"


def tokenizers_of_the_library() -> Iterator[type]:
    """Every tokenizer class that transformers defines."""
    files = [*(ROOT / "models").rglob("tokenization_*.py"), *ROOT.glob("tokenization_*.py")]
    for path in sorted(files):
        name = ".".join(("transformers", *path.relative_to(ROOT).with_suffix("").parts))
        try:
            module = import_module(name)
        except (ImportError, NameError):  # it needs a package that is not installed
            continue
        for found in vars(module).values():
            if inspect.isclass(found) and found.__module__ == name and issubclass(found, PreTrainedTokenizerBase):
                yield found


def knows_text(tokenizer: Any) -> bool:
    """Whether it has tokens for some of these letters, which are amino acids, too."""
    backend = getattr(tokenizer, "_tokenizer", None)
    if backend is None:
        tokens = tokenizer.tokenize("lag LAG")
    else:
        tokens = [backend.id_to_token(number) for number in backend.encode("lag LAG").ids]
    return any(token.strip("▁Ġ").removesuffix("</w>").lower() in ("l", "a", "g", "la", "ag", "lag") for token in tokens)


def saved(kind: str, folder: Path, before: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)) -> Path:  # noqa: B008
    """A tokenizer.json of a kind of model, trained on a sentence; of BPE, its vocabulary and merges, too."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|endoftext|>"]
    if kind == "Unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer: Any = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer = before
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    made.train_from_iterator([TEXT], trainer)
    made.save(str(folder / "tokenizer.json"))
    if kind == "BPE":
        made.model.save(str(folder))
    return folder


@pytest.mark.parametrize("left_out", [[CANINE], pytest.param([], marks=pytest.mark.soak)])
def test_a_tokenizer_without_a_vocabulary_is_told_for_every_class_that_needs_one(
    tmp_path: Path, left_out: list[str]
) -> None:
    """In its folder is its config alone. The library loads it with its special tokens, or raises; what it loads with a
    vocabulary of its own, such as one of bytes, is not told."""
    (tmp_path / "tokenizer_config.json").write_text("{}")
    wrong, seen = [], set()
    for found in tokenizers_of_the_library():
        if found.__name__ in left_out:
            continue
        try:
            knows = knows_text(found.from_pretrained(tmp_path))  # type: ignore[attr-defined]
        except Exception:
            knows = False
        as_told = tokenizer_class(found.__name__)
        seen.add(knows)
        if found.__name__ not in ("SentencePieceBackend", "PreTrainedTokenizerBase") and (
            as_told is None or as_told.is_without([]) == knows
        ):
            wrong.append((found.__name__, knows, as_told))
    assert wrong == []
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["CLIPTokenizer", "GPT2TokenizerFast", "RobertaTokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("files", [["vocab.json"], ["merges.txt"], ["vocab.json", "merges.txt"], ["tokenizer.json"]])
def test_half_of_a_vocabulary_is_none(name: str, files: list[str], tmp_path: Path) -> None:
    source = saved("BPE", tmp_path / "made")
    (tmp_path / "there").mkdir()
    for file in files:
        shutil.copy(source / file, tmp_path / "there")
    try:
        loads = knows_text(getattr(transformers, name).from_pretrained(tmp_path / "there"))
    except ValueError:
        loads = False
    found = tokenizer_class(name)
    assert found is not None
    assert loads == (len(files) == 2 or files == ["tokenizer.json"]) == (not found.is_without(files))


NAMED = (None, "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", "BertTokenizer", "NoSuchTokenizer")
TYPES = ["llama", "qwen2", "qwen3", "bert", "mistral", "phi3", "gemma2", "gpt2", "t5", "clip", "modernbert", "glm4",
         "roberta", "perceiver", "electra", "no_such_type", pytest.param("canine", marks=pytest.mark.soak)]  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_the_automatic_class_is_the_one_of_the_library(model_type: str, tmp_path: Path) -> None:
    registered = TOKENIZER_MAPPING_NAMES.get(model_type)
    for number, named in enumerate((*NAMED, registered, registered and f"{registered}Fast")):
        expected = tokenizer_class(automatic_class(named, model_type))
        assert expected is not None
        made = getattr(transformers, expected.name).model if expected.is_fast else None
        kind = "Unigram" if made is models.Unigram else "BPE"
        folder = saved(kind, tmp_path / f"{number}", pre_tokenizers.Metaspace())
        shutil.copy(folder / "vocab.json", folder / "vocab.txt") if kind == "BPE" else None
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named} if named else {}))
        assert type(AutoTokenizer.from_pretrained(folder)).__name__ == expected.name, (model_type, named)


def test_names_of_earlier_versions_stand_for_the_classes_of_the_library() -> None:
    for name in ("ElectraTokenizerFast", "LEDTokenizer", "Phi3Tokenizer", "BartTokenizerFast", "MobileBertTokenizer",
                 "T5TokenizerFast", "BertTokenizerFast", "PreTrainedTokenizerFast"):  # fmt: skip
        found = tokenizer_class(name)
        assert found is not None
        assert found.name == getattr(transformers, name).__name__
    assert tokenizer_class("NoSuchTokenizer") is None
    assert tokenizer_class("x" * 5000) is None
    assert tokenizer_class("../etc") is None


# --- a model --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "chat"
    made = saved("BPE", folder.with_name("tokenizer"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(made / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(chat: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chat, tmp_path / "model"))


def rewrite(path: Path, **entries: Any) -> None:
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**held, **entries}))


def told(source: Path, kind: str) -> list[str]:
    """The warnings of a dry run that ``qz inspect`` gives as problems of that kind, word for word."""
    warnings = run(quantize, source, output=source.with_name("out"), dry_run=True)["warnings"]
    problems = [each for each in api.inspect(source).problems if each.kind == kind]
    assert all(each.severity == "warning" for each in problems)
    texts = [each.message.removeprefix(f"{source}/").removesuffix(".") for each in problems]
    assert set(texts) <= set(warnings)
    assert [each for each in warnings if each.startswith(tuple(problem.where for problem in problems) or "\0")] == texts
    return texts


def without_vocabulary(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def with_an_empty_vocabulary(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"")


def announced_by_its_special_tokens(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").rename(model / "special_tokens_map.json")


def with_a_second_one(model: Path) -> None:
    (model / "decoder_tokenizer").mkdir()
    (model / "decoder_tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')


@pytest.mark.parametrize(
    ("change", "where", "files"),
    [
        (without_vocabulary, "tokenizer_config.json", "tokenizer.json, or tokenizer.model"),
        (with_an_empty_vocabulary, "tokenizer_config.json", "tokenizer.json, or tokenizer.model"),
        (announced_by_its_special_tokens, "special_tokens_map.json", "tokenizer.json, or tokenizer.model"),
        (with_a_second_one, "decoder_tokenizer/tokenizer_config.json", "tokenizer.json, or spiece.model"),
    ],
)
def test_a_model_whose_tokenizer_has_no_vocabulary_is_quantized_with_a_warning(
    change: Callable[[Path], None], where: str, files: str, model: Path, tmp_path: Path
) -> None:
    change(model)
    (text,) = told(model, "tokenizer-vocabulary")
    assert text.startswith(f"{where}: no file beside it holds the vocabulary of ")
    assert f"({files})" in text
    run(quantize, model, output=tmp_path / "nf4")
    assert text in run(dequantize, tmp_path / "nf4", output=tmp_path / "back")["warnings"]
    without = run(quantize, model, output=tmp_path / "out", dry_run=True, weights_only=True)
    assert text not in without["warnings"]


def weights_alone(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()


def of_bytes(model: Path) -> None:
    without_vocabulary(model)
    rewrite(model / "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")


def of_code(model: Path) -> None:
    without_vocabulary(model)
    rewrite(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})


def of_an_unknown_class(model: Path) -> None:
    rewrite(model / "tokenizer_config.json", tokenizer_class="OwnTokenizer")


def of_tekken(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "tekken.json")


def of_a_version(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "tokenizer.4.0.json")
    rewrite(model / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.json"])


@pytest.mark.parametrize("change", [weights_alone, of_bytes, of_code, of_an_unknown_class, of_tekken, of_a_version])
def test_a_tokenizer_that_is_there_or_needs_no_file_is_not_told(change: Callable[[Path], None], model: Path) -> None:
    change(model)
    assert told(model, "tokenizer-vocabulary") == []


def test_a_tokenizer_of_a_version_goes_along(model: Path, tmp_path: Path) -> None:
    """The library takes the file of the newest version that it knows."""
    of_a_version(model)
    run(quantize, model, output=tmp_path / "out")
    assert knows_text(AutoTokenizer.from_pretrained(tmp_path / "out"))


# --- classes in a processor's files --------------------------------------------------------------------------------
def test_the_classes_of_the_library_are_found_under_todays_and_yesterdays_names() -> None:
    names = {name for each in IMAGE_PROCESSOR_MAPPING_NAMES.values() for name in each.values() if name}
    names |= {f"{name}Fast" for name in names if name.endswith("ImageProcessor")}
    names |= {name for each in VIDEO_PROCESSOR_MAPPING_NAMES.values() for name in (each or {}).values() if name}
    names |= {*FEATURE_EXTRACTOR_MAPPING_NAMES.values(), *PROCESSOR_MAPPING_NAMES.values()}
    lost = sorted(name for name in names if hasattr(transformers, name) and needed_packages(name) is None)
    assert lost == []


def test_an_image_processor_or_feature_extractor_is_told_exactly_where_the_library_does_not_load_it(
    tmp_path: Path,
) -> None:
    """Without torchvision, too, which some need, and for others of which there is another class."""
    images = {name for each in IMAGE_PROCESSOR_MAPPING_NAMES.values() for name in each.values() if name}
    images |= {f"{name}Fast" for name in images if name.endswith("ImageProcessor")}
    named: list[tuple[str, str, Any]] = [("image_processor_type", name, AutoImageProcessor) for name in images]
    named += [
        ("feature_extractor_type", name, AutoFeatureExtractor) for name in FEATURE_EXTRACTOR_MAPPING_NAMES.values()
    ]
    wrong = []
    for key, name, automatic in named:
        (tmp_path / IMAGES).write_text(json.dumps({key: name}))
        try:
            automatic.from_pretrained(tmp_path)
            loads = True
        except (ImportError, ValueError, OSError):
            loads = False
        notes = notes_on_component(LocalFolder(tmp_path), "transformers", "OwnProcessor")
        if (not notes) != loads:
            wrong.append((name, loads, notes))
    assert wrong == []


IMAGES = "preprocessor_config.json"


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        (IMAGES, {"image_processor_type": "ImageProcessorOfTomorrow"}),
        (IMAGES, {"feature_extractor_type": "FeatureExtractorOfTomorrow"}),
        (IMAGES, {"processor_class": "ProcessorOfTomorrow", "image_processor_type": "CLIPImageProcessor"}),
        ("processor_config.json", {"image_processor": {"image_processor_type": "ImageProcessorOfTomorrow"}}),
        ("video_preprocessor_config.json", {"video_processor_type": "VideoProcessorOfTomorrow"}),
        ("tokenizer_config.json", {"processor_class": "ProcessorOfTomorrow"}),
    ],
)
def test_a_class_of_a_processor_that_the_library_does_not_have_is_told(
    file: str, entries: dict[str, Any], model: Path
) -> None:
    rewrite(model / file, **entries)
    (text,) = told(model, "companion-class")
    assert text.startswith(f"{file}: it names ")
    assert f"OfTomorrow, which transformers {transformers.__version__} does not have" in text


@pytest.mark.parametrize(
    "entries",
    [
        {"image_processor_type": "CLIPImageProcessor"},
        {"image_processor_type": "ViTImageProcessorFast"},
        {"feature_extractor_type": "ViTFeatureExtractor"},
        {"feature_extractor_type": "CLIPFeatureExtractor", "image_processor_type": "CLIPImageProcessor"},
        {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "image_processing_own.Own"}},
    ],
)
def test_a_class_that_the_library_finds_or_that_is_code_is_not_told(entries: dict[str, Any], model: Path) -> None:
    rewrite(model / IMAGES, **entries)
    assert told(model, "companion-class") == []
    if "auto_map" not in entries:
        AutoImageProcessor.from_pretrained(model)


# --- a pipeline ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.flux(tmp_path_factory.mktemp("pipelines") / "flux")


@pytest.fixture
def pipeline(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "pipeline"))


def test_a_pipeline_whose_tokenizer_has_no_vocabulary_is_refused(pipeline: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (pipeline / "tokenizer" / name).unlink()
    loaded = diffusers.FluxPipeline.from_pretrained(pipeline)
    assert not knows_text(loaded.tokenizer)  # and not a word
    why = r"tokenizer has no vocabulary \(tokenizer.json, or vocab.json and merges.txt\), which CLIPTokenizer is loaded"
    with pytest.raises(MissingInput, match=why):
        run(quantize, pipeline, output=tmp_path / "out", dry_run=True)
    (error,) = api.inspect(pipeline).errors
    assert (error.kind, error.where) == ("component-missing", "tokenizer")


OTHERS = [
    ("T5TokenizerFast", "CLIPTokenizer", True),
    ("CLIPTokenizer", "T5TokenizerFast", True),
    ("T5TokenizerFast", "BertTokenizer", True),
    ("T5TokenizerFast", "T5Tokenizer", False),
    ("T5Tokenizer", "T5TokenizerFast", False),
    ("T5TokenizerFast", "PreTrainedTokenizerFast", False),
    ("T5TokenizerFast", "TokenizersBackend", False),
    ("PreTrainedTokenizerFast", "T5Tokenizer", False),
    ("BertTokenizer", "ElectraTokenizerFast", False),
    ("T5TokenizerFast", "OwnTokenizer", False),
    ("T5TokenizerFast", None, False),
]


@pytest.mark.parametrize(("named", "own", "differs"), OTHERS)
def test_a_tokenizer_of_another_class_than_the_index_names_is_told(
    named: str, own: str | None, differs: bool, pipeline: Path
) -> None:
    rewrite(pipeline / "model_index.json", tokenizer_2=["transformers", named])
    settings = json.loads((pipeline / "tokenizer_2" / "tokenizer_config.json").read_text())
    (pipeline / "tokenizer_2" / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": own} if own else {})
    )
    texts = told(pipeline, "companion-class")
    assert len(texts) == differs
    assert all(f"made for {own}, but model_index.json names {named}, by whose rules" in text for text in texts)


def test_diffusers_reads_a_tokenizer_by_the_rules_of_the_class_in_the_index(tmp_path: Path) -> None:
    """Which is why another class in the tokenizer's own config is told: its tokens are others, or it breaks."""
    folder = saved("BPE", tmp_path / "bpe")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    right = transformers.GPT2Tokenizer.from_pretrained(folder)("hello world")["input_ids"]
    assert transformers.CLIPTokenizer.from_pretrained(folder)("hello world")["input_ids"] != right
    with pytest.raises(TypeError):
        transformers.T5Tokenizer.from_pretrained(folder)
    assert transformers.PreTrainedTokenizerFast.from_pretrained(folder)("hello world")["input_ids"] == right


@pytest.mark.parametrize(
    ("named", "entries", "differs"),
    [
        ("CLIPImageProcessor", {"image_processor_type": "SiglipImageProcessor"}, True),
        ("CLIPImageProcessor", {"image_processor_type": "CLIPImageProcessorFast"}, False),
        ("CLIPFeatureExtractor", {"image_processor_type": "CLIPImageProcessor"}, False),
        ("CLIPImageProcessor", {"feature_extractor_type": "CLIPFeatureExtractor"}, False),
        ("CLIPImageProcessor", {}, False),
    ],
)
def test_an_image_processor_of_another_class_than_the_index_names_is_told(
    named: str, entries: dict[str, Any], differs: bool, tmp_path: Path
) -> None:
    CLIPImageProcessor().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / IMAGES).read_text())
    del settings["image_processor_type"]
    (tmp_path / IMAGES).write_text(json.dumps({**settings, **entries}))
    assert len(notes_on_component(LocalFolder(tmp_path), "transformers", named)) == differs


def test_a_processors_inner_classes_and_vocabulary_are_told(tmp_path: Path) -> None:
    rewrite(tmp_path / IMAGES, image_processor_type="ImageProcessorOfTomorrow")
    folder = LocalFolder(tmp_path)
    (note,) = notes_on_component(folder, "transformers", "CLIPProcessor")
    assert note.as_text("processor/").startswith(
        "processor/preprocessor_config.json: it names ImageProcessorOfTomorrow"
    )
    require_vocabulary(folder, "transformers", "CLIPProcessor")
    rewrite(tmp_path / "tokenizer_config.json", tokenizer_class="CLIPTokenizer")
    with pytest.raises(MissingInput, match=r"vocab\.json and merges\.txt"):
        require_vocabulary(LocalFolder(tmp_path), "transformers", "CLIPProcessor")
