"""Whether what a command printed with ``--json`` is what its type says: no other keys, nothing of another kind."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from qz import json_reports


@cache
def adapter(command: str) -> TypeAdapter[Any]:
    """One for which a key that is not declared is no key of the contract; schemas leave room for later versions."""
    types = [each for each in vars(json_reports).values() if hasattr(each, "__total__")]
    for each in types:
        each.__pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
    made: TypeAdapter[Any] = TypeAdapter({**json_reports.OF_COMMANDS, "error": json_reports.ExitError}[command])
    for each in types:
        del each.__pydantic_config__
    return made


def checked(command: str, text: str) -> Any:
    """The object in ``text``. Raises pydantic's ValidationError where it breaks the contract."""
    adapter(command).validate_json(text)
    return json.loads(text)
