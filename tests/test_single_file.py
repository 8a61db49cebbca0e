"""One file in original names gives what diffusers' ``from_single_file`` and bitsandbytes make of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel, SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from commands import run
from conftest import Qz
from covering import in_turn
from hub_server import HubServer, connected
from original_names import ltx_model, ltx_names, sd3_model, sd3_names, single_file
from pushes import hurry
from qz import (
    HubUnreachable,
    MalformedInput,
    MissingInput,
    OutputRefused,
    PermissionRefused,
    Unsupported,
    UsageError,
    api,
)
from qz.cli.commands.dequantize import dequantize
from qz.cli.commands.quantize import quantize
from qz.cli.commands.verify import verify
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.single_files.configs import denoiser_config
from reference import differing_tensors

MODELS: dict[str, tuple[Any, Callable[[], Any], Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]]] = {
    "SD3": (SD3Transformer2DModel, sd3_model, sd3_names),
    "LTX": (LTXVideoTransformer3DModel, ltx_model, ltx_names),
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A class of diffusers, a model of it as a folder, and the same in one file in its original names."""
    model_class, make, renamed = MODELS[request.param]
    return (model_class, *made(make, renamed, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made(sd3_model, sd3_names, tmp_path_factory.mktemp("sd3"))


def made(make: Callable[[], Any], renamed: Any, place: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    built = make().to(torch.bfloat16)
    built.save_pretrained(place / "folder")
    return place / "folder", single_file(renamed(built.state_dict()), place / "original.safetensors")


@pytest.mark.parametrize(
    ("options", "prefix"),
    in_turn([{}, {"double_quant": True}, {"int8": True}], ["", "model.diffusion_model."]),
    ids=str,
)
def test_a_single_file_gives_the_bytes_of_from_single_file(
    model: tuple[Any, Path, Path], prefix: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model_class, folder, file = model
    named = single_file(load_file(file), tmp_path / "comfy.safetensors", prefix)
    loaded = model_class.from_single_file(str(named), config=str(folder), torch_dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "loaded")
    run(quantize, tmp_path / "loaded", output=tmp_path / "wanted", **options)
    report = run(quantize, named, output=tmp_path / "made", config=str(folder), **options)
    assert differing_tensors(tmp_path / "wanted", tmp_path / "made") == []
    assert report["source"]["architecture"] == model_class.__name__
    assert report["left_out"] == report["warnings"] == []


def test_a_dry_run_of_a_single_file_is_exact_and_its_record_names_the_file(
    sd3: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, file = sd3
    planned = run(quantize, file, output=tmp_path / "made", config=str(folder), dry_run=True)
    done = run(quantize, file, output=tmp_path / "made", config=str(folder))
    assert planned["bytes"] == done["bytes"]
    about = json.loads((tmp_path / "made" / "qz.json").read_text())["about"]
    assert about["command"][:3] == ["qz", "quantize", "original.safetensors"]
    assert about["command"][-2:] == ["--config", "folder"]
    assert str(tmp_path.parent) not in json.dumps(about)
    assert run(quantize, file, output=tmp_path / "made", config=str(folder), if_exists="skip")["up_to_date"]
    with pytest.raises(OutputRefused, match="different settings"):
        run(quantize, file, output=tmp_path / "made", config=str(folder), int8=True, if_exists="skip")


def test_the_output_of_a_file_lies_beside_it_and_takes_nothing_of_its_neighbours(
    forked_qz: Qz, sd3: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, file = sd3
    here = tmp_path / "models"
    here.mkdir()
    (here / "sd3.safetensors").write_bytes(file.read_bytes())
    (here / "other.safetensors").write_bytes(b"not one")
    (here / "tokenizer.json").write_text("{}")
    done = forked_qz("quantize", "sd3.safetensors", "--config", folder, cwd=here)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (here / "sd3-nf4").iterdir()}
    assert written == {"config.json", "diffusion_pytorch_model.safetensors", "qz.json"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with connected(monkeypatch, tmp_path / "home", xet=False) as hub:
        yield hub


def test_a_file_of_a_repository_is_read_with_the_config_of_another(
    hub: HubServer, sd3: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, file = sd3
    hub.add("me/originals", {"split/sd3.safetensors": file, "split/other.safetensors": b"x"})
    hub.add("me/sd3", {"transformer/config.json": folder / "config.json"})
    report = run(quantize, "me/originals", output=tmp_path / "made", file="split/sd3.safetensors", config="me/sd3")
    assert report["left_out"] == []
    run(quantize, folder, output=tmp_path / "wanted")
    assert differing_tensors(tmp_path / "wanted", tmp_path / "made") == []


def test_without_a_config_the_one_that_diffusers_takes_is_named(
    sd3: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    _, video = made(ltx_model, ltx_names, tmp_path)
    with pytest.raises(HubUnreachable, match=r"diffusers/LTX-Video.* with --config"):
        run(quantize, video, output=tmp_path / "made")
    with pytest.raises(UsageError, match="--config says what a single file"):
        run(quantize, sd3[0], output=tmp_path / "made", config=str(sd3[0]))


def changed(file: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, path)
    return path


QKV = "joint_blocks.0.x_block.attn.qkv.weight"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.pop(QKV), Unsupported, "cannot be read as a SD3Transformer2DModel"),
        (lambda t: t.update({QKV: torch.ones(96, 64).bfloat16()}), MalformedInput, r"to_q.weight is \(32, 64\)"),
        (lambda t: t.update({"first_stage_model.x.weight": torch.ones(2)}), Unsupported, "holds a whole pipeline"),
        (lambda t: t.pop("x_embedder.proj.bias"), Unsupported, r"x_embedder\.proj\.bias"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(
    sd3: tuple[Path, Path], change: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    bad = changed(sd3[1], tmp_path / "bad.safetensors", change)
    with pytest.raises(error, match=words):
        run(quantize, bad, output=tmp_path / "made", config=str(sd3[0]))
    assert not (tmp_path / "made").exists()


def test_two_models_in_one_file_are_refused_as_such(sd3: tuple[Path, Path], tmp_path: Path) -> None:
    """One tensor twice, with and without ComfyUI's prefix; or some with it, and others without."""
    comfy = f"model.diffusion_model.{QKV}"
    twice = changed(sd3[1], tmp_path / "twice.safetensors", lambda t: t.update({comfy: t[QKV].clone()}))
    mixed = changed(sd3[1], tmp_path / "mixed.safetensors", lambda t: t.update({comfy: t.pop(QKV)}))
    for file in (twice, mixed):
        with pytest.raises(MalformedInput, match=f"several prefixes: .* such as '{comfy}'"):
            run(quantize, file, output=tmp_path / "made", config=str(sd3[0]))
    assert not (tmp_path / "made").exists()


def test_what_is_made_with_a_config_that_not_everyone_may_see_is_not_published_for_all(
    hub: HubServer, sd3: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, file = sd3
    hub.add("me/sd3", {"transformer/config.json": folder / "config.json"}, gated="auto")
    hub.add("me/open", {}, private=False)
    with pytest.raises(PermissionRefused, match="--public"):
        run(quantize, file, output=tmp_path / "made", config="me/sd3", push="me/open")
    run(quantize, file, output=tmp_path / "made", config="me/sd3", push="me/made")
    assert hub.repos["me/made"].private


def test_a_config_from_the_cache_is_told_of_and_does_not_say_who_may_see_it(
    hub: HubServer, sd3: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download

    hurry(monkeypatch)
    folder, file = sd3
    hub.add("me/sd3", {"transformer/config.json": folder / "config.json"}, gated="auto")
    snapshot_download("me/sd3")
    hub.fail("info", status=503, matching="me/sd3")
    report = run(quantize, file, output=tmp_path / "made", config="me/sd3")
    checked = run(verify, str(tmp_path / "made"), against=str(file), config="me/sd3")
    for told in (report, checked):
        assert any("from the Hub cache" in warning for warning in told["warnings"])
    with pytest.raises(HubUnreachable, match="me/sd3"):
        run(quantize, file, output=tmp_path / "sent", config="me/sd3", push="me/sent", public=True)


def test_nan_in_the_config_of_a_file_stays_as_it_is(tmp_path: Path) -> None:
    """As in every config.json of diffusers."""
    (tmp_path / "config.json").write_text('{"_class_name": "SD3Transformer2DModel", "scale": [NaN, -Infinity]}')
    scale = denoiser_config(LocalFolder(tmp_path))["scale"]
    assert math.isnan(scale[0])
    assert scale[1] == -math.inf


def test_tensors_that_the_model_has_no_use_for_are_named(sd3: tuple[Path, Path], tmp_path: Path) -> None:
    more = changed(sd3[1], tmp_path / "more.safetensors", lambda t: t.update({"model_ema.decay": torch.ones(1)}))
    report = run(quantize, more, output=tmp_path / "made", config=str(sd3[0]))
    assert any("model_ema.decay" in warning for warning in report["warnings"])


def test_what_is_no_model_of_diffusers_is_named(tmp_path: Path, sd3: tuple[Path, Path]) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(sd3[1].read_bytes()[:-10])
    with pytest.raises(MalformedInput, match=r"cut\.safetensors"):
        run(quantize, tmp_path / "cut.safetensors", config=str(sd3[0]), output=tmp_path / "made")
    with pytest.raises(Unsupported, match="cannot be read as a SD3Transformer2DModel"):
        run(quantize, tmp_path / "x.safetensors", config=str(sd3[0]), output=tmp_path / "made")
    with pytest.raises(Unsupported, match=r"no single file in which diffusers can tell the model.*--config"):
        run(quantize, tmp_path / "x.safetensors", output=tmp_path / "made")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(24, 8)}, tmp_path / "flux.safetensors")
    with pytest.raises(Unsupported, match=r"Black Forest Labs.*--config"):
        run(quantize, tmp_path / "flux.safetensors", output=tmp_path / "made")
    with pytest.raises(MissingInput, match=r"has no file 'none\.safetensors'"):
        run(quantize, tmp_path, file="none.safetensors", config=str(sd3[0]), output=tmp_path / "made")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_out_has_the_original_names_and_the_bytes_of_the_parts_one_after_the_other(
    sd3: tuple[Path, Path], prefix: str, tmp_path: Path
) -> None:
    folder, file = sd3
    named = single_file(load_file(file), tmp_path / "sd3.safetensors", prefix)
    planned = run(quantize, named, output=tmp_path / "made", config=str(folder), layout="single-file", dry_run=True)
    report = run(quantize, named, output=tmp_path / "made", config=str(folder), layout="single-file")
    assert [path.name for path in sorted((tmp_path / "made").iterdir())] == ["qz.json", "sd3-nf4.safetensors"]
    assert planned["bytes"] == report["bytes"]
    ours = load_file(tmp_path / "made" / "sd3-nf4.safetensors")
    read = api.inspect(tmp_path / "made" / "sd3-nf4.safetensors", consumers=["comfyui", "vllm"]).consumers
    assert [read["comfyui"].loads, read["vllm"].loads] == [True, False]
    run(quantize, folder, output=tmp_path / "parts")
    parts = load_file(tmp_path / "parts" / "diffusion_pytorch_model.safetensors")
    own = f"{prefix}joint_blocks.0.x_block.attn.qkv.weight"
    for suffix in ("", ".absmax"):
        three = [parts[f"transformer_blocks.0.attn.to_{each}.weight{suffix}"].flatten() for each in "qkv"]
        assert torch.equal(ours[own + suffix].flatten(), torch.cat(three))
    quantized = {name.partition(".weight.quant_state")[0] for name in ours if ".quant_state." in name}
    assert set(load_file(named)) == {n for n in ours if not n.endswith((".absmax", ".quant_map", "__nf4"))}
    for name, tensor in load_file(named).items():
        path = name.removesuffix(".weight")
        if path in quantized:
            state = {n.removeprefix(f"{name}."): t for n, t in ours.items() if n.startswith(f"{name}.")}
            weight = bitsandbytes.nn.Params4bit.from_prequantized(ours[name], state, device="cpu")
            again = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert weight.quant_state.shape == tensor.shape
            wanted = bitsandbytes.functional.quantize_4bit(tensor, quant_type="nf4")
            assert torch.equal(again, bitsandbytes.functional.dequantize_4bit(*wanted))
        else:
            assert torch.equal(ours[name], tensor)


def test_a_single_file_out_is_refused_where_no_tool_reads_it(sd3: tuple[Path, Path], tmp_path: Path) -> None:
    folder, file = sd3
    asked = {"output": tmp_path / "made", "config": str(folder), "layout": "single-file"}
    for method in ({"int8": True}, {"double_quant": True}):
        with pytest.raises(UsageError, match="without --double-quant"):
            run(quantize, file, **asked, **method)
    with pytest.raises(Unsupported, match="only some are quantized"):
        run(quantize, file, **asked, skip=["transformer_blocks.0.attn.to_q"])
    run(quantize, file, **(asked | {"output": tmp_path / "nf4"}))
    with pytest.raises(Unsupported, match=r"original-nf4\.safetensors is already quantized with bitsandbytes"):
        run(quantize, tmp_path / "nf4" / "original-nf4.safetensors", **asked)
    with pytest.raises(Unsupported, match=r"original\.safetensors is not quantized: there is nothing to dequantize"):
        run(dequantize, file, output=tmp_path / "made", config=str(folder))
    whole = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"]
    run(quantize, file, **asked, skip=whole)
    assert load_file(tmp_path / "made" / "original-nf4.safetensors")[QKV].dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["diffusers", "single-file"])
def test_what_a_single_file_becomes_is_verified_with_the_same_config(
    model: tuple[Any, Path, Path], layout: Any, tmp_path: Path
) -> None:
    _, folder, file = model
    api.quantize(file, tmp_path / "made", config=folder, layout=layout, device="cpu")
    config = shutil.copytree(folder, tmp_path / "config")
    how: dict[str, Any] = {"device": "cpu", "config": config}
    assert api.verify(tmp_path / "made", file, **how).intact
    assert api.verify(tmp_path / "made", file.parent, file=file.name, **how).intact
    with pytest.raises(UsageError, match=r"made from a single file.*--file"):
        api.verify(tmp_path / "made", folder, **how)
    with pytest.raises(UsageError, match=r"config in a folder.*--config"):
        api.verify(tmp_path / "made", file, device="cpu")
    [written] = (tmp_path / "made").glob("*.safetensors")
    data = written.read_bytes()
    written.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = api.verify(tmp_path / "made", file, **how).recomputed
    assert found is not None
    assert [(each.bytes, each.missing) for each in found.differences] == [(1, None)]
    (config / "config.json").write_text((config / "config.json").read_text() + "\n")
    with pytest.raises(UsageError, match="not the one that was used"):
        api.verify(tmp_path / "made", file, **how)
