"""Python that loads a checkpoint by its library's own classes: for its card, and for the user who has just made it."""

from __future__ import annotations

import json
import keyword
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qz.formats.publish.model_card.escaping import python_string, torch_dtype

if TYPE_CHECKING:
    from qz.formats.publish.model_card.card_facts import CardFacts

_ENCODERS = re.compile(r"(text|image)_encoder")
_COMPONENTS = re.compile(r"(transformer|unet|vae|prior|decoder|controlnet|(text|image)_encoder)(_\d)?")
"""What folders of pipelines are called; any other folder of a repository says nothing of what is in it."""

_USUAL = {"ControlNet": None, "Adapter": None, "UNet": "unet", "Autoencoder": "vae", "Transformer": "transformer"}
"""By what is in its name, what pipelines call a model of a class; None for those that only some pipelines take."""


@dataclass(frozen=True, slots=True)
class OnHub:
    """A repository, perhaps a folder in it, and a revision that is not its main branch."""

    repo_id: str
    folder: str = ""
    revision: str | None = None

    def arguments(self) -> str:
        """Of ``from_pretrained``, for a model."""
        words = [python_string(self.repo_id)]
        words += [f"subfolder={python_string(self.folder)}"] if self.folder else []
        return ", ".join([*words, *self._at()])

    def downloaded(self) -> str:
        """An expression for the folder here, once it is downloaded."""
        only = [f"allow_patterns={python_string(self.folder + '/*')}"] if self.folder else []
        call = f"snapshot_download({', '.join([python_string(self.repo_id), *only, *self._at()])})"
        return f"{call} + {python_string('/' + self.folder)}" if self.folder else call

    def _at(self) -> list[str]:
        return [f"revision={python_string(self.revision)}"] if self.revision else []


@dataclass(frozen=True, slots=True)
class Here:
    """A folder on this machine, as the user would name it."""

    path: str
    gpu: bool
    """Whether there may be one."""

    def arguments(self) -> str:
        return json.dumps(self.path, ensure_ascii=False) if self.path.isprintable() else repr(self.path)


Place = OnHub | Here


def loading(facts: CardFacts, place: Place) -> list[str]:
    """Lines that load the checkpoint there as one object; by ``qz.load`` where the library cannot."""
    if facts.experts:
        return _by_qz(facts, place, "transformers cannot load quantized experts")
    if isinstance(place, Here) and not place.gpu and facts.library == "diffusers" and facts.methods:
        return _by_qz(facts, place, "diffusers loads quantized models on a GPU only")
    if facts.pipeline:
        return _pipeline(facts, place)
    name, variable = _class_of(facts), _component_of(facts, place) or "model"
    if facts.library == "diffusers":
        made = f"{name}.from_pretrained({place.arguments()}, {_dtype_argument(facts, place)})"
        return ["import torch", f"from {facts.module or 'diffusers'} import {name}", "", f"{variable} = {made}"]
    lines = [f"from {facts.module} import {name}"] if facts.module else []
    known = [*(["AutoTokenizer"] if facts.tokenizer else []), *([] if facts.module else [name])]
    lines += [f"from transformers import {', '.join(known)}"] if known else []
    lines.append("")
    lines.append(f'{variable} = {name}.from_pretrained({place.arguments()}, device_map="auto")')
    if facts.tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({place.arguments()})")
    return lines


def snippet(facts: CardFacts, place: OnHub) -> str:
    """The same for a card, where a component is loaded inside its pipeline."""
    variable = _component_of(facts, place)
    if facts.pipeline and not facts.experts:
        return "\n".join([*loading(facts, place), "pipeline.enable_model_cpu_offload()"])
    if facts.experts or variable is None:
        return "\n".join(loading(facts, place))
    name, dtype = _class_of(facts), _dtype(facts)
    key = "torch_dtype" if facts.library == "diffusers" else "dtype"
    # By its own class: ``DiffusionPipeline`` skips a class's optional components, such as Wan's transformers.
    around = facts.pipeline_class if _is_name(facts.pipeline_class or "") else "DiffusionPipeline"
    module = facts.module or facts.library
    imports = [f"from diffusers import {around}, {name}"]
    if module != "diffusers":
        imports = [f"from diffusers import {around}", f"from {module} import {name}"]
    return "\n".join(
        [
            "import torch",
            *imports,
            "",
            f"{variable} = {name}.from_pretrained({place.arguments()}, {key}={dtype})",
            f"pipeline = {around}.from_pretrained(",
            f"    {python_string(facts.base_model or 'owner/pipeline')}, {variable}={variable}, torch_dtype={dtype}",
            ")",
            "pipeline.enable_model_cpu_offload()",
        ]
    )


def _passed(facts: CardFacts) -> str:
    """Arguments for the components of a pipeline that the user has to bring."""
    return "".join(f", {name}={name}" for name in facts.lacking)


def _by_qz(facts: CardFacts, place: Place, why: str) -> list[str]:
    variable = "pipeline" if facts.pipeline else _component_of(facts, place) or "model"
    if isinstance(place, Here):
        return [f"import qz  # {why}", "", f"{variable} = qz.load({place.arguments()}{_passed(facts)})"]
    imports = [f"import qz  # {why}", "from huggingface_hub import snapshot_download"]
    return [*imports, "", f"{variable} = qz.load({place.downloaded()}{_passed(facts)})"]


def _pipeline(facts: CardFacts, place: Place) -> list[str]:
    """``DiffusionPipeline.from_pretrained`` knows no folders in a repository."""
    imports = ["import torch", "from diffusers import DiffusionPipeline"]
    where = place.arguments()
    if isinstance(place, OnHub) and place.folder:
        imports.append("from huggingface_hub import snapshot_download")
        where = place.downloaded()
    arguments = f"{where}{_passed(facts)}, {_dtype_argument(facts, place)}"
    return [*imports, "", f"pipeline = DiffusionPipeline.from_pretrained({arguments})"]


def _class_of(facts: CardFacts) -> str:
    return facts.architecture if _is_name(facts.architecture) else "AutoModel"


def _component_of(facts: CardFacts, place: Place) -> str | None:
    """What its pipeline calls it, if it belongs into one."""
    folder = place.folder.rsplit("/", 1)[-1] if isinstance(place, OnHub) else ""
    named = (facts.subfolder or "").rsplit("/", 1)[-1] or (folder if _COMPONENTS.fullmatch(folder) else "")
    if facts.library != "diffusers":
        return named if _ENCODERS.match(named) and _is_name(named) else None
    name = _class_of(facts)
    usual = next((variable for sign, variable in _USUAL.items() if sign in name), None)
    return named if _is_name(named) else usual


def _dtype_argument(facts: CardFacts, place: Place) -> str:
    """As diffusers 0.42 and later call it; who reads a card may have an older one, which takes no ``dtype``."""
    return f"{'dtype' if isinstance(place, Here) else 'torch_dtype'}={_dtype(facts)}"


def _dtype(facts: CardFacts) -> str:
    return torch_dtype(facts.compute_dtype or facts.dtype)


def _is_name(text: str) -> bool:
    """Whether Python takes it as a name of its own."""
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text)
