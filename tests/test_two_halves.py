"""A pipeline in two repositories, the second named by the card of the first: the advice makes both load as one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, get_class_obj_and_candidates
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

import qz.api
from commands import run
from qz import Unsupported
from qz.cli.commands.quantize import quantize
from qz.quantize.libraries.diffusers.component_classes import class_notes
from whole_zoo.case import seed
from whole_zoo.components import build_components


def saved(pipeline_class: Any, folder: Path) -> Any:
    seed(pipeline_class.__name__)
    made = pipeline_class(**build_components(pipeline_class, folder.with_name(f"{folder.name}-files"), {}))
    made.save_pretrained(folder)
    return made


@pytest.fixture(autouse=True)
def quantized_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers refuses that in one place, and computes where it is left out."""
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda _, given: given or {"": "cpu"})


def has_4_bit(model: torch.nn.Module) -> bool:
    return any(isinstance(module, Linear4bit) for module in model.modules())


def test_with_the_card_that_the_warning_tells_to_copy_the_other_half_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card names a repository; a folder of that name here stands for it, as from_pretrained takes both."""
    monkeypatch.chdir(tmp_path)
    Path("community").mkdir()
    saved(diffusers.KandinskyV22PriorPipeline, Path("community/prior"))
    saved(diffusers.KandinskyV22Pipeline, Path("community/decoder"))
    Path("community/decoder/README.md").write_text("---\nlicense: mit\nprior:\n- community/prior\n---\n# A half\n")
    told = "\n".join(run(quantize, "community/decoder", output=Path("out"))["warnings"])
    (card,) = re.findall(r"copy (\S+) into the output", told)
    shutil.copy(Path("community/decoder") / card, "out")
    whole = diffusers.KandinskyV22CombinedPipeline.from_pretrained("out", torch_dtype=torch.bfloat16)
    assert has_4_bit(whole.unet)
    assert type(whole.prior_prior).__name__ == "PriorTransformer"


def test_components_that_diffusers_no_longer_finds_are_put_together_as_the_warning_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wuerstchen's classes moved to a folder of what is given up, where model_index.json does not lead, and nobody has
    a tokenizer of tomorrow: the output is as good as the source."""
    monkeypatch.chdir(tmp_path)
    made = saved(diffusers.WuerstchenPriorPipeline, Path("source"))
    index = json.loads(Path("source/model_index.json").read_text())
    index["tokenizer"][1] = "TokenizerOfTomorrow"
    Path("source/model_index.json").write_text(json.dumps(index))
    (told,) = run(quantize, "source", output=Path("out"))["warnings"]
    assert re.search(r"tokenizer: transformers \S+ has no TokenizerOfTomorrow", told)
    assert "component-class" in {problem.kind for problem in qz.api.inspect("source").problems}
    with pytest.raises(ValueError, match=r"WuerstchenPrior|TokenizerOfTomorrow"):
        diffusers.WuerstchenPriorPipeline.from_pretrained("source")
    with pytest.raises(Unsupported, match="TokenizerOfTomorrow"):
        qz.load("out")
    (name,) = re.findall(r"load each component by itself, and make (\w+)\(…\) of them", told)
    parts = {name: type(part).from_pretrained(Path("out") / name) for name, part in made.components.items()}
    assert has_4_bit(getattr(diffusers, name)(**parts).prior)


NAMED = [
    ("transformers", "CLIPTokenizer"), ("transformers", "T5TokenizerFast"), ("transformers", "NoSuchTokenizer"),
    ("transformers", "FNetTokenizer"), ("transformers", "SiglipTokenizer"), ("transformers", "AutoTokenizer"),
    ("transformers", "PreTrainedTokenizerFast"), ("transformers", "DDIMScheduler"), ("transformers", "CLIPTextConfig"),
    ("transformers", "CLIPFeatureExtractor"), ("transformers", "MCTCTFeatureExtractor"),
    ("transformers", "SiglipImageProcessor"), ("transformers", "SiglipImageProcessorFast"),
    ("transformers", "Qwen2VLVideoProcessor"), ("transformers", "MusicgenMelodyFeatureExtractor"),
    ("transformers", "T5EncoderModel"), ("transformers", "T5OfTomorrow"), ("transformers", "x" * 5000),
    ("diffusers", "DDIMScheduler"), ("diffusers", "DPMSolverSDEScheduler"), ("diffusers", "LMSDiscreteScheduler"),
    ("diffusers", "NoSuchScheduler"), ("diffusers", "CLIPTokenizer"), ("diffusers", "AutoGuidance"),
    ("diffusers", "AutoModel"), ("kolors", "ChatGLMTokenizer"), ("kolors", "NoSuchTokenizer"),
    ("tokenization_chatglm", "ChatGLMTokenizer"), ("sentence_transformers", "SentenceTransformer"),
    ("x" * 5000, "Tokenizer"), ("../../..", "Tokenizer"), ("a\0b", "Tokenizer"), ("", "Tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize(("library", "class_name"), NAMED, ids=lambda name: name[:40])
def test_a_class_is_told_exactly_where_diffusers_does_not_load_it(library: str, class_name: str) -> None:
    told = class_notes("FluxPipeline", {"part": (library, class_name)})
    assert bool(told) == (not loads(library, class_name)), told
    assert all(len(each) < 600 and "part" in each for each in told)


def loads(library: str, class_name: str) -> bool:
    """Whether diffusers finds a class that it knows how to load, as ``load_sub_model`` does."""
    of_a_pipeline = hasattr(diffusers.pipelines, library)
    try:
        found, bases = get_class_obj_and_candidates(
            library, class_name, ALL_IMPORTABLE_CLASSES, diffusers.pipelines, of_a_pipeline
        )
    except (AttributeError, ValueError):
        return False
    return any(base is not None and issubclass(found, base) for base in bases.values()) and not hasattr(
        found, "_backends"
    )
