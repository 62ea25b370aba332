"""The listening page in a real browser: it plays, switches without a gap, counts correctly and fetches nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_trt_core.shapes import SAMPLE_RATE
from sa3_validation import page
from sa3_validation.study import StudyResult

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PITCH = 441.0  # Hz: 100 samples a period
LEVELS = {"reference": 0.5, "candidate": 0.25}
EVIL = 'a prompt with </script><script>document.title = "taken over"</script> & "quotes"'

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine (apt-get install chromium)"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
]


def document() -> dict[str, Any]:
    distance = {
        "rms": 1.0,
        "spectral": 0.1,
        "chroma": None,
        "onsets": 1.0,
        "loudness": -6.0,
        "clipped": 0.0,
        "silent": 0.0,
    }
    cases = [
        {"name": f"text {number}", "prompt": EVIL if number == 1 else f"prompt {number}",
         "rollouts": {"ping_pong": {"candidate": {"cosine": 0.9 + number / 100}}}, "audio": {"candidate": distance},
         "levels": {"reference": {"loudness": -14.0}, "candidate": {"loudness": None}}}
        for number in (1, 2, 3)
    ]  # fmt: skip
    gates = [{"passed": True, "line": "PASS a"}, {"passed": False, "line": "FAIL b: 1 (required >= 2)"}]
    sides = {side: {"name": name} for side, name in (("reference", "fp16mixed"), ("candidate", "fp8"))}
    return {**sides, "created": "2026-11-23T00:00:00+00:00", "gates": gates, "cases": cases}


def until(tab: Any, expression: str) -> None:
    """Wait until an expression is true on the page; Playwright's wait_for_function needs eval, which CSP forbids."""
    for _ in range(500):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(20)
    raise AssertionError(f"not within 10 s: {expression}")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a page of three sounds: one tone, half as loud in the candidate."""
    time = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    tone = np.stack([np.sin(2 * np.pi * PITCH * time)] * 2, axis=1)
    page_sounds = StudyResult([])
    for side, level in LEVELS.items():
        page_sounds.sounds[side] = {case["name"]: (level * tone).astype(np.float32) for case in document()["cases"]}
    return page.write(tmp_path_factory.mktemp("page") / "listen.html", document(), page_sounds)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        argv = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        opened = playwright.chromium.launch(executable_path=BROWSER, args=argv)
        yield opened
        opened.close()


@contextlib.contextmanager
def opened(browser: Any, file: Path, **options: Any) -> Iterator[Any]:
    """Open the page from the disk; fail at the end on script errors and on requests."""
    context = browser.new_context(viewport={"width": 1000, "height": 800}, accept_downloads=True, **options)
    tab = context.new_page()
    complaints: list[str] = []
    fetched: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: fetched.append(request.url))
    tab.goto(file.as_uri())
    yield tab
    assert complaints == []
    assert [url for url in fetched if not url.startswith(("file:", "data:", "blob:"))] == []
    context.close()


@pytest.fixture
def tab(browser: Any, file: Path) -> Iterator[Any]:
    with opened(browser, file) as opened_tab:
        yield opened_tab


@pytest.fixture
def tapped(browser: Any, file: Path) -> Iterator[Any]:
    """Open the page without its content security policy, so that a script can record the sound."""
    with opened(browser, file, bypass_csp=True) as opened_tab:
        yield opened_tab


def test_the_adapters_of_both_models_are_named_with_their_strengths(browser: Any, file: Path, tmp_path: Path) -> None:
    lines = ["room: dora-rows, rank 8, 20 layers, strength 0.8", "<b>@DATA@</b>: lora, rank 4, 1 layers, strength -1"]
    page_sounds = StudyResult([])
    for side in LEVELS:
        page_sounds.sounds[side] = {case["name"]: np.zeros((4410, 2), np.float32) for case in document()["cases"]}
    adapted = page.write(tmp_path / "listen.html", {**document(), "loras": lines}, page_sounds)
    with opened(browser, adapted) as one:
        assert one.locator("#adapters li").all_inner_texts() == lines
        assert "play" in one.locator("#cards").inner_text().lower()
    with opened(browser, file) as one:
        assert one.locator("#adapters").count() == 0


TAP = """registerProcessor("tap", class extends AudioWorkletProcessor {
  process([input]) {
    if (input.length) this.port.postMessage(input[0].slice());
    return true;
  }
});"""
# A processor on the audio thread receives every rendered sample; one on the page's thread loses some on a
# busy machine, which looks like the discontinuity that the test looks for.
CAPTURE = """async ([code, act]) => {
  await context.audioWorklet.addModule("data:text/javascript," + encodeURIComponent(code));
  const tap = new AudioWorkletNode(context, "tap"), heard = [];
  tap.port.onmessage = (event) => heard.push(...event.data);
  master.connect(tap);
  const until = async (truth) => { while (!truth()) await new Promise((done) => setTimeout(done, 10)); };
  await until(() => heard.length > 10000);
  document.querySelector(act).click();
  const then = heard.length;
  await until(() => heard.length > then + 15000);
  master.disconnect(tap);
  return heard;
}"""


def captured(tab: Any, act: str) -> np.ndarray:
    """Return the samples that reach the output while `act` is clicked."""
    samples = np.asarray(tab.evaluate(CAPTURE, [TAP, act]))
    assert len(samples) > SAMPLE_RATE // 10
    return samples


def test_it_plays_and_switches_without_a_gap_at_the_same_place(tapped: Any) -> None:
    tapped.get_by_role("button", name="Play text 1").click()
    tapped.get_by_role("button", name="Pause text 1").wait_for()
    tapped.wait_for_timeout(200)
    samples = captured(tapped, '[aria-label="text 1: fp8"]')
    windows = np.abs(samples[: len(samples) // 200 * 200].reshape(-1, 200)).max(axis=1)
    assert windows[0] == pytest.approx(LEVELS["reference"], rel=0.05)
    assert windows[-1] == pytest.approx(LEVELS["candidate"], rel=0.05)
    assert windows.min() > 0.95 * LEVELS["candidate"]  # no gap of two periods anywhere
    steepest = 2 * math.pi * PITCH / SAMPLE_RATE * LEVELS["reference"]
    assert np.abs(np.diff(samples)).max() < 1.15 * steepest  # another place in the tone would be a jump
    assert tapped.get_by_role("button", name="text 1: fp8").get_attribute("aria-pressed") == "true"


def test_another_sound_stops_the_first_and_space_pauses(tab: Any) -> None:
    tab.get_by_role("button", name="Play text 1").click()
    tab.get_by_role("button", name="Pause text 1").wait_for()
    tab.get_by_role("button", name="Play text 2").click()
    tab.get_by_role("button", name="Pause text 2").wait_for()
    assert tab.get_by_role("button", name="Play text 1").is_visible()
    tab.locator("h1").click()
    tab.keyboard.press("b")
    assert tab.get_by_role("button", name="text 2: fp8").get_attribute("aria-pressed") == "true"
    tab.keyboard.press("Space")
    assert tab.get_by_role("button", name="Play text 2").is_visible()


def test_the_position_is_kept_by_a_switch_and_moved_by_the_slider(tab: Any) -> None:
    tab.get_by_role("slider", name="Position of text 3").fill("0.5")
    until(tab, "cards[2].player.offset > 0")
    tab.get_by_role("button", name="text 3: fp8").click()
    assert tab.evaluate("cards[2].player.position") == pytest.approx(1.0, abs=0.01)


def blind_test(tab: Any, seed: int, wrong: int) -> list[str]:
    """Go through a test by keyboard with the last `wrong` answers wrong; return X of each trial."""
    tab.get_by_role("button", name="Blind test").click()
    tab.get_by_role("textbox", name="Seed of the order").fill(str(seed))
    tab.get_by_role("button", name="Start").click()
    truth: list[str] = tab.evaluate("blind.trials.map((one) => one.x)")
    tab.locator("h1").click()
    for number, x in enumerate(truth):
        assert tab.locator("#count").inner_text().startswith(f"Trial {number + 1} of 10")
        right = number < len(truth) - wrong
        tab.keyboard.press("1" if (x == "A") == right else "2")
    return truth


def test_the_blind_test_counts_right_and_saves_its_result(tab: Any, tmp_path: Path) -> None:
    truth = blind_test(tab, seed=7, wrong=2)
    p = sum(math.comb(10, hits) for hits in (8, 9, 10)) / 2**10
    assert tab.locator("#score").inner_text().startswith(f"8 of 10 right, p = {p:.4f}")
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save the result as JSON").click()
    download.value.save_as(tmp_path / "result.json")
    saved = json.loads((tmp_path / "result.json").read_text())
    assert (saved["seed"], saved["right"], saved["of"], saved["A"], saved["B"]) == (7, 8, 10, "fp16mixed", "fp8")
    assert saved["p"] == pytest.approx(p, rel=1e-12)
    assert [trial["x"] for trial in saved["trials"]] == truth
    assert [trial["right"] for trial in saved["trials"]] == [True] * 8 + [False] * 2


def test_the_seed_alone_decides_the_order(tab: Any) -> None:
    def order(seed: int) -> str:
        return str(tab.evaluate("(seed) => { start(seed); return JSON.stringify(blind.trials); }", seed))

    assert order(3) == order(3)
    orders = {order(seed) for seed in range(20)}
    assert len(orders) == 20
    assert {x for text in orders for x in re.findall(r'"x":"(.)"', text)} == {"A", "B"}


def test_x_sounds_as_what_it_is_and_nothing_on_the_screen_tells(tab: Any) -> None:
    tab.get_by_role("button", name="Blind test").click()
    tab.get_by_role("textbox", name="Seed of the order").fill("11")
    tab.get_by_role("button", name="Start").click()
    tab.locator("h1").click()
    screens = set()
    for _ in range(10):
        x = tab.evaluate("blind.trials[blind.at].x")
        tab.keyboard.press("x")
        until(tab, "blind.player.running")
        assert tab.evaluate("blind.player.chosen") == "AB".index(x)
        screens.add((x, tab.locator("#blind-choices").inner_html()))
        tab.keyboard.press("1")
    assert {x for x, _ in screens} == {"A", "B"} and len({choices for _, choices in screens}) == 1


def test_everything_that_is_used_has_a_name(tab: Any) -> None:
    for view in ("Listen", "Blind test"):
        tab.get_by_role("button", name=view).click()
        for role in ("button", "slider", "textbox", "img"):
            every = tab.get_by_role(role).count()
            assert tab.get_by_role(role, name=re.compile(r"\w")).count() == every
            assert every > 0 or (view, role) in {("Listen", "textbox"), ("Blind test", "img"), ("Blind test", "slider")}


def test_a_prompt_is_text_and_null_is_a_dash(tab: Any) -> None:
    assert tab.title() == "fp8 against fp16mixed"
    card = tab.get_by_role("article", name="text 1")
    assert EVIL in card.inner_text()
    assert card.get_by_role("row", name="chroma").get_by_role("cell").inner_text() == "-"
    assert "1 gates failed: FAIL b: 1" in tab.locator("#verdict").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_schemes(tab: Any, scheme: str) -> None:
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": 360, "height": 740})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    colours = tab.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    text, ground = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (text < ground) == (scheme == "light") and abs(text - ground) > 500
