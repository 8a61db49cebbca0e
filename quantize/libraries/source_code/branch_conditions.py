"""Branches of a module's code that its own attributes open or close: training is closed, an option may be."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


@dataclass(frozen=True, slots=True)
class Condition:
    """The test of a branch, and how it must come out for the branch to be taken."""

    test: ast.expr
    outcome: bool
    owner: str
    """The name that stands for the module in ``test``."""

    def may_hold(self, module: Any) -> bool:
        """Whether the branch can be taken, as far as attributes of the module tell."""
        value = _known_value(self.test, self.owner, module)
        return value is _UNKNOWN or bool(value) == self.outcome


class _Unknown:
    """A value that only a run would tell."""


_UNKNOWN = _Unknown()


def _known_value(node: ast.expr, owner: str, module: Any) -> Any:
    """What an expression of constants and of the module's attributes comes to; ``_UNKNOWN`` for any other."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute):
        return _known_attribute(node, owner, module)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _known_value(node.operand, owner, module)
        return value if value is _UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        values = [_known_value(each, owner, module) for each in node.values]
        decides = isinstance(node.op, ast.Or)
        if any(value is not _UNKNOWN and bool(value) == decides for value in values):
            return decides
        return _UNKNOWN if _UNKNOWN in values else not decides
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = (_known_value(each, owner, module) for each in (node.left, node.comparators[0]))
        compare = _COMPARE.get(type(node.ops[0]))
        if compare is not None and left is not _UNKNOWN and right is not _UNKNOWN:
            with suppress(TypeError):
                return compare(left, right)
    return _UNKNOWN


def _known_attribute(node: ast.Attribute, owner: str, module: Any) -> Any:
    """An attribute of the module, or of its config, that is a plain value."""
    if isinstance(node.value, ast.Name) and node.value.id == owner:
        holder = vars(module)
        if node.attr == "training":
            return False
    elif isinstance(node.value, ast.Attribute) and node.value.attr == "config":
        config = _known_config(node.value, owner, module)
        holder = vars(config) if hasattr(config, "model_type") else {}
    else:
        return _UNKNOWN
    value = holder.get(node.attr, _UNKNOWN)
    return value if value is None or isinstance(value, bool | int | float | str) else _UNKNOWN


def _known_config(node: ast.Attribute, owner: str, module: Any) -> Any:
    return vars(module).get("config") if isinstance(node.value, ast.Name) and node.value.id == owner else None
