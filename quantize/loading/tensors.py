"""The stored tensors of a checkpoint as torch reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qz.formats.checkpoint.quantization.quantized import QuantizedWeight
from qz.formats.checkpoint.survey import Checkpoint


class Tensors:
    """Reads by name; files stay open."""

    def __init__(self, checkpoint: Checkpoint, root: Path) -> None:
        self.checkpoint, self.root = checkpoint, root
        self._files: dict[str, Any] = {}

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU."""
        from safetensors import safe_open

        file = self.checkpoint.tensors[name].file
        if file not in self._files:
            self._files[file] = safe_open(self.root / file, framework="pt")
        tensor: torch.Tensor = self._files[file].get_tensor(name)
        return tensor

    def quant_state(self, weight: QuantizedWeight, device: torch.device) -> Any:
        """A 4-bit weight's ``QuantState`` on ``device``, its scales as float32."""
        from bitsandbytes.functional import QuantState, dequantize_blockwise

        parts = {part.name: self.read(part.name) for kind, part in weight.parts.items() if kind != "weight"}
        state = QuantState.from_dict(parts, device=device)
        if state.nested:
            state.absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
            state.nested, state.state2, state.offset = False, None, None
        return state
