"""Wheels of consumers, fetched without their dependencies, and single functions out of their files."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VERSIONS = {
    "vllm-bnb-plugin": "0.0.3",
    "sglang": "0.5.23",
    "invokeai": "6.14.2",
    "unsloth-zoo": "2026.10.9",
}


def fetch(name: str, folder: Path) -> Path:
    """The wheel of a package in ``folder``, from the package index if it is not there yet."""
    found = sorted(folder.glob(f"{name.replace('-', '_')}-{VERSIONS[name]}*.whl"))
    if not found:
        wanted = f"{name}=={VERSIONS[name]}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wanted]
        subprocess.run(command, check=True)
        found = sorted(folder.glob(f"{name.replace('-', '_')}-{VERSIONS[name]}*.whl"))
    return found[0]


def text(wheel: Path, ending: str) -> str:
    """The one file of a wheel whose path ends so."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(ending)]
        return archive.read(name).decode()


def functions(source: str, names: Iterable[str], given: dict[str, Any], inside: str | None = None) -> dict[str, Any]:
    """Functions and constants of a module, or methods of its class ``inside``, as they are written there; all other
    names that they use are ``given``."""
    wanted, tree = set(names), ast.parse(source)
    body = tree.body
    if inside is not None:
        [body] = [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == inside]
    taken = []
    for node in body:
        called = {node.name} if isinstance(node, ast.FunctionDef) else set()
        if isinstance(node, ast.Assign):
            called = {target.id for target in node.targets if isinstance(target, ast.Name)}
        if called & wanted:
            taken.append(textwrap.dedent(ast.unparse(node)))
            wanted -= called
    if wanted:
        raise LookupError(f"not found: {', '.join(sorted(wanted))}")
    namespace = dict(given)
    exec(compile("from __future__ import annotations\n" + "\n\n".join(taken), "consumer", "exec"), namespace)
    return namespace
