"""Tiny models that read text: with a tokenizer of their own, and a text of its words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from zoo import build

WORDS = ("the", "ferry", "leaves", "harbour", "at", "six", "and", "nobody", "counts", "windows", "of", "old", "house")


def with_tokenizer(folder: Path) -> Path:
    """A tokenizer of a hundred words, which begins a sequence as BERT's and Llama's do."""
    vocabulary = {word: n for n, word in enumerate(["[UNK]", "[BOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "bos_token": "[BOS]"})
    )
    return folder


def some_text(path: Path, words: int = 700) -> Path:
    chosen = np.random.default_rng(0).choice(WORDS, words)
    path.write_text(" ".join(chosen))
    return path


def model_folder(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = build(name)
    model.save_pretrained(folder)
    return with_tokenizer(folder)
