"""One model class: what the library writes, what qz writes, and whether the output loads, runs and goes back."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from converted import dequantized, quantized
from qz import QzError
from qz.formats.folder import LocalFolder
from qz.quantize.inspection.model import inspect_model, read_folder
from qz.quantize.inspection.report import Origin
from reference import (
    config_of,
    dequantized_by_bitsandbytes,
    differing_files,
    diffusers_model,
    raw,
    tensors_of,
    transformers_model,
)

METHODS = ("nf4", "int8")
NEAR = 0.5
"""Cosine between the outputs of the original and of a model with a layer kept on purpose; nonsense is near 0."""


KNOWN = {
    (
        "chinese_clip",
        "another value",
    ): "the library zeroes a row of the embeddings whenever it loads; qz keeps the stored one",
    (
        "chinese_clip",
        "other bytes",
    ): "the library zeroes a row of the embeddings whenever it loads; qz keeps the stored one",
    (
        "nemo_speechlm",
        "footprint",
    ): "told 3 % too much: the library loads parts of the output in another dtype than it says",
}
"""Differences that are understood, by kind and the beginning of the fault."""


class NotBuilt(Exception):
    """The zoo has no small model of a class; the text says why."""


@dataclass(frozen=True)
class Case:
    """A class to try. ``build`` makes the model, and gives a function from a model to its inputs."""

    library: str
    kind: str
    """The model type in transformers, the class in diffusers."""
    architecture: str
    build: Callable[[], tuple[Any, Callable[[Any], dict[str, torch.Tensor] | None]]]


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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def rows_of(case: Case, folder: Path) -> list[Row]:
    """A row for each method, or a single one for a class that cannot be built."""
    torch.manual_seed(zlib.crc32(case.architecture.encode()))
    try:
        model, inputs_of = case.build()
        source = folder / "source"
        model = model.bfloat16().eval()
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data.normal_(std=0.05)
        model.save_pretrained(source)
    except NotBuilt as error:
        return [Row(case.library, case.kind, case.architecture, "", "not built", str(error))]
    except Exception as error:  # the library's own trouble with a random model
        return [
            Row(case.library, case.kind, case.architecture, "", "not built", f"{type(error).__name__}: {error}"[:120])
        ]
    rows = []
    for method in METHODS:
        row = Row(case.library, case.kind, case.architecture, method)
        try:
            _compare(row, model, inputs_of(model), source, folder / method)
        except Exception as error:
            row.faults.append(f"{type(error).__name__}: {str(error).strip()[:200]}")
        for (kind, beginning), reason in KNOWN.items():
            if kind == case.kind and any(fault.startswith(beginning) for fault in row.faults):
                row.faults = [fault for fault in row.faults if not fault.startswith(beginning)]
                row.result, row.why = "known difference", reason
        rows.append(row)
    return rows


def _compare(row: Row, model: Any, inputs: Any, source: Path, folder: Path) -> None:
    output, reference, plain = folder / "output", folder / "reference", folder / "plain"
    model_class = type(model)
    try:
        summary = quantized(source, output, row.method)
    except QzError as error:
        row.result, row.why = "refused", str(error)
        if "nothing of" not in row.why and _library_can(row.library, model_class, source, reference, row.method):
            row.faults.append("refused, though what the library writes loads back")
        return
    listed = config_of(output)["quantization_config"]["llm_int8_skip_modules"]
    kept = any("its weight is read by" in reason for reason in summary.skipped.values())
    own_names = any("the model's own parameter names" in warning for warning in summary.warnings)
    of_diffusers = row.library == "diffusers"
    theirs = _quantized_by_library(row.library, model_class, source, row.method, listed)
    theirs.save_pretrained(reference, **({} if of_diffusers else {"save_original_format": not own_names}))
    row.result = "kept on purpose" if kept else "the model's names" if own_names else "identical"
    row.why = (
        next((warning for warning in summary.warnings if "unquantized: its weight" in warning), "") if kept else ""
    )
    row.faults += [f"other bytes: {name}" for name in differing_files(reference, output)[:3]]
    if of_diffusers:
        loaded = diffusers_model(model_class, output, None, torch.bfloat16)
    else:
        loaded, info = model_class.from_pretrained(output, output_loading_info=True)
        left = {key: sorted(names)[:3] for key, names in info.items() if names and key != "error_msgs"}
        if left:
            row.faults.append(f"does not load plainly: {left}")
    wanted, held = theirs.state_dict(), loaded.state_dict()
    others = [name for name, value in wanted.items() if name not in held or not _same(held[name], value)]
    row.faults += [f"another value: {name}" for name in others[:3]]
    if loaded.get_memory_footprint() != summary.footprint_after:
        row.faults.append(f"footprint {summary.footprint_after:,} told, {loaded.get_memory_footprint():,} loaded")
    with closing(LocalFolder(output)) as opened:
        errors = inspect_model(read_folder(opened), Origin(str(output), None, None)).errors
    row.faults += [f"inspect: {problem.kind}" for problem in errors]
    row.ran = _run(row, model, theirs, loaded, inputs, kept=kept)
    dequantized(output, plain)
    found = tensors_of(plain)
    wrong = [
        name
        for name, value in dequantized_by_bitsandbytes(tensors_of(output)).items()
        if name not in found or not _same_values(found[name], value)
    ]
    row.faults += [f"dequantize: {name}" for name in wrong[:3]]


def _quantized_by_library(
    library: str, model_class: Any, source: Path, method: str, skips: list[str] | None = None
) -> Any:
    if library == "diffusers":
        kept = model_class._keep_in_fp32_modules or []  # the library adds them to the list by itself
        named = [skip for skip in skips if skip not in kept] if skips is not None else None
        return diffusers_model(model_class, source, method, torch.bfloat16, skips=named)
    return transformers_model(model_class, source, method, skips=skips)


def _library_can(library: str, model_class: Any, source: Path, reference: Path, method: str) -> bool:
    """Whether the library's own output loads back whole."""
    try:
        _quantized_by_library(library, model_class, source, method).save_pretrained(reference)
        if library == "diffusers":
            diffusers_model(model_class, reference, None, torch.bfloat16)
            return True
        _, info = model_class.from_pretrained(reference, output_loading_info=True)
    except Exception:
        return False
    return not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def _same(one: Any, other: Any) -> bool:
    """Whether two entries of a state dict are the same bits, or what tensors have beside them."""
    if not torch.is_tensor(one) or not torch.is_tensor(other):
        return type(one) is type(other)
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def _same_values(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """A ``Conv1D`` goes back to (in, out)."""
    wanted = wanted.to(found.dtype)
    return torch.equal(found, wanted) or (found.shape == wanted.T.shape and torch.equal(found, wanted.T))


def _run(row: Row, model: Any, theirs: Any, loaded: Any, inputs: Any, *, kept: bool) -> str:
    """One forward pass: "equal", "near", or why there is none. What the library's own model cannot do is no fault."""
    if inputs is None:
        return "no input known"
    with torch.no_grad():
        try:
            wanted = _first(theirs.eval()(**_cast(inputs, theirs)))
        except Exception as error:
            return f"the library's own fails: {type(error).__name__}"
        found = _first(loaded.eval()(**_cast(inputs, loaded)))
        if not torch.equal(found, wanted) and not (found.isnan() & wanted.isnan()).any():
            row.faults.append("another output than the library's quantized model")
        if not kept:
            return "equal"
        original = _first(model(**_cast(inputs, model)))
    near = torch.nn.functional.cosine_similarity(found.flatten().float(), original.flatten().float(), dim=0)
    if not near > NEAR:
        row.faults.append(f"the output is far from the original's: cosine {near:.2f}")
    return "near"


def _cast(inputs: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _first(output: Any) -> torch.Tensor:
    values = output.values() if hasattr(output, "values") else output
    return next(value for value in values if torch.is_tensor(value) and value.is_floating_point())
