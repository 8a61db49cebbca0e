"""Measure the loss while a run is under way: of what it quantizes, or of what it dequantizes against the original."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qz import MalformedInput, MissingInput, Unsupported
from qz.formats.checkpoint.pipeline import read_index
from qz.formats.checkpoint.survey import Checkpoint, open_checkpoint
from qz.formats.files.folder import PIPELINE_INDEX, Folder
from qz.formats.malformed import quoted
from qz.quantize.compute import kernels
from qz.quantize.compute.arrays import NUMPY, Bytes, Memory
from qz.quantize.decoding.open import Reader
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES, LoadRequest
from qz.quantize.libraries.examine import examine
from qz.quantize.libraries.plain import plain_checkpoint
from qz.quantize.methods import BLOCK_SIZE, FourBit, Method
from qz.quantize.planning.plan import Plan, Step, make_plan
from qz.quantize.planning.unquantized import equal_tensors, refuse_quantized
from qz.quantize.settings import Settings
from qz.quantize.streaming.measuring.loss import Loss, Tally
from qz.quantize.streaming.measuring.observer import Values
from qz.quantize.streaming.readers import assemble, reader

if TYPE_CHECKING:
    from qz.quantize.compute.arithmetic import Arithmetic


class Measure:
    """An observer that adds up errors. Kept from run to run, it knows which weights are still to be measured."""

    folders: tuple[Folder, ...] = ()
    """What is read beside the plan's source."""

    def __init__(self) -> None:
        self.tally = Tally()

    def loss(self) -> Loss:
        return self.tally.loss()

    def check(self, plan: Plan) -> None:
        """Raise MalformedInput if the loss of ``plan`` cannot be measured."""

    def alone(self, plan: Plan, settings: Settings) -> Loss:
        """Compute what ``plan`` says and write nothing of it: the loss of a dry run."""
        from qz.quantize.compute.devices import arithmetic_on

        arithmetic = arithmetic_on(settings.device)
        self.finish(plan, arithmetic, settings.threads or arithmetic.threads)
        return self.loss()

    def finish(self, plan: Plan, arithmetic: Arithmetic, threads: int) -> None:
        """Compute once more, without writing, what an earlier run of ``plan`` had finished already."""
        from qz.quantize.streaming.discard import DiscardOutput
        from qz.quantize.streaming.run import Run

        left = {
            step.weight.name
            for step in plan.steps
            if step.act != "keep" and step.weight.count and step.name not in self.tally.sums
        }
        if left:
            Run(plan, plan.checkpoint.folder, DiscardOutput(), arithmetic, observer=self, only=left).convert(threads)
        for folder in self.folders:
            folder.check()

    def give_up(self) -> None:
        for folder in self.folders:
            folder.give_up()

    def quantized(
        self,
        step: Step,
        method: Method,
        start: int,
        original: Values,
        codes: NDArray[Any],
        scales: NDArray[np.float32],
        memory: Memory,
    ) -> None: ...

    def absmax_known(self, step: Step, method: FourBit, absmax: NDArray[np.float32]) -> None: ...

    def dequantized(self, step: Step, start: int, values: Values, memory: Memory) -> None: ...


class WhileQuantizing(Measure):
    """Dequantizes what was just quantized. Under double quantization a weight is kept until its absmax is settled."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, list[tuple[int, Values, NDArray[Any]]]] = {}
        self.lock = threading.Lock()

    def quantized(
        self,
        step: Step,
        method: Method,
        start: int,
        original: Values,
        codes: NDArray[Any],
        scales: NDArray[np.float32],
        memory: Memory,
    ) -> None:
        if not isinstance(method, FourBit) or not method.double_quant:
            self._add(step, method, original, codes, scales, memory)
        else:
            kept = start, (original[0].copy(), original[1]), codes.copy()
            with self.lock:
                self.held.setdefault(step.weight.name, []).append(kept)

    def absmax_known(self, step: Step, method: FourBit, absmax: NDArray[np.float32]) -> None:
        with self.lock:
            held = self.held.pop(step.weight.name, [])
        for start, original, codes in held:
            first = start // BLOCK_SIZE
            scales = absmax[first : first + -(-original[0].size // BLOCK_SIZE)]
            self._add(step, method, original, codes, scales, lambda _, nbytes: np.empty(nbytes, np.uint8))

    def _add(
        self,
        step: Step,
        method: Method,
        original: Values,
        codes: NDArray[Any],
        scales: NDArray[np.float32],
        memory: Memory,
    ) -> None:
        dtype = SAFETENSORS_NAMES[step.weight.dtype]
        again = memory("dequantized", original[0].size * np.dtype(NUMPY[dtype]).itemsize).view(NUMPY[dtype])
        if isinstance(method, FourBit):
            kernels.dequantize_4bit(codes, scales, method.quant_type, BLOCK_SIZE, dtype, again)
        else:
            kernels.dequantize_int8(codes, scales, dtype, again.reshape(codes.shape))
        self.tally.add(step.name, *original, again, dtype)


class AgainstOriginal(Measure):
    """Reads the same values of the original model, however its tensors are named and laid out."""

    def __init__(self, original: Checkpoint) -> None:
        """Raises Unsupported if ``original`` is quantized, and what planning raises."""
        super().__init__()
        self.folder, self.folders = original.folder, (original.folder,)
        self.steps = steps_of(original)
        self.readers: dict[str, Reader] = {}
        self.whole: tuple[str, Bytes] | None = None
        self.lock = threading.Lock()

    def check(self, plan: Plan) -> None:
        """Raise MalformedInput unless the original has every weight of ``plan`` that is dequantized, in its shape."""
        for step in plan.steps:
            if step.act == "keep":
                continue
            name, found = step.name, self.steps.get(step.name)
            if found is None or found.weight.shape != step.weight.shape:
                shape = f"as {list(found.weight.shape)}, not {list(step.weight.shape)}" if found else "not at all"
                raise MalformedInput(
                    f"{self.folder.location} is not the original of {plan.checkpoint.folder.location}: it has "
                    f"{quoted(name)} {shape}. Name the model that was quantized."
                )

    def dequantized(self, step: Step, start: int, values: Values, memory: Memory) -> None:
        name = step.name
        original, dtype = self._original(self.steps[name], start, start + values[0].size, memory)
        if dtype not in NUMPY:
            raise Unsupported(
                f"{self.folder.location} holds {quoted(name)} as {dtype}. Compare with float32, float16 or bfloat16."
            )
        self.tally.add(name, original.view(NUMPY[dtype]), dtype, *values)

    def _original(self, step: Step, start: int, stop: int, memory: Memory) -> tuple[Bytes, str]:
        name = step.name

        def own(use: str, nbytes: int) -> Bytes:
            return memory(f"original {use}", nbytes)

        if step.weight.conversion is None and not step.weight.transposed:
            with self.lock:
                opened = self.readers.setdefault(name, reader(self.folder, step.sources[0]))
            return opened.read(start, stop, step.sources[0].dtype, own)
        dtype = SAFETENSORS_NAMES[step.weight.dtype]
        with self.lock:  # the library merges or splits it: kept for the weight's next chunks
            if self.whole is None or self.whole[0] != name:
                self.whole = name, assemble(self.folder, step.weight, step.sources)
            raw = self.whole[1]
        size = np.dtype(NUMPY[dtype]).itemsize
        return raw[start * size : stop * size], dtype


def steps_of(original: Checkpoint) -> dict[str, Step]:
    """How the original's weights are read, by the name under which the library saves them."""
    original = plain_checkpoint(original)
    refuse_quantized(original)
    architecture = examine(original, LoadRequest(None), equal=lambda one, other: equal_tensors(original, one, other))
    plan = make_plan(original, architecture, None, 1 << 62)
    return {step.name: step for step in plan.steps}


def original_checkpoint(folder: Folder, quantized: Checkpoint, subfolder: str | None = None) -> Checkpoint:
    """The original in ``folder``; of a pipeline, the component that has the class of what was ``quantized``.

    ``subfolder`` chooses between several such components. Raises MissingInput where there is none.
    """
    if "config.json" in folder.sizes() or PIPELINE_INDEX not in folder.sizes():
        return open_checkpoint(folder)
    entries = read_index(folder).items()
    named = {name for name, entry in entries if isinstance(entry, list) and entry[-1:] == [quantized.architecture]}
    wanted = (subfolder or "").strip("/")
    name = wanted if wanted in named else min(named) if len(named) == 1 else None
    if name is None:
        there = ", ".join(quoted(name) for name in sorted(named)) or "none"
        raise MissingInput(
            f"{folder.location} is a pipeline, and which component is the original cannot be told (components with "
            f"the class {quantized.architecture}: {there}). Name that folder with --against."
        )
    return open_checkpoint(folder.subfolder(name))
