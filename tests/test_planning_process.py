"""The command has the library asked in a process of its own, with bounds on what a config can make it take."""

from __future__ import annotations

import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converted import quantized
from hostile_configs import BOMBS, configure
from pace import HANG
from qz import MalformedInput, Unsupported
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.local_folder import LocalFolder
from qz.formats.safetensors import encode_header, layout
from qz.quantize.convert import plan_quantization
from qz.quantize.libraries.importing import work_bounds
from qz.quantize.libraries.process import asking
from qz.quantize.methods import FourBit
from qz.quantize.settings import Settings
from reference import differing_files

Qz = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is told and bounded on Linux")

AS_COMMAND = """
import resource, sys
from qz.cli import app
from qz.quantize.libraries.importing import lean_imports
lean_imports.allow()
code = app.run(sys.argv[1:])
most = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print([name for name in ("torch", "transformers") if name in sys.modules],
      int(most.split()[1]) >> 10,
      resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10, file=sys.stderr)
sys.exit(code)
"""
MOST_MB = 400
"""Of memory, for any process of a command that is given something hostile."""


def as_command(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], str, int, int]:
    """The run; the libraries that its process imported; its largest memory and that of the other process, in MB."""
    done = subprocess.run(
        [sys.executable, "-c", AS_COMMAND, *arguments],
        cwd=folder,
        env={**os.environ, "QZ_CACHE": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    found = re.fullmatch(r"(\[.*\]) (\d+) (\d+)", done.stderr.splitlines()[-1])
    assert found is not None, done.stderr
    return done, found[1], int(found[2]), int(found[3])


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "source"))


def test_the_process_that_streams_imports_no_library_and_writes_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch.py", "qz.py", "json.py"):  # the working directory may be a download
        (tmp_path / name).write_text("raise SystemExit('code of somebody ran')\n")
    quantized(source, tmp_path / "here", "nf4")
    (tmp_path / "qz.py").unlink()  # `python -c` itself imports from there
    (tmp_path / "json.py").unlink()
    (tmp_path / "torch.py").unlink()
    scipy = tmp_path / "site/scipy"
    (scipy / "optimize").mkdir(parents=True)
    (scipy / "__init__.py").write_text("__version__ = '1.17.1'\n")  # numba looks at it
    (scipy / "optimize/__init__.py").write_text("raise SystemExit('what only losses need was imported')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    work = tmp_path / "work"
    work.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 30 if hard == resource.RLIM_INFINITY else hard, hard))
    try:
        done, imported, _, there = as_command(work, "quantize", str(source), "-o", "there")
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
    assert done.returncode == 0, done.stderr
    assert imported == "[]"
    assert there > 0
    assert differing_files(tmp_path / "here", work / "there") == []


def test_a_model_larger_than_what_planning_may_take_is_planned_on_the_first_run(tmp_path: Path) -> None:
    """FLUX.1-dev's layers, narrower: 0.7 GB that diffusers makes on the CPU and moves to meta, one by one."""
    from diffusers import FluxTransformer2DModel

    config = {"num_attention_heads": 4, "attention_head_dim": 128, "guidance_embeds": True}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    tensors = layout((name, "BF16", tuple(each.shape)) for name, each in model.state_dict().items())
    model.save_config(tmp_path / "source")
    with (tmp_path / "source/diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(encode_header(tensors))
        file.truncate(file.tell() + tensors[-1].stop)
    work_bounds.set_hard()
    assert tensors[-1].stop > work_bounds.allowance(each.shape for each in tensors)[0]
    done, _, here, there = as_command(tmp_path, "quantize", "source", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert max(here, there) <= MOST_MB


def test_weights_made_one_by_one_take_the_memory_of_one_whatever_malloc_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MODULE", "malloc_holes")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    process = asking._Process.started()
    assert process is not None
    try:
        with pytest.raises(Unsupported, match="All weights could be made"):
            process.answer(pickle.dumps((None, {}, None, "", False)), None)
    finally:
        process.end()


TRIED = ("a table made in a loop", "a table made at once")
"""The others are for `make hostile`; one more is tried with experts."""


@pytest.mark.parametrize("name", TRIED)
def test_a_config_whose_sizes_would_fill_the_memory_is_refused_before_they_do(
    name: str, source: Path, tmp_path: Path
) -> None:
    configure(source, BOMBS[name])
    done, _, here, there = as_command(tmp_path, "quantize", "source")
    assert done.returncode == MalformedInput.exit_code, done.stderr
    assert "config.json describes a model whose building takes more than" in done.stderr
    assert max(here, there) <= MOST_MB


def test_experts_whose_weights_the_library_merges_are_no_way_around_the_bound(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors") | {"experts.weight": torch.zeros(1)}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    configure(source, BOMBS["a product of small sizes"])
    done, imported, here, there = as_command(tmp_path, "quantize", "source")
    assert done.returncode == MalformedInput.exit_code, done.stderr
    assert "config.json describes a model whose building takes more than" in done.stderr
    assert imported == "[]"
    assert max(here, there) <= MOST_MB


def test_a_program_that_is_traced_goes_on() -> None:
    """As under a debugger or coverage: Python 3.11 hangs in a traced function where an exception is taken back that
    was not raised."""
    traced = """
import sys
from qz.quantize.libraries.importing.work_bounds import work_bounded
def trace(*_):
    return trace
sys.settrace(trace)
with work_bounded({"weight": (2, 2)}, "model"):
    pass
print((lambda: "goes on")())
"""
    done = subprocess.run([sys.executable, "-c", traced], capture_output=True, text=True, timeout=HANG, check=False)
    assert done.stdout == "goes on\n", done.stderr


def test_a_program_that_uses_the_package_is_protected_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_bounds, "_hard", False)
    monkeypatch.setattr(sys, "executable", "")  # as where no other process can be started
    monkeypatch.setattr(work_bounds, "OF_OTHERS", 0)
    monkeypatch.setattr(work_bounds, "SECONDS", 0.3)
    configure(source, BOMBS["a table made in a loop"])
    with pytest.raises(MalformedInput, match=r"takes more than .*, far more than the 21 tensors there are call for"):
        plan_quantization(open_checkpoint(LocalFolder(source)), Settings(FourBit("nf4")))


AS_LIBRARY = """
import sys, torch
from qz import api
before = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
try:
    api.quantize(sys.argv[1], "out", device="cpu")
except Exception as error:
    print(type(error).__name__, str(error))
most = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print((most - before) >> 10)
"""


def test_a_program_that_imported_torch_is_not_filled_by_one_table_either(
    python_with_libraries: list[str], source: Path, tmp_path: Path
) -> None:
    """No thread could stop that in the middle: the library is asked in the process whose memory is bounded."""
    configure(source, BOMBS["a table made at once"])
    done = subprocess.run(
        [*python_with_libraries, "-c", AS_LIBRARY, str(source)],
        cwd=tmp_path,
        env={**os.environ, "QZ_CACHE": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    told, taken = done.stdout.splitlines()
    assert told.startswith("MalformedInput ")
    assert "describes a model whose building takes more than" in told
    assert int(taken) <= MOST_MB


@pytest.mark.parametrize(
    "config",
    [{"hidden_size": 10**18}, {"hidden_size": 10**39}, {"vocab_size": -1}, {"num_attention_heads": -4}],
    ids=str,
)
def test_a_size_that_no_tensor_has_is_the_configs_fault_whoever_makes_the_tensor(
    config: dict[str, int], source: Path
) -> None:
    configure(source, config)
    with pytest.raises(Unsupported, match="transformers cannot build LlamaForCausalLM from"):
        plan_quantization(open_checkpoint(LocalFolder(source)), Settings(FourBit("nf4")))


REFUSED: dict[str, tuple[dict[str, Any], int]] = {
    "malformed": ({"num_hidden_layers": 3}, 65),
    "a library's own error": ({"hidden_size": "64"}, 78),
}


@pytest.mark.parametrize("case", [pytest.param("malformed", marks=pytest.mark.soak), "a library's own error"])
def test_what_is_refused_there_is_refused_as_here(
    case: str, source: Path, tmp_path: Path, qz: Qz, forked_qz: Qz
) -> None:
    """But for the way out of lean imports, which are what that process has."""
    config, code = REFUSED[case]
    configure(source, config)
    there, here = qz("quantize", "source", QZ_CACHE="", QZ_LEAN="1"), forked_qz("quantize", "source")
    assert there.returncode == here.returncode == code
    hatch = ", or set QZ_LEAN=0, which imports the libraries whole"
    assert (hatch in there.stderr) == (case == "a library's own error")
    assert there.stderr.replace(hatch, "") == here.stderr
    assert os.listdir(tmp_path) == ["source"]


def other_process(pid: int) -> int | None:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found else None


def test_ctrl_c_ends_both(source: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "qz", "quantize", str(source)],
        cwd=tmp_path,
        env={**os.environ, "QZ_CACHE": "", "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while (other := other_process(process.pid)) is None:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=HANG)
    while Path(f"/proc/{other}").exists():  # by itself, if the signal came while it was started
        time.sleep(0.01)
    assert (process.returncode, errors.splitlines()[-1:]) == (130, ["Error: Interrupted."])


def test_a_library_that_crashes_takes_nothing_along(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = asking._Process.started

    def crashing() -> asking._Process | None:
        process = started()
        assert process is not None
        process._process.send_signal(signal.SIGSEGV)
        return process

    monkeypatch.setattr(work_bounds, "_hard", False)
    monkeypatch.setattr(asking._Process, "started", crashing)
    monkeypatch.setenv("QZ_CACHE", "")
    with pytest.raises(Unsupported, match=r"The library crashed while it built the model \(SIGSEGV\)"):
        plan_quantization(open_checkpoint(LocalFolder(source)), Settings(FourBit("nf4")))


def test_where_no_other_process_comes_up_the_library_is_asked_here(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_bounds, "_hard", False)
    monkeypatch.setattr(asking, "MODULE", "no_such_module")
    monkeypatch.setenv("QZ_CACHE", "")
    plan = plan_quantization(open_checkpoint(LocalFolder(source)), Settings(FourBit("nf4")))
    assert plan.architecture.class_name == "LlamaForCausalLM"
