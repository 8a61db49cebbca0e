"""qz from Python: each command as a function that returns the value which ``--json`` prints.

::

    from qz.api import Nf4, quantize

    summary = quantize("black-forest-labs/FLUX.1-dev", "flux-nf4", subfolder="transformer", method=Nf4())
    print(summary.footprint_after)

What goes wrong is raised as a ``qz.QzError``, whose message says what, where, why and what next. Returned values are
dataclasses; ``as_json()`` gives the documented object. ``on_progress`` is called from any thread, see ``Progress``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qz.api.attestation import attest
    from qz.api.calibration import calibrate, compare
    from qz.api.dequantization import dequantize
    from qz.api.inspection import inspect
    from qz.api.loading import load
    from qz.api.publishing import merge, push
    from qz.api.quantization import quantize
    from qz.api.verification import verify
    from qz.progress import Progress
    from qz.quantize.methods import Fp4, Int8, Nf4

__all__ = [
    "Fp4",
    "Int8",
    "Nf4",
    "Progress",
    "attest",
    "calibrate",
    "compare",
    "dequantize",
    "inspect",
    "load",
    "merge",
    "push",
    "quantize",
    "verify",
]

_PLACES = {
    "qz.api.attestation": ("attest",),
    "qz.api.calibration": ("calibrate", "compare"),
    "qz.api.dequantization": ("dequantize",),
    "qz.api.inspection": ("inspect",),
    "qz.api.loading": ("load",),
    "qz.api.publishing": ("merge", "push"),
    "qz.api.quantization": ("quantize",),
    "qz.api.verification": ("verify",),
    "qz.progress": ("Progress",),
    "qz.quantize.methods": ("Fp4", "Int8", "Nf4"),
}


def __getattr__(name: str) -> Any:
    """Each function is imported when it is asked for: a command needs one of them."""
    for place, names in _PLACES.items():
        if name in names:
            found = globals()[name] = getattr(import_module(place), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
