"""Which tensors of a checkpoint are weights of linear layers, judged by names, shapes and config alone.

The libraries decide it by module type, which takes their code and seconds of imports. This rule decides it in
milliseconds, and is an estimate: ``tests/test_estimate.py`` holds it against what the libraries say. Learned from
transformers 5.23 and diffusers 0.42.1, by building each of their classes with its default config.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from qz.quantize.inspection.families import CONV1D, DIFFUSERS_FLOAT32, FLOAT32, NEVER_QUANTIZED, OWN_LINEARS, UNFUSED

if TYPE_CHECKING:
    from qz.formats.checkpoint.weights import Library

FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TORCH_NAMES = {name: torch_name for torch_name, name in FLOATS.items()}
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}

# The last part of a module's path tells an embedding in transformers …
_EMBEDDING = re.compile(
    r"(?!patch_|vision_embed|decoder_embed$|embeddings_project|embedding_hidden|cond_embeds_|relative_pos_)"
    r"\w*embed\w*|wte|wpe|w|shared|relative_attention_bias|bias_values|codebook|\w+_emb"
)
# … and in diffusers, where most of what has "embed" in its name is linear.
_DIFFUSERS_EMBEDDING = re.compile(
    r"embeddings?|embedding_table|(?!patch_)\w+_embedding|\w+_type_embed|embed_image_indicator"
)
_HEADS = {"lm_head", "embed_out", "unembed", "output_projection"}
_WHOLE_HEADS = {"cls.predictions.decoder", "head", "output", "score"}
_EXPERTS = re.compile(r"(.+)\.experts\b")
_EXPERT = re.compile(r".+\.experts\.\d+\.")
_ROUTER = re.compile(r"(.+)\.(?:gate|router)(?:\.(?:gate|layer))?")
_ROUTER_ENDS = {"gate", "router", "layer"}
_NOT_SAVED = (".position_ids", ".inv_freq", ".masked_bias")
"""Buffers that older versions saved and the present ones drop."""


def _is_head(module: str) -> bool:
    return module.rpartition(".")[2] in _HEADS or module in _WHOLE_HEADS


@lru_cache(1 << 12)
def _is_embedding(leaf: str) -> bool:
    return _EMBEDDING.fullmatch(leaf) is not None


class Value(NamedTuple):
    """A tensor as the checkpoint has it (of a quantized weight, as it was before), or as the loaded model has it.

    In the loaded model ``dtype`` is the one after the cast at load time, in safetensors' words, and ``linear`` says
    that it would be quantized; then ``shape`` is (out, in), also where it is stored the other way.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    linear: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def values(
    library: Library, architecture: str | None, config: Mapping[str, Any], tensors: Iterable[Value]
) -> tuple[Value, ...]:
    """The tensors of the model that ``library`` would load from ``tensors``."""
    listed = [tensor for tensor in tensors if not f".{tensor.name}".endswith(_NOT_SAVED)]
    rule: _Diffusers | _Transformers = (
        _Diffusers(architecture, listed) if library == "diffusers" else _Transformers(config, listed)
    )
    found = []
    for tensor in listed:
        name, stored, shape, nbytes, _ = tensor
        if stored not in WIDTHS:
            found.append(tensor)
            continue
        linear = len(shape) == 2 and name.endswith(".weight") and rule.is_linear(name.removesuffix(".weight"), tensor)
        dtype = rule.dtype(name)
        if dtype == stored and not linear:
            found.append(tensor)
            continue
        if dtype != stored:
            nbytes = tensor.elements * WIDTHS[dtype]
        found.append(Value(name, dtype, shape[::-1] if linear and rule.transposed else shape, nbytes, linear))
    return tuple(found)


class _Diffusers:
    """Every linear layer is quantized, but for those in modules that the class keeps in float32."""

    transposed = False

    def __init__(self, architecture: str | None, tensors: Iterable[Value]) -> None:
        counts: Counter[str] = Counter()
        for tensor in tensors:
            if tensor.dtype in WIDTHS:
                counts[tensor.dtype] += tensor.elements
        self.load = counts.most_common(1)[0][0] if counts else "F32"
        self.float32 = frozenset(DIFFUSERS_FLOAT32.get(architecture or "", ()))

    def dtype(self, name: str) -> str:
        return self.load if self.float32.isdisjoint(name.split(".")) else "F32"

    def is_linear(self, module: str, _: Value) -> bool:
        leaf = module.rpartition(".")[2]
        if _DIFFUSERS_EMBEDDING.fullmatch(leaf):
            return False
        # diffusers/quantizers/bitsandbytes/utils.py: the leaf, the path, or "key." anywhere in the path.
        return not any(key in (module, leaf) or f"{key}." in module for key in self.float32)


class _Transformers:
    """Linear layers but the output layer, tied weights, what the class keeps in float32, and experts that are fused."""

    def __init__(self, config: Mapping[str, Any], tensors: Iterable[Value]) -> None:
        types = set(model_types(config))
        model_type = str(config.get("model_type"))
        self.transposed = model_type in CONV1D
        self.own_linears = bool(types & OWN_LINEARS)
        self.fuses = model_type not in UNFUSED
        said = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
        first = next((tensor.dtype for tensor in tensors if tensor.dtype in WIDTHS), "F32")
        self.load = FLOATS.get(said, first)
        self.never = tuple(key for each in sorted(types) for key in NEVER_QUANTIZED.get(each, ()))
        strict = tuple(key for each in sorted(types) for key in FLOAT32.get(each, ()))
        self.float32: tuple[str, ...] = ()
        if self.load != "F32":
            self.float32 = (*strict, "e_score_correction_bias", *(self.never if self.load == "F16" else ()))
        self.names = {tensor.name for tensor in tensors}
        # The last parameter of a model is left alone too; towers that end in a projection show that it is the one.
        ends = (
            end for end in ("text_projection", "visual_projection", "logits_dense") if f"{end}.weight" in self.names
        )
        self.last = next((end for end in ends if f"{end}.bias" not in self.names), None)
        # Hundreds of thousands of expert names share a few prefixes, each taken with one more character.
        parents = {name[: name.rfind(".experts") + 9] for name in self.names if ".experts" in name}
        self.routed = {match[1] for parent in parents if (match := _EXPERTS.match(parent))}

    def dtype(self, name: str) -> str:
        for key in self.float32:  # once for every tensor, of which there may be hundreds of thousands
            if key in name:
                return "F32"
        return self.load

    def is_linear(self, module: str, _: Value) -> bool:
        leaf = module.rpartition(".")[2]
        if _is_head(module) or module == self.last:
            return False
        if _is_embedding(leaf) and f"{module}.bias" not in self.names:
            return False
        if self.own_linears or (self.fuses and ".experts." in module and _EXPERT.match(module)):
            return False
        router = _ROUTER.fullmatch(module) if leaf in _ROUTER_ENDS else None
        if router and router[1] in self.routed:
            return False
        if leaf == "out_proj" and f"{module.removesuffix('.out_proj')}.in_proj_weight" in self.names:
            return False  # torch.nn.MultiheadAttention's own kind of linear layer
        # transformers/quantizers/quantizers_utils.py: should_convert_module
        return not any(
            module.endswith(key) or re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", module) for key in self.never
        )


def model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """The model types in a config and in those of its parts."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in config.values():
        if isinstance(value, Mapping):
            yield from model_types(value)


_WITHOUT_HEAD = re.compile(
    r"\w*(?<!LMHead)(?<!MT)(?:Model|Encoder|ForSequenceClassification|ForTokenClassification|ForQuestionAnswering)"
)
_TABLES = tuple(
    f".{name}.weight"
    for name in (
        *("shared", "embed_tokens", "wte", "word_embedding", "word_embeddings"),
        *("tokens_embed", "tok_embeddings", "embed_in", "embeddings"),
    )
)
_HEAD_NAMES = {"whisper": "proj_out", "moonshine": "proj_out", "trocr": "output_projection", "gpt_neox": "embed_out"}


def ties(library: Library, architecture: str | None, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Weights that no file holds because they are those of another one: name → the one that is stored.

    By the config's ``tie_word_embeddings`` and the names that transformers' classes commonly have.
    """
    stored = set(names)
    inner = config.get("text_config")
    tied = config.get("tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None)
    tables = (name for name in stored if f".{name}".endswith(_TABLES))
    table = min(tables, key=lambda name: (name.count("."), name), default="")
    if library != "transformers" or not table:
        return {}
    found = {}
    prefix = table.removesuffix("shared.weight")
    if prefix != table:
        for side in ("encoder", "decoder"):
            name = f"{prefix}{side}.embed_tokens.weight"
            if name not in stored and any(each.startswith(f"{prefix}{side}.") for each in stored):
                found[name] = table
    heads = (name.removesuffix(".weight") for name in stored if name.endswith(".weight"))
    if tied and not _WITHOUT_HEAD.fullmatch(architecture or "Model") and not any(map(_is_head, heads)):
        leaf = "cls.predictions.decoder" if any(name.startswith("cls.") for name in stored) else "lm_head"
        if any(name.startswith("lm_head.dense") for name in stored):
            leaf = "lm_head.decoder"
        found[_HEAD_NAMES.get(str(config.get("model_type")), leaf) + ".weight"] = table
    return found
