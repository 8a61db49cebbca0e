"""A config.json that says quantized over weights that are not: left over from a model that was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from qz.formats.checkpoint.quantization.quantization_config import stated_quantization
from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import Decoded, StoredTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEYS = ("quantization_config", "quantization", "compression_config")
_PLAIN = ("F64", "F32", "F16", "BF16", "I64")


class LeftOver(NamedTuple):
    """``keys``: where config.json says it, as ``key`` and `part.key`."""

    method: str
    keys: str

    def told(self, where: str) -> str:
        """What is wrong with the config.json at ``where``, and what to do."""
        return (
            f"{where} says that the model is quantized with {self.method}, but none of its weights is. If they are the "
            f"plain weights, remove {self.keys} from it."
        )


def left_over(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor | Decoded]) -> LeftOver | None:
    """What a config says of a quantization that none of the tensors shows; None where one does, or it says nothing."""
    stated = stated_quantization(config)
    if not isinstance(stated, dict) or stated.get("quantization_mode") == "online":  # BitNet's: whenever it runs
        return None
    if not all(map(_is_plain, tensors.values())):
        return None
    method = str(stated.get("quant_method", "an unknown method"))
    named = method if method.isprintable() and len(method) <= 40 else quoted(method, 40)
    return LeftOver(named, " and ".join(f"`{key}`" for key in _keys_in(config)))


def _keys_in(config: Mapping[str, Any], inside: str = "") -> list[str]:
    """Where config.json speaks of a quantization: the paths of these keys, dotted."""
    found = [f"{inside}{key}" for key in _KEYS if stated_quantization({key: config.get(key)}) is not None]
    parts = ((key, value) for key, value in config.items() if isinstance(value, dict) and key not in _KEYS)
    return found + [each for key, value in parts for each in _keys_in(value, f"{inside}{key}.")]


def _is_plain(tensor: StoredTensor | Decoded) -> bool:
    """Whether no library would have stored the codes of a quantized weight so: a vector (but SpQR's), or numbers too
    wide."""
    if isinstance(tensor, Decoded) and tensor.computed:
        return False
    return tensor.dtype in _PLAIN if len(tensor.shape) > 1 else not tensor.name.endswith(".dense_weights")
