"""The models of a pipeline on the meta device, each with its weights to be read, and the pipeline around them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qz import Unsupported
from qz.formats.checkpoint.pipeline import Component, Pipeline, read_index
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.files.folder import PIPELINE_INDEX, Folder, read_file
from qz.quantize.calibration.pipelines import memory
from qz.quantize.calibration.running.text import MAX_TOKENIZER_BYTES
from qz.quantize.calibration.running.weights import Weights
from qz.quantize.libraries.diffusers.internals import optional_components
from qz.quantize.libraries.diffusers.runnable import runnable as of_diffusers
from qz.quantize.libraries.importing.boundary import library_errors
from qz.quantize.libraries.importing.isolation import isolated
from qz.quantize.libraries.plain import plain_checkpoint
from qz.quantize.libraries.transformers.classes import model_class_of
from qz.quantize.libraries.transformers.runnable import runnable as of_transformers
from qz.quantize.planning.dequantization import as_plain, quantized_weights

SETTINGS = (".json", ".txt", ".model", ".tiktoken", ".jinja")
"""Endings of the files of schedulers, tokenizers and processors; no code, and no pickles."""


@dataclass(frozen=True)
class Models:
    """A pipeline that can be run: ``weights`` has, by component, the model that reads them, too. ``left_out`` are the
    components that it draws without."""

    where: str
    pipeline: Any
    weights: Mapping[str, Weights]
    device: torch.device
    room: memory.Room
    left_out: tuple[str, ...] = ()
    read_again: list[Weights] = field(default_factory=list)
    """Models of their own in float32, for scores."""

    @property
    def class_name(self) -> str:
        return type(self.pipeline).__name__

    def model(self, component: str) -> Any:
        return self.weights[component].runnable.model

    def is_denoiser(self, component: str) -> bool:
        """Whether it is a model of diffusers: those are called to denoise, or to help with it."""
        return self.weights[component].checkpoint.library == "diffusers"

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(
            f"{name} has no part in this: no class for it can be run here, and {self.class_name} works without it"
            for name in self.left_out
        )

    @property
    def bytes_read(self) -> int:
        return sum(each.bytes_read for each in (*self.weights.values(), *self.read_again))

    def again(self, component: str) -> Weights:
        """A component in float32: bfloat16's own errors are larger than many a score."""
        found = weights_of(self.weights[component].checkpoint, torch.float32, self.device)
        self.read_again.append(found)
        return found

    def load(self, path: str, module: Any) -> None:
        """Give the module at ``path``, which begins with its component, its weights."""
        if path not in self.room.kept:
            component, _, inside = path.partition(".")
            self.weights[component].load(inside, module)

    def release(self, path: str, module: Any) -> None:
        """Give the memory of its weights back, if the next step may not find them there."""
        if not self.room.keeps(path, module):
            component, _, inside = path.partition(".")
            self.weights[component].release(inside, module)

    def release_all(self) -> None:
        self.room.kept.clear()
        for each in self.weights.values():
            each.release("", each.runnable.model)


@contextmanager
def opened_models(
    pipeline: Pipeline, dtype: torch.dtype, device: torch.device, only: str | None = None
) -> Iterator[Models]:
    """The pipeline of diffusers' own class, its models without weights. What is quantized is dequantized when read.

    Raises Unsupported where a library cannot build it, or a component of it that the class needs, that is quantized,
    or that ``only`` names.
    """
    import diffusers

    pipeline.require_read()
    pipeline_class = getattr(diffusers, pipeline.class_name, None)
    where = pipeline.folder.location
    if pipeline_class is None:
        raise Unsupported(
            f"diffusers {diffusers.__version__} has no class {pipeline.class_name}, which {where} asks for."
        )
    weights: dict[str, Weights] = {}
    unknown: list[str] = []
    for each in pipeline.components:
        if each.checkpoint is not None:
            try:
                weights[each.name] = weights_of(plain_checkpoint(each.checkpoint), dtype, device)
            except Unsupported:
                optional = each.name in optional_components(pipeline_class)
                if not optional or each.name == only or each.quantization is not None:
                    raise
                unknown.append(each.name)
    with tempfile.TemporaryDirectory(prefix="qz-") as place:
        absent = [*_copy_settings(pipeline, Path(place)), *unknown]
        models = {name: each.runnable.model for name, each in weights.items()}
        with library_errors("diffusers", pipeline.class_name, where), isolated(), _quiet():
            made = pipeline_class.from_pretrained(place, local_files_only=True, **models, **dict.fromkeys(absent))
        made.set_progress_bar_config(disable=True)
        for model in models.values():
            _computes_on(model, device)
        yield Models(where, made, weights, device, memory.Room(device), tuple(unknown))


def plain_dtype(component: Component) -> str:
    """The dtype of most of a component's values."""
    assert component.checkpoint is not None
    counts: dict[str, int] = {}
    for tensor in component.checkpoint.tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.nbytes
    return {"BF16": "bfloat16", "F16": "float16"}.get(max(counts, key=lambda each: counts[each]), "float32")


def weights_of(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Weights:
    """A component that can be run; what bitsandbytes quantized of it is dequantized when it is read."""
    sources = given = None
    if "quantization_config" in checkpoint.config:
        sources, given = as_plain(checkpoint, quantized_weights(checkpoint))
    if checkpoint.library == "diffusers":
        return Weights(checkpoint, of_diffusers(checkpoint, dtype, device, given), sources)
    name = model_class_of(checkpoint).model.__name__
    return Weights(checkpoint, of_transformers(checkpoint, name, dtype, device, given, reads_text=False), sources)


def _copy_settings(pipeline: Pipeline, place: Path) -> list[str]:
    """What diffusers reads of a pipeline whose models it is given; the names of components that were left out of it."""
    (place / PIPELINE_INDEX).write_bytes(read_file(pipeline.folder, PIPELINE_INDEX, MAX_TOKENIZER_BYTES))
    index = read_index(pipeline.folder)
    for component in pipeline.components:
        if component.checkpoint is None:
            (place / component.name).mkdir()
            _copy(component.folder, place / component.name)
    return [name for name, value in index.items() if value == [None, None]]


def _copy(folder: Folder, place: Path) -> None:
    for name in folder.sizes():
        if name.endswith(SETTINGS) and "/" not in name:
            (place / name).write_bytes(read_file(folder, name, MAX_TOKENIZER_BYTES))


def _computes_on(model: Any, device: torch.device) -> None:
    """Say where a model computes, whose parameters are on meta, as accelerate says it of models that are offloaded."""
    from accelerate.hooks import ModelHook

    model._hf_hook = ModelHook()
    model._hf_hook.execution_device = device


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' advice on pipelines and dtypes."""
    from diffusers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
