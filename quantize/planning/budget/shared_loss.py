"""Linears of several components at 16 bit: those that save most of the loss for their bytes, whichever they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qz.quantize.planning.budget.kept_layers import Point


@dataclass(slots=True, eq=False)
class Curve:
    """A component from nothing kept to everything, and how far it went."""

    points: Sequence[Point]
    at: int = 0

    @property
    def point(self) -> Point:
        return self.points[self.at]

    @property
    def worth(self) -> float:
        """The loss that a byte of what comes next saves; negative where nothing is left."""
        if self.at + 1 >= len(self.points):
            return -1.0
        following = self.points[self.at + 1]
        saved = loss_at(self.point) - loss_at(following)
        return saved / max(following.size - self.point.size, 1)


def shared_room(curves: Mapping[str, Sequence[Point]], room: int) -> dict[str, int]:
    """The size of each component when ``room`` bytes more than with nothing kept go to what is worth most of all."""
    found = {name: Curve(points) for name, points in curves.items()}
    growing = list(found.values())
    while growing:
        best = max(growing, key=lambda curve: curve.worth)
        more = best.points[best.at + 1].size - best.point.size if best.worth > 0 else room + 1
        if more > room:
            growing.remove(best)
        else:
            best.at, room = best.at + 1, room - more
    return {name: curve.point.size for name, curve in found.items()}


def walk(curves: Sequence[Curve], fixed: int, most: float) -> tuple[list[Point], Point]:
    """Points from nothing kept to everything, and the first that loses at most ``most``; curves are left there."""
    chosen: tuple[Point, list[int]] | None = None
    points: list[Point] = []
    while True:
        here = [curve.point for curve in curves]
        size, loss = fixed + sum(each.size for each in here), sum(map(loss_at, here))
        points.append(Point(sum(each.kept for each in here), size, loss))
        if chosen is None and loss <= most:
            chosen = points[-1], [curve.at for curve in curves]
        best = max(curves, key=lambda curve: curve.worth, default=None)
        if best is None or best.worth < 0:
            break
        best.at += 1
    found, places = chosen or (points[-1], [curve.at for curve in curves])
    for curve, at in zip(curves, places, strict=True):
        curve.at = at
    return points, found


def loss_at(point: Point) -> float:
    """Of a curve with scores."""
    assert point.loss is not None  # without scores the plan was refused
    return point.loss
