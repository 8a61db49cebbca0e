"""How much memory the weights of a pipeline take while it runs, and whether there is enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qz import TryAgain
from qz.quantize.compute.cores import CONTROL_GROUP


class Room:
    """Room on a GPU for weights that the next step needs again, beside twice what all else took so far and a tenth of
    its memory. There is none on a CPU, which has the files in its page cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: dict[str, int] = {}
        """Bytes of the parts, by path, whose weights stay."""
        self._beside = 0

    def keeps(self, path: str, module: Any) -> bool:
        """Whether the weights of a part, which are there, stay."""
        if path not in self.kept and self._has_room():
            self.kept[path] = weights_in(module)
        return path in self.kept

    def _has_room(self) -> bool:
        if self.device.type != "cuda":
            return False
        allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        self._beside = max(self._beside, torch.cuda.max_memory_allocated(self.device) - sum(self.kept.values()))
        free, total = torch.cuda.mem_get_info(self.device)
        return free + reserved - allocated >= 2 * self._beside + total / 10


def at_once(modules: Iterable[Any], parts: Mapping[str, Any]) -> int:
    """Bytes of the parameters that are in memory together: the largest of the parts, and all that is in none."""
    sizes = [weights_in(part) for part in parts.values()]
    return sum(map(weights_in, modules)) - sum(sizes) + max(sizes, default=0)


def require(nbytes: int, device: torch.device, what: str) -> None:
    """Raise TryAgain where a device has less memory left than ``nbytes``."""
    free = _free(device)
    if free is not None and free < nbytes:
        raise TryAgain(
            f"{what} takes {nbytes / 1e9:.1f} GB of weights at once, and {device} has {free / 1e9:.1f} GB left. Free "
            "memory (close other processes), or use another --device."
        )


def weights_in(module: Any) -> int:
    """Bytes of a module's parameters."""
    each = {id(parameter): parameter for parameter in module.parameters()}
    return sum(parameter.nbytes for parameter in each.values())


def _free(device: torch.device) -> int | None:
    """None where the system does not tell."""
    if device.type != "cpu":
        ask = getattr(torch.get_device_module(device.type), "mem_get_info", None)
        return int(ask(device)[0]) if ask is not None else None
    known = (_available(Path("/proc/meminfo")), left_in(CONTROL_GROUP))
    return min((each for each in known if each is not None), default=None)


def _available(meminfo: Path) -> int | None:
    with suppress(OSError, ValueError, StopIteration):
        lines = meminfo.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
    return None


def left_in(group: Path) -> int | None:
    """Bytes that a control group (v2) may still take; None where it has no limit.

    Files that it has in the page cache count as free, as in MemAvailable: a checkpoint that was read is among them.
    """
    with suppress(OSError, ValueError, KeyError):
        most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return most - used + int(stat["active_file"]) + int(stat["inactive_file"])
    return None
