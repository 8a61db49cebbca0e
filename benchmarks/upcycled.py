"""A mixture of experts made here: SmolLM2-135M with each MLP copied into eight experts (Mixtral's class), then trained.

No registry has the weights of a small one. Each layer's experts start as its MLP with a little noise, its router at
random, two experts a token; attention and embeddings are SmolLM2's. The loss has Mixtral's term for even routing. The
text is of three kinds, and none that ``benchmarks.quality`` calibrates on or tries: five novels, fortunes, and the
docstrings of Python's standard library. It is saved in bfloat16. Minutes of a GPU, a day of a CPU.

    python -m benchmarks.upcycled [--steps 400] [--experts 8] [--batch 16] [--length 512] [--device cuda]

It ends with the perplexities beside SmolLM2's, the share of a layer's tokens that each expert gets, and how far apart
the experts are.
"""

from __future__ import annotations

import argparse
import ast
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import real_models
from benchmarks.emoji import schedule

FOLDER = real_models.ROOT / "upcycled"
NOISE = 0.05
"""Of the standard deviation of a weight, added to each expert."""
RATE, BALANCE, CHOSEN = 2e-4, 0.01, 2


def docstrings() -> str:
    """Of the standard library, those of more than a line."""
    found: list[str] = []
    for file in sorted(Path(os.__file__).parent.rglob("*.py")):
        if {"test", "tests", "site-packages", "dist-packages"}.isdisjoint(file.parts):
            nodes = ast.walk(ast.parse(file.read_bytes()))
            documented = (each for each in nodes if isinstance(each, ast.Module | ast.ClassDef | ast.FunctionDef))
            found += (ast.get_docstring(each) or "" for each in documented)
    return "\n\n".join(each for each in found if "\n" in each)


def training_text() -> str:
    novels = [each for each in real_models.novels() if "MANSFIELD PARK" not in each[:200]]
    files = sorted(real_models.debian("fortunes").glob("usr/share/games/fortunes/*.dat"))
    fortunes = [file.with_suffix("").read_text("utf-8", "replace").replace("\n%\n", "\n\n") for file in files]
    return "\n\n".join([*novels, *fortunes, docstrings()])


def upcycle(dense: Any, experts: int) -> Any:
    """SmolLM2 as a Mixtral, float32, on its device."""
    from transformers import MixtralConfig, MixtralForCausalLM

    known = MixtralConfig().to_dict().keys() - {"architectures", "model_type", "transformers_version"}
    same = {key: value for key, value in dense.config.to_dict().items() if key in known}
    mixed = {"num_local_experts": experts, "num_experts_per_tok": CHOSEN, "router_aux_loss_coef": BALANCE}
    config = MixtralConfig(**{**same, **mixed})
    with dense.device:
        model = MixtralForCausalLM(config)
    missing = model.load_state_dict(dense.state_dict(), strict=False).missing_keys
    assert all(".mlp." in name for name in missing), missing
    for source, target in zip(dense.model.layers, model.model.layers, strict=True):
        gate_up = torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight])
        both = ((target.mlp.experts.gate_up_proj, gate_up), (target.mlp.experts.down_proj, source.mlp.down_proj.weight))
        for parameter, weight in both:
            parameter.data.copy_(weight + NOISE * weight.std() * torch.randn_like(parameter))
    return model


def train(model: Any, rows: torch.Tensor, steps: int, batch: int) -> None:
    """On int64[number, length] token ids, in turn and shuffled again each time through."""
    optimizer = torch.optim.AdamW(model.train().parameters(), RATE, weight_decay=0.0, fused=True)
    rate, start, order = schedule(optimizer, steps), time.monotonic(), torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(rows))])
        chosen, order = rows[order[:batch]].to(model.device), order[batch:]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type != "cpu"):
            found = model(chosen, labels=chosen, output_router_logits=True, use_cache=False)
        optimizer.zero_grad()
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 50 == 0 or step in (1, steps):
            loss, routing = (float(each.detach()) for each in (found.loss, BALANCE * found.aux_loss))
            seconds = time.monotonic() - start
            print(f"step {step}: loss {loss:.3f}, of it routing {routing:.3f}; {seconds:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def perplexity(model: Any, rows: torch.Tensor) -> float:
    return float(torch.stack([model(row[None], labels=row[None]).loss for row in rows.to(model.device)]).mean().exp())


@torch.no_grad()
def shares(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """float64[layers, experts]: of what a layer's experts get of the rows."""
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts, dtype=torch.float64)
    for row in rows.to(model.device):
        for layer, logits in enumerate(model(row[None], output_router_logits=True).router_logits):
            chosen = logits.topk(CHOSEN).indices.flatten()
            counts[layer] += chosen.bincount(minlength=counts.shape[1]).cpu()
    return counts / counts.sum(1, keepdim=True)


def apart(model: Any) -> float:
    """The mean distance of the experts' weights from those of the layer's mean expert, relative to its norm."""
    found = []
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data):
            mean = weight.mean(0)
            found.append(((weight - mean).flatten(1).norm(dim=1) / mean.norm()).mean())
    return float(torch.stack(found).mean())


def trained(
    device: str, steps: int = 400, experts: int = 8, batch: int = 16, length: int = 512, tried: int = 48
) -> Path:
    """The folder of the model, which is trained if it is not there."""
    if (FOLDER / "config.json").is_file():
        return FOLDER
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(real_models.smollm2())
    dense = LlamaForCausalLM.from_pretrained(real_models.smollm2(), dtype=torch.float32, device_map=device)
    held_out = {"prose": real_models.prose(), "tech": real_models.jargon()}
    texts = {name: real_models.rows(tokenizer, text, length, tried) for name, text in held_out.items()}
    model = upcycle(dense, experts)
    model.set_experts_implementation("eager")
    rows, before = real_models.rows(tokenizer, training_text(), length), apart(model)
    print(f"{rows.numel():,} tokens of training text, {steps * batch * length:,} read", flush=True)
    for name, text in texts.items():
        print(f"{name}: perplexity of SmolLM2 {perplexity(dense, text):.1f}, untrained {perplexity(model, text):.1f}")
    with torch.enable_grad():
        train(model, rows, steps, batch)
    for name, text in texts.items():
        print(f"{name}: perplexity {perplexity(model, text):.1f}")
    for layer, each in enumerate(shares(model, torch.cat(list(texts.values())))):
        print(f"layer {layer}: share of the tokens, %: {' '.join(f'{100 * share:.1f}' for share in each)}")
    print(f"experts differ from their mean by {apart(model):.3f} of its norm, untrained {before:.3f}")
    tokenizer.save_pretrained(FOLDER)
    model.to("cpu", torch.bfloat16).save_pretrained(FOLDER)
    return FOLDER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--experts", type=int, default=8, help="of a layer")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--tried", type=int, default=48, help="sequences of each text that perplexities are of")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print(trained(options.device, options.steps, options.experts, options.batch, options.length, options.tried))


if __name__ == "__main__":
    main()
