"""The way back: what qz dequantize writes is what bitsandbytes' own functions give, as an ordinary checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from conftest import Qz
from converted import dequantized, quantized
from covering import in_turn
from forward import output_of
from qz import MalformedInput, Unsupported
from qz.quantize.compute import kernels
from qz.quantize.reports.summary import Summary
from reference import (
    METHODS,
    config_of,
    dequantized_by_bitsandbytes,
    diffusers_model,
    raw,
    tensors_of,
)
from zoo import DIFFUSERS, ODD, TRANSFORMERS, Saved, build, llama

PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")


@pytest.fixture
def qz(forked_qz: Qz) -> Qz:
    return forked_qz


def is_part(name: str) -> bool:
    return name.endswith(PARTS) or ".quant_state." in name


def same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


@pytest.fixture
def model(request: pytest.FixtureRequest, models: Callable[[str], Saved]) -> Saved:
    return models(request.param)


@pytest.fixture(scope="module")
def llama_nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer llama with rows that are no multiple of the block size. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("llama")
    build("llama-odd").save_pretrained(folder / "source")
    quantized(folder / "source", folder / "nf4", "nf4")
    return folder / "nf4"


def library_dequantized(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The library's own way: load the quantized folder, dequantize the model.

    diffusers' ``dequantize`` moves the model to a GPU first, whether there is one or not; this is what it does then.
    """
    if hasattr(model_class, "register_to_config"):
        from diffusers.quantizers.bitsandbytes.utils import dequantize_and_replace

        model = diffusers_model(model_class, folder, None, dtype)
        quantizer = model.hf_quantizer
        return dequantize_and_replace(model, quantizer.modules_to_not_convert, quantizer.quantization_config)
    return model_class.from_pretrained(folder, device_map="cpu").dequantize(dtype=dtype)


# Values, names, config, loading


@dataclass(frozen=True)
class Back:
    """A model of the zoo, quantized and dequantized again."""

    packed: Path
    output: Path
    summary: Summary


@pytest.fixture(scope="module")
def backs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Back]:
    @cache
    def made(source: Path, method: str) -> Back:
        folder = tmp_path_factory.mktemp("back")
        quantized(source, folder / "packed", method)
        return Back(folder / "packed", folder / "output", dequantized(folder / "packed", folder / "output"))

    return made


@pytest.fixture
def back(model: Saved, backs: Callable[[Path, str], Back]) -> Callable[[str], Back]:
    return partial(backs, model[2])


@pytest.mark.parametrize(
    ("model", "method"),
    in_turn([*TRANSFORMERS, *DIFFUSERS], METHODS),
    indirect=["model"],
)
def test_every_value_is_bitsandbytes_own(model: Saved, back: Callable[[str], Back], method: str) -> None:
    _, _, source = model
    found = back(method)
    stored, original, written = tensors_of(found.packed), tensors_of(source), tensors_of(found.output)
    assert written.keys() == original.keys()
    expected = dequantized_by_bitsandbytes(stored)
    assert expected
    for name, tensor in written.items():
        if name in expected:
            theirs = expected[name].to(original[name].dtype)
            assert same(tensor, theirs.T if source.name == "gpt2" else theirs), name
        else:
            assert same(tensor, stored[name]), name
    assert found.summary.quantized_tensors == len(expected)
    assert config_of(found.output) == config_of(source)


@pytest.mark.parametrize(("model", "method"), in_turn([*TRANSFORMERS, *DIFFUSERS], METHODS), indirect=["model"])
def test_the_result_loads_and_computes_like_the_dequantized_model(
    model: Saved, back: Callable[[str], Back], method: str
) -> None:
    model_class, dtype, source = model
    found = back(method)
    how = {"torch_dtype": dtype} if source.name in DIFFUSERS else {}  # transformers reads it from the config
    loaded, info = model_class.from_pretrained(found.output, output_loading_info=True, **how)
    assert not any(info.values())
    assert loaded.get_memory_footprint() == found.summary.footprint_after
    if source.name == "gpt2" or source.name in ODD:  # where the library is wrong, see below
        return
    theirs = library_dequantized(model_class, found.packed, dtype)
    assert torch.equal(output_of(loaded.eval()), output_of(theirs.eval()))


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_gpt2_runs_although_the_librarys_own_dequantized_model_does_not(method: str, tmp_path: Path) -> None:
    gpt2 = build("gpt2")
    gpt2.save_pretrained(tmp_path / "source")
    quantized(tmp_path / "source", tmp_path / "packed", method)
    dequantized(tmp_path / "packed", tmp_path / "output")
    ours = type(gpt2).from_pretrained(tmp_path / "output")
    reference = dequantized_by_bitsandbytes(tensors_of(tmp_path / "packed"))
    gpt2.load_state_dict({name: weight.T for name, weight in reference.items()}, strict=False)
    assert torch.equal(output_of(ours), output_of(gpt2))
    square = "transformer.h.0.attn.c_proj.weight"  # stays turned in the library, without an error
    assert tensors_of(tmp_path / "output")[square].shape == reference[square].shape

    theirs = library_dequantized(type(gpt2), tmp_path / "packed", torch.float32)
    assert not torch.equal(theirs.state_dict()[square], ours.state_dict()[square])


@pytest.mark.parametrize(("name", "method"), in_turn(["llama-tied", "gpt2", "sd3", "wan"], ["nf4-double", "int8"]))
def test_a_dtype_holds_throughout_and_is_cast_from_the_dequantized_values(
    name: str, method: str, tmp_path: Path
) -> None:
    built = build(name)
    built.save_pretrained(tmp_path / "source")
    quantized(tmp_path / "source", tmp_path / "packed", method)
    expected = dequantized_by_bitsandbytes(tensors_of(tmp_path / "packed"))
    original = tensors_of(tmp_path / "source")
    fp32 = ("time_embedder", "scale_shift_table", "norm2") if name == "wan" else ()  # kept so by its class
    for dtype in ("float16", "bfloat16", "float32"):
        dequantized(tmp_path / "packed", tmp_path / dtype, dtype=dtype)
        for key, tensor in tensors_of(tmp_path / dtype).items():
            kept = any(part in key for part in fp32)
            target = torch.float32 if kept else getattr(torch, dtype)
            source = expected.get(key, original[key])
            assert same(tensor, (source.T if name == "gpt2" and key in expected else source).to(target)), key
        if name in TRANSFORMERS:
            assert config_of(tmp_path / dtype)["dtype"] == dtype


@pytest.mark.parametrize("blocksize", [32, 128, 512, 4096])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_any_block_size_and_storage(llama_nf4: Path, blocksize: int, storage: torch.dtype, tmp_path: Path) -> None:
    """As QLoRA on FSDP saves it, and what bitsandbytes can do beyond what the libraries' configs offer."""
    source = tensors_of(llama_nf4.parent / "source")
    state: dict[str, torch.Tensor] = {}
    for name, tensor in source.items():
        if not name.endswith("_proj.weight"):
            state[name] = tensor
            continue
        double = ".0." in name
        packed, found = bnb.functional.quantize_4bit(
            tensor, blocksize=blocksize, compress_statistics=double, quant_type="nf4", quant_storage=storage
        )
        state[name] = packed
        state |= {f"{name}.{key}": part for key, part in found.as_dict(packed=True).items()}
    folder = copied(llama_nf4, tmp_path)
    config = config_of(folder)
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}  # as sparse as can be
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    dequantized(folder, tmp_path / "output")
    written = tensors_of(tmp_path / "output")
    assert written.keys() == source.keys()
    for name, weight in dequantized_by_bitsandbytes(state).items():
        assert same(written[name], weight), name


def test_rows_that_are_no_multiple_of_a_block_get_their_own_scales(tmp_path: Path) -> None:
    """bitsandbytes 0.50.2 takes others on CPUs with AVX-512; the error shows it."""
    llama(tied=False, inner=96).save_pretrained(tmp_path / "source")
    quantized(tmp_path / "source", tmp_path / "packed", "nf4")
    dequantized(tmp_path / "packed", tmp_path / "output")
    name = "model.layers.0.mlp.down_proj.weight"
    original, weight = tensors_of(tmp_path / "source")[name].float(), tensors_of(tmp_path / "output")[name].float()
    assert weight.shape[1] == 96
    assert (weight - original).norm() / original.norm() < 0.11


PIECES = [*((method, 4096) for method in METHODS), ("nf4-double", 64), ("int8", 64)]
"""Bytes of a chunk: some blocks or rows, and less than one."""


@pytest.mark.parametrize(("method", "chunk"), PIECES)
def test_bytes_depend_neither_on_threads_nor_on_chunks(
    method: str, chunk: int, tiny_llama: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    quantized(tiny_llama, packed, method)
    dequantized(packed, tmp_path / "one", threads=1)
    dequantized(packed, tmp_path / "two", chunk_bytes=chunk, threads=3)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_shards_and_their_index_are_the_librarys(tmp_path: Path) -> None:
    built = build("llama-untied")
    built.save_pretrained(tmp_path / "source")
    quantized(tmp_path / "source", tmp_path / "packed", "nf4", max_shard_bytes=30_000)
    dequantized(tmp_path / "packed", tmp_path / "output", max_shard_bytes=100_000)
    type(built).from_pretrained(tmp_path / "output").save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    for file in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "output" / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(list((tmp_path / "output").glob("*.safetensors"))) > 1


def test_a_model_whose_experts_an_older_version_quantized_comes_back_too(tmp_path: Path) -> None:
    """transformers 4 had experts as linears, and prequantized repositories from then have them as 4 bit."""
    mixtral = build("mixtral")
    mixtral.save_pretrained(tmp_path / "source")
    quantized(tmp_path / "source", tmp_path / "packed", "nf4")
    state = tensors_of(tmp_path / "packed")
    for name in [name for name in state if ".experts." in name]:
        packed, found = bnb.functional.quantize_4bit(state[name], quant_type="nf4")
        state[name] = packed
        state |= {f"{name}.{key}": part for key, part in found.as_dict(packed=True).items()}
    save_file(state, tmp_path / "packed/model.safetensors")
    dequantized(tmp_path / "packed", tmp_path / "output")
    written = tensors_of(tmp_path / "output")
    expected = dequantized_by_bitsandbytes(state)
    assert any(".experts." in name for name in expected)
    for name, weight in expected.items():
        assert same(written[name], weight), name
    type(mixtral).from_pretrained(tmp_path / "output")


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("clip", lambda name: f"text_model.{name}".replace("text_model.text_model.", "")),
        ("bert", lambda name: "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma")),
        ("vit", lambda name: f"vit.{name}"),
    ],
    ids=["clip", "bert", "vit"],
)
def test_a_checkpoint_under_older_names_loads_afterwards(name: str, old: Callable[[str], str], tmp_path: Path) -> None:
    built = build(name)
    built.save_pretrained(tmp_path / "source")
    quantized(tmp_path / "source", tmp_path / "packed", "nf4")
    state = tensors_of(tmp_path / "packed")
    positions = {"embeddings.position_ids": torch.arange(9)}  # older still, and left out
    save_file({old(key): value for key, value in state.items()} | positions, tmp_path / "packed/model.safetensors")
    dequantized(tmp_path / "packed", tmp_path / "output")
    _, info = type(built).from_pretrained(tmp_path / "output", output_loading_info=True)
    assert not any(info.values())
    written = tensors_of(tmp_path / "output")
    for key, weight in dequantized_by_bitsandbytes(state).items():
        assert same(written.get(key, written.get(old(key))), weight.to(built.dtype)), key


@pytest.mark.parametrize(
    "said",
    [
        None,
        {"load_in_4bit": True},
        {"_load_in_4bit": True, "_load_in_8bit": False, "quant_method": "bitsandbytes"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ],
    ids=["nothing", "the least", "as unsloth", "something else"],
)
def test_the_tensors_count_and_not_what_the_config_says_of_them(said: Any, llama_nf4: Path, tmp_path: Path) -> None:
    folder = copied(llama_nf4, tmp_path)
    config = {key: value for key, value in config_of(folder).items() if key != "quantization_config"}
    if said is not None:
        config["quantization_config"] = said
    (folder / "config.json").write_text(json.dumps(config))
    dequantized(folder, tmp_path / "output")
    dequantized(llama_nf4, tmp_path / "expected")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "output" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


# Idempotence


@pytest.mark.parametrize("method", METHODS)
def test_quantizing_again_gives_the_same_codes(method: str, tmp_path: Path) -> None:
    """All bytes of nf4 and int8. fp4 has two zeros, and writes one; double quantization moves absmax a little."""
    build("llama-untied").save_pretrained(tmp_path / "source")
    first, second = tmp_path / "first", tmp_path / "second"
    quantized(tmp_path / "source", first, method)
    dequantized(first, tmp_path / "plain")
    quantized(tmp_path / "plain", second, method)
    if method in ("nf4", "int8"):
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
        return
    before, after = tensors_of(first), tensors_of(second)
    for name, tensor in before.items():
        if not is_part(name):
            again = after[name]
            assert same(one_zero(tensor), one_zero(again)) if method == "fp4" else same(tensor, again), name


def one_zero(packed: torch.Tensor) -> torch.Tensor:
    """fp4 codes with the second zero, 8, written as the first."""
    if packed.dtype != torch.uint8:
        return packed
    high, low = packed >> 4, packed & 15
    return torch.where(high == 8, 0, high) << 4 | torch.where(low == 8, 0, low)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from(["BF16", "F32"]).flatmap(lambda dtype: st.tuples(st.just(dtype), st.floats(-60, 60)))
    | st.tuples(st.just("F16"), st.floats(-8, 12)),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    count=st.integers(1, 400),
)
def test_a_round_trip_settles_after_one_turn(seed: int, scale: tuple[str, float], quant_type: Any, count: int) -> None:
    """quantize(dequantize(q)) = q in 4 bit, for every scale whose absmax is a normal number above 1e-38.

    Below that, bitsandbytes divides by 1e-38 instead, so that the largest code of a block, and with it absmax, is lost.
    fp4 settles in the first turn, which makes one zero of two. float16 has few bits for values near 6e-8.
    """
    dtype, exponent = scale
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32) * np.float32(2.0**exponent)
    bits: Any = values
    if dtype != "F32":
        bits = values.astype(np.float16).view(np.uint16) if dtype == "F16" else (values.view(np.uint32) >> 16)
        bits = bits.astype(np.uint16)
    packed, absmax = round_trip(bits, dtype, quant_type)
    back = np.empty_like(bits)
    kernels.dequantize_4bit(packed, absmax, quant_type, 64, dtype, back)
    again, scales = round_trip(back, dtype, quant_type)
    assert np.array_equal(scales, absmax)
    first, second = (one_zero(torch.from_numpy(each)) if quant_type == "fp4" else each for each in (packed, again))
    assert np.array_equal(first, second)
    if quant_type == "fp4":
        kernels.dequantize_4bit(again, scales, quant_type, 64, dtype, back)
        assert np.array_equal(round_trip(back, dtype, quant_type)[0], again)


def round_trip(bits: Any, dtype: str, quant_type: Any) -> tuple[Any, Any]:
    packed, absmax = np.empty(-(-bits.size // 2), np.uint8), np.empty(-(-bits.size // 64), np.float32)
    kernels.quantize_4bit(bits, dtype, quant_type, packed, absmax)
    return packed, absmax


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-7, 12),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    columns=st.integers(1, 200),
)
def test_int8_codes_survive_a_round_trip_in_every_dtype(seed: int, exponent: float, dtype: str, columns: int) -> None:
    """Where a row's largest value is a normal float16; below, float16 itself loses the codes."""
    values = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    values[:, 0] = 2.0**exponent
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    kind = np.float32 if dtype == "F32" else np.uint16
    bits = values.to(torch_dtype).view(torch.float32 if dtype == "F32" else torch.uint16).numpy()
    codes, again = np.empty((3, columns), np.int8), np.empty((3, columns), np.int8)
    scb, back = np.empty(3, np.float32), np.empty((3, columns), kind)
    kernels.quantize_int8(bits, dtype, codes, scb)
    kernels.dequantize_int8(codes, scb, dtype, back)
    kernels.quantize_int8(back, dtype, again, scb)
    assert np.array_equal(codes, again)


# What cannot be dequantized


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("qz.json")))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = tensors_of(folder)
    change(state)
    save_file(state, folder / "model.safetensors")


def drop(state: dict[str, torch.Tensor], *names: str) -> None:
    for name in names:
        del state[name]


def test_a_plain_checkpoint_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="is not quantized: there is nothing to dequantize"):
        dequantized(tiny_llama, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_config_that_promises_what_is_not_there_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copied(tiny_llama, tmp_path)
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "quantization_config": said}))
    with pytest.raises(MalformedInput, match="quantized with bitsandbytes, but none of its weights is"):
        dequantized(folder, tmp_path / "output")


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state"])
def test_a_missing_companion_is_named(tiny_llama: Path, part: str, tmp_path: Path) -> None:
    quantized(tiny_llama, tmp_path / "packed", "nf4-double")
    weight = "model.layers.1.mlp.up_proj.weight"
    gone = f"{weight}.quant_state.bitsandbytes__nf4" if part == "quant_state" else f"{weight}.{part}"
    edit(tmp_path / "packed", lambda state: drop(state, gone))
    with pytest.raises(MalformedInput, match=rf"{weight}.* has no {part}"):
        dequantized(tmp_path / "packed", tmp_path / "output")


@pytest.mark.parametrize("named", [True, False], ids=["with its config", "without a config"])
def test_int8_codes_without_scales_do_not_pass_as_weights(tiny_llama: Path, named: bool, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    quantized(tiny_llama, folder, "int8")
    edit(folder, lambda state: drop(state, "model.layers.0.mlp.up_proj.SCB"))
    if not named:
        config = config_of(folder)
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MalformedInput, match=r"model\.layers\.0\.mlp\.up_proj"):
        dequantized(folder, tmp_path / "output")


def test_packed_codes_of_which_all_companions_are_lost_are_refused(llama_nf4: Path, tmp_path: Path) -> None:
    folder = copied(llama_nf4, tmp_path)
    weight = "model.layers.0.self_attn.q_proj.weight"

    edit(folder, lambda state: drop(state, *[name for name in state if name.startswith(f"{weight}.")]))
    with pytest.raises(MalformedInput, match=weight):
        dequantized(folder, tmp_path / "output")


def test_a_half_quantized_model_keeps_what_is_plain_and_dequantizes_the_rest(llama_nf4: Path, tmp_path: Path) -> None:
    folder = copied(llama_nf4, tmp_path)
    weight = "model.layers.0.self_attn.q_proj.weight"
    original = tensors_of(llama_nf4.parent / "source")

    def restore(state: dict[str, torch.Tensor]) -> None:
        drop(state, *[name for name in state if name.startswith(f"{weight}.")])
        state[weight] = original[weight]

    edit(folder, restore)
    dequantized(folder, tmp_path / "output")
    assert same(tensors_of(tmp_path / "output")[weight], original[weight])


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_another_methods_checkpoint_is_refused_by_name(method: str, llama_nf4: Path, tmp_path: Path) -> None:
    folder = copied(llama_nf4, tmp_path)
    said = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "quantization_config": said}))
    with pytest.raises(Unsupported, match=f"quantized with '?{method}'?, not with bitsandbytes"):
        dequantized(folder, tmp_path / "output")


# The command


def test_the_command_writes_what_it_says(qz: Qz, llama_nf4: Path, tmp_path: Path) -> None:
    done = qz("dequantize", llama_nf4, "--dtype", "float32", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["output"] == "nf4-float32"
    assert (report["act"], report["method"], report["dtype"], report["loss"]) == ("dequantize", "nf4", "float32", None)
    assert report["tensors"]["quantized"] == 14
    written = [path for path in (tmp_path / "nf4-float32").iterdir() if path.name != "qz.json"]
    assert report["bytes"]["output"] == sum(path.stat().st_size for path in written)
    assert "quantization_config" not in config_of(tmp_path / "nf4-float32")
    # What is there is not overwritten, and nothing else was left.
    assert qz("dequantize", llama_nf4, "--dtype", "float32").returncode == 73
    assert {path.name for path in tmp_path.iterdir()} == {"nf4-float32"}


def test_the_command_says_why_not(qz: Qz, tiny_llama: Path) -> None:
    done = qz("dequantize", tiny_llama)
    assert done.returncode == 78
    assert "there is nothing to dequantize" in done.stderr
    assert "Traceback" not in done.stderr
