"""``qz quantize`` as its users meet it: what it refuses and promises, and where it is right while the libraries err."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converted import carried_out, plan_of, quantized
from qz import HubUnreachable, IOFailed, MalformedInput, Unsupported, UsageError
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.methods import FourBit
from qz.quantize.models.plan import plan_quantization
from qz.quantize.settings import Settings
from qz.quantize.streaming.workers import Workers
from reference import differing_files, raw, tensors_of, transformers_model
from zoo import build, llama

Qz = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def qz(forked_qz: Qz) -> Qz:
    return forked_qz


def folder_state(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Rewrite a folder's one weight file with a tensor changed, or left out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensor = change(tensors.pop(name))
    save_file(tensors | ({name: tensor} if tensor is not None else {}), file, metadata={"format": "pt"})


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "source"))


def test_the_report_and_the_json_say_what_is_on_disk(qz: Qz, tiny_llama: Path, tmp_path: Path) -> None:
    done = qz("quantize", tiny_llama, "--nf4", "-o", "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    files = {path.name: path for path in (tmp_path / "out").glob("*.safetensors")}
    assert {shard["name"] for shard in report["shards"]} == set(files)
    for shard in report["shards"]:
        data = files[shard["name"]].read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert report["method"] == "nf4"
    assert report["source"]["library"] == "transformers"
    assert report["source"]["architecture"] == "LlamaForCausalLM"
    assert report["skipped"] == ["lm_head"]
    assert report["parameters"]["total"] == sum(tensor.numel() for tensor in tensors_of(tiny_llama).values())
    assert report["tensors"]["quantized"] == 14


def test_a_dry_run_reads_no_weight_and_predicts_every_byte(qz: Qz, source: Path, tmp_path: Path) -> None:
    planned = json.loads(
        qz("quantize", source, "--nf4", "-o", "out", "--max-shard-size", "50KB", "--dry-run", "--json").stdout
    )
    assert planned["dry_run"]
    assert not (tmp_path / "out").exists()
    done = json.loads(qz("quantize", source, "--nf4", "-o", "out", "--max-shard-size", "50KB", "--json").stdout)
    assert [(s["name"], s["bytes"]) for s in planned["shards"]] == [(s["name"], s["bytes"]) for s in done["shards"]]
    assert planned["bytes"] == done["bytes"]
    assert planned["memory_footprint"] == done["memory_footprint"]


def test_a_dry_run_works_where_there_are_headers_but_no_data(qz: Qz, source: Path) -> None:
    file = source / "model.safetensors"
    size, header = file.stat().st_size, file.read_bytes()
    end = 8 + int.from_bytes(header[:8], "little")
    file.write_bytes(header[:end])
    with file.open("r+b") as holes:
        holes.truncate(size)
    assert qz("quantize", source, "--dry-run").returncode == 0


def test_inputs_are_never_changed_and_nothing_else_is_left_behind(qz: Qz, source: Path, tmp_path: Path) -> None:
    before = folder_state(source)
    assert qz("quantize", source, "-o", "out").returncode == 0
    assert folder_state(source) == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_the_default_output_is_named_after_source_and_method(qz: Qz, source: Path, tmp_path: Path) -> None:
    assert qz("quantize", source, "--int8").returncode == 0
    assert (tmp_path / "source-int8" / "config.json").is_file()


def test_the_default_output_is_named_after_the_link_that_leads_to_the_source(
    qz: Qz, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "my-model").symlink_to(source)
    assert qz("quantize", "my-model", "--int8").returncode == 0
    assert (tmp_path / "my-model-int8" / "config.json").is_file()


REFUSALS: dict[str, tuple[list[str], int, str]] = {
    "a missing folder": (["./nowhere"], 66, "nowhere"),
    "a folder without config": (["empty"], 66, "config.json"),
    "two methods": (["source", "--nf4", "--int8"], 2, "exclude each other"),
    "an unknown dtype": (["source", "--dtype", "float8"], 2, "bfloat16"),
    "an unknown compute dtype": (["source", "--compute-dtype", "int8"], 2, "bfloat16"),
    "double quant of int8": (["source", "--int8", "--double-quant"], 2, "4-bit"),
    "a pattern that is no pattern": (["source", "--skip", "layers.(0"], 2, "regular expression"),
    "a pattern of many digits": (["source", "--skip", "a{99999999999999}"], 2, "regular expression"),
    "a pattern of many brackets": (["source", "--skip", "(" * 3000 + ")" * 3000], 2, "regular expression"),
    "an existing output": (["source", "-o", "taken"], 73, "--overwrite"),
    "the output is the input": (["source", "-o", "source", "--overwrite"], 73, "overlap"),
    "the output is inside the input": (["source", "-o", "source/out"], 73, "overlap"),
    "a size that is no size": (["source", "--max-shard-size", "many"], 2, "5GB"),
    "an unknown device": (["source", "--device", "tpu"], 2, "cpu"),
    "a file as output": (["source", "-o", "file"], 73, "not a folder"),
    "a threshold that is none": (["source", "--int8", "--threshold", "nan"], 2, "threshold"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), REFUSALS.values(), ids=list(REFUSALS))
def test_wrong_use_gets_one_clear_message_the_documented_code_and_no_output(
    qz: Qz, source: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = folder_state(tmp_path)
    done = qz("quantize", *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 5
    assert done.stdout == ""
    assert folder_state(tmp_path) == before


def test_too_small_a_disk_is_found_before_any_work(qz: Qz, source: Path, tmp_path: Path) -> None:
    """The plan's size is compared with the free space: here through a checkpoint of holes larger than any disk."""
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": 2**40}
    (source / "config.json").write_text(json.dumps(config))
    from qz.formats.tensors.safetensors_layout import encode_header, layout

    infos = layout(
        (name, "BF16", (2**40, 64) if name in ("model.embed_tokens.weight", "lm_head.weight") else tuple(t.shape))
        for name, t in tensors_of(source).items()
    )
    header = encode_header(infos)
    size = len(header) + infos[-1].stop
    with (source / "model.safetensors").open("wb") as file:
        file.write(header)
        try:
            file.truncate(size)
        except OSError:
            pytest.skip("this file system has no files of 280 TB")
    done = qz("quantize", source, "-o", "out")
    assert done.returncode == 74, done.stderr
    assert "space" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_missing_and_misshapen_tensors_are_all_named_before_work(source: Path, tmp_path: Path) -> None:
    change_tensor(source, "model.layers.0.mlp.up_proj.weight", lambda tensor: None)
    change_tensor(source, "model.norm.weight", lambda tensor: tensor[:7].contiguous())
    with pytest.raises(MalformedInput) as refused:
        quantized(source, tmp_path / "out", "nf4")
    assert "missing: model.layers.0.mlp.up_proj.weight" in str(refused.value)
    assert "model.norm.weight is (7,), not (64,)" in str(refused.value)


def test_a_class_that_is_not_installed_is_refused_with_what_to_do(source: Path) -> None:
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["LlamaForMindReading"]}
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(Unsupported, match=r"has no class LlamaForMindReading.*never run.*pip install -U 'transformers"):
        plan_of(source, "nf4")


def test_a_quantized_source_is_refused_and_told_how_to_go_back(source: Path, tmp_path: Path) -> None:
    quantized(source, tmp_path / "once", "nf4")
    with pytest.raises(Unsupported, match=r"already quantized with bitsandbytes.*qz dequantize"):
        plan_of(tmp_path / "once", "int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_with_tensor_count_and_place(
    source: Path, tmp_path: Path, value: float
) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = tensor[60, 1] = value
        return tensor

    change_tensor(source, "model.layers.1.mlp.up_proj.weight", spoil)
    with pytest.raises(
        MalformedInput,
        match=rf"{source}: \S+layers\.1\.mlp\.up_proj\.weight contains 2 NaN or infinite values, first at \[3, 5\]",
    ):
        quantized(source, tmp_path / "out", "nf4")
    assert not (tmp_path / "out").exists()


def test_keep_nonfinite_leaves_such_weights_alone_and_the_result_loads(source: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 0] = float("nan")
        return tensor

    change_tensor(source, "model.layers.1.mlp.up_proj.weight", spoil)
    summary = quantized(source, tmp_path / "out", "nf4", keep_nonfinite=True)
    assert "model.layers.1.mlp.up_proj" in summary.skipped
    name = "model.layers.1.mlp.up_proj.weight"
    assert raw(tensors_of(tmp_path / "out")[name]) == raw(tensors_of(source)[name])
    LlamaForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")


def test_bfloat16_beyond_float16_is_refused_for_int8_only(source: Path, tmp_path: Path) -> None:
    def enlarge(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 2] = 1e6
        return tensor

    change_tensor(source, "model.layers.0.mlp.up_proj.weight", enlarge)
    quantized(source, tmp_path / "nf4", "nf4")
    with pytest.raises(MalformedInput, match="beyond float16's range"):
        quantized(source, tmp_path / "int8", "int8")


def test_tied_weights_are_tied_only_if_the_stored_ones_are_equal(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "one")
    file = tmp_path / "one" / "model.safetensors"
    tensors = load_file(file)
    for name, head in (("equal", 0.0), ("different", 1.0)):
        shutil.copytree(tmp_path / "one", tmp_path / name)
        both = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + head}
        save_file(both, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        transformers_model(type(model), tmp_path / name, "nf4").save_pretrained(tmp_path / f"{name}-reference")
        quantized(tmp_path / name, tmp_path / f"{name}-out", "nf4")
        assert differing_files(tmp_path / f"{name}-reference", tmp_path / f"{name}-out") == []
    assert "lm_head.weight" not in tensors_of(tmp_path / "equal-out")
    assert "lm_head.weight" in tensors_of(tmp_path / "different-out")


def test_default_skips_of_tied_weights_cannot_be_taken_away(tmp_path: Path, source: Path) -> None:
    llama(tied=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(UsageError, match="tied"):
        plan_of(tmp_path / "tied", "nf4", default_skips=False)
    plan = plan_of(source, "nf4", default_skips=False)
    assert any(weight.name == "lm_head.weight" for weight in plan.quantized)


def test_tensors_that_the_class_does_not_use_are_left_out_and_said(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors") | {"extra.position_ids": torch.arange(4)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    summary = quantized(source, tmp_path / "out", "nf4")
    assert summary.dropped == ("extra.position_ids",)
    assert any("extra.position_ids" in warning for warning in summary.warnings)


def test_where_transformers_would_merge_packed_weights_the_models_own_names_are_used(tmp_path: Path) -> None:
    """Dinov2's SwiGLU: one stored tensor, two linears. transformers saves what it cannot load; qz's output loads."""
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes, use_swiglu_ffn=True)).save_pretrained(tmp_path / "source")
    expected = transformers_model(Dinov2Model, tmp_path / "source", "nf4").state_dict()
    summary = quantized(tmp_path / "source", tmp_path / "out", "nf4")
    loaded, info = Dinov2Model.from_pretrained(tmp_path / "out", device_map="cpu", output_loading_info=True)
    assert not any(info.values())
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(raw(found[name]) == raw(expected[name]) for name in expected)
    assert any("own parameter names" in note for note in summary.notes)


def test_llama4_is_refused_because_transformers_cannot_load_what_it_saves() -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "intermediate_size_mlp": 128, "head_dim": 16}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **counts, vocab_size=100, max_position_embeddings=512))
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with pytest.raises(Unsupported, match="Llama4TextExperts"):
            plan_of(Path(folder), "nf4")


@pytest.mark.parametrize("method", ["nf4", "nf4-double", "int8"])
def test_the_bytes_do_not_depend_on_threads_or_chunks(tmp_path: Path, method: str, monkeypatch: Any) -> None:
    build("whisper").save_pretrained(tmp_path / "source")
    many: dict[str, Any] = {"max_shard_bytes": 20_000}  # of which eight threads fill several at a time
    quantized(tmp_path / "source", tmp_path / "one", method, threads=1, **many)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 4
    for threads in (2, 4, 8):
        out = tmp_path / f"threads-{threads}"
        quantized(tmp_path / "source", out, method, threads=threads, **many)
        assert differing_files(tmp_path / "one", out) == []


class SlowHub(LocalFolder):
    """Reads of weights wait, as for a Hub that does not answer, until the run gives up; one of them fails at once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.planned = self.given_up = False
        self.released = threading.Event()
        self.waiting = threading.Event()

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        if self.planned and not self.waiting.is_set():
            self.waiting.set()
            self.given_up = self.released.wait(60)
            raise HubUnreachable("no answer")
        if self.planned:
            raise IOFailed("the disk is full")
        super().read_into(file, offset, buffer)

    def give_up(self) -> None:
        self.released.set()


def test_readers_that_wait_give_up_as_soon_as_another_one_fails(tmp_path: Path, source: Path) -> None:
    with closing(SlowHub(source)) as folder:
        settings = Settings(FourBit("nf4"), device="cpu", threads=2)
        plan = plan_quantization(open_checkpoint(folder), settings)
        folder.planned = True
        with pytest.raises(IOFailed, match="the disk is full"):
            carried_out(plan, tmp_path / "out", settings)
    assert folder.given_up
    assert not (tmp_path / "out").exists()


def test_a_failed_worker_is_told_to_whoever_waits_once() -> None:
    workers, told, released = Workers(), [], threading.Event()

    def fails() -> None:
        raise IOFailed("the disk is full")

    def give_up() -> None:
        told.append("given up")
        released.set()

    def waits() -> None:
        released.wait(60)

    for _ in range(2):
        workers.begin(waits)
    workers.begin(fails)
    workers.wait(on_error=give_up)
    assert told == ["given up"]
    assert [str(error) for error in workers.errors] == ["the disk is full"]
