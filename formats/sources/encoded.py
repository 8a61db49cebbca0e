"""A checkpoint that another tool than bitsandbytes quantized, shown as the plain one that it stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from qz import Unsupported
from qz.formats.checkpoint.problems import Problem, Problems, require_none
from qz.formats.checkpoint.quantization.quantization_config import stated_quantization
from qz.formats.checkpoint.survey import GGUF
from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import CODES, FLOATS_8, Decoded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qz.formats.checkpoint.survey import Checkpoint
    from qz.formats.sources.reading import Reading
    from qz.formats.tensors.decoded import StoredTensor

_NOMINAL = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SCALED = ("fp8", "fbgemm_fp8", "modelopt", "mxfp8")
"""Values of ``quant_method`` whose weights are floats with scales beside them."""
_KEYS = frozenset(("quantization_config", "compression_config"))


class Encoded(NamedTuple):
    """``method`` as configs name it, and the tensors of the plain checkpoint by name, in the order of the stored ones.

    ``left_out``: stored tensors that say nothing of the weights, such as scales of activations.
    """

    method: str
    tensors: Mapping[str, StoredTensor | Decoded]
    left_out: tuple[str, ...]

    @property
    def decoded(self) -> dict[str, Decoded]:
        return {name: each for name, each in self.tensors.items() if isinstance(each, Decoded) and each.computed}


def read_encoded(checkpoint: Checkpoint) -> tuple[Encoded | None, tuple[Problem, ...]]:
    """What another tool's quantization made of the weights; None where there is none, or none that is known.

    Reads headers, and of few formats some small tensors.
    """
    if checkpoint.encoded_as == GGUF:
        return Encoded(GGUF, checkpoint.tensors, ()), ()
    stated = stated_quantization(checkpoint.config)
    settings = stated if isinstance(stated, dict) else {}
    method = settings.get("quant_method")
    read = _reader_of(checkpoint, method)
    if read is None:
        return None, ()
    from qz.formats.sources.reading import Reading

    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = _NOMINAL.get(str(said).removeprefix("torch."), "BF16")
    reading = Reading(checkpoint.folder, checkpoint.stored, settings, Problems(checkpoint.folder.location), dtype)
    read(reading)
    tensors: dict[str, StoredTensor | Decoded] = {}
    for name, tensor in checkpoint.tensors.items():
        if name in reading.taken:
            found = reading.taken[name]
            if found.name in tensors or (found.name != name and found.name in checkpoint.tensors):
                reading.problems.add("encoded-twice", quoted(name), name=quoted(found.name))
            tensors[found.name] = found
        elif isinstance(tensor, Decoded) and tensor.dtype in FLOATS_8:  # in another order, and values as they are
            tensors[name] = replace(tensor, dtype=reading.dtype)
        elif name not in reading.used:
            tensors[name] = tensor
    packed = any(each.parts[CODES].dtype == "U8" for each in reading.taken.values())
    encoded = Encoded(str(method or ("nvfp4" if packed else "fp8")), tensors, tuple(reading.left))
    if tensors == checkpoint.tensors and not reading.problems.worst_first():
        return None, ()
    return encoded, reading.problems.worst_first()


def _reader_of(checkpoint: Checkpoint, method: object) -> Callable[[Reading], None] | None:
    """Imported here, as most checkpoints need none of them."""
    if method in _SCALED or (
        method is None and any(tensor.dtype in FLOATS_8 for tensor in checkpoint.tensors.values())
    ):
        from qz.formats.sources.scaled import read_scaled

        return read_scaled
    if method == "mxfp4":
        from qz.formats.sources.mxfp4 import read_mxfp4

        return read_mxfp4
    if method == "compressed-tensors":
        from qz.formats.sources.compressed_tensors import read_compressed_tensors

        return read_compressed_tensors
    if method in ("gptq", "awq"):
        from qz.formats.sources import gptq_awq

        return gptq_awq.read_gptq if method == "gptq" else gptq_awq.read_awq
    return None


def plain_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as it would be unquantized, if it is in a form that can be read; otherwise itself.

    Raises MalformedInput or Unsupported for one that is in such a form, and damaged or beyond what is known of it.
    """
    encoded, problems = read_encoded(checkpoint)
    require_none(checkpoint.folder.location, problems)
    for problem in problems:
        if problem.kind == "encoding-unknown":
            raise Unsupported(problem.message)
    if encoded is None:
        return checkpoint
    return replace(
        checkpoint,
        tensors=encoded.tensors,
        config=without_quantization(checkpoint.config),
        encoded_as=encoded.method,
        left_out=(*checkpoint.left_out, *encoded.left_out),
    )


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without what it says of a quantization, at its root or in a part: see ``stated_quantization``."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _KEYS
    }
