"""Small components of a pipeline, by the types that its constructor names."""

from __future__ import annotations

import enum
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import torch

from pipelines import TEXT, clip_tokenizer
from whole_zoo import diffusers_cases, transformers_cases
from whole_zoo.case import NotBuilt, seed
from whole_zoo.inputs import WIDTHS
from whole_zoo.pipeline_needs import parts_needed
from whole_zoo.tiny import put

VOCABULARY = 200


Sizes = Mapping[str, Mapping[str, int]]
"""Of components, the arguments that others call for."""


def build_components(pipeline_class: Any, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Every argument of the constructor that has no default. Raises NotBuilt for a type that the zoo cannot make."""
    found = {}
    needed = parts_needed(pipeline_class.__name__)
    for name, parameter in inspect.signature(pipeline_class.__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if name in needed and not isinstance(needed[name], dict):
            found[name] = needed[name]
        elif "class" in needed.get(name, {}):
            found[name] = _remade(None, needed[name])
        elif (
            name in needed or _MAIN.fullmatch(name) or (parameter.default is parameter.empty and name not in _LEFT_OUT)
        ):
            found[name] = _component(name, parameter.annotation, folder, "XL" in pipeline_class.__name__)
        elif parameter.default is parameter.empty:
            found[name] = None
    mended = [(name, more) for name, more in needed.items() if isinstance(more, dict) and more and name in found]
    for name, more in [*mended, *sizes.items()]:
        seed(pipeline_class.__name__)
        found[name] = _remade(found[name], more)
    _fit_pictures(found)
    _fit_tokens(found)
    return found


def _remade(part: Any, more: Mapping[str, Any]) -> Any:
    """A component of other arguments, or of another class, which ``class`` names."""
    import diffusers
    import transformers

    if hasattr(transformers, more.get("class", "")):
        kind = getattr(transformers, more["class"])
        return _model(_with(next(transformers_cases.small_models(kind.config_class, kind.__name__, kind)), more))
    kind = getattr(diffusers, more["class"]) if "class" in more else type(part)
    if issubclass(kind, transformers.PreTrainedModel):
        return _model(_with(part, more))
    first = dict(part.config) if kind is type(part) else diffusers_cases.ARGUMENTS.get(kind.__name__, {})
    known = inspect.signature(kind.__init__).parameters
    made = kind(**{key: value for key, value in {**first, **more}.items() if key in known})
    return _model(made) if isinstance(made, torch.nn.Module) else made


def _with(model: Any, more: Mapping[str, Any]) -> Any:
    """The model with other numbers in its config, by their paths."""
    told = {path: value for path, value in more.items() if path != "class"}
    if not told:
        return model
    config = model.config.to_dict()
    for path, value in told.items():
        put(config, path, value)
    return type(model)(type(model.config).from_dict(config))


def _fit_pictures(components: dict[str, Any]) -> None:
    """Let processors of pictures give the size that the encoder of pictures takes."""
    configs = [getattr(part, "config", None) for part in components.values() if isinstance(part, torch.nn.Module)]
    found = [
        getattr(each, "image_size", None) for one in configs for each in (one, getattr(one, "vision_config", None))
    ]
    sides = [side for side in found if isinstance(side, int)]
    for processor in components.values():
        part = getattr(processor, "image_processor", processor)
        if sides and hasattr(part, "image_mean") and hasattr(part, "size") and "size" in part.to_dict():
            side = {"height": sides[0], "width": sides[0]}
            part.size = {"shortest_edge": sides[0]} if "shortest_edge" in dict(part.size) else side
            if getattr(part, "crop_size", None) is not None:
                part.crop_size = side
        for vision in (getattr(config, "vision_config", None) for config in configs):
            if vision is not None and hasattr(part, "merge_size") and hasattr(vision, "spatial_merge_size"):
                part.patch_size, part.merge_size = vision.patch_size, vision.spatial_merge_size
                if hasattr(vision, "temporal_patch_size"):
                    part.temporal_patch_size = vision.temporal_patch_size


def _fit_tokens(components: dict[str, Any]) -> None:
    """Let models know pictures by the tokens that stand for them in the text."""
    tokenizers = [part.tokenizer for part in components.values() if hasattr(part, "tokenizer")]
    configs = [part.config for part in components.values() if isinstance(part, torch.nn.Module)]
    for tokenizer in tokenizers[:1]:
        for config in configs:
            for name, token in _OF_PICTURES.items():
                if getattr(config, name, None) is not None:
                    setattr(config, name, tokenizer.convert_tokens_to_ids(token))


_OF_PICTURES = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
                "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip


def sizes_called_for(pipeline: Any, message: str) -> Iterator[dict[str, dict[str, int]]]:
    """Arguments of components with which the layer that refused its input might take it: those that have the size that
    the layer wants, and have to do with what comes from other components."""
    for pattern in WIDTHS:
        if (match := pattern.search(message)) is None:
            continue
        for name, part in pipeline.components.items():
            for key, value in dict(getattr(part, "config", {})).items() if hasattr(part, "from_config") else ():
                if value == int(match["wanted"]) and _OF_OTHERS.fullmatch(key):
                    yield {name: {key: int(match["got"])}}


_OF_OTHERS = re.compile(
    r"in_channels|pooled_projection_dim|projection_class_embeddings_input_dim|cond_embed_dim|"
    r"\w*(?:cross|joint|text|caption|encoder|context|condition)\w*(?:dim|size|channels)"
)


_MAIN = re.compile(r"transformer|unet|vae|scheduler|(?:text_encoder|tokenizer)(?:_\d)?")
"""Made though there is a default, which is None."""
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
    if kind.__name__ in _BY_HAND:
        return _model(_BY_HAND[kind.__name__](kind))
    if kind.__name__ == "BaseGuidance":
        return diffusers.ClassifierFreeGuidance()
    if issubclass(kind, diffusers.SchedulerMixin):
        return kind(**dict.fromkeys(_required(kind), 31))
    if is_xl and kind in (diffusers.UNet2DConditionModel, diffusers.ControlNetModel, diffusers.ControlNetUnionModel):
        return _model(kind(**diffusers_cases.ARGUMENTS[kind.__name__] | _OF_XL))
    if issubclass(kind, diffusers.ModelMixin):
        return _model(next(diffusers_cases.small_models(kind.__module__, kind.__name__, any_layer=True)))
    if issubclass(kind, transformers.PreTrainedModel):
        if kind.__name__.endswith("PreTrainedModel"):  # any model of a family is meant, or any model at all
            kind = getattr(transformers, kind.__name__.replace("PreTrainedModel", "Model"), None)
        if kind is None or kind.__name__ == "Model":
            kind = transformers.Qwen3Model
        return _model(next(transformers_cases.small_models(kind.config_class, kind.__name__, kind)))
    if kind is transformers.AutoProcessor:
        kind = transformers.PixtralProcessor
    if issubclass(kind, transformers.PreTrainedTokenizerBase) or kind is transformers.AutoTokenizer:
        any_kind = kind is transformers.AutoTokenizer or kind.__name__.startswith(("PreTrained", "PythonBackend"))
        return _tokenizer(transformers.Qwen2Tokenizer if any_kind else kind, folder / name)
    if issubclass(kind, transformers.ProcessorMixin):
        return _processor(kind, folder / name)
    if "CLIPImageProcessor" in kind.__name__:
        return kind(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return kind()


def _chatglm(kind: Any) -> Any:
    return kind(
        kind.config_class(
            num_layers=2, padded_vocab_size=VOCABULARY, hidden_size=64, ffn_hidden_size=128, kv_channels=16,
            num_attention_heads=4, seq_length=64, multi_query_attention=True, multi_query_group_num=2,
            add_qkv_bias=True, original_rope=True, rmsnorm=True,
        )
    )  # fmt: skip


def _t5gemma(kind: Any) -> Any:
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    if kind.__name__ == "T5GemmaEncoder":
        config = transformers.T5GemmaConfig(encoder=sizes, decoder=sizes)
        encoder = kind(config.encoder)
        encoder.config = config  # as published: diffusers takes the encoder's part of it
        return encoder
    return kind(transformers.T5GemmaConfig(encoder=sizes, decoder=sizes, is_encoder_decoder=False))


def _paint_by_example(kind: Any) -> Any:
    import transformers

    return kind(
        transformers.CLIPVisionConfig(
            hidden_size=64, projection_dim=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            image_size=32, patch_size=8,
        )
    )  # fmt: skip


def _glm_image(kind: Any) -> Any:
    """Says as many tokens as it is asked for, as a trained one does."""
    model = next(transformers_cases.small_models(kind.config_class, kind.__name__, kind))
    model.generation_config.eos_token_id = None
    return model


_BY_HAND = {"ChatGLMModel": _chatglm, "T5GemmaEncoder": _t5gemma, "T5GemmaEncoderModel": _t5gemma,
            "PaintByExampleImageEncoder": _paint_by_example,
            "GlmImageForConditionalGeneration": _glm_image}  # fmt: skip
"""Classes whose config does not tell the sizes that they take, and one that must not stop early."""


def _required(kind: type) -> list[str]:
    """Arguments of the constructor that are whole numbers and have no default."""
    parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    return [each.name for each in parameters if each.default is each.empty and each.annotation in (int, "int")]


def _processor(kind: Any, folder: Path) -> Any:
    """A processor of parts: those that the library's Auto classes have for the type whose module it is in."""
    import transformers
    from transformers.models.auto import image_processing_auto, tokenization_auto, video_processing_auto

    model_type = kind.__module__.split(".")[-2]
    videos = video_processing_auto.VIDEO_PROCESSOR_MAPPING_NAMES.get(model_type)
    images = image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    classes = {
        "tokenizer": tokenization_auto.TOKENIZER_MAPPING_NAMES.get(model_type) or "Qwen2Tokenizer",
        "image_processor": images.get("torchvision"),
        "video_processor": videos.get("torchvision") if isinstance(videos, dict) else videos,
    }
    parts: dict[str, Any] = {}
    for part in kind.get_attributes():
        part_class = getattr(transformers, classes.get(part) or "", None)
        if part_class is None or type(part_class).__name__ == "DummyObject":
            raise NotBuilt(f"a processor whose {part} needs a package that is not installed")
        parts[part] = _tokenizer(part_class, folder, 4096) if part == "tokenizer" else part_class()
    if kind is transformers.GlmImageProcessor:
        parts["tokenizer"]._set_model_specific_special_tokens(_OF_GLM_IMAGE)
    return kind(**parts, chat_template=_CHAT)


_OF_GLM_IMAGE = {
    "image_token": "<|image_pad|>",
    "grid_bos_token": "<|vision_start|>",
    "grid_eos_token": "<|vision_end|>",
}
_CHAT = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text if part.type == 'text' else "
    "'<|vision_start|><|image_pad|><|vision_end|>' }}{% endfor %}{% endif %}{% endfor %}"
)


def _model(model: Any) -> Any:
    return model.bfloat16().eval()


def _tokenizer(kind: Any, folder: Path, longest: int = 32) -> Any:
    """A tokenizer of a class, trained on a few sentences: byte pairs, or pieces with their scores."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if kind is transformers.CLIPTokenizer:
        return clip_tokenizer(folder)
    if kind.__name__ == "ChatGLMTokenizer":
        return kind(_sentence_pieces(folder))
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<pad>", "</s>", "<s>", "<unk>", "<|endoftext|>", *_OF_PICTURES.values()]
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
            tokenizer = kind(**arguments, model_max_length=longest)
            tokenizer.add_special_tokens({"additional_special_tokens": [*_OF_PICTURES.values()]})
            tokenizer.pad_token = tokenizer.pad_token or "</s>"
            tokenizer.chat_template = _CHAT
            tokenizer("a cat", padding="max_length", max_length=8, truncation=True)
            return tokenizer
        except Exception as error:
            last = error
    raise NotBuilt(f"{type(last).__name__}: {last}")


def _sentence_pieces(folder: Path) -> str:
    """A file of pieces, trained on the same sentences."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT]), model_prefix=str(folder / "pieces"), vocab_size=60, hard_vocab_limit=False
    )
    return str(folder / "pieces.model")


def _state(tokenizer: Any) -> dict[str, Any]:
    import json

    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model
