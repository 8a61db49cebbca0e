"""What qz writes is what transformers writes: from_pretrained(quantization_config=…) + save_pretrained(), on CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from converted import matching, plan_of, quantized
from covering import in_turn
from forward import output_of
from reference import METHODS, differing_files, differing_tensors, transformers_model
from zoo import ODD, TRANSFORMERS, Saved

SHARDS = {"5GB": 5 * 10**9, "40KB": 40_000}
"""One shard, and many."""
ORDER = ("nf4", "int8", "fp4", "nf4-double")
"""One after the other, so that a test that loads what another compared finds the library's model made."""
CASES = in_turn(
    TRANSFORMERS,
    [(method, "auto", size) for size in SHARDS for method in ORDER],
    [(method, dtype, size) for dtype, size in zip(("float16", "bfloat16"), SHARDS, strict=True) for method in METHODS],
)


@pytest.fixture(params=TRANSFORMERS)
def model(request: pytest.FixtureRequest, models: Callable[[str], Saved]) -> tuple[Any, Path]:
    model_class, _, folder = models(request.param)
    return model_class, folder


@pytest.fixture(scope="module")
def loaded() -> Callable[..., Any]:
    """The library's quantized models by class, folder, method and dtype, each loaded once."""
    return cache(transformers_model)


@pytest.fixture
def theirs(model: tuple[Any, Path], loaded: Callable[..., Any]) -> Callable[[str, str], Any]:
    return partial(loaded, *model)


@pytest.mark.parametrize(("model", "method", "dtype", "size"), CASES, indirect=["model"])
def test_the_whole_folder_is_the_librarys_in_every_dtype_and_shard_size(
    model: tuple[Any, Path], theirs: Callable[[str, str], Any], method: str, dtype: str, size: str, tmp_path: Path
) -> None:
    _, source = model
    reference, output = tmp_path / "reference", tmp_path / "output"
    theirs(method, dtype).save_pretrained(reference, max_shard_size=size)
    summary = quantized(source, output, method, dtype=dtype, max_shard_bytes=SHARDS[size])
    if method == "nf4-double":
        # nested_offset's digits are not known before the weights are, so its JSON lies last in qz's files.
        assert differing_tensors(reference, output) == []
        assert "config.json" not in differing_files(reference, output)
    else:
        assert differing_files(reference, output) == []
    assert summary.footprint_after == theirs(method, dtype).get_memory_footprint()
    sizes = {path.name: path.stat().st_size for path in output.iterdir()}
    assert summary.bytes_output == sum(sizes.values()) - sizes["qz.json"]


SKIPS = [
    ("nf4", [r".*attn.*"]),
    ("nf4", [r".*mlp.*", "fc1"]),
    ("nf4", [r".*\.0\..*"]),
    ("nf4", ["layer.1.attention", "layers.1"]),
    ("int8", [r".*mlp.*", "fc1"]),
]


@pytest.mark.parametrize(
    ("model", "method", "skips"), in_turn(TRANSFORMERS, SKIPS[:2], SKIPS[2:]), indirect=["model"], ids=str
)
def test_skips_add_up_with_the_librarys_defaults(
    model: tuple[Any, Path], method: str, skips: list[str], tmp_path: Path
) -> None:
    model_class, source = model
    skips = matching(skips, source)
    if not skips:
        pytest.skip("matches no module of this model, which is an error of its own")
    plan = plan_of(source, method, skips=tuple(skips))
    reference, output = tmp_path / "reference", tmp_path / "output"

    written = plan.files["config.json"].decode()
    listed = json.loads(written)["quantization_config"]["llm_int8_skip_modules"]
    assert set(skips) < set(listed) or set(skips) == set(listed)
    transformers_model(model_class, source, method, skips=listed).save_pretrained(reference)
    quantized(source, output, method, skips=tuple(skips))
    assert differing_files(reference, output) == []


@pytest.mark.parametrize(("model", "method"), in_turn(TRANSFORMERS, ORDER), indirect=["model"])
def test_the_output_loads_without_naming_a_config_and_computes_the_same(
    model: tuple[Any, Path], theirs: Callable[[str, str], Any], method: str, tmp_path: Path
) -> None:
    model_class, source = model
    if source.name in ODD:
        pytest.skip("bitsandbytes cannot run it on every CPU")
    output = tmp_path / "output"
    summary = quantized(source, output, method)
    ours = model_class.from_pretrained(output, device_map="cpu")
    assert ours.get_memory_footprint() == summary.footprint_after
    assert torch.equal(output_of(ours), output_of(theirs(method, "auto")))


def test_sharded_sources_give_the_same_bytes(model: tuple[Any, Path], tmp_path: Path) -> None:
    model_class, source = model
    sharded = tmp_path / "sharded"
    model_class.from_pretrained(source).save_pretrained(sharded, max_shard_size="30KB")
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    quantized(source, tmp_path / "one", "nf4")
    quantized(sharded, tmp_path / "two", "nf4")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
