"""In which order a plan's shards are begun, and how many of them are open at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qz.formats.files.local_folder import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qz.quantize.planning.plan import Plan

AT_ONCE = 2
"""Shards on a disk, at least: one that is written while another one is on its way to the Hub."""


@dataclass(frozen=True, slots=True)
class ShardOrder:
    """``names``: files in the order in which they are begun. ``bytes``: of the largest ``at_once`` shards together."""

    names: tuple[str, ...]
    at_once: int
    bytes: int


def by_shard(plan: Plan) -> Plan:
    """The same plan, one shard after the other, where the source may be read in any order; a remote one is a stream."""
    if not isinstance(plan.checkpoint.folder, LocalFolder):
        return plan
    steps = sorted(plan.steps, key=lambda step: max(plan.shard_of[saved.name] for saved in step.outputs))
    return replace(plan, steps=tuple(steps))


def shard_order(plan: Plan, folder: str = "") -> ShardOrder:
    """The order of one plan, whose shards lie in ``folder`` of the output."""
    last = {home: number for number in range(len(plan.steps)) for home in _homes(plan, number)}
    begun: dict[int, None] = {}
    open_now: set[int] = set()
    most = 0
    for number in range(len(plan.steps)):
        homes = _homes(plan, number)
        begun |= dict.fromkeys(sorted(homes))
        open_now |= homes
        most = max(most, len(open_now))
        open_now = {home for home in open_now if last[home] > number}
    at_once = max(most, AT_ONCE)
    prefix = f"{folder}/" if folder else ""
    return ShardOrder(
        tuple(prefix + plan.shards[home].file for home in begun),
        at_once,
        sum(sorted((shard.size for shard in plan.shards), reverse=True)[:at_once]),
    )


def _homes(plan: Plan, step: int) -> set[int]:
    return {plan.shard_of[saved.name] for saved in plan.steps[step].outputs}


def joined(orders: Sequence[ShardOrder]) -> ShardOrder:
    """The order of several plans that are carried out one after the other."""
    return ShardOrder(
        tuple(name for order in orders for name in order.names),
        max((order.at_once for order in orders), default=AT_ONCE),
        max((order.bytes for order in orders), default=0),
    )
