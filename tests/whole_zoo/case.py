"""One model class: what the library writes, what qz writes, and whether the output loads, runs and goes back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from converted import dequantized, quantized
from qz import QzError
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.inspection.model import inspect_model, read_folder
from qz.quantize.inspection.report import Origin
from reference import config_of, dequantized_by_bitsandbytes, differing_files, differing_tensors, tensors_of
from whole_zoo.inputs import OF_DTYPES, Inputs, inputs_that_run
from whole_zoo.oracles import LIBRARIES, Library, differ_in_dtype_only, differing_values, loads_back

METHODS = ("nf4", "int8")
SAMPLED = {"fp4": 8, "nf4-double": 8}
"""Methods tried on a part of the classes: one of so many."""
NEAR = 0.5
"""Cosine between the outputs of the original and of a model with a layer kept on purpose; nonsense is near 0."""
ENOUGH = 32
"""Numbers whose direction says something: the two logits of a classifier with random weights point anywhere."""
_CANNOT = re.compile(r"its weight is read by|called by \w+ with ")
"""Why a layer is kept that cannot work quantized."""
STAGE = "stage"
"""A file in a case's folder: what is being done, for the case that the process does not survive."""

SECONDS = 15
"""CPU time for finding a model that runs."""

KNOWN = {
    (
        "chinese_clip",
        "another value",
    ): "the library zeroes a row of the embeddings whenever it loads; qz keeps the stored one",
    (
        "chinese_clip",
        "other bytes",
    ): "the library zeroes a row of the embeddings whenever it loads; qz keeps the stored one",
}
"""Differences that are understood, by kind and the beginning of the fault."""


class NotBuilt(Exception):
    """The zoo has no small model of a class; the text says why."""


@dataclass(frozen=True)
class Case:
    """A class to try. ``rows_of`` yields what comes of it, a row for each method, in a folder of its own."""

    library: str
    kind: str
    """The model type in transformers, the class in diffusers."""
    architecture: str
    rows_of: Callable[[Case, Path], Iterator[Row]]
    methods: tuple[str, ...] = ()
    """Those to try; none: ``METHODS``, and for some classes those that are tried on a part of them."""

    def rows(self, folder: Path) -> Iterator[Row]:
        return self.rows_of(self, folder)

    def row(self, method: str = "", result: str = "", why: str = "") -> Row:
        return Row(self.library, self.kind, self.architecture, method, result, " ".join(why.split())[:400])


@dataclass
class Row:
    """What came of a case: ``result`` in a word or two, ``why`` in a sentence, ``faults`` that nothing explains."""

    library: str
    kind: str
    architecture: str
    method: str
    result: str = ""
    why: str = ""
    ran: str = ""
    faults: list[str] = field(default_factory=list)


def seed(name: str) -> None:
    torch.manual_seed(zlib.crc32(name.encode()))


def fill(model: torch.nn.Module) -> None:
    """Random weights, also where a class begins with zeros or ones."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.normal_(std=0.05)


def methods_of(name: str) -> list[str]:
    number = zlib.crc32(name.encode())
    return [*METHODS, *(method for order, (method, one_of) in enumerate(SAMPLED.items()) if number % one_of == order)]


def model_rows(small_models: Callable[[], Iterator[Any]]) -> Callable[[Case, Path], Iterator[Row]]:
    """The rows of the first of the small models that runs, or of the first; a single one for a class without any."""

    def rows_of(case: Case, folder: Path) -> Iterator[Row]:
        seed(case.architecture)
        source = folder / "source"
        try:
            small = first_that_runs(small_models())
            small.save_pretrained(source)
        except NotBuilt as error:
            yield case.row(result="not built", why=str(error))
            return
        except Exception as error:  # the library's own trouble with a random model
            yield case.row(result="not built", why=f"{type(error).__name__}: {error}")
            return
        mark(folder, "", "while the library loads and runs the original")
        library = LIBRARIES[case.library](type(small), source)
        try:
            model, _ = library.loaded(source)
            inputs = inputs_that_run(model)
            if inputs.values is None and OF_DTYPES.search(inputs.why):  # loaded, a part of it is in float32
                small.float().save_pretrained(source)
                model, _ = library.loaded(source)
                inputs = inputs_that_run(model)
        except Exception as error:
            yield case.row(result="not built", why=f"does not load what it saved: {type(error).__name__}: {error}")
            return
        for method in case.methods or methods_of(case.architecture):
            row = case.row(method)
            try:
                _compare(row, model, inputs, source, folder / method)
            except Exception as error:
                row.faults.append(f"{type(error).__name__}: {str(error).strip()[:300]}")
            _explain(row)
            shutil.rmtree(folder / method, ignore_errors=True)
            yield row

    return rows_of


def not_tried(result: str, why: str) -> Callable[[Case, Path], Iterator[Row]]:
    """The one row of what there is nothing to try of."""

    def rows_of(case: Case, _: Path) -> Iterator[Row]:
        yield case.row(result=result, why=why)

    return rows_of


def first_that_runs(models: Iterator[Any]) -> Any:
    """With random weights, in bfloat16, or in float32 where the class computes in it whatever its weights are."""
    end = time.process_time() + SECONDS
    first = None
    for model in models:
        fill(model.bfloat16().eval())
        inputs = inputs_that_run(model)
        if inputs.values is None and OF_DTYPES.search(inputs.why):
            inputs = inputs_that_run(model.float())
        if inputs.values is not None:
            return model
        first = model.bfloat16() if first is None else first
        if time.process_time() > end:
            break
    return first


OTHER_CLASS = re.compile("whose weights these are: config.json names")
"""What qz says of weights that are not of the class that config.json names."""


def _explain(row: Row) -> None:
    for (kind, beginning), reason in KNOWN.items():
        if kind == row.kind and any(fault.startswith(beginning) for fault in row.faults):
            row.faults = [fault for fault in row.faults if not fault.startswith(beginning)]
            row.result, row.why = "known difference", reason


def _compare(row: Row, model: Any, inputs: Inputs, source: Path, folder: Path) -> None:
    output, reference, plain = folder / "output", folder / "reference", folder / "plain"
    library = LIBRARIES[row.library](type(model), source)
    mark(source.parent, row.method, "in qz quantize")
    try:
        summary = quantized(source, output, row.method)
    except QzError as error:
        row.result, row.why = "refused", one_line(str(error).replace(str(source), "the model"))
        mark(source.parent, row.method, "while the library quantizes")
        if "nothing of" not in row.why and _library_can(library, source, reference, row.method):
            row.faults.append("refused, though what the library writes loads back")
        return
    taken = next((text for text in summary.warnings if OTHER_CLASS.search(text)), None)
    if taken is not None and library.loaded(source)[1]:
        row.result, row.why = "known difference", f"{taken}; the library makes up what its class lacks"
        row.ran = "the library's quantized model has values that it made up"
        return
    kept = any(_CANNOT.search(reason) for reason in summary.skipped.values())
    own_names = any("the model's own parameter names" in warning for warning in summary.warnings)
    row.result = "kept on purpose" if kept else "the model's names" if own_names else "identical"
    row.why = next((text for text in summary.warnings if _CANNOT.search(text)), "") if kept else ""
    mark(source.parent, row.method, "while the library quantizes")
    listed = config_of(output)["quantization_config"]["llm_int8_skip_modules"]
    try:
        theirs = library.quantized(source, row.method, listed)
        library.save(theirs, reference, own_names=own_names)
    except Exception as error:
        row.result, row.why = "the library fails", one_line(f"{type(error).__name__}: {error}")
        theirs, others = None, []
    else:
        if row.method.endswith("-double"):  # how long a mean is as text decides the order in a file
            others = differing_tensors(reference, output)
        else:
            others = differing_files(reference, output)
        if others and own_names and not loads_back(library, theirs, reference):
            row.why = "what the library writes does not load back, under the checkpoint's names or the model's"
        else:
            row.faults += [f"other bytes: {name}" for name in others[:3]]
    mark(source.parent, row.method, "while the library loads what qz wrote")
    loaded, left = library.loaded(output)
    if left:
        row.faults.append(f"does not load plainly: {left}")
    if loaded.get_memory_footprint() != summary.footprint_after:
        row.faults.append(f"footprint {summary.footprint_after:,} told, {loaded.get_memory_footprint():,} loaded")
    if theirs is not None:
        values = differing_values(theirs, loaded)
        if values and not others and differ_in_dtype_only(theirs, loaded, values):
            row.result, row.why = "known difference", "the library loads what it writes in another dtype than it had"
            theirs, _ = library.loaded(reference)
        else:
            row.faults += [f"another value: {name}" for name in values[:3]]
        reread = (lambda: library.loaded(reference)[0]) if not others else None
        _in_child(row, folder, lambda row: _run(row, model, theirs, loaded, inputs, kept=kept, reread=reread))
    mark(source.parent, row.method, "in qz inspect and qz dequantize")
    with closing(LocalFolder(output)) as opened:
        errors = inspect_model(read_folder(opened), Origin(str(output), None, None)).errors
    row.faults += [f"inspect: {problem.kind}" for problem in errors]
    dequantized(output, plain)
    found = tensors_of(plain)
    if own_names:  # those of the output; what is dequantized has the checkpoint's again
        held, left = library.loaded(plain)
        found = held.state_dict() | found
        if left:
            row.faults.append(f"does not load plainly once dequantized: {left}")
    wrong = [
        name
        for name, value in dequantized_by_bitsandbytes(tensors_of(output)).items()
        if name not in found or not _same_values(found[name], value)
    ]
    row.faults += [f"dequantize: {name}" for name in wrong[:3]]


def _library_can(library: Library, source: Path, reference: Path, method: str) -> bool:
    """Whether the library loads the source whole, and what it writes of it quantized."""
    try:
        if library.loaded(source)[1]:
            return False
        return loads_back(library, library.quantized(source, method), reference)
    except Exception:
        return False


def mark(folder: Path, method: str, doing: str) -> None:
    (folder / STAGE).write_text(f"{method} {doing}", encoding="utf-8")


def one_line(text: str) -> str:
    return " ".join(text.split())[:400]


def _same_values(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """A ``Conv1D`` goes back to (in, out)."""
    wanted = wanted.to(found.dtype)
    return torch.equal(found, wanted) or (found.shape == wanted.T.shape and torch.equal(found, wanted.T))


def _run(
    row: Row, model: Any, theirs: Any, loaded: Any, inputs: Inputs, *, kept: bool, reread: Callable[[], Any] | None
) -> None:
    """One forward pass: "equal", "near", or why there is none. What the library's own model cannot do is no fault.

    ``reread`` loads what the library wrote: that may lie otherwise in memory, which the last bits of float32 show.
    """
    if inputs.values is None:
        row.ran = inputs.why
        return
    try:
        wanted = inputs.run(theirs)
    except Exception as error:
        row.ran = one_line(f"the library's quantized model fails: {type(error).__name__}: {error}")[:160]
        return
    found = inputs.run(loaded)
    if wanted.isnan().all():
        row.ran = "the library's quantized model gives nothing but NaN"
        return
    if not _equal(found, wanted):
        if not _equal(inputs.run(theirs), wanted):
            row.ran = "the library's quantized model gives another output every time"
            return
        if reread is None or not _equal(inputs.run(reread()), found):
            row.faults.append("another output than the library's quantized model")
    row.ran = "equal"
    if kept:
        near = _nearness(inputs.all_of(model), inputs.all_of(loaded))
        row.ran = "near"
        if not near > NEAR:
            row.faults.append(f"the output is far from the original's: cosine {near:.2f}")


def _nearness(originals: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Cosine between two outputs, or between the last hidden states where the outputs are numbers too few to tell."""
    pairs = list(zip(originals, found, strict=True))
    enough = [pair for pair in pairs if pair[0].numel() >= ENOUGH]
    one, other = pairs[0] if pairs[0][0].numel() >= ENOUGH or not enough else enough[-1]
    return float(torch.nn.functional.cosine_similarity(one.flatten().float(), other.flatten().float(), dim=0))


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same numbers, and NaN in the same places."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def _in_child(row: Row, folder: Path, act: Callable[[Row], None]) -> None:
    """Do what may end the process in one of its own, and take over what it says of the row."""
    told = folder / "row.json"
    child = os.fork()
    if not child:
        try:
            act(row)
            told.write_text(json.dumps(asdict(row)), encoding="utf-8")
        except Exception as error:
            row.faults.append(one_line(f"does not run: {type(error).__name__}: {error}"))
            told.write_text(json.dumps(asdict(row)), encoding="utf-8")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if told.exists():
        found = json.loads(told.read_text(encoding="utf-8"))
        row.ran, row.faults = found["ran"], found["faults"]
    else:
        row.ran = f"the library ends the process: {signal.Signals(os.WTERMSIG(status)).name}"
