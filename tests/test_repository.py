"""The repository is what its set-up says: rooms, pins, CI, version, and what an installed qz needs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import qz

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("cli", "quantize", "formats")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[; ]", line)[0].lower().replace("_", "-") for line in requirements}


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_a_link_from_the_package(room: str) -> None:
    assert (ROOT / "qz" / room).is_symlink()
    assert os.readlink(ROOT / "qz" / room) == f"../{room}"
    assert PROJECT["tool"]["setuptools"]["package-dir"][f"qz.{room}"] == room


def own_files() -> list[Path]:
    """The package's own modules, without those of the rooms, which are links in it."""
    files = (ROOT / "qz").rglob("*.py")
    return [path for path in files if path.relative_to(ROOT / "qz").parts[0] not in ROOMS]


def test_every_folder_with_code_is_in_the_wheel() -> None:
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    folders |= {path.parent.relative_to(ROOT / "qz") for path in own_files()}
    packages = {".".join(("qz", *folder.parts)) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages


def test_everything_that_is_installed_is_pinned() -> None:
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = names(project["dependencies"]) | names(extras["dev"]) | names(extras["zoo"])
    assert wanted <= pins().keys()
    assert re.fullmatch(r"\d+\.\d+\.\d+", pins()["torch"]), "a local version would pin one platform's build"


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Those inside a node, however deep. To look into expressions as well would take most of the time."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        for each in getattr(node, block, ()):
            yield each
            yield from statements(each)


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in it."""
    found = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_everything_that_is_imported_is_declared_and_pinned() -> None:
    distributions = metadata.packages_distributions()
    ours = {"qz", *ROOMS}
    rooms = {name for room in ("qz", *ROOMS) for path in (ROOT / room).rglob("*.py") for name in imported(path)}
    rooms -= ours | sys.stdlib_module_names
    assert {"torch", "typer", "httpx2", "yaml"} <= rooms
    needed = {distributions[name][0].lower().replace("_", "-") for name in rooms}
    assert needed - names(PROJECT["project"]["dependencies"]) == set()
    assert needed <= pins().keys()

    others = [path for place in ("tests", "benchmarks", "demo", "docs") for path in (ROOT / place).rglob("*.py")]
    files = {path.stem for path in others} | {path.parent.name for path in others}
    used = {name for path in others for name in imported(path)} - rooms - ours - files - sys.stdlib_module_names
    declared = names(PROJECT["project"]["optional-dependencies"]["dev"]) | names(PROJECT["project"]["dependencies"])
    used -= {"pynvml"}  # only where a GPU is
    assert {distributions.get(name, [name])[0].lower().replace("_", "-") for name in used} - declared == set()


def test_every_dependency_says_what_it_is_for() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name in (*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]):
        assert re.search(rf'"{re.escape(name)}", +# \w', text), name


def test_ci_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_the_changelog_knows_this_version() -> None:
    assert f"## {qz.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_typer_is_used_by_its_public_names_only() -> None:
    """It bundles its own Click; the other one may not be there."""
    for path in (ROOT / "cli").rglob("*.py"):
        assert not re.search(r"\btyper\._|import click|from click", path.read_text()), path


@pytest.mark.parametrize("module", ["qz", "qz.cli.app", "qz.formats.checkpoint.survey", "qz.formats.output.staging"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = ("torch", "transformers", "diffusers", "bitsandbytes", "huggingface_hub", "numba")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# What is published


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, as `python -m build` does it."""
    place = tmp_path_factory.mktemp("build")
    left_out = shutil.ignore_patterns(".venv", ".git", ".*_cache", "*.egg-info", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, place / "clone", symlinks=True, ignore=left_out)

    def build(kind: str, source: Path) -> Path:
        code = f"import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))"
        command = [sys.executable, "-W", "ignore", "-c", code, str(place)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return place / done.stdout.splitlines()[-1]

    sdist = build("sdist", place / "clone")
    with tarfile.open(sdist) as archive:
        if data_filter := getattr(tarfile, "data_filter", None):  # from Python 3.11.4
            archive.extraction_filter = staticmethod(data_filter)
        archive.extractall(place / "unpacked")
    return sdist, build("wheel", next((place / "unpacked").iterdir()))


def test_the_sdist_has_all_that_tests_and_documents_it(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    wanted = {name for name in kept if name and not (ROOT / name).is_symlink()} - {".gitignore", ".gitattributes"}
    wanted |= {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
        "tests/conftest.py",
        "docs/index.md",
    }
    assert wanted - held == set()
    assert not [name for name in held if name.endswith((".pyc", ".nbi", ".nbc"))]


def test_the_wheel_has_the_package_and_nothing_else_and_runs(built: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    code = {f"qz/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    data = PROJECT["tool"]["setuptools"]["package-data"]
    named = {f"{package.replace('.', '/')}/{name}" for package, names in data.items() for name in names}
    assert held == code | {path.relative_to(ROOT).as_posix() for path in own_files()} | named
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, "--disable-pip-version-check", str(built[1])], check=True)

    def python(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(target)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert python("-c", "import qz.quantize; print(qz.__file__, qz.quantize.__path__[0])").split() == [
        str(target / "qz/__init__.py"),
        str(target / "qz/quantize"),
    ]
    assert qz.__version__ in python("-m", "qz", "--version")
    assert "--double-quant" in python("-m", "qz", "quantize", "--help")
    assert qz.__version__ in python(str(target / "bin/qz"), "--version")
