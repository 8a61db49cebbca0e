"""Folders that are no checkpoint, or a broken one: what to change in a good one, and the kinds of problem it then has.

A case is ``(base, changes, kinds)``. Changes are by file name: None deletes; bytes and text are the content; a dict is
JSON or, for a .safetensors file, tensors by name as ``(dtype, shape)`` that replace the ones there; a tuple is
``("fifo",)``, ``("socket",)``, ``("folder",)``, ``("link", target)``, ``("mode", octal)`` or ``("cut", bytes)``.
"""

from __future__ import annotations

W = ("F32", (2, 2))
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
MAP = {"a.weight": ONE, "b.weight": ONE, "c.weight": TWO}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BFL = "double_blocks.0.img_attn.qkv.weight"
GONE: dict[str, object] = {"config.json": None, "model.safetensors": None}
WEB = b"<!doctype html><html><body>404</body></html>"
FLUX = "diffusion_pytorch_model.safetensors"


def config(text: str | bytes, kind: str = "json-malformed") -> tuple[str, dict[str, object], tuple[str, ...]]:
    return "single", {"config.json": text}, (kind,)


def index(value: object, *kinds: str) -> tuple[str, dict[str, object], tuple[str, ...]]:
    return "sharded", {INDEX: value}, kinds


def shard(name: object, *kinds: str) -> tuple[str, dict[str, object], tuple[str, ...]]:
    return index({"weight_map": MAP | {"c.weight": name}}, *kinds)


Case = tuple[str, dict[str, object], tuple[str, ...]]
CASES: dict[str, Case] = {
    # Nothing is wrong
    "good: one file": ("single", {}, ()),
    "good: two shards": ("sharded", {}, ()),
    "good: diffusers": ("diffusers", {}, ()),
    "good: other files beside": ("single", {"README.md": "x", "tokenizer.json": "{}", "a.safetensors": {"x": W}}, ()),
    # config.json
    "config: missing": ("single", {"config.json": None}, ("config-missing",)),
    "config: empty": config(b""),
    "config: null": config("null"),
    "config: a list": config("[]"),
    "config: text": config('"llama"'),
    "config: a number": config("1"),
    "config: cut off": config('{"model_type": "lla'),
    "config: two objects": config('{"model_type": "llama"} {}'),
    "index: NaN": index('{"weight_map": NaN}', "json-malformed"),
    "index: Infinity": index('{"metadata": {"total_size": Infinity}}', "json-malformed"),
    "index: minus Infinity": index('{"metadata": {"total_size": -Infinity}}', "json-malformed"),
    "config: number beyond doubles": config('{"model_type": "llama", "x": 1e999}'),
    "config: number of 41 digits": config('{"model_type": "llama", "x": ' + "1" * 41 + "}"),
    "config: number of 100,000 digits": config('{"model_type": "llama", "x": ' + "1" * 100_000 + "}"),
    "config: key twice": config('{"model_type": "llama", "model_type": "bert"}'),
    "config: key twice inside": config('{"model_type": "llama", "x": [{"y": 1, "y": 1}]}'),
    "config: 65 lists deep": config('{"model_type": "llama", "x": ' + "[" * 65 + "]" * 65 + "}"),
    "config: 500 objects deep": config('{"x": ' * 500 + "1" + "}" * 500),
    "config: 100,000 lists deep": config('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "config: 100,000 open lists": config('{"x": ' + "[" * 100_000),
    "config: 100,001 lists": config('{"model_type": "llama", "x": [' + "[]," * 100_000 + "[]]}"),
    "config: 150,001 values": config('{"model_type": "llama", "x": [' + "1," * 150_000 + "1]}"),
    "config: 10 MB and more": config(b'{"model_type": "llama", "x": "' + b"x" * 10_000_000 + b'"}'),
    "config: not UTF-8": config(b'{"model_type": "ll\xe4ma"}'),
    "config: UTF-16": config('{"model_type": "llama"}'.encode("utf-16")),
    "config: byte order mark": config(b'\xef\xbb\xbf{"model_type": "llama"}'),
    "config: half a surrogate pair": config('{"model_type": "\\ud800"}'),
    "config: raw newline in text": config('{"model_type": "lla\nma"}'),
    "config: NUL bytes": config(bytes(100)),
    "config: single quotes": config("{'model_type': 'llama'}"),
    "config: comment": config('{"model_type": "llama"} // the model'),
    "config: comma at the end": config('{"model_type": "llama",}'),
    "config: web page": config(WEB),
    "config: pickle": config(b"\x80\x02}q\0."),
    "config: Git-LFS pointer": config(LFS, "git-lfs-pointer"),
    "config: no class": config("{}", "library-unknown"),
    "config: class is no text": config('{"model_type": 1, "architectures": [1], "_class_name": []}', "library-unknown"),
    "config: architectures is empty": config('{"architectures": []}', "library-unknown"),
    "config: auto_map": (
        "single",
        {"config.json": {"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}},
        ("custom-code",),
    ),
    "config: code beside": ("single", {"modeling_x.py": "raise SystemExit(1)\n"}, ("custom-code",)),
    "config: folder": ("single", {"config.json": ("folder",)}, ("not-a-file",)),
    "config: FIFO": ("single", {"config.json": ("fifo",)}, ("not-a-file",)),
    "config: link to itself": ("single", {"config.json": ("link", "config.json")}, ("unreadable",)),
    "config: link to nothing": ("single", {"config.json": ("link", "nothing.json")}, ("config-missing",)),
    "config: link out of the folder": ("single", {"config.json": ("link", "/etc/hostname")}, ("link-outside",)),
    "config: no permission": ("single", {"config.json": ("mode", "0")}, ("permission",)),
    # One weight file
    "weights: missing": ("single", {"model.safetensors": None}, ("weights-missing",)),
    "weights: under another name": (
        "single",
        {"model.safetensors": None, "mymodel.safetensors": {"x": W}},
        ("weights-missing",),
    ),
    "weights: diffusers' name under transformers": (
        "single",
        {"model.safetensors": None, FLUX: {"x": W}},
        ("weights-missing",),
    ),
    "weights: no tensors": ("single", {"model.safetensors": {"a.weight": None, "b.weight": None}}, ("no-tensors",)),
    "weights: cut off in the data": ("single", {"model.safetensors": ("cut", "1")}, ("truncated",)),
    "weights: cut off in the header": ("single", {"model.safetensors": ("cut", "60")}, ("truncated",)),
    "weights: folder": ("single", {"model.safetensors": ("folder",)}, ("not-a-file",)),
    "weights: FIFO": ("single", {"model.safetensors": ("fifo",)}, ("not-a-file",)),
    "weights: socket": ("single", {"model.safetensors": ("socket",)}, ("io-failed",)),
    "weights: device": ("single", {"model.safetensors": ("link", "/dev/zero")}, ("link-outside",)),
    "weights: link to itself": ("single", {"model.safetensors": ("link", "model.safetensors")}, ("unreadable",)),
    "weights: link to nothing": ("single", {"model.safetensors": ("link", "x.safetensors")}, ("weights-missing",)),
    "weights: link out of it": ("single", {"model.safetensors": ("link", "/etc/passwd")}, ("link-outside",)),
    "weights: link out by a folder": (
        "single",
        {"up": ("link", ".."), "model.safetensors": ("link", "up/x")},
        ("weights-missing",),
    ),
    "weights: link within the folder": (
        "single",
        {"model.safetensors": ("link", "real.safetensors"), "real.safetensors": {"x": W}},
        (),
    ),
    "weights: no permission": ("single", {"model.safetensors": ("mode", "0")}, ("permission",)),
    # Variants and layouts
    "variant: only one": ("single", {"model.safetensors": None, "model.fp16.safetensors": {"x": W}}, ("variant-only",)),
    "variant: two": (
        "single",
        {"model.safetensors": None, "model.fp16.safetensors": {"x": W}, "model.bf16.safetensors": {"x": W}},
        ("variant-only",),
    ),
    "variant: beside the plain one": ("single", {"model.fp16.safetensors": {"x": W}}, ()),
    "variant: a broken index": (
        "single",
        {"model.safetensors": None, "model.safetensors.index.fp16.json": "{}"},
        ("index-malformed", "variant-only"),
    ),
    "one file and an index": (
        "single",
        {INDEX: {"weight_map": {"x": ONE}}, ONE: {"x": W}},
        ("two-layouts", "file-unused"),
    ),
    # Pickles and other tools
    "pickle: only": ("single", {"model.safetensors": None, "pytorch_model.bin": b"\x80\x02}q\0."}, ("pickle-only",)),
    "pickle: diffusers": (
        "diffusers",
        {FLUX: None, "diffusion_pytorch_model.bin": b"\x80\x02}q\0."},
        ("pickle-only",),
    ),
    "pickle: a class that is code": (
        "single",
        {
            "config.json": {"architectures": ["x; import os; os.system('true')"]},
            "model.safetensors": None,
            "pytorch_model.bin": b"\x80\x02}q\0.",
        },
        ("pickle-only",),
    ),
    "pickle: beside": ("single", {"pytorch_model.bin": b"\x80\x02}q\0."}, ("pickle-files",)),
    "pickle: .ckpt beside": ("single", {"Model.CKPT": b"PK\x03\x04"}, ("pickle-files",)),
    "pipeline": (
        "single",
        {"config.json": None, "model_index.json": {"_class_name": "FluxPipeline"}},
        ("pipeline-root",),
    ),
    "adapter": ("single", GONE | {"adapter_config.json": {"peft_type": "LORA"}}, ("adapter-only",)),
    "modular pipeline": (
        "single",
        GONE | {"modular_model_index.json": {"_class_name": "FluxModularPipeline"}},
        ("modular-pipeline",),
    ),
    "a LoRA still attached": (
        "single",
        {"model.safetensors": {"q_proj.base_layer.weight": W}},
        ("adapter-unmerged",),
    ),
    "GGUF only": (
        "single",
        GONE | {"m-Q4_K_M.gguf": b"GGUF\3\0\0\0"},
        ("gguf-malformed",),
    ),
    "GGUF and a config": (
        "single",
        {"model.safetensors": None, "m-Q4_K_M.gguf": b"GGUF\3\0\0\0"},
        ("gguf-malformed",),
    ),
    "GGUF without tensors": ("single", GONE | {"m.gguf": b"GGUF\3\0\0\0" + bytes(60)}, ("gguf-malformed",)),
    "GGUF of a million tensors": (
        "single",
        GONE | {"m.gguf": b"GGUF\3\0\0\0\x40\x42\x0f" + bytes(60)},
        ("gguf-malformed",),
    ),
    "GGUF of more than that": ("single", GONE | {"m.gguf": b"GGUF\3\0\0\0" + b"\xff" * 60}, ("gguf-malformed",)),
    "GGUF twice": ("single", GONE | {"m-Q4_0.gguf": b"GGUF", "m-Q8_0.gguf": b"GGUF"}, ("gguf-several",)),
    "GGUF in parts": ("single", GONE | {"m-00001-of-00002.gguf": b"GGUF"}, ("gguf-parts",)),
    "Black Forest Labs' file": (
        "single",
        {
            "config.json": None,
            "model.safetensors": None,
            "flux1-dev.safetensors": {"double_blocks.0.img_attn.qkv.weight": W},
        },
        ("original-layout",),
    ),
    "Black Forest Labs' names in diffusers' file": (
        "diffusers",
        {FLUX: {BFL: W}},
        ("original-layout",),
    ),
    "ComfyUI's file": (
        "single",
        {
            "config.json": None,
            "model.safetensors": None,
            "x.safetensors": {"model.diffusion_model.input_blocks.0.weight": W},
        },
        ("original-layout",),
    ),
    "SD3's file": (
        "single",
        {
            "config.json": None,
            "model.safetensors": None,
            "sd3.safetensors": {"model.diffusion_model.joint_blocks.0.x": W},
        },
        ("original-layout",),
    ),
    "unknown file without a config": (
        "single",
        GONE | {"x.safetensors": {"x": W}},
        ("config-missing",),
    ),
    "empty folder": ("single", GONE, ("config-missing",)),
    "a repository of several models": (
        "single",
        GONE | {"one": ("folder",), "one/config.json": {}},
        ("models-inside",),
    ),
    "a scheduler": ("single", GONE | {"scheduler_config.json": {}}, ("settings-only",)),
    "TensorFlow only": ("single", {"model.safetensors": None, "tf_model.h5": b"\x89HDF"}, ("weights-missing",)),
    # The index
    "index: missing": ("sharded", {INDEX: None}, ("index-missing",)),
    "index: empty": index(b"", "json-malformed"),
    "index: cut off": index('{"weight_map": {"a": "mod', "json-malformed"),
    "index: a list": index("[]", "json-malformed"),
    "index: key twice": index(f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}', "json-malformed"),
    "index: Git-LFS pointer": index(LFS, "git-lfs-pointer"),
    "index: 50 MB and more": index(b" " * 50_000_001, "json-malformed"),
    "index: nested": index('{"weight_map": ' + "[" * 100_000, "json-malformed"),
    "index: no weight_map": index({"metadata": {}}, "index-malformed"),
    "index: weight_map is empty": index({"weight_map": {}}, "index-malformed"),
    "index: weight_map is a list": index({"weight_map": [ONE]}, "index-malformed"),
    "index: weight_map is null": index({"weight_map": None}, "index-malformed"),
    "index: shard is a number": shard(2, "index-malformed"),
    "index: shard is null": shard(None, "index-malformed"),
    "index: shard is a list": shard([TWO], "index-malformed"),
    "index: 10,001 shards": index(
        {"weight_map": {str(place): f"model-{place}.safetensors" for place in range(10_001)}}, "index-malformed"
    ),
    "index: folder": ("sharded", {INDEX: ("folder",)}, ("not-a-file",)),
    "index: FIFO": ("sharded", {INDEX: ("fifo",)}, ("not-a-file",)),
    "index: no permission": ("sharded", {INDEX: ("mode", "0")}, ("permission",)),
    "name: up": shard("../x.safetensors", "unsafe-name"),
    "name: absolute": shard("/tmp/x.safetensors", "unsafe-name"),
    "name: in a folder that is not there": shard("weights/x.safetensors", "shard-missing", "file-unused"),
    "name: up from a folder": shard("weights/../x.safetensors", "unsafe-name"),
    "name: backslashes": shard("..\\x.safetensors", "unsafe-name"),
    "name: a pickle": shard("model-00002-of-00002.bin", "unsafe-name"),
    "name: another ending": shard("config.json", "unsafe-name"),
    "name: empty": shard("", "unsafe-name"),
    "name: dot": shard(".", "unsafe-name"),
    "name: NUL": shard("x\0.safetensors", "unsafe-name"),
    "name: ESC": shard("\x1b[2J.safetensors", "unsafe-name"),
    "name: newline": shard("x\n.safetensors", "unsafe-name"),
    "name: bidi": shard("\u202esrosnetefas.safetensors", "unsafe-name"),
    "name: 300 characters": shard("x" * 300 + ".safetensors", "unsafe-name"),
    "name: Rich markup": shard("[red]x[\\red].safetensors", "unsafe-name"),
    "name: Rich markup without a slash": shard("[bold]x.safetensors", "shard-missing", "file-unused"),
    # Shards
    "shard: missing": ("sharded", {TWO: None}, ("shard-missing",)),
    "shard: both missing": ("sharded", {ONE: None, TWO: None}, ("shard-missing",)),
    "shard: empty": ("sharded", {TWO: b""}, ("empty-file",)),
    "shard: cut off": ("sharded", {TWO: ("cut", "1")}, ("truncated",)),
    "shard: Git-LFS pointer": ("sharded", {TWO: LFS}, ("git-lfs-pointer",)),
    "shard: web page": ("sharded", {TWO: WEB}, ("not-safetensors",)),
    "shard: folder": ("sharded", {TWO: ("folder",)}, ("not-a-file",)),
    "shard: FIFO": ("sharded", {TWO: ("fifo",)}, ("not-a-file",)),
    "shard: link to itself": ("sharded", {TWO: ("link", TWO)}, ("unreadable",)),
    "shard: link to nothing": ("sharded", {TWO: ("link", "x.safetensors")}, ("shard-missing",)),
    "shard: link out of the folder": ("sharded", {TWO: ("link", "/etc/passwd")}, ("link-outside",)),
    "shard: no permission": ("sharded", {TWO: ("mode", "0")}, ("permission",)),
    "shard: one pointer, one missing": ("sharded", {ONE: LFS, TWO: None}, ("git-lfs-pointer", "shard-missing")),
    "shard: not in the index": ("sharded", {"model-00003-of-00003.safetensors": {"x": W}}, ("file-unused",)),
    # The index against the shards
    "tensor: absent": ("sharded", {TWO: {"c.weight": None, "d.weight": W}}, ("tensor-absent", "index-differs")),
    "tensor: in another shard": index({"metadata": {}, "weight_map": MAP | {"b.weight": TWO}}, "index-differs"),
    "tensor: in two shards": ("sharded", {TWO: {"a.weight": W}}, ("tensor-twice",)),
    "tensor: not in the index": ("sharded", {TWO: {"d.weight": W}}, ("index-differs", "index-total-size")),
    "tensor: 1,000 absent": index(
        {"metadata": {}, "weight_map": MAP | {f"model.layers.{place}.weight": ONE for place in range(1000)}},
        "tensor-absent",
    ),
    "tensor: an indexed name with ESC": index({"metadata": {}, "weight_map": MAP | {"\x1b[2J": ONE}}, "tensor-absent"),
    "index: wrong total": index({"metadata": {"total_size": 1}, "weight_map": MAP}, "index-total-size"),
    "index: total is text": index({"metadata": {"total_size": "x"}, "weight_map": MAP}, "index-total-size"),
    "index: total is a list": index({"metadata": {"total_size": []}, "weight_map": MAP}, "index-total-size"),
    "index: no metadata": index({"weight_map": MAP}, "index-metadata"),
    "index: no metadata under diffusers": (
        "diffusers",
        {FLUX: None, FLUX + ".index.json": {"weight_map": {"x": "s.safetensors"}}, "s.safetensors": {"x": W}},
        ("index-metadata",),
    ),
    "tensor: not in the index under diffusers": (
        "diffusers",
        {
            FLUX: None,
            FLUX + ".index.json": {"metadata": {}, "weight_map": {"x": "s.safetensors", "z": "t.safetensors"}},
            "s.safetensors": {"x": W, "y": W},
            "t.safetensors": {"z": W},
        },
        ("tensor-unindexed",),
    ),
    "tensor: in another shard under diffusers": (
        "diffusers",
        {
            FLUX: None,
            FLUX + ".index.json": {"metadata": {}, "weight_map": {"x": "t.safetensors", "z": "s.safetensors"}},
            "s.safetensors": {"x": W},
            "t.safetensors": {"z": W},
        },
        ("tensor-elsewhere",),
    ),
}
