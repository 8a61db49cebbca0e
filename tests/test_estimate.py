"""The rule that tells linear layers by their names, against what the libraries themselves would quantize."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pipelines
import zoo
from converted import method_of, plan_of
from covering import in_turn
from qz.formats.checkpoint.pipeline import open_pipeline
from qz.formats.checkpoint.survey import Checkpoint, open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.formats.tensors.safetensors_layout import encode_header, layout
from qz.quantize.inspection.estimate import METHODS, estimate
from qz.quantize.inspection.families import CONV1D, DIFFUSERS_FLOAT32, FLOAT32, NEVER_QUANTIZED
from qz.quantize.inspection.linear_layers import TORCH_NAMES, Value, ties, values
from qz.quantize.inspection.model import inspect_model, plain, read_folder
from qz.quantize.inspection.report import Origin
from qz.quantize.libraries.architecture import LoadRequest
from qz.quantize.libraries.examine import examine
from qz.quantize.methods import FourBit
from qz.quantize.planning.components import choose

MODELS = [*zoo.TRANSFORMERS, *zoo.DIFFUSERS]
NAMES = {"nf4": "nf4", "nf4_double_quant": "nf4-double", "fp4": "fp4", "int8": "int8"}
BUFFERS = {
    "bert", "clip", "gemma3", "llama-fp32", "llama-odd", "llama-tied", "llama-untied", "mixtral", "qwen3-moe", "wan",
}  # fmt: skip
"""Models with buffers that no file holds (rotary frequencies, position ids), which the rule leaves out."""

DTYPES = {"wan": torch.bfloat16}
"""diffusers has no "auto"."""


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("zoo")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            zoo.build(name).save_pretrained(path)
        return path

    return folder


def by_rule(checkpoint: Checkpoint) -> tuple[Value, ...]:
    return values(checkpoint.library, checkpoint.architecture, checkpoint.config, plain(checkpoint, {}))


@pytest.mark.parametrize("name", MODELS)
def test_the_rule_takes_the_weights_that_the_library_takes(name: str, saved: Callable[[str], Path]) -> None:
    plan = plan_of(saved(name), "nf4")
    taken = {source for weight in plan.quantized for source in weight.sources}
    found = by_rule(plan.checkpoint)
    assert {value.name for value in found if value.linear} == taken
    dtypes = {saved.name: saved.weight.dtype for saved in plan.architecture.saved if saved.part in ("", "weight")}
    assert {value.name: TORCH_NAMES.get(value.dtype, "int64") for value in found} == dtypes


@pytest.mark.parametrize(("name", "key"), in_turn(MODELS, list(NAMES)))
def test_estimates_are_the_plans_figures(name: str, key: str, saved: Callable[[str], Path]) -> None:
    found = inspect_model(read_folder(LocalFolder(saved(name))), Origin(name, None, None))
    assert found.estimates is not None
    plan, guess = plan_of(saved(name), NAMES[key]), found.estimates[key]
    assert guess.bytes == sum(shard.size for shard in plan.shards)
    assert guess.quantized_parameters == sum(weight.count for weight in plan.quantized)
    missing = plan.architecture.footprint.after - guess.memory_footprint
    assert missing > 0 if name in BUFFERS else missing == 0
    assert not guess.exact
    before = plan.architecture.footprint.before
    assert found.memory_footprint == before - missing


@pytest.mark.parametrize("name", ["llama-tied", "t5-encoder", "gpt2", "mixtral", "whisper", "wan"])
def test_with_the_plan_every_figure_is_exact(name: str, saved: Callable[[str], Path]) -> None:
    found = inspect_model(read_folder(LocalFolder(saved(name))), Origin(name, None, None), plan=True)
    loaded = type(zoo.build(name)).from_pretrained(saved(name), torch_dtype=DTYPES.get(name, "auto"))
    assert found.memory_footprint == loaded.get_memory_footprint()
    assert found.memory_footprint_exact
    assert found.estimates is not None
    for key, method in NAMES.items():
        plan, figure = plan_of(saved(name), method), found.estimates[key]
        assert figure.bytes == sum(shard.size for shard in plan.shards)
        assert figure.memory_footprint == plan.architecture.footprint.after
        assert figure.exact


@pytest.mark.parametrize("name", zoo.TRANSFORMERS)
def test_ties_are_the_librarys(name: str, saved: Callable[[str], Path]) -> None:
    model = zoo.build(name)
    checkpoint = open_checkpoint(LocalFolder(saved(name)))
    found = ties(checkpoint.library, checkpoint.architecture, checkpoint.config, checkpoint.tensors)
    assert found == {new: old for new, old in model.all_tied_weights_keys.items() if new not in checkpoint.tensors}


def test_a_pipelines_components_are_estimated_like_single_models(tmp_path: Path) -> None:
    pipeline = open_pipeline(LocalFolder(pipelines.flux(tmp_path / "flux")))
    for choice in choose(pipeline, FourBit("nf4")):
        if choice.method is not None:
            checkpoint = choice.component.checkpoint
            assert checkpoint is not None
            architecture = examine(checkpoint, LoadRequest(method_of("nf4")))
            taken = {source for saved in architecture.saved if saved.part for source in saved.weight.sources}
            assert {value.name for value in by_rule(checkpoint) if value.linear} == taken
    pipeline.close()


def test_headers_of_huge_models_are_taken_from_a_sample_and_nearly_right() -> None:
    found = [Value(f"model.layers.{n}.mlp.up_proj.weight", "BF16", (64, 64), 8192, linear=True) for n in range(8000)]
    sampled = estimate(found, METHODS["nf4"], "transformers")
    halves = [estimate(found[start : start + 4000], METHODS["nf4"], "transformers") for start in (0, 4000)]
    assert sampled.bytes == pytest.approx(sum(half.bytes for half in halves), rel=0.01)
    assert sampled.memory_footprint == sum(half.memory_footprint for half in halves)


def test_odd_names_and_shapes_take_the_room_that_they_take_in_a_header() -> None:
    names = ["ä.weight", 'q"uote', "back\\slash", "scalar", "empty", "plain.weight"]
    shapes: list[tuple[int, ...]] = [(3, 5), (7,), (1, 1, 1), (), (0, 4), (10, 200)]
    found = [Value(name, "F32", shape, 4 * math.prod(shape)) for name, shape in zip(names, shapes, strict=True)]
    placed = layout((value.name, value.dtype, value.shape) for value in found)
    assert estimate(found, METHODS["nf4"], "diffusers").bytes == len(encode_header(placed)) + placed[-1].stop


def test_the_headers_of_several_shards_are_counted() -> None:
    found = [Value(f"layers.{n}.up.weight", "BF16", (20_000, 20_000), 800_000_000, linear=True) for n in range(40)]
    for method in METHODS.values():
        whole, data = (
            estimate(found, method, "diffusers"),
            sum(estimate([each], method, "diffusers").bytes for each in found),
        )
        assert whole.bytes > 5 * 10**9
        assert 0 < data - whole.bytes < 40 * 100


def test_what_is_said_of_families_is_what_the_libraries_say() -> None:
    """Names and modules in the tables exist as they are written there, in the installed versions."""
    import diffusers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for name, modules in DIFFUSERS_FLOAT32.items():
        listed = getattr(diffusers, name)._keep_in_fp32_modules
        assert set([listed] if isinstance(listed, str) else listed) == set(modules), name
    known = set(CONFIG_MAPPING_NAMES)
    assert {*NEVER_QUANTIZED, *FLOAT32} <= known
    assert {*CONV1D} <= known


def test_no_class_of_diffusers_that_keeps_modules_in_float32_is_forgotten() -> None:
    import diffusers

    forgotten = []
    for name in dir(diffusers):
        if not name.endswith(("Model", "ModelMixin")) or name in DIFFUSERS_FLOAT32:
            continue
        listed = getattr(getattr(diffusers, name, None), "_keep_in_fp32_modules", None)
        if listed:
            forgotten.append((name, listed))
    assert forgotten == []


def test_the_rule_needs_no_framework() -> None:
    code = (
        "import sys, qz.quantize.inspection.estimate, qz.quantize.inspection.model, qz.quantize.inspection.pipeline;"
        "print(sorted({'torch', 'transformers', 'diffusers', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
