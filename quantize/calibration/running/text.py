"""What a model reads when it is calibrated: a text, as tokens of its own tokenizer."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from qz import MissingInput, Unsupported, UsageError
from qz.formats.files.folder import Folder, read_file
from qz.formats.files.regular_file import NotRegular, TooLarge, read_regular
from qz.quantize.libraries.importing.boundary import describe
from qz.quantize.libraries.importing.isolation import isolated

TOKENIZER_FILE = re.compile(
    r"(tokenizer.*|config|vocab.*|added_tokens|special_tokens_map)\.json|.*\.model|.*\.tiktoken|merges\.txt|vocab\.txt"
)
MAX_TOKENIZER_BYTES = 1 << 26
MAX_TEXT_BYTES = 1 << 26
LONGEST, PIECES = 4_000_000, 64
"""Characters that are made tokens of, which take up to 350 bytes for each; and the pieces that a longer text gives."""
OWN_SHARE = 4
"""One token in so many that GPTQ's Hessians are made of is of qz's own text, beside a text that was named."""
BATCHES = 8
"""At most so many forwards wait at a time."""
BATCH_TOKENS = 2048


def text_of(path: Path | None) -> str:
    """The text in a file; without one, a few pages of our own, of different kinds. Raises as ``read_text_file``, and
    UsageError for an empty one."""
    words = default_text() if path is None else read_text_file(path)
    if not words.strip():
        raise UsageError("The text is empty. Name one of a few pages with --text FILE.")
    return words


def default_text() -> str:
    """The text that comes with qz."""
    return files("qz.quantize.calibration.running").joinpath("default_text.txt").read_text(encoding="utf-8")


def read_text_file(path: Path) -> str:
    """The text in a file. Raises MissingInput, and UsageError where it is no text, or too long a one."""
    try:
        data = read_regular(path, MAX_TEXT_BYTES)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} does not exist. --text names a file of plain text.") from error
    except (IsADirectoryError, NotRegular) as error:
        raise UsageError(f"{path} is {error.strerror}. --text names a file of plain text.") from error
    except TooLarge as error:
        raise UsageError(
            f"{path} is larger than {MAX_TEXT_BYTES >> 20} MiB. Give a part of it: a few pages are enough."
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}. Save it as UTF-8."
        ) from error


def open_tokenizer(folder: Folder) -> Any:
    """The tokenizer in a folder. Raises MissingInput where there is none, Unsupported where it cannot be loaded."""
    names = [name for name in folder.sizes() if TOKENIZER_FILE.fullmatch(name)]
    if not set(names) - {"config.json"}:
        raise MissingInput(
            f"{folder.location} has no tokenizer to read a text with. Put the files of its tokenizer there, such as "
            "tokenizer.json, from where the weights are."
        )
    with tempfile.TemporaryDirectory(prefix="qz-") as place:
        for name in names:
            Path(place, name).write_bytes(read_file(folder, name, MAX_TOKENIZER_BYTES))
        try:
            with isolated():
                from transformers import AutoTokenizer

                return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise Unsupported(
                f"The tokenizer in {folder.location} cannot be loaded: {describe(error)}. Download its files again."
            ) from error


def sequences(tokenizer: Any, text: str, length: int, tokens: int) -> list[list[int]]:
    """Up to ``tokens`` token ids in sequences of ``length``, each as the tokenizer begins and ends one.

    Of a longer text they are from all over it: its beginning alone is of one kind, which GPTQ then fits.
    """
    length = min(length, int(getattr(tokenizer, "model_max_length", length) or length), tokens)
    text = excerpts(text, max(LONGEST, 8 * tokens))
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
        rows = [list(row) for row in encoded]
    else:
        ids = tokenizer(text)["input_ids"]
        rows = [ids[start : start + length] for start in range(0, len(ids), length)]
    count = -(-tokens // max(map(len, rows), default=1))
    if count < len(rows):
        rows = [rows[at * len(rows) // count] for at in range(count)]
    return first_tokens(rows, tokens)


def varied_sequences(tokenizer: Any, text: str, length: int, tokens: int) -> list[list[int]]:
    """``sequences`` for GPTQ, which fits the kind of text that it is given: a last quarter is qz's own, of many kinds.

    So it was measured to lose less on every other text, and hardly more on one of the same kind.
    """
    if tokens < OWN_SHARE:
        return sequences(tokenizer, text, length, tokens)
    own = sequences(tokenizer, default_text(), length, tokens // OWN_SHARE)
    return sequences(tokenizer, text, length, tokens - sum(map(len, own))) + own


def excerpts(text: str, most: int) -> str:
    """At most ``most`` characters, in pieces from all over a longer text, each from the beginning of a word."""
    if len(text) <= most:
        return text
    size = most // PIECES
    starts = (at * (len(text) - size) // (PIECES - 1) for at in range(PIECES))
    return "".join(text[start : start + size].partition(" ")[2] or text[start : start + size] for start in starts)


def first_tokens(rows: Iterable[list[int]], tokens: int) -> list[list[int]]:
    """Sequences of ``tokens`` in all, or of as many as there are."""
    chosen: list[list[int]] = []
    left = tokens
    for row in rows:
        if left > 0 and row:
            chosen.append(row[:left])
            left -= len(chosen[-1])
    return chosen


def batches(rows: list[list[int]]) -> Iterator[torch.Tensor]:
    """int64[sequences, tokens]: sequences of the same length together, so that none is padded."""
    total = sum(map(len, rows))
    most = max(BATCH_TOKENS, -(-total // BATCHES))
    by_length: dict[int, list[list[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    for length, alike in by_length.items():
        each = max(1, most // length)
        for start in range(0, len(alike), each):
            yield torch.tensor(alike[start : start + each], dtype=torch.int64)
