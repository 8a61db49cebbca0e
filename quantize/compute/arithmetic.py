"""What the pipeline asks of the place where the numbers are computed: the CPU, or an accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qz.quantize.compute.arrays import Bytes
    from qz.quantize.compute.kernels import NonFinite
    from qz.quantize.methods import QuantType


class Arithmetic(Protocol):
    """Where the numbers are computed. Thread-safe; arrays are in host memory; see ``qz.quantize.compute.kernels``."""

    @property
    def name(self) -> str:
        """The device, as ``--device`` names it."""
        ...

    @property
    def model(self) -> str:
        """What an accelerator calls itself, which decides its bytes; empty for the CPU."""
        ...

    @property
    def bytes_of(self) -> str:
        """The kind of device that writes the same bytes: another than its own where the CPU follows a GPU's rules."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the choice of this device."""
        ...

    @property
    def chunk_bytes(self) -> int:
        """Source bytes of a chunk."""
        ...

    @property
    def threads(self) -> int:
        """How many threads keep it busy."""
        ...

    def buffer(self, nbytes: int) -> Bytes: ...

    def cast(self, values: NDArray[Any], source: str, target: str, out: NDArray[Any]) -> None: ...

    def quantize_4bit(
        self, values: NDArray[Any], dtype: str, quant_type: QuantType, packed: Bytes, absmax: NDArray[np.float32]
    ) -> NonFinite: ...

    def search_4bit(
        self,
        values: NDArray[Any],
        dtype: str,
        quant_type: QuantType,
        weights: NDArray[np.float32] | None,
        column: int,
        packed: Bytes,
        absmax: NDArray[np.float32],
    ) -> NonFinite: ...

    def encode_4bit(
        self, values: NDArray[Any], dtype: str, quant_type: QuantType, scales: NDArray[np.float32], packed: Bytes
    ) -> None: ...

    def gptq_4bit(
        self,
        values: NDArray[Any],
        dtype: str,
        quant_type: QuantType,
        scales: NDArray[np.float32],
        hessian: NDArray[np.float32],
        packed: Bytes,
    ) -> None: ...

    def quantize_int8(
        self, values: NDArray[Any], dtype: str, weight: NDArray[np.int8], scb: NDArray[np.float32]
    ) -> NonFinite: ...

    def quantize_absmax(self, absmax: NDArray[np.float32]) -> tuple[Bytes, NDArray[np.float32], float]: ...

    def dequantize_4bit(
        self,
        packed: Bytes,
        absmax: NDArray[np.float32],
        quant_type: QuantType,
        blocksize: int,
        dtype: str,
        out: NDArray[Any],
    ) -> None: ...

    def dequantize_int8(
        self, weight: NDArray[np.int8], scb: NDArray[np.float32], dtype: str, out: NDArray[Any]
    ) -> None: ...
