"""GGUF files as sources: the values are those that transformers gives them, whatever they are stored as."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from converted import dequantized as dequantized_model
from qz import MalformedInput, MissingInput, Unsupported
from qz.api import inspect, quantize
from qz.formats.checkpoint.gguf import TYPES
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.formats.tensors import gguf_header
from qz.formats.tensors.encodings import Blocks
from qz.quantize.compute import kernels
from qz.quantize.decoding.blocks import dequantized
from qz.quantize.inspection.report import Inspection
from qz.quantize.libraries.gguf_names import untouched
from qz.quantize.libraries.plain import plain_checkpoint
from qz.quantize.methods import FourBit
from reference import differing_tensors, tensors_of, transformers_model

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
"""Those that the gguf package makes."""
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the float16 scales of a block lie; all other bytes may be any."""
HIDDEN, INNER, HEADS, GROUPS, VOCABULARY, EXPERTS = 256, 512, 8, 2, 64, 4


def stored(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Values of a matrix in ggml's type: quantized by the gguf package, or any blocks of it."""
    if kind not in SCALES:
        quantized: np.ndarray[Any, Any] = gguf.quants.quantize(values, Type[kind])
        return quantized
    _, count, width = TYPES[Type[kind].value]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (values.size // count, width), dtype=np.uint8)
    for place in SCALES[kind]:
        scales = random.uniform(-0.01, 0.01, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(values.shape[0], -1)


def write_llama(
    file: Path,
    kind: str,
    architecture: str = "llama",
    tied: bool = False,
    experts: int = 0,
    tensors_in_file: int = 0,
    layers: int = 2,
) -> Path:
    """A Llama with matrices of ``kind``, as llama.cpp writes it, in several files if it is told to."""
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(file, architecture, split_max_tensors=tensors_in_file)
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(VOCABULARY)])
    sizes = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (HIDDEN // HEADS * GROUPS, HIDDEN),
        "attn_v": (HIDDEN // HEADS * GROUPS, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"blk.{layer}.{name}.weight": shape for layer in range(layers) for name, shape in sizes.items()
    }
    norms = [f"blk.{layer}.{name}_norm.weight" for layer in range(layers) for name in ("attn", "ffn")]
    shapes |= {"token_embd.weight": (VOCABULARY, HIDDEN)} | ({} if tied else {"output.weight": (VOCABULARY, HIDDEN)})
    if architecture == "qwen2":
        shapes |= {
            f"blk.{layer}.attn_{name}.bias": (sizes[f"attn_{name}"][0],) for layer in range(layers) for name in "qkv"
        }
    if architecture == "gemma2":
        norms += [f"blk.{layer}.post_{name}_norm.weight" for layer in range(layers) for name in ("attention", "ffw")]
        writer.add_key_length(HIDDEN // HEADS)
    if architecture in ("qwen2moe", "qwen3moe"):
        for layer in range(layers):
            block = f"blk.{layer}."
            for name in ("gate", "up", "down"):
                shape = shapes.pop(f"{block}ffn_{name}.weight")
                shapes[f"{block}ffn_{name}_exps.weight"] = (EXPERTS, *shape)
                if architecture == "qwen2moe":
                    shapes[f"{block}ffn_{name}_shexp.weight"] = shape
            shapes[f"{block}ffn_gate_inp.weight"] = (EXPERTS, HIDDEN)
            if architecture == "qwen2moe":
                shapes |= {f"{block}attn_{name}.bias": (sizes[f"attn_{name}"][0],) for name in "qkv"}
                shapes[f"{block}ffn_gate_inp_shexp.weight"] = (HIDDEN,)
            else:
                shapes |= {f"{block}attn_{name}_norm.weight": (HIDDEN // HEADS,) for name in "qk"}
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(INNER)
        writer.add_expert_shared_feed_forward_length(INNER)
        writer.add_key_length(HIDDEN // HEADS)
    for name, shape in (shapes | dict.fromkeys([*norms, "output_norm.weight"], (HIDDEN,))).items():
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1 or kind == "F32":
            writer.add_tensor(name, values)
        elif kind == "F16":
            writer.add_tensor(name, values.astype(np.float16))
        else:
            rows = stored(values.reshape(-1, shape[-1]), kind)
            writer.add_tensor(name, rows.reshape(*shape[:-1], -1), raw_dtype=Type[kind])
    if experts:
        writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((experts, INNER, HIDDEN), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
    return file


def theirs(file: Path, dtype: Any, **config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **config)


@pytest.mark.parametrize("kind", [name for name, _, _ in TYPES.values()])
def test_blocks_of_any_bytes_have_the_values_of_the_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, values, width = TYPES[Type[kind].value]
    rows = np.random.default_rng(2).integers(0, 256, (77, width), dtype=np.uint8)
    blocks = Blocks(Type[kind].value, values, width)
    with np.errstate(all="ignore"):  # some of the scales are infinite
        wanted = gguf.dequantize(rows, Type[kind]).reshape(-1)
        ours = dequantized(rows.reshape(-1), blocks)
        monkeypatch.setattr(kernels, "dequantize_blocks", lambda *_: False)
        uncompiled = dequantized(rows.reshape(-1), blocks)
    for found in (ours, uncompiled):
        assert np.array_equal(np.isnan(wanted), np.isnan(found))
        assert np.array_equal(wanted.view(np.uint32)[~np.isnan(wanted)], found.view(np.uint32)[~np.isnan(found)])


@pytest.mark.parametrize(("architecture", "kind"), [("qwen3moe", "Q4_K"), ("qwen2moe", "Q8_0")])
def test_the_experts_of_a_layer_are_read_one_by_one(tmp_path: Path, architecture: str, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "source").mkdir()
    file = write_llama(tmp_path / "source/model.gguf", kind, architecture, layers=1)
    sizes = {"moe_intermediate_size": INNER}  # transformers does not take them from the file
    if architecture == "qwen2moe":
        sizes["shared_expert_intermediate_size"] = INNER
    expected = theirs(file, torch.bfloat16, **sizes).state_dict()
    dequantized_model(file.parent, tmp_path / "output", dtype="bfloat16", chunk_bytes=50_000)
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in tensors_of(tmp_path / "output")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "output").state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, mine in found.items() if not mine.equal(expected[name])] == []
    quantize(file, tmp_path / "nf4", experts=True, dtype="bfloat16", device="cpu")
    quantize(tmp_path / "output", tmp_path / "wanted", experts=True, device="cpu")
    assert differing_tensors(tmp_path / "wanted", tmp_path / "nf4") == []


def test_a_model_in_several_files_is_read_as_if_it_were_in_one(tmp_path: Path) -> None:
    for name, tensors_in_file in (("one", 0), ("split", 9)):
        (tmp_path / name).mkdir()
        write_llama(tmp_path / name / "tiny-Q4_0.gguf", "Q4_0", tensors_in_file=tensors_in_file)
        dequantized_model(tmp_path / name, tmp_path / f"{name}-output", dtype="bfloat16")
    parts = sorted((tmp_path / "split").iterdir())
    assert [part.name for part in parts] == [f"tiny-Q4_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert differing_tensors(tmp_path / "one-output", tmp_path / "split-output") == []
    assert (tmp_path / "one-output/config.json").read_bytes() == (tmp_path / "split-output/config.json").read_bytes()
    assert open_checkpoint(LocalFolder(tmp_path / "split"), "q4_0").files == tuple(part.name for part in parts)
    shutil.copy(parts[1], tmp_path / "kept")
    shutil.copy(parts[2], parts[1])
    with pytest.raises(MalformedInput, match=r"00002-of-00003\.gguf does not belong there: it says that it is file 2"):
        open_checkpoint(LocalFolder(tmp_path / "split"))
    parts[1].unlink()
    with pytest.raises(MissingInput, match=r"without 'tiny-Q4_0-00002-of-00003\.gguf'"):
        open_checkpoint(LocalFolder(tmp_path / "split"))
    shutil.move(tmp_path / "kept", parts[1])
    with pytest.raises(MissingInput, match=r"without 'tiny-Q4_0-00001-of-00003\.gguf', 'tiny-Q4_0-00003-of"):
        quantize(parts[1], tmp_path / "output", device="cpu")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *QUANTIZED, *SCALES])
def test_every_type_of_block_has_transformers_values(tmp_path: Path, kind: str) -> None:
    (tmp_path / "source").mkdir()
    file = write_llama(tmp_path / "source/model.gguf", kind, layers=1)
    expected = theirs(file, torch.bfloat16).state_dict()
    dequantized_model(file.parent, tmp_path / "output", dtype="bfloat16", chunk_bytes=50_000)
    found = tensors_of(tmp_path / "output")
    assert found.keys() == expected.keys()
    assert [name for name, mine in found.items() if not mine.equal(expected[name])] == []


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_what_the_library_does_to_the_values_is_done(tmp_path: Path, architecture: str) -> None:
    (tmp_path / "source").mkdir()
    file = write_llama(tmp_path / "source/model.gguf", "Q8_0", architecture, tied=True)
    expected = theirs(file, torch.float32).state_dict()
    dequantized_model(file.parent, tmp_path / "output", dtype="float32")
    found = tensors_of(tmp_path / "output")
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    assert [name for name, mine in found.items() if not mine.equal(expected[name])] == []


def write_other(file: Path, architecture: str, model: Any, settings: dict[str, int]) -> None:
    """A model as llama.cpp arranges it, by the names that transformers has for its tensors."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, get_gguf_hf_weights_map

    with untouched():
        names = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS[architecture](config=model.config.to_dict()))
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in settings.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_token_list([f"<{number}>" for number in range(model.config.vocab_size)])
    state = model.state_dict()
    for name, own in names.items():
        values = state[own].float().numpy()
        if "_exps" in name and "gate_up" in own:  # which are one in the model
            half = values.shape[1] // 2
            values = values[:, :half] if "gate" in name else values[:, half:]
        if architecture == "gpt2" and re.search(r"(?:qkv|down|up|attn_output)\.weight", name):
            values = values.T
        values = np.ascontiguousarray(values)
        kind = Type.Q8_0 if values.ndim > 1 and values.shape[-1] % 32 == 0 else Type.F32
        name = f"{name}.weight" if name.endswith("_exps") else name
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 1, "n_head": 4},
        {"n_embd": "embedding_length", "n_layer": "block_count", "n_head": "attention.head_count"},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        },
        {
            "d_model": "embedding_length", "d_kv": "attention.key_length", "d_ff": "feed_forward_length",
            "num_layers": "block_count", "num_heads": "attention.head_count",
        },
    ),
    "minimax-m2": (
        "MiniMaxM2ForCausalLM",
        {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        },
        {
            "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
            "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
            "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
        },
    ),
}  # fmt: skip
"""Architecture → class, its arguments, and what those are called in a file."""


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures_are_read_as_the_library_reads_them(tmp_path: Path, architecture: str) -> None:
    import transformers

    class_name, arguments, keys = OTHERS[architecture]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**arguments, vocab_size=64))
    (tmp_path / "source").mkdir()
    file = tmp_path / "source/model.gguf"
    write_other(file, architecture, model, {key: arguments[name] for name, key in keys.items()})
    expected = model_class.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    dequantized_model(file.parent, tmp_path / "output", dtype="float32")
    found = model_class.from_pretrained(tmp_path / "output").state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, mine in found.items() if not mine.equal(expected[name])] == []


def blocks_of(shapes: dict[str, tuple[int, ...]], count: int) -> dict[str, tuple[int, ...]]:
    return {f"blk.{block}.{name}": shape for block in range(count) for name, shape in shapes.items()}


BY_CONVERSIONS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "qwen35moe": (
        {
            "attention.key_length": 16, "ssm.time_step_rank": 4, "context_length": 64, "embedding_length": 64,
            "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6,
            "full_attention_interval": 2, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2,
            "block_count": 3, "nextn_predict_layers": 1, "ssm.inner_size": 64, "rope.freq_base": 10000.0,
            "rope.dimension_sections": [2, 1, 1, 0], "rope.dimension_count": 8, "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 32, "expert_count": 4, "expert_used_count": 2,
        },
        {
            "token_embd.weight": (64, 64), "output_norm.weight": (64,), "output.weight": (64, 64),
            **blocks_of(
                {
                    "attn_norm.weight": (64,), "post_attention_norm.weight": (64,), "ffn_gate_exps.weight": (4, 32, 64),
                    "ffn_up_exps.weight": (4, 32, 64), "ffn_down_exps.weight": (4, 64, 32),
                    "ffn_gate_inp.weight": (4, 64),
                    "ffn_gate_inp_shexp.weight": (64,), "ffn_gate_shexp.weight": (32, 64),
                    "ffn_up_shexp.weight": (32, 64), "ffn_down_shexp.weight": (64, 32),
                },
                2,
            ),
            "blk.0.attn_qkv.weight": (128, 64), "blk.0.attn_gate.weight": (64, 64), "blk.0.ssm_alpha.weight": (4, 64),
            "blk.0.ssm_beta.weight": (4, 64), "blk.0.ssm_conv1d.weight": (128, 4), "blk.0.ssm_norm.weight": (16,),
            "blk.0.ssm_out.weight": (64, 64), "blk.0.ssm_a": (4,), "blk.0.ssm_dt.bias": (4,),
            "blk.1.attn_q.weight": (128, 64), "blk.1.attn_k.weight": (32, 64), "blk.1.attn_v.weight": (32, 64),
            "blk.1.attn_output.weight": (64, 64), "blk.1.attn_q_norm.weight": (16,), "blk.1.attn_k_norm.weight": (16,),
            "blk.2.nextn.eh_proj.weight": (64, 128),
        },
    ),
    "lfm2": (
        {
            "context_length": 64, "embedding_length": 64, "feed_forward_length": 96, "block_count": 2,
            "attention.head_count": 4, "attention.head_count_kv": [0, 2], "attention.layer_norm_rms_epsilon": 1e-5,
            "shortconv.l_cache": 3, "rope.freq_base": 10000.0,
        },
        {
            "token_embd.weight": (64, 64), "token_embd_norm.weight": (64,),
            **blocks_of(
                {
                    "attn_norm.weight": (64,), "ffn_norm.weight": (64,), "ffn_gate.weight": (96, 64),
                    "ffn_up.weight": (96, 64), "ffn_down.weight": (64, 96),
                },
                2,
            ),
            "blk.0.shortconv.conv.weight": (64, 3), "blk.0.shortconv.in_proj.weight": (192, 64),
            "blk.0.shortconv.out_proj.weight": (64, 64),
            "blk.1.attn_q.weight": (64, 64), "blk.1.attn_k.weight": (32, 64), "blk.1.attn_v.weight": (32, 64),
            "blk.1.attn_output.weight": (64, 64), "blk.1.attn_q_norm.weight": (16,), "blk.1.attn_k_norm.weight": (16,),
        },
    ),
}  # fmt: skip
"""Architecture → its settings, and the shapes of its tensors."""


@pytest.mark.parametrize("architecture", BY_CONVERSIONS)
def test_what_the_library_reads_by_conversions_has_its_values(tmp_path: Path, architecture: str) -> None:
    """Rows and columns in another order, experts of two tensors, offsets, logarithms, and layers that it leaves out."""
    from transformers import AutoModelForCausalLM

    settings, shapes = BY_CONVERSIONS[architecture]
    random = np.random.default_rng(3)
    (tmp_path / "source").mkdir()
    writer = gguf.GGUFWriter(tmp_path / "source/model.gguf", architecture)
    for key, value in settings.items():
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_token_list([f"<{number}>" for number in range(64)])
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        values = -np.exp(values) if name.endswith("ssm_a") else values
        kind = Type.Q8_0 if len(shape) > 1 and shape[-1] % 32 == 0 else Type.F32
        rows = gguf.quants.quantize(values.reshape(-1, shape[-1]), kind)
        writer.add_tensor(name, rows.reshape(*shape[:-1], -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = tmp_path / "source/model.gguf"
    expected = theirs(file, torch.float32).state_dict()
    summary = dequantized_model(file.parent, tmp_path / "output", dtype="float32", chunk_bytes=5000)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "output").state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, mine in found.items() if not mine.equal(expected[name])] == []
    assert [note for note in summary.notes if "left out" in note] == (
        ["1 tensor left out, being no weight of the model: 'blk.2.nextn.eh_proj.weight'"]
        if "moe" in architecture
        else []
    )


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_quantizing_a_gguf_file_is_quantizing_what_it_stands_for(tmp_path: Path, method: str) -> None:
    from transformers import LlamaForCausalLM

    from qz.quantize.methods import Int8

    (tmp_path / "source").mkdir()
    file = write_llama(tmp_path / "source/tiny.Q4_K.gguf", "Q4_K")
    loaded = theirs(file, torch.bfloat16)
    del loaded.config.quantization_config
    plain = LlamaForCausalLM(loaded.config).bfloat16()  # the one that was loaded cannot be saved
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(tmp_path / "between")
    transformers_model(LlamaForCausalLM, tmp_path / "between", method).save_pretrained(tmp_path / "reference")
    chosen = Int8() if method == "int8" else FourBit("nf4")
    summary = quantize(file, tmp_path / "output", method=chosen, dtype="bfloat16", device="cpu")
    assert differing_tensors(tmp_path / "reference", tmp_path / "output") == []
    ours, reference = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("output", "reference"))
    assert ours == reference
    assert any("quantized already, with gguf" in text for text in summary.as_json()["warnings"])
    assert any("tokenizer" in text for text in summary.as_json()["warnings"])


def test_a_dry_run_gives_exact_sizes_and_inspect_names_the_format(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    file = write_llama(tmp_path / "source/model.gguf", "Q4_0")
    planned = quantize(file, tmp_path / "output", dry_run=True).as_json()
    done = quantize(file, tmp_path / "output", device="cpu").as_json()
    assert [shard["bytes"] for shard in planned["shards"]] == [shard["bytes"] for shard in done["shards"]]
    found = inspect(file)
    assert isinstance(found, Inspection)
    assert found.quantization is not None
    assert (found.quantization.method, found.problems) == ("gguf", ())
    assert found.parameters == done["parameters"]["total"]
    assert found.dtypes["Q4_0"].tensors == 16


def test_one_of_several_files_is_chosen_by_its_name(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "tiny-Q8_0.gguf", "Q8_0")
    write_llama(tmp_path / "tiny-Q4_0.gguf", "Q4_0")
    with pytest.raises(MissingInput, match=r"several models in GGUF: .*--variant"):
        open_checkpoint(LocalFolder(tmp_path))
    assert open_checkpoint(LocalFolder(tmp_path), "q8_0").files == (file.name,)
    with pytest.raises(MissingInput, match="Q2_K"):
        open_checkpoint(LocalFolder(tmp_path), "Q2_K")


def test_the_table_of_types_is_that_of_the_package() -> None:
    for number, (name, values, width) in TYPES.items():
        assert (Type(number).name, *gguf.GGML_QUANT_SIZES[Type(number)]) == (name, values, width)


@pytest.mark.parametrize("by", ["forked_qz", pytest.param("qz_with_torch", marks=pytest.mark.soak)])
def test_the_command_reads_a_file_by_its_path(
    by: str, tmp_path: Path, forked_qz: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    """Also one of its own, which imports no more of the libraries than it needs: see test_lora_experts, too."""
    write_llama(tmp_path / "tiny-Q5_0.gguf", "Q5_0")
    done = request.getfixturevalue(by)("quantize", "tiny-Q5_0.gguf", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["left_out"] == []
    assert (tmp_path / "tiny-Q5_0-nf4/model.safetensors").is_file()
    assert forked_qz("quantize", "tiny-Q5_0.gguf", "--device", "cpu", "--if-exists", "skip").returncode == 0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda data: data[:-100], MalformedInput),
        (lambda data: data[:200], MalformedInput),
        (lambda data: data[:4] + b"\x09\0\0\0" + data[8:], MalformedInput),
        (lambda data: data[:4] + b"\0\0\0\x03" + data[8:], MalformedInput),
        (lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"), MalformedInput),
        (lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.\x1b[2Jn_q.we\nt"), MalformedInput),
        (lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"), MalformedInput),
        (lambda data: data.replace(b"block_count\x04\0\0\0\x02", b"block_count\x04\0\0\0\xff\xff\xff"), MalformedInput),
        (lambda data: data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lLama"), Unsupported),
    ],
    ids=[
        "cut off",
        "cut in the header",
        "version 9",
        "big-endian",
        "twice",
        "a name with ESC",
        "a tensor missing",
        "millions of blocks",
        "unknown",
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], error: type[Exception]) -> None:
    file = write_llama(tmp_path / "model.gguf", "Q8_0")
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(error) as raised:
        quantize(file, tmp_path / "output", device="cpu")
    assert str(raised.value).isprintable()
    assert not (tmp_path / "output").exists()


def test_a_vocabulary_is_counted_where_its_size_is_not_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_llama(tmp_path / "model.gguf", "Q8_0")
    file.write_bytes(file.read_bytes().replace(b"llama.vocab_size", b"llama.vocab_sizX"))
    monkeypatch.setattr(gguf_header, "LONG_LIST", VOCABULARY - 1)
    assert plain_checkpoint(open_checkpoint(LocalFolder(tmp_path))).config["vocab_size"] == VOCABULARY


def test_what_the_library_does_not_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    file = write_llama(tmp_path / "source/model.gguf", "Q8_0")
    data = bytearray(file.read_bytes())
    kind = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    data[kind] = Type.NVFP4.value  # whose tensors have another scale beside them
    file.write_bytes(data)
    with pytest.raises(Unsupported, match=r"in ggml's type 40"):
        quantize(file, tmp_path / "output", device="cpu")
    writer = gguf.GGUFWriter(file, "wavtokenizer-dec")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("conv1d.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Unsupported, match=r"transformers does not read GGUF files of wavtokenizer-dec"):
        quantize(file, tmp_path / "output", device="cpu")
    write_llama(file, "Q8_0", experts=2)
    with pytest.raises(Unsupported, match=r"no place for blk\.0\.ffn_gate_exps\.weight in the LlamaForCausalLM"):
        quantize(file, tmp_path / "output", device="cpu")
