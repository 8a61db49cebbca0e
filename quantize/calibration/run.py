"""``qz calibrate``: run a model on a text, block by block from its checkpoint, and record the inputs of its linears."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import Unsupported, UsageError
from qz.counted import counted
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.files.folder import Folder
from qz.progress import OnProgress, Progress
from qz.quantize.calibration.hessian_files import HessianFiles, refuse_existing
from qz.quantize.importance.matching import GPTQ_TOKENS
from qz.quantize.importance.statistics import write_statistics
from qz.quantize.libraries.architecture import LoadRequest
from qz.quantize.libraries.examine import examine, library_versions
from qz.quantize.libraries.plain import plain_checkpoint
from qz.quantize.methods import Method
from qz.quantize.planning.budget.sensitivity import Scores
from qz.quantize.planning.unquantized import equal_tensors, refuse_quantized

if TYPE_CHECKING:
    import torch

    from qz.quantize.calibration.recording import Recording
    from qz.quantize.calibration.running.unfinished import Unfinished
    from qz.quantize.calibration.running.weights import Weights
    from qz.quantize.libraries.transformers.runnable import ExpertLayer, Runnable

TOKENS = 1024
"""More of them hardly change the importance of inputs."""
MOST_STEPS, MOST_PIXELS = 100, 4096


@dataclass(frozen=True, slots=True)
class CalibrationRequest:
    """``text``: a file, or None for qz's own. ``tokens``: as many are read; None for as many as are enough."""

    output: Path
    text: Path | None = None
    tokens: int | None = None
    hessians: bool = False
    device: str = "auto"
    scores: Method | None = None
    """Score how sensitive each linear is to this method."""
    generate: bool = False
    """Let the model write the text."""
    resume: bool = True
    """Go on where an interrupted run with the same settings was."""
    steps: int | None = None
    """Of a pipeline, for each prompt; None for as many as are enough."""
    resolution: int | None = None
    """Of a pipeline: pixels of either side."""
    seed: int = 0
    experts: bool = False
    """Record the inputs of experts, too."""

    def __post_init__(self) -> None:
        if self.generate and self.text is not None:
            raise UsageError("--generate and --text exclude each other: the model writes a text, or reads one.")
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise UsageError(f"--steps {self.steps} is not a number of steps from 1 to {MOST_STEPS}.")
        if self.resolution is not None and not 1 <= self.resolution <= MOST_PIXELS:
            raise UsageError(f"--resolution {self.resolution} is not a number of pixels from 1 to {MOST_PIXELS:,}.")
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"--tokens {self.tokens} is not a number of tokens. The default is {TOKENS:,}.")

    def require_text(self) -> None:
        """Raise UsageError for Hessians of qz's own text."""
        if self.hessians and self.text is None and not self.generate:
            raise UsageError(
                f"--hessians need a text of {GPTQ_TOKENS:,} tokens or more, of the kind that the model is for. "
                "Name one with --text FILE, or let the model write one with --generate."
            )

    @property
    def adds_own_text(self) -> bool:
        """Whether some of the tokens are of qz's own text, see ``text.varied_sequences``."""
        return self.hessians and self.text is not None

    @property
    def text_name(self) -> str:
        """What the report calls the text."""
        return "generated" if self.generate else "default" if self.text is None else self.text.name

    @property
    def wanted(self) -> int:
        return self.tokens or (GPTQ_TOKENS if self.hessians else TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was recorded. ``unseen``: weights of linears that no token came to."""

    source: str
    output: str
    architecture: str
    text: str
    """The file's name, ``default`` or ``generated``."""
    tokens: int
    sequences: int
    linears: int
    unseen: tuple[str, ...]
    hessian_files: tuple[str, ...]
    hessian_bytes: int
    device: str
    dtype: str
    bytes_read: int
    seconds: float
    warnings: tuple[str, ...] = ()
    dry_run: bool = False
    scores: Scores | None = None
    component_scores: Mapping[str, Scores] = field(default_factory=dict)
    """Of a pipeline's denoisers."""
    resumed: bool = False
    steps: int | None = None
    """Of a pipeline; ``sequences`` are its prompts, and ``tokens`` the most that came to a linear."""
    resolution: int | None = None
    seed: int | None = None
    components: tuple[str, ...] = ()
    """Those of a pipeline whose inputs were recorded."""
    weights_at_once: int | None = None
    """Bytes of a pipeline's weights that were in memory together."""

    def as_json(self) -> dict[str, Any]:
        others = ("dry_run", "scores", "component_scores")
        told = {name: value for name, value in asdict(self).items() if name not in others}
        return told | {
            "scores": None if self.scores is None else scores_json(self.scores),
            "component_scores": {name: scores_json(each) for name, each in self.component_scores.items()},
        }


def scores_json(scores: Scores) -> dict[str, Any]:
    """Scores as JSON values, the most sensitive linear first."""
    ranked = sorted(scores.of.items(), key=lambda item: (-item[1], item[0]))
    linears = [{"name": name.removesuffix(".weight"), "score": score} for name, score in ranked]
    return {**scores.about(), "linears": linears}


def calibrate(
    checkpoint: Checkpoint, tokenizer_folder: Folder, source: str, request: CalibrationRequest, progress: OnProgress
) -> Calibration:
    """Record the inputs and write the file, which is complete or absent. Raises what reading and running raise."""
    refuse_existing(request.output)
    request.require_text()
    checkpoint = plain_checkpoint(checkpoint)
    refuse_quantized(checkpoint)
    if checkpoint.library != "transformers":
        raise Unsupported(
            f"{checkpoint.folder.location} is a model of {checkpoint.library} without its pipeline, whose text "
            "encoders and scheduler it needs to be run. Name the pipeline, and this folder with --subfolder; or "
            "quantize it with --scales search, which needs no calibration."
        )
    architecture = examine(
        checkpoint, LoadRequest(None), equal=lambda one, other: equal_tensors(checkpoint, one, other)
    )
    run = _Run(checkpoint, tokenizer_folder, source, request, progress)
    return run.run(architecture.class_name, architecture.dtype)


def token_warnings(tokens: int, unseen: tuple[str, ...], *, hessians: bool) -> tuple[str, ...]:
    """Warnings about linears that saw few tokens, or none."""
    found = []
    if hessians and tokens < GPTQ_TOKENS:
        found.append(f"with fewer than {GPTQ_TOKENS:,} tokens, GPTQ fits the text more than the model")
    if unseen:
        count = counted(len(unseen), "linear")
        shown = ", ".join(unseen[:3]) + (" …" if len(unseen) > 3 else "")
        found.append(f"no token came to {count}, whose inputs will count all the same: {shown}")
    return tuple(found)


class _Run:
    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer_folder: Folder,
        source: str,
        request: CalibrationRequest,
        progress: OnProgress,
    ) -> None:
        self.checkpoint, self.tokenizer_folder = checkpoint, tokenizer_folder
        self.source, self.request, self.progress = source, request, progress
        self.begun = time.monotonic()

    def run(self, class_name: str, dtype: str) -> Calibration:
        from qz.quantize.calibration.running import text
        from qz.quantize.calibration.running.unfinished import unfinished
        from qz.quantize.compute.run_device import run_device
        from qz.quantize.libraries.transformers.runnable import runnable

        request = self.request
        words = text.text_of(request.text)
        tokenizer = text.open_tokenizer(self.tokenizer_folder)
        device, run_dtype = run_device(request.device, dtype)
        model = runnable(self.checkpoint, class_name, run_dtype, device)
        with unfinished(request.output, resume=request.resume) as kept:
            return self._go_on(kept, class_name, words, model, tokenizer)

    def _go_on(self, kept: Unfinished, class_name: str, words: str, model: Runnable, tokenizer: Any) -> Calibration:
        """From where an earlier run was interrupted, or from the beginning."""
        from qz.quantize.calibration.running.weights import Weights
        from qz.quantize.libraries.transformers.runnable import running

        request, device, run_dtype = self.request, model.device, model.dtype
        kept.open(self._fingerprint(class_name, str(run_dtype), str(device), words))
        rows = kept.rows or self._rows(class_name, words, model, tokenizer)
        kept.begin(rows)
        tokens = sum(map(len, rows))
        weights, files = Weights(self.checkpoint, model), HessianFiles(request.output, kept)
        with closing(self._recording(class_name, model, files)) as recording:
            if kept.count:
                self.progress(Progress("Calibrating", kept=(kept.count, len(recording.blocks)), unit="block"))
            with running(class_name, self.checkpoint.folder.location):
                self._run_blocks(weights, recording, rows)
            recording.write_hessians()
            sums = recording.input_sums()
            for folder in (self.checkpoint.folder, self.tokenizer_folder):
                folder.check()
            scores, read_again = self._scores(class_name, rows, device)
            refuse_existing(request.output)
            about = self._about(class_name, tokens)
            write_statistics(request.output, sums, about, recording.places(), files.hashes, scores)
            kept.remove()
        unseen = tuple(name for name, each in sums.items() if each.tokens == 0)
        return Calibration(
            source=self.source,
            output=str(request.output),
            architecture=class_name,
            text=request.text_name,
            tokens=tokens,
            sequences=len(rows),
            linears=len(sums),
            unseen=unseen,
            hessian_files=tuple(files.hashes),
            hessian_bytes=files.nbytes,
            device=str(device),
            dtype=str(run_dtype).removeprefix("torch."),
            bytes_read=weights.bytes_read + read_again,
            seconds=time.monotonic() - self.begun,
            warnings=self._warnings(tokens, unseen),
            scores=scores,
            resumed=kept.count > 0,
        )

    def _recording(self, class_name: str, model: Runnable, files: HessianFiles) -> Recording:
        from qz.quantize.calibration.recording import Recording
        from qz.quantize.calibration.running.blocks import blocks_of
        from qz.quantize.calibration.running.recorder import Recorder

        blocks = blocks_of(model.model)
        experts = self._experts(class_name, model) if self.request.experts else None
        recorder = Recorder(model.linears, model.head, hessians=self.request.hessians, experts=experts)
        return Recording(recorder, files, blocks, model.device)

    def _run_blocks(self, weights: Weights, recording: Recording, rows: list[list[int]]) -> None:
        """Run the model on the tokens, one block in memory at a time; ``recording`` sees what its linears are given."""
        from qz.quantize.calibration.running import text
        from qz.quantize.calibration.running.blocks import BlockPass

        model, passed = weights.runnable, set[str]()

        def visited(part: str) -> None:
            passed.add(part)
            recording.visited(part)
            self.progress(Progress("Calibrating", len(passed), len(steps.parts), unit="block"))

        steps = BlockPass(model.model, weights, visited, entering=recording.entering, replay=recording.known)
        weights.load_rest(steps.parts, model.head)
        steps.run([model.arguments(ids) for ids in text.batches(rows)])

    def _experts(self, class_name: str, model: Runnable) -> dict[str, ExpertLayer]:
        found = model.experts()
        if not found:
            raise Unsupported(
                f"{self.checkpoint.folder.location}: {class_name} has no experts that are quantized one by one: leave "
                "out --experts."
            )
        return found

    def _rows(self, class_name: str, words: str, model: Runnable, tokenizer: Any) -> list[list[int]]:
        """The tokens that the model reads, a sequence each: of ``words``, or of a text that it writes now."""
        from qz.quantize.calibration.running import text
        from qz.quantize.calibration.running.generated import sample
        from qz.quantize.libraries.transformers.runnable import runnable

        if not self.request.generate:
            cut = text.varied_sequences if self.request.adds_own_text else text.sequences
            return cut(tokenizer, words, model.longest, self.request.wanted)
        writer = runnable(self.checkpoint, class_name, model.dtype, model.device)
        return sample(self.checkpoint, writer, tokenizer, self.request.wanted, self.progress)

    def _fingerprint(self, class_name: str, dtype: str, device: str, words: str) -> dict[str, Any]:
        """What must be the same for a run to go on where another was interrupted."""
        from qz import __version__

        request = self.request
        return {
            "source": self.checkpoint.folder.identity(),
            "class": class_name,
            "dtype": dtype,
            "device": device,
            "text": None if request.generate else sha256(words.encode()).hexdigest(),
            "tokens": request.wanted,
            "hessians": request.hessians,
            "experts": request.experts,
            "versions": {"qz": __version__, **library_versions()},
        }

    def _about(self, class_name: str, tokens: int) -> dict[str, str]:
        """What the file of statistics says of how it was made."""
        text = self.request.text_name if self.request.text is None else "own"
        return {"architecture": class_name, "tokens": str(tokens), "text": text}

    def _scores(self, class_name: str, rows: list[list[int]], device: torch.device) -> tuple[Scores | None, int]:
        """Scores of what the method quantizes, if they are asked for, and the bytes that were read for them.

        They are of some of the text, in float32: the errors of bfloat16 itself are larger than many a score.
        """
        method = self.request.scores
        if method is None:
            return None, 0
        import torch

        from qz.quantize.calibration import scores
        from qz.quantize.calibration.running.text import first_tokens
        from qz.quantize.calibration.running.weights import Weights
        from qz.quantize.compute.devices import arithmetic_on
        from qz.quantize.libraries.transformers.runnable import runnable

        weights = Weights(self.checkpoint, runnable(self.checkpoint, class_name, torch.float32, device))
        found = scores.score_text(
            weights,
            first_tokens(rows, scores.TOKENS),
            scores.quantized_names(self.checkpoint, weights.runnable, method),
            method,
            arithmetic_on(self.request.device),
            self.progress,
        )
        return found, weights.bytes_read

    def _warnings(self, tokens: int, unseen: tuple[str, ...]) -> tuple[str, ...]:
        request, found = self.request, list(self.checkpoint.choices)
        if tokens < request.wanted:
            has = "with qz's own, the text has" if request.adds_own_text else "the text has"
            found.append(f"{has} {tokens:,} tokens for this model, fewer than the {request.wanted:,} asked for")
        return (*found, *token_warnings(tokens, unseen, hessians=request.hessians))
