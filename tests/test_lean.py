"""The command imports the libraries without their compilers, and nothing in its output tells."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from converted import quantized
from forked import Runner
from pace import HANG
from qz.quantize.libraries.versions import requirement
from reference import differing_files
from zoo import build

pytestmark = pytest.mark.usefixtures("no_memory")

RUNS = """
import sys
from qz.cli.app import run
from qz.quantize.libraries.importing import lean_imports, work_bounds
lean_imports.allow()
work_bounds.set_hard()  # as in the process that is asked for a command
"""
SHOWS_MODULES = (
    RUNS
    + """
used, unused, *arguments = sys.argv[1:]
assert run(arguments) == 0
assert used in sys.modules
unwanted = (unused, "torch._dynamo", "torch._inductor", "torch.distributed.tensor")
real = {name for name in unwanted if name in sys.modules}
assert not real, real
import torch
assert torch.compile is not lean_imports._unchanged and torch.distributed.is_available()
if unused == "diffusers":
    import torch._dynamo
    assert hasattr(torch._dynamo, "optimize")
"""
)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ_CACHE", "")


def python(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HANG, check=False)


def tiny_rae(model_class: Any) -> Any:
    return model_class(
        encoder_hidden_size=64,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
        encoder_input_size=28,
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Components that need diffusers without and with transformers: in ``diffusers.models``, and outside of it."""
    from diffusers import AutoencoderRAE, ReduxImageEncoder

    root = tmp_path_factory.mktemp("parts")
    build("flux").save_pretrained(root / "transformer")
    tiny_rae(AutoencoderRAE).save_pretrained(root / "vae")
    ReduxImageEncoder(redux_dim=64, txt_in_features=64).save_pretrained(root / "redux")
    return {name: root / name for name in ("transformer", "vae", "redux")}


@pytest.mark.parametrize("order", [("transformer", "vae"), ("redux", "transformer")], ids=" ".join)
def test_the_libraries_are_imported_for_all_components_in_any_order(
    python_with_torch: list[str], parts: dict[str, Path], order: tuple[str, ...], tmp_path: Path
) -> None:
    """A process of its own writes what this process does, of a model of diffusers that contains one of transformers and
    of one that is not among ``diffusers.models``, too. For others transformers is left out: half of diffusers' import
    time."""
    pipeline(tmp_path / "source", parts, order)
    arguments = ["quantize", "source", "--components", ",".join(order), "-o", "there", "--quiet"]
    done = python([*python_with_torch, "-c", f"{RUNS}sys.exit(run(sys.argv[1:]))", *arguments], tmp_path)
    assert done.returncode == 0, done.stderr
    for name in order:
        quantized(parts[name], tmp_path / "here" / name, "nf4")
        assert differing_files(tmp_path / "there" / name, tmp_path / "here" / name) == []


def pipeline(folder: Path, parts: dict[str, Path], names: tuple[str, ...]) -> None:
    """A pipeline of some of the parts."""
    index: dict[str, Any] = {"_class_name": "DiffusionPipeline", "_diffusers_version": "0.42.1"}
    for name in names:
        shutil.copytree(parts[name], folder / name)
        config = json.loads((parts[name] / "config.json").read_text())
        index[name] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))


CHECKS_CLASSES = """
import importlib.util, pathlib, re, sys
from types import SimpleNamespace
from qz.quantize.libraries.importing import lean_imports
from qz.quantize.libraries.importing.optional_packages import needed_by
lean_imports.allow()
models = pathlib.Path(importlib.util.find_spec("diffusers").origin).parent / "models/__init__.py"
groups = re.findall(r'"[\\w.]+"\\] = \\[([^\\]]*)\\]', models.read_text())
names = [name for group in groups for name in re.findall(r'"(\\w+)"', group)]
def needs(name):
    found = SimpleNamespace(library="diffusers", architecture=name, config={"_class_name": name})
    return "transformers" in needed_by(found)
with lean_imports.lean_imports():
    import diffusers
    for name in names:
        if hasattr(diffusers, name) and not needs(name):
            assert not hasattr(getattr(diffusers, name), "_backends"), name
assert needs("AutoencoderRAE") and needs("ReduxImageEncoder") and not needs("FluxTransformer2DModel")
assert "transformers" not in sys.modules and len(names) > 100
"""


def test_every_other_model_of_diffusers_can_be_imported_without_transformers(
    python_with_torch: list[str], tmp_path: Path
) -> None:
    done = python([*python_with_torch, "-c", CHECKS_CLASSES], tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_built_whole_either_does_not_name_the_hatch(forks: Runner, tmp_path: Path) -> None:
    """Where it may help it is named: see test_planning_process."""
    build("llama-tied").save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps({**config, "hidden_size": "64"}))
    done = forks.run("quantize", "source", "--dry-run", cwd=tmp_path, environment={"QZ_CACHE": "", "QZ_LEAN": "0"})
    assert done.code == 78, done.stderr
    assert "QZ_LEAN" not in done.stderr


UNUSABLE = {
    "missing": "import tempfile; tempfile.tempdir = '/proc/nowhere'",
    "full": (
        "import pathlib\n"
        "from qz.quantize.libraries.transformers import meta_loading\n"
        "whole = meta_loading.store\n"
        "meta_loading.store = lambda path, data: whole(pathlib.Path('/dev/full'), data)"
    ),
}


@pytest.mark.parametrize("folder", UNUSABLE)
def test_a_temporary_folder_that_cannot_be_used_is_an_io_error(folder: str, forks: Runner, tmp_path: Path) -> None:
    """Not a model that cannot be built."""
    if folder == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no device that is always full")
    build("llama-tied").save_pretrained(tmp_path / "source")
    done = forks.run(
        "quantize", "source", "--dry-run", cwd=tmp_path, before=UNUSABLE[folder], environment={"QZ_CACHE": ""}
    )
    assert done.code == 74, done.stderr
    assert "TMPDIR" in done.stderr


LIBRARIES = {"qwen3-moe": ("transformers", "diffusers"), "flux": ("diffusers", "transformers")}
"""That of a model, and the other one."""


@pytest.mark.parametrize("name", LIBRARIES)
def test_planning_leaves_the_compiler_out_puts_everything_back_and_changes_no_byte(
    name: str, python_with_torch: list[str], tmp_path: Path
) -> None:
    build(name).save_pretrained(tmp_path / "source")
    arguments = ["quantize", "source", "-o", "there", "--quiet"]
    done = python([*python_with_torch, "-c", SHOWS_MODULES, *LIBRARIES[name], *arguments], tmp_path)
    assert done.returncode == 0, done.stderr
    quantized(tmp_path / "source", tmp_path / "here", "nf4")
    assert differing_files(tmp_path / "here", tmp_path / "there") == []


def test_advice_on_versions_is_what_the_package_declares() -> None:
    for name in ("transformers", "diffusers"):
        declared = [each for each in metadata.requires("qz-cli") or [] if each.startswith(name)]
        assert declared == [requirement(name)]
