"""Fuzzing of what qz reads beside headers: configs, indexes, quant states, records and journals of others.

    python tests/fuzz_files.py --count 100000

Each is mutated as a JSON tree and as bytes, and given to the code that a command reads it with. What is wrong must be
told as a ``QzError``. The first other exception, which would be exit code 1, ends the run with 1 and shows the input.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import random
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.numpy import save_file

from qz import QzError, api
from qz.formats.checkpoint.adapter_file import open_adapter
from qz.formats.checkpoint.pipeline import open_pipeline
from qz.formats.checkpoint.quantization.quant_state import parse_quant_state
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.recorded.record import WrittenFile, encode_record, hash_of, read_record
from qz.formats.output.recorded.statement import TYPE
from qz.formats.output.resuming.difference import describe_difference
from qz.formats.output.resuming.journal import Journal
from qz.formats.output.shares import PART_FILE, Share, ShareReceipt, read_share
from qz.formats.output.storage.directory import Directory
from qz.formats.output.storage.disk import Disk
from qz.formats.tensors.gguf_header import read_gguf_header
from qz.quantize.adapters.changes import Changes
from qz.quantize.calibration.running.unfinished import Sums, Unfinished
from qz.quantize.importance.matching import read_importance
from qz.quantize.importance.statistics import InputSums, write_statistics
from qz.quantize.libraries.importing import work_bounds
from qz.quantize.libraries.plain import plain_checkpoint
from qz.quantize.methods import Nf4
from qz.quantize.models.plan import plan_quantization
from qz.quantize.planning.fusing import fuse
from qz.quantize.planning.sources import Fused
from qz.quantize.provenance.up_to_date import UpToDate, up_to_date
from qz.quantize.settings import Settings
from qz.quantize.streaming.output.shares import not_finite
from qz.quantize.verification.journal import _read as read_comparison
from test_gguf import write_llama

VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 64, 10**9, 10**15, 1 << 63, 10**30, 0.5, -1.5, 1e300, True, False, None),
    *(
        "",
        "64",
        "x",
        "a/b",
        "../x",
        "/etc/passwd",
        "nf4",
        "kernels-community/evil@main",
        "é",
        "\u202e\x1b[31m",
        "a" * 5000,
    ),
    *("\ud800", "\0", "model.safetensors", "bfloat16", "os.system", "__class__"),
    *([], {}, [[]], [0], [None], ["x"], [-1], [10**9, 3], {"": 0}, {"a": {"b": []}}, [{}], {"model_type": "bert"}),
)
KEYS = (
    "",
    "x",
    "__class__",
    "to_dict",
    "text_config",
    "auto_map",
    "attn_implementation",
    "dtype",
    "shape",
    "files",
    "about",
)
BYTES = (
    b"{",
    b"}",
    b"[" * 40,
    b'"',
    b",",
    b"\\",
    b"\xff",
    b"\xc3",
    b"\0",
    b"NaN",
    b"1e999",
    b"9" * 60,
    b"\\ud800",
    b"null",
    b"\n",
)


class Mutator:
    """Changes JSON values at random places, in one to three steps."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)

    def tree(self, value: Any) -> Any:
        """A changed copy of ``value``, an object."""
        changed = copy.deepcopy(value)
        for _ in range(self.choose.choice((1, 1, 1, 2, 3))):
            self._change(changed)
        return changed

    def data(self, value: Any) -> bytes:
        """A changed ``value`` as bytes, which in one of five cases are changed as well."""
        data = bytearray(json.dumps(self.tree(value), indent=self.choose.choice((None, 2))).encode())
        if self.choose.random() < 0.2:
            if self.choose.random() < 0.1:
                data[self.choose.randrange(len(data)) :] = b"[" * 100_000
            for _ in range(self.choose.choice((1, 2, 5))):
                place = self.choose.randrange(len(data) + 1)
                data[place : place + self.choose.choice((0, 1, 1, 4))] = self.choose.choice(BYTES)
        return bytes(data)

    def binary(self, data: bytes) -> bytes:
        """Changed bytes: numbers of 4 or 8 bytes anywhere, single bytes, and an early end."""
        changed = bytearray(data)
        for _ in range(self.choose.choice((1, 1, 2, 4))):
            place, kind = self.choose.randrange(len(changed)), self.choose.choice("bBiqdfe")
            if kind == "e":
                del changed[place:]
                changed += b"\0"
            elif kind in "bB":
                changed[place] ^= 1 << self.choose.randrange(8)
            else:
                extremes: tuple[float, ...] = (0, 1, -1, 2**31 - 1) if kind in "iq" else (0, -1, math.nan, math.inf)
                number = struct.pack("<" + kind, self.choose.choice(extremes))
                changed[place : place + len(number)] = number
        return bytes(changed)

    def _change(self, tree: Any) -> None:
        places = [tree]
        for node in places:
            inner = node.values() if isinstance(node, dict) else node
            places += [each for each in inner if isinstance(each, dict | list)]
        node = self.choose.choice(places)
        new = copy.deepcopy(self.choose.choice(VALUES))
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys or self.choose.random() < 0.1:
            if isinstance(node, dict):
                node[self.choose.choice(KEYS)] = new
            else:
                node.append(new)
        elif self.choose.random() < 0.2:
            del node[self.choose.choice(keys)]
        else:
            node[self.choose.choice(keys)] = new


class Exit1(AssertionError):
    """Something else than a QzError was raised."""


class Target:
    """One kind of file: ``feed`` gives changed bytes to the code that reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def feed(self, mutator: Mutator) -> bytes:
        raise NotImplementedError


def save_model(folder: Path, **config: Any) -> dict[str, Any]:
    """A Llama of one layer, in bfloat16's bits; its config."""
    sizes = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8)}
    tensors: dict[str, tuple[int, ...]] = {
        f"model.layers.0.self_attn.{name}_proj.weight": shape for name, shape in sizes.items()
    }
    tensors |= {f"model.layers.0.mlp.{name}_proj.weight": (16, 8) for name in ("gate", "up")}
    tensors |= {"model.layers.0.mlp.down_proj.weight": (8, 16), "model.norm.weight": (8,), "lm_head.weight": (32, 8)}
    tensors |= {f"model.layers.0.{name}_layernorm.weight": (8,) for name in ("input", "post_attention")}
    tensors["model.embed_tokens.weight"] = (32, 8)
    stored = {name: np.ones(shape, np.float16) for name, shape in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    written = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "hidden_act": "silu",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "eos_token_id": [1, 2],
        "pad_token_id": None,
        "attention_bias": False,
        "id2label": {"0": "a", "1": "b"},
        "layer_types": ["full_attention"],
        **config,
    }
    (folder / "config.json").write_text(json.dumps(written))
    return written


class Configs(Target):
    """config.json and generation_config.json, as inspect reads them, and as the library builds a class from them."""

    build = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.value = save_model(folder)

    def feed(self, mutator: Mutator) -> bytes:
        data = mutator.data(self.value)
        (self.folder / "config.json").write_bytes(data)
        with told(data):
            api.inspect(self.folder)
        if self.build:
            generation = {
                "eos_token_id": [1, 2],
                "do_sample": True,
                "temperature": 0.6,
                "transformers_version": "5.0.0",
            }
            beside = mutator.data(generation) if mutator.choose.random() < 0.2 else json.dumps(generation).encode()
            (self.folder / "generation_config.json").write_bytes(beside)
            with told(data + beside):
                plan_quantization(open_checkpoint(LocalFolder(self.folder)), Settings(Nf4()))
        return data


class InspectedConfigs(Configs):
    """config.json, with a quantization_config, as inspect reads it."""

    build = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        self.value["quantization_config"] = {**said, "llm_int8_skip_modules": ["lm_head"], "llm_int8_threshold": 6.0}


class Indexes(Target):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        save_model(folder)
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        weight_map = {
            f"model.layers.0.self_attn.{name}_proj.weight": "model-00001-of-00001.safetensors" for name in "qkvo"
        }
        self.value = {"metadata": {"total_size": 1000, "total_parameters": 5}, "weight_map": weight_map}

    def feed(self, mutator: Mutator) -> bytes:
        data = mutator.data(self.value)
        (self.folder / "model.safetensors.index.json").write_bytes(data)
        with told(data):
            api.inspect(self.folder)
        return data


class Pipelines(Target):
    """model_index.json, and a component beside it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "text_encoder").mkdir()
        save_model(folder / "text_encoder")
        components = {"text_encoder": ["transformers", "LlamaForCausalLM"], "vae": [None, None]}
        self.value = {"_class_name": "FluxPipeline", "_diffusers_version": "0.42.1", **components}

    def feed(self, mutator: Mutator) -> bytes:
        data = mutator.data(self.value)
        (self.folder / "model_index.json").write_bytes(data)
        with told(data):
            api.inspect(self.folder)
        with told(data):
            open_pipeline(LocalFolder(self.folder)).close()
        return data


class QuantStates(Target):
    def feed(self, mutator: Mutator) -> bytes:
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [8, 8]}
        nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
        data = mutator.data({**state, **nested})
        with told(data):
            parse_quant_state(data, "x")
        for kind in ("nf4", "fp4"):
            tensors = {
                "a.weight": np.zeros((32, 1), np.uint8),
                "a.weight.absmax": np.ones(1, np.float32),
                "a.weight.quant_map": np.ones(16, np.float32),
                f"a.weight.quant_state.bitsandbytes__{kind}": np.frombuffer(data or b" ", np.uint8),
            }
            save_file(tensors, self.folder / "x.safetensors")
            with told(data):
                api.inspect(self.folder / "x.safetensors")
        return data


class Records(Target):
    """qz.json, as verify, ``--if-exists skip`` and dequantize read it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        save_model(folder)
        about = {
            "source": {"location": "a/b", "revision": "0" * 40, "library": "transformers", "architecture": "x"},
            "identity": {"files": {"config.json": 5}},
            "settings": {"method": {"name": "nf4"}, "skips": [], "dtype": "auto"},
            "memory_footprint": {"before": 9, "after": 5},
            "warnings": ["x"],
            "components": [{"name": "unet"}],
            "versions": {"torch": "2"},
            "dtype": "float16",
        }
        self.value = json.loads(encode_record([], about))
        del self.value["sha256"]  # as of an earlier qz: else every mutant would be refused for its hash
        files = [{"name": name, "bytes": 5, "sha256": "0" * 64} for name in ("config.json", "a/b.json")]
        self.value["files"] = files

    def feed(self, mutator: Mutator) -> bytes:
        data = mutator.data(self.value)
        (self.folder / "qz.json").write_bytes(data)
        source = LocalFolder(self.folder)
        with told(data):
            api.inspect(self.folder, verify=True)
        with told(data):
            record = read_record(source)
            if record is not None:
                json.dumps(UpToDate(record, self.folder, "x").as_json())
        with told(data):
            up_to_date(self.folder, source, Settings(Nf4()))
        return data


class Journals(Target):
    """The journal of an interrupted run, each line with a checksum that is right."""

    def feed(self, mutator: Mutator) -> bytes:
        fingerprint = {"fingerprint": {"source": {"files": {"a": [1, 2]}}, "settings": {"dtype": "auto"}}}
        entry = {"name": "model.safetensors", "bytes": 5, "sha256": "0" * 64}
        lines = [mutator.data(each).replace(b"\n", b" ") for each in (fingerprint, entry)]
        data = b"".join(b"%08x %b\n" % (zlib.crc32(line), line) for line in lines)
        path = self.folder / "x.partial.journal"
        path.write_bytes(data)
        with told(data), Directory.at(Disk(), self.folder) as folder:
            journal = Journal(folder, path.name, None)
            try:
                describe_difference(journal.fingerprint or {}, fingerprint["fingerprint"])
            finally:
                journal.close()
        return data


class Importance(Target):
    """An imatrix of llama.cpp's, both formats, and a file of statistics, as --importance reads them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        sums = {f"blk.0.{name}.weight": np.ones((1, 8), np.float32) for name in ("attn_q", "ffn_up")}
        writer = gguf.GGUFWriter(folder / "x.gguf", "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["x"])
        for name, values in sums.items():
            writer.add_tensor(name + ".in_sum2", values)
            writer.add_tensor(name + ".counts", np.ones((1, 1), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        old = [struct.pack("<i", len(sums))]
        for name, values in sums.items():
            old += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", 1, values.size), values.tobytes()]
        write_statistics(folder / "x.safetensors", {"q": InputSums(np.ones(8, np.float32), 5)}, {"text": "x"})
        self.files = {name: (folder / name).read_bytes() for name in ("x.gguf", "x.safetensors")}
        self.files["x.dat"] = b"".join(old)

    def feed(self, mutator: Mutator) -> bytes:
        name = mutator.choose.choice(sorted(self.files))
        data = mutator.binary(self.files[name])
        (self.folder / name).write_bytes(data)
        with told(data):
            read_importance(self.folder / name, [])
        return data


class Parts(Target):
    """part.json, as merging reads it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        found = {"": {"a.weight": {"stored": 1, "overflowed": 2}}}
        receipt = ShareReceipt(Share(1, 2), {"source": {"files": {}}}, {"model.safetensors": 1}, ("",), found)
        self.value = json.loads(receipt.encode())

    def feed(self, mutator: Mutator) -> bytes:
        data = mutator.data(self.value)
        (self.folder / PART_FILE).write_bytes(data)
        listed = WrittenFile(PART_FILE, len(data), hash_of(data))  # else every mutant would be refused for its hash
        (self.folder / "qz.json").write_bytes(encode_record([listed], {}))
        with told(data):
            not_finite(read_share(self.folder).receipt)
        return data


class Statements(Target):
    """An in-toto statement, as verify reads it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        names = ("config.json", "a/b.json")
        subjects = [{"name": name, "digest": {"sha256": "0" * 64}, "annotations": {"bytes": 5}} for name in names]
        self.value = {"_type": TYPE, "subject": subjects, "predicateType": "x", "predicate": {}}

    def feed(self, mutator: Mutator) -> bytes:
        data = mutator.data(self.value)
        (self.folder / "statement.json").write_bytes(data)
        with told(data):
            json.dumps(api.verify(self.folder, statement=self.folder / "statement.json").as_json())
        return data


class Adapters(Target):
    """A LoRA: its config as PEFT writes it, and its header."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        save_model(folder)
        self.plan = plan_quantization(open_checkpoint(LocalFolder(folder)), Settings(Nf4()))
        self.lora = folder / "lora"
        self.lora.mkdir()
        stems = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"]
        tensors = {
            f"base_model.model.{stem}.lora_{kind}.weight": np.ones(shape, np.float32)
            for stem in stems
            for kind, shape in (("A", (2, 8)), ("B", (8, 2)))
        }
        save_file(tensors, self.lora / "adapter_model.safetensors")
        self.weights = (self.lora / "adapter_model.safetensors").read_bytes()
        self.value = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"o_proj": 3},
            "use_rslora": False,
            "use_dora": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "base_model_name_or_path": "a/b",
            "target_parameters": None,
            "modules_to_save": None,
        }

    def feed(self, mutator: Mutator) -> bytes:
        data, weights = mutator.data(self.value), self.weights
        if mutator.choose.random() < 0.3:
            data, weights = json.dumps(self.value).encode(), mutator.binary(weights)
        (self.lora / "adapter_config.json").write_bytes(data)
        (self.lora / "adapter_model.safetensors").write_bytes(weights)
        with told(data + weights):
            adapter = open_adapter(LocalFolder(self.lora), None, "lora", 1.0)
            for step in fuse(self.plan, [adapter]).steps:
                for source in step.sources:
                    if isinstance(source, Fused):
                        weight = np.ones((source.shape[0], math.prod(source.shape[1:])), np.float32)
                        Changes(source.changes, weight.shape[1]).apply(
                            weight, 0, lambda _, size: np.empty(size, np.uint8)
                        )
        return data


class GgufHeaders(Target):
    """The header of a GGUF model, as inspect and planning read it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.file = write_llama(folder / "x.gguf", "Q4_0")
        with self.file.open("rb") as file:
            self.size = os.path.getsize(self.file)
            tensors = read_gguf_header(lambda offset, length: _at(file, offset, length), self.size, "x").tensors
            self.header = _at(file, 0, min(tensor.offset for tensor in tensors.values()))

    def feed(self, mutator: Mutator) -> bytes:
        data = mutator.binary(self.header)
        with self.file.open("r+b") as file:
            file.write(data)
            file.truncate(len(data) if len(data) < len(self.header) else self.size)
        with told(data):
            api.inspect(self.file)
        with told(data):
            plain_checkpoint(open_checkpoint(LocalFolder(self.folder)))
        return data


def _at(file: Any, offset: int, length: int) -> bytes:
    file.seek(offset)
    return bytes(file.read(length))


class Calibrations(Target):
    """The journal of an interrupted calibration, where there is no key to seal it with."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.output, self.asked = folder / "x", {"source": {"files": {"a": [1, 2]}}, "tokens": 64}
        with contextlib.closing(Unfinished(self.output, resume=True)) as kept:
            kept.open(self.asked)
            kept.begin([[1, 2, 3], [4, 5]])
            output = [[torch.ones(2), (torch.zeros(1), None)]]
            kept.keep("layers.0", output, {"q": np.ones(4)}, Sums(tokens={"q": 5}, first={"q": "a"}))
        self.files = {path: path.read_bytes() for path in kept.folder.iterdir()}
        self.journal = kept.folder / "journal.json"
        self.value = json.loads(self.journal.read_text())
        self.value.pop("mark", None)

    def feed(self, mutator: Mutator) -> bytes:
        for path, data in self.files.items():
            path.write_bytes(data)
        data = json.dumps(mutator.tree(self.value) | {"fingerprint": self.asked}).encode()
        self.journal.write_bytes(data)
        with told(data), contextlib.closing(Unfinished(self.output, resume=True)) as kept:
            kept.open(self.asked)
            kept.find("layers.0", torch.device("cpu"))
            assert all(type(token) is int for row in kept.rows for token in row)
        return data


class Comparisons(Target):
    """What an interrupted ``qz verify`` left in the cache."""

    def feed(self, mutator: Mutator) -> bytes:
        data = b"\n".join(mutator.data([entry]) for entry in (["", "a"], ["unet", "b"]))
        (self.folder / "x").write_bytes(data)
        with told(data):
            read_comparison(self.folder / "x")
        return data


TARGETS: dict[str, Callable[[Path], Target]] = {
    "configs": InspectedConfigs,
    "indexes": Indexes,
    "pipelines": Pipelines,
    "quant states": QuantStates,
    "records": Records,
    "journals": Journals,
    "importance files": Importance,
    "parts": Parts,
    "statements": Statements,
    "adapters": Adapters,
    "comparisons": Comparisons,
    "calibrations": Calibrations,
    "GGUF headers": GgufHeaders,
    "classes": Configs,
}


class told(contextlib.AbstractContextManager[None]):  # noqa: N801  reads as a statement
    """A QzError inside is what should be; any other exception is Exit1."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, QzError):
            return True
        if isinstance(error, Exception):
            raise Exit1(f"{type(error).__name__}: {error}\n{self.data!r}") from error
        return False


def fuzz(name: str, seed: int, count: int | None = None, seconds: float = float("inf")) -> int:
    """Feed one target; how many inputs it got."""
    mutator, done, end = Mutator(seed), 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[name](Path(folder) / "x")
        while (count is None or done < count) and time.monotonic() < end:
            target.feed(mutator)
            done += 1
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, help="how many inputs of each kind (default: 10,000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="how long for each kind, at most")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    os.environ["QZ_CACHE"] = ""
    work_bounds.set_hard()  # another process for each config would take seconds
    print(f"seed {options.seed}", flush=True)
    for name in TARGETS:
        try:
            done = fuzz(name, options.seed, options.count or 10_000, options.seconds)
        except Exit1 as found:
            print(f"{name}: {found}")
            return 1
        print(f"{done} {name}, none of them exit code 1", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
