"""Where a whole model runs, and in which dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def run_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device that ``--device`` names, and what a model stored in ``dtype`` computes in there.

    bfloat16 models in bfloat16 on an accelerator; all others in float32, whose range no activation leaves, and which
    CPUs are fast in.
    """
    import torch

    from qz.quantize.compute.devices import arithmetic_on

    devices = getattr(arithmetic_on(device), "devices", (torch.device("cpu"),))
    own = devices[0].type != "cpu" and dtype == "bfloat16"
    return devices[0], torch.bfloat16 if own else torch.float32
