"""No option is ignored: in each kind of run it changes something, or asks for what is so anyway, or is refused."""

from __future__ import annotations

import inspect as introspection
import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import run
from conftest import Qz
from original_names import sd3_model, sd3_names, single_file
from pipelines import flux
from qz import QzError, api
from qz.api.effects import NEEDS
from qz.cli.app import COMMANDS
from qz.cli.commands.quantize import quantize
from qz.cli.options.methods import MethodOptions
from qz.quantize.methods import Method
from test_api import OTHERWISE_NAMED

ALWAYS = {
    "": "source output original other folder repo_id against on_progress as_json quiet debug",
    "what is read": "subfolder allow_pickle file lora text tokens generate",
    "what is quantized": "method skip default_skips keep_nonfinite target_size max_loss dtype weights_only",
    "checked by Settings": "scores split_groups",
    "what is recorded": "hessians scores",
    "what is stated": "sign_key",
    "how it is written": "max_shard_bytes if_exists overwrite resume part fsync device threads push dry_run picture",
    "written besides": "page",
    "what is shown": "tensors pattern consumers sample measure_loss",
    "where it is pushed to": "branch create_pr replace message public subfolder",
}
"""Arguments that change something in every run of every command that has them and that is not in ``NEEDS``, or that ask
for what is so anyway, such as --allow-pickle where nothing is pickled."""
OF_METHODS = {"nf4", "fp4", "int8", "double_quant", "compute_dtype", "threshold"}
"""Checked by ``MethodOptions``."""


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_known_of_every_option_when_it_has_an_effect(command: str) -> None:
    always = {name for names in ALWAYS.values() for name in names.split()}
    needing = {need.argument for need in NEEDS if need.concerns(command)}
    function = getattr(import_module(f"qz.cli.commands.{command}"), command)
    options = {OTHERWISE_NAMED.get(each) or each for each in introspection.signature(function).parameters}
    assert options - OF_METHODS <= always | needing
    assert needing <= introspection.signature(getattr(api, command)).parameters.keys()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Path]:
    """One of each kind: a model, a pipeline, a single file, and a quantized model."""
    place = tmp_path_factory.mktemp("kinds")
    model = shutil.copytree(tiny_llama, place / "model")
    (model / "LICENSE").write_text("You may.\n")
    torch.manual_seed(0)
    built = sd3_model().to(torch.bfloat16)
    built.save_pretrained(place / "config")
    file = single_file(sd3_names(built.state_dict()), place / "original.safetensors")
    run(quantize, tiny_llama, output=place / "quantized")
    return {"model": model, "pipeline": flux(place / "flux"), "file": file, "quantized": place / "quantized"}


WITHOUT_EFFECT: dict[str, tuple[str, str]] = {
    "--threshold without int8": ("quantize model --threshold 5", "--threshold"),
    "--threshold of a pipeline without int8": (
        "quantize pipeline --threshold 5 --component transformer=fp4",
        "--threshold",
    ),
    "--threshold 6.0, the default": ("quantize model --threshold 6.0", "--threshold"),
    "--compute-dtype with int8": ("quantize model --int8 --compute-dtype fp16", "--compute-dtype"),
    "--compute-dtype bf16, the default": ("quantize model --int8 --compute-dtype bf16", "--compute-dtype"),
    "--double-quant with int8": ("quantize model --int8 --double-quant", "--double-quant"),
    "--compute-dtype, all components int8": (
        "quantize pipeline --int8 --component transformer=int8 --compute-dtype fp16",
        "--compute-dtype",
    ),
    "--scales, all components int8": (
        "quantize pipeline --scales search --component transformer=int8 --component text_encoder_2=int8",
        "--scales",
    ),
    "--revision of a folder": ("quantize model --revision main", "--revision"),
    "--revision of a folder to dequantize": ("dequantize quantized --revision main", "--revision"),
    "--revision of a folder to inspect": ("inspect model --revision main", "--revision"),
    "--revision of a folder to calibrate": ("calibrate model -o out.safetensors --revision main", "--revision"),
    "--revision of a folder to verify against": ("verify quantized --against model --revision main", "--revision"),
    "--download of a folder": ("quantize model --download", "--download"),
    "--download of a folder to dequantize": ("dequantize quantized --download", "--download"),
    "--variant of one file": ("quantize file --variant fp16", "--variant"),
    "--config of a folder": ("quantize model --config model", "--config"),
    "--config of a folder to dequantize": ("dequantize quantized --config model", "--config"),
    "--layout of a folder": ("quantize model --layout single-file", "--layout"),
    "--max-shard-size of one file": ("quantize file --layout single-file --max-shard-size 5GB", "--max-shard-size"),
    "--components of a model": ("quantize model --components transformer", "--components"),
    "--component of a model": ("quantize model --component transformer=nf4", "--component"),
    "--experts of a pipeline": ("quantize pipeline --experts", "--experts"),
    "--experts of a model without": ("quantize model --experts", "--experts"),
    "--weights-only of a pipeline": ("quantize pipeline --weights-only", "--weights-only"),
    "--skip in what is not quantized": ("quantize pipeline --skip vae/decoder", "--skip"),
    "--skip of nothing": ("quantize model --skip no_such_module", "--skip"),
    "--scores without a size": ("quantize model --scores s.safetensors", "--scores"),
    "--split-groups without a size": ("quantize model --split-groups", "--split-groups"),
    "--rounding gptq without Hessians": ("quantize model --rounding gptq", "--rounding"),
    "--public without --push": ("quantize model --public", "--public"),
    "--private without --push": ("dequantize quantized --private", "--private"),
    "--push-subfolder without --push": ("quantize model --push-subfolder x", "--push-subfolder"),
    "--push-only without --push": ("quantize model --push-only", "--push-only"),
    "--overwrite with --push-only": ("quantize model --push me/x --push-only --overwrite", "--overwrite"),
    "--public of a merge without --push": ("merge quantized --public", "--public"),
    "--against of a pipeline": ("dequantize pipeline --against model", "--against"),
    "--method without --scores": ("calibrate model -o out.safetensors --method fp4", "method"),
    "--hessians without a text": ("calibrate model -o out.safetensors --hessians", "--hessians"),
    "--tokens of a pipeline to calibrate": ("calibrate pipeline -o out.safetensors --tokens 9", "--tokens"),
    "--generate of a pipeline to calibrate": ("calibrate pipeline -o out.safetensors --generate", "--generate"),
    "--experts of a pipeline to calibrate": ("calibrate pipeline -o out.safetensors --experts", "--experts"),
    "--steps of a model that reads text": ("calibrate model -o out.safetensors --steps 3", "--steps"),
    "--steps of such a model to compare": ("compare model quantized --steps 3", "--steps"),
    "--resolution of a model that reads text": (
        "calibrate model -o out.safetensors --resolution 64x64",
        "--resolution",
    ),
    "--resolution of such a model to compare": ("compare model quantized --resolution 64x64", "--resolution"),
    "--seed of a model that reads text": ("calibrate model -o out.safetensors --seed 3", "--seed"),
    "--seed of such a model to compare": ("compare model quantized --seed 3", "--seed"),
    "--tokens of a pipeline to compare": ("compare pipeline pipeline --tokens 9", "--tokens"),
    "--subfolder of a file": ("inspect file --subfolder x", "--subfolder"),
    "--variant of a file": ("inspect file --variant fp16", "--variant"),
    "--plan of a file": ("inspect file --plan", "--plan"),
    "--verify of a file": ("inspect file --verify", "--verify"),
    "--filter of nothing": ("inspect model --filter *nothing*", "--filter"),
    "--sample without --against": ("verify quantized --sample 5%", "--sample"),
    "--importance without --against": ("verify quantized --importance file", "--importance"),
    "--allow-pickle without --against": ("verify quantized --allow-pickle", "--allow-pickle"),
    "--device without --against": ("verify quantized --device cpu", "--device"),
    "--statement with --against": ("verify quantized --against model --statement s.json", "--statement"),
    "--public-key with --against": ("verify quantized --against model --public-key k.pem", "--public-key"),
    "--revision of a folder to attest": ("attest quantized --source model --revision main", "--revision"),
    "--file without --against": ("verify quantized --file model.safetensors", "--file"),
    "--config without --against": ("verify quantized --config model", "--config"),
    "--lora without --against": ("verify quantized --lora lora.safetensors", "--lora"),
    "--no-resume without --against": ("verify quantized --no-resume", "--no-resume"),
    "--revision of no source": ("attest quantized --revision main", "--revision"),
    "--threads without --against": ("verify quantized --threads 2", "--threads"),
}


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(case: str, sources: dict[str, Path], tmp_path: Path, qz_here: Qz) -> None:
    """Usage, but for experts that a model does not have: that is unsupported."""
    command, named = WITHOUT_EFFECT[case]
    before = sorted(tmp_path.iterdir())
    ended = qz_here(*(sources.get(word, word) for word in command.split()))
    assert ended.returncode == (78 if case == "--experts of a model without" else 2), ended.stderr
    assert named in ended.stderr
    assert sorted(tmp_path.iterdir()) == before


NOT_TRIED = {
    "push",
    "if_exists",
    "overwrite",
    "threads",
    "importance",
    "rounding",
    "public",
    "push_subfolder",
    "push_only",
    "variant",
}
"""Of some command: they take a Hub or an importance file, or share a rule with a command that is tried."""


def test_every_need_is_tried_above() -> None:
    names = {"max_shard_bytes": "max_shard_size", "component_methods": "component", "measure_loss": "report"}
    tried = {
        (command.split()[0], named.strip("-").replace("-", "_").removeprefix("no_"))
        for command, named in WITHOUT_EFFECT.values()
    }
    needed = {(command, need.argument) for need in NEEDS for command in need.commands.split()}
    missing = {name for command, name in needed if (command, names.get(name, name)) not in tried}
    assert missing <= NOT_TRIED


SHOWN: dict[str, Any] = {
    "method": api.Int8(5.0), "skip": ["*proj*"], "dtype": "float32", "components": ["transformer"],
    "component_methods": {"text_encoder_2": api.Fp4()}, "scales": "search", "max_shard_bytes": 20_000,
    "layout": "single-file", "measure_loss": True, "experts": True, "weights_only": True, "subfolder": "transformer",
    "target_size": 100_000, "max_loss": 0.1, "variant": "fp16", "config": "model", "split_groups": True,
    "scores": "scores.safetensors", "rounding": "gptq", "revision": "main", "download": True, "public": True,
    "part": "1/2", "push_subfolder": "x", "push_only": True, "file": "model.safetensors", "lora": ["missing"],
}  # fmt: skip
"""Arguments whose effect the report of a dry run shows."""
AS_IT_IS = {
    ("file", "weights_only"): "a file has nothing beside it",
    ("model", "file"): "the folder has this one file, but it is read as another layout",
}


@pytest.mark.parametrize("kind", ["model", "pipeline", "file"])
def test_what_a_report_can_show_changes_it_or_is_refused(
    kind: str, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sources["file"].parent)

    base = {"config": "config"} if kind == "file" else {}

    def report(**options: Any) -> str:
        try:
            done = api.quantize(sources[kind], dry_run=True, device="cpu", **base | options).as_json()
        except QzError as error:
            return f"{type(error).__name__}: {error}"
        return json.dumps({name: value for name, value in done.items() if name not in ("seconds", "output")})

    plain = report()
    assert plain.startswith("{"), plain
    same = {name for name, value in SHOWN.items() if report(**{name: value}) == plain}
    assert same <= {name for of, name in AS_IT_IS if of == kind}


def test_settings_go_to_the_methods_that_have_them() -> None:
    options = MethodOptions(double_quant=True, compute_dtype="float16", threshold=5.0)
    options.require_method(["nf4", "int8"])
    assert options.method("nf4") == api.Nf4(double_quant=True, compute_dtype="float16")
    assert options.method("int8") == api.Int8(5.0)
    assert MethodOptions().method("fp4") == api.Fp4()


def test_a_method_that_no_component_takes_is_told(sources: dict[str, Path], tmp_path: Path) -> None:
    own = {"transformer": api.Nf4(), "text_encoder_2": api.Nf4()}

    def warnings(method: Method | None) -> str:
        done = api.quantize(
            sources["pipeline"], tmp_path / "o", method=method, component_methods=own, dry_run=True, device="cpu"
        )
        return " ".join(done.as_json()["warnings"])

    assert "no component took fp4" in warnings(api.Fp4())
    assert "no component took" not in warnings(api.Nf4()) + warnings(None)
