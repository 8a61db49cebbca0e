"""Which linears suffer most from being quantized: groups in order, by measured scores or by a rule without data.

Serving engines such as vLLM and SGLang load some linears of a block as one, so these are kept, or quantized, together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qz.quantize.libraries.architecture import Weight
from qz.quantize.planning.budget.fused_groups import FUSED

VALUES = ("v_proj", "value", "v_lin", "to_v", "add_v_proj", "v")
KEYS = ("k_proj", "key", "k_lin", "to_k", "add_k_proj", "k")
QUERIES = ("q_proj", "query", "q_lin", "to_q", "add_q_proj", "q")
GATES = ("gate_proj", "w1", "wi_0")
OF_VALUES, OF_KEYS, OF_QUERIES, OF_GATES, OF_OTHERS = 8.0, 2.0, 0.6, 0.5, 0.9
"""A block's error by each parameter of a linear, times 1e9, in SmolLM2-135M; MiniLM-L6 too puts values first."""
AT_THE_ENDS = 2.0
"""How much more the first and the last block count."""

_BLOCK = re.compile(r"(.+?)\.(\d+)\.")


LossName = Literal["kl", "cosine", "output"]
"""KL divergence in nats per token, 1 − cosine of mean hidden states, |Δ|² / |y|² of a denoiser's output."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How sensitive each weight is to being quantized, and what is lost when all are."""

    of: Mapping[str, float]
    """Weight → its share of the loss, ≥ 0."""
    method: str
    """nf4, fp4 or int8."""
    loss: LossName
    total: float
    """The loss when all of these weights are quantized."""
    tokens: int

    def about(self) -> dict[str, Any]:
        """What they are scores of, as JSON values."""
        return {"method": self.method, "loss": self.loss, "total": self.total, "tokens": self.tokens}


@dataclass(frozen=True, slots=True)
class Candidate:
    """Linears that stay as they are together, or not at all."""

    paths: tuple[str, ...]
    nbytes: int
    """How much more they take than quantized."""
    score: float

    @property
    def density(self) -> float:
        """The score of a byte."""
        return self.score / self.nbytes if self.nbytes > 0 else float("inf")


def ranked(weights: Iterable[tuple[Weight, int]], scores: Mapping[str, float], *, split: bool) -> list[Candidate]:
    """Groups of weights, each with what it takes more unquantized, in bytes; those that are worth most first.

    ``scores`` by the weights' names; a weight that they do not name counts nothing. ``split``: every linear is a group
    of its own.
    """
    groups: dict[str, list[tuple[Weight, int]]] = {}
    for weight, nbytes in weights:
        path = _path(weight)
        groups.setdefault(path if split else _group(path), []).append((weight, nbytes))
    found = [
        Candidate(
            tuple(_path(weight) for weight, _ in group),
            sum(nbytes for _, nbytes in group),
            sum(scores.get(weight.name, 0.0) for weight, _ in group),
        )
        for group in groups.values()
    ]
    return sorted(found, key=lambda each: (-each.density, each.paths))


def without_data(weights: Iterable[Weight]) -> dict[str, float]:
    """Scores by what a linear is for, as its name says, and by where it is."""
    weights = list(weights)
    last: dict[str, int] = {}
    for weight in weights:
        if block := _BLOCK.match(weight.name):
            last[block[1]] = max(last.get(block[1], 0), int(block[2]))
    return {weight.name: weight.count * _role(weight.name) * _place(weight.name, last) for weight in weights}


def _role(name: str) -> float:
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    roles = ((VALUES, OF_VALUES), (KEYS, OF_KEYS), (QUERIES, OF_QUERIES), (GATES, OF_GATES))
    return next((score for names, score in roles if leaf in names), OF_OTHERS)


def _place(name: str, last: Mapping[str, int]) -> float:
    block = _BLOCK.match(name)
    return AT_THE_ENDS if block and int(block[2]) in (0, last[block[1]]) else 1.0


def _group(path: str) -> str:
    parent, _, leaf = path.rpartition(".")
    return next((f"{parent}.{'|'.join(names)}" for names in FUSED if leaf in names), path)


def _path(weight: Weight) -> str:
    return weight.name.removesuffix(".weight")
