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
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

from commands import run
from qz.cli.quantize import quantize
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
    """Wuerstchen's classes moved to a folder of what is given up, where model_index.json does not lead."""
    monkeypatch.chdir(tmp_path)
    made = saved(diffusers.WuerstchenPriorPipeline, Path("source"))
    (told,) = run(quantize, "source", output=Path("out"))["warnings"]
    with pytest.raises(ValueError, match="WuerstchenPrior"):
        diffusers.WuerstchenPriorPipeline.from_pretrained("source")
    (name,) = re.findall(r"load each component by its class, and make (\w+)\(…\) of them", told)
    parts = {name: type(part).from_pretrained(Path("out") / name) for name, part in made.components.items()}
    assert has_4_bit(getattr(diffusers, name)(**parts).prior)


@pytest.mark.parametrize("library", ["x" * 5000, "../../..", "a\0b", ""])
def test_a_library_that_does_not_exist_is_told_whatever_its_name(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(diffusers.KandinskyV22Pipeline, Path("source"))
    index = json.loads(Path("source/model_index.json").read_text())
    index["scheduler"][0] = library
    Path("source/model_index.json").write_text(json.dumps(index))
    told = run(quantize, "source", output=Path("out"), dry_run=True)["warnings"]
    assert any("no longer finds DDPMScheduler (scheduler)" in each for each in told), told
