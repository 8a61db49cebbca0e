"""GPTQ into 4-bit blocks whose scales are given: codes so that the errors of a row cancel in the layer's output.

Frantar et al., arXiv 2210.17323: columns are rounded one after the other, the most active inputs first, and each error
is made up for by the columns that follow, by the Cholesky factor of the inverse Hessian. Scales are fixed before, so
the order of columns needs no tensor of its own, and a row may have any length. In torch, on any device.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch  # noqa: TID253 (this module is imported lazily)
from numpy.typing import NDArray

from qz import MalformedInput
from qz.quantize.compute import scale_search
from qz.quantize.compute.gpu import cuda_kernels, torch_kernels
from qz.quantize.compute.gpu.torch_search import table_tensors

DAMPING = 0.01
"""Of the Hessian's mean diagonal, added to it."""
SHRINKAGE = 0.1
"""Of what two inputs have in common, taken away: another text shares less of it than of each input's size."""
_COLUMNS = 128
"""Columns whose errors are passed on one by one; to all others together."""


@dataclass(frozen=True, slots=True)
class Factor:
    """Of a Hessian (in, in): its columns, the most active first, and ``upper`` (in, in) in this order."""

    columns: torch.Tensor
    upper: torch.Tensor


class Factors:
    """The last Hessian's factor on a device, which linears with the same inputs share; for one thread at a time."""

    def __init__(self) -> None:
        self._of: weakref.ref[NDArray[np.float32]] | None = None
        self._factor: Factor | None = None

    def of(self, hessian: NDArray[np.float32], device: torch.device) -> Factor:
        """Lives as long as the array does. Raises MalformedInput for one that is no sum of outer products."""
        if self._factor is None or self._of is None or self._of() is not hessian:
            self._factor = self._of = None
            self._factor = factor(torch_kernels.tensor(hessian, "F32").to(device))
            self._of = weakref.ref(hessian, self._forget)
        return self._factor

    def _forget(self, dead: weakref.ref[NDArray[np.float32]]) -> None:
        if self._of is dead:
            self._factor = self._of = None


def factor(hessian: torch.Tensor) -> Factor:
    """``hessian``: float32 (in, in), the sum of the outer products of inputs with themselves."""
    columns = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return Factor(columns, _upper(hessian[columns][:, columns]))


def codes(values: torch.Tensor, quant_type: str, scales: torch.Tensor, known: Factor) -> torch.Tensor:
    """uint8 (out, in), one code a byte, for ``values`` (out, in) of the dtype that they are loaded in.

    ``scales``: float32 of every 64 values of the flattened weight, of any sign. All of one device.
    """
    columns = values.shape[1]
    weight = values.float()[:, known.columns].contiguous()
    usable = scales.abs() >= scale_search.LEAST_SCALE
    inverses = torch.where(usable, 1.0 / torch.where(usable, scales, 1.0), 0.0)
    found = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    function = cuda_kernels.kernel("gptq", values.device)
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        if function is None:
            errors = _columns(values.dtype, quant_type, weight, known, scales, inverses, start, stop, found)
        else:
            errors = torch.empty(len(values), stop - start, device=values.device)
            cuda_kernels.launch(
                function, values.device, len(values), weight, known.upper, known.columns,
                *table_tensors(quant_type, values.device), scales, inverses, cuda_kernels.KINDS[values.dtype],
                *values.shape, start, stop - start, found, errors,
            )  # fmt: skip
        weight[:, stop:] -= errors @ known.upper[start:stop, stop:]
    return found


def _columns(
    dtype: torch.dtype, quant_type: str, weight: torch.Tensor, known: Factor, scales: torch.Tensor,
    inverses: torch.Tensor, start: int, stop: int, found: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Round the columns from ``start`` to ``stop`` into ``found``; their errors (out, stop - start)."""
    rows, columns = weight.shape
    bounds, levels, in_order = table_tensors(quant_type, weight.device)
    chosen = known.columns[start:stop]
    blocks = (chosen.unsqueeze(1) + torch.arange(rows, device=weight.device) * columns) // 64
    steps, inverses = scales[blocks], inverses[blocks]
    part, local = weight[:, start:stop].T.contiguous(), known.upper[start:stop, start:stop]
    position, errors = torch.empty(part.shape, dtype=torch.int32, device=part.device), torch.empty_like(part)
    for i in range(stop - start):
        position[i] = torch.bucketize(part[i] * inverses[i], bounds, out_int32=True)
        loaded = (levels[position[i]] * steps[i]).to(dtype).float()
        errors[i] = (part[i] - loaded) / local[i, i]
        part[i + 1 :] -= local[i, i + 1 :].unsqueeze(1) * errors[i]
    found[:, chosen] = in_order[position].T
    return errors.T


def _upper(hessian: torch.Tensor) -> torch.Tensor:
    """float32 upper triangular U with UᵀU = the inverse of the Hessian, shrunk towards its diagonal and damped.

    H reversed is L Lᵀ, so H is U' U'ᵀ with U' = L reversed, and U = U'⁻¹: one factorization and one triangular inverse.
    """
    exact = torch.float32 if hessian.device.type == "mps" else torch.float64
    damped = hessian.to(exact)
    diagonal = damped.diagonal().clone()
    mean = diagonal.mean()
    damped.mul_(1 - SHRINKAGE)
    damped.diagonal().copy_(diagonal + (DAMPING * mean if mean > 0 else 1.0))
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed) or not bool(torch.isfinite(lower).all()):
        raise MalformedInput(
            "A Hessian for --rounding gptq is not positive definite, which a sum of outer products is. Make it again "
            "with `qz calibrate --hessians`."
        )
    del damped
    upper = lower.flip(0, 1)
    identity = torch.eye(len(upper), dtype=exact, device=upper.device)
    inverse: torch.Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse.float().contiguous()
