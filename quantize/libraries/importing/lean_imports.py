"""Import the libraries without what only compiled or distributed models need: more than half of their import time.

transformers, diffusers and bitsandbytes decorate functions for ``torch.compile`` when they are imported, and so pull in
``torch._dynamo``, ``torch._inductor`` and sympy; transformers adds ``torch.distributed``'s tensors. The command builds
models on the meta device and calls eager operations only, in a process that ends with it. Measured in CPU seconds with
torch 2.13: transformers' Llama 2.3 → 0.8, diffusers' Flux 3.0 → 0.4, bitsandbytes 1.9 → 0.03.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
OPTIONAL = ("kernels", "peft", "scipy", "sklearn", "torchaudio", "torchvision", "transformers", "triton")
"""What the libraries import where it is installed: for kernels from the Hub, adapters, losses, assisted generation,
images, other kernels, and, in diffusers, the text encoders of pipelines.

Building a model needs none of it, but for a few: see ``qz.quantize.libraries.importing.optional_packages``.
"""
_allowed = False
_kept: set[str] = set()


def allow() -> None:
    """Say that this process runs no model: a library imported this way must not be used with ``torch.compile``.

    ``QZ_LEAN=0`` in the environment forbids it.
    """
    global _allowed
    _allowed = os.environ.get("QZ_LEAN") != "0"


def forbid() -> None:
    """Say that this process runs a model after all: the libraries are imported whole from now on."""
    global _allowed
    _allowed = False


def is_allowed() -> bool:
    """Whether this process may import the libraries lean."""
    return _allowed


def keep(packages: Iterable[str]) -> None:
    """Say, before the first import, which of ``OPTIONAL`` this process will need: a library imported once stays so."""
    _kept.update(packages)


def kept() -> frozenset[str]:
    """What ``keep`` was given."""
    return frozenset(_kept)


@contextmanager
def lean_imports() -> Iterator[None]:
    """Inside, where it is allowed, what is imported for the first time leaves out the compiler and what is optional."""
    with gc_paused():
        import torch

    if not _allowed or COMPILER in sys.modules:
        yield
        return
    finder = _NoCompilerFinder()
    with ExitStack() as stack:
        stack.enter_context(gc_paused())
        sys.meta_path.insert(0, finder)
        stack.callback(_forget_stand_ins, torch)
        stack.callback(sys.meta_path.remove, finder)
        replacements: list[tuple[Any, str, Any]] = [
            (torch, "compile", _unchanged),
            (torch.compiler, "disable", _unchanged),
            (torch.compiler, "allow_in_graph", _unchanged),
            (torch.distributed, "is_available", lambda: False),
        ]
        if "transformers" not in _kept:  # diffusers lists the files of every package to find three quantizers
            import importlib.metadata  # imported late: it takes 30 ms, which `qz --help` saves

            replacements.append((importlib.metadata, "packages_distributions", dict))
        for owner, name, value in replacements:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        for name in OPTIONAL:
            if name not in sys.modules and name not in _kept and not (name == "triton" and torch.version.xpu):
                sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say that there is none
                stack.callback(sys.modules.pop, name, None)
        yield


@contextmanager
def gc_paused() -> Iterator[None]:
    """Inside, where it is allowed, no garbage is collected: imports make a million objects, and all of them stay.

    To look through them again and again took a quarter of the time.
    """
    if not _allowed or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _NoCompiler(ModuleType):
    """Stands in for a module of ``torch._dynamo``: its decorators leave a function or class as it is."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unchanged


def _unchanged(decorated: Any = None, *_: Any, **__: Any) -> Any:
    return decorated if decorated is not None else _unchanged


class _NoCompilerFinder:
    """Finds a stand-in for every module of ``torch._dynamo``.

    No subclass of ``importlib.abc``'s, whose import takes longer than that of most rooms of qz.
    """

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        if fullname != COMPILER and not fullname.startswith(COMPILER + "."):
            return None
        return ModuleSpec(fullname, self, is_package=True)  # type: ignore[arg-type]  # it does what a loader does

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _NoCompiler(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def _forget_stand_ins(torch: Any) -> None:
    """Let the next import find the real ones."""
    vars(torch).pop("_dynamo", None)
    for name in [name for name, module in sys.modules.items() if isinstance(module, _NoCompiler)]:
        del sys.modules[name]
