"""Go on where an interrupted run stopped to draw: what a model returned is kept once all prompts have made that call.

The pipeline runs again from the beginning, and models that come to such a call give what was kept, without weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qz.quantize.calibration.pipelines.components import Models
from qz.quantize.calibration.recording import of_model
from qz.quantize.calibration.running.recorder import Recorder
from qz.quantize.calibration.running.resume import copied
from qz.quantize.calibration.running.unfinished import Unfinished

Sum = tuple[NDArray[np.float64], int]
"""Of one weight's inputs: squares, and how many tokens those are of."""


class CallRecorder(Recorder):
    """Keeps apart what each call of a model adds, by its number, until all prompts have made that."""

    def __init__(self, models: Models, component: str, here: threading.local) -> None:
        super().__init__(models.weights[component].runnable.linears, None, hessians=False)
        self._component, self._here = component, here
        self._open: dict[int, dict[str, Sum]] = {}

    def add(self, name: str, squares: NDArray[np.float64], tokens: int) -> None:
        call = self._open.setdefault(self._here.under_way[self._component], {})
        before, count = call.get(name, (0.0, 0))
        call[name] = before + squares, count + tokens

    def with_call(self, number: int) -> dict[str, Sum]:
        """The sums, those of one more call among them."""
        more = self._open.get(number, {})
        nothing: Sum = (np.zeros(()), 0)
        return {
            name: (values + more.get(name, nothing)[0], self.tokens[name] + more.get(name, nothing)[1])
            for name, values in self.sums.items()
        }

    def close_call(self, number: int) -> None:
        for name, (values, tokens) in self._open.pop(number, {}).items():
            super().add(name, values, tokens)

    def close_all(self) -> None:
        for number in sorted(self._open):
            self.close_call(number)

    def restart(self) -> None:
        """Forget the calls that not all prompts have made."""
        self._open.clear()


class CallStore:
    """What the calls of a pipeline's models returned, in ``kept``; with the sums of those that are ``recorded``."""

    def __init__(self, kept: Unfinished, models: Models, prompts: int, recorded: Iterable[str]) -> None:
        self.kept, self.models, self.prompts = kept, models, prompts
        self.here = threading.local()
        self.recorders = {name: CallRecorder(models, name, self.here) for name in recorded}
        self._returned: dict[str, dict[int, Any]] = {}
        """By call, what it returned for each prompt that has made it."""
        self._known: dict[str, list[list[Any]]] = {}
        for name, recorder in self.recorders.items():
            recorder.restore(of_model(f"{name}/", kept.values), of_model(f"{name}/", kept.sums.tokens), {})

    def known_or(self, component: str, forward: Callable[..., Any], drawing: threading.local) -> Callable[..., Any]:
        """The forward of a model, or what is known that it returns to the prompt that ``drawing`` is at."""

        def call(*args: Any, **kwargs: Any) -> Any:
            number, prompt = drawing.counts[component], drawing.number
            part = f"call {number} of {component}"
            known = self._found(part)
            if known is not None:
                return known[prompt][0]
            if not hasattr(self.here, "under_way"):
                self.here.under_way = {}
            self.here.under_way[component] = number
            found = forward(*args, **kwargs)
            self._note(part, component, number, prompt, found)
            return found

        return call

    def restart(self, whole: Iterable[str]) -> None:
        """The pipeline starts over, with models that are loaded whole."""
        self.kept.sums.whole = sorted(whole)
        self._returned.clear()
        self._known.clear()
        for recorder in self.recorders.values():
            recorder.restart()

    def finish(self) -> None:
        """All prompts are drawn."""
        self._known.clear()
        for recorder in self.recorders.values():
            recorder.close_all()

    def close(self) -> None:
        for recorder in self.recorders.values():
            recorder.close()

    def _found(self, part: str) -> list[list[Any]] | None:
        if part not in self._known:
            found = self.kept.find(part, self.models.device)
            if found is None:
                return None
            self._known[part] = found
        return self._known[part]

    def _note(self, part: str, component: str, number: int, prompt: int, found: Any) -> None:
        outputs = self._returned.setdefault(part, {})
        outputs[prompt] = copied(found)
        if len(outputs) < self.prompts:
            return
        del self._returned[part]
        recorder = self.recorders.get(component)
        more = recorder.with_call(number) if recorder is not None else {}
        values = {f"{component}/{name}": each for name, (each, _) in more.items()}
        tokens = {f"{component}/{name}": count for name, (_, count) in more.items()}
        sums = replace(self.kept.sums, tokens=self.kept.sums.tokens | tokens)
        if (
            self.kept.keep(part, [[outputs[each]] for each in range(self.prompts)], values, sums)
            and recorder is not None
        ):
            recorder.close_call(number)
