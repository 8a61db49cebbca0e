"""A checkpoint's model on the meta device, loaded by transformers' own code: no weight is read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qz import IOFailed
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.files.folder import read_file
from qz.formats.hub.bars import bars_as_found
from qz.formats.json_files import MAX_CONFIG_BYTES, read_json
from qz.open_files import remedy
from qz.quantize.libraries.architecture import OF_QUANTIZATION, LoadRequest, TensorSpec
from qz.quantize.libraries.transformers.classes import ModelClass
from qz.quantize.libraries.transformers.internals import (
    cheap_converters,
    loader_of_weights,
    no_init_weights,
    shares_generation_config,
)
from qz.quantize.libraries.transformers.meta_stacks import meta_stacks
from qz.quantize.libraries.transformers.origins import Model

GENERATION_CONFIG = "generation_config.json"


def load(
    checkpoint: Checkpoint, model_class: ModelClass, tensors: Mapping[str, TensorSpec], request: LoadRequest
) -> tuple[Model, set[str], dict[str, str]]:
    """The model on meta, with the names that its loader missed, and those it found in another shape, with that."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    state = {
        name: torch.empty(given.shape, dtype=getattr(torch, given.dtype), device="meta")
        for name, given in tensors.items()
    }
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    try:
        # Without initial values for weights that have none: torch would import sympy for them.
        with bars_as_found(), temporary_folder() as folder, no_init_weights(), meta_stacks(), cheap_converters():
            logging.disable_progress_bar()
            generation = None
            if GENERATION_CONFIG in checkpoint.folder.sizes() and model_class.model.can_generate():
                data = read_file(checkpoint.folder, GENERATION_CONFIG, MAX_CONFIG_BYTES)
                # Refuses what is not JSON.
                read_json(data, f"{checkpoint.folder.location}/{GENERATION_CONFIG}", nonfinite="tag")
                store(folder / GENERATION_CONFIG, data)
                generation = GenerationConfig.from_pretrained(folder)
            shared = generation if shares_generation_config(model_class.model) else None
            model, info = loader_of_weights(model_class.model)(
                None,
                config=config_in_folder(checkpoint, model_class.config),
                state_dict=state,
                device_map="meta",
                dtype=request.dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **({} if shared is None else {"generation_config": shared}),
            )
            if generation is not None and shared is None:
                model.generation_config = generation
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            with bars_as_found():  # transformers enables all of huggingface_hub's bars, too
                logging.enable_progress_bar()
    mismatched = {
        key: f"{key} is {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]
    }
    return model, set(info["missing_keys"]) - mismatched.keys(), mismatched


def config_in_folder(checkpoint: Checkpoint, config_class: Any) -> Any:
    """The checkpoint's config as an object of the library, which reads it from a folder."""
    with temporary_folder() as folder:
        config = {key: value for key, value in checkpoint.config.items() if key not in OF_QUANTIZATION}
        store(folder / "config.json", json.dumps(config).encode())
        return config_class.from_pretrained(folder)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """The library takes configs from a folder only."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="qz-")
    except OSError as error:
        raise no_room(error) from error
    with folder as path:
        yield Path(path)


def store(path: Path, data: bytes, size: int | None = None) -> None:
    """Write a small file; one of ``size`` bytes ends in a hole. Raises IOFailed."""
    try:
        path.write_bytes(data)
        if size is not None:
            os.truncate(path, size)
    except OSError as error:
        raise no_room(error) from error


def no_room(error: OSError) -> IOFailed:
    """The error for a temporary file that could not be written."""
    advice = remedy(error, "Free some space there, or name another folder with TMPDIR.")
    return IOFailed(
        f"A small file cannot be kept in the folder for temporary files: {error.strerror or error}. {advice}"
    )
