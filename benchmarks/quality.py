"""How good the checkpoints are that qz writes in one format: trained models against their originals.

``make quality``: the error of MiniLM's weights and embeddings, and the KL divergence of SmolLM2-135M's predictions on
two texts that calibration has not seen. Every output is loaded by plain ``from_pretrained``; then its weights, as
bitsandbytes gives them back, are computed with in float32, so that nothing but they differ.

    python -m benchmarks.quality [--models minilm smollm2] [--methods …] [--sequences 48] [--length 512]
                                 [--calibration 65536] [--device auto] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import real_models
from qz import api
from qz.quantize.calibration.statistics import HessianPlace, InputSums, write_hessians, write_statistics

METHODS: dict[str, dict[str, Any]] = {
    "absmax": {},
    "absmax, double": {"double": True},
    "search": {"scales": "search"},
    "search, double": {"scales": "search", "double": True},
    "importance": {"importance": "statistics"},
    "importance, double": {"importance": "statistics", "double": True},
    "importance, 1,024 tokens": {"importance": "small"},
    "gptq": {"importance": "statistics", "rounding": "gptq"},
    "fp4": {"fp4": True},
    "fp4, search": {"fp4": True, "scales": "search"},
    "fp4, importance": {"fp4": True, "importance": "statistics"},
}
TARGETS = {
    "minilm": {"search": 0.94, "importance": 0.82},
    "smollm2": {"search": 0.86, "importance": 0.50, "importance, 1,024 tokens": 0.50, "gptq": 0.40},
}
"""Of absmax's loss on unseen text."""
SMALL = 1024
AT_ONCE = 2048
"""Tokens whose outer products are added up together."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One checkpoint. ``loss``: 1 − cosine of embeddings, or KL divergence in nats a token, by text."""

    model: str
    method: str
    weight_error: float
    loss: dict[str, float]
    ratio: float
    """To absmax's, the mean over texts."""
    noise: float
    """Standard error of the ratio: over sentences or sequences, in pairs."""
    target: float | None


class Subject(Protocol):
    """A model, what it is calibrated on, and what it is tried on."""

    name: str
    source: Path

    def load(self, folder: Path) -> Any: ...
    def calibration(self, tokens: int) -> Iterable[dict[str, torch.Tensor]]: ...
    def losses(self, reference: Any, model: Any) -> dict[str, torch.Tensor]: ...


class MiniLM:
    """Sentence embeddings: the mean of the last states, normalized; the loss of a sentence is 1 − cosine."""

    name = "minilm"

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.source, self.device = real_models.minilm(), options.device
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.texts = {
            "prose": real_models.sentences(real_models.prose(), options.sentences),
            "tech": real_models.sentences(real_models.jargon(), options.sentences),
        }
        self.known = real_models.sentences(real_models.documentation(), 4 * options.sentences)
        self.embedded: dict[str, torch.Tensor] = {}

    def load(self, folder: Path) -> Any:
        from transformers import BertModel

        return BertModel.from_pretrained(folder, device_map=self.device)

    def batches(self, sentences: list[str]) -> Iterable[dict[str, torch.Tensor]]:
        for start in range(0, len(sentences), 64):
            encoded = self.tokenizer(sentences[start : start + 64], padding=True, truncation=True, return_tensors="pt")
            yield dict(encoded.to(self.device))

    def calibration(self, tokens: int) -> Iterable[dict[str, torch.Tensor]]:
        left = tokens
        for sentence in self.known:  # one at a time: padding is no input
            encoded = dict(self.tokenizer(sentence, truncation=True, return_tensors="pt").to(self.device))
            left -= encoded["input_ids"].numel()
            yield encoded
            if left <= 0:
                return

    def embed(self, model: Any, sentences: list[str]) -> torch.Tensor:
        rows = []
        for batch in self.batches(sentences):
            states, mask = model(**batch).last_hidden_state.float(), batch["attention_mask"].unsqueeze(-1)
            rows.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(rows).double()

    def losses(self, reference: Any, model: Any) -> dict[str, torch.Tensor]:
        if not self.embedded:
            self.embedded = {name: self.embed(reference, text) for name, text in self.texts.items()}
        return {name: 1 - (self.embed(model, t) * self.embedded[name]).sum(-1) for name, t in self.texts.items()}


class SmolLM2:
    """Predictions of the next token; the loss of a sequence is the mean KL divergence from the original's."""

    name = "smollm2"

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.source, self.device, self.length = real_models.smollm2(), options.device, options.length
        tokenizer = AutoTokenizer.from_pretrained(self.source)

        def rows(text: str, count: int) -> torch.Tensor:
            ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
            whole = ids[: len(ids) // self.length * self.length].view(-1, self.length)
            chosen: torch.Tensor = whole[:: max(1, len(whole) // count)][:count].to(self.device)
            return chosen

        self.texts = {
            "prose": rows(real_models.prose(), options.sequences),
            "tech": rows(real_models.jargon(), options.sequences),
        }
        self.known = rows(real_models.documentation(), -(-options.calibration // self.length))

    def load(self, folder: Path) -> Any:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(folder, device_map=self.device)

    def calibration(self, tokens: int) -> Iterable[dict[str, torch.Tensor]]:
        for row in self.known[: max(1, tokens // self.length)]:
            yield {"input_ids": row[:tokens].unsqueeze(0)}

    def losses(self, reference: Any, model: Any) -> dict[str, torch.Tensor]:
        def divergence(row: torch.Tensor) -> torch.Tensor:
            expected, found = (each(row.unsqueeze(0)).logits.float().log_softmax(-1) for each in (reference, model))
            mean: torch.Tensor = (expected.exp() * (expected - found)).sum(-1).mean()
            return mean.double().cpu()

        return {name: torch.stack([divergence(row) for row in rows]) for name, rows in self.texts.items()}


def calibrate(subject: Subject, model: Any, tokens: int, path: Path, *, hessians: bool) -> None:
    """Statistics of every linear's inputs in one pass of the original."""
    sums: dict[str, torch.Tensor] = {}
    seen: dict[str, int] = {}
    waiting: dict[str, list[torch.Tensor]] = {}

    def add(name: str, least: int) -> None:
        if sum(map(len, waiting[name])) > least:
            x = torch.cat(waiting[name])
            found = x.T @ x if hessians else x.square().sum(0)
            sums[name] = sums[name] + found if name in sums else found
            seen[name] = seen.get(name, 0) + len(x)
            waiting[name] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            waiting.setdefault(name, []).append(given[0].detach().flatten(0, -2).float())
            add(name, AT_ONCE)

        return hook

    linears = {path: each for path, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    handles = [each.register_forward_pre_hook(watch(f"{path}.weight")) for path, each in linears.items()]
    for batch in subject.calibration(tokens):
        model(**batch)
    for handle in handles:
        handle.remove()
    for name in waiting:
        add(name, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: value.cpu().numpy() for name, value in sums.items()}
    places, files = {}, {}
    if hessians:
        file = f"{path.stem}.hessians.safetensors"
        files[file] = write_hessians(path.with_name(file), arrays)
        places = {name: HessianPlace(file, f"{name}.hessian") for name in arrays}
        arrays = {name: value.diagonal().copy() for name, value in arrays.items()}
    write_statistics(path, {name: InputSums(value, seen[name]) for name, value in arrays.items()}, {}, places, files)


def plain(subject: Subject, reference: Any, folder: Path) -> tuple[Any, float]:
    """The checkpoint, loaded plainly, as a float32 model of its dequantized weights; their relative error."""
    from bitsandbytes.functional import dequantize_4bit

    loaded, model = subject.load(folder), subject.load(subject.source).float()
    error = norm = 0.0
    for path, module in loaded.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None:
            continue
        original = reference.get_parameter(f"{path}.weight")
        weight = dequantize_4bit(module.weight.data, state).to(original)
        error += float((weight.double() - original.double()).square().sum())
        norm += float(original.double().square().sum())
        model.get_parameter(f"{path}.weight").copy_(weight)
    return model, math.sqrt(error / norm)


def ratio(losses: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Mean over texts of the ratio of mean losses, and its standard error over the texts' parts, in pairs."""
    ratios, variances = [], []
    for name, each in losses.items():
        below = base[name].mean()
        found = each.mean() / below
        ratios.append(float(found))
        variances.append(float(((each - found * base[name]).var() / len(each)) / below**2))
    return sum(ratios) / len(ratios), math.sqrt(sum(variances)) / len(variances)


def measured(subject: Subject, options: argparse.Namespace) -> Iterable[Figure]:
    work = real_models.ROOT / "work" / subject.name
    shutil.rmtree(work, ignore_errors=True)
    reference = subject.load(subject.source).float()
    known = {"statistics": work / "statistics.safetensors", "small": work / "small.safetensors"}
    calibrate(subject, reference, options.calibration, known["statistics"], hessians=True)
    calibrate(subject, reference, SMALL, known["small"], hessians=False)
    base: dict[str, torch.Tensor] = {}
    for method, how in METHODS.items():
        if method != "absmax" and options.methods and method not in options.methods:
            continue
        given = {key: value for key, value in how.items() if key in ("scales", "rounding")}
        if "importance" in how:
            given["importance"] = known[how["importance"]]
        kind = api.Fp4 if how.get("fp4") else api.Nf4
        output = work / "output"
        api.quantize(
            subject.source,
            output,
            method=kind(double_quant=how.get("double", False)),
            if_exists="overwrite",
            fsync=False,
            device=options.device,
            **given,
        )
        model, weight_error = plain(subject, reference, output)
        losses = subject.losses(reference, model)
        base = base or losses
        found, noise = ratio(losses, base)
        yield Figure(
            subject.name,
            method,
            weight_error,
            {name: float(each.mean()) for name, each in losses.items()},
            found,
            noise,
            TARGETS[subject.name].get(method),
        )


def line(figure: Figure) -> str:
    losses = "  ".join(f"{name} {value:.5f}" for name, value in figure.loss.items())
    target = "" if figure.target is None else f"  target {figure.target:.2f}: {'met' if met(figure) else 'MISSED'}"
    return (
        f"{figure.model:8} {figure.method:26} weights {figure.weight_error:.4f}  {losses}  "
        f"ratio {figure.ratio:.3f} ± {figure.noise:.3f}{target}"
    )


def met(figure: Figure) -> bool:
    return figure.target is None or figure.ratio <= figure.target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="beside absmax; default: all")
    parser.add_argument("--sequences", type=int, default=48, help="of each text, for the language model")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--sentences", type=int, default=1000, help="of each text, for the embeddings")
    parser.add_argument("--calibration", type=int, default=65_536, help="tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    subjects: dict[str, Callable[[argparse.Namespace], Subject]] = {"minilm": MiniLM, "smollm2": SmolLM2}
    figures = []
    for name in options.models:
        for figure in measured(subjects[name](options), options):
            figures.append(figure)
            print(json.dumps(asdict(figure)) if options.json else line(figure), flush=True)
    return 0 if all(map(met, figures)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
