"""A text-to-image pipeline trained here: Stable Diffusion 3's classes, small, on the pictures of an emoji font.

No registry has the weights of a small text-to-image model. A Debian package has 1,391 pictures (Noto Color Emoji), and
Unicode has their names: a tenth of them is kept for tests. The autoencoder, both text encoders and the transformer are
trained from random weights, and the pipeline is saved in bfloat16. Minutes of a CPU.

    python -m benchmarks.emoji [--steps 3000] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import mse_loss, pad

from benchmarks import real_models

FOLDER = real_models.ROOT / "emoji"
PIXELS, TOKENS, WIDTH, TEXT_WIDTH = 16, 8, 128, 64
STEPS, BATCH = 3000, 16
NO_PROMPT = 0.1
"""Share of the pictures that are learned without their name, for guidance."""


def pictures() -> tuple[np.ndarray[Any, Any], list[str]]:
    """uint8[number, PIXELS, PIXELS, 3] on white, and their names in lower case."""
    kept = real_models.ROOT / "emoji.npz"
    if not kept.is_file():
        from PIL import Image, ImageDraw, ImageFont

        file = next(real_models.debian("fonts-noto-color-emoji").rglob("NotoColorEmoji.ttf"))
        font = ImageFont.truetype(str(file), 109)  # the one size that its bitmaps have
        rows, names = [], []
        for code in range(0x203C, 0x1FB00):
            name = unicodedata.name(chr(code), "")
            if not name or font.getbbox(chr(code))[2] < 100:
                continue
            image = Image.new("RGBA", (136, 136), "white")
            ImageDraw.Draw(image).text((0, 4), chr(code), font=font, embedded_color=True)
            small = np.asarray(image.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.LANCZOS))
            if small.min() < 255:
                rows.append(small)
                names.append(name.lower())
        np.savez_compressed(kept, pictures=np.stack(rows), names=np.array(names))
    found = np.load(kept)
    return found["pictures"], [str(name) for name in found["names"]]


def split(names: list[str]) -> tuple[list[int], list[int]]:
    """Which are trained on, and which are kept for tests."""
    order = list(range(len(names)))
    random.Random(0).shuffle(order)
    return order[len(order) // 10 :], order[: len(order) // 10]


def prompts() -> tuple[list[str], list[str]]:
    """Names for calibration, which the model has seen, and for tests, which it has not."""
    _, names = pictures()
    seen, unseen = split(names)
    return [names[each] for each in seen], [names[each] for each in unseen]


def tokenizer(names: list[str], folder: Path) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    trained.normalizer, trained.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    trained.train_from_iterator(
        names, trainers.BpeTrainer(vocab_size=1500, special_tokens=special, end_of_word_suffix="</w>")
    )
    model = json.loads(trained.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def untrained(words: Any) -> Any:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    def encoder(layers: int) -> Any:
        config = CLIPTextConfig(
            vocab_size=len(words), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=layers,
            num_attention_heads=4, projection_dim=TEXT_WIDTH, max_position_embeddings=TOKENS,
            bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )  # fmt: skip
        return CLIPTextModelWithProjection(config)

    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=PIXELS, patch_size=4, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=32,
            num_attention_heads=WIDTH // 32, joint_attention_dim=2 * TEXT_WIDTH, caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * TEXT_WIDTH, pos_embed_max_size=PIXELS // 4,
        ),
        vae=AutoencoderKL(
            block_out_channels=(16,), norm_num_groups=4, latent_channels=4, sample_size=PIXELS, use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=encoder(2), tokenizer=words, text_encoder_2=encoder(3), tokenizer_2=words,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def schedule(optimizer: Any, steps: int) -> Any:
    """A hundred steps up, then down to nothing along a cosine."""
    rate = lambda step: min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2  # noqa: E731
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def train_autoencoder(vae: Any, images: torch.Tensor, steps: int) -> torch.Tensor:
    """The pictures' latents, scaled; float32[number, 4, PIXELS, PIXELS]."""
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    rate = schedule(optimizer, steps)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (BATCH,), device=images.device)]
        posterior = vae.encode(batch).latent_dist
        loss = mse_loss(vae.decode(posterior.sample()).sample, batch) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    print(f"autoencoder: mean squared error {mse_loss(vae(images[:256]).sample, images[:256]):.4f}", flush=True)
    with torch.no_grad():
        latents = torch.cat([vae.encode(each).latent_dist.mode() for each in torch.split(images, 512)])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    return (latents - latents.mean()) / latents.std()


def embedded(pipeline: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline makes of token ids [number, TOKENS]: embeddings with zeros in T5's place, and pooled ones."""
    both = [each(ids, output_hidden_states=True) for each in (pipeline.text_encoder, pipeline.text_encoder_2)]
    states = torch.cat([each.hidden_states[-2] for each in both], dim=-1)
    return torch.cat([states, torch.zeros_like(states)], dim=1), torch.cat([each[0] for each in both], dim=-1)


def train_denoiser(pipeline: Any, latents: torch.Tensor, ids: torch.Tensor, nothing: torch.Tensor, steps: int) -> None:
    """Rectified flow: of (1 − σ) x + σ ε and σ to ε − x."""
    models = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    weights = [weight for model in models for weight in model.train().parameters()]
    optimizer = torch.optim.AdamW(weights, 5e-4, weight_decay=0.01, fused=True)
    rate, device, mean = schedule(optimizer, steps), latents.device, torch.zeros((), device=latents.device)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(latents), (BATCH,), device=device)
        words = torch.where((torch.rand(BATCH, device=device) < NO_PROMPT).unsqueeze(1), nothing, ids[chosen])
        sigma = torch.randn(BATCH, device=device).sigmoid().view(-1, 1, 1, 1)
        clean, noise = latents[chosen], torch.randn_like(latents[chosen])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            states, pooled = embedded(pipeline, words)
            found = pipeline.transformer(
                hidden_states=(1 - sigma) * clean + sigma * noise,
                timestep=1000 * sigma.flatten(),
                encoder_hidden_states=states,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        loss = mse_loss(found.float(), noise - clean)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rate.step()
        mean += loss.detach()
        if step % 500 == 0:
            print(f"denoiser, step {step}: loss {float(mean) / 500:.4f}", flush=True)
            mean.zero_()
    for model in models:
        model.eval()


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Each picture nine times, moved by a pixel in every direction; all of one move after those of the other."""
    padded = pad(images, (1, 1, 1, 1), value=1.0)
    return torch.cat([padded[..., y : y + PIXELS, x : x + PIXELS] for y in range(3) for x in range(3)])


def trained(device: str, steps: int = STEPS) -> Path:
    """The folder of the pipeline, which is trained if it is not there."""
    if (FOLDER / "model_index.json").is_file():
        return FOLDER
    torch.manual_seed(0)
    values, names = pictures()
    seen, _ = split(names)
    words = tokenizer([names[each] for each in seen], real_models.ROOT / "emoji-words")
    pipeline = untrained(words).to(device)
    images = torch.from_numpy(values[seen]).to(device).permute(0, 3, 1, 2) / 127.5 - 1
    encode = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    ids = words([names[each] for each in seen], **encode).input_ids.to(device).repeat(9, 1)
    with torch.enable_grad():
        latents = train_autoencoder(pipeline.vae, shifted(images), steps // 4)
        train_denoiser(pipeline, latents, ids, words([""], **encode).input_ids.to(device), steps)
    pipeline.to("cpu", torch.bfloat16).save_pretrained(FOLDER, max_shard_size="15MB")
    return FOLDER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the denoiser; a quarter as many before")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print(trained(options.device, options.steps))


if __name__ == "__main__":
    main()
