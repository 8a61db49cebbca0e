"""A model's own text as what it is calibrated on: sampled from it, so that no data set is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qz import TryAgain, Unsupported
from qz.formats.checkpoint.survey import Checkpoint
from qz.out_of_memory import is_out_of_memory
from qz.progress import OnProgress, Progress
from qz.quantize.calibration.running.text import first_tokens
from qz.quantize.calibration.running.weights import Weights
from qz.quantize.libraries.transformers.runnable import Runnable, running

AT_ONCE = 32
"""Sequences that are sampled together."""
SEED = 0


def sample(
    checkpoint: Checkpoint, model: Runnable, tokenizer: Any, tokens: int, progress: OnProgress
) -> list[list[int]]:
    """Sequences of ``tokens`` token ids in all, sampled at temperature 1 from the beginning of a text.

    The whole model is in memory while it writes; the same seed gives the same text on one machine. Raises Unsupported
    for a model that does not write text, TryAgain where memory does not suffice.
    """
    where, name = checkpoint.folder.location, type(model.model).__name__
    config = model.model.config
    if not model.model.can_generate() or config.is_encoder_decoder:
        raise Unsupported(f"{where}: {name} does not write text by itself. Name a text with --text FILE.")
    first = _first_token(tokenizer, config)
    if first is None:
        raise Unsupported(f"{where}: no token begins a text of {name}. Name a text with --text FILE.")
    weights = Weights(checkpoint, model)
    rows: list[list[int]] = []
    progress(Progress("Loading the whole model"))
    try:
        with running(name, where), torch.inference_mode(), torch.random.fork_rng(_devices(model)):
            weights.load_rest({})
            torch.manual_seed(SEED)
            while (left := tokens - sum(map(len, rows))) > 0:
                length = min(model.longest, max(left, 2))
                rows += _some(model, first, _ends(config), length, left, progress)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TryAgain(
            f"{where} does not fit into memory as a whole, which --generate needs. Name a text with --text FILE."
        ) from error
    return first_tokens(rows, tokens)


def _some(
    model: Runnable, first: int, ends: frozenset[int], length: int, left: int, progress: OnProgress
) -> list[list[int]]:
    """One batch of sequences, each up to its end."""
    from transformers import GenerationConfig

    count = min(AT_ONCE, -(-left // length))
    steps = [0]

    def tell(ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        steps[0] += 1
        progress(Progress("Writing a text", count * steps[0], count * (length - 1), unit="token"))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    how = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        use_cache=True,
        bos_token_id=first,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=first),
    )
    start = torch.full((count, 1), first, device=model.device)
    seen = torch.ones_like(start)
    found = model.model.generate(start, attention_mask=seen, generation_config=how, stopping_criteria=[tell])
    return [_ended(row, ends) for row in found.tolist()]


def _ended(row: Sequence[int], ends: frozenset[int]) -> list[int]:
    """A sequence without what pads it after its end."""
    stop = next((n for n, token in enumerate(row) if n and token in ends), len(row))
    return list(row[: stop + 1])


def _first_token(tokenizer: Any, config: Any) -> int | None:
    named = (getattr(tokenizer, "bos_token_id", None), config.get_text_config().bos_token_id)
    return next(
        (int(each) for each in (*named, getattr(tokenizer, "eos_token_id", None)) if isinstance(each, int)), None
    )


def _ends(config: Any) -> frozenset[int]:
    end = config.get_text_config().eos_token_id
    return frozenset(end if isinstance(end, list) else [end] if isinstance(end, int) else [])


def _devices(model: Runnable) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []
