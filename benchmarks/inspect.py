"""``qz inspect``: CPU time of whole processes, and how often its rule for linear layers is right.

python -m benchmarks.inspect speed    qz --help, and qz inspect of FLUX.1-dev's size, of 560 NF4 weights, of 1 TB
python -m benchmarks.inspect rule     the rule against the libraries, on every class that has a default config
                                      (half an hour on one core; not part of ``make bench``)
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import flux, llama
from benchmarks.whole import QZ, any_of, run
from qz.formats.tensors.safetensors_layout import encode_header, layout

LAYERS = 250
HIDDEN = 12_288
RUNS = 7
MANY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def terabyte(folder: Path) -> Path:
    """A Llama of 250 layers in 500 shards, all holes: it takes no space."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    for layer in range(LAYERS):
        path, inner = f"model.layers.{layer}", 4 * HIDDEN
        attention = [(f"{path}.self_attn.{which}_proj.weight", "BF16", (HIDDEN, HIDDEN)) for which in "qkvo"]
        norms = [(f"{path}.{which}_layernorm.weight", "BF16", (HIDDEN,)) for which in ("input", "post_attention")]
        feed = [(f"{path}.mlp.{which}_proj.weight", "BF16", (inner, HIDDEN)) for which in ("gate", "up")]
        last = [("model.embed_tokens.weight", "BF16", (128_256, HIDDEN))] if layer == LAYERS - 1 else []
        halves: list[list[tuple[str, str, tuple[int, ...]]]] = [[*attention, *norms], [*feed, *last]]
        for number, entries in enumerate(halves):
            name = f"model-{2 * layer + number + 1:05d}-of-{2 * LAYERS:05d}.safetensors"
            placed = layout(entries)
            header = encode_header(placed)
            with (folder / name).open("wb") as file:
                file.write(header)
                file.truncate(len(header) + placed[-1].stop)
            weight_map |= {info.name: name for info in placed}
            total += placed[-1].stop
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def speed(place: Path) -> None:
    many, packed = llama(place / "llama-80-layers", MANY, 320), place / "llama-80-layers-nf4"
    if not packed.exists():
        run([*QZ, "quantize", str(many), "-o", str(packed), "-q"])
    inspect = [*QZ, "inspect"]
    cases: dict[str, tuple[list[str], float]] = {
        "FLUX.1-dev's transformer, 23.8 GB": ([*inspect, str(flux(place / "flux-holes", holes=True))], 0.3),
        "560 NF4 weights, each state read": ([*inspect, str(packed)], 0.3),
        "the same as JSON with every tensor": ([*inspect, str(packed), "--json", "--tensors"], 0.5),
        "500 shards, 1 TB": ([*inspect, str(terabyte(place / "terabyte-holes"))], 2.0),
    }
    for name, (command, target) in cases.items():
        run(command)
        seconds = sorted(run(command).cpu for _ in range(RUNS))
        print(
            f"{name:36} {statistics.median(seconds):.3f} s CPU ({seconds[0]:.3f} to {seconds[-1]:.3f}); "
            f"target {target:g} s",
            flush=True,
        )


class DiscardOutput:
    """A folder without files, for checkpoints that exist as headers only."""

    location = "a default config"

    def sizes(self) -> dict[str, int]:
        return {}


def rule() -> None:
    """Which weights are quantized, told by the rule, against what the class itself would have quantized."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for library, classes in (("diffusers", of_diffusers), ("transformers", of_transformers)):
        built = equal = close = 0
        for name, make in classes():
            try:
                off = disagreement(library, name, *make())
            except Exception as error:  # a class that has no usable default config
                print(f"  {name}: {type(error).__name__}", file=sys.stderr)
                continue
            built, equal, close = built + 1, equal + (off == 0), close + (off < 0.01)
            if off >= 0.01:
                print(f"  {name}: {off:.1%} of the parameters", flush=True)
            gc.collect()
        print(f"{library}: {built} classes, {equal} exactly right, {close} within 1 % of the parameters", flush=True)


def disagreement(library: str, name: str, model: Any, config: dict[str, Any], state: dict[str, Any]) -> float:
    """The share of the parameters about which the rule and the library disagree."""
    from qz.formats.checkpoint.survey import Checkpoint
    from qz.formats.tensors.decoded import StoredTensor
    from qz.quantize.inspection.estimate import METHODS
    from qz.quantize.inspection.linear_layers import values
    from qz.quantize.inspection.model import plain
    from qz.quantize.libraries.architecture import SAFETENSORS_NAMES, LoadRequest
    from qz.quantize.libraries.examine import examine

    del model
    tensors = {
        key: StoredTensor(key, SAFETENSORS_NAMES[str(each.dtype)[6:]], tuple(each.shape), "x", 0, each.nbytes)
        for key, each in state.items()
    }
    checkpoint = Checkpoint(DiscardOutput(), config, library, name, None, ("x",), {"x": 1}, tensors)  # type: ignore[arg-type]
    saved = examine(checkpoint, LoadRequest(METHODS["nf4"])).saved
    theirs = {source for each in saved if each.part for source in each.weight.sources}
    found = values(checkpoint.library, name, config, plain(checkpoint, {}))
    ours = {value.name for value in found if value.linear}
    total = sum(math.prod(each.shape) for each in tensors.values())
    return sum(math.prod(tensors[key].shape) for key in ours ^ theirs) / total


Maker = Callable[[], tuple[Any, dict[str, Any], dict[str, Any]]]


def of_diffusers() -> Iterator[tuple[str, Maker]]:
    import diffusers
    import torch
    from accelerate import init_empty_weights

    def build(name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        model_class = getattr(diffusers, name)
        with init_empty_weights():
            model = model_class().to(torch.bfloat16)
        return model, json.loads(model.to_json_string()), model.state_dict()

    for name in dir(diffusers):
        if name.endswith("Model") or name.startswith(("Autoencoder", "UNet", "VQ")):
            yield name, partial(build, name)


def of_transformers() -> Iterator[tuple[str, Maker]]:
    import torch
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from qz.quantize.libraries.transformers.internals import (
        get_model_conversion_mapping,
        remove_tied_weights_from_state_dict,
        revert_weight_conversion,
    )

    def build(name: str, model_type: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        config = CONFIG_MAPPING[model_type]()
        shrink(config)
        with torch.device("meta"):
            model = getattr(transformers, name)(config).to(torch.bfloat16)
        model._weight_conversions = get_model_conversion_mapping(model, None, None)
        ignored = set(model._keys_to_ignore_on_save or ())
        state = {key: tensor for key, tensor in model.state_dict().items() if key not in ignored}
        state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
        said = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [name], "dtype": "bfloat16"}
        return model, said, state

    found: dict[str, str] = {}
    for kind in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "TEXT_ENCODING", ""):
        mapping = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES" if kind else "MODEL_MAPPING_NAMES")
        for model_type, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, model_type)
    for name, model_type in found.items():
        yield name, partial(build, name, model_type)


def shrink(config: Any) -> None:
    """Four layers and eight experts are as good as more."""
    limits = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8}
    limits |= dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers"), 4)
    for key, most in limits.items():
        value = getattr(config, key, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            setattr(config, key, most)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:4]
    for value in list(vars(config).values()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            shrink(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", **any_of("speed", "rule"), default=["speed"])
    parser.add_argument("--place", type=Path, default=Path(".bench"))
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}", flush=True)
    arguments.place.mkdir(parents=True, exist_ok=True)
    # As installed: modules are compiled once, not at every start.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str((arguments.place / "bytecode").absolute())
    for what in arguments.what:
        if what == "rule":
            rule()
        else:
            speed(arguments.place)


if __name__ == "__main__":
    main()
