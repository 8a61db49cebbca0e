"""What is compiled once, in the time in which ``preloaded`` imports, and not by each worker of xdist that begins."""

from __future__ import annotations

import compileall
from pathlib import Path

import pytest
from _pytest.assertion import rewrite

TESTS = Path(__file__).parent


def compile_once(config: pytest.Config) -> None:
    """Leave the code of qz, and of the tests with their asserts rewritten, where Python and pytest look for it."""
    for room in ("qz", "cli", "quantize", "formats"):
        compileall.compile_dir(TESTS.parent / room, quiet=2)
    state = config.stash[rewrite.assertstate_key]
    for file in (*TESTS.rglob("test_*.py"), *TESTS.rglob("conftest.py")):
        compiled = rewrite.get_cache_dir(file) / f"{file.stem}{rewrite.PYC_TAIL}"
        if rewrite._read_pyc(file, compiled) is None and rewrite.try_makedirs(compiled.parent):
            source_hash, code = rewrite._rewrite_test(file, config)
            rewrite._write_pyc(state, code, source_hash, compiled)
