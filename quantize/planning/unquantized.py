"""A plain checkpoint: not quantized yet, and its stored tensors compared where the library would."""

from __future__ import annotations

from collections.abc import Mapping

from qz import QzError, Unsupported
from qz.formats.checkpoint.quantization.left_over import left_over
from qz.formats.checkpoint.quantization.quantization_config import stated_quantization
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.malformed import Malformed
from qz.formats.tensors.decoded import Decoded, StoredTensor
from qz.quantize.planning.sources import Source, stored_parts

COMPARE_BYTES = 1 << 20


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise Unsupported if the checkpoint says, or its tensors show, that it is quantized already; Malformed if what it
    says of that cannot be understood."""
    if (error := contradiction(checkpoint)) is not None:
        raise error
    config = stated_quantization(checkpoint.config)
    where = checkpoint.folder.location
    if config is not None:
        method = str(config.get("quant_method", "an unknown method"))
        bits = " (4 bit)" if config.get("load_in_4bit") else " (8 bit)" if config.get("load_in_8bit") else ""
        hint = (
            f"Run `qz dequantize {where}` first, or start from the original weights."
            if method == "bitsandbytes"
            else "Start from the original weights."
        )
        raise Unsupported(f"{where} is already quantized with {method}{bits}. {hint}")
    for tensor in checkpoint.tensors.values():
        if tensor.dtype.startswith(("F8_", "F4", "F6_")):
            raise Unsupported(
                f"{where} holds {tensor.dtype} weights ({tensor.name}); bitsandbytes quantizes 16- and 32-bit floats "
                "only. Start from the bfloat16 weights of this model."
            )


def contradiction(checkpoint: Checkpoint) -> QzError | None:
    """The error where config.json says of a quantization what the tensors do not show, or nothing of what they show: no
    library loads that as it is meant."""
    where, config = checkpoint.folder.location, stated_quantization(checkpoint.config)
    if (left := left_over(checkpoint.config, checkpoint.tensors)) is not None:
        return Unsupported(left.told(f"{where}/config.json"))
    if config is not None and not isinstance(config, dict):
        return Malformed(
            "quantization-config-malformed",
            f"{where}/config.json has a quantization_config that is not an object. If these are the plain weights, "
            "remove it and run this again.",
        )
    packed = (name for name in checkpoint.tensors if ".quant_state.bitsandbytes__" in name or name.endswith(".SCB"))
    if config is None and (name := next(packed, None)) is not None:
        return Unsupported(
            f"{where} is already quantized with bitsandbytes ({name}), though config.json does not say so. "
            f"Run `qz inspect {where}`."
        )
    return None


def is_bitsandbytes(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint says, or its tensors show, that bitsandbytes quantized it."""
    config = stated_quantization(checkpoint.config)
    if isinstance(config, dict):
        return config.get("quant_method") == "bitsandbytes"
    return any(".quant_state.bitsandbytes__" in name for name in checkpoint.tensors)


def equal_sources(checkpoint: Checkpoint, sources: Mapping[str, Source] | None, one: str, other: str) -> bool:
    """Whether two tensors of a checkpoint, some of which may be quantized, hold the same values for certain."""
    if sources is not None and not all(isinstance(sources.get(name), StoredTensor) for name in (one, other)):
        return False
    return equal_tensors(checkpoint, one, other)


def equal_tensors(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors are stored as the same bytes, compared piece by piece."""
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape) or encoding(first) != encoding(second):
        return False
    parts = zip(stored_parts(first), stored_parts(second), strict=True)
    return all(_equal_parts(checkpoint, *pair) for pair in parts)


def encoding(tensor: StoredTensor | Decoded) -> object:
    """How a tensor is encoded, with the names of its parts; None if it is stored as its values."""
    return (tensor.encoding, tuple(tensor.parts)) if isinstance(tensor, Decoded) else None


def _equal_parts(checkpoint: Checkpoint, first: StoredTensor, second: StoredTensor) -> bool:
    def piece(tensor: StoredTensor, start: int) -> bytes:
        buffer = bytearray(min(COMPARE_BYTES, tensor.nbytes - start))
        checkpoint.folder.read_into(tensor.file, tensor.offset + start, memoryview(buffer))
        return bytes(buffer)

    return first.nbytes == second.nbytes and all(
        piece(first, start) == piece(second, start) for start in range(0, first.nbytes, COMPARE_BYTES)
    )
