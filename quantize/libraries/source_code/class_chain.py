"""A class of an installed library and the ones that it is made from, as their texts say; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from qz.quantize.libraries.source_code.defining_files import defining_file
from qz.quantize.libraries.source_code.installed import text_of


class SourceClass(NamedTuple):
    """A class, and what its module says."""

    node: ast.ClassDef
    module: ast.Module

    @property
    def name(self) -> str:
        return self.node.name

    def base(self, known: Collection[str]) -> str:
        """The one that ``known`` has, or that is called a tokenizer: not a mix-in. Empty for none."""
        names = [base.id for base in self.node.bases if isinstance(base, ast.Name)]
        return next((name for name in names if name in known or name.endswith("Tokenizer")), "")

    def value(self, name: str) -> Any:
        """What the body of the class assigns to a name, as a literal, or a literal of its module; None for nothing."""
        value = _assigned(self.node.body, name)
        if isinstance(value, ast.Name):
            value = _assigned(self.module.body, value.id)
        return ast.literal_eval(value) if value is not None else None

    @property
    def has_init(self) -> bool:
        return any(isinstance(each, ast.FunctionDef) and each.name == "__init__" for each in self.node.body)

    def init(self) -> dict[str, bool] | None:
        """The arguments of the class's own ``__init__``, and whether each is needed; None where it hands on all."""
        for each in self.node.body:
            if isinstance(each, ast.FunctionDef) and each.name == "__init__" and each.args.vararg is None:
                names = [arg.arg for arg in (*each.args.posonlyargs, *each.args.args)]
                needed = len(names) - len(each.args.defaults)
                given = zip(each.args.kwonlyargs, each.args.kw_defaults, strict=True)
                return {
                    **{name: place < needed for place, name in enumerate(names)},
                    **{arg.arg: default is None for arg, default in given},
                }
        return None


def class_chain(name: str, ends: Collection[str]) -> Iterator[SourceClass]:
    """A class of transformers and the ones that it is made from, up to those in ``ends``. Other names are followed."""
    path, seen = defining_file(name), set[str]()
    while path is not None and name not in seen:
        seen.add(name)
        module = _module(path)
        classes = {each.name: each for each in module.body if isinstance(each, ast.ClassDef)}
        imported = {
            each.asname: each.name
            for statement in module.body
            if isinstance(statement, ast.ImportFrom)
            for each in statement.names
            if each.asname
        }
        other = _assigned(module.body, name)
        if name in classes:
            found = SourceClass(classes[name], module)
            yield found
            name = found.base(ends)
            if name in ends:
                return
        elif isinstance(other, ast.Name):
            name = other.id
        name = imported.get(name, name)
        if name not in classes and not isinstance(_assigned(module.body, name), ast.Name):
            path = defining_file(name)


def _assigned(body: list[ast.stmt], name: str) -> ast.expr | None:
    for each in body:
        if isinstance(each, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in each.targets):
            return each.value
    return None


@cache
def _module(path: Path) -> ast.Module:
    return ast.parse(text_of(path))
