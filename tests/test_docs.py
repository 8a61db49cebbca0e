"""The documentation is true: the reference is fresh, links lead somewhere, shell lines run, and the action works."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import typer.main
import yaml
from safetensors.torch import save_file

import full_checkpoints
import original_names
import pipelines
import readers
from forked import Runner
from hub_server import OWNER, HubServer
from pace import HANG
from qz import QzError, api
from qz.cli.app import app
from test_imatrix import llama_cpp_names, write_gguf

ROOT = Path(__file__).resolve().parent.parent
COMMANDS: dict[str, Any] = typer.main.get_command(app()).commands  # type: ignore[attr-defined]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS: dict[str, dict[str, Any]] = {step["name"]: step for step in ACTION["runs"]["steps"]}


def load_builder() -> Any:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "docs"))  # what lies beside it
    spec.loader.exec_module(module)
    return module


BUILD = load_builder()
PAGES: list[Path] = BUILD.pages()


def shell_lines(page: Path) -> Iterator[str]:
    """The lines of the page's ``sh`` blocks, with continued ones joined."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", "").splitlines()


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_command_reference_is_what_the_app_says() -> None:
    assert BUILD.REFERENCE.read_text() == BUILD.reference(), "Run `make docs` and commit docs/reference/commands.md."


def test_the_schemas_are_those_of_the_reports() -> None:
    assert {file.name: file.read_text() for file in BUILD.SCHEMAS.iterdir()} == BUILD.schemas(), (
        "Run `make docs` and commit docs/reference/json-schema."
    )


def test_the_picture_of_the_rooms_is_fresh() -> None:
    assert BUILD.picture() == BUILD.PICTURE.read_text(), "Run `make docs` and commit docs/explanation/rooms.svg."


def test_every_room_is_named_on_the_page_of_the_architecture() -> None:
    page = BUILD.ARCHITECTURE.read_text()
    rooms = {f"{room.parent.name}/{room.name}" for top in ("quantize", "formats") for room in (ROOT / top).glob("*/")}
    rooms = {room for room in rooms if (ROOT / room / "__init__.py").exists()}
    assert rooms
    assert {room for room in rooms if f"`{room}/`" not in page} == set()


def test_every_page_has_its_place_in_the_site() -> None:
    shown = set(re.findall(r"[\w/.-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert shown == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


def test_the_messages_that_are_explained_are_those_of_the_code() -> None:
    files = [file for room in ("cli", "quantize", "formats") for file in (ROOT / room).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))  # a literal on several lines
    quoted = re.findall("“([^”]+)”", (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text())
    parts = {part.strip(" ,") for message in quoted for part in message.split("…")} - {""}
    assert parts
    assert {part for part in parts if part not in code} == set()


def test_the_notes_of_a_release_are_the_changelogs(tmp_path: Path) -> None:
    """And a tag that is not the version, or a changelog that does not know its day, stops the release."""
    (tmp_path / ".github").mkdir()
    (tmp_path / "qz").mkdir()
    script = shutil.copy(ROOT / ".github" / "release.py", tmp_path / ".github")
    (tmp_path / "qz" / "__init__.py").write_text('__version__ = "1.2.0"\n')
    citation = tmp_path / "CITATION.cff"
    citation.write_text("type: software\nversion: 1.2.0\n")

    def release(changelog: str, *tag: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "CHANGELOG.md").write_text(changelog)
        return subprocess.run([sys.executable, script, *tag], capture_output=True, text=True, timeout=HANG, check=False)

    dated = "# Changelog\n\n## 1.2.0 (2026-11-26)\n\n- New.\n\n## 1.1.0 (2026-01-01)\n\n- Old.\n"
    assert release(dated, "v1.2.0").stdout == "- New.\n"
    assert release(dated).stdout == "- New.\n"
    assert "the code is 1.2.0" in release(dated, "v1.3.0").stderr
    unreleased = release(dated.replace("2026-11-26", "unreleased"), "v1.2.0")
    assert unreleased.returncode != 0
    assert "YYYY-MM-DD" in unreleased.stderr
    citation.write_text("type: software\nversion: 1.1.0\n")
    assert "CITATION.cff has another version" in release(dated, "v1.2.0").stderr
    citation.write_text("type: software\nversion: 1.2.0\n")
    assert "says nothing of 1.2.0" in release(dated.replace("1.2.0", "1.3.0")).stderr
    notes = subprocess.run(
        [sys.executable, ROOT / ".github" / "release.py"], capture_output=True, text=True, check=False
    )
    assert notes.stdout.strip(), "this version's own"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(BUILD.broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BUILD, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](gone.md) [d](page.md#one) [e](http://x)\n```\n[f](gone)\n```\n")
    assert [problem.split(": ", 1)[1] for problem in BUILD.broken_links(page)] == [
        "#two: no such heading",
        "gone.md does not exist",
        "http://x is not https",
    ]


def test_every_page_is_reachable_from_the_readme() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        for match in BUILD.LINK.finditer(page.read_text()):
            target = (match[1] or match[2]).partition("#")[0]
            if target and not re.match(r"[a-z]+:", target):
                waiting.append((page.parent / target).resolve())
    assert {named(page) for page in (ROOT / "docs").rglob("*.md")} <= {named(page) for page in seen}


def test_every_exit_code_is_documented_and_every_documented_one_exists() -> None:
    text = (ROOT / "docs/reference/exit-codes.md").read_text()
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert documented == {error.exit_code for error in QzError.__subclasses__()} | {0, 1, 130, 143}


def test_every_option_that_the_pages_use_exists() -> None:
    for page in PAGES:
        for line in re.findall(rf"\bqz (?:{'|'.join(COMMANDS)}) [^`\n|>]*", page.read_text()):
            words = shlex.split(line, comments=True) if line.count('"') % 2 == 0 and "'" not in line else line.split()
            params = COMMANDS[words[1]].params
            offered = {name for param in params for name in (*param.opts, *param.secondary_opts)} | {
                "--help",
                "--debug",
            }
            assert {word for word in words if word.startswith("--")} <= offered, f"{named(page)}: {line}"


@pytest.fixture(scope="session")
def flux(forks: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds black-forest-labs/FLUX.1-dev, FLUX-shaped and tiny, and language models with a text."""
    place = tmp_path_factory.mktemp("flux")
    readers.some_text(place / "prose.txt")
    readers.some_text(place / "other.txt")
    (place / "other-prompts.txt").write_text("a red kite\nthe sea at night\n")
    language_model = readers.model_folder("llama-untied", place / "my-llm")
    names = llama_cpp_names(language_model, gguf.MODEL_ARCH.LLAMA).values()
    write_gguf(place / "imatrix.gguf", {name: (np.ones(inputs, np.float32), 512) for name, inputs in names})
    shutil.copytree(language_model, place / "HuggingFaceTB" / "SmolLM2-1.7B-Instruct")
    (place / "black-forest-labs").mkdir()
    repo = pipelines.flux(place / "black-forest-labs" / "FLUX.1-dev", halvings=5)
    pipelines.sd3(place / "my-pipeline", halvings=7, with_t5=False, layers=1, heads=1)
    shutil.copytree(repo / "transformer", place / "my-model")
    assert forks.run("quantize", "my-model", "--quiet", cwd=place).code == 0
    (place / "my-model-nf4").rename(place / "made-before")
    for name in ("style", "character"):
        changed = "transformer.transformer_blocks.0.attn.to_q"
        factors = {f"{changed}.lora_A.weight": torch.ones(2, 64), f"{changed}.lora_B.weight": torch.ones(64, 2)}
        save_file(factors, place / f"{name}.safetensors")
    model = original_names.sd3_model().to(torch.bfloat16)
    model.save_pretrained(place / "stable-diffusion-3.5-medium")
    original_names.single_file(original_names.sd3_names(model.state_dict()), place / "sd3.5_medium.safetensors")
    pipeline = full_checkpoints.sd15(place / "stable-diffusion-v1-5")
    full_checkpoints.sd15_file(pipeline, place / "dreamshaper_8.safetensors")
    forks.warm("quantize", "my-pipeline", "--dry-run", "--quiet", cwd=place)
    return place


QZ_BY_FORK = """
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
wish = dict(arguments=sys.argv[1:], cwd=os.getcwd(), at=-1, act="", only=[], before="", environment=dict(os.environ))
connection.sendall(json.dumps(dict(wish, terminal="")).encode() + b"\\n")
answers = connection.makefile("r")
begun, ended = json.loads(answers.readline()), json.loads(answers.readline())
for file, stream in zip(begun["files"], (sys.stdout, sys.stderr)):
    stream.write(open(file, errors="replace").read())
sys.exit(ended["code"])
"""


@pytest.fixture(scope="session")
def quick(forks: Runner, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH whose ``qz`` runs the command in a fork of a process that is warm."""
    folder = tmp_path_factory.mktemp("quick")
    script = folder / "qz"
    script.write_text(f"#!{sys.executable} -IS\n{QZ_BY_FORK.format(address=forks.address)}")
    script.chmod(0o755)
    return f"{folder}:{environment()['PATH']}"


def environment(**more: str) -> dict[str, str]:
    """This one, with the ``qz`` of this environment first, and without a runner's own settings."""
    bin_folder = Path(sys.executable).parent
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("GITHUB_", "RUNNER_", "HF_TOKEN"))
    }
    return {**kept, "PATH": f"{bin_folder}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", **more}


def halfway(place: Path, line: str) -> str:
    """The pages name sizes of large models: one between the least and the whole of the source in ``line``."""
    found: Any = api.quantize(place / shlex.split(line)[2], place / "nowhere", dry_run=True, device="cpu")
    return str((found.footprint_before + found.footprint_after) // 2)


def in_short(line: str) -> str:
    """A pipeline draws two prompts in one step each, not 16 in four; a language model reads an eighth of the text."""
    if re.match(r"qz (calibrate|compare) \./my-llm ", line):
        return line + " --tokens 128" * ("--tokens" not in line)
    if not re.match(r"qz (calibrate|compare) \./my-pipeline ", line):
        return line
    return line + " --steps 1" + " --text other-prompts.txt" * ("--text" not in line)


RUN = [page for page in PAGES if any("qz " in line for line in shell_lines(page))]
WHOLE = [page for page in RUN if any(in_short(line) != line for line in shell_lines(page))]


@pytest.mark.parametrize(
    ("page", "shorten"),
    [
        *(pytest.param(page, in_short, id=named(page)) for page in RUN),
        *(pytest.param(page, str, id=f"{named(page)} whole", marks=pytest.mark.soak) for page in WHOLE),
    ],
)
def test_the_shell_lines_run(page: Path, shorten: Callable[[str], str], flux: Path, tmp_path: Path, quick: str) -> None:
    """Word for word, on tiny models that lie where the names lead. Publishing is tested with its own server."""
    place = tmp_path / "here"
    shutil.copytree(flux, place)
    for line in map(shorten, shell_lines(page)):
        if line.startswith("qz push"):
            continue
        if line.startswith("qz dequantize ./my-model-nf4") and not (place / "my-model-nf4").exists():
            shutil.copytree(place / "made-before", place / "my-model-nf4")  # a page on its own begins with it
        line = re.sub(r"(?<=--target-size )\S+", lambda _, line=line: halfway(place, line), line)  # type: ignore[misc]
        if line.startswith("qz "):
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", line],
                cwd=place,
                env=environment(PATH=quick),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=HANG,
                check=False,
            )
            assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        else:
            assert line.startswith(("pip install", "make ")), f"{line!r} is not run by this test"


def test_the_site_is_read_and_searched_from_a_folder_without_a_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, env=environment(NO_MKDOCS_2_WARNING="1"), check=True)
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        taken = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"?([^\s\">]+)", page.read_text())
        assert [place for place in taken if re.match(r"(?:[a-z]+:)?//", place)] == [], page
        assert 'class="mermaid"' not in page.read_text(), "the theme would fetch what draws it"
    assert (tmp_path / "site/search/search_index.js").exists()
    assert (tmp_path / "site/assets/iframe-worker.js").exists()


def test_hf_runs_qz_as_the_page_of_the_shell_says(tiny_llama: Path, tmp_path: Path) -> None:
    [lines] = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/how-to/shell.md").read_text(), re.MULTILINE | re.DOTALL)
    shutil.copytree(tiny_llama, tmp_path / "my-model")
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = environment(HOME=str(tmp_path), PATH=programs, HF_HUB_DISABLE_UPDATE_CHECK="1")
    more = "\nhf extensions list\nhf qz inspect ./nowhere"
    done = subprocess.run(
        ["bash", "-uo", "pipefail", "-c", lines + more],
        cwd=tmp_path,
        env=given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 66, done.stderr
    assert "LlamaForCausalLM (transformers)" in done.stdout
    assert "hf qz" in done.stdout
    assert "./nowhere does not exist" in done.stderr


def test_the_lines_that_publish_run(flux: Path, tmp_path: Path, quick: str) -> None:
    """Word for word, against a Hub on this machine."""
    place = tmp_path / "here"
    shutil.copytree(flux, place)
    pages = ("README.md", "docs/how-to/push.md")
    lines = {line for page in pages for line in shell_lines(ROOT / page) if line.startswith("qz push")}
    assert lines
    with HubServer() as hub:
        given = {"HF_ENDPOINT": hub.url, "HF_TOKEN": OWNER, "HF_HOME": str(tmp_path / "home")}
        shell = environment(PATH=quick, **given) | {"HF_HUB_OFFLINE": "0"}
        first = (
            "qz quantize ./black-forest-labs/FLUX.1-dev --subfolder transformer --nf4",
            "qz quantize HuggingFaceTB/SmolLM2-1.7B-Instruct --nf4",
        )
        for line in (*first, *sorted(lines)):
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", line],
                cwd=place,
                env=shell,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=HANG,
                check=False,
            )
            assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
            assert OWNER not in result.stdout + result.stderr
        assert hub.repos["me/SmolLM2-1.7B-Instruct-nf4"].private
        repo = hub.repos["me/FLUX.1-dev-nf4"]
        assert repo.private
        wanted = {"README.md", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}
        assert wanted <= set(repo.files())


def test_the_readme_names_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {target for page in PAGES for target in re.findall(r"`make ([a-z]+)`", page.read_text())}
    used |= {line.split()[1] for line in shell_lines(ROOT / "README.md") if line.startswith("make ")}
    assert {"demo", "test"} <= used <= targets


def run_step(name: str, place: Path, inputs: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    """One step of the action, in the shell and with the environment that GitHub's runner gives it."""
    values = {key: str(spec.get("default", "")) for key, spec in ACTION["inputs"].items()} | inputs
    step = STEPS[name]
    assert "${{" not in step["run"], "an expression inside a script would be code that the caller writes"
    given = {
        key: re.sub(
            r"\$\{\{ inputs\.([\w-]+) \}\}",
            lambda match: values[match[1]],
            value.replace("${{ github.action_path }}", str(ROOT)),
        )
        for key, value in step.get("env", {}).items()
    }
    files = {"GITHUB_OUTPUT": place / "output", "GITHUB_STEP_SUMMARY": place / "summary", "GITHUB_PATH": place / "path"}
    script = place / f"{name}.sh"
    script.write_text(step["run"])
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
        cwd=place,
        env=environment(CI="true", RUNNER_TEMP=str(place), **{k: str(v) for k, v in files.items()}, **given, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


def test_the_action_quantizes_and_verifies(tiny_llama: Path, tmp_path: Path, quick: str) -> None:
    inputs = {"source": str(tiny_llama), "method": "nf4", "double-quant": "true", "skip": "q_proj\nk_proj\n"}
    result = run_step("Quantize", tmp_path, inputs, PATH=quick)
    assert result.returncode == 0, result.stderr
    outputs = dict(line.split("=", 1) for line in (tmp_path / "output").read_text().splitlines())
    assert set(outputs) == set(ACTION["outputs"])
    report = json.loads(Path(outputs["report"]).read_text())
    assert (report["method"], report["double_quant"]) == ("nf4", True)
    assert any(module.endswith("q_proj") for module in report["skipped"])
    assert int(outputs["bytes"]) == report["bytes"]["output"]
    assert "nf4" in (tmp_path / "summary").read_text()
    verified = run_step("Verify", tmp_path, {}, PATH=quick)
    assert verified.returncode == 0, verified.stderr
    (tmp_path / "quantized" / "model.safetensors").write_bytes(b"broken")
    assert run_step("Verify", tmp_path, {}, PATH=quick).returncode == 65


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("method", "push=evil/repo", 2),
        ("method", "nf4 --report", 2),
        ("source", "--help", 66),
        ("source", "--push=evil/repo", 66),
        ("dtype", "--help", 2),
        ("subfolder", "--report", 66),
        ("if-exists", "--quiet", 2),
        ("skip", "--help", 2),
    ],
)
def test_no_input_of_the_action_becomes_an_option(
    name: str, value: str, code: int, tiny_llama: Path, tmp_path: Path, quick: str
) -> None:
    result = run_step("Quantize", tmp_path, {"source": str(tiny_llama), name: value}, PATH=quick)
    assert result.returncode == code, result.stderr
    assert not (tmp_path / "quantized").exists()
    assert "Usage" not in result.stdout


def test_the_name_of_an_output_is_one_output_of_the_action(tiny_llama: Path, tmp_path: Path, quick: str) -> None:
    name = "-x\nsha256=evil\ninjected=1"
    result = run_step("Quantize", tmp_path, {"source": str(tiny_llama), "output": name}, PATH=quick)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "output").read_text()
    found = re.match(r"output<<([0-9a-f]{32})\n(.*?)\n\1\n", text, re.DOTALL)
    assert found is not None
    assert found[2] == name
    rest = dict(line.split("=", 1) for line in text[found.end() :].splitlines())
    assert {"output", *rest} == set(ACTION["outputs"])
    assert rest["sha256"] != "evil"
    assert run_step("Verify", tmp_path, {"output": name}, PATH=quick).returncode == 0


def test_the_action_reads_and_publishes_without_a_stored_token(tiny_llama: Path, tmp_path: Path, quick: str) -> None:
    """Each step as what it may: one reads what is gated, the other one writes."""
    with HubServer() as hub:
        hub.add("big/gated", {path.name: path for path in tiny_llama.iterdir()}, gated="auto", granted={"me"})
        hub.add("me/new", {}, private=True)
        runner = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "PATH": quick}
        runner |= hub.trust("me", "me/new").environment
        inputs = {"source": "big/gated", "method": "nf4", "push": "me/new", "read-as": "me", "write-as": "me/new"}
        for name in ("Quantize", "Verify", "Publish"):
            result = run_step(name, tmp_path, inputs, **runner)
            assert result.returncode == 0, result.stderr
        assert "model.safetensors" in hub.repos["me/new"].files()
        swapped = inputs | {"read-as": "me/new", "write-as": "me"}
        assert run_step("Quantize", tmp_path, swapped | {"output": "again"}, **runner).returncode == 77
        assert run_step("Publish", tmp_path, swapped, **runner).returncode == 77


def test_the_action_publishes_without_an_output_here(tiny_llama: Path, tmp_path: Path, quick: str) -> None:
    with HubServer() as hub:
        runner = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        inputs = {"source": str(tiny_llama), "token": OWNER, "args": "--push\nme/new\n--push-only"}
        result = run_step("Quantize", tmp_path, inputs, PATH=quick, **runner)
        assert result.returncode == 0, result.stderr
        assert "model.safetensors" in hub.repos["me/new"].files()
    assert "output=" in (tmp_path / "output").read_text().splitlines()
    assert not (tmp_path / "quantized").exists()
    assert STEPS["Verify"]["if"] == "steps.quantize.outputs.output != ''"


def test_the_action_passes_on_the_exit_code(tmp_path: Path) -> None:
    result = run_step("Quantize", tmp_path, {"source": "./nothing-here"})
    assert result.returncode == 66
    assert json.loads(result.stdout.splitlines()[-1])["code"] == 66


def test_inputs_of_the_action_are_data_and_never_code(tiny_llama: Path, tmp_path: Path, quick: str) -> None:
    hostile = "x; touch pwned; $(touch pwned) `touch pwned`\n--push"
    for names in (("subfolder", "revision", "skip", "output", "args"), ("method",), ("dtype",), ("source",)):
        run_step("Quantize", tmp_path, {"source": str(tiny_llama)} | dict.fromkeys(names, hostile), PATH=quick)
        assert not (tmp_path / "pwned").exists()


def test_installing_by_the_action_needs_nothing_in_the_workspace(tmp_path: Path) -> None:
    python, cache = (step["with"] for step in ACTION["runs"]["steps"] if "uses" in step)
    assert "cache" not in python, "setup-python fails where the workspace has no lock file"
    assert run_step("Name the cache", tmp_path, {}).returncode == 0
    name, key = (tmp_path / "output").read_text().strip().split("=")
    assert name == "key"
    assert re.fullmatch(r"qz-pip-[0-9a-f]{16}", key)
    assert cache["key"].startswith("${{ steps.cache.outputs.key }}-")
    install = STEPS["Install qz"]["run"]
    assert set(re.findall(r"\S+constraints\.txt", install)) == {'"$ACTION/constraints.txt'}


def test_the_actions_inputs_and_outputs_are_documented() -> None:
    page = (ROOT / "docs/how-to/ci.md").read_text()
    for name, spec in {**ACTION["inputs"], **ACTION["outputs"]}.items():
        assert f"| `{name}` |" in page
        assert spec["description"].endswith(".")


def test_the_workflows_and_those_on_the_pages_are_what_github_runs(tmp_path: Path) -> None:
    """By jactionlint, safety included; on the pages an action may be named by a tag, and a job lacks a time limit."""
    pages = [block for page in PAGES for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)]
    workflows = [block for block in pages if "jobs:" in block]
    assert len(workflows) >= 3
    for number, workflow in enumerate(workflows):
        (tmp_path / f"{number}.yml").write_text(workflow)
    bare: tuple[str | Path, ...] = ("--ignore", "unpinned-uses", "--ignore", "missing-timeout")
    own: tuple[str | Path, ...] = (*sorted((ROOT / ".github/workflows").iterdir()), ROOT / "action.yml")

    def lint(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).with_name("jactionlint"), "-c", ROOT / ".github/jactionlint.yaml", *arguments]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)

    for arguments in (own, (*bare, *sorted(tmp_path.iterdir()))):
        done = lint(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "wrong.yml").write_text(workflows[0].replace("runs-on", "run-on"))
    assert "run-on" in lint(*bare, tmp_path / "wrong.yml").stdout


def test_the_documented_workflow_uses_the_action_as_it_is() -> None:
    page = (ROOT / "docs/how-to/ci.md").read_text()
    found = re.search(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    workflow = yaml.safe_load(found[1])
    first, second = workflow["jobs"]["quantize"]["steps"]
    assert set(first["with"]) <= set(ACTION["inputs"])
    assert {name for name, spec in ACTION["inputs"].items() if spec.get("required")} <= set(first["with"])
    assert set(re.findall(r"steps\.qz\.outputs\.([\w-]+)", second["run"])) <= set(ACTION["outputs"])


def test_the_arithmetic_of_the_free_runner_adds_up() -> None:
    """FLUX.1-dev's transformer: 23,802,816,640 bytes are 11.90 billion parameters in bfloat16."""
    parameters = (23_802_816_640 - 10**6) / 2
    output = parameters * (4 + 32 / 64) / 8
    assert round(parameters / 1e9, 2) == 11.90
    assert round(output / 1e9, 1) == 6.7
    assert 6.7 + 1.7 < 14
