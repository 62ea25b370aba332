"""Calibration prompts have the deployed form and enough variety; the module imports only the standard library."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from reprompt import MUSIC_EXAMPLES, MusicExample, calibration_prompts, deployed_text

SOURCE = Path(__file__).resolve().parents[2] / "interface" / "reprompt.py"
CAPTION = re.compile(
    r"Genre: (?P<genre>.+?)\. Instruments: (?P<instruments>.+?)\. Rhythm: (?P<rhythm>.+?)\. Mood: (?P<mood>.+?)\. "
    r"Tempo: (?P<bpm>\d+) BPM\. Key: (?P<key>.+?)\. Length: (?P<seconds>[\d.]+) seconds\."
)


def test_there_are_enough_examples_and_all_differ() -> None:
    assert len(MUSIC_EXAMPLES) >= 52  # the reference calibration used 47
    for entries in (
        [example.request.lower() for example in MUSIC_EXAMPLES],
        [(example.genre, example.instruments, example.rhythm) for example in MUSIC_EXAMPLES],
        calibration_prompts(),
    ):
        assert len(set(entries)) == len(entries)


@pytest.mark.parametrize("example", MUSIC_EXAMPLES, ids=lambda example: example.genre)
def test_caption_states_every_fact_of_its_example_in_the_one_form(example: MusicExample) -> None:
    text = deployed_text(example)
    assert text.isascii() and text.splitlines() == [text] and text == " ".join(text.split())
    parts = CAPTION.fullmatch(text)
    assert parts is not None, text
    assert parts["genre"] == example.genre
    assert tuple(parts["instruments"].split(", ")) == example.instruments
    assert parts["rhythm"] == example.rhythm
    assert tuple(parts["mood"].split(", ")) == example.mood
    assert int(parts["bpm"]) == example.bpm
    assert parts["key"] == example.key
    assert float(parts["seconds"]) == example.seconds


@pytest.mark.parametrize("example", MUSIC_EXAMPLES, ids=lambda example: example.genre)
def test_example_is_within_bounds_and_has_no_empty_field(example: MusicExample) -> None:
    assert 40 <= example.bpm <= 190
    assert 10 <= example.seconds <= 180
    texts = (example.request, example.genre, example.rhythm, example.key, *example.instruments, *example.mood)
    assert example.instruments and example.mood
    assert all(text and text == text.strip() for text in texts)
    assert "," not in example.genre + example.key
    assert len(example.request) <= 60  # what a person types, shorter than its caption
    assert len(example.request) < len(deployed_text(example))
    # Counted generously (every word piece of 5 letters, every mark), so that the 256 tokens of the model cut nothing.
    assert sum(-(-len(piece) // 5) for piece in re.findall(r"\w+|[^\w\s]", deployed_text(example))) < 256


def test_examples_span_tempo_length_and_text_size() -> None:
    assert min(e.bpm for e in MUSIC_EXAMPLES) <= 45 and max(e.bpm for e in MUSIC_EXAMPLES) >= 185
    assert min(e.seconds for e in MUSIC_EXAMPLES) <= 12 and max(e.seconds for e in MUSIC_EXAMPLES) >= 175
    sizes = sorted(len(text.split()) for text in calibration_prompts())
    assert sizes[-1] >= 5 * sizes[0]
    # The spread is in the body, not in one outlier at each end.
    assert sizes[len(sizes) * 9 // 10] >= 3 * sizes[len(sizes) // 10]


def test_every_prefix_and_every_run_of_eight_is_varied() -> None:
    prompts = calibration_prompts()
    for start in range(len(MUSIC_EXAMPLES) - 7):
        window = MUSIC_EXAMPLES[start : start + 8]
        assert len({example.genre for example in window}) >= 6
        assert max(e.bpm for e in window) - min(e.bpm for e in window) >= 60
        sizes = [len(text.split()) for text in prompts[start : start + 8]]
        assert max(sizes) >= 2 * min(sizes)


@pytest.mark.parametrize("count", [1, 2, 8, 47, len(MUSIC_EXAMPLES)])
def test_count_gives_the_first_captions_of_the_whole_list(count: int) -> None:
    prompts = calibration_prompts(count)
    assert prompts == [deployed_text(example) for example in MUSIC_EXAMPLES[:count]]
    assert len(prompts) == count


def test_no_count_gives_all_in_a_list_of_the_callers_own() -> None:
    prompts = calibration_prompts()
    assert prompts == calibration_prompts(len(MUSIC_EXAMPLES))
    prompts.clear()
    assert len(calibration_prompts()) == len(MUSIC_EXAMPLES)


@pytest.mark.parametrize("count", [0, -1, len(MUSIC_EXAMPLES) + 1, 10**9])
def test_count_out_of_range_is_refused_with_the_number_available(count: int) -> None:
    with pytest.raises(ValueError, match=rf"\b{len(MUSIC_EXAMPLES)}\b") as refusal:
        calibration_prompts(count)
    assert str(count) in str(refusal.value)


def test_caption_writes_fractions_of_a_second_only_when_there_are_any() -> None:
    assert deployed_text(replace(MUSIC_EXAMPLES[0], seconds=30.0)).endswith("Length: 30 seconds.")
    assert deployed_text(replace(MUSIC_EXAMPLES[0], seconds=12.5)).endswith("Length: 12.5 seconds.")


@pytest.mark.parametrize("rhythm", ["two\nlines", "tab\there", "caf\u00e9 swing", "carriage\rreturn"])
def test_text_that_is_not_one_ascii_line_is_refused(rhythm: str) -> None:
    example = replace(MUSIC_EXAMPLES[0], rhythm=rhythm)
    with pytest.raises(ValueError, match=re.escape(repr(example.request))):
        deployed_text(example)


def test_examples_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        MUSIC_EXAMPLES[0].bpm = 1  # type: ignore[misc]


def test_the_module_needs_only_the_standard_library() -> None:
    # -S hides site-packages and -I the environment and the current folder: a third-party import would fail, and the
    # listing catches a sibling module of ours on the path.
    program = (
        "import runpy, sys\n"
        f"names = runpy.run_path({str(SOURCE)!r})\n"
        "print(len(names['calibration_prompts']()))\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded - set(sys.stdlib_module_names) - {'__main__'}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-I", "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout.split("\n")[:2]) == (0, [str(len(MUSIC_EXAMPLES)), "[]"]), result.stderr
