"""FLUX-sized weights through qz and through diffusers, side by side on this machine's GPU, and the floor under both.

    python -m benchmarks.gpu make FOLDER           11.9 B random weights in bfloat16, three shards, 23.8 GB
    python -m benchmarks.gpu floor FOLDER OUTPUT   bytes over PCIe, page cache and disk, measured and added up
    python -m benchmarks.gpu phases FOLDER OUTPUT  where qz's own time goes
    python -m benchmarks.gpu compare FOLDER OUTPUT both, as whole processes, and their outputs tensor by tensor
    python -m benchmarks.gpu scaling FOLDER OUTPUT qz on 1, 2, 4 … GPUs of this host, and on its cores alone
    python -m benchmarks.gpu forward OUTPUT        a forward pass of what qz wrote, eager and compiled

Every command prints one JSON object per line. ``make --size llama-70b`` makes a language model of 141 GB instead, for
``scaling``; ``--size tiny`` a small FLUX, for a test of the script.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MB = 1 << 20
FLUX = {"guidance_embeds": True}
TINY = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "axes_dims_rope": [8, 12, 12],
    "guidance_embeds": True,
}
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "architectures": ["LlamaForCausalLM"],
}
SHARD_BYTES = {"flux": "10GB", "llama-70b": "5GB", "tiny": "200KB"}
WRITERS = 8
"""Shards that are made at a time: as many times 5 GB are in memory."""

DIFFUSERS = """
import sys, time
begun = time.perf_counter()
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
imported = time.perf_counter()
source, output, method = sys.argv[1:]
options = {"load_in_8bit": True} if method == "int8" else {
    "load_in_4bit": True, "bnb_4bit_quant_type": method, "bnb_4bit_compute_dtype": torch.bfloat16}
model = FluxTransformer2DModel.from_pretrained(
    source, quantization_config=BitsAndBytesConfig(**options), torch_dtype=torch.bfloat16)
torch.cuda.synchronize()
loaded = time.perf_counter()
model.save_pretrained(output)
print({"imports": imported - begun, "load": loaded - imported, "save": time.perf_counter() - loaded,
       "torch_peak": torch.cuda.max_memory_allocated()})
"""


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def rounded(seconds: float) -> float:
    return round(seconds, 2)


def skeleton(size: str, folder: Path) -> tuple[dict[str, Any], str]:
    """The tensors of a model without their values, and what its weight files are named after; its config is written."""
    from accelerate import init_empty_weights

    if size == "llama-70b":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**LLAMA_70B)
        config.save_pretrained(folder)
        with init_empty_weights():
            return LlamaForCausalLM(config).bfloat16().state_dict(), "model"
    from diffusers import FluxTransformer2DModel

    with init_empty_weights():
        model = FluxTransformer2DModel(**(FLUX if size == "flux" else TINY)).bfloat16()
    model.save_config(folder)
    return model.state_dict(), "diffusion_pytorch_model"


def make(arguments: argparse.Namespace) -> None:
    """Random weights like a trained model's, made on the GPU, in as many shards as diffusers would write."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state, stem = skeleton(arguments.size, folder)
    split = split_torch_state_dict_into_shards(
        state,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=SHARD_BYTES[arguments.size],
    )
    begun = time.perf_counter()

    def write(item: tuple[str, list[str]]) -> None:
        file, names = item
        maker = torch.Generator(device).manual_seed(len(names))
        tensors = {}
        for name in names:
            shape = state[name].shape
            values = torch.randn(shape, generator=maker, device=device, dtype=torch.float32)
            tensors[name] = values.mul_(0.02 if len(shape) > 1 else 0.1).to(torch.bfloat16).cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, split.filename_to_tensors.items()))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    say(
        made=str(folder),
        shards=len(split.filename_to_tensors),
        tensors=len(state),
        parameters=sum(tensor.numel() for tensor in state.values()),
        bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        seconds=rounded(time.perf_counter() - begun),
    )


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def pieces(paths: list[Path], length: int) -> Iterator[tuple[Path, int, int]]:
    for path in paths:
        size = path.stat().st_size
        yield from ((path, start, min(length, size - start)) for start in range(0, size, length))


def shared(work: Callable[[Any], None], items: Iterator[Any], threads: int) -> float:
    """Seconds that threads take to do all of the work."""
    lock = threading.Lock()

    def loop() -> None:
        while True:
            with lock:
                item = next(items, None)
            if item is None:
                return
            work(item)

    begun = time.perf_counter()
    workers = [threading.Thread(target=loop) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begun


def floor(arguments: argparse.Namespace) -> None:
    """What the bytes alone cost: read from the page cache, over PCIe, written, hashed, stored."""
    import torch

    folder, output, length = arguments.folder, arguments.output, 32 * MB
    source = sum(path.stat().st_size for path in shards_of(folder))
    local = threading.local()

    def buffer() -> torch.Tensor:
        if not hasattr(local, "buffer"):
            local.buffer = torch.empty(length, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        held: torch.Tensor = local.buffer
        return held

    opened = {path: os.open(path, os.O_RDONLY) for path in shards_of(folder)}

    def read(item: tuple[Path, int, int]) -> None:
        path, start, size = item
        os.preadv(opened[path], [memoryview(buffer().numpy())[:size]], start)

    for threads in (1, 4, 8, 12, 16):
        seconds = shared(read, pieces(shards_of(folder), length), threads)
        say(floor="read page cache into pinned", threads=threads, gb_per_s=rounded(source / seconds / 1e9))
    if torch.cuda.is_available():
        begun = time.perf_counter()
        pinned = torch.empty(512 * MB, dtype=torch.uint8, pin_memory=True)
        say(floor="pin 512 MB", seconds=round(time.perf_counter() - begun, 3))
        there = torch.empty(512 * MB, dtype=torch.uint8, device="cuda")
        for name, target, origin in (("host to device", there, pinned), ("device to host", pinned, there)):
            target.copy_(origin)
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(8):
                target.copy_(origin, non_blocking=True)
            torch.cuda.synchronize()
            say(floor=f"{name}, pinned", gb_per_s=rounded(8 * pinned.numel() / (time.perf_counter() - begun) / 1e9))
        del there
    output.mkdir(parents=True, exist_ok=True)
    total = arguments.megabytes * MB
    for threads, files in ((1, 1), (8, 1), (2, 2), (8, 4)):
        paths = [output / f"floor-{number}" for number in range(files)]
        descriptors = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for path in paths]
        for descriptor in descriptors:
            os.posix_fallocate(descriptor, 0, total // files)
        items = ((number % files, number // files * 8 * MB) for number in range(total // (8 * MB)))

        def write(item: tuple[int, int], descriptors: list[int] = descriptors) -> None:
            os.pwrite(descriptors[item[0]], memoryview(buffer().numpy())[: 8 * MB], item[1])

        written = shared(write, items, threads)
        begun = time.perf_counter()
        with ThreadPoolExecutor(files) as pool:
            list(pool.map(os.fsync, descriptors))
        synced = time.perf_counter() - begun
        say(
            floor="write page cache, then fsync",
            threads=threads,
            files=files,
            gb=round(total / 1e9, 2),
            write_gb_per_s=rounded(total / written / 1e9),
            with_fsync_gb_per_s=rounded(total / (written + synced) / 1e9),
        )
        for descriptor, path in zip(descriptors, paths, strict=True):
            os.close(descriptor)
            path.unlink()
    data = os.urandom(64 * MB)
    begun = time.perf_counter()
    hashlib.sha256(data).hexdigest()
    say(floor="sha256, one thread", gb_per_s=rounded(len(data) / (time.perf_counter() - begun) / 1e9))
    for descriptor in opened.values():
        os.close(descriptor)


PHASES = """
import json, sys, time
mark = last = time.perf_counter()
times = {}
def lap(name):
    global last
    now = time.perf_counter(); times[name] = round(now - last, 3); last = now
from pathlib import Path
from qz.quantize.compute import devices
from qz.quantize.libraries.importing import lean_imports; lap("import qz's first parts")
devices.prewarm_cuda("auto")
import torch; lap("import torch")
lean_imports.allow()
from qz.quantize.models.plan import plan_quantization
from qz.quantize.models.run import carry_out
from qz.quantize.settings import Settings
from qz.quantize.streaming.output.output_folders import Target
from qz.quantize.methods import FourBit, Int8
from qz.quantize.reports.summary import Source
from qz.quantize.streaming.run import Run
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.shards import shard_writer
from qz.formats.output.storage.disk import Disk
lap("import qz")
source, output, method = sys.argv[1:4]
disk = Disk(durable=sys.argv[5] == "fsync")
settings = Settings(Int8() if method == "int8" else FourBit(method), max_shard_bytes=int(float(sys.argv[4]) * 10**9))
checkpoint = open_checkpoint(LocalFolder(Path(source))); lap("open")
plan = plan_quantization(checkpoint, settings); lap("plan")
arithmetic = devices.arithmetic_on("auto"); lap("arithmetic_on")
def timed(cls, name):
    original = getattr(cls, name)
    def wrapped(self, *a, **k):
        begun = time.perf_counter()
        try: return original(self, *a, **k)
        finally:
            spent[name] = spent.get(name, 0) + time.perf_counter() - begun
            calls.append((name, begun, time.perf_counter()))
    setattr(cls, name, wrapped)
spent, calls = {}, []
operations = ["quantize_4bit", "quantize_int8", "cast", "buffer"]
shards = shard_writer.ShardWriter
for cls, names in ((LocalFolder, ["read_into"]), (type(arithmetic), operations), (shards, ["write", "finish"])):
    for name in names:
        if hasattr(cls, name) and not (cls.__name__ == "Cpu" and name == "buffer"): timed(cls, name)
sync = Disk.sync
def timed_sync(*a):
    begun = time.perf_counter(); sync(*a); spent["fsync"] = spent.get("fsync", 0) + time.perf_counter() - begun
Disk.sync = timed_sync
convert = Run.convert
def timed_convert(*a):
    begun = time.perf_counter(); convert(*a); times["of it convert"] = round(time.perf_counter() - begun, 3)
    times["of it until the last write"] = round(max(e for n, b, e in calls if n == "write") - begun, 3)
    times["shards completed"] = [[round(b - begun, 2), round(e - begun, 2)] for n, b, e in calls if n == "finish"]
Run.convert = timed_convert
target = Target(Path(output), overwrite=True, disk=disk)
summary = carry_out(plan, Source(source, None, None, "diffusers", "x"), target, settings)
lap("carry out")
times["whole"] = round(last - mark, 3)
print(json.dumps({"phases": times, "device": arithmetic.name, "threads": arithmetic.threads,
    "thread seconds": {k: round(v, 2) for k, v in spent.items()}}))
"""


def phases(arguments: argparse.Namespace) -> None:
    """The time of the parts of one run in one process, with the imports one by one."""
    command = [sys.executable, "-c", PHASES, str(arguments.folder), str(arguments.output), arguments.method]
    subprocess.run([*command, arguments.max_shard_size, "no fsync" if arguments.no_fsync else "fsync"], check=True)
    shutil.rmtree(arguments.output)


class Observer:
    """The largest anonymous memory of a process and the largest use of the GPU's while it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.anonymous, self.shared, self.gpu = process, 0, 0, 0
        self.handles: list[Any] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self.nvml = pynvml
            self.handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        except ImportError as error:  # no GPU: a test of this script
            say(no_gpu=str(error))
        self.idle = self.used()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def used(self) -> int:
        return sum(self.nvml.nvmlDeviceGetMemoryInfo(handle).used for handle in self.handles)

    def look(self) -> None:
        while self.process.poll() is None:
            try:
                lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            except (OSError, ProcessLookupError):
                break
            sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
            self.anonymous = max(self.anonymous, int(sizes.get("RssAnon", 0)) * 1024)
            self.shared = max(self.shared, int(sizes.get("RssShmem", 0)) * 1024)
            self.gpu = max(self.gpu, self.used() - self.idle)
            time.sleep(0.02)


def whole(name: str, command: list[str]) -> dict[str, Any]:
    """Run a command as a process of its own and say what it took."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = Observer(process)
    stdout, stderr = process.communicate()
    seconds = time.perf_counter() - begun
    if process.returncode:
        sys.exit(f"{name} failed with {process.returncode}:\n{stdout[-2000:]}\n{stderr[-4000:]}")
    facts = {
        "run": name,
        "seconds": rounded(seconds),
        "host_anonymous_gb": rounded(watch.anonymous / 1e9),
        "host_shared_gb": rounded(watch.shared / 1e9),
        "gpu_gb": rounded(watch.gpu / 1e9),
    }
    lines = stdout.strip().splitlines()
    if lines and lines[-1].startswith("{'imports'"):
        facts["parts"] = {key: round(value, 2) for key, value in ast.literal_eval(lines[-1]).items()}
    elif lines and lines[-1].startswith("{"):
        summary = json.loads(stdout)
        facts |= {"device": summary["device"], "inside": summary["seconds"], "bytes": summary["bytes"]}
    say(**facts)
    return facts


def compare(arguments: argparse.Namespace) -> None:
    """diffusers and qz in turn, from a warm cache; the best of each, and the outputs compared tensor by tensor.

    The first run of qz has to ask diffusers about the model, later ones remember what it said. diffusers does not wait
    for the disk, so ``--no-fsync`` is what compares with it.
    """
    method, theirs, ours = arguments.method, arguments.output / "diffusers", arguments.output / "qz"
    memory = arguments.output / "cache"
    os.environ["QZ_CACHE"] = str(memory)
    best: dict[str, float] = {}
    for _ in range(arguments.repeat):
        shutil.rmtree(memory, ignore_errors=True)
        for path in shards_of(arguments.folder):
            with path.open("rb") as file:
                while file.read(64 * MB):
                    pass
        runs = {
            "diffusers": [sys.executable, "-c", DIFFUSERS, str(arguments.folder), str(theirs), method],
        }
        common = [sys.executable, "-m", "qz", "quantize", str(arguments.folder), f"--{method}", "--json", "--quiet"]
        for number, size in enumerate(arguments.max_shard_size):
            command = [*common, "-o", str(ours), "--device", arguments.device, "--max-shard-size", size]
            if number == 0:
                runs[f"qz, shards of {size}, first"] = command
            runs[f"qz, shards of {size}"] = command
            runs[f"qz, shards of {size}, no fsync"] = [*command, "--no-fsync"]
        if arguments.only:
            runs = {name: command for name, command in runs.items() if name.startswith(arguments.only)}
        for name, command in runs.items():
            shutil.rmtree(theirs if name == "diffusers" else ours, ignore_errors=True)
            facts = whole(f"{name} {method}", command)
            best[name] = min(best.get(name, 1e9), facts["seconds"])
    if theirs.exists() and ours.exists():
        ratios = {name: rounded(best["diffusers"] / seconds) for name, seconds in best.items()}
        say(compare=method, best=best, ratios=ratios, **differences(theirs, ours))
    for path in (theirs, memory, *(() if arguments.keep else (ours,))):
        shutil.rmtree(path, ignore_errors=True)


def scaling(arguments: argparse.Namespace) -> None:
    """One conversion on 1, 2, 4 … GPUs, and on the CPU's cores, as whole processes; the plan is remembered."""
    import torch

    output = arguments.output / "qz"
    os.environ["QZ_CACHE"] = str(arguments.output / "cache")
    common = [
        sys.executable,
        "-m",
        "qz",
        "quantize",
        str(arguments.folder),
        f"--{arguments.method}",
        "--json",
        "--quiet",
    ]
    common += ["-o", str(output), *(["--no-fsync"] if arguments.no_fsync else [])]
    subprocess.run([*common, "--dry-run"], check=True, stdout=subprocess.DEVNULL)
    found = torch.cuda.device_count()
    counts = [2**power for power in range(found.bit_length()) if 2**power <= found]
    for _ in range(arguments.repeat):
        for count in (*counts, 0):
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(count or found)))
            shutil.rmtree(output, ignore_errors=True)
            whole(f"{count} GPUs" if count else "cores", [*common, "--device", "cuda" if count else "cpu"])
    shutil.rmtree(arguments.output)


def differences(one: Path, other: Path) -> dict[str, Any]:
    """How many tensors two checkpoints have, and which differ in name, dtype, shape or any byte."""
    import torch
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in shards_of(folder):
            opened: Any = safe_open(path, "pt")
            found.update(dict.fromkeys(list(opened.keys()), opened))
        return found

    first, second = tensors(one), tensors(other)

    def same(name: str) -> bool:
        mine, his = first[name].get_tensor(name), second[name].get_tensor(name)
        if (mine.dtype, mine.shape) != (his.dtype, his.shape):
            return False
        return torch.equal(mine.reshape(-1).view(torch.uint8), his.reshape(-1).view(torch.uint8))

    both = sorted(first.keys() & second.keys())
    with ThreadPoolExecutor(8) as pool:
        equal = list(pool.map(same, both))
    different = [name for name, good in zip(both, equal, strict=True) if not good]
    return {"tensors": len(both), "only_in_one": sorted(first.keys() ^ second.keys())[:5], "different": different[:5]}


def forward(arguments: argparse.Namespace) -> None:
    """Load with plain ``from_pretrained`` and run one step for a 1024 × 1024 image; its memory, eager and compiled."""
    import torch
    from diffusers import FluxTransformer2DModel

    begun = time.perf_counter()
    model = FluxTransformer2DModel.from_pretrained(arguments.output, torch_dtype=torch.bfloat16)
    config = model.config
    device = next(model.parameters()).device
    tokens, words = (4096, 512) if config.num_layers == 19 else (64, 16)
    inputs = {
        "hidden_states": torch.randn(1, tokens, config.in_channels),
        "encoder_hidden_states": torch.randn(1, words, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(words, 3),
    }
    inputs = {name: value.to(device, torch.bfloat16) for name, value in inputs.items()}
    say(
        loaded=str(arguments.output),
        seconds=rounded(time.perf_counter() - begun),
        footprint=model.get_memory_footprint(),
    )

    def timed(count: int) -> float:
        times = []
        for _ in range(count):
            begun = time.perf_counter()
            with torch.inference_mode():
                result = model(**inputs, return_dict=False)[0]
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        assert torch.isfinite(result).all()
        return sorted(times)[len(times) // 2]

    timed(1)
    eager = timed(5)
    say(
        forward="eager",
        seconds=round(eager, 4),
        torch_allocated_gb=rounded(torch.cuda.max_memory_allocated() / 1e9),
        torch_reserved_gb=rounded(torch.cuda.max_memory_reserved() / 1e9),
        finite=True,
    )
    if arguments.compile:
        begun = time.perf_counter()
        if arguments.compile == "blocks":
            model.compile_repeated_blocks(fullgraph=True)
        else:
            model.compile(fullgraph=True)
        timed(1)
        first = time.perf_counter() - begun
        say(forward=f"compiled ({arguments.compile}, fullgraph)", first=rounded(first), seconds=round(timed(5), 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (make, floor, phases, compare, scaling, forward):
        sub = commands.add_parser(command.__name__)
        sub.set_defaults(command=command)
        if command is not forward:
            sub.add_argument("folder", type=Path)
        if command is make:
            sub.add_argument("--size", choices=SHARD_BYTES, default="flux")
        else:
            sub.add_argument("output", type=Path)
        if command is floor:
            sub.add_argument("--megabytes", type=int, default=6144)
        if command in (phases, compare, scaling):
            sub.add_argument("--method", choices=("nf4", "fp4", "int8"), default="nf4")
        if command is phases:
            sub.add_argument("--max-shard-size", default="1", help="in GB, of 10^9 bytes")
        if command in (phases, scaling):
            sub.add_argument("--no-fsync", action="store_true")
        if command in (compare, scaling):
            sub.add_argument("--repeat", type=int, default=2)
        if command is compare:
            sub.add_argument("--only", choices=("diffusers", "qz"))
            sub.add_argument("--keep", action="store_true", help="keep what qz wrote")
            sub.add_argument("--device", default="auto")
            sub.add_argument("--max-shard-size", nargs="+", default=["1GB"])
        if command is forward:
            sub.add_argument("--compile", choices=("whole", "blocks"))
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()
