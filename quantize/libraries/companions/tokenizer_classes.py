"""What a tokenizer of transformers is loaded from, read from the text of the installed library, whose import takes
seconds: what transformers 5.23 finds in ``PreTrainedTokenizerBase.from_pretrained``, in its ``TokenizersBackend`` and
in ``AutoTokenizer``. What a text leaves open counts as there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache
from typing import NamedTuple

from qz.quantize.libraries.class_search import LONGEST_NAME
from qz.quantize.libraries.source_code.defining_files import defining_file
from qz.quantize.libraries.source_code.installed import folder_of, text_of

TOKENIZER_JSON = "tokenizer.json"
_ANY_CLASS = frozenset(
    ("TokenizersBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "PythonBackend", "MistralCommonBackend",
     "MistralCommonTokenizer", "BloomTokenizer", "BloomTokenizerFast")
)  # fmt: skip
"""What stands for any tokenizer: its file is taken as it is."""
_FAST = frozenset(("TokenizersBackend", "PreTrainedTokenizerFast"))
_SLOW = frozenset(("PythonBackend", "PreTrainedTokenizer", "SentencePieceBackend"))
_PARTS = ("vocab_file", "merges_file")
"""Of ``vocab_files_names``, what a fast tokenizer is made from where it has no tokenizer.json."""
_OF_ANY = re.compile(r"tekken\.json|tokenizer\.model.*|tiktoken\.model")
"""Vocabularies that every class looks for where there is no tokenizer.json."""
_VERSIONED = re.compile(r"tokenizer(?:\.[\d.]+)?\.json")


class TokenizerClass(NamedTuple):
    """``files``: those of its vocabulary, all of which it needs; ``others``: what may stand for one of them."""

    name: str
    files: tuple[str, ...]
    others: tuple[str, ...] = ()
    is_fast: bool = True
    """Whether tokenizer.json is enough."""
    rules: str = ""
    """The class whose rules it makes a tokenizer by, whatever else tokenizer.json says; empty where that is taken as it
    is."""

    def is_without(self, there: Collection[str]) -> bool:
        """Whether files of these names hold no vocabulary that the class is loaded from."""
        of_any = any(map(_OF_ANY.fullmatch, there))
        if self.is_fast:
            return not of_any and not has_tokenizer_json(there) and not (self.files and {*there}.issuperset(self.files))
        lacking = {*self.files} - {*there}
        return len(lacking) > of_any and {*there}.isdisjoint(self.others)

    def as_text(self) -> str:
        """The files, for a message."""
        files = " and ".join(self.files)
        if self.is_fast:
            return f"{TOKENIZER_JSON}, or {files}" if files else TOKENIZER_JSON
        return files


_ANY = TokenizerClass("TokenizersBackend", ("tokenizer.model",))


@cache
def tokenizer_class(name: str) -> TokenizerClass | None:
    """The class of that name as ``getattr(transformers, name)`` gives it, under names of earlier versions, too; None
    for one that is not known."""
    if name in _ANY_CLASS:
        return _ANY
    if not name.isidentifier() or len(name) > LONGEST_NAME:
        return None
    from qz.quantize.libraries.source_code.class_chain import class_chain  # imported here: the parser takes 5 ms

    stem, ends = name.removesuffix("Fast"), _FAST | _SLOW
    chain = [*class_chain(name, ends)] or [*class_chain(stem, ends)] or [*class_chain(_converted(stem), ends)]
    backend = chain[-1].base(ends) if chain else ""
    if backend not in ends:
        return None
    own, has_init = chain[0].name, chain[0].has_init
    named = next((files for each in chain if (files := each.value("vocab_files_names")) is not None), None)
    made = next(((each.name, found) for each in chain if (found := each.init()) is not None), None)
    rules, taken = made or (own, {})
    if backend in _FAST:
        if made is not None and not {"vocab", "vocab_file"} & taken.keys():  # it has a vocabulary of its own
            return TokenizerClass(own, (), is_fast=False, rules=rules)
        rules = rules if has_init else ""
        if named is None:
            return _ANY._replace(name=own, rules=rules)
        return TokenizerClass(own, tuple(named[key] for key in _PARTS if key in named), rules=rules)
    files = {key: file for key, file in (named or {}).items() if key in taken}
    needed = {key: file for key, file in files.items() if taken[key]} or files
    others = tuple(file for key, file in files.items() if key not in needed)
    return TokenizerClass(own, tuple(needed.values()), others, is_fast=False, rules=rules)


def is_fast(name: str) -> bool:
    """Whether tokenizer.json is certainly enough for a class: told without parsing its text."""
    path = defining_file(name.removesuffix("Fast")) if name not in _ANY_CLASS else None
    if path is None:
        return name in _ANY_CLASS
    found = re.search(rf"^class {re.escape(name.removesuffix('Fast'))}\((\w+)\):", text_of(path), re.MULTILINE)
    return found is not None and found[1] in _FAST


def has_tokenizer_json(names: Iterable[str]) -> bool:
    """Whether one of these files is a whole tokenizer, maybe of a version that its config names."""
    return any(map(_VERSIONED.fullmatch, names))


def automatic_class(named: str | None, model_type: str | None) -> str:
    """The name of the class that ``AutoTokenizer`` takes, by the tokenizer's config and that of the model."""
    registered, is_wrong = _registered(model_type) if model_type else (None, False)
    if named is None:
        return registered or _ANY.name
    if registered not in (None, named.removesuffix("Fast")):
        named = registered if is_wrong and registered is not None else named
        return named if registered not in _ANY_CLASS and _is_known(named) else _ANY.name
    return named if _is_known(named) else _ANY.name


def _registered(model_type: str) -> tuple[str | None, bool]:
    """The class that the library has for a type of model, and whether tokenizers of this type name a wrong one."""
    text, asked = text_of(folder_of("transformers") / "models" / "auto" / "tokenization_auto.py"), re.escape(model_type)
    found = re.search(rf'\(\s*"{asked}",\s*"(\w+)"', text)
    is_wrong = re.search(rf'^    "{asked}",$', text, re.MULTILINE) is not None
    return found[1].removesuffix("Fast") if found else _ANY.name if is_wrong else None, is_wrong


def _is_known(name: str) -> bool:
    return is_fast(name) or tokenizer_class(name) is not None


def _converted(name: str) -> str:
    """The class that stands for one that there is no more: the one that its converter is named after."""
    text = text_of(folder_of("transformers") / "convert_slow_tokenizer.py")
    found = re.search(rf'^    "{name}": (\w+)Converter,$', text, re.MULTILINE)
    return f"{found[1]}Tokenizer" if found else ""
