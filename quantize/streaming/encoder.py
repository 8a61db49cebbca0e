"""How a weight becomes its quantized form: codes, scales and what is stored beside them, chunk by chunk."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qz.quantize.compute.arrays import Buffers
from qz.quantize.compute.kernels import NonFinite, dequantize_absmax
from qz.quantize.compute.tables import QUANT_MAPS, nested_quant_map
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES
from qz.quantize.methods import BLOCK_SIZE, NESTED_BLOCK_SIZE, FourBit
from qz.quantize.streaming.deferred import deferred

if TYPE_CHECKING:
    from qz.quantize.compute.arithmetic import Arithmetic
    from qz.quantize.planning.plan import Plan, Step
    from qz.quantize.streaming.measuring.observer import Observer, Values
    from qz.quantize.streaming.open_shards import OpenShards
    from qz.quantize.streaming.work import Work


class Encoder:
    """Quantizes chunks of a plan's weights and writes the results to ``shards``; from several threads."""

    def __init__(self, plan: Plan, arithmetic: Arithmetic, shards: OpenShards, observer: Observer | None) -> None:
        self.plan, self.arithmetic, self.shards, self.observer = plan, arithmetic, shards, observer
        self.lock = threading.Lock()

    def has_hessian(self, step: Step) -> bool:
        """Whether a weight's codes are found by GPTQ, which needs all of it at once."""
        refined = self.plan.refinement
        return refined is not None and step.weight.quantized and step.weight.name in refined.hessians

    def begin(self, work: Work) -> None:
        """Make room for all scales of a weight where they are needed together."""
        step, method = work.step, self.plan.method
        if step.weight.quantized and method is not None and (method.double_quant or self.has_hessian(step)):
            work.absmax = np.empty(-(-step.weight.count // BLOCK_SIZE), np.float32)

    def quantize(self, work: Work, values: NDArray[Any], start: int, buffers: Buffers, original: Values) -> None:
        """Quantize ``values`` of the dtype of the weight, which were ``original`` before the cast, and write them."""
        method = self.plan.method
        if isinstance(method, FourBit):
            found = self._quantize_4bit(work, method, values, start, buffers, original)
        else:
            found = self._quantize_int8(work, values, start, buffers, original)
        if found.count:
            with self.lock:
                first = start + found.first
                work.first = first if work.first < 0 else min(work.first, first)
                work.nonfinite += found.count

    def _quantize_4bit(
        self, work: Work, method: FourBit, values: NDArray[Any], start: int, buffers: Buffers, original: Values
    ) -> NonFinite:
        """Whole blocks, except at the end of a weight. While scales are not final, ``complete`` chooses codes."""
        weight, refined = work.step.weight, self.plan.refinement
        dtype = SAFETENSORS_NAMES[weight.dtype]
        packed = buffers.get("packed", -(-len(values) // 2))
        first_block, blocks = start // BLOCK_SIZE, -(-len(values) // BLOCK_SIZE)
        absmax = (
            work.absmax[first_block : first_block + blocks]
            if work.absmax is not None
            else buffers.get("absmax", blocks * 4).view(np.float32)
        )
        if refined is None:
            found = self.arithmetic.quantize_4bit(values, dtype, method.quant_type, packed, absmax)
        else:
            weights, column = refined.weights.get(weight.name), start % max(weight.shape[-1], 1)
            found = self.arithmetic.search_4bit(values, dtype, method.quant_type, weights, column, packed, absmax)
            if work.absmax is not None:
                work.deferred.append(deferred(start, (values, dtype), original, observed=self.observer is not None))
                return found
        outputs = {saved.part: saved for saved in work.step.outputs}
        self.shards.write(outputs["weight"], packed, start // 2)
        if work.absmax is None:
            self.shards.write(outputs["weight.absmax"], absmax, first_block * 4)
        if self.observer is not None:
            self.observer.quantized(work.step, method, start, original, packed, absmax, buffers.get)
        return found

    def _quantize_int8(
        self, work: Work, values: NDArray[Any], start: int, buffers: Buffers, original: Values
    ) -> NonFinite:
        """Whole rows."""
        weight, method = work.step.weight, self.plan.method
        columns = weight.shape[1]
        rows = len(values) // columns
        codes = buffers.get("codes", len(values)).view(np.int8).reshape(rows, columns)
        scb = buffers.get("scb", rows * 4).view(np.float32)
        dtype = SAFETENSORS_NAMES[weight.dtype]
        found = self.arithmetic.quantize_int8(values.reshape(rows, columns), dtype, codes, scb)
        outputs = {saved.part: saved for saved in work.step.outputs}
        self.shards.write(outputs["weight"], codes, start)
        self.shards.write(outputs["SCB"], scb, start // columns * 4)
        if self.observer is not None and method is not None:
            self.observer.quantized(work.step, method, start, original, codes, scb, buffers.get)
        return found

    def complete(self, work: Work) -> None:
        """Write the small tensors beside a weight: maps, nested statistics, quant state, weight format."""
        weight, method = work.step.weight, self.plan.method
        outputs = {saved.part: saved for saved in work.step.outputs}
        if not isinstance(method, FourBit):
            self.shards.write(outputs["weight_format"], np.zeros(1, np.uint8), 0)
            return
        self.shards.write(outputs["weight.quant_map"], QUANT_MAPS[method.quant_type], 0)
        state = outputs[f"weight.quant_state.bitsandbytes__{method.quant_type}"]
        if work.absmax is not None and not method.double_quant:
            self._encode_deferred(work, method, work.absmax)
            self.shards.write(outputs["weight.absmax"], work.absmax, 0)
            work.absmax = None
        if work.absmax is None:
            self.shards.write(state, np.frombuffer(method.quant_state(weight.shape, weight.dtype), np.uint8), 0)
            return
        absmax, nested_absmax, offset = self.arithmetic.quantize_absmax(work.absmax)
        work.absmax = None
        if self.observer is not None or work.deferred:
            again = dequantize_absmax(absmax, nested_absmax, nested_quant_map(), offset, NESTED_BLOCK_SIZE)
            self._encode_deferred(work, method, again)
            if self.observer is not None:
                self.observer.absmax_known(work.step, method, again)
        self.shards.write(outputs["weight.absmax"], absmax, 0)
        self.shards.write(outputs["weight.nested_absmax"], nested_absmax, 0)
        self.shards.write(outputs["weight.nested_quant_map"], nested_quant_map(), 0)
        self.shards.write_variable(state, method.quant_state(weight.shape, weight.dtype, offset))

    def _encode_deferred(self, work: Work, method: FourBit, absmax: NDArray[np.float32]) -> None:
        """Choose and write the codes of values that waited for their scales: those scales decide what is nearest."""
        saved = next(saved for saved in work.step.outputs if saved.part == "weight")
        buffers, dtype = Buffers(self.arithmetic.buffer), SAFETENSORS_NAMES[work.step.weight.dtype]
        refined, name = self.plan.refinement, work.step.weight.name
        for each in sorted(work.deferred, key=lambda each: each.start):
            count, first = len(each.values), each.start // BLOCK_SIZE
            scales = absmax[first : first - (-count // BLOCK_SIZE)]
            packed = buffers.get("packed", -(-count // 2))
            if refined is not None and name in refined.hessians:
                values = each.values.reshape(work.step.weight.shape)
                hessian = refined.hessian(name)
                self.arithmetic.gptq_4bit(values, dtype, method.quant_type, scales, hessian, packed)
            else:
                self.arithmetic.encode_4bit(each.values, dtype, method.quant_type, scales, packed)
            self.shards.write(saved, packed, each.start // 2)
            if self.observer is not None and each.original is not None:
                self.observer.quantized(work.step, method, each.start, each.original, packed, scales, buffers.get)
        work.deferred.clear()
