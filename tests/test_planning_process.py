"""The command has the library asked in a process of its own, with bounds on what a config can make it take."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
from qz.formats.files.local_folder import LocalFolder
from qz.formats.tensors.safetensors_layout import encode_header, layout
from qz.quantize.libraries import answer_cache
from qz.quantize.libraries.importing import work_bounds
from qz.quantize.libraries.process import asking
from qz.quantize.methods import FourBit
from qz.quantize.models.plan import plan_quantization
from qz.quantize.settings import Settings
from reference import differing_files

Qz = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is told and bounded on Linux")

AS_COMMAND = """
import json, resource, sys
from qz.cli import app
from qz.quantize.libraries.importing import lean_imports
from qz.quantize.libraries.process import asking
lean_imports.allow()
with asking.together():
    for arguments in json.loads(sys.argv[1]):
        code = app.run(arguments)
most = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print([name for name in ("torch", "transformers") if name in sys.modules],
      int(most.split()[1]) >> 10,
      resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10, file=sys.stderr)
sys.exit(code)
"""
MOST_MB = 400
"""Of memory, for any process of a command that is given something hostile."""


def as_command(
    folder: Path, *commands: Sequence[str], cache: str = ""
) -> tuple[subprocess.CompletedProcess[str], str, int, int]:
    """The run of one command, or of several that ask one process; the libraries that its process imported; its largest
    memory and that of the other process, in MB."""
    done = subprocess.run(
        [sys.executable, "-c", AS_COMMAND, json.dumps(commands)],
        cwd=folder,
        env={**os.environ, "QZ_CACHE": cache, "HF_HUB_OFFLINE": "1"},
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


def test_the_process_that_streams_imports_no_library_and_writes_and_refuses_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_qz: Qz
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
    wrong = shutil.copytree(source, tmp_path / "wrong")
    config, code = REFUSED["a library's own error"]
    configure(wrong, config)
    commands = ["quantize", str(source), "-o", "there"], ["quantize", str(wrong)]
    try:
        done, imported, _, there = as_command(work, *commands, cache=str(tmp_path / "cache"))
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
    assert imported == "[]"
    assert there > 0
    assert differing_files(tmp_path / "here", work / "there") == []
    [kept] = (tmp_path / "cache/architectures").iterdir()
    monkeypatch.setenv("QZ_CACHE", str(tmp_path / "cache"))
    assert answer_cache.recall(kept.name) is not None
    here = forked_qz("quantize", str(wrong), cwd=work)
    assert done.returncode == here.returncode == code
    error = done.stderr.partition("Error: ")[2].rpartition("[]")[0]
    assert HATCH in error
    assert error.replace(HATCH, "") == here.stderr.partition("Error: ")[2]
    assert os.listdir(work) == ["there"]


def test_a_model_larger_than_what_planning_may_take_is_planned_and_experts_are_no_way_around_the_bound(
    source: Path, tmp_path: Path
) -> None:
    """FLUX.1-dev's layers, narrower: 0.7 GB that diffusers makes on the CPU and moves to meta, one by one. Then a
    config that is to be refused, beside weights that the library merges, and one that a list is made of in a loop, all
    asked of the same process."""
    from diffusers import FluxTransformer2DModel

    config = {"num_attention_heads": 4, "attention_head_dim": 128, "guidance_embeds": True}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    tensors = layout((name, "BF16", tuple(each.shape)) for name, each in model.state_dict().items())
    model.save_config(tmp_path / "large")
    with (tmp_path / "large/diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(encode_header(tensors))
        file.truncate(file.tell() + tensors[-1].stop)
    work_bounds.set_hard()
    assert tensors[-1].stop > work_bounds.allowance(each.shape for each in tensors)[0]
    looped = Path(shutil.copytree(source, tmp_path / "looped"))
    configure(looped, BOMBS["positions of a recurrent model"])
    weights = load_file(source / "model.safetensors") | {"experts.weight": torch.zeros(1)}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    configure(source, BOMBS["a product of small sizes"])
    commands = [["quantize", "large", "--dry-run"], ["quantize", "source"], ["quantize", "looped"]]
    done, imported, here, there = as_command(tmp_path, *commands)
    assert "(dry run: nothing written)" in done.stdout, done.stderr
    assert done.returncode == MalformedInput.exit_code, done.stderr
    for name in ("source", "looped"):
        assert f"{name}/config.json describes a model whose building takes more than" in done.stderr
    assert imported == "[]"
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


@pytest.mark.soak
@pytest.mark.parametrize("name", ["positions of a recurrent model", "a table made in a loop", "a table made at once"])
def test_a_config_whose_sizes_would_fill_the_memory_is_refused_before_they_do(
    name: str, source: Path, tmp_path: Path
) -> None:
    """Each in a process of its own; the others are for `make hostile`."""
    configure(source, BOMBS[name])
    done, _, here, there = as_command(tmp_path, ["quantize", "source"])
    assert done.returncode == MalformedInput.exit_code, done.stderr
    assert "config.json describes a model whose building takes more than" in done.stderr
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
import resource, sys, torch
from qz import api
before = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
try:
    api.quantize(sys.argv[1], "out", device="cpu")
except Exception as error:
    print(type(error).__name__, str(error))
most = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print((most - before) >> 10, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
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
    assert all(int(each) <= MOST_MB for each in taken.split())


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


HATCH = ", or set QZ_LEAN=0, which imports the libraries whole"


@pytest.mark.soak
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_there_is_refused_as_here(
    case: str, source: Path, tmp_path: Path, qz: Qz, forked_qz: Qz
) -> None:
    """But for the way out of lean imports, which are what that process has."""
    config, code = REFUSED[case]
    configure(source, config)
    there, here = qz("quantize", "source", QZ_CACHE="", QZ_LEAN="1"), forked_qz("quantize", "source")
    assert there.returncode == here.returncode == code
    assert (HATCH in there.stderr) == (case == "a library's own error")
    assert there.stderr.replace(HATCH, "") == here.stderr
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
