"""No code from a repository, ever: what can name code is taken out of a config, and where it is got from is closed."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import readers
from pace import HANG
from qz import MalformedInput, QzError, Unsupported, api
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.libraries.importing.isolation import isolated, trusted
from qz.quantize.libraries.importing.untrusted_config import CODE, without_code
from qz.quantize.methods import FourBit
from qz.quantize.models.plan import plan_quantization
from qz.quantize.planning.plan import Plan
from qz.quantize.settings import Settings

REPOSITORY = "kernels-community/flash-attn2"

LOADS_CODE = re.compile(
    r"get_kernel\w*|lazy_load_kernel|load_and_register_\w*kernel|lazy_import_flash_attention|kernelize"
    r"|get_class_from_dynamic_module|get_cached_module_file|get_class_in_module|resolve_trust_remote_code"
    r"|load_custom_generate|get_interface|spec_from_file_location|run_path"
)
"""Functions of the two libraries, and of Python, whose arguments decide which code runs."""
SPEAKS_OF_CODE = re.compile(r"implementation|(^|_)kernels?(_config|_mapping)?$|auto_map|remote_code|^custom_(gen|pipe)")
HARMLESS = {
    # Where a caller's arguments are handed on: a config does not reach them
    *(
        "adapter_kwargs",
        "base_model_name_or_path",
        "cache_dir",
        "config",
        "copy",
        "feature_extractor_type",
        "get",
        "items",
    ),
    *(
        "function_attr",
        "wrapped_backward_attr",
        "wrapped_forward_attr",
        "repo_id",
        "revision",
        "version",
        "token",
        "pop",
    ),
    *("local_files_only", "quantization_config", "subfolder", "get_text_config"),
    # A class or family of the installed library, which qz looks up itself
    *("_class_name", "model_type"),
    # Emptied by the libraries where a model is built from a config
    *("_name_or_path", "name_or_path"),
    # Extents of convolutions, and choices among the library's own classes
    *("conv_kernel", "decoder_stage5_kernel", "decoder_stage_kernels", "speech_decoder_postnet_kernel", "tdnn_kernel"),
    *("cache_implementation", "disable_custom_kernels", "use_mamba_kernels"),
}
CONFIG = re.compile(r"(^|_)(config|config_dict|kwargs|init_dict)$")


def config_fields(node: ast.AST, held: dict[str, set[str]]) -> set[str]:
    """Fields of configs in an expression, and those in what local names hold."""
    found: set[str] = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and CONFIG.search(name_of(each.value)):
            found.add(each.attr)
        elif isinstance(each, ast.Name):
            found |= held.get(each.id, set())
        elif isinstance(each, ast.Call) and name_of(each.func) in ("getattr", "get", "pop"):
            of = each.func.value if isinstance(each.func, ast.Attribute) else each.args[0] if each.args else each
            if CONFIG.search(name_of(of)):
                found |= {
                    arg.value for arg in each.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
                }
        elif (
            isinstance(each, ast.Subscript)
            and isinstance(each.slice, ast.Constant)
            and CONFIG.search(name_of(each.value))
        ):
            found.add(str(each.slice.value))
    return found


def name_of(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def fields_that_reach_code(source: str) -> Iterator[str]:
    """Fields of configs that get into the arguments of what loads code, also by way of local names."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = list(ast.walk(function))
        calls = [each for each in nodes if isinstance(each, ast.Call) and LOADS_CODE.fullmatch(name_of(each.func))]
        held: dict[str, set[str]] = {}
        for _ in range(2 if calls else 0):
            for node in nodes:
                if isinstance(node, ast.Assign) and (fields := config_fields(node.value, held)):
                    for target in (each for whole in node.targets for each in ast.walk(whole)):
                        if isinstance(target, ast.Name):
                            held[target.id] = held.get(target.id, set()) | fields
        for call in calls:
            for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
                yield from config_fields(argument, held)


def library_sources() -> Iterator[str]:
    """The sources that have to do with building models; of the families, one stands for those that are alike."""
    for library in ("transformers", "diffusers"):
        spec = importlib.util.find_spec(library)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            if not re.search(
                r"/(convert_|cli/|commands/|pipelines/|modular_)|testing|tokenization|processing", str(path)
            ):
                yield path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return list(library_sources())


def test_every_field_of_a_config_that_the_libraries_load_code_by_is_taken_out(sources: list[str]) -> None:
    calls = re.compile(rf"\b(?:{LOADS_CODE.pattern})\(")
    alike = re.compile(r"get_interface\(\s*self\.config\._attn_implementation, eager_attention_forward\s*\)")
    found: set[str] = set()
    beginnings = [name.partition("\\")[0] for name in LOADS_CODE.pattern.split("|")]  # found faster than a pattern
    for source in sources:
        if any(name in source for name in beginnings) and calls.search(alike.sub("", source)):
            found.update(fields_that_reach_code(source))
    assert {"_attn_implementation", "auto_map"} <= found, "the scan does not find what is known"
    unknown = {field for field in found if not CODE.fullmatch(field) and field not in HARMLESS}
    assert not unknown


def test_every_field_of_a_config_whose_name_speaks_of_code_is_taken_out_or_known_as_harmless(
    sources: list[str],
) -> None:
    fields = [
        re.compile(pattern)  # each by itself, and beginning with letters: twenty times as fast
        for pattern in (
            r"config\.(?<!\wconfig\.)([A-Za-z_]\w*)",
            r"""getattr\((?:self\.)?\w*config, ?["'](\w+)["']""",
            r"""kwargs\.(?:pop|get)\(["'](\w+)["']""",
        )
    ]
    found = {name for source in sources for field in fields for name in field.findall(source)}
    assert "_experts_implementation" in found, "the scan does not find what is known"
    unknown = {name for name in found if SPEAKS_OF_CODE.search(name) and not CODE.fullmatch(name)} - HARMLESS
    assert not unknown


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copy(tiny_llama / "model.safetensors", folder)
    return folder


def planned(source: Path, tiny_llama: Path, **changes: Any) -> Plan:
    config = json.loads((tiny_llama / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    return plan_quantization(open_checkpoint(LocalFolder(source)), Settings(FourBit("nf4")))


NAMES_CODE: dict[str, dict[str, Any]] = {
    "attention": {"_attn_implementation": f"{REPOSITORY}@0123abc"},
    "attention, as an argument": {"attn_implementation": f"{REPOSITORY}:flash_attn"},
    "attention, by part": {"attn_implementation": {"": REPOSITORY, "text_config": REPOSITORY}},
    "attention, internal": {"_attn_implementation_internal": REPOSITORY},
    "attention, paged": {"_attn_implementation": f"paged|{REPOSITORY}"},
    "experts": {"experts_implementation": REPOSITORY, "_experts_implementation": REPOSITORY},
    "kernels": {"use_kernels": True, "kernel_config": {"RMSNorm": f"{REPOSITORY}:RMSNorm"}},
    "under another name": {"attribute_map": {"_attn_implementation_internal": "innocent"}, "innocent": REPOSITORY},
    "nested": {"vision_config": {"model_type": "clip_vision_model", "attn_implementation": REPOSITORY}},
    "in a list": {"parts": [{"auto_map": {"AutoModel": "evil--model.Model"}}]},
}


@pytest.mark.parametrize("changes", NAMES_CODE.values(), ids=NAMES_CODE.keys())
def test_what_names_code_is_taken_out_and_the_user_is_told(
    changes: dict[str, Any], source: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import hub_kernels

    asked: list[object] = []
    monkeypatch.setenv("QZ_CACHE", "")
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *a, **k: asked.append(a))
    plan = planned(source, tiny_llama, **changes)
    assert not asked
    assert any("left out of config.json, because it could name code" in note for note in plan.architecture.notes)
    written = plan.files["config.json"].decode()
    assert "flash-attn2" not in written.replace('"innocent": "kernels-community/flash-attn2"', "")
    assert "evil" not in written


def test_a_word_of_a_vocabulary_stays_and_so_does_what_the_libraries_have_themselves() -> None:
    config = {"vocabulary_map": {"auto_map": 7}, "attn_implementation_note": "x", "use_mamba_kernels": True}
    assert without_code(config) == (config, {})


class Hub:
    """A server on 127.0.0.1 that counts whoever asks it."""

    def __init__(self) -> None:
        hub = self
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(self.path)
                self.send_error(404)

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    yield found
    found.server.shutdown()
    found.server.server_close()


ASKED = """
import sys
from contextlib import nullcontext
from qz.quantize.libraries.importing.isolation import isolated
{imports}
with isolated() if sys.argv[1] == "closed" else nullcontext():
    try:
        {call}
    except Exception as error:
        print(type(error).__name__)
        print(error, file=sys.stderr)
"""
KERNELS = pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="pip install kernels")


@pytest.mark.parametrize(
    ("imports", "call"),
    [
        pytest.param("import huggingface_hub as h", "h.hf_hub_download('evil/model', 'modeling.py')", id="a file"),
        pytest.param("import huggingface_hub as h", "h.snapshot_download('evil/model')", id="a whole repository"),
        pytest.param("import huggingface_hub as h", "h.HfApi().repo_exists('evil/model')", id="a question"),
        pytest.param("import kernels", "kernels.get_kernel('evil/kernel', version=1, trust_remote_code=True)",
                     id="a kernel", marks=KERNELS),
    ],
)  # fmt: skip
def test_while_a_class_is_built_the_hub_is_not_asked(imports: str, call: str, hub: Hub, tmp_path: Path) -> None:
    script = ASKED.format(imports=imports, call=call)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment["HF_HUB_DISABLE_TELEMETRY"] = "0"  # without telemetry, kernels makes a header that httpx refuses
    said, told = {}, ""
    for how in ("closed", "open"):
        command = [sys.executable, "-c", script, how]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=HANG)
        said[how], told = (done.stdout.strip(), len(hub.asked)), done.stderr
    assert said["closed"] == ("Unsupported", 0)
    assert said["open"][1] > 0, f"without the lock it is asked: {told}"


def imported_from(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("from_a_repository", folder / "modeling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_that_was_downloaded_before_is_not_run_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "modeling.py").write_text("ran = True\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))  # as transformers does
    with pytest.raises(Unsupported, match=r"asked for code that is not installed, .*modeling.py"), isolated():
        imported_from(modules)
    assert imported_from(modules).ran


def connect(hub: Hub) -> str:
    import urllib.request

    try:
        urllib.request.urlopen(f"{hub.url}/x", timeout=10)
    except Exception as error:
        return type(error).__name__
    return "answered"


def in_a_thread(hub: Hub) -> str:
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(connect(hub)))
    thread.start()
    thread.join()
    return said[0]


def test_threads_started_meanwhile_are_closed_too_others_go_on_and_afterwards_all_is_as_before(hub: Hub) -> None:
    start = threading.Thread.start
    go, done, said = threading.Event(), threading.Event(), list[str]()

    def elsewhere() -> None:
        go.wait()
        said.append(connect(hub))
        done.set()

    threading.Thread(target=elsewhere).start()
    with isolated():
        assert (connect(hub), in_a_thread(hub)) == ("Unsupported", "Unsupported")
        with isolated():
            assert connect(hub) == "Unsupported"
        assert connect(hub) == "Unsupported", "the end of an inner one does not open the outer one"
        assert not hub.asked
        go.set()
        done.wait()
    assert said == ["HTTPError"]
    assert (connect(hub), in_a_thread(hub)) == ("HTTPError", "HTTPError")
    assert threading.Thread.start is start


def test_qz_itself_may_read_from_the_hub_while_a_model_runs(hub: Hub) -> None:
    with isolated():
        with trusted():
            assert (connect(hub), in_a_thread(hub)) == ("HTTPError", "HTTPError")
            with isolated():
                assert connect(hub) == "Unsupported"
        assert (connect(hub), in_a_thread(hub)) == ("Unsupported", "Unsupported")
    with trusted():
        assert connect(hub) == "HTTPError"


def test_the_weights_of_a_model_that_runs_may_come_from_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no connection is open any more, each block needs a new one."""
    folder, read = readers.model_folder("llama-untied", tmp_path / "model"), LocalFolder.read_into

    def read_into(place: LocalFolder, file: str, *arguments: Any) -> None:
        assert not file.endswith(".safetensors") or connect(hub) == "HTTPError"
        read(place, file, *arguments)

    monkeypatch.setattr(LocalFolder, "read_into", read_into)
    api.calibrate(folder, tmp_path / "statistics.safetensors", tokens=16, device="cpu")
    assert hub.asked


def swallow_a_refusal_and_fail(hub: Hub) -> None:
    with isolated():
        connect(hub)
        raise ValueError("something went wrong")


def test_a_refusal_that_a_library_swallowed_is_told_if_the_work_fails(hub: Hub) -> None:
    with pytest.raises(Unsupported, match="asked for a connection to the network"):
        swallow_a_refusal_and_fail(hub)


def test_a_config_that_asks_the_hub_by_a_field_nobody_listed_is_refused_and_nobody_is_asked(
    hub: Hub, source: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("QZ_CACHE", "")
    config = {"architectures": ["DPTForDepthEstimation"], "model_type": "dpt", "backbone": "evil/backbone"}
    with pytest.raises(QzError) as refused:
        planned(source, tiny_llama, **config)
    assert refused.value.exit_code == 78
    assert not hub.asked


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 10**7}, {"num_labels": 10**9}, {"num_hidden_layers": 10**12}, {"num_hidden_layers": 99_999},
    {"vision_config": {"num_hidden_layers": 10**9}}, {"text_config": {"depths": [2, 10**8]}},
])  # fmt: skip
def test_counts_that_the_tensors_cannot_have_are_refused_before_anything_of_that_length_is_made(
    changes: dict[str, Any], source: Path, tiny_llama: Path
) -> None:
    with pytest.raises(MalformedInput, match=r"holds (only )?21 tensors.*Use the config.json that belongs"):
        planned(source, tiny_llama, **changes)
