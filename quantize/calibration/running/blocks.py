"""Run a model block by block: one block's weights and the hidden states of every batch are in memory at once.

The model's own forward runs, once for each batch, in a thread of its own that waits wherever a block begins whose
weights are not there. When all of them wait, the next block is loaded, and one thread after the other goes through it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol


class Finished(BaseException):
    """Raised by a hook when a forward has come as far as it needs to."""


class _GivenUp(BaseException):
    """Raised where a thread waits when there is no point in going on."""


@dataclass(eq=False)
class _Batch:
    """One forward, and the part of the model that it waits for."""

    number: int
    arguments: Mapping[str, Any]
    go: SimpleQueue[None] = field(default_factory=SimpleQueue)
    waits_for: str | None = None
    done: bool = False
    error: BaseException | None = None
    thread: threading.Thread | None = None


def parts_of(model: Any) -> dict[str, Any]:
    """What is loaded when it is called, by path: each block (an item of an outermost list) and each embedding."""
    import torch

    parts: dict[str, Any] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{part}.") for part in parts):
            continue
        if isinstance(module, torch.nn.ModuleList):
            parts.pop(path, None)  # a list inside a list
            parts |= {f"{path}.{name}": block for name, block in module.named_children()}
        elif isinstance(module, torch.nn.Embedding):
            parts[path] = module
    return {path: module for path, module in parts.items() if next(module.parameters(), None) is not None}


def blocks_of(model: Any) -> dict[str, Any]:
    """The blocks among a model's parts, by path."""
    import torch

    return {path: part for path, part in parts_of(model).items() if not isinstance(part, torch.nn.Embedding)}


Entering = Callable[[str, Any, int], None]
"""Called before a batch (its number) goes through a part (its path and module)."""
Replay = Callable[[str], Sequence[Sequence[Any]] | None]
"""For a part that an earlier run went through, each batch's outputs of it, one for each call; else None."""
Leaving = Callable[[str, Any], None]
"""Called when all batches have gone through a part, while its weights are still loaded."""


class Loads(Protocol):
    """Gives a module, by its path in the model, its weights, and takes them back."""

    def load(self, path: str, module: Any) -> None: ...
    def release(self, path: str, module: Any) -> None: ...


class BlockPass:
    """One pass of several batches through a model. ``visited`` is called when all batches have left a part."""

    def __init__(
        self,
        model: Any,
        weights: Loads,
        visited: Callable[[str], None],
        head: Any = None,
        entering: Entering | None = None,
        leaving: Leaving | None = None,
        replay: Replay | None = None,
    ) -> None:
        """``head``, if it is given, is a part like the blocks. ``leaving`` may run the part again."""
        self.model, self.weights, self.visited = model, weights, visited
        self.entering, self.leaving, self.replay = entering, leaving, replay
        self.parts = parts_of(model)
        if head is not None:
            self.parts |= {path: module for path, module in model.named_modules() if module is head}
        self.loaded: str | None = None
        self.here = threading.local()
        self.back = SimpleQueue[None]()
        self.given_up = False
        self.answers: Iterator[Any] | None = None
        """What the loaded part returns, if an earlier run went through it."""

    @property
    def number(self) -> int:
        """Of the batch whose forward asks."""
        batch: _Batch = self.here.batch
        return batch.number

    def run(self, batches: Iterable[Mapping[str, Any]], used: Callable[[int, Any], None] | None = None) -> None:
        """Run every batch; ``used`` is given its number and what its forward returns, one at a time.

        Raises what the first failing forward raised.
        """
        handles = [
            module.register_forward_pre_hook(self._waits(path), prepend=True) for path, module in self.parts.items()
        ]
        if self.replay is not None:
            for module in self.parts.values():
                module.forward = self._known_or(module.forward)
        running = [_Batch(number, batch) for number, batch in enumerate(batches)]
        try:
            for each in running:
                each.thread = threading.Thread(target=self._forward, args=(each, used), daemon=True)
                each.thread.start()
                self._await(each)
            while waiting := [each for each in running if not each.done]:
                self._through(str(waiting[0].waits_for), waiting)
        finally:
            self._give_up(running)
            for handle in handles:
                handle.remove()
            for module in self.parts.values() if self.replay is not None else ():
                del module.forward  # uncovers the method of the class

    def _through(self, part: str, waiting: Sequence[_Batch]) -> None:
        module = self.parts[part]
        known = self.replay(part) if self.replay is not None else None
        if known is None:
            self.weights.load(part, module)
        self.loaded = part
        for each in waiting:
            if each.waits_for == part:
                each.waits_for = None
                if self.entering is not None:
                    self.entering(part, module, each.number)
                self.answers = None if known is None else iter(known[each.number])
                each.go.put(None)
                self._await(each)
        if self.leaving is not None and known is None:
            self.leaving(part, module)
        self.loaded = None
        if known is None:
            self.weights.release(part, module)
        self.visited(part)

    def _await(self, each: _Batch) -> None:
        self.back.get()
        if each.error is not None:
            raise each.error

    def _forward(self, each: _Batch, used: Callable[[int, Any], None] | None) -> None:
        import torch

        self.here.batch = each
        try:
            with torch.inference_mode():
                answer = self.model(**each.arguments)
                if used is not None:
                    used(each.number, answer)
        except (Finished, _GivenUp):
            pass
        except BaseException as error:  # noqa: BLE001  raised again where the pass was started
            each.error = error
        each.done = True
        self.back.put(None)

    def _waits(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self.loaded != path:
                each: _Batch = self.here.batch
                each.waits_for = path
                self.back.put(None)
                each.go.get()
            if self.given_up:
                raise _GivenUp

        return hook

    def _known_or(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: forward(*args, **kwargs) if self.answers is None else next(self.answers)

    def _give_up(self, running: Sequence[_Batch]) -> None:
        """End the threads that still wait."""
        self.given_up = True
        for each in running:
            each.go.put(None)
        for each in running:
            if each.thread is not None:
                each.thread.join()
