"""Each consumer's reading of a checkpoint, from its own code: what it made of every weight, as values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as functional
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from real_consumers.wheels import fetch, functions, text
from reference import config_of, tensors_of

Values = dict[str, torch.Tensor]
CPU = torch.device("cpu")


def set_weight_attrs(tensor: torch.Tensor, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(tensor, name, value)


def targets(folder: Path) -> list[str]:
    """Paths of the layers that vLLM would build quantized: here, all linear ones of the class."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return [path for path, module in model.named_modules() if type(module) is torch.nn.Linear and path != "lm_head"]


def dequantized(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """The values of a weight by the state that a loader has for it: float32 scales a row are int8's."""
    if isinstance(state, torch.Tensor):
        values: torch.Tensor = functional.int8_vectorwise_dequant(weight, state)
        return values
    flat = functional.QuantState(
        absmax=state.absmax,
        shape=torch.Size([math.prod(state.shape)]),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
        offset=state.offset,
        state2=state.state2,
    )
    found: torch.Tensor = functional.dequantize_4bit(weight, flat).reshape(state.shape)
    return found


def generated(generator: Iterator[tuple[str, torch.Tensor]], states: dict[str, Any]) -> Values:
    """All that a loader's generator yields; what it has a state for as values."""
    taken = list(generator)
    return {name: dequantized(tensor, states[name]) if name in states else tensor for name, tensor in taken}


class _Plugin:
    """vllm-bnb-plugin's generators, with what they take from vLLM."""

    def __init__(self, wheels: Path, folder: Path) -> None:
        source = text(fetch("vllm-bnb-plugin", wheels), "bitsandbytes_loader.py")
        given = {
            "current_platform": SimpleNamespace(device_type="cpu"),
            "set_weight_attrs": set_weight_attrs,
            "RoutedExperts": torch.nn.ModuleDict,
            "torch": torch,
            "set_default_torch_dtype": nullcontext,
            "bnb_quantize_stream": nullcontext,
        }
        names = (
            "_is_8bit_weight_name", "_is_4bit_weight_name", "_quantized_8bit_generator", "_quantized_4bit_generator",
            "_dequantize_dq", "_fuse_moe_quant_states",
        )  # fmt: skip
        self.methods = functions(source, names, given, inside="BitsAndBytesModelLoader")
        self.folder, self.target_modules = folder, targets(folder)
        self.expert_params_mapping: list[tuple[str, str, int, str]] = []

    def __getattr__(self, name: str) -> Any:
        return self.methods[name].__get__(self)

    def _hf_weight_iter(self, *_: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
        return ((name, name, tensor.clone()) for name, tensor in tensors_of(self.folder).items())

    def read(self) -> tuple[Values, dict[str, Any]]:
        states: dict[str, Any] = {}
        eight = config_of(self.folder)["quantization_config"]["load_in_8bit"]
        generator = self._quantized_8bit_generator if eight else self._quantized_4bit_generator
        return generated(generator([], True, states), states), states


def vllm(wheels: Path, folder: Path) -> Values:
    """What vLLM would have in its parameters."""
    plugin = _Plugin(wheels, folder)
    values, states = plugin.read()
    config = AutoConfig.from_pretrained(folder)
    count = getattr(config, "num_experts", 0)
    if not count or not any(".experts." in name for name in states):
        return values
    plugin.expert_params_mapping = [
        ("", f"experts.{number}.{name}.", number, shard)
        for number in range(count)
        for shard, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    ]
    layers = [f"model.layers.{number}.mlp.experts" for number in range(config.num_hidden_layers)]
    model = SimpleNamespace(named_modules=lambda: [(name, torch.nn.ModuleDict()) for name in layers])
    fused = plugin._fuse_moe_quant_states(model, states)
    tensors = tensors_of(folder)
    for layer in layers:  # as BitsAndBytesMoEMethod._apply_4bit_dequnt reads the joined codes
        for kind, names in (("w13", ("gate_proj", "up_proj")), ("w2", ("down_proj",))):
            each = [f"{layer}.{number}.{name}.weight" for number in range(count) for name in names]
            joined = dequantized(torch.cat([tensors[name] for name in each]), fused[f"{layer}.{kind}_weight"])
            values |= dict(zip(each, joined.chunk(len(each)), strict=True))
    return values


def sglang(wheels: Path, folder: Path) -> Values:
    """What SGLang would have in its parameters; its code names the GPU, which is made the CPU here."""
    source = text(fetch("sglang", wheels), "srt/model_loader/loader.py").replace('device="cuda"', 'device="cpu"')
    names = (
        "_is_8bit_weight_name", "_is_4bit_weight_name", "_quantized_8bit_generator", "_quantized_4bit_generator",
    )  # fmt: skip
    given = {"set_weight_attrs": set_weight_attrs, "Dict": dict}
    methods = functions(source, names, given, inside="BitsAndBytesModelLoader")
    loader = SimpleNamespace(_hf_weight_iter=lambda *_: iter(tensors_of(folder).items()))
    for name in names:
        setattr(loader, name, methods[name].__get__(loader))
    states: dict[str, Any] = {}
    eight = config_of(folder)["quantization_config"]["load_in_8bit"]
    generator = loader._quantized_8bit_generator if eight else loader._quantized_4bit_generator
    return generated(generator([], True, states), states)


def invokeai(wheels: Path, folder: Path) -> Values:
    """The layers of InvokeAI, filled strictly."""
    wheel, config = fetch("invokeai", wheels), config_of(folder)
    eight = config["quantization_config"]["load_in_8bit"]
    namespace: dict[str, Any] = {}
    exec(text(wheel, "quantization/bnb_llm_int8.py" if eight else "quantization/bnb_nf4.py"), namespace)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        if eight:
            namespace["quantize_model_llm_int8"](model, modules_to_not_convert={"lm_head"})
        else:
            namespace["quantize_model_nf4"](model, modules_to_not_convert={"lm_head"}, compute_dtype=torch.bfloat16)
    model.load_state_dict(tensors_of(folder), strict=True, assign=True)
    values: Values = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "SCB" if eight else "quant_state", None)
        values[name] = dequantized(parameter.data, state) if state is not None else parameter.data
    return values


def unsloth(wheels: Path, folder: Path) -> Values:
    """Experts as unsloth puts them together, by its converters for checkpoints that have them one by one."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    source = text(fetch("unsloth-zoo", wheels), "temporary_patches/moe_utils_bnb4bit.py")
    names = ("_AUX_SUFFIXES", "_quantstate_absmax_fp32", "_bnb4bit_per_expert_conversions")
    given = {"bnb": bnb, "torch": torch, "Params4bit": bnb.nn.Params4bit, "_BNB_MAX_QUANTIZE_NUMEL": 1 << 31}
    module = functions(source, names, given)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    twins = module["_bnb4bit_per_expert_conversions"](get_model_conversion_mapping(model, None, None), None)
    tensors, values = tensors_of(folder), {}
    for twin in twins:
        [operation], [target] = twin.operations, twin.target_patterns
        for number in range(config.num_hidden_layers):
            given = {}
            for pattern in twin.source_patterns:
                name = f"model.layers.{number}.{pattern.removesuffix('$')}"
                each = [name.replace("*", str(expert)) for expert in range(config.num_experts)]
                if all(one in tensors for one in each):
                    given[pattern] = [tensors[one] for one in each]
            path = f"model.layers.{number}.{target}"
            made = operation.convert(given, model=model, full_layer_name=path, target_patterns=[target])[target]
            stack = dequantized(made.data.reshape(-1, 1), made.quant_state)
            for expert in range(config.num_experts):
                leaves = ["gate_proj", "up_proj"] if "gate_up" in target else ["down_proj"]
                for name, part in zip(leaves, stack[expert].chunk(len(leaves)), strict=True):
                    values[f"model.layers.{number}.mlp.experts.{expert}.{name}.weight"] = part
    return values
