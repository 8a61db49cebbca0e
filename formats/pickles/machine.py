"""Read a pickle by its opcodes, in bounded steps: what it builds are the values of ``qz.formats.pickles.values``.

As ``torch.load(weights_only=True)`` restricts it, but that nothing of it is Python's own unpickler, whose memo alone
can be made to take any amount of memory. ``pickletools`` cuts the opcodes; it builds nothing.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import IO, Any

from qz.formats.malformed import quoted
from qz.formats.pickles.values import BrokenPickle, UnsafePickle, called, named, put, storage_of

MOST_STEPS = 20_000_000
_PLAIN = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
))  # fmt: skip
"""Opcodes whose argument is the value."""
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


def load(stream: IO[bytes] | bytes) -> Any:
    """The value of one pickle; of a stream not a byte more is read than it has.

    Raises UnsafePickle for what is neither a container, a plain value nor a tensor, BrokenPickle for what is no pickle.
    """
    return _Machine().run(stream)


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: IO[bytes] | bytes) -> Any:
        try:
            for steps, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if steps > MOST_STEPS:
                    raise UnsafePickle(f"more than {MOST_STEPS:,} steps")
                if opcode.name == "STOP":
                    return self.pop()
                self.step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, OverflowError, UnicodeError, RecursionError, MemoryError) as error:
            raise BrokenPickle(f"it is not a valid pickle ({quoted(str(error), 100)})") from error
        raise BrokenPickle("it has no end")

    def step(self, name: str, argument: Any) -> None:
        if name in _PLAIN:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _STEPS:
            _STEPS[name](self, argument)
        else:
            raise UnsafePickle(f"the instruction {name}")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise BrokenPickle("a mark is where a value should be")
        return value

    def since_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise BrokenPickle("a mark is missing")
        found = self.stack[place + 1 :]
        del self.stack[place:]
        return found

    def top(self, kind: type) -> Any:
        """The container that something is added to."""
        if not self.stack or type(self.stack[-1]) is not kind:
            raise UnsafePickle("something is added to a value that is not a container")
        return self.stack[-1]

    def keep(self, place: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise BrokenPickle("nothing is there to be kept")
        self.memo[place] = self.stack[-1]

    def items(self, pairs: list[Any]) -> None:
        if len(pairs) % 2:
            raise BrokenPickle("a key has no value")
        found = self.top(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            put(found, key, value)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.items([key, value])

    def extend(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def last(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def dictionary(self) -> None:
        pairs = self.since_mark()
        self.stack.append({})
        self.items(pairs)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.stack.append(called(function, arguments))

    def build(self) -> None:
        """The attributes of a container, such as the versions that ``state_dict`` notes; nothing needs them."""
        self.pop()
        self.top(dict)

    def global_name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(named(module, name))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.stack.append(named(module, name))

    def drop_mark(self) -> None:
        self.since_mark()


_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda machine, argument: None,  # noqa: ARG005
    "FRAME": lambda machine, argument: None,  # noqa: ARG005
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.drop_mark(),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "LIST": lambda machine, _: machine.stack.append(machine.since_mark()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.last(1),
    "TUPLE2": lambda machine, _: machine.last(2),
    "TUPLE3": lambda machine, _: machine.last(3),
    "DICT": lambda machine, _: machine.dictionary(),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_item(),
    "SETITEMS": lambda machine, _: machine.items(machine.since_mark()),
    "PUT": lambda machine, argument: machine.keep(int(argument)),
    "BINPUT": lambda machine, argument: machine.keep(argument),
    "LONG_BINPUT": lambda machine, argument: machine.keep(argument),
    "MEMOIZE": lambda machine, _: machine.keep(len(machine.memo)),
    "GET": lambda machine, argument: machine.stack.append(machine.memo[int(argument)]),
    "BINGET": lambda machine, argument: machine.stack.append(machine.memo[argument]),
    "LONG_BINGET": lambda machine, argument: machine.stack.append(machine.memo[argument]),
    "GLOBAL": lambda machine, argument: machine.global_name(argument),
    "STACK_GLOBAL": lambda machine, _: machine.stack_global(),
    "BINPERSID": lambda machine, _: machine.stack.append(storage_of(machine.pop())),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
}
