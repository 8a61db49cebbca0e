"""llama.cpp's importance matrices: both formats, under transformers' names, and as good as qz's own statistics."""

from __future__ import annotations

import struct
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from converted import plan_of, quantized
from qz import MalformedInput, MissingInput, UsageError
from qz.formats.tensors.gguf_header import read_gguf_header
from qz.quantize.importance.imatrix import is_imatrix, read_imatrix
from qz.quantize.importance.statistics import InputSums, write_statistics
from qz.quantize.libraries.architecture import Saved, Weight
from qz.quantize.libraries.gguf_names import untouched
from qz.quantize.planning.membership import Membership
from qz.quantize.planning.plan import Step
from reference import differing_tensors
from zoo import build

Sums = dict[str, tuple[np.ndarray[Any, np.dtype[np.float32]], int]]
ARCHITECTURES = {
    "llama-untied": gguf.MODEL_ARCH.LLAMA,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "bert": gguf.MODEL_ARCH.BERT,
    "t5-encoder": gguf.MODEL_ARCH.T5ENCODER,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
}


def write_gguf(path: Path, sums: Sums) -> Path:
    """As llama-imatrix does: general.type, the chunks, and two tensors for each weight (imatrix.cpp, save_imatrix)."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (values, tokens) in sums.items():
        writer.add_tensor(f"{name}.in_sum2", np.atleast_2d(values))
        writer.add_tensor(f"{name}.counts", np.full((len(np.atleast_2d(values)), 1), tokens, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dat(path: Path, sums: Sums, chunks: int = 4) -> Path:
    """As llama-imatrix did before: means times the number of chunks, then the data set's name."""
    data = struct.pack("<i", len(sums))
    for name, (values, tokens) in sums.items():
        scaled = (values.reshape(-1) / tokens * chunks).astype("<f4")
        data += (
            struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", chunks, scaled.size) + scaled.tobytes()
        )
    path.write_bytes(data + struct.pack("<ii", chunks, 4) + b"text")
    return path


def test_names_of_one_architecture_leave_those_of_the_others_as_they_are() -> None:
    """The gguf package itself does not: asked for Arctic's names, it gives a Llama some of them from then on."""
    module = "model.layers.0.post_attention_layernorm"

    def of_llama() -> str | None:
        name: str | None = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1).get_name(module)
        return name

    assert of_llama() == "blk.0.ffn_norm"
    with untouched():
        for architecture in gguf.MODEL_ARCH:
            gguf.get_tensor_name_map(architecture, 1)
        assert of_llama() != "blk.0.ffn_norm", "gguf was mended: qz.quantize.libraries.gguf_names can go"
    assert of_llama() == "blk.0.ffn_norm"


def llama_cpp_names(source: Path, architecture: Any) -> dict[str, tuple[str, int]]:
    """Weight → llama.cpp's name and the number of inputs, by ``gguf``'s own map for the architecture."""
    with untouched():
        known = gguf.get_tensor_name_map(architecture, 2)
    found = {}
    for weight in plan_of(source, "nf4").quantized:
        names = (weight.name, *weight.sources)
        name = next(filter(None, (known.get_name(each, (".weight",)) for each in names)), None)
        if name is not None:
            found[weight.name] = name, weight.shape[1]
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imatrix") / "llama"
    torch.manual_seed(0)
    build("llama-untied").save_pretrained(folder)
    return folder


def uneven(inputs: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    values: np.ndarray[Any, np.dtype[np.float32]] = (
        10 ** np.random.default_rng(seed).uniform(-2, 2, inputs) * 2048
    ).astype(np.float32)
    return values


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_imatrix_is_as_good_as_the_same_sums_in_qzs_own_file(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    torch.manual_seed(0)
    build(name).save_pretrained(source)
    named = llama_cpp_names(source, ARCHITECTURES[name])
    unknown = [weight.name for weight in plan_of(source, "nf4").quantized if weight.name not in named]
    assert unknown == (["pooler.dense.weight"] if name == "bert" else [])
    sums = {theirs: (uneven(inputs, seed), 2048) for seed, (theirs, inputs) in enumerate(named.values())}
    own = {mine: InputSums(*sums[theirs]) for mine, (theirs, _) in named.items()}
    write_statistics(tmp_path / "own.safetensors", own, {})
    files = {
        "own": tmp_path / "own.safetensors",
        "gguf": write_gguf(tmp_path / "imatrix.gguf", sums),
        "dat": write_dat(tmp_path / "imatrix.dat", sums),
    }
    for kind, file in files.items():
        summary = quantized(source, tmp_path / kind, "nf4", scales="search", importance=file)
        assert summary.refinement["importance"]["missing"] == unknown
        assert summary.refinement["importance"]["file"] == file.name
    assert differing_tensors(tmp_path / "own", tmp_path / "gguf") == []
    statistics = read_imatrix(files["dat"], [s for s in plan_of(source, "nf4").steps if s.act == "quantize"])
    for mine, each in statistics.sums.items():
        assert np.allclose(each.sum2 / each.tokens, own[mine].sum2 / own[mine].tokens, rtol=1e-5)


def step_of(name: str, inputs: int = 8) -> Step:
    weight = Weight(name, (name,), "float32", (4, inputs), quantized=True)
    return Step(weight, (), (Saved(name, "U8", (16, 1), weight, 16, "weight"),), 0)


def test_each_expert_has_the_inputs_that_were_routed_to_it(tmp_path: Path) -> None:
    """llama.cpp keeps the experts of a layer in one tensor; one that no token reached has a count of 0."""
    values = np.arange(24, dtype=np.float32).reshape(3, 8)
    path = write_gguf(tmp_path / "i.gguf", {"blk.5.ffn_gate_exps.weight": (values, 7)})
    steps = [step_of(f"model.layers.5.mlp.experts.{n}.gate_proj.weight") for n in range(3)]
    found = read_imatrix(path, [*steps, step_of("model.layers.4.mlp.experts.0.gate_proj.weight")])
    assert [found.sums[step.weight.name].sum2.tolist() for step in steps] == values.tolist()
    assert len(found.sums) == 3
    old = read_imatrix(write_dat(tmp_path / "i.dat", {"blk.5.ffn_gate_exps.weight": (values, 7)}), steps)
    assert np.allclose(old.sums[steps[2].weight.name].sum2, values[2] / 7 * 4)


@pytest.mark.parametrize("prefix", ["model.language_model.layers", "language_model.model.layers", "layers"])
def test_names_of_models_inside_others_are_found(prefix: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "i.gguf", {"blk.3.ffn_down.weight": (np.ones(8, np.float32), 1)})
    assert len(read_imatrix(path, [step_of(f"{prefix}.3.mlp.down_proj.weight")]).sums) == 1


def test_another_models_imatrix_is_refused(llama: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"scales": "search", "importance": tmp_path / "i.gguf"}
    with pytest.raises(MissingInput):
        quantized(llama, tmp_path / "out", "nf4", **how)
    write_gguf(tmp_path / "i.gguf", {"blk.7.ffn_down.weight": (np.ones(128, np.float32), 1)})
    with pytest.raises(MalformedInput, match="none of the weights"):
        quantized(llama, tmp_path / "out", "nf4", **how)
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(MalformedInput, match="not an imatrix"):
        quantized(llama, tmp_path / "out", "nf4", **how)


def test_damaged_files_are_refused_wherever_they_end(tmp_path: Path) -> None:
    sums: Sums = {"blk.0.ffn_down.weight": (np.ones(8, np.float32), 3)}
    steps = [step_of("model.layers.0.mlp.down_proj.weight")]
    for path in (write_gguf(tmp_path / "i.gguf", sums), write_dat(tmp_path / "i.dat", sums)):
        assert is_imatrix(path)
        data = path.read_bytes()
        needed = len(data) - 31 if path.suffix == ".gguf" else len(data) - 13  # padding; the data set's name
        for length in range(4, needed):
            path.write_bytes(data[:length])
            with pytest.raises(MalformedInput):
                read_imatrix(path, steps)
    for values in (np.full(8, np.nan, np.float32), np.full(8, -1, np.float32)):
        for write, name in ((write_gguf, "i.gguf"), (write_dat, "i.dat")):
            with pytest.raises(MalformedInput, match="not sums of squares"):
                read_imatrix(write(tmp_path / name, {"blk.0.ffn_down.weight": (values, 3)}), steps)


def piece(data: bytes, offset: int, length: int) -> bytes:
    return data[offset : offset + length]


def test_counts_that_cannot_be_cost_neither_time_nor_memory() -> None:
    def header(*parts: bytes) -> bytes:
        return b"GGUF" + struct.pack("<I", 3) + b"".join(parts)

    huge = struct.pack("<Q", 1 << 60)
    one, key = struct.pack("<Q", 1), struct.pack("<Q", 1) + b"k"
    for data in (
        header(huge, one),
        header(one, huge),
        header(struct.pack("<Q", 0), one, huge),
        header(struct.pack("<Q", 0), one, key, struct.pack("<II", 9, 4), huge),
        header(struct.pack("<Q", 0), one, key, struct.pack("<I", 99)),
        header(struct.pack("<Q", 0), one, key, struct.pack("<II", 9, 9)),
    ):
        with pytest.raises(MalformedInput):
            read_gguf_header(partial(piece, data), len(data), "file")


@pytest.mark.parametrize(("kind", "element"), [(8, struct.pack("<Q", 2) + b"ab"), (11, struct.pack("<q", 10**12))])
def test_long_lists_of_metadata_are_passed_over(kind: int, element: bytes) -> None:
    count = 50_000
    entries = [
        struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, kind, count) + element * count,
        struct.pack("<Q", 1) + b"b" + struct.pack("<IQ", 8, 1) + b"x",
    ]
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)
    tracemalloc.start()
    header = read_gguf_header(partial(piece, data), len(data), "file")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (header.metadata, header.lengths) == ({"b": "x"}, {"a": count})
    assert [data[start:stop] for start, stop in header.kept] == entries[1:]
    assert most < 2 << 20


def test_a_pipeline_has_no_single_imatrix(tmp_path: Path) -> None:
    from qz.quantize.importance.matching import read_importance

    path = write_gguf(tmp_path / "i.gguf", {"blk.0.ffn_down.weight": (np.ones(8, np.float32), 3)})
    with pytest.raises(UsageError, match="--subfolder"):
        read_importance(path, [], Membership("transformer", whole_pipeline=True))
