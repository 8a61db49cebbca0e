"""What a model's own library says about its checkpoint, learned on the meta device: no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qz import Unsupported
from qz.formats.malformed import quoted
from qz.quantize.methods import Method

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
}
"""safetensors dtype → torch dtype name. fp8 is absent on purpose: it is refused before a plan is made."""
SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
FLOATS = ("float32", "float16", "bfloat16")
OF_QUANTIZATION = frozenset(("quantization_config", "_pre_quantization_dtype"))
"""Keys of a config.json that speak of the weights as they were read, not of the model."""

Conversion = Callable[[Mapping[str, "torch.Tensor"]], Mapping[str, "torch.Tensor"]]
"""The library's own merge or split: source tensors by checkpoint name in, converted tensors by name out."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A checkpoint tensor as the library is shown it: a torch dtype name and a shape."""

    dtype: str
    shape: tuple[int, ...]
    linear: bool = False
    """A quantized weight as it will be: (out, in), also where the module is a ``Conv1D``, which holds (in, out)."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the loaded model: where it comes from, and in which dtype it is kept or quantized."""

    name: str
    sources: tuple[str, ...]
    dtype: str
    """torch dtype name after the cast at load time."""
    shape: tuple[int, ...]
    """As (out, in) when quantized, else as saved."""
    quantized: bool = False
    transposed: bool = False
    """Turned after it was read: a ``Conv1D`` holds (in, out), quantized it is (out, in)."""
    conversion: Conversion | None = field(default=None, compare=False)
    """Set where the checkpoint's tensors are merged or split; its result is looked up under ``name``."""
    parameter: str = ""
    """Its name in the model's state dict, if that is not ``name``: the checkpoint may have another one."""
    index: int | None = None
    """Of its one source only this part, along the first dimension: an expert of many."""

    @property
    def count(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True, slots=True)
class Saved:
    """One tensor of the output. ``part`` is the suffix of the quantized weight's part, or empty for a kept tensor."""

    name: str
    dtype: str
    """safetensors dtype name."""
    shape: tuple[int, ...]
    weight: Weight
    nbytes: int
    part: str = ""
    variable: bool = False
    storage: int = 0
    """Tensors of one non-zero storage share memory in the library, which puts them in one shard."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """``get_memory_footprint()`` in bytes: parameters and buffers of the loaded model."""

    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model as its library would load, quantize and save it."""

    class_name: str
    saved: tuple[Saved, ...]
    """Every output tensor, in the order in which the library puts tensors in shards."""
    kept_linears: Mapping[str, str]
    """Linears that stay as they are → why."""
    dropped: tuple[str, ...]
    """Checkpoint tensors that the class does not use; the library leaves them out too."""
    parameters: int
    counted_parameters: int
    """``total_parameters`` of transformers' index."""
    footprint: Footprint
    dtype: str
    """torch dtype name of everything that is not quantized."""
    documents: Mapping[str, bytes]
    """config.json and its like, as the library writes them."""
    notes: tuple[str, ...] = ()
    """What the user should know about how this model is handled."""
    packed_elsewhere: tuple[str, ...] = ()
    """Of weights that are quantized in the checkpoint, those that are no linear layers of their own in the class: it
    cannot load their codes."""
    unmatched_skips: tuple[str, ...] = ()
    """Skips asked for that no module of the model matches."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Names of weights that are the same as others → those others, which are saved."""
    conv1d: tuple[str, ...] = ()
    """Weights of ``Conv1D`` modules, which hold (in, out)."""
    class_module: str | None = None
    """Where the class is, if its library does not export it."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What the user asks of the architecture."""

    method: Method | None
    """None to leave every weight unquantized, as dequantize does."""
    dtype: str = "auto"
    skips: tuple[str, ...] = ()
    default_skips: bool = True
    experts: bool = False
    """Quantize the experts of MoE models, too, which the library leaves alone."""


def torch_name(dtype: str, tensor: str) -> str:
    """The torch name of a safetensors dtype; Unsupported for fp8 and other dtypes no model class loads as weights."""
    try:
        return TORCH_NAMES[dtype]
    except KeyError:
        raise Unsupported(
            f"{tensor} is stored as {dtype}, which is not a plain weight dtype. Convert the checkpoint to bfloat16 "
            "first, or start from the original weights."
        ) from None


def expand(
    state: Mapping[str, torch.Tensor], quantized: Mapping[str, Weight], method: Method | None
) -> dict[str, tuple[str, str, bool, torch.Tensor]]:
    """The state dict after quantization: name → (weight's name, part, variable, tensor on meta).

    ``quantized`` maps a linear's path to its weight. As in ``Linear4bit`` and ``Linear8bitLt``, what is added follows
    the module's own weight and bias.
    """
    import torch

    entries: dict[str, tuple[str, str, bool, torch.Tensor]] = {}
    pending: dict[str, tuple[str, str, bool, torch.Tensor]] = {}
    owner = None
    for name, tensor in state.items():
        path = name.rpartition(".")[0]
        if path != owner:
            entries |= pending
            pending, owner = {}, path
        if method is None or path not in quantized or not name.endswith(".weight"):
            entries[name] = (name, "", False, tensor)
            continue
        weight = quantized[path]
        for part in method.parts(weight.shape, weight.dtype):
            data = torch.empty(part.shape, dtype=getattr(torch, TORCH_NAMES[part.dtype]), device="meta")
            where = entries if part.suffix == "weight" else pending
            where[f"{path}.{part.suffix}"] = (name, part.suffix, part.variable, data)
    return entries | pending


def document(text: str) -> bytes:
    """A JSON document's bytes as the libraries write them."""
    return text.encode("utf-8")


def unmatched(
    skips: Iterable[str], modules: Iterable[str], linears: Iterable[str], matches: Callable[[str, str], bool]
) -> tuple[str, ...]:
    """Those of ``skips`` that match, by ``matches(skip, module)``, neither a linear layer nor a module without any.

    A module with linear layers inside does not count: what matches its path alone leaves these as they were.
    """
    of_linears = set(linears)
    steps = [path.split(".") for path in of_linears]
    around = {".".join(each[:count]) for each in steps for count in range(1, len(each))}
    paths = [path for path in modules if path and (path in of_linears or path not in around)]
    return tuple(skip for skip in skips if not any(matches(skip, path) for path in paths))


@dataclass(frozen=True, slots=True)
class Skips:
    """Keys of ``llm_int8_skip_modules`` that the user did not name."""

    library: tuple[str, ...] = ()
    """What the library leaves alone where the list is null."""
    exempted: tuple[str, ...] = ()
    """Layers that would not work or not load; the library knows of none of them."""


def skip_list(skips: Skips, request: LoadRequest) -> list[str] | None:
    """``llm_int8_skip_modules`` to write: None when the library's own defaults are meant."""
    if request.default_skips and not (request.skips or skips.exempted or request.experts):
        return None
    defaults = (*skips.library, *skips.exempted) if request.default_skips else ()
    return list(dict.fromkeys([*defaults, *request.skips]))


OF_A_COMPONENT = "Check the class that model_index.json names for it, or download this component again."


def checked(
    missing: set[str],
    mismatched: list[str],
    class_name: str,
    where: str,
    stored: Iterable[str] = (),
    advice: str | None = None,
) -> None:
    """Raise MalformedInput if tensors of the class are missing or have another shape.

    ``stored``: the files' names; ``advice``: what to do, where more is known of it than that.
    """
    from qz import MalformedInput

    if not missing and not mismatched:
        return
    lines = [f"missing: {name}" for name in sorted(missing)] + [f"wrong shape: {text}" for text in sorted(mismatched)]
    shown = "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
    advice = advice or "Check `architectures` or `_class_name` in config.json, or download the checkpoint again."
    if prefix := _wrapper(missing, list(stored)):
        advice = (
            f"All names in the files begin with {quoted(prefix)}, as a wrapper makes them (DistributedDataParallel, "
            "torch.compile). Save the model that is inside of it, or take that off the names."
        )
    raise MalformedInput(f"{where} does not fit {class_name}: {shown}. {advice}")


def _wrapper(missing: set[str], stored: list[str]) -> str:
    """What all stored names begin with, if a name that the class misses follows it; empty otherwise."""
    name = min(missing, default="")
    prefix = next((each.removesuffix(name) for each in stored if name and each.endswith(f".{name}")), "")
    return prefix if all(each.startswith(prefix) for each in stored) else ""
