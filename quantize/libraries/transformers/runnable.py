"""A transformers model that can be run, its parameters still on the meta device, and where each of them comes from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from qz import QzError, Unsupported
from qz.formats.checkpoint.survey import Checkpoint
from qz.out_of_memory import is_out_of_memory
from qz.quantize.libraries.architecture import TensorSpec, torch_name
from qz.quantize.libraries.expert_layout import expert_name
from qz.quantize.libraries.importing.boundary import describe, library_errors
from qz.quantize.libraries.importing.isolation import isolated
from qz.quantize.libraries.importing.untrusted_config import without_code
from qz.quantize.libraries.importing.work_bounds import work_bounded
from qz.quantize.libraries.transformers.classes import model_class_of
from qz.quantize.libraries.transformers.expert_rows import stored_rows
from qz.quantize.libraries.transformers.experts import LISTED
from qz.quantize.libraries.transformers.internals import (
    Conv1D,
    from_config,
    holds_experts,
    no_init_weights,
    tied_weights,
)
from qz.quantize.libraries.transformers.meta_loading import config_in_folder
from qz.quantize.libraries.transformers.origins import Model, Origin, find_origins, find_transposed

LONGEST = 512
"""Tokens of one sequence, where the model takes as many."""


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of a layer. ``weights``: of each 3-D parameter, the names of what each expert's part is stored as."""

    module: Any
    weights: Mapping[str, Sequence[tuple[str, ...]]]

    def inputs(self, parameter: str) -> int:
        """How many inputs the experts' matrices in it have."""
        return int(self.module.get_parameter(parameter).shape[1 if self.module.is_transposed else 2])


@dataclass(frozen=True, slots=True)
class Runnable:
    """A model in ``eval`` mode: parameters on meta, buffers computed on ``device``; ``origins`` by its own names."""

    model: Model
    origins: Mapping[str, Origin]
    transposed: frozenset[str]
    dtype: torch.dtype
    device: torch.device
    float32: tuple[str, ...] = ()
    """Segments of the paths of what computes in float32 whatever the dtype."""

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor of floats computes in."""
        return torch.float32 if any(segment in self.float32 for segment in name.split(".")) else self.dtype

    @property
    def linears(self) -> dict[str, Any]:
        """Path → module of every linear layer; a ``Conv1D`` is one, with its weight as (in, out)."""
        found = {}
        for path, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, torch.nn.Linear | Conv1D) and weight is not None and weight.ndim == 2:
                found[path] = module
        return found

    def experts(self) -> dict[str, ExpertLayer]:
        """Path → the experts there, where each has weights of its own; gpt-oss' have once they are quantized.

        From here on the experts of a layer are computed one after the other.
        """
        self.model.set_experts_implementation("eager")
        found = {}
        for path, module in self.model.named_modules():
            if holds_experts(module):
                parameters = {leaf: each for leaf, each in module.named_parameters(recurse=False) if each.ndim == 3}
                weights = {leaf: self._expert_names(f"{path}.{leaf}", each) for leaf, each in parameters.items()}
                if weights and all(all(names) for names in weights.values()):
                    found[path] = ExpertLayer(module, weights)
        return found

    def _expert_names(self, name: str, parameter: torch.Tensor) -> list[tuple[str, ...]]:
        """What each expert's part of a parameter is stored as; nothing for those that are stored together."""
        listed = self.model.config.model_type == LISTED
        names: list[list[str]] = [[] for _ in range(len(parameter))]
        for rows in stored_rows(self.model, name, tuple(parameter.shape)):
            names[rows.expert].append(expert_name(rows.name, rows.expert) if listed else rows.name)
        apart = len({each for of_one in names for each in of_one}) == sum(map(len, names))
        return [tuple(each) if apart else () for each in names]

    @property
    def head(self) -> Any:
        """The linear layer that makes logits of the last hidden states, or None."""
        ask = getattr(self.model, "get_output_embeddings", None)  # a model of diffusers has no head
        head = ask() if ask is not None else None
        return head if isinstance(head, torch.nn.Linear) else None

    @property
    def longest(self) -> int:
        """Tokens of a sequence."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(LONGEST, most) if isinstance(most, int) and most > 0 else LONGEST

    def arguments(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The forward's arguments of token ids [sequences, tokens]; a decoder with an encoder reads the same text."""
        ids = ids.to(self.device)
        two = "decoder_input_ids" in inspect.signature(self.model.forward).parameters
        return {"input_ids": ids, "decoder_input_ids": ids} if two else {"input_ids": ids}


def runnable(
    checkpoint: Checkpoint,
    class_name: str,
    dtype: torch.dtype,
    device: torch.device,
    given: Mapping[str, TensorSpec] | None = None,
    *,
    reads_text: bool = True,
) -> Runnable:
    """The model of the class that ``examine`` found. Where ``reads_text``, raises Unsupported for one that does not.

    ``given`` replaces the checkpoint's own names, dtypes and shapes, as for ``examine``.
    """
    import transformers

    where = checkpoint.folder.location
    harmless, _ = without_code(checkpoint.config)
    asked = replace(checkpoint, config=harmless, architecture=class_name)
    with library_errors("transformers", class_name, where), isolated():
        config = config_in_folder(asked, model_class_of(asked).config)
        shapes = {name: tensor.shape for name, tensor in (given or checkpoint.tensors).items()}
        with work_bounded(shapes, where), no_init_weights(), _parameters_on_meta():
            model = from_config(getattr(transformers, class_name), config, dtype=dtype).eval()
        if reads_text and model.main_input_name != "input_ids":
            raise Unsupported(
                f"{where}: {class_name} takes {model.main_input_name}, which is not made from text. To quantize it "
                "better than by absmax there is --scales search, which needs no calibration."
            )
        for each in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
            each.use_cache = False
        tensors = given or {
            name: TensorSpec(torch_name(tensor.dtype, name), tensor.shape)
            for name, tensor in checkpoint.tensors.items()
        }
        origins = find_origins(model, tensors)
        transposed = frozenset(find_transposed(model, origins, tensors))
        for one, other in tied_weights(model).items():  # on meta each module has a parameter of its own
            for missing, stored in ((one, other), (other, one)):
                if missing not in origins and stored in origins:
                    origins[missing] = origins[stored]
    move_buffers(model, device)
    return Runnable(model, origins, transposed, dtype, device)


def move_buffers(model: Model, device: torch.device) -> None:
    """Put the buffers, which were computed when the model was built, on a device."""
    for name, buffer in list(model.named_buffers()):
        path, _, attribute = name.rpartition(".")
        model.get_submodule(path)._buffers[attribute] = buffer.to(device)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Buffers that no checkpoint stores, such as those of rotary embeddings, get their values."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


@contextmanager
def running(class_name: str, where: str, how: str = "run block by block") -> Iterator[None]:
    """Turn what the model's own code raises while it runs into Unsupported; a lack of memory stays what it is.

    What it might load only now is refused as while it was built.
    """
    try:
        with isolated():
            yield
    except (QzError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise Unsupported(f"{where}: {class_name} cannot be {how}: {describe(error)}.") from error
