"""Names of the files that loaders look for beside a model's weights, and of those that they never read."""

from __future__ import annotations

import re
from functools import cached_property

from qz.formats.files.folder import PIPELINE_INDEX
from qz.formats.tensors.weight_names import STEMS


class Names:
    """A pattern that is compiled when a name is first compared: few commands need them all, which take 10 ms."""

    def __init__(self, pattern: str, *, any_case: bool = False) -> None:
        self.pattern, self.any_case = pattern, any_case

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.IGNORECASE if self.any_case else 0)

    def fullmatch(self, name: str) -> re.Match[str] | None:
        return self._compiled.fullmatch(name)


TERMS = Names(
    r"(?:[A-Z0-9_.-]*[_-])?(?:LICEN[CS]E|NOTICES?|COPYING|(?:ACCEPTABLE_)?USE_POLICY|TERMS)(?:[_-][A-Z0-9_-]*)?"
    r"(?:\.(?:md|txt|pdf|html|rst))?",
    any_case=True,
)
"""The terms under which a model may be used."""

# Every name in transformers' VOCAB_FILES_NAMES (5.23), what its base classes save beside them, and what they look for.
TOKENIZER = Names(
    r"(?:tokenizer(?:\.\d[\w.]*)?|tokenizer_config|special_tokens_map|added_tokens|vocab|vocab-src|vocab-tgt|target_vocab|entity_vocab"
    r"|word_shape|word_pronunciation|byte_maps|emoji|normalizer|encoder|tekken)\.json"
    r"|vocab(?:[_-]\w+)?\.txt|merges\.txt|dict\.txt|vocab\.bpe|bpe\.codes|prophetnet\.tokenizer"
    r"|(?:tokenizer|spiece|spm|spm_char|sentencepiece|sentencepiece\.bpe|bpe|tiktoken)\.model|tokenizer\.model\.v\d\w*"
    r"|(?:source|target)\.spm|[A-Za-z0-9_-]+\.tiktoken"
)
PROCESSOR = Names(
    r"(?:preprocessor|processor|image_processor|video_preprocessor|audio_tokenizer|feature_extractor)_config\.json"
    r"|chat_template\.(?:jinja|json)"
)
GENERATION = Names(r"generation_config\.json")
SENTENCES = Names(r"modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json")
"""How sentence-transformers puts a model together; its further modules lie in folders such as ``1_Pooling``."""
SETTINGS = Names(r"(?:config|scheduler_config)\.json")
"""Of a pipeline's component without weights."""

CONFIGS = Names(r"(?:scheduler|guider|mel|modular|mellon_pipeline|decision|judge)_config\.json")
"""Settings under the names that classes of the libraries give them, beside a model.

Not an adapter's: transformers then loads the adapter's base model in the place of this one.
"""
PROMPTS = Names(
    r"alphabet\.json|[a-z0-9_]+_path\.json|prompts?\.(?:json|txt)|adapter\.[A-Za-z0-9_-]+\.safetensors"
    r"|spk_dict\.pt|[A-Za-z0-9_-]+\.(?:ttf|otf)"
)
"""Of processors: a decoder's alphabet, paths of voices, prompts, a font; an adapter for each language, as MMS has them.

Qwen2.5-Omni does not load without the voices in ``spk_dict.pt``, the one pickle here; it is copied unread.
"""

TEMPLATES = "additional_chat_templates"
TEMPLATE = Names(r"[A-Za-z0-9_-]+\.jinja")
MODULE = Names(r"\d+_[A-Za-z]+|query_\d+_\w+|document_\d+_\w+")
"""Folders of sentence-transformers' modules."""
OWN_SETTINGS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json",
                "attrs.json")  # fmt: skip
"""A folder with one of these is a second tokenizer, processor or adapter, or a language model (pyctcdecode)."""
TRAINING = Names(r"checkpoint-\d+|runs|logs|wandb")
NO_DATA = Names(
    r"\..*|.*\.(?:py|ipynb|sh|md|png|jpe?g|gif|webp|svg|pdf|mp4|wav|mp3|zip|tar|gz|bin|pt|pth|ckpt|pkl|h5|msgpack|ot|onnx"
    r"|tflite|gguf|safetensors|bak)|trainer_state\.json|training_args\..*|\w+_results\.json|requirements\.txt|events\.out.*",
    any_case=True,
)
"""What no loader reads from a folder of settings: code, cards, pictures, archives, weights, what training left."""
SECRET = Names(
    r"(?:.*[._-])?(?:id_(?:rsa|dsa|ecdsa|ed25519)|credentials?|secrets?|passwords?|token|api[_-]?keys?|aws|netrc"
    r"|kubeconfig)(?:[._-].*)?|[^.]+|.*\.(?:env|pem|key|p12|pfx|kdbx)",
    any_case=True,
)
"""Not part of any model, and maybe a secret: neither copied nor published, unless a loader names it."""

_VARIANT = r"(?:\.[A-Za-z0-9_]+)?"
WEIGHT_FILE = Names(
    rf"(?:{'|'.join(STEMS.values())}){_VARIANT}(?:-\d{{5}}-of-\d{{5}})?{_VARIANT}\.safetensors"
    rf"|(?:{'|'.join(STEMS.values())}){_VARIANT}\.safetensors(?:\.index{_VARIANT}|{_VARIANT}\.index)\.json"
)
"""Weights and their index, under every name that a library has ever given them."""
INDEXES = Names(r".*\.(?:safetensors|bin)\..*json")
_INDEX = Names(re.escape(PIPELINE_INDEX))
_LOOKED_FOR = (GENERATION, SETTINGS, _INDEX, WEIGHT_FILE, TOKENIZER, PROCESSOR, SENTENCES, CONFIGS, PROMPTS)


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name, which may lie in a folder inside, belongs to a model or pipeline."""
    parent, _, base = name.rpartition("/")
    if parent.rpartition("/")[2] == TEMPLATES:
        return TEMPLATE.fullmatch(base) is not None
    return is_looked_for(base) or TERMS.fullmatch(base) is not None


def is_looked_for(name: str) -> bool:
    """Whether loaders look for a file of this name."""
    return any(pattern.fullmatch(name) for pattern in _LOOKED_FOR)
