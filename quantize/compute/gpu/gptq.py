"""GPTQ into 4-bit blocks whose scales are given: codes so that the errors of a row cancel in the layer's output.

Frantar et al., arXiv 2210.17323: columns are rounded one after the other, the most active inputs first, and each error
is made up for by the columns that follow, by the Cholesky factor of the inverse Hessian. Scales are fixed before, so
the order of columns needs no tensor of its own, and a row may have any length. In torch, on any device.
"""

from __future__ import annotations

import torch  # noqa: TID253 (this module is imported lazily)

from qz import MalformedInput
from qz.quantize.compute import scale_search
from qz.quantize.compute.gpu.torch_search import table_tensors

DAMPING = 0.01
"""Of the Hessian's mean diagonal, added to it: from 0.1 to 10 % the result is the same."""
_COLUMNS = 128
"""Columns whose errors are passed on one by one; to all others together."""


def codes(values: torch.Tensor, quant_type: str, scales: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """uint8 (out, in), one code a byte, for ``values`` (out, in) of the dtype that they are loaded in.

    ``scales``: float32 of every 64 values of the flattened weight, of any sign. ``hessian``: float32 (in, in), the sum
    of the outer products of inputs with themselves. All of one device. Raises MalformedInput for
    one that cannot be such a sum.
    """
    rows, columns = values.shape
    bounds, levels, in_order = table_tensors(quant_type, values.device)
    sorted_columns = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = _factor(hessian[sorted_columns][:, sorted_columns])
    weight = values.float()[:, sorted_columns].contiguous()
    found = torch.empty(rows, columns, dtype=torch.uint8, device=values.device)
    first = torch.arange(rows, device=values.device) * columns
    usable = scales.abs() >= scale_search.LEAST_SCALE
    inverses = torch.where(usable, 1.0 / torch.where(usable, scales, 1.0), 0.0)
    order = sorted_columns.tolist()
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        part, errors = weight[:, start:stop], torch.empty(rows, stop - start, device=values.device)
        local = factor[start:stop, start:stop]
        for i in range(stop - start):
            column, blocks = order[start + i], (first + order[start + i]) // 64
            position = torch.bucketize(part[:, i] * inverses[blocks], bounds, out_int32=True)
            found[:, column] = in_order[position]
            loaded = (levels[position] * scales[blocks]).to(values.dtype).float()
            errors[:, i] = (part[:, i] - loaded) / local[i, i]
            part[:, i + 1 :] -= errors[:, i].unsqueeze(1) * local[i, i + 1 :]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return found


def _factor(hessian: torch.Tensor) -> torch.Tensor:
    """float32 upper triangular U with UᵀU = the inverse of the damped Hessian.

    H reversed is L Lᵀ, so H is U' U'ᵀ with U' = L reversed, and U = U'⁻¹: one factorization and one triangular inverse.
    """
    exact = torch.float32 if hessian.device.type == "mps" else torch.float64
    damped = hessian.to(exact)
    mean = damped.diagonal().mean()
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
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
    return inverse.float()
