"""The memory that an output takes as transformers loads it."""

from __future__ import annotations

from collections.abc import Iterable

from qz.quantize.libraries.architecture import LoadRequest, Saved
from qz.quantize.libraries.transformers.internals import loading_quantizer
from qz.quantize.libraries.transformers.origins import LoadedNames, Model


def footprint(model: Model, quantized: Iterable[str], request: LoadRequest) -> int:
    """``get_memory_footprint()`` of the model when the parameters of these names are quantized."""
    nbytes = int(model.get_memory_footprint())
    if request.method is None:
        return nbytes
    weights = (model.get_parameter(name) for name in quantized)
    return int(nbytes + sum(request.method.footprint(weight.numel()) - weight.nbytes for weight in weights))


def kept_as_stored(model: Model, saved: Iterable[Saved], request: LoadRequest) -> int:
    """The bytes by which the loaded output differs from the model in its config's dtype.

    What the library's reader of quantized weights collects, which is every tensor that is called "weight", it does not
    cast.
    """
    if request.method is None:
        return 0
    state = model.state_dict()
    names = LoadedNames.of(model, state, loading_quantizer(request.method.config()))
    reading = {
        pattern
        for converter in names.converters
        for pattern in converter.source_patterns
        if any(getattr(operation, "hf_quantizer", None) for operation in converter.operations)
    }
    difference = 0
    for tensor in saved:
        if not tensor.weight.quantized:
            name, pattern = names.after_loading(tensor.name)
            difference += tensor.nbytes - state[name].nbytes if pattern in reading and name in state else 0
    return difference
