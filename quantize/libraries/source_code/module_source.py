"""What the source of a class reads of the modules inside it: ``self.proj.weight``, by whatever way it gets there.

The methods are read, not run. Expressions that stand for a module of ``self`` are followed through names, loops,
``getattr`` and calls of functions, and each ``.weight`` of one is noted; and each call of one that names its argument.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from qz.quantize.libraries.source_code.branch_conditions import Condition

Path = tuple[str, ...]
"""Steps from a module to one inside it; ``*`` in a step stands for any characters."""

ANY = "*"
FIRST = "parameters()"
"""Last step of a path: the first parameter of the module there, whichever it is."""
ARGUMENT = "input"
"""What ``torch.nn.Linear`` calls its argument; the layers of bitsandbytes call it ``x``."""
DEPTH = 4
"""Calls that are followed into functions of functions."""

_NOT_AT_WORK = re.compile(
    r"__init__|__del__|__repr__|_?init_.*|.*_init|.*init(?:ialize)?_weights?|initialize_.*|reset_.*|post_init|"
    r"_?tie_.*|_?(?:re)?size_.*|_?resize_.*|_?[sg]et_.*embeddings?.*|_?load_.*|from_.*|_?save_.*|_?fuse_.*|unfuse_.*|"
    r"_?convert_.*|_?prune_.*|.*state_dict.*|(?:apply|remove)_.*norm|to|_apply|train|quantize|dequantize|.*footprint"
)
"""Methods that build a model or change it, rather than run it."""
_OF_THE_LIBRARY = re.compile(
    r"torch\.nn\.modules\.(?:module|container|linear|sparse|normalization|conv)|transformers\.modeling_utils|"
    r"transformers\.generation.*|transformers\.integrations.*|diffusers\.models\.modeling_utils|diffusers\.loaders.*"
)
"""Modules whose classes and functions handle any model; what they read of a weight they read with care."""
_HARMLESS = frozenset(("device", "requires_grad", "is_meta", "grad"))


@dataclass(frozen=True, slots=True)
class Read:
    """``<path>.weight`` is read, by ``reader``, or ``path`` is called as only a plain linear layer can be."""

    path: Path
    reader: str
    method: str
    conditions: tuple[Condition, ...] = ()
    guarded: frozenset[str] = frozenset()
    """dtypes of packed weights (int8, uint8) that the code tells apart, and leaves alone, before it uses this one's; or
    whose scales it looks for."""
    called: bool = False


def called_names(names: set[str], kinds: Iterable[tuple[type, type | None]]) -> set[str]:
    """``names``, ``forward``, and what is named by the methods that are called so, and by those in turn."""
    methods = [function for kind, helper in kinds for function in _functions(kind, helper)]
    called = {"forward", "__call__", *names}
    waiting = methods
    while True:
        now = [function for function in waiting if function.__name__ in called]
        if not now:
            return called
        waiting = [function for function in waiting if function.__name__ not in called]
        called = called.union(*(_names(function) for function in now))


@cache
def _names(function: FunctionType) -> frozenset[str]:
    """The names in a function's code and in that of the functions of its library that it names."""
    found: set[str] = set()
    waiting = [function]
    while waiting:
        current = waiting.pop()
        new = _names_in(current.__code__) - found
        found |= new
        for name in new:
            called = current.__globals__.get(name)
            if isinstance(called, FunctionType) and called.__module__.partition(".")[0] in (
                "diffusers",
                "transformers",
            ):
                waiting.append(inspect.unwrap(called))
    return frozenset(found)


def _names_in(code: CodeType) -> set[str]:
    inner = (_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    texts = {constant for constant in code.co_consts if isinstance(constant, str)}
    return set(code.co_names).union(texts, *inner)


@cache
def reads_of(kind: Any, helper: Any) -> tuple[Read, ...]:
    """What the methods of a class read of the modules inside it."""
    found: list[Read] = []
    for function in _functions(kind, helper):
        code = _parsed(function)
        of_helper = function.__qualname__.startswith(f"{helper.__name__}.") if helper is not None else False
        if code is None or len(code.arguments) <= of_helper:
            continue
        owner = code.arguments[of_helper]
        reader = helper.__name__ if of_helper and helper is not None else kind.__name__
        found += _Reader(reader, kind, function, owner).run(code, {owner: frozenset([()])})
    return tuple(found)


@cache
def _functions(kind: Any, helper: Any) -> tuple[FunctionType, ...]:
    call = vars(helper).get("__call__") if helper is not None else None
    return (*_methods(kind), *((call,) if isinstance(call, FunctionType) else ()))


def method_names(kind: type) -> set[str]:
    """The names of a class's methods that may run when the model does."""
    return {function.__name__ for function in _methods(kind)}


def _methods(kind: type) -> Iterator[FunctionType]:
    """The functions behind a class's methods and properties that may run when the model does."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if base is object or _OF_THE_LIBRARY.fullmatch(base.__module__):
            continue
        for name, value in vars(base).items():
            if name in seen or isinstance(value, staticmethod | classmethod | type):
                continue
            seen.add(name)
            function = value.fget if isinstance(value, property) else getattr(value, "func", value)
            function = inspect.unwrap(function) if callable(function) else None
            if isinstance(function, FunctionType) and not _NOT_AT_WORK.fullmatch(name):
                yield function


def _mentions(code: CodeType) -> bool:
    """Whether a function could read a weight, or name an argument: by its code, which is there already."""
    if "weight" in code.co_names or "parameters" in code.co_names:
        return True
    if any(isinstance(constant, tuple) and ARGUMENT in constant for constant in code.co_consts):
        return True  # names of arguments are tuples of constants
    return any(isinstance(inner, CodeType) and _mentions(inner) for inner in code.co_consts)


@dataclass(frozen=True)
class _Parsed:
    """A function's source: the names of its positional arguments, and its statements."""

    arguments: tuple[str, ...]
    body: tuple[ast.stmt, ...]


@cache
def _parsed(function: FunctionType) -> _Parsed | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return None
    definition = tree.body[0] if tree.body else None
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    given = definition.args
    return _Parsed(tuple(each.arg for each in (*given.posonlyargs, *given.args)), tuple(definition.body))


@dataclass
class _Reader:
    """Follows modules through one function. ``kind`` is the class of the module that paths start at."""

    reader: str
    kind: type
    function: FunctionType
    owner: str
    """The function's name for the module; empty where it has none."""
    method: str = ""
    depth: int = 0
    names: dict[str, frozenset[Path]] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    conditions: tuple[Condition, ...] = ()

    def run(self, code: _Parsed, names: Mapping[str, frozenset[Path]]) -> list[Read]:
        if not _mentions(self.function.__code__) and self.depth == 0 and not self._passes_modules():
            return []
        self.names = dict(names)
        self.method = self.method or self.function.__name__
        for _ in range(2):  # in a loop, a name may be used above the line that assigns it
            self.reads = []
            for statement in code.body:
                self.visit(statement)
        guarded, handled = _guards(code.body), _handled(code.body)
        return [replace(read, guarded=read.guarded & guarded | handled) for read in self.reads]

    def _passes_modules(self) -> bool:
        """Whether the function calls another one, of its file or its class, that could read a weight."""
        for name in self.function.__code__.co_names:
            called = self.function.__globals__.get(name) or getattr(self.kind, name, None)
            if isinstance(called, FunctionType) and _mentions(inspect.unwrap(called).__code__):
                return True
        return False

    def visit(self, node: ast.AST) -> None:
        """Statements and expressions, with what they bind and read."""
        if isinstance(node, ast.If | ast.IfExp):
            self.branch(node)
            return
        if isinstance(node, ast.Assign):
            self.bind(node.targets, self.value(node.value))
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            self.bind([node.target], self.value(node.value))
        elif isinstance(node, ast.For | ast.comprehension):
            self.bind([node.target], _inside(self.iterated(node.iter)))
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
                return
            if any(keyword.arg == ARGUMENT for keyword in node.keywords):
                self.note(self.value(node.func), called=True)
            self.call(node)
        if isinstance(node, ast.Attribute) and self.attribute(node):
            return
        for inner in ast.iter_child_nodes(node):
            self.visit(inner)

    def branch(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        outside = self.conditions
        for outcome, inside in ((True, node.body), (False, node.orelse)):
            self.conditions = (*outside, Condition(node.test, outcome, self.owner)) if self.owner else outside
            for each in inside if isinstance(inside, list) else [inside]:
                self.visit(each)
        self.conditions = outside

    def attribute(self, node: ast.Attribute) -> bool:
        """Note a read; True if nothing below the node needs to be looked at."""
        inner = node.value
        of_weight = isinstance(inner, ast.Attribute) and inner.attr == "weight" and isinstance(inner.ctx, ast.Load)
        if of_weight and isinstance(inner, ast.Attribute) and (paths := self.value(inner.value)):
            if node.attr not in _HARMLESS:
                self.note(paths, dtype=node.attr == "dtype")
            return True
        if node.attr == "weight" and isinstance(node.ctx, ast.Load):
            self.note(self.value(inner))
        elif node.attr == "dtype" and (owner := self.first_parameter(inner)):
            self.note(frozenset((*path, FIRST) for path in owner), dtype=True)
        return False

    def note(self, paths: Iterable[Path], *, dtype: bool = False, called: bool = False) -> None:
        guarded = frozenset(("int8", "uint8")) if dtype else frozenset()
        reads = (Read(path, self.reader, self.method, self.conditions, guarded, called) for path in paths if path)
        self.reads += reads

    def bind(self, targets: Iterable[ast.expr], paths: frozenset[Path]) -> None:
        for target in targets:
            for node in ast.walk(target):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):  # not those of an index
                    self.names[node.id] = self.names.get(node.id, frozenset()) | paths if paths else frozenset()

    def value(self, node: ast.expr) -> frozenset[Path]:
        """The modules that an expression may stand for."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, frozenset())
        if isinstance(node, ast.Attribute):
            return frozenset((*path, node.attr) for path in self.value(node.value))
        if isinstance(node, ast.Subscript):
            return frozenset((*path, _key(node.slice)) for path in self.value(node.value))
        if isinstance(node, ast.IfExp):
            return self.value(node.body) | self.value(node.orelse)
        if isinstance(node, ast.BoolOp | ast.Tuple | ast.List):
            parts = node.values if isinstance(node, ast.BoolOp) else node.elts
            return frozenset().union(*map(self.value, parts))
        if isinstance(node, ast.NamedExpr):
            return self.value(node.value)
        if isinstance(node, ast.Call):
            return self.called(node)
        return frozenset()

    def called(self, node: ast.Call) -> frozenset[Path]:
        """The modules that a call returns, where it is one that finds modules."""
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name == "getattr" and len(node.args) >= 2:
            step = _text(node.args[1])
            return frozenset((*path, *step.split(".")) for path in self.value(node.args[0]))
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get_submodule" and node.args:
            step = _text(node.args[0])
            return frozenset((*path, *step.split(".")) for path in self.value(node.func.value))
        return frozenset()

    def iterated(self, node: ast.expr) -> frozenset[Path]:
        """The modules whose children a loop goes through."""
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("values", "items", "children"):
                return self.value(node.func.value)
            if isinstance(node.func, ast.Name) and node.func.id in ("enumerate", "zip", "reversed", "list", "iter"):
                return frozenset().union(*map(self.iterated, node.args))
        return self.value(node)

    def first_parameter(self, node: ast.expr) -> frozenset[Path]:
        """The modules of ``next(module.parameters())``, with or without ``iter``."""
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("next", "iter"):
            if not node.args:
                break
            node = node.args[0]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "parameters":
                return self.value(node.func.value)
        return frozenset()

    def call(self, node: ast.Call) -> None:
        """Follow modules into a function that they are given to."""
        function, bound = self.callee(node.func)
        if function is None or self.depth >= DEPTH or _OF_THE_LIBRARY.fullmatch(function.__module__ or ""):
            return
        given = [self.value(each) for each in node.args if not isinstance(each, ast.Starred)]
        named = {each.arg: self.value(each.value) for each in node.keywords if each.arg is not None}
        if not any(given) and not any(named.values()):
            return
        code = _parsed(function)
        if code is None or function is self.function:
            return
        names = dict(zip(code.arguments[bound:], given, strict=False)) | named
        owner = code.arguments[0] if bound and code.arguments else ""
        if owner:
            names[owner] = frozenset([()])
        reader = _Reader(self.reader, self.kind, function, owner, self.method, self.depth + 1)
        for read in reader.run(code, names):
            self.reads.append(replace(read, conditions=(*self.conditions, *read.conditions)))

    def callee(self, node: ast.expr) -> tuple[FunctionType | None, int]:
        """The function of a call, if its source can be known, and how many of its arguments are bound."""
        if isinstance(node, ast.Name):
            function = self.function.__globals__.get(node.id)
            return (inspect.unwrap(function), 0) if isinstance(function, FunctionType) else (None, 0)
        if isinstance(node, ast.Attribute) and self.value(node.value) == frozenset([()]):
            function = getattr(self.kind, node.attr, None)
            if isinstance(function, FunctionType) and not _NOT_AT_WORK.fullmatch(node.attr):
                return inspect.unwrap(function), 1
        return None, 0


def _key(node: ast.expr) -> str:
    """The name of the module that a list or dict of modules has at a place."""
    try:
        return str(ast.literal_eval(node))
    except ValueError:
        return ANY


def _inside(paths: frozenset[Path]) -> frozenset[Path]:
    return frozenset((*path, ANY) for path in paths)


def _text(node: ast.expr) -> str:
    """A name given as text; ``*`` for what is not known of it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else ANY for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ANY


def _handled(body: Iterable[ast.stmt]) -> frozenset[str]:
    """The dtypes of packed weights that a function handles, as RWKV does: it asks whether a weight has their scales."""
    calls = [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Call)]
    asked = {_text(each.args[1]) for each in calls if _named(each, "hasattr") and len(each.args) == 2}
    return frozenset(dtype for name, dtype in (("SCB", "int8"), ("quant_state", "uint8")) if name in asked)


def _named(call: ast.Call, name: str) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == name


def _guards(body: Iterable[ast.stmt]) -> frozenset[str]:
    """The dtypes of packed weights that a function compares a dtype with."""
    found = set()
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Compare):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Attribute) and inner.attr in ("int8", "uint8"):
                        found.add(inner.attr)
                    elif isinstance(inner, ast.Attribute) and inner.attr == "is_floating_point":
                        found |= {"int8", "uint8"}
    return frozenset(found)
