"""What qz writes on a GPU is what the libraries write on that GPU; what it writes on the CPU differs as documented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converted import dequantized, quantized
from qz.quantize.compute import kernels, scale_search
from qz.quantize.compute.devices import arithmetic_on
from qz.quantize.compute.gpu.gpu_arithmetic import Accelerator
from qz.quantize.compute.gpu.torch_kernels import tensor
from reference import METHODS, bitsandbytes_arguments, differing_tensors, raw, tensors_of
from zoo import DIFFUSERS, TRANSFORMERS, build

ZOO = ["flux", "sd3", "unet", "wan", "qwen-image", "t5-encoder", "llama-untied", "llama-fp32", "llama-odd", "mixtral"]
ZOO += ["gpt2", "bert", "clip", "whisper"]
NAMED = ["flux", "sd3", "unet", "t5-encoder", "llama-untied"]
TINY_PIECE = 3000


def save(name: str, folder: Path) -> Any:
    model = build(name)
    model.save_pretrained(folder)
    return model


def library_model(model: Any, source: Path, method: str | None, dtype: str = "auto") -> Any:
    """The library's own ``from_pretrained`` on the GPU; ``method`` None loads what is quantized already."""
    if type(model).__module__.startswith("diffusers"):
        from diffusers import BitsAndBytesConfig

        load_dtype = model.dtype if dtype == "auto" else getattr(torch, dtype)
        config = {"quantization_config": BitsAndBytesConfig(**bitsandbytes_arguments(method))} if method else {}
        return type(model).from_pretrained(source, torch_dtype=load_dtype, **config)
    from transformers import BitsAndBytesConfig as TransformersConfig

    config = {"quantization_config": TransformersConfig(**bitsandbytes_arguments(method))} if method else {}
    return type(model).from_pretrained(source, dtype=dtype, device_map={"": 0}, **config)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ZOO)
def test_every_tensor_is_the_librarys_on_this_gpu(name: str, method: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = save(name, source)
    for dtype in ("auto", "float16"):
        theirs = library_model(model, source, method, dtype)
        theirs.save_pretrained(tmp_path / f"library-{dtype}")
        summary = quantized(source, tmp_path / f"qz-{dtype}", method, device="cuda", dtype=dtype)
        assert summary.device == "cuda"
        assert differing_tensors(tmp_path / f"library-{dtype}", tmp_path / f"qz-{dtype}") == []
        assert summary.footprint_after == theirs.get_memory_footprint()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMED)
def test_what_the_cpu_wrote_loads_here_and_differs_only_as_documented(name: str, method: str, tmp_path: Path) -> None:
    source, on_cpu, on_gpu = tmp_path / "source", tmp_path / "cpu", tmp_path / "gpu"
    model = save(name, source)
    summary = quantized(source, on_cpu, method, device="cpu")
    quantized(source, on_gpu, method, device="cuda")
    loaded = library_model(model, on_cpu, None)
    assert next(loaded.parameters()).device.type == "cuda"
    assert loaded.get_memory_footprint() == summary.footprint_after
    counts = counted_differences(tensors_of(on_cpu), tensors_of(on_gpu), method)
    print(f"\ncpu against gpu: {name} {method}: {counts}")
    other = library_model(model, on_gpu, None)
    assert loaded.state_dict().keys() == other.state_dict().keys()


def counted_differences(cpu: dict[str, torch.Tensor], gpu: dict[str, torch.Tensor], method: str) -> dict[str, int]:
    """Count what differs, and assert that it is of a known kind.

    4 bit: blocks of zeros (code 7 on the CPU; 0 with an absmax of 0 on CUDA), fp4's two zeros, and values that lie on
    the bound between two codes, which come out as neighbours. int8: ties, which come out as neighbours. Double
    quantization: the offset's last bit, which shows in some codes of absmax.
    """
    assert cpu.keys() == gpu.keys()
    kinds = ("zero blocks", "signs of zero", "neighbours", "statistics")
    counts = {"tensors": len(cpu), "values": 0, **dict.fromkeys(kinds, 0)}
    for name, here in cpu.items():
        there = gpu[name]
        if f"{name}.quant_map" in cpu:
            ours, theirs = (torch.stack([t.view(-1) >> 4, t.view(-1) & 15], 1).view(-1) for t in (here, there))
            counts["values"] += ours.numel()
            code = cpu[f"{name}.quant_map"]
            rank = torch.unique(code, return_inverse=True)[1]  # the two zeros of fp4 are one
            blocks = torch.arange(ours.numel()) // 64
            zeros = ((ours == 7) & (theirs == 0)) if method != "fp4" else torch.zeros(ours.numel(), dtype=torch.bool)
            whole = torch.zeros(int(blocks[-1]) + 1, dtype=torch.long).index_add_(0, blocks, zeros.long()) == 64
            zeros &= whole[blocks]
            differs = (ours != theirs) & ~zeros
            distance = (rank[ours[differs].long()] - rank[theirs[differs].long()]).abs()
            assert distance.numel() == 0 or int(distance.max()) <= 1, name
            counts["zero blocks"] += int(whole.sum())
            counts["signs of zero"] += int((distance == 0).sum())
            counts["neighbours"] += int((distance == 1).sum())
        elif method == "int8" and f"{name.removesuffix('weight')}SCB" in cpu:
            distance = (here.short() - there.short()).abs()
            assert distance.max() <= 1
            counts["values"] += here.numel()
            counts["neighbours"] += int(distance.sum())
        elif method == "nf4-double" and name.endswith((".absmax", ".nested_absmax", ".quant_state.bitsandbytes__nf4")):
            if name.endswith(".absmax") and here.dtype == torch.uint8:
                counts["statistics"] += int((here != there).sum())
        else:
            assert raw(here) == raw(there), name
    return {key: value for key, value in counts.items() if value or key in ("tensors", "values")}


def values(dtype: str, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed).standard_normal(count).astype(np.float32) * 0.05
    random[:64] = 0
    if dtype == "F32":
        return random
    return (
        torch.from_numpy(random)
        .to(torch.bfloat16 if dtype == "BF16" else torch.float16)
        .view(torch.int16)
        .numpy()
        .view(np.uint16)
    )


@pytest.fixture(scope="module")
def gpu() -> Accelerator:
    found = arithmetic_on("cuda:0")
    assert isinstance(found, Accelerator)
    return found


@pytest.fixture(params=[0, TINY_PIECE], ids=["whole", "tiny pieces"])
def pieces(request: pytest.FixtureRequest, gpu: Accelerator) -> Any:
    gpu._piece_bytes = request.param or gpu.chunk_bytes
    yield gpu
    gpu._piece_bytes = gpu.chunk_bytes


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("count", [64 * 5000, 64 * 700 + 33, 64 * 3 + 1, 2])
def test_four_bit_pieces_are_the_whole(pieces: Accelerator, dtype: str, quant_type: Any, count: int) -> None:
    import bitsandbytes.functional as functional

    given = values(dtype, count)
    packed, absmax = pieces.buffer(-(-count // 2)), np.empty(-(-count // 64), np.float32)
    assert pieces.quantize_4bit(given, dtype, quant_type, packed, absmax).count == 0
    expected, state = functional.quantize_4bit(tensor(given, dtype).cuda(), quant_type=quant_type)
    assert packed.tobytes() == raw(expected.cpu())
    assert absmax.tobytes() == raw(state.absmax.cpu())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_int8_pieces_are_the_whole(pieces: Accelerator, dtype: str) -> None:
    import bitsandbytes as bnb

    given = values(dtype, 300 * 129).reshape(300, 129)
    codes, scb = np.empty((300, 129), np.int8), np.empty(300, np.float32)
    assert pieces.quantize_int8(given, dtype, codes, scb).count == 0
    expected = bnb.nn.Int8Params(tensor(given.reshape(-1), dtype).view(300, 129), requires_grad=False).to("cuda")
    assert codes.tobytes() == raw(expected.data.cpu())
    assert scb.tobytes() == raw(expected.SCB.cpu())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("count", [64 * 700, 64 * 700 + 33, 1])
def test_dequantized_pieces_are_the_whole_and_the_cpus(pieces: Accelerator, dtype: str, count: int) -> None:
    random = np.random.default_rng(2)
    packed = random.integers(0, 256, -(-count // 2), np.uint8)
    absmax = np.abs(random.standard_normal(-(-count // 64), np.float32))
    whole = torch.ops.bitsandbytes.dequantize_4bit
    for quant_type in ("nf4", "fp4"):
        here, there = (np.empty(count, values(dtype, 1).dtype) for _ in range(2))
        pieces.dequantize_4bit(packed, absmax, quant_type, 64, dtype, here)
        given = torch.from_numpy(packed).cuda(), torch.from_numpy(absmax).cuda()
        assert here.tobytes() == raw(whole(*given, 64, quant_type, [count], tensor(here, dtype).dtype).cpu())
        kernels.dequantize_4bit(packed, absmax, quant_type, 64, dtype, there)
        assert torch.equal(tensor(here, dtype), tensor(there, dtype))  # but for the sign of fp4's zeros
    codes = random.integers(-127, 128, (count % 64 + 3, 65), np.int8)
    scb = np.abs(random.standard_normal(len(codes), np.float32)) * 9
    here, there = (np.empty(codes.shape, values(dtype, 1).dtype) for _ in range(2))
    pieces.dequantize_int8(codes, scb, dtype, here)
    kernels.dequantize_int8(codes, scb, dtype, there)
    assert here.tobytes() == there.tobytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMED)
def test_dequantize_here_writes_the_values_that_the_cpu_writes(name: str, method: str, tmp_path: Path) -> None:
    save(name, tmp_path / "source")
    quantized(tmp_path / "source", tmp_path / "quantized", method, device="cuda")
    for device in ("cuda", "cpu"):
        summary = dequantized(tmp_path / "quantized", tmp_path / device, device=device)
        assert summary.device == device
    here, there = tensors_of(tmp_path / "cuda"), tensors_of(tmp_path / "cpu")
    assert here.keys() == there.keys()
    assert all(torch.equal(tensor, there[key]) for key, tensor in here.items())
    if method != "fp4":  # its zeros have a sign on one side
        assert differing_tensors(tmp_path / "cuda", tmp_path / "cpu") == []


@pytest.mark.parametrize("blocks", [1, 257, 40_000, 1_000_000])
def test_double_quantization_is_the_whole_tensors(gpu: Accelerator, blocks: int) -> None:
    import bitsandbytes.functional as functional

    given = values("BF16", blocks * 64)
    packed, absmax = np.empty(blocks * 32, np.uint8), np.empty(blocks, np.float32)
    gpu.quantize_4bit(given, "BF16", "nf4", packed, absmax)
    codes, nested, offset = gpu.quantize_absmax(absmax)
    _, state = functional.quantize_4bit(tensor(given, "BF16").cuda(), quant_type="nf4", compress_statistics=True)
    assert codes.tobytes() == raw(state.absmax.cpu())
    assert nested.tobytes() == raw(state.state2.absmax.cpu())
    assert offset == state.offset.item()


@pytest.mark.parametrize(
    ("source", "target"), [(a, b) for a in ("F32", "F16", "BF16") for b in ("F32", "F16", "BF16") if a != b]
)
def test_casts_are_torchs_for_every_16_bit_pattern(pieces: Accelerator, source: str, target: str) -> None:
    if source == "F32":
        given = np.random.default_rng(1).integers(0, 2**32, 200_000, np.uint64).astype(np.uint32).view(np.float32)
    else:
        given = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    out, expected = (np.empty(given.size, np.float32 if target == "F32" else np.uint16) for _ in range(2))
    pieces.cast(given, source, target, out)
    kernels.cast(given, source, target, expected)
    assert out.tobytes() == expected.tobytes()
    finite = np.isfinite(tensor(given, source).float().numpy())
    pieces.cast(given[finite], source, target, out[: finite.sum()])
    assert out[: finite.sum()].tobytes() == expected[finite].tobytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_values_that_are_not_finite_are_counted(pieces: Accelerator, dtype: str, bad: float) -> None:
    for where in (0, 63, 4000, 6399):
        given = values(dtype, 6400).copy()
        one = tensor(given, dtype)
        one[where] = bad
        one[6399] = bad
        packed, absmax = np.empty(3200, np.uint8), np.empty(100, np.float32)
        found = pieces.quantize_4bit(given, dtype, "nf4", packed, absmax)
        assert (found.count, found.first) == (1 if where == 6399 else 2, where)
        codes, scb = np.empty((64, 100), np.int8), np.empty(64, np.float32)
        assert pieces.quantize_int8(given.reshape(64, 100), dtype, codes, scb) == found
        for weights in (None, scale_search.tiled_weights(np.ones(64, np.float32))):
            assert pieces.search_4bit(given, dtype, "nf4", weights, 0, packed, absmax) == found


def test_two_runs_on_all_gpus_and_any_threads_write_the_same_bytes(tmp_path: Path) -> None:
    save("flux", tmp_path / "source")
    for number, (device, threads) in enumerate([("cuda", 0), ("cuda:0", 1), ("auto", 16)]):
        quantized(tmp_path / "source", tmp_path / f"{number}", "nf4-double", device=device, threads=threads)
    assert differing_tensors(tmp_path / "0", tmp_path / "1") == []
    assert differing_tensors(tmp_path / "0", tmp_path / "2") == []


def test_the_zoo_knows_the_models_of_this_file() -> None:
    assert set(ZOO) <= set(TRANSFORMERS) | set(DIFFUSERS)
