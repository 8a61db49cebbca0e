"""Folders and checkpoints: what the libraries save is opened as they would, and what is wrong is said in full."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pace import HANG, stopwatch
from qz import IOFailed, MalformedInput, MissingInput, OutputRefused, Unsupported
from qz.formats.checkpoint.quantization.quantization_config import stated_quantization
from qz.formats.checkpoint.quantization.quantized import read_quantized
from qz.formats.checkpoint.survey import Checkpoint, open_checkpoint, survey, survey_file
from qz.formats.files.folder import Range
from qz.formats.files.local_folder import MAX_OPEN, LocalFolder
from qz.formats.files.promised import Promised
from qz.formats.json_files import dump_json, read_json
from qz.formats.output.preflight import check_output
from qz.formats.output.storage.disk import Disk
from qz.formats.source import open_source
from qz.formats.tensors.safetensors_layout import encode_header, layout


def write(path: Path, *names: str, size: int = 4) -> int:
    """A valid file of U8 tensors; returns the bytes of their data."""
    placed = layout([(name, "U8", (size,)) for name in names])
    path.write_bytes(encode_header(placed) + bytes(placed[-1].stop))
    return placed[-1].stop


def model(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    write(folder / "model.safetensors", *(names or ("a.weight",)))
    return folder


def holds_what_safetensors_reads(checkpoint: Checkpoint, folder: Path) -> bool:
    """Every tensor's bytes, by offset, against safe_open."""
    seen = set()
    for file in checkpoint.files:
        with safe_open(folder / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no dict
                tensor, stored = opened.get_tensor(name), checkpoint.tensors[name]
                data = bytearray(stored.nbytes)
                checkpoint.folder.read_into(stored.file, stored.offset, memoryview(data))
                assert stored.file == file
                assert tuple(tensor.shape) == stored.shape
                assert bytes(data) == bytes(
                    tensor.contiguous().reshape(-1).view(dtype=__import__("torch").uint8).numpy()
                )
                seen.add(name)
    return seen == set(checkpoint.tensors)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("https://huggingface.co/owner/FLUX.1", "owner/FLUX.1"),
        ("hf.co/owner/name/", "owner/name"),
        ("https://huggingface.co/owner/name/tree/main", "owner/name"),
        (
            "https://huggingface.co/owner/name/tree/refs%2Fpr%2F7/unet",
            "owner/name --revision refs/pr/7 --subfolder unet",
        ),
        ("https://huggingface.co/o/n/blob/main/q/x.gguf?download=true", "o/n --file q/x.gguf"),
        ("hf://owner/name", "owner/name"),
        ("owner/name@v1.0", "owner/name --revision v1.0"),
        ("owner/name/text_encoder", "owner/name --subfolder text_encoder"),
        ("owner/name/a file.safetensors", "owner/name --file 'a file.safetensors'"),
        ("https://example.com/owner/name", "USER/NAME"),
        ("./owner/name", "USER/NAME"),
    ],
)
def test_an_address_on_the_hub_is_told_as_the_options_that_name_it(typed: str, meant: str) -> None:
    with pytest.raises(
        MissingInput, match=re.escape(f"does not exist. Give a local folder, or a repository on the Hub as {meant}.")
    ):
        open_source(typed)


# Folders


def test_a_folder_lists_regular_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("four")
    (tmp_path / "inner").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("b.txt")
    (tmp_path / "outside").symlink_to("/etc/passwd")
    folder = LocalFolder(tmp_path)
    assert dict(folder.sizes()) == {"b.txt": 4, "link": 4}
    assert folder.subfolders() == ("inner",)


def test_a_folder_that_is_not_there_or_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingInput, match="nothing does not exist"):
        LocalFolder(tmp_path / "nothing")
    with pytest.raises(MalformedInput, match="file is not a folder"):
        LocalFolder(tmp_path / "file")


def test_many_threads_read_many_files_with_few_descriptors(tmp_path: Path) -> None:
    contents = {f"{place}.bin": random.Random(place).randbytes(5000) for place in range(3 * MAX_OPEN)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    folder = LocalFolder(tmp_path)
    before = len(os.listdir("/proc/self/fd"))

    def read(seed: int) -> bool:
        choose = random.Random(seed)
        name = choose.choice(sorted(contents))
        start = choose.randrange(5000)
        buffer = bytearray(choose.randrange(5000 - start + 1))
        folder.read_into(name, start, memoryview(buffer))
        return buffer == contents[name][start : start + len(buffer)]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(3000)))
    assert len(os.listdir("/proc/self/fd")) <= before + MAX_OPEN
    folder.check()
    folder.close()
    assert len(os.listdir("/proc/self/fd")) <= before, "fewer, if garbage of other tests held some"


def test_500_shards_open_within_64_descriptors(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", shards=500, tensors=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        assert len(open_checkpoint(LocalFolder(folder)).tensors) == 500
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files_is_not_called_a_missing_file(tmp_path: Path) -> None:
    model(tmp_path / "model")
    folder = LocalFolder(tmp_path / "model")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(IOFailed, match="too many open files"):
            open_checkpoint(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_ends_early_is_said_to(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(MalformedInput, match="x ends at byte 3, before byte 5"):
        LocalFolder(tmp_path).read_into("x", 1, memoryview(bytearray(4)))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/etc/passwd", "x\0"])
def test_only_plain_names_are_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(MalformedInput, match="not a plain file name"):
        LocalFolder(tmp_path).read_into(name, 0, memoryview(bytearray(1)))


@pytest.mark.parametrize("change", ["write", "truncate", "replace", "delete"])
def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, change: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abcd")
    (tmp_path / "never read").write_text("1")
    folder = LocalFolder(tmp_path)
    folder.sizes()
    folder.read_into("x", 0, memoryview(bytearray(2)))
    (tmp_path / "never read").write_text("2")
    folder.check()
    if change == "write":
        os.utime(path, ns=(0, 1))
    elif change == "truncate":
        os.truncate(path, 3)
    else:
        path.unlink()
    if change == "replace":
        path.write_bytes(b"abcd")
    kind, words = (MissingInput, "disappeared") if change == "delete" else (MalformedInput, "changed")
    with pytest.raises(kind, match=f"x {words} while it was read"):
        folder.check()


def test_a_file_that_changed_between_listing_and_opening_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abcd")
    folder = LocalFolder(tmp_path)
    folder.sizes()
    (tmp_path / "x").write_bytes(b"abcdef")
    with pytest.raises(MalformedInput, match="x changed"):
        folder.read_into("x", 0, memoryview(bytearray(2)))


def test_the_identity_of_a_folder_changes_with_the_files_that_are_read(tmp_path: Path) -> None:
    def identity() -> dict[str, Any]:
        folder = LocalFolder(tmp_path)
        folder.read_into("x", 0, memoryview(bytearray(1)))
        return folder.identity()

    (tmp_path / "x").write_bytes(b"abcd")
    first = identity()
    assert identity() == first == json.loads(json.dumps(first))
    (tmp_path / "log.txt").write_text("unrelated")
    shutil.copy2(tmp_path / "x", tmp_path / "restored")
    (tmp_path / "restored").rename(tmp_path / "x")  # another inode
    assert identity() == first
    (tmp_path / "x").write_bytes(b"abcde")
    assert identity() != first


def test_a_subfolder_is_opened_and_another_is_refused_with_what_there_is(tmp_path: Path) -> None:
    model(tmp_path / "transformer")
    (tmp_path / "vae").mkdir()
    (tmp_path / "up").symlink_to("/etc")
    folder = LocalFolder(tmp_path)
    inner = folder.subfolder("transformer")
    assert inner.location == f"{tmp_path}/transformer"
    assert list(inner.sizes()) == ["config.json", "model.safetensors"]
    with pytest.raises(MissingInput, match=r"no folder 'text_encoder'\. Folders there: transformer, vae"):
        folder.subfolder("text_encoder")
    for name in ("..", "up", "", "transformer/../..", "/etc"):
        with pytest.raises(MalformedInput, match="not a folder inside"):
            folder.subfolder(name)


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_in_the_hub_cache_may_link_to_its_blobs(tmp_path: Path, shared: bool) -> None:
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("0" * 40)
    model(snapshot / "transformer")
    blobs.mkdir()
    (tmp_path / "blobs").mkdir()
    weights = snapshot / "transformer" / "model.safetensors"
    weights.rename(blobs / "abc")
    if shared:
        (blobs / "abc").rename(tmp_path / "blobs" / "def")
        (blobs / "abc").symlink_to("../../blobs/def")
    weights.symlink_to("../../../blobs/abc")
    assert len(open_checkpoint(LocalFolder(snapshot).subfolder("transformer")).tensors) == 1
    assert len(open_checkpoint(LocalFolder(snapshot / "transformer")).tensors) == 1
    weights.unlink()
    weights.symlink_to("/etc/passwd")
    with pytest.raises(MalformedInput, match="leads out of the folder"):
        open_checkpoint(LocalFolder(snapshot / "transformer"))


def test_a_link_to_the_folder_itself_is_fine(tmp_path: Path) -> None:
    model(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert open_checkpoint(LocalFolder(tmp_path / "link")).folder.location == f"{tmp_path}/link"


@pytest.fixture
def shared_store(tmp_path: Path) -> Path:
    """A model whose every file is a link to one elsewhere, as on a cluster; beside it what is no such file."""
    model(tmp_path / "store")
    (tmp_path / "store/model.safetensors").rename(tmp_path / "store/weights-of-the-year.safetensors")
    (tmp_path / "secret").write_text("of the user")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").symlink_to(tmp_path / "store/config.json")
    (tmp_path / "model/model.safetensors").symlink_to(tmp_path / "store/weights-of-the-year.safetensors")
    (tmp_path / "model/tokenizer.json").symlink_to(tmp_path / "secret")
    (tmp_path / "model/component").symlink_to(tmp_path / "store")
    (tmp_path / "model/etc").symlink_to("/etc")
    return tmp_path / "model"


def test_links_that_the_owner_of_a_folder_made_are_followed(shared_store: Path) -> None:
    """But not to something of another name and kind."""
    folder = open_source(str(shared_store))
    assert set(folder.sizes()) == {"config.json", "model.safetensors"}
    assert folder.subfolders() == ("component",)
    assert len(open_checkpoint(folder).tensors) == 1
    assert folder.subfolder("component").location == f"{shared_store}/component"
    with pytest.raises(MalformedInput, match=r"'etc' is not a folder inside .*: it is a link to /etc"):
        folder.subfolder("etc")
    with pytest.raises(MalformedInput, match="leads out of the folder"):
        folder.read_into("tokenizer.json", 0, memoryview(bytearray(1)))


@pytest.mark.parametrize("sign", [".git", ".cache/huggingface", "../.git"])
def test_links_in_a_downloaded_folder_are_not(shared_store: Path, sign: str) -> None:
    (shared_store / sign).mkdir(parents=True)
    folder = open_source(str(shared_store))
    assert not folder.sizes()
    assert not [name for name in folder.subfolders() if not name.startswith(".")]
    with pytest.raises(MalformedInput, match="leads out of the folder"):
        folder.read_into("model.safetensors", 0, memoryview(bytearray(1)))
    with pytest.raises(MalformedInput, match=r"'component' is not a folder inside .*: it is a link"):
        folder.subfolder("component")


def test_what_a_source_links_to_is_not_written_over(shared_store: Path, tmp_path: Path) -> None:
    source = open_source(str(shared_store))
    for output in ("store", "store/inside", "model", "model/inside"):
        with pytest.raises(OutputRefused, match="overlap"):
            check_output(tmp_path / output, True, [source], Disk())
    check_output(tmp_path / "new", True, [source], Disk())


# What the libraries save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints as transformers and diffusers save them, by layout."""
    import torch
    from diffusers import FluxTransformer2DModel
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("saved")
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    llama = LlamaForCausalLM(config).to(torch.bfloat16)
    flux = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    for variant in (None, "fp16"):
        llama.save_pretrained(root / f"llama-{variant}", variant=variant)
        llama.save_pretrained(root / f"llama-{variant}-sharded", variant=variant, max_shard_size="50KB")
        flux.save_pretrained(root / f"flux-{variant}", variant=variant)
        flux.save_pretrained(root / f"flux-{variant}-sharded", variant=variant, max_shard_size="50KB")
    return root


@pytest.mark.parametrize("shards", ["", "-sharded"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(
    ("name", "library", "architecture"),
    [("llama", "transformers", "LlamaForCausalLM"), ("flux", "diffusers", "FluxTransformer2DModel")],
)
def test_what_the_libraries_save_is_opened_whole(
    saved: Path, name: str, library: str, architecture: str, variant: str | None, shards: str
) -> None:
    folder = saved / f"{name}-{variant}{shards}"
    checkpoint, problems = survey(LocalFolder(folder))
    assert checkpoint is not None
    assert [problem.kind for problem in problems] == (["variant-only"] if variant else [])
    assert (checkpoint.library, checkpoint.architecture, checkpoint.variant) == (library, architecture, variant)
    assert [f"{text}." for text in checkpoint.choices] == [problem.message for problem in problems]
    assert (checkpoint.index is not None) == bool(shards) == (len(checkpoint.files) > 1)
    assert list(checkpoint.files) == sorted(path.name for path in folder.glob("*.safetensors"))
    assert checkpoint.sizes == {file: (folder / file).stat().st_size for file in checkpoint.files}
    assert checkpoint.header_metadata == {key: {"format": "pt"} for key in checkpoint.files}
    assert [tensor.file for tensor in checkpoint.tensors.values()] == sorted(
        tensor.file for tensor in checkpoint.tensors.values()
    )
    assert holds_what_safetensors_reads(checkpoint, folder)
    assert open_checkpoint(LocalFolder(folder), variant).tensors == checkpoint.tensors


def test_which_of_two_layouts_is_taken_is_said(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "llama-None-sharded", tmp_path / "both")
    shutil.copy(saved / "llama-None" / "model.safetensors", folder)
    [choice] = open_checkpoint(LocalFolder(folder)).choices
    assert "has both model.safetensors and model.safetensors.index.json; model.safetensors is taken" in choice


def test_config_and_index_are_written_as_the_libraries_write_them(saved: Path) -> None:
    for path in [*saved.glob("*/config.json"), *saved.glob("*/*.index*.json")]:
        assert dump_json(read_json(path.read_bytes(), "x")) == path.read_bytes()


def test_a_variant_is_found_wherever_the_libraries_ever_put_it(saved: Path, tmp_path: Path) -> None:
    source = saved / "flux-fp16-sharded"
    for name in (
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.safetensors.fp16.index.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ):
        folder = tmp_path / name
        folder.mkdir()
        for path in source.iterdir():
            (folder / (name if "index" in path.name else path.name)).write_bytes(path.read_bytes())
        assert len(open_checkpoint(LocalFolder(folder), "fp16").files) > 1


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(saved: Path) -> None:
    with pytest.raises(MissingInput, match=r"no weights of the variant 'bf16'\. Variants there: fp16"):
        open_checkpoint(LocalFolder(saved / "llama-fp16"), "bf16")


def test_plain_weights_are_taken_before_a_variant(tmp_path: Path) -> None:
    write(model(tmp_path / "m") / "model.fp16.safetensors", "b.weight")
    assert list(open_checkpoint(LocalFolder(tmp_path / "m")).tensors) == ["a.weight"]
    assert list(open_checkpoint(LocalFolder(tmp_path / "m"), "fp16").tensors) == ["b.weight"]
    assert not open_checkpoint(LocalFolder(tmp_path / "m")).choices


QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("method", QUANTIZATIONS)
def test_what_transformers_quantizes_has_all_its_parts(
    saved: Path, tmp_path: Path, method: str, max_shard_size: str
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(**QUANTIZATIONS[method])
    quantized = AutoModelForCausalLM.from_pretrained(
        saved / "llama-None", quantization_config=settings, device_map="cpu"
    )
    quantized.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    checkpoint, problems = survey(LocalFolder(tmp_path))
    assert checkpoint is not None
    weights, found = read_quantized(checkpoint)
    assert (problems, found) == ((), ())
    linears = {name: module for name, module in quantized.named_modules() if hasattr(module, "quant_state")} or {
        name: module for name, module in quantized.named_modules() if "8bit" in type(module).__name__
    }
    assert {f"{name}.weight" for name in linears} == set(weights)
    for name, module in linears.items():
        weight = weights[f"{name}.weight"]
        assert weight.kind == ("nf4" if method == "double" else method)
        assert weight.shape == (module.out_features, module.in_features)
        assert weight.elements == module.out_features * module.in_features
        assert weight.double_quant == (method == "double")
        if method != "int8":
            state = module.weight.quant_state
            assert (weight.dtype, weight.blocksize) == (str(state.dtype).removeprefix("torch."), state.blocksize)
            assert weight.nested_offset == (state.offset.item() if method == "double" else None)
    one = next(iter(weights))
    part = next(part for part in weights[one].parts if "absmax" in part or part == "SCB")
    broken = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor != weights[one].parts[part]}
    _, found = read_quantized(replaced(checkpoint, broken))
    assert [problem.where for problem in found] == [f"'{one}'"]


def replaced(checkpoint: Checkpoint, tensors: dict[str, Any]) -> Checkpoint:
    import dataclasses

    return dataclasses.replace(checkpoint, tensors=tensors)


# What is wrong is said


def test_all_errors_come_at_once_in_four_lines(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", shards=9, tensors=2)
    for place in (2, 3, 4):
        (folder / f"model-0000{place}-of-00009.safetensors").unlink()
    (folder / "model-00005-of-00009.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "model-00006-of-00009.safetensors").write_bytes(b"")
    write(folder / "model-00007-of-00009.safetensors", "other")
    with pytest.raises(MalformedInput) as raised:
        open_checkpoint(LocalFolder(folder))
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{folder} has 7 problems:"
    assert "Git-LFS pointer" in lines[1]
    assert "model-00002-of-00009.safetensors is missing" in lines[2]
    assert "Likewise: model-00003-of-00009.safetensors, model-00004-of-00009.safetensors." in lines[2]
    assert lines[3].startswith("Also: empty-file (1), tensor-absent (2).")
    assert len(lines) == 4
    _, problems = survey(LocalFolder(folder))
    assert len(problems) == 8


def test_thousands_of_problems_of_one_kind_are_counted(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    write(folder / "s.safetensors", "a")
    weight_map = {"a": "s.safetensors"} | {f"layers.{place}": "s.safetensors" for place in range(5000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _, problems = survey(LocalFolder(folder))
    assert len(problems) == 201
    assert problems[-1].message == f"{folder} has 4,800 more problems of the kind tensor-absent."


def test_pickles_are_refused_with_the_command_that_converts_them(
    saved: Path, python_with_libraries: list[str], tmp_path: Path
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((saved / "llama-None" / "config.json").read_bytes())
    torch.save(LlamaForCausalLM.from_pretrained(saved / "llama-None").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(MalformedInput, match="can run code") as raised:
        open_checkpoint(LocalFolder(folder))
    _, _, command = str(raised.value).partition("python -c ")
    assert command.startswith('"import glob, torch; ')
    subprocess.run(
        [*python_with_libraries, "-c", command.strip('"')], cwd=tmp_path, check=True, capture_output=True, timeout=HANG
    )
    converted = open_checkpoint(LocalFolder(folder))
    assert set(converted.tensors) == set(open_checkpoint(LocalFolder(saved / "llama-None")).tensors)


@pytest.mark.parametrize("name", ["x$(true)", "x`true`", 'x"; true; "', "x'; true"])
def test_the_command_to_paste_holds_nothing_that_a_file_could_smuggle_in(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM; import os"]}))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MalformedInput) as raised:
        open_checkpoint(LocalFolder(folder))
    _, _, command = str(raised.value).partition("python -c ")
    assert "'FOLDER/pytorch_model*.bin'" in command
    assert "'FOLDER/model.safetensors'" in command
    assert not set(command.strip('"')) & set('$`"')
    assert "true" not in command


def test_a_pipeline_names_its_components(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for name in ("transformer", "vae"):
        (tmp_path / name).mkdir()
    with pytest.raises(MissingInput, match=r"--subfolder \(there are: transformer, vae\)"):
        open_checkpoint(LocalFolder(tmp_path))


LAYOUTS = {
    "FluxTransformer2DModel": "double_blocks.0.img_attn.qkv.weight",
    "SD3Transformer2DModel": "joint_blocks.0.x_block.attn.qkv.weight",
    "HunyuanVideoTransformer3DModel": "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",
    "ChromaTransformer2DModel": "distilled_guidance_layer.layers.0.in_layer.weight",
    "Flux2Transformer2DModel": "double_stream_modulation_img.lin.weight",
    "WanTransformer3DModel": "model.diffusion_model.blocks.0.self_attn.q.weight",
    "LTXVideoTransformer3DModel": "model.diffusion_model.patchify_proj.weight",
    "StableDiffusionPipeline": "model.diffusion_model.input_blocks.0.0.weight",
}


@pytest.mark.parametrize("loader", LAYOUTS)
def test_another_tools_layout_is_named_with_the_class_that_reads_it(loader: str, tmp_path: Path) -> None:
    also = (
        "double_blocks.1.img_attn.qkv.weight"
        if loader in ("ChromaTransformer2DModel", "Flux2Transformer2DModel")
        else "x"
    )
    write(tmp_path / "model.safetensors", also, LAYOUTS[loader])
    with pytest.raises(Unsupported, match=rf"diffusers' {loader}\.from_single_file\(\)"):
        open_checkpoint(LocalFolder(tmp_path))


def test_where_no_class_reads_a_layout_none_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", "model.diffusion_model.new_blocks.0.weight")
    with pytest.raises(Unsupported, match="Use a repository of this model in diffusers' layout"):
        open_checkpoint(LocalFolder(tmp_path))


def test_a_class_decides_before_names_do(tmp_path: Path) -> None:
    write(tmp_path / "diffusion_pytorch_model.safetensors", "double_blocks.0.img_attn.qkv.weight")
    (tmp_path / "config.json").write_text('{"_class_name": "JoyImageEditTransformer3DModel"}')
    open_checkpoint(LocalFolder(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(Unsupported, match="Black Forest Labs"):
        open_checkpoint(LocalFolder(tmp_path))


def test_a_shard_that_the_index_does_not_list_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model-00001-of-00001.safetensors", "a")
    write(tmp_path / "model-mtp-of-00005.safetensors", "mtp.weight")
    write(tmp_path / "model.fp16.safetensors", "a")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint, problems = survey(LocalFolder(tmp_path))
    assert checkpoint is not None
    assert checkpoint.unused == ("model-mtp-of-00005.safetensors",)
    assert [problem.where for problem in problems if problem.kind == "file-unused"] == [*checkpoint.unused]


def test_a_quantization_that_only_the_config_of_a_part_states_is_seen(tmp_path: Path) -> None:
    said = {"quantization_config": {"quant_method": "compressed-tensors"}}
    assert stated_quantization({"model_type": "llava", "text_config": said}) == said["quantization_config"]
    assert stated_quantization({"model_type": "llava", "text_config": {"vocab_size": 3}}) is None


def test_one_file_can_be_looked_at_by_itself(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", "a", "b")
    tensors, metadata, problems = survey_file(LocalFolder(tmp_path), "x.safetensors")
    assert (list(tensors), metadata, problems) == (["a", "b"], {"format": "pt"}, ())
    (tmp_path / "y.gguf").write_bytes(b"GGUF" + bytes(100))
    tensors, _, problems = survey_file(LocalFolder(tmp_path), "y.gguf")
    assert (tensors, [problem.kind for problem in problems]) == ({}, ["gguf"])


# A folder far away


class Remote:
    """A folder in memory that, as one far away does, is no LocalFolder."""

    location = "org/name@0000000"
    allow_pickle = False
    named_file: str | None = None
    only: str | None = None
    promised: Promised | None = None

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.reads: list[Range] = []

    def sizes(self) -> Mapping[str, int]:
        return {name: len(data) for name, data in self.files.items()}

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        if file not in self.files:
            raise MissingInput(f"{file} does not exist.")
        self.reads.append(Range(file, offset, offset + len(buffer)))
        buffer[:] = self.files[file][offset : offset + len(buffer)]

    def announce(self, ranges: Sequence[Range]) -> None: ...

    def is_verified(self, file: str) -> bool:
        return True

    def check(self) -> None: ...

    def identity(self) -> dict[str, Any]:
        return {}

    def include(self, name: str, files: Iterable[str]) -> None: ...

    def subfolder(self, name: str) -> Remote:
        return self

    def subfolders(self) -> Sequence[str]:
        return ()

    def give_up(self) -> None: ...

    def close(self) -> None: ...


def test_a_folder_far_away_is_read_once_a_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", shards=20, tensors=3)
    remote = Remote({path.name: path.read_bytes() for path in folder.iterdir()})
    checkpoint = open_checkpoint(remote)
    local = open_checkpoint(LocalFolder(folder))
    assert checkpoint.tensors == local.tensors
    assert list(checkpoint.tensors) == list(local.tensors)
    assert len(remote.reads) == 2 + 20


@pytest.mark.parametrize(
    ("location", "fetch", "place"),
    [
        ("org/name@0123456789ab", "hf download org/name --local-dir NEW && ", "NEW"),
        ("org/name@0123456789ab/text_encoder", "hf download org/name --local-dir NEW && ", "NEW/text_encoder"),
        ("org/name@0123456789ab/x'y", "", "FOLDER"),
    ],
)
def test_pickles_far_away_are_converted_from_there(location: str, fetch: str, place: str) -> None:
    remote = Remote({"config.json": b'{"model_type": "llama"}', "pytorch_model.bin": b""})
    remote.location = location
    with pytest.raises(MalformedInput) as raised:
        open_checkpoint(remote)
    assert f'use NEW: {fetch}python -c "' in str(raised.value)
    assert f"'{place}/pytorch_model*.bin'" in str(raised.value)
    assert f"'{place}/model.safetensors'" in str(raised.value)


def test_quant_states_far_away_are_read_together_or_only_some(saved: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    AutoModelForCausalLM.from_pretrained(
        saved / "llama-None", quantization_config=BitsAndBytesConfig(**QUANTIZATIONS["nf4"]), device_map="cpu"
    ).save_pretrained(tmp_path)
    remote = Remote({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    checkpoint = open_checkpoint(remote)
    remote.reads.clear()
    weights, problems = read_quantized(checkpoint)
    assert problems == ()
    assert len(remote.reads) < len(weights)
    some, problems = read_quantized(checkpoint, states=1)
    assert problems == ()
    assert [weight.elements for weight in some.values()] == [weight.elements for weight in weights.values()]
    assert sum(weight.shape is not None for weight in some.values()) == 1


# Speed


def sharded(folder: Path, shards: int, tensors: int, size: int = 4) -> Path:
    """A valid sharded checkpoint; large tensors are holes in the file."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    total = 0
    for shard in range(1, shards + 1):
        name = f"model-{shard:05}-of-{shards:05}.safetensors"
        placed = layout([(f"model.layers.{shard}.experts.{at}.weight", "BF16", (size,)) for at in range(tensors)])
        header = encode_header(placed)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + placed[-1].stop)
        weight_map.update((info.name, name) for info in placed)
        total += placed[-1].stop
    (folder / "config.json").write_text('{"model_type": "llama"}')
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_bytes(dump_json(index))
    return folder


def test_a_terabyte_in_500_shards_and_50000_tensors_is_surveyed_quickly(tmp_path: Path) -> None:
    terabyte = sharded(tmp_path / "terabyte", shards=500, tensors=100, size=10_000_000)
    with stopwatch() as watch:
        checkpoint, problems = survey(LocalFolder(terabyte))
        assert checkpoint is not None
        weights, more = read_quantized(checkpoint)
    assert watch.loops < 50
    assert (len(checkpoint.tensors), sum(checkpoint.sizes.values()) > 10**12) == (50_000, True)
    assert (weights, problems, more) == ({}, (), ())


def test_reading_a_checkpoint_imports_no_framework(tmp_path: Path) -> None:
    model(tmp_path / "model")
    code = f"""
import pathlib, sys
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.formats.checkpoint.quantization.quantized import read_quantized
read_quantized(open_checkpoint(LocalFolder(pathlib.Path({str(tmp_path / "model")!r}))))
heavy = ("torch", "numpy", "transformers", "diffusers", "huggingface_hub", "safetensors", "rich", "concurrent.futures")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG)
    assert done.stdout.strip() == "[]"
