"""Results that are computed once in a process, whichever thread asks first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def once(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``functools.cache`` for positional arguments that lets other threads wait for the first, which does the work.

    Where many threads begin with the same table, each would make it otherwise, all taking turns at the interpreter.
    """
    known: dict[tuple[object, ...], _Result] = {}
    making = threading.RLock()

    @wraps(function)
    def call(*arguments: object) -> _Result:
        if arguments not in known:
            with making:
                if arguments not in known:
                    known[arguments] = cast(Callable[..., _Result], function)(*arguments)
        return known[arguments]

    return cast(Callable[_Arguments, _Result], call)
