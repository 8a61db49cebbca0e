"""The CPU's kernels that write what bitsandbytes' CUDA kernels write: ``tests/gpu`` compares them with a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from converted import plan_of
from qz import OutputRefused, api
from qz.formats.tensors.shards import DEFAULT_SHARD_BYTES
from qz.quantize.compute import cuda_tables, kernels, tables
from qz.quantize.compute.cpu.cpu_arithmetic import Cpu
from qz.quantize.compute.devices import as_cuda
from qz.quantize.libraries.importing import gpu_driver
from qz.quantize.methods import FourBit
from qz.quantize.models.run import carry_out
from qz.quantize.reports.summary import Source
from qz.quantize.settings import Settings
from qz.quantize.streaming.output.output_folders import Target
from qz.quantize.streaming.quantizing_device import quantizing_tasks
from test_verify import change

TINY = np.float32(2.0**-126)
FP4_CODES = (1, 6, 7, 4, 5, 2, 3)
"""Of magnitudes, in ascending order; 0 is below them."""


def flushed(values: Any) -> Any:
    return np.where(np.abs(values) < TINY, np.copysign(np.float32(0), values), values)


def as_the_kernel_says(block: Any, quant_type: str) -> tuple[list[int], Any]:
    """``kQuantizeBlockwiseSmall`` in numpy, value by value: codes and absmax of 64 values in float32."""
    values = flushed(block)
    absmax = np.abs(values).max()
    with np.errstate(all="ignore"):
        scaled = cuda_tables.product(values, cuda_tables.reciprocals(np.array([absmax])))
    if quant_type == "nf4":
        return [sum(bool(x > bound) for bound in tables.bounds("nf4")) for x in scaled], absmax
    bounds = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
    codes = []
    for x in scaled:
        above = sum(bool(abs(x) > np.float32(bound)) for bound in bounds)
        codes.append((FP4_CODES[above - 1] if above else 0) + (8 if x < 0 else 0))
    return codes, absmax


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_kind_of_block_has_the_codes_of_cudas_kernel(dtype: str, quant_type: Literal["nf4", "fp4"]) -> None:
    """Ordinary ones, subnormals, zeros of both signs, the largest numbers, and a short block at the end."""
    random, limit = np.random.default_rng(0), tables.infinity_bits(dtype)
    tops = [0, 1, 127, 128, 129, 130, 700, 32384, 32385, limit - 1, *random.integers(0, limit, 60)]
    tops = [min(int(top), limit - 1) for top in tops]
    bits = np.concatenate([random.integers(0, top + 1, 64) for top in tops]).astype(np.uint16)
    bits[::64] = tops
    bits |= (random.integers(0, 2, bits.size) << 15).astype(np.uint16)
    bits = bits[:-31]
    packed, absmax = np.empty(-(-bits.size // 2), np.uint8), np.empty(len(tops), np.float32)
    found = kernels.quantize_4bit_as_cuda(bits, dtype, quant_type, packed, absmax)
    assert found.count == 0
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1).tolist()
    wide = np.append(tables.widen(bits, dtype), np.zeros(31, np.float32)).reshape(-1, 64)
    for number, block in enumerate(wide):
        expected, largest = as_the_kernel_says(block, quant_type)
        ours = codes[number * 64 : number * 64 + 64]
        assert ours == expected[: len(ours)], tops[number]
        assert absmax[number] == largest


def test_a_product_is_zero_below_the_number_that_rounds_to_the_smallest_normal_one() -> None:
    """To 24 bits, as an H100 does: half a last place below it (a tie) and nearer are not zero, 0.53 of one are."""
    tops, below = np.array([0x3FF8, 0x3F97, 0x3F81, 0x3F84], np.uint16), np.array([0xF8, 0x97, 0x81, 0x84], np.uint16)
    values, largest = (tables.widen(bits, "BF16") for bits in (below, tops))
    assert cuda_tables.product(values, cuda_tables.reciprocals(largest)).tolist() == [TINY, TINY, TINY, 0]
    blocks = np.zeros((4, 64), np.uint16)
    blocks[:, 0], blocks[:, 1] = tops, below | 0x8000
    packed, absmax = np.empty(128, np.uint8), np.empty(4, np.float32)
    kernels.quantize_4bit_as_cuda(blocks.reshape(-1), "BF16", "fp4", packed, absmax)
    assert (packed[::32] & 15).tolist() == [8, 8, 8, 0], "what is below zero has a sign"


def test_no_nf4_code_of_bfloat16_depends_on_the_last_place_of_a_reciprocal(monkeypatch: pytest.MonkeyPatch) -> None:
    """So they are the same on every GPU, whichever way its reciprocals are off; that of a power of two is exact."""
    uncached = cuda_tables.cut_points.__wrapped__  # type: ignore[attr-defined]
    tables_of_steps = []
    for step in (-1, 0, 1):
        steps = np.where(np.arange(1024) == 0, 0, step).astype(np.int8)
        monkeypatch.setattr(cuda_tables, "reciprocal_steps", lambda steps=steps: steps)
        tables_of_steps.append(uncached("nf4", "BF16"))
    for top in range(tables.infinity_bits("BF16")):
        cuts = [np.clip(each[top, :15].astype(int), ~top, top) for each in tables_of_steps]
        assert (cuts[0] == cuts[1]).all(), top
        assert (cuts[1] == cuts[2]).all(), top


def test_values_that_are_not_finite_are_counted() -> None:
    bits = np.full(200, 0x3F80, np.uint16)
    bits[[70, 199]] = 0x7F80, 0xFFC0
    found = kernels.quantize_4bit_as_cuda(bits, "BF16", "nf4", np.empty(100, np.uint8), np.empty(4, np.float32))
    assert (found.count, found.first) == (2, 70)


@pytest.fixture
def with_zeros(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model with a block of zeros, whose code is 0 with CUDA, and 7 on a CPU."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.view(-1)[:64] = 0
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_has_the_bytes_of_cuda_is_verified_on_a_cpu(with_zeros: Path, tmp_path: Path) -> None:
    """Exactly, and nothing is explained away; the record says whose bytes they are, and what computed them."""
    plan, output = plan_of(with_zeros, "nf4"), tmp_path / "out"
    origin = Source(str(with_zeros), None, None, "transformers", plan.architecture.class_name)
    settings = Settings(FourBit("nf4"), max_shard_bytes=DEFAULT_SHARD_BYTES)
    summary = carry_out(plan, origin, Target(output), settings, arithmetic=Cpu(bytes_of="cuda"))
    assert (summary.as_json()["device"], summary.as_json()["bytes_of"]) == ("cpu", "cuda")
    assert api.verify(output, with_zeros, device="auto").intact
    found = api.verify(output, with_zeros, device="cpu")
    assert found.intact
    assert found.as_json()["device"] == {"recorded": "cuda", "used": "cpu", "bytes_of": "cuda"}
    api.quantize(with_zeros, tmp_path / "on-cpu", method=FourBit("nf4"), device="cpu")
    name = "model.layers.0.mlp.up_proj.weight"
    raw = [load_file(folder / "model.safetensors")[name].view(-1) for folder in (output, tmp_path / "on-cpu")]
    assert (raw[0][:32].tolist(), raw[1][:32].tolist()) == ([0x00] * 32, [0x77] * 32)
    assert torch.equal(raw[0][32:], raw[1][32:])
    assert api.quantize(with_zeros, output, method=FourBit("nf4"), if_exists="skip").as_json()["up_to_date"]
    with pytest.raises(OutputRefused, match="device: cuda → cpu"):
        api.quantize(with_zeros, output, method=FourBit("nf4"), if_exists="skip", device="cpu")
    change(output, name, 8)
    found = api.verify(output, with_zeros, device="cpu")
    assert (found.intact, found.explained) == (False, False)


def test_the_cores_take_what_they_are_known_to_write_like_any_gpu(tiny_llama: Path) -> None:
    plan = plan_of(tiny_llama, "nf4")
    assert quantizing_tasks([plan]) == {("nf4", "BF16")}
    assert as_cuda({("nf4", "BF16")}, (12, 0)) == Cpu(bytes_of="cuda")
    for task in (("nf4", "F16"), ("fp4", "BF16"), ("fp4", "F16"), ("int8", "F16"), ("int8", "F32")):
        assert as_cuda({("nf4", "BF16"), task}, (12, 0)) is None
        assert as_cuda({("nf4", "BF16"), task}, (9, 0)) == Cpu(bytes_of="cuda")
    assert as_cuda({("nf4", "F32")}, (9, 0)) is None
    assert quantizing_tasks([plan_of(tiny_llama, "nf4-double")]) == set(), "its sums are those of the GPU"
    assert quantizing_tasks([replace(plan, method=None)]) == set()


@pytest.mark.parametrize(
    ("line", "built"),
    [
        ("cuda: Optional[str] = '13.0'", True),
        ("cuda = '12.8'", True),
        ("cuda: Optional[str] = None", False),
        ("hip: Optional[str] = '7.1'\ncuda: Optional[str] = None", False),
    ],
)
def test_whether_torch_is_built_for_cuda_is_read_from_its_version(
    line: str, built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text(f"__version__ = '2.13.0'\n{line}\n")
    monkeypatch.delitem(__import__("sys").modules, "torch")
    monkeypatch.syspath_prepend(tmp_path)
    assert gpu_driver._is_torch_built_for_cuda() is built
