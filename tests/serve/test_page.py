"""The page of the service in a real browser: it generates a sound, plays it, and regenerates a dragged range."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sa3_trt
from helpers.commands import run
from helpers.service import Service, samples, serving

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOKEN = "a-token-for-the-page-test"

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine (apt-get install chromium)"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
]


@pytest.fixture(scope="module")
def service(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN)
    with serving(tiny_onnx, "--token-file", file, token=TOKEN) as server:
        yield server


@pytest.fixture
def tab(service: Service) -> Iterator[Any]:
    """Open the page; fail on script errors and on requests to other hosts."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1000, "height": 1000})
        fetched: list[str] = []
        faults: list[str] = []
        opened.on("request", lambda request: fetched.append(request.url))
        opened.on("pageerror", lambda error: faults.append(str(error)))
        opened.on(
            "console", lambda message: faults.append(message.text) if "Content Security" in message.text else None
        )
        opened.goto(service.address)
        yield opened
        assert faults == []
        assert [url for url in fetched if not url.startswith((service.address, "data:", "blob:"))] == []
        browser.close()


def fill(tab: Any) -> None:
    tab.get_by_label("Token").fill(TOKEN)
    tab.get_by_label("Token").press("Tab")
    tab.get_by_text("medium, onnxruntime").wait_for()
    tab.get_by_label("Prompt").fill('it\'s a "piano" <b>')
    tab.get_by_label("Seconds").fill("2")
    tab.get_by_label("Steps").fill("1")
    tab.get_by_label("Seed").fill("7")


def download(tab: Any, path: Path) -> bytes:
    with tab.expect_download() as event:
        tab.get_by_role("link", name="Download").click()
    event.value.save_as(path)
    return path.read_bytes()


def by_command(tab: Any, root: Path, folder: Path) -> np.ndarray:
    """Return the samples written by the command line that the page shows."""
    words = shlex.split(tab.get_by_label("The same from the command line").input_value())
    assert words[0] == "sa3_trt"
    place = words.index("--out") + 1
    words[place] = str(folder / words[place])
    result = run(sa3_trt.main, [*words[1:], "--onnx-root", root, "--backend", "onnxruntime", "--quiet"])
    assert result.code == 0, result.err
    return samples(Path(words[place]).read_bytes())


def test_it_makes_plays_and_makes_a_part_anew(tab: Any, tiny_onnx: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tab)
    tab.get_by_label("Prompt").press("Tab")
    tab.get_by_role("button", name="Make a sound").press("Enter")  # by keyboard only
    tab.get_by_text("made in").wait_for()
    first = samples(download(tab, tmp_path / "sa3_7.wav"))
    assert first.shape == (88_200, 2)
    assert np.array_equal(by_command(tab, tiny_onnx, tmp_path / "command"), first)
    assert tab.evaluate("document.getElementById('player').play().then(() => true)")

    wave = tab.get_by_role("slider", name="Part to make anew")
    box = wave.bounding_box()
    assert tab.get_by_role("button", name="Make the chosen part anew").is_disabled()
    tab.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 20)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 30, steps=5)
    tab.mouse.up()
    assert wave.get_attribute("aria-valuetext") == "0.5 to 1.5 seconds"
    wave.focus()
    wave.press("Escape")
    assert wave.get_attribute("aria-valuetext") == "nothing chosen"
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "Shift+ArrowRight"):
        wave.press(key)
    assert wave.get_attribute("aria-valuetext") == "0.1 to 0.35 seconds"
    tab.get_by_label("Seed").fill("9")
    tab.get_by_role("button", name="Make the chosen part anew").click()
    tab.get_by_text("seed 9").wait_for()
    second = samples(download(tab, tmp_path / "second.wav"))
    assert second.shape == first.shape and not np.array_equal(first, second)
    assert np.array_equal(by_command(tab, tiny_onnx, tmp_path), second)


def test_what_the_server_says_is_shown_and_a_request_can_be_stopped(tab: Any, service: Service) -> None:
    fill(tab)
    tab.evaluate("document.getElementById('form').noValidate = true")
    tab.get_by_label("Steps").fill("101")
    tab.get_by_role("button", name="Make a sound").click()
    alert = tab.get_by_role("alert")
    alert.filter(has_text="steps 101 is more than this server's 100").wait_for()
    tab.get_by_label("Steps").fill("100")
    tab.get_by_label("Seconds").fill("20")
    tab.get_by_role("button", name="Make a sound").click()
    tab.get_by_role("button", name="Stop").click()
    tab.get_by_text("stopped").wait_for()
    service.until_metric("sa3_ring_requests", 0)
