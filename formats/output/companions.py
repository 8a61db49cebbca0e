"""What goes along with a checkpoint unchanged: tokenizer, processor, licence, and a pipeline's untouched components.

One allow-list decides. Code, pickles, cards, pictures, and weights in other formats or other sets are never on it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from qz.formats.folder import Folder, Range
from qz.formats.json_files import dump_json
from qz.formats.malformed import Malformed
from qz.formats.shards import STEMS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from qz.formats.checkpoint.survey import Checkpoint
    from qz.formats.output.staging import Section

LARGEST_INDEX = 50_000_000
"""Bytes of an index or config, which are held in memory until the end of the run."""

TERMS = re.compile(
    r"(?:[A-Z0-9_.-]*[_-])?(?:LICEN[CS]E|NOTICES?|COPYING|(?:ACCEPTABLE_)?USE_POLICY|TERMS)(?:[_-][A-Z0-9_-]*)?"
    r"(?:\.(?:md|txt|pdf|html|rst))?",
    re.IGNORECASE,
)
"""The terms under which a model may be used."""

# Every name in transformers' VOCAB_FILES_NAMES (5.23), and what its base classes save beside them.
TOKENIZER = re.compile(
    r"(?:tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|vocab-src|vocab-tgt|target_vocab|entity_vocab"
    r"|word_shape|word_pronunciation|byte_maps|emoji|normalizer|encoder|tekken)\.json"
    r"|vocab(?:[_-]\w+)?\.txt|merges\.txt|dict\.txt|vocab\.bpe|bpe\.codes|prophetnet\.tokenizer"
    r"|(?:tokenizer|spiece|spm|spm_char|sentencepiece|sentencepiece\.bpe|bpe)\.model|tokenizer\.model\.v\d\w*"
    r"|(?:source|target)\.spm|[A-Za-z0-9_-]+\.tiktoken"
)
PROCESSOR = re.compile(
    r"(?:preprocessor|processor|image_processor|video_preprocessor|audio_tokenizer|feature_extractor)_config\.json"
    r"|chat_template\.(?:jinja|json)"
)
GENERATION = re.compile(r"generation_config\.json")
SENTENCES = re.compile(r"modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json")
"""How sentence-transformers puts a model together; its further modules lie in folders such as ``1_Pooling``."""
SETTINGS = re.compile(r"(?:config|scheduler_config)\.json")
"""Of a pipeline's component without weights."""

TEMPLATES = "additional_chat_templates"
TEMPLATE = re.compile(r"[A-Za-z0-9_-]+\.jinja")
MODULE = re.compile(r"\d+_[A-Za-z]+")
MODULE_FILE = re.compile(r"config\.json|model\.safetensors")

_VARIANT = r"(?:\.[A-Za-z0-9_]+)?"
WEIGHT_FILE = re.compile(
    rf"(?:{'|'.join(STEMS.values())}){_VARIANT}(?:-\d{{5}}-of-\d{{5}})?{_VARIANT}\.safetensors"
    rf"|(?:{'|'.join(STEMS.values())}){_VARIANT}\.safetensors(?:\.index{_VARIANT}|{_VARIANT}\.index)\.json"
)
"""Weights and their index, under every name that a library has ever given them."""
CHECKPOINT_FILE = re.compile(
    "|".join(
        f"(?:{pattern.pattern})"
        for pattern in (
            WEIGHT_FILE,
            SETTINGS,
            TOKENIZER,
            PROCESSOR,
            GENERATION,
            SENTENCES,
            re.compile("model_index.json"),
        )
    )
)


@dataclass(frozen=True, slots=True)
class Companion:
    """A file to copy unchanged: ``file`` of ``folder`` becomes ``name``, relative to a folder of the output."""

    folder: Folder
    file: str
    name: str
    bytes: int


def companions(folder: Folder) -> tuple[Companion, ...]:
    """What makes the model in ``folder`` usable where its weights alone are not."""
    found = _matching(folder, (TOKENIZER, PROCESSOR, GENERATION, SENTENCES, TERMS))
    inside = folder.subfolders()
    if TEMPLATES in inside:
        found += _matching(folder.subfolder(TEMPLATES), (TEMPLATE,), f"{TEMPLATES}/")
    if any(carried.file == "modules.json" for carried in found):
        for name in filter(MODULE.fullmatch, inside):
            found += _matching(folder.subfolder(name), (MODULE_FILE, TOKENIZER), f"{name}/")
    return tuple(found)


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name, which may lie in a folder inside, belongs to a model or pipeline."""
    parent, _, base = name.rpartition("/")
    if parent.rpartition("/")[2] == TEMPLATES:
        return TEMPLATE.fullmatch(base) is not None
    return CHECKPOINT_FILE.fullmatch(base) is not None or TERMS.fullmatch(base) is not None


def terms(folder: Folder) -> tuple[Companion, ...]:
    """The licence and notices in ``folder``."""
    return tuple(_matching(folder, (TERMS,)))


def settings(folder: Folder) -> tuple[Companion, ...]:
    """All of a component without weights: a scheduler, tokenizer or processor."""
    return (*_matching(folder, (SETTINGS,)), *companions(folder))


def weights(checkpoint: Checkpoint) -> tuple[tuple[Companion, ...], dict[str, bytes]]:
    """A whole component with weights: files to copy, and an index to write if they are of a variant.

    A variant's files get the plain names, which loaders look for by themselves, and which its index has to say.
    """
    folder, variant = checkpoint.folder, checkpoint.variant
    sizes = folder.sizes()
    names = [*checkpoint.files]
    documents: dict[str, bytes] = {}
    if checkpoint.index is not None:
        stem = STEMS[checkpoint.library]
        if variant is None:
            names.append(f"{stem}.safetensors.index.json")
        else:
            places = {name: plain_name(file, variant) for name, file in checkpoint.index["weight_map"].items()}
            documents[f"{stem}.safetensors.index.json"] = dump_json({**checkpoint.index, "weight_map": places})
    plain = [Companion(folder, name, plain_name(name, variant), sizes[name]) for name in names]
    config = _matching(folder, (re.compile(r"config\.json"),))
    return (*config, *companions(folder), *plain), documents


def plain_name(file: str, variant: str | None) -> str:
    """``model.fp16-00001-of-00002.safetensors`` → ``model-00001-of-00002.safetensors``."""
    return re.sub(rf"\.{re.escape(variant)}(?=[.-])", "", file, count=1) if variant else file


def copy(carried: Sequence[Companion], section: Section, progress: Callable[[int], None] | None = None) -> None:
    """Stream the files into the output, and check that their folders did not change meanwhile."""
    folders = {id(each.folder): each.folder for each in carried}
    for key, folder in folders.items():
        files = [each for each in carried if id(each.folder) == key and each.name not in section.finished]
        folder.announce([Range(each.file, 0, each.bytes) for each in files if each.bytes])
        for each in files:
            if each.bytes > LARGEST_INDEX and each.name.endswith(("config.json", ".index.json")):
                raise Malformed("json-malformed", f"{folder.location}/{each.file} is too large for such a file.")
            section.copy_file(each.name, each.bytes, _reader(each), progress, partial(folder.is_verified, each.file))
        folder.check()


def _reader(carried: Companion) -> Callable[[int, memoryview], None]:
    return lambda offset, buffer: carried.folder.read_into(carried.file, offset, buffer)


def _matching(folder: Folder, patterns: Iterable[re.Pattern[str]], prefix: str = "") -> list[Companion]:
    sizes = folder.sizes()
    allowed = list(patterns)
    names = [name for name in sizes if any(pattern.fullmatch(name) for pattern in allowed)]
    return [Companion(folder, name, prefix + name, sizes[name]) for name in names]
