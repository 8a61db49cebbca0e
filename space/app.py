"""The page: look at what quantizing a repository would give, then quantize it and publish the result as oneself."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
from typing import Any

import gradio as gr
from huggingface_hub import get_token
from jobs import Busy, Job, Jobs
from worker import METHODS

GPUS = (8, 12, 16, 24, 32, 48, 80)
"""Memory of the usual graphics cards, in GB."""
HEADROOM = 1.2
"""What runs beside the weights: activations, a cache, the driver. A rule of thumb, and shown as one."""
SCALES = {"as the libraries write it": None, "searched: same size, smaller error": "search"}
JOBS = Jobs()
STACKED = 260
"""Pixels of the least width of a field: on a telephone one stands below the other."""
LINE: dict[str, Any] = {"max_lines": 1, "min_width": STACKED}

INTRO = """# qz
Quantize a model or a pipeline of the Hub to 4 or 8 bit with bitsandbytes, and publish it under your account. Weights
are streamed: the size of the model does not matter, and no GPU is needed. What comes out loads with plain
`from_pretrained`."""


def request_of(
    source: str, subfolder: str, method: str, scales: str, target: str | None, public: bool
) -> dict[str, Any]:
    """What the worker is asked. Raises gr.Error for what cannot be asked."""
    if not source.strip():
        raise gr.Error("Name a repository, such as HuggingFaceTB/SmolLM2-1.7B-Instruct.")
    request: dict[str, Any] = {
        "source": repository(source),
        "subfolder": subfolder.strip(),
        "method": method,
        "scales": SCALES[scales] if method != "int8" else None,
    }
    return request if target is None else {**request, "target": repository(target), "public": public}


def repository(name: str) -> str:
    """``USER/NAME`` of what was typed or pasted: also of the page's address. A path of this machine is none."""
    name = name.strip().removeprefix("https://").removeprefix("huggingface.co/").rstrip("/")
    parts = name.split("/")[:2]
    if len(parts) != 2 or any(not part or part.startswith(("~", ".")) for part in parts):
        raise gr.Error(f"{name or 'This'} is not the name of a repository: USER/NAME.")
    return "/".join(parts)


def start(request: dict[str, Any], profile: gr.OAuthProfile | None, token: gr.OAuthToken | None) -> Job:
    own = token.token if token else None
    if own and not os.environ.get("SPACE_ID"):
        own = get_token()  # on somebody's own machine Gradio plays the login, and its token is none
    try:
        return JOBS.start(request, profile.username if profile else "", own)
    except Busy as busy:
        raise gr.Error(str(busy)) from None


def look(
    source: str,
    subfolder: str,
    method: str,
    scales: str,
    profile: gr.OAuthProfile | None,
    token: gr.OAuthToken | None,
) -> Iterator[tuple[str, str]]:
    """What quantizing would give: the status line and a table, as HTML."""
    job = start(request_of(source, subfolder, method, scales, None, public=False), profile, token)
    for _ in changes(job):
        yield status(job), ""
    yield status(job), table(job.result) if job.state == "done" else ""


def publish(
    source: str,
    subfolder: str,
    method: str,
    scales: str,
    target: str,
    public: bool,
    profile: gr.OAuthProfile | None,
    token: gr.OAuthToken | None,
) -> Iterator[tuple[str, str, str, str]]:
    """Quantize and push, and show how far it is: status, table, log, and the key that finds the work again."""
    if profile is None or token is None:
        raise gr.Error("Log in first: the result is published as you.")
    name = target.strip() or f"{profile.username}/{default_name(source, subfolder, method)}"
    yield from follow(start(request_of(source, subfolder, method, scales, name, public), profile, token))


def follow(job: Job) -> Iterator[tuple[str, str, str, str]]:
    for _ in changes(job):
        yield status(job), "", "\n".join(job.log), job.key
    yield status(job), table(job.result) if job.state == "done" else "", "\n".join(job.log), job.key


def again(key: str) -> Iterator[tuple[str, str, str, str]]:
    """What an earlier visit of this browser began: shown again after a reload or the back button."""
    job = JOBS.find(key)
    if job is not None:
        yield from follow(job)


def stop(key: str) -> None:
    job = JOBS.find(key)
    if job is None or job.state != "running":
        gr.Info("Nothing is running.")
    else:
        job.stop()


def changes(job: Job) -> Iterator[None]:
    """Whenever there is news of a job, until it ends."""
    while job.state == "running":
        job.changed.wait(5)
        job.changed.clear()
        yield


def default_name(source: str, subfolder: str, method: str) -> str:
    parts = [repository(source).split("/")[1], *subfolder.strip().strip("/").split("/"), method.split(",")[0]]
    return "-".join(part for part in parts if part)


def status(job: Job) -> str:
    """One line, announced by screen readers when it changes."""
    if job.state == "running":
        doing, done, total = (job.progress.get(key) for key in ("doing", "bytes", "all_bytes"))
        text = f"{doing or 'Starting'} …" + (f" {done / total:.0%} of {size(total)}" if total else "")
        bar = f'<progress max="1" value="{done / total if total else 0:.3f}" aria-label="Progress"></progress>'
    else:
        text = {"done": "Done.", "stopped": "Stopped."}.get(job.state, "")
        text = job.result.get("message") or text
        if job.state == "done" and (target := job.request.get("target")):
            text = f"Published: https://huggingface.co/{target}"
        bar = ""
    return f'<div role="status" aria-live="polite">{bar}<p>{html.escape(text)}</p></div>'


def table(result: dict[str, Any]) -> str:
    """Sizes before and after, component by component, and the graphics cards that the result fits in."""
    parts = [part for part in result.get("components") or () if part["bytes"]["source"]]
    rows = [sizes(part["name"], part["method"], part) for part in parts]
    rows.append(sizes("all", "", result) if rows else sizes("model", result["method"], result))
    need = result["memory_footprint"]["after"] * HEADROOM
    fits = ["yes" if need <= gpu * 1e9 else "no" for gpu in GPUS]
    warnings = "".join(f"<li>{html.escape(text)}</li>" for text in result.get("warnings") or ())
    return (
        as_table("Sizes", ["part", "method", "now", "then, on disk", "then, in memory"], rows)
        + as_table(
            "All of it fits in a graphics card with, a fifth left for the work", [f"{gpu} GB" for gpu in GPUS], [fits]
        )
        + (f"<ul>{warnings}</ul>" if warnings else "")
    )


def sizes(name: str, method: str, about: dict[str, Any]) -> list[str]:
    disk = about["bytes"]
    return [name, method, *map(size, (disk["source"], disk["output"], about["memory_footprint"]["after"]))]


def as_table(caption: str, heads: list[str], rows: list[list[str]]) -> str:
    """HTML with a caption and headings that screen readers tell; what is in the cells is text."""
    head = "".join(f"<th scope='col'>{html.escape(each)}</th>" for each in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(each))}</td>" for each in row) + "</tr>" for row in rows)
    made = f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    # On a narrow page the table is moved alone, by keyboard, too.
    return f'<div role="region" aria-label="{caption}" tabindex="0" style="overflow-x: auto">{made}</div>'


def size(count: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:,} bytes"


def page() -> gr.Blocks:
    with gr.Blocks(title="qz: models to 4 and 8 bit") as demo:
        key = gr.BrowserState("", storage_key="qz-job")
        gr.Markdown(INTRO)
        gr.LoginButton()
        with gr.Row():
            source = gr.Textbox(label="Repository", placeholder="black-forest-labs/FLUX.1-dev", scale=2, **LINE)
            subfolder = gr.Textbox(label="Component (optional)", placeholder="transformer", **LINE)
        with gr.Row():
            method = gr.Radio(list(METHODS), value="nf4", label="Method", min_width=STACKED)
            scales = gr.Radio(list(SCALES), value=next(iter(SCALES)), label="Scales of 4-bit blocks", min_width=STACKED)
        target = gr.Textbox(label="Publish as (optional)", placeholder="you/FLUX.1-dev-transformer-nf4", **LINE)
        public = gr.Checkbox(label="Public", value=False)
        with gr.Row():
            see = gr.Button("Look")
            go = gr.Button("Quantize and publish", variant="primary")
            halt = gr.Button("Stop", variant="stop")
        told, sizes = gr.HTML(), gr.HTML()
        log = gr.Textbox(label="Log", lines=8, interactive=False)
        asked = [source, subfolder, method, scales]
        see.click(look, asked, [told, sizes], concurrency_limit=4)
        go.click(publish, [*asked, target, public], [told, sizes, log, key], concurrency_limit=8)
        halt.click(stop, [key], None)
        demo.load(again, [key], [told, sizes, log, key], concurrency_limit=8)
    return demo


if __name__ == "__main__":
    page().launch()
