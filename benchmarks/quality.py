"""How good the checkpoints are that qz writes in one format: trained models against their originals.

``make quality``: the error of MiniLM's weights and embeddings, the KL divergence of SmolLM2-135M's predictions on two
texts that calibration has not seen, the same of a mixture of experts made of it (``benchmarks.upcycled`` trains it: a
day of a CPU, so without a GPU it must be named), and the error of a small text-to-image pipeline's denoiser and
latents for prompts that it has not seen (``benchmarks.emoji`` trains it), all made by the commands ``qz calibrate`` and
``qz quantize``. Every output is loaded plainly, quantized experts by ``qz.load``; then its weights, as bitsandbytes
gives them back, are computed with in float32, so that nothing but they differ. It takes minutes on a GPU, hours on a
CPU with the full texts.

    python -m benchmarks.quality [--models minilm smollm2 mixture emoji] [--methods …] [--sequences 48] [--length 512]
                                 [--calibration 16384] [--device auto] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks import emoji, real_models, upcycled
from qz import load

KEPT, KEPT_GROUPS = 0.06, 0.16
"""Shares of the weights that stay at 16 bit: linears one by one, and in groups."""
RANDOM = 3
"""Random choices of the same size, whose mean loss the others are compared with."""


@dataclass(frozen=True, slots=True)
class Method:
    """``options`` of ``qz quantize``; ``known``: the file given to ``--importance`` or, where layers are kept, to
    ``--scores``."""

    options: tuple[str, ...] = ()
    known: str | None = None
    kept: float = 0.0
    """Of the weights, chosen by qz, or where there is a ``seed`` at random."""
    seed: int | None = None

    @property
    def base(self) -> str:
        return f"random {self.kept:.0%}" if self.kept else "absmax"


SEARCH, GPTQ, SPLIT = ("--scales", "search"), ("--rounding", "gptq"), ("--split-groups",)
METHODS = {
    "absmax": Method(),
    "absmax, double": Method(("--double-quant",)),
    "search": Method(SEARCH),
    "search, double": Method((*SEARCH, "--double-quant")),
    "importance": Method((), "statistics"),
    "importance, double": Method(("--double-quant",), "statistics"),
    "importance, 1,024 tokens": Method((), "small"),
    "importance, not of experts": Method((), "without experts"),
    "importance, imatrix": Method((), "imatrix"),
    "importance, two prompts": Method((), "two"),
    "importance, qz's prompts": Method((), "prompts"),
    "gptq": Method(GPTQ, "statistics"),
    "gptq, its own text": Method(GPTQ, "generated"),
    "fp4": Method(("--fp4",)),
    "fp4, search": Method(("--fp4", *SEARCH)),
    "fp4, importance": Method(("--fp4",), "statistics"),
    **{f"6 % kept, random {seed}": Method(SPLIT, kept=KEPT, seed=seed) for seed in range(1, RANDOM + 1)},
    "6 % kept, names and places": Method(SPLIT, kept=KEPT),
    "6 % kept, scores": Method(SPLIT, "scores", KEPT),
    **{f"16 % in groups, random {seed}": Method(kept=KEPT_GROUPS, seed=seed) for seed in range(1, RANDOM + 1)},
    "16 % in groups, names and places": Method(kept=KEPT_GROUPS),
    "16 % in groups, scores": Method((), "scores", KEPT_GROUPS),
    "16 % in groups, scores, gptq": Method(GPTQ, "statistics", KEPT_GROUPS),
}
TARGETS = {
    "minilm": {"search": 0.94, "importance": 0.82},
    "smollm2": {
        "search": 0.86,
        "importance": 0.50,
        "importance, 1,024 tokens": 0.50,
        "importance, imatrix": 0.50,
        "gptq": 0.40,
        "gptq, its own text": 0.40,
        "6 % kept, scores": 0.70,
    },
    "mixture": {"search": 0.86, "importance": 0.50, "gptq": 0.40},
    "emoji": {"search": 0.90, "importance": 0.95, "gptq": 0.40},
}
"""Of absmax's loss on unseen text, or of a random choice's."""
WEIGHT_TARGETS = {("minilm", "search"): 0.0857}
SMALL = 1024


@dataclass(frozen=True, slots=True)
class Figure:
    """One checkpoint. ``loss``: 1 − cosine of embeddings, or KL divergence in nats per token, by text."""

    model: str
    method: str
    weight_error: float
    loss: dict[str, float]
    ratio: float
    """To absmax's, or to that of layers kept at random; the mean over texts."""
    noise: float
    """Standard error of the ratio: over sentences or sequences, in pairs."""
    target: float | None
    weight_target: float | None = None
    expected: float | None = None
    """The loss that qz expected on its own text, where it chose layers."""


Calibration = tuple[str | Path | int, ...] | Callable[[Path], object]
"""Words of ``qz calibrate``, or what writes a file that it does not."""


class Subject(Protocol):
    """A model, what it is calibrated on, and what it is tried on."""

    name: str
    source: Path
    part: tuple[str, ...]
    """Words of commands that name what of the source is quantized."""
    keeps_layers: bool
    """Whether layers at 16 bit are tried, too."""

    def calibrations(self, work: Path, tokens: int, /) -> dict[str, Calibration]:
        """By the name of what is known of the inputs."""

    def load(self, folder: Path) -> Any: ...
    def losses(self, reference: Any, model: Any) -> dict[str, torch.Tensor]: ...


class Reader:
    """What reads text, and is calibrated on the documentation of Python."""

    part: tuple[str, ...] = ()
    keeps_layers = False

    def calibrations(self, work: Path, tokens: int) -> dict[str, Calibration]:
        text = work / "documentation.txt"
        text.write_text(real_models.documentation(), encoding="utf-8")
        return {
            "statistics": ("--text", text, "--tokens", tokens, "--hessians", "--scores"),
            "small": ("--text", text, "--tokens", SMALL),
        }


class MiniLM(Reader):
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
        self.embedded: dict[str, torch.Tensor] = {}

    def load(self, folder: Path) -> Any:
        from transformers import BertModel

        return BertModel.from_pretrained(folder, device_map=self.device)

    def batches(self, sentences: list[str]) -> Iterable[dict[str, torch.Tensor]]:
        for start in range(0, len(sentences), 64):
            encoded = self.tokenizer(sentences[start : start + 64], padding=True, truncation=True, return_tensors="pt")
            yield dict(encoded.to(self.device))

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


class SmolLM2(Reader):
    """Predictions of the next token; the loss of a sequence is the mean KL divergence from the original's."""

    name = "smollm2"
    keeps_layers = True

    def calibrations(self, work: Path, tokens: int) -> dict[str, Calibration]:
        more: dict[str, Calibration] = {
            "imatrix": lambda path: self.write_imatrix(path, tokens),
            "scores": ("--text", work / "documentation.txt", "--tokens", 2 * SMALL, "--scores"),
            "generated": ("--generate", "--tokens", tokens, "--hessians"),
        }
        return super().calibrations(work, tokens) | more

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.source, self.device, self.length = real_models.smollm2(), options.device, options.length
        tokenizer = AutoTokenizer.from_pretrained(self.source)

        def rows(text: str, count: int) -> torch.Tensor:
            return real_models.rows(tokenizer, text, self.length, count).to(self.device)

        self.rows = rows
        self.texts = {
            "prose": rows(real_models.prose(), options.sequences),
            "tech": rows(real_models.jargon(), options.sequences),
        }

    def write_imatrix(self, path: Path, tokens: int) -> None:
        """As llama-imatrix does, from sums that hooks take while transformers runs the model."""
        import gguf

        model, sums = self.load(self.source).float(), dict[str, torch.Tensor]()
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
        for module_path, module in model.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                sums[name := f"{names.get_name(f'model.{module_path}')}.weight"] = torch.zeros(())

                def add(_: Any, given: tuple[torch.Tensor], name: str = name) -> None:
                    sums[name] = sums[name] + given[0].double().cpu().square().flatten(0, -2).sum(0)

                module.register_forward_pre_hook(add)
        rows = self.rows(real_models.documentation(), tokens // self.length)
        for row in rows:
            model(row.unsqueeze(0))
        writer = gguf.GGUFWriter(path, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["documentation.txt"])
        writer.add_uint32("imatrix.chunk_count", len(rows))
        writer.add_uint32("imatrix.chunk_size", self.length)
        for name, each in sums.items():
            writer.add_tensor(f"{name}.in_sum2", each.float().unsqueeze(0).numpy())
            writer.add_tensor(f"{name}.counts", np.full((1, 1), rows.numel(), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def load(self, folder: Path) -> Any:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(folder, device_map=self.device)

    def losses(self, reference: Any, model: Any) -> dict[str, torch.Tensor]:
        def divergence(row: torch.Tensor) -> torch.Tensor:
            expected, found = (each(row.unsqueeze(0)).logits.float().log_softmax(-1) for each in (reference, model))
            mean: torch.Tensor = (expected.exp() * (expected - found)).sum(-1).mean()
            return mean.double().cpu()

        return {name: torch.stack([divergence(row) for row in rows]) for name, rows in self.texts.items()}


class Mixture(SmolLM2):
    """SmolLM2 with experts, which are quantized, too."""

    name = "mixture"
    part: tuple[str, ...] = ("--experts",)
    keeps_layers = False

    def __init__(self, options: argparse.Namespace) -> None:
        folder = upcycled.trained(options.device)
        super().__init__(options)
        self.source = folder

    def calibrations(self, work: Path, tokens: int) -> dict[str, Calibration]:
        text = work / "documentation.txt"
        without = ("calibrate", self.source, "--text", text, "--tokens", tokens, "--hessians", "--device", self.device)
        return {
            **Reader.calibrations(self, work, tokens),
            "statistics": ("--text", text, "--tokens", tokens, "--hessians"),
            "without experts": lambda path: qz(*without, "-o", path),
        }

    def load(self, folder: Path) -> Any:
        model = load(folder, device=self.device)
        model.set_experts_implementation("eager")
        return model


class Emoji:
    """Pictures of names that the transformer was not trained on. The losses of a name are the mean over the steps of
    |Δ|² / |y|², y the denoiser's output at the original's step, and the same of the last latents."""

    name = "emoji"
    part: tuple[str, ...] = ("--subfolder", "transformer")
    keeps_layers = False
    steps = 8

    def __init__(self, options: argparse.Namespace) -> None:
        from diffusers import StableDiffusion3Pipeline

        self.source, self.device = emoji.trained(options.device), options.device
        self.seen, unseen = emoji.prompts()
        self.prompts = unseen[: options.prompts]
        without: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None, "torch_dtype": torch.float32}
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(self.source, **without)
        self.pipeline.to(self.device).set_progress_bar_config(disable=True)
        self.calls: list[tuple[dict[str, Any], torch.Tensor]] = []
        self.latents: torch.Tensor | None = None

    def calibrations(self, work: Path, _: int) -> dict[str, Calibration]:
        many, few = work / "names.txt", work / "two-names.txt"
        many.write_text("\n".join(self.seen[:32]), encoding="utf-8")
        few.write_text("\n".join(self.seen[:2]), encoding="utf-8")
        return {"statistics": ("--text", many, "--hessians"), "two": ("--text", few), "prompts": ()}

    def load(self, folder: Path) -> Any:
        inside = folder / "transformer"
        return load(inside if inside.is_dir() else folder, device=self.device)

    def draw(self, transformer: Any) -> torch.Tensor:
        self.pipeline.transformer = transformer
        noise = [torch.Generator().manual_seed(each) for each in range(len(self.prompts))]
        how = {"num_inference_steps": self.steps, "generator": noise, "output_type": "latent"}
        latents: torch.Tensor = self.pipeline(self.prompts, **how).images
        return latents.flatten(1)

    def losses(self, reference: Any, model: Any) -> dict[str, torch.Tensor]:
        if self.latents is None:
            keep = lambda _, __, given, found: self.calls.append((dict(given), found[0]))  # noqa: E731
            hook = reference.register_forward_hook(keep, with_kwargs=True)
            self.latents = self.draw(reference)
            hook.remove()
        changed = [relative(found.flatten(1), model(**given)[0].flatten(1)) for given, found in self.calls]
        both = torch.stack(changed).mean(0).view(2, -1).mean(0)  # with the prompt and without
        return {"denoiser": both, "latents": relative(self.latents, self.draw(model))}


def relative(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Of each row."""
    error, size = (each.double().square().sum(1) for each in (after - before, before))
    return (error / size).cpu()


def qz(*words: str | Path | int) -> dict[str, Any]:
    """The report of a command."""
    command = [sys.executable, "-m", "qz", *map(str, words), "--json", "--quiet"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def calibrate(subject: Subject, work: Path, options: argparse.Namespace, wanted: set[str | None]) -> dict[str, Path]:
    """Those that are ``wanted`` of the subject's calibrations."""
    how = subject.calibrations(work, options.calibration)
    known = {name: work / f"{name}.safetensors" for name in how if name in wanted}
    for name, path in known.items():
        words = how[name]
        if callable(words):
            words(path)
        else:
            qz("calibrate", subject.source, *subject.part, "-o", path, "--device", options.device, *words)
    return known


def quantize(
    subject: Subject, method: Method, output: Path, known: dict[str, Path], reference: Any, device: str
) -> dict[str, Any]:
    """The report of ``qz quantize``."""
    words: list[str | Path | int] = ["quantize", subject.source, *subject.part, "-o", output]
    words += ["--overwrite", "--no-fsync", "--device", device]
    words += [each for each in method.options if method.seed is None or each != SPLIT[0]]
    if method.known is not None:
        words += ["--scores" if method.known == "scores" else "--importance", known[method.known]]
    if method.kept:
        plain = qz("quantize", subject.source, "-o", output.with_name("planned"), "--dry-run")
        more = int(plain["parameters"]["quantized"] * method.kept * (2 - 0.5))
        if method.seed is None:
            words += ["--target-size", plain["memory_footprint"]["after"] + more]
        else:
            for path in at_random(reference, set(plain["skipped"]), more, method):
                words += ["--skip", path]
    return qz(*words)


def at_random(reference: Any, skipped: set[str], nbytes: int, method: Method) -> list[str]:
    """Linears, or groups of them, that take ``nbytes`` more at 16 bit."""
    groups: dict[str, list[str]] = {}
    for path, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and path not in skipped:
            whole = re.sub(r"(gate|up)_proj", "gate_up", re.sub(r"[qkv]_proj", "qkv", path))
            groups.setdefault(path if SPLIT[0] in method.options else whole, []).append(path)
    order, chosen = list(groups.values()), []
    random.Random(method.seed).shuffle(order)
    for group in order:
        size = int(sum(reference.get_submodule(path).weight.numel() for path in group) * 1.5)
        if size <= nbytes:
            chosen += group
            nbytes -= size
    return chosen


def plain(subject: Subject, reference: Any, folder: Path) -> tuple[Any, float]:
    """The checkpoint, loaded plainly, as a float32 model of its dequantized weights; their relative error."""
    loaded, model = subject.load(folder), subject.load(subject.source).float()
    error = norm = 0.0
    for name, weight in dequantized(loaded):
        original = reference.get_parameter(name)
        weight = weight.to(original)
        error += float((weight.double() - original.double()).square().sum())
        norm += float(original.double().square().sum())
        model.get_parameter(name).copy_(weight)
    return model, math.sqrt(error / norm)


def dequantized(model: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """The quantized parameters of a model, by name: of linears, and of experts, which are parametrized."""
    from bitsandbytes.functional import dequantize_4bit

    for path, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            yield f"{path}.weight", dequantize_4bit(module.weight.data, state)
        for leaf in getattr(module, "parametrizations", ()):
            yield f"{path}.{leaf}", getattr(module, leaf)


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
    work.mkdir(parents=True)
    reference = subject.load(subject.source).float()
    asked = [METHODS[name] for name in options.methods or METHODS]
    known = calibrate(subject, work, options, {method.known for method in asked})
    bases: dict[str, list[dict[str, torch.Tensor]]] = {}
    wanted = options.methods or list(METHODS)
    needed = {"absmax", *(METHODS[name].base for name in wanted)}
    for name, method in METHODS.items():
        is_base = name == "absmax" or method.seed is not None
        if name not in wanted and not (is_base and method.base in needed):
            continue
        if method.known not in (None, *known) or (method.kept and not subject.keeps_layers):
            continue
        report = quantize(subject, method, work / "output", known, reference, options.device)
        model, weight_error = plain(subject, reference, work / "output")
        losses = subject.losses(reference, model)
        if is_base:
            bases.setdefault(method.base, []).append(losses)
        below = bases["absmax" if is_base else method.base]
        found, noise = ratio(losses, {text: torch.stack([each[text] for each in below]).mean(0) for text in losses})
        yield Figure(
            subject.name,
            name,
            weight_error,
            {text: float(each.mean()) for text, each in losses.items()},
            found,
            noise,
            TARGETS[subject.name].get(name),
            WEIGHT_TARGETS.get((subject.name, name)),
            report.get("kept_layers", {}).get("expected_loss"),
        )


def line(figure: Figure) -> str:
    losses = "  ".join(f"{name} {value:.5f}" for name, value in figure.loss.items())
    told = ""
    if figure.target is not None:
        told += f"  target {figure.target:.2f}: {'met' if figure.ratio <= figure.target else 'MISSED'}"
    if figure.weight_target is not None:
        told += (
            f"  weights {figure.weight_target}: {'met' if figure.weight_error <= figure.weight_target else 'MISSED'}"
        )
    if figure.expected is not None:
        told += f"  expected {figure.expected:.4f}"
    return (
        f"{figure.model:8} {figure.method:32} weights {figure.weight_error:.4f}  {losses}  "
        f"ratio {figure.ratio:.3f} ± {figure.noise:.3f}{told}"
    )


def met(figure: Figure) -> bool:
    return (figure.target is None or figure.ratio <= figure.target) and (
        figure.weight_target is None or figure.weight_error <= figure.weight_target
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in TARGETS if name != "mixture" or torch.cuda.is_available()]
    parser.add_argument("--models", nargs="+", choices=TARGETS, default=usual)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="beside absmax; default: all")
    parser.add_argument("--sequences", type=int, default=48, help="of each text, for the language model")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--sentences", type=int, default=1000, help="of each text, for the embeddings")
    parser.add_argument("--prompts", type=int, default=100, help="for the pipeline, of names it was not trained on")
    parser.add_argument("--calibration", type=int, default=16_384, help="tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    subjects: dict[str, Callable[[argparse.Namespace], Subject]] = {
        "minilm": MiniLM,
        "smollm2": SmolLM2,
        "mixture": Mixture,
        "emoji": Emoji,
    }
    figures = []
    for name in options.models:
        for figure in measured(subjects[name](options), options):
            figures.append(figure)
            print(json.dumps(asdict(figure)) if options.json else line(figure), flush=True)
    return 0 if all(map(met, figures)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
