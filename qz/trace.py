"""A traceback as lines, none of which is made by what an error says."""

from __future__ import annotations

import traceback

from qz import one_line


def trace_lines(error: BaseException) -> list[str]:
    """The traceback of an error, after those of its causes, oldest first, as Python shows them."""
    chain: list[tuple[BaseException, str]] = []
    each: BaseException | None = error
    link = ""
    while each is not None and all(each is not known for known, _ in chain):
        chain.append((each, link))
        if each.__cause__ is not None:
            each, link = each.__cause__, "The above exception was the direct cause of the following exception:"
        elif each.__context__ is not None and not each.__suppress_context__:
            each, link = each.__context__, "During handling of the above exception, another exception occurred:"
        else:
            each = None
    lines: list[str] = []
    for found, after in reversed(chain):
        lines += ["Traceback (most recent call last):"] if found.__traceback__ else []
        lines += "".join(traceback.format_tb(found.__traceback__)).splitlines()
        kind = type(found)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        said = one_line(str(found))
        lines.append(f"{name}: {said}" if said else name)
        for note in getattr(found, "__notes__", ()):
            lines += str(note).split("\n")
        lines += ["", after, ""] if after else []
    return lines
