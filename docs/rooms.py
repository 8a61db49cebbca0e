"""The picture of the rooms for the architecture page, drawn from the imports of the code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import grimp
import networkx

ROOMS = ("quantize", "formats")


def picture() -> str:
    """Mermaid's source of a graph: every room, and an arrow for each import between two that no longer way implies.

    What lies in ``quantize`` or ``formats`` itself is two boxes: what stands on the rooms inside, and what they stand
    on.
    """
    imports = grimp.build_graph("qz", exclude_type_checking_imports=True, cache_dir=None)

    def names(room: str, modules: Iterable[str], depth: int = 3) -> set[str]:
        """What of ``modules`` lies in ``room``, at least ``depth`` deep: by its name there."""
        parts = [module.split(".") for module in modules if module.startswith(f"qz.{room}.")]
        return {part[2] for part in parts if len(part) >= depth}

    inside = {room: names(room, imports.modules, depth=4) for room in ROOMS}

    def box(module: str) -> str:
        """``quantize/planning``, ``quantize/…``, ``formats/base``, ``cli``, ``api``."""
        _, room, *rest = module.split(".")
        if room not in ROOMS or not rest:
            return room
        if rest[0] in inside[room]:
            return f"{room}/{rest[0]}"
        needed = names(room, imports.find_upstream_modules(module))
        return f"{room}/entry" if needed & inside[room] else f"{room}/base"

    boxes = {module: box(module) for module in imports.modules if "." in module and "__main__" not in module}
    graph = networkx.DiGraph(
        (boxes[one], boxes[other])
        for one in boxes
        for other in imports.find_modules_directly_imported_by(one)
        if other in boxes and boxes[one] != boxes[other] and boxes[other] not in ROOMS
    )
    return "\n".join(["```mermaid", "flowchart TD", *lines(networkx.transitive_reduction(graph)), "```"])


def lines(graph: networkx.DiGraph[str]) -> Iterator[str]:
    for room in ROOMS:
        yield f"  subgraph {room}"
        yield from (f'    {name.replace("/", "_")}["{name}"]' for name in sorted(graph) if name.startswith(f"{room}/"))
        yield "  end"
    yield from (f"  {one.replace('/', '_')} --> {other.replace('/', '_')}" for one, other in sorted(graph.edges))
