"""What bitsandbytes left in a checkpoint: each quantized weight and its companions, and whether they fit together."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from qz.counted import counted
from qz.formats.checkpoint.problems import Problem, Problems
from qz.formats.checkpoint.quantization.left_over import left_over
from qz.formats.checkpoint.quantization.quant_state import MAX_BYTES, QuantState, parse_quant_state
from qz.formats.checkpoint.quantization.quantization_config import Kind, check_settings, read_settings
from qz.formats.checkpoint.small_tensors import read_small
from qz.formats.malformed import Malformed, quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qz.formats.checkpoint.survey import Checkpoint
    from qz.formats.tensors.decoded import StoredTensor

_FOUR_BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATES: dict[str, Kind] = {"bitsandbytes__nf4": "nf4", "bitsandbytes__fp4": "fp4"}


_EXPERT = re.compile(r"\.experts\.(?:\d+\.|\w+\.\d+\.)")


class QuantizedWeight(NamedTuple):
    """A weight that bitsandbytes quantized, by its full name.

    ``shape`` and ``dtype`` (``"bfloat16"``) are those of the weight before; int8 does not keep the dtype. ``parts``
    holds ``weight`` and its companions: ``absmax``, ``quant_map``, ``quant_state``, ``nested_absmax`` and
    ``nested_quant_map``; of int8 ``SCB`` and ``weight_format``. What was not saved, or could not be read, is None.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...] | None
    dtype: str | None
    blocksize: int | None
    double_quant: bool
    nested_blocksize: int | None
    nested_offset: float | None
    parts: Mapping[str, StoredTensor]

    @property
    def elements(self) -> int:
        """How many numbers the weight has; without its shape, two for every byte of the packed ones."""
        if self.shape is not None:
            return math.prod(self.shape)
        return self.parts["weight"].nbytes * (1 if self.kind == "int8" else 2)


def part_names(weights: Mapping[str, QuantizedWeight]) -> set[str]:
    """Names of all tensors that quantized weights are stored as: their codes, and what lies beside those."""
    return {part.name for weight in weights.values() for part in weight.parts.values()}


def read_quantized(
    checkpoint: Checkpoint, *, states: int | None = None
) -> tuple[dict[str, QuantizedWeight], tuple[Problem, ...]]:
    """Every weight that bitsandbytes quantized, in file order, and what is wrong with them, worst first.

    Reads the quant states (some 170 bytes each), or only the first ``states`` of them.
    """
    return _Quantized(checkpoint).run(states)


class _Quantized:
    """One pass over one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.problems = Problems(checkpoint.folder.location)
        self.settings = read_settings(checkpoint.config, self.problems)

    def run(self, states: int | None) -> tuple[dict[str, QuantizedWeight], tuple[Problem, ...]]:
        weights: dict[str, QuantizedWeight] = {}
        if self.settings.method in (None, "bitsandbytes"):
            groups = self.groups(expected=self.settings.method is not None)
            contents = self.contents(groups, states)
            for name, parts in groups.items():
                weight = self.int8(name, parts, contents) if "SCB" in parts else self.four_bit(name, parts, contents)
                if weight is not None:
                    weights[name] = weight
            kinds = {name: (weight.kind, weight.double_quant) for name, weight in weights.items()}
            check_settings(self.settings, kinds, self.checkpoint.library, self.problems)
            self.experts(weights)
            self.floats8()
        elif left := left_over(self.checkpoint.config, self.checkpoint.tensors):
            told = left.told(f"{self.checkpoint.folder.location}/config.json")
            self.problems.add("quantization-left-over", "config.json", told=told)
        else:
            self.problems.add("quantized-by-other", "config.json", method=quoted(self.settings.method, 40))
        return weights, self.problems.worst_first()

    def experts(self, weights: Mapping[str, QuantizedWeight]) -> None:
        """transformers 5 has no class whose experts are linear layers of their own."""
        found = (name for name, each in weights.items() if _EXPERT.search(name) or len(each.shape or ()) == 3)
        name = next(found, None)
        if name is not None and self.checkpoint.library == "transformers":
            self.problems.add("experts-quantized", quoted(name), name=quoted(name))

    def floats8(self) -> None:
        names = [tensor.name for tensor in self.checkpoint.tensors.values() if tensor.dtype.startswith("F8_")]
        if names:
            self.problems.add("fp8-weights", names[0], weights=counted(len(names), "weight"), name=quoted(names[0]))

    # Which tensors belong together

    def groups(self, *, expected: bool) -> dict[str, dict[str, StoredTensor]]:
        """Companions by the weight that they belong to. ``expected``: the config says that there are some."""
        found: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        stored = self.checkpoint.stored
        for name, tensor in stored.items():
            owner, _, last = name.rpartition(".")
            if last in _FOUR_BIT:
                found[owner][last] = tensor
            elif last in _STATES and owner.endswith(".quant_state"):
                found[owner.removesuffix(".quant_state")][last] = tensor
            elif last in ("SCB", "weight_format"):
                found[f"{owner}.weight" if owner else "weight"][last] = tensor
            elif expected and last == "weight" and _looks_packed(tensor):
                found[name].setdefault("weight", tensor)
        for owner, parts in found.items():
            if owner in stored:
                parts["weight"] = stored[owner]
        return {
            owner: parts
            for owner, parts in found.items()
            if expected or "SCB" in parts or parts.keys() & (_STATES.keys() | {"quant_map"})
        }

    def contents(self, groups: Mapping[str, Mapping[str, StoredTensor]], states: int | None) -> dict[str, bytes]:
        """The bytes of the quant states and weight formats, by tensor name."""
        wanted = [
            part
            for parts in groups.values()
            for kind, part in parts.items()
            if (kind in _STATES and part.nbytes <= MAX_BYTES) or (kind == "weight_format" and part.nbytes == 1)
        ]
        return read_small(self.checkpoint.folder, wanted, states)

    # One weight

    def missing(self, name: str, kind: str, parts: Mapping[str, StoredTensor], needed: Iterable[str]) -> bool:
        gone = [part for part in needed if part not in parts]
        for part in gone:
            self.problems.add("companion-missing", quoted(name), name=quoted(name), kind=kind, missing=part)
        return bool(gone)

    def expect(self, kind: str, part: StoredTensor, dtype: str, *shape: int) -> None:
        """A companion must have this dtype and as many elements as ``shape``."""
        if part.dtype != dtype or math.prod(part.shape) != math.prod(shape):
            self.malformed(kind, part.name, f"{part.dtype} {list(part.shape)}", f"{dtype} {list(shape)}")

    def malformed(self, kind: str, name: str, found: str, needed: str) -> None:
        name = quoted(name)
        self.problems.add("companion-malformed", name, name=name, found=found, kind=kind, needed=needed)

    def int8(
        self, name: str, parts: Mapping[str, StoredTensor], contents: Mapping[str, bytes]
    ) -> QuantizedWeight | None:
        if "weight" not in parts:
            self.orphans(parts)
            return None
        weight = parts["weight"]
        if weight.dtype != "I8" or len(weight.shape) != 2:
            self.malformed("int8", name, f"{weight.dtype} {list(weight.shape)}", "a matrix of I8")
        else:
            self.expect("int8", parts["SCB"], "F32", weight.shape[0])
        if (form := parts.get("weight_format")) is not None:
            value = contents.get(form.name, b"\0")
            if form.nbytes != 1 or value != b"\0":
                found = f"{form.dtype} of {form.nbytes} bytes" if form.nbytes != 1 else f"the format {value[0]}"
                self.malformed("int8", form.name, found, "0, rows as they are")
        return QuantizedWeight(name, "int8", weight.shape, None, None, False, None, None, parts)

    def orphans(self, parts: Mapping[str, StoredTensor]) -> None:
        for part in parts.values():
            self.problems.add("companion-orphan", quoted(part.name), name=quoted(part.name))

    def four_bit(
        self, name: str, parts: Mapping[str, StoredTensor], contents: Mapping[str, bytes]
    ) -> QuantizedWeight | None:
        if "weight" not in parts:
            self.orphans(parts)
            return None
        suffixes = [suffix for suffix in _STATES if suffix in parts]
        if parts["weight"].dtype == "I8" or "weight_format" in parts:  # int8 without its scales
            self.missing(name, "int8", parts, ["SCB"])
            return QuantizedWeight(name, "int8", parts["weight"].shape, None, None, False, None, None, parts)
        kind: Kind = _STATES[suffixes[0]] if suffixes else self.settings.quant_type
        named = {part: tensor for part, tensor in parts.items() if part not in _STATES}
        state = None
        if len(suffixes) == 1:
            held = named["quant_state"] = parts[suffixes[0]]
            state = self.state(name, kind, held, contents)
        elif suffixes:
            self.problems.add("quant-state-malformed", quoted(name), name=quoted(name), why="it has two quant states")
        double = (
            ("absmax" in named and named["absmax"].dtype == "U8")
            or not named.keys().isdisjoint(("nested_absmax", "nested_quant_map"))
            or (state is not None and state.nested_blocksize is not None)
        )
        self.missing(name, kind, named, ["absmax", "quant_map"] if suffixes else ["absmax", "quant_map", "quant_state"])
        if double:
            self.missing(name, kind, named, ["nested_quant_map"])
            if "nested_absmax" not in named:
                library = self.checkpoint.library
                self.problems.add("nested-absmax-missing", quoted(name), name=quoted(name), library=library)
        self.sizes(kind, named, state, double=double)
        self.places(name, named)
        return QuantizedWeight(
            name=name,
            kind=kind,
            shape=state.shape if state else None,
            dtype=state.dtype if state else None,
            blocksize=state.blocksize if state else None,
            double_quant=double,
            nested_blocksize=state.nested_blocksize if state else None,
            nested_offset=state.nested_offset if state else None,
            parts=named,
        )

    def state(self, name: str, kind: Kind, held: StoredTensor, contents: Mapping[str, bytes]) -> QuantState | None:
        where = f"{self.checkpoint.folder.location}/{held.file}: {quoted(held.name)}"
        if held.dtype != "U8" or held.nbytes > MAX_BYTES:
            needed = f"at most {MAX_BYTES} bytes of U8"
            self.malformed(kind, held.name, f"{held.dtype} {list(held.shape)}", needed)
            return None
        if held.name not in contents:
            return None
        try:
            state = parse_quant_state(contents[held.name], where)
        except Malformed as error:
            self.problems.add_error(error, quoted(name), missing="companion-missing")
            return None
        if state.quant_type != kind:
            facts = {"name": where, "said": f"quant_type {state.quant_type}", "found": f"its name says {kind}"}
            self.problems.add("quant-state-mismatch", quoted(name), **facts)
        return state

    def sizes(self, kind: Kind, parts: Mapping[str, StoredTensor], state: QuantState | None, *, double: bool) -> None:
        """Compare the sizes of the parts with the quant state."""
        if "quant_map" in parts:
            self.expect(kind, parts["quant_map"], "F32", 16)
        if "nested_quant_map" in parts:
            self.expect(kind, parts["nested_quant_map"], "F32", 256)
        weight, absmax = parts["weight"], parts.get("absmax")
        if state is None:
            return
        elements = math.prod(state.shape)
        packed = -(-elements // 2)
        if not packed <= weight.nbytes < packed + 8:  # a storage wider than a byte rounds up
            facts = {
                "said": f"the shape {list(state.shape)}",
                "found": f"the weight has {weight.nbytes} bytes, not {packed}",
            }
            self.problems.add("quant-state-mismatch", quoted(weight.name), name=quoted(weight.name), **facts)
            return
        blocks = -(-elements // state.blocksize)
        if absmax is not None:
            self.expect(kind, absmax, "U8" if double else "F32", blocks)
        if double and state.nested_blocksize is None:
            facts = {"said": "nothing of double quantization", "found": "its absmax is quantized"}
            self.problems.add("quant-state-mismatch", quoted(weight.name), name=quoted(weight.name), **facts)
        elif state.nested_blocksize is not None and "nested_absmax" in parts:
            self.expect(kind, parts["nested_absmax"], "F32", -(-blocks // state.nested_blocksize))

    def places(self, name: str, parts: Mapping[str, StoredTensor]) -> None:
        """What diffusers asks beyond what transformers does."""
        weight = parts["weight"]
        if self.checkpoint.library != "diffusers":
            return
        if weight.dtype != "U8":
            self.problems.add("storage-unsupported", quoted(name), name=quoted(name), dtype=weight.dtype)
        for part, tensor in parts.items():
            if tensor.file != weight.file:
                facts = {"name": quoted(name), "first": weight.file, "part": part, "second": tensor.file}
                self.problems.add("split-across-shards", quoted(name), **facts)
                return


def _looks_packed(tensor: StoredTensor) -> bool:
    """Whether a weight can only be a quantized one."""
    return (tensor.dtype == "U8" and tensor.shape[1:] == (1,)) or (tensor.dtype == "I8" and len(tensor.shape) == 2)
