"""The Space in a real browser, against the tests' Hub: look, publish, come back; no token on the page or in the log."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pipelines
import readers
from hub_server import OWNER, Fault, HubServer

playwright: Any = pytest.importorskip("playwright.sync_api", reason="make space installs it")
SPACE = Path(__file__).resolve().parents[2] / "space"
PICTURES = SPACE.parent / ".space"
PATIENCE = 120_000
"""Milliseconds until something that must appear has not."""


@dataclass
class Site:
    url: str
    hub: HubServer
    log: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The app in a process of its own, and the Hub that it talks to."""
    place = tmp_path_factory.mktemp("space")
    pipeline = pipelines.flux(place / "flux")
    model = readers.model_folder("llama-untied", place / "llama")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with HubServer() as hub, (place / "log").open("w+") as log:
        for name, folder in (("black-forest-labs/FLUX.1-dev", pipeline), ("tiny/llama", model)):
            hub.add(name, {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()})
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "QZ_"))},
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": OWNER,
            "HF_HOME": str(place / "home"),
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_ANALYTICS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
        }
        app = subprocess.Popen([sys.executable, "app.py"], cwd=SPACE, env=environment, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, app, place / "log")
            yield Site(url, hub, place / "log")
        finally:
            app.terminate()
            app.wait(30)


def wait_for(url: str, app: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert app.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture
def page(browser: Any, site: Site) -> Iterator[Any]:
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(site.url)
    yield page
    assert OWNER not in page.content()
    assert OWNER not in page.url
    assert OWNER not in site.log.read_text()
    context.close()


def keep(page: Any, name: str) -> None:
    """A picture to look at."""
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def test_a_look_shows_sizes_and_where_it_fits(page: Any) -> None:
    page.get_by_label("Repository").fill("https://huggingface.co/black-forest-labs/FLUX.1-dev")
    page.get_by_role("button", name="Look").click()
    sizes = page.get_by_role("table", name="Sizes")
    sizes.wait_for()
    assert sizes.get_by_role("cell", name="transformer", exact=True).is_visible()
    assert "yes" in page.get_by_role("table", name=re.compile("graphics card")).inner_text()
    keep(page, "look")
    page.set_viewport_size({"width": 390, "height": 844})  # a telephone's
    keep(page, "look-390")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    last = sizes.get_by_role("columnheader", name="then, in memory")
    last.scroll_into_view_if_needed()
    box = last.bounding_box()
    assert box["x"] + box["width"] <= 390, "no column is cut off"
    keep(page, "look-390-moved")


@pytest.mark.parametrize("name", ["nowhere", "/etc/passwd", "../secret/file", "~/models"])
def test_what_is_no_repository_is_said_in_words(page: Any, name: str) -> None:
    page.get_by_label("Repository").fill(name)
    page.get_by_role("button", name="Look").click()
    page.get_by_text("is not the name of a repository").first.wait_for()


def test_a_repository_that_does_not_exist_is_said_in_words(page: Any) -> None:
    page.get_by_label("Repository").fill("tiny/nothing")
    page.get_by_role("button", name="Look").click()
    page.get_by_role("status").get_by_text("is not on the Hub").wait_for()
    keep(page, "missing")


def test_nobody_publishes_without_an_account(page: Any) -> None:
    page.get_by_label("Repository").fill("tiny/llama")
    page.get_by_role("button", name="Quantize and publish").click()
    page.get_by_text("Log in first").first.wait_for()


def log_in(page: Any) -> None:
    page.get_by_role("button", name=re.compile("Sign in")).click()
    page.get_by_role("button", name=re.compile("Logout")).wait_for()


def test_a_model_is_quantized_and_published_by_keyboard_and_found_again_after_a_reload(page: Any, site: Site) -> None:
    log_in(page)
    page.get_by_label("Repository").focus()
    page.keyboard.type("tiny/llama")
    page.get_by_label(re.compile("Publish as")).focus()
    page.keyboard.type("me/llama-nf4")
    page.get_by_role("button", name="Quantize and publish").focus()
    page.keyboard.press("Enter")
    page.get_by_text("Published: https://huggingface.co/me/llama-nf4").wait_for()
    keep(page, "published")
    assert {"config.json", "model.safetensors"} <= set(site.hub.repos["me/llama-nf4"].files())
    assert site.hub.repos["me/llama-nf4"].private
    page.reload()
    page.get_by_text("Published: https://huggingface.co/me/llama-nf4").wait_for()
    page.go_back()
    page.goto(site.url)
    page.get_by_text("Published: https://huggingface.co/me/llama-nf4").wait_for()


def test_a_stopped_conversion_frees_its_place_and_is_done_when_it_is_asked_for_again(page: Any, site: Site) -> None:
    log_in(page)
    page.get_by_label("Repository").fill("tiny/llama")
    page.get_by_label(re.compile("Publish as")).fill("me/stopped")
    ask, status = page.get_by_role("button", name="Quantize and publish"), page.get_by_role("status")
    site.hub.faults.append(Fault("cdn", hang=3600))
    for _ in range(3):  # more than may run at the same time
        ask.click()
        page.get_by_role("progressbar").wait_for()
        page.get_by_role("button", name="Stop").click()
        status.get_by_text("Stopped. Ask for the same again").wait_for()
        keep(page, "stopped")
        assert "me/stopped" not in site.hub.repos or not site.hub.repos["me/stopped"].files().keys() - {
            ".gitattributes"
        }
    site.hub.faults.clear()
    ask.click()
    status.get_by_text("Published: https://huggingface.co/me/stopped").wait_for()
    assert {"config.json", "model.safetensors"} <= set(site.hub.repos["me/stopped"].files())
