"""Small components of a pipeline, by the types that its constructor names."""

from __future__ import annotations

import enum
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

from pipelines import TEXT, clip_tokenizer
from whole_zoo import diffusers_cases, transformers_cases
from whole_zoo.case import NotBuilt

VOCABULARY = 200


def build_components(pipeline_class: Any, folder: Path) -> dict[str, Any]:
    """Every argument of the constructor that has no default. Raises NotBuilt for a type that the zoo cannot make."""
    found = {}
    for name, parameter in inspect.signature(pipeline_class.__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if name in _MAIN or (parameter.default is parameter.empty and name not in _LEFT_OUT):
            found[name] = _component(name, parameter.annotation, folder, "XL" in pipeline_class.__name__)
        elif parameter.default is parameter.empty:
            found[name] = None
    return found


_MAIN = ("transformer", "unet", "vae", "text_encoder", "tokenizer", "scheduler")
_LEFT_OUT = ("safety_checker", "watermarker")
"""Pipelines take None for these."""


_OF_XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 32, "cross_attention_dim": 128,
          "projection_class_embeddings_input_dim": 256}  # fmt: skip
"""Two text encoders side by side, and six numbers with the pooled text."""


def _component(name: str, annotation: Any, folder: Path, is_xl: bool) -> Any:
    reasons = []
    for kind in _kinds(annotation):
        if kind is type(None):
            return None
        try:
            return _made(name, kind, folder, is_xl)
        except Exception as error:  # whatever a constructor says against its defaults
            reasons.append(str(error) or type(error).__name__)
    told = str(annotation).replace("<class '", "").replace("'>", "")
    raise NotBuilt(f"{name} ({told}): {'; '.join(reasons) or 'no class'}")


def _kinds(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, str):
        import diffusers
        import transformers

        known = {name.split(".")[-1] for name in annotation.replace("|", " ").replace("[", " ").split()}
        yield from (
            getattr(library, each) for each in known for library in (diffusers, transformers) if hasattr(library, each)
        )
    elif typing.get_origin(annotation) in (typing.Union, UnionType):
        yield from typing.get_args(annotation)
    else:
        yield annotation


def _made(name: str, kind: Any, folder: Path, is_xl: bool) -> Any:
    import diffusers
    import transformers

    if type(kind).__name__ == "DummyObject":
        raise NotBuilt("needs a package that is not installed")
    if isinstance(kind, enum.EnumMeta) or kind is diffusers.SchedulerMixin:
        return diffusers.EulerDiscreteScheduler()
    if not isinstance(kind, type):
        raise NotBuilt(f"no component is made of {kind}")
    if is_xl and kind in (diffusers.UNet2DConditionModel, diffusers.ControlNetModel):
        return _model(kind(**diffusers_cases.ARGUMENTS[kind.__name__] | _OF_XL))
    if issubclass(kind, diffusers.ModelMixin):
        return _model(next(diffusers_cases.small_models(kind.__module__, kind.__name__, any_layer=True)))
    if issubclass(kind, transformers.PreTrainedModel):
        if kind.__name__.endswith("PreTrainedModel"):  # any model of a family is meant, or any model at all
            kind = getattr(transformers, kind.__name__.replace("PreTrainedModel", "Model"), None)
        if kind is None or kind.__name__ == "Model":
            raise NotBuilt("any model is meant")
        return _model(next(transformers_cases.small_models(_model_type(kind), kind.__name__, kind)))
    if issubclass(kind, transformers.PreTrainedTokenizerBase) or kind is transformers.AutoTokenizer:
        return _tokenizer(transformers.Qwen2Tokenizer if kind is transformers.AutoTokenizer else kind, folder / name)
    if issubclass(kind, transformers.ProcessorMixin):
        raise NotBuilt("a processor of several parts")
    if "CLIPImageProcessor" in kind.__name__:
        return kind(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return kind()


def _model_type(model_class: Any) -> str:
    return str(model_class.config_class.model_type)


def _model(model: Any) -> Any:
    return model.bfloat16().eval()


def _tokenizer(kind: Any, folder: Path) -> Any:
    """A tokenizer of a class, trained on a few sentences: byte pairs, or pieces with their scores."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if kind is transformers.CLIPTokenizer:
        return clip_tokenizer(folder)
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<pad>", "</s>", "<s>", "<unk>", "<|endoftext|>"]
    pairs.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.train_from_iterator(
        [TEXT], trainers.UnigramTrainer(vocab_size=VOCABULARY - 60, special_tokens=special, unk_token="<unk>")
    )
    told = _state(pairs)
    tries: list[dict[str, Any]] = [
        {"vocab": [tuple(piece) for piece in _state(pieces)["vocab"]]},
        {"vocab": told["vocab"], "merges": [tuple(pair) for pair in told["merges"]]},
        {"vocab": told["vocab"]},
    ]
    if "merges" in inspect.signature(kind.__init__).parameters:
        tries = [tries[1], tries[0]]
    for arguments in tries:
        try:
            tokenizer = kind(**arguments, model_max_length=32)
            tokenizer.pad_token = tokenizer.pad_token or "</s>"
            tokenizer("a cat", padding="max_length", max_length=8, truncation=True)
            return tokenizer
        except Exception as error:
            last = error
    raise NotBuilt(f"{type(last).__name__}: {last}")


def _state(tokenizer: Any) -> dict[str, Any]:
    import json

    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model
