"""Text as editors and shells write it: byte-order marks, separators, lone surrogates, very long numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sa3_trt
from helpers.commands import assert_user_error, run
from sa3_trt_core import Request
from sa3_trt_core.cli import prompts
from sa3_trt_core.cli.arguments import Parser, integer_type, number_type
from sa3_trt_core.cli.prompts import PromptRow
from sa3_trt_core.errors import ToolError
from sa3_validation.gates import read_gates

BOM = b"\xef\xbb\xbf"
SEPARATORS = "\u2028\u2029\x85\x1c\x1d\x1e\v\f"


@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_marks_and_line_ends_are_no_part_of_a_prompt(tmp_path: Path, mark: bytes, end: bytes) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(mark + end.join([b"slow piano", b"", b'{"prompt": "bells", "seed": 7}', b""]))
    assert prompts.read_prompts(path) == [PromptRow("slow piano"), PromptRow("bells", seed=7)]


def test_files_that_were_joined_have_marks_inside(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(BOM + b"slow piano\n" + BOM + b'{"prompt": "bells", "seed": 7}\n' + BOM + BOM + b"\n")
    assert prompts.read_prompts(path) == [PromptRow("slow piano"), PromptRow("bells", seed=7)]


@pytest.mark.parametrize(("redirection", "code", "words"), [
    ("<<< $'slow piano\\n{\"prompt\": \"bells\", \"seed\": 7}'", 0, ""),
    ("<&-", 2, "standard input contains no prompt"),
    ("</dev/null", 2, "standard input contains no prompt"),
    ("<<< $'caf\\xe9'", 2, "standard input is not UTF-8 text: byte 3"),
])  # fmt: skip
def test_prompts_come_from_standard_input(tiny_onnx: Path, redirection: str, code: int, words: str) -> None:
    line = [sys.executable, "-m", "sa3_trt", "--prompts-file", "-", "--dry-run", "--json", "--backend", "onnxruntime",
            "--onnx-root", str(tiny_onnx)]  # fmt: skip
    command = ["bash", "-c", f'"$@" {redirection}', "bash", *line]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    if code == 0:
        assert [row["prompt"] for row in json.loads(done.stdout)["rows"]] == ["slow piano", "bells"]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_other_separators_stay_inside_a_prompt(tmp_path: Path, separator: str) -> None:
    text = f"slow piano{separator}and strings"
    path = tmp_path / "prompts"
    path.write_bytes(f"{text}\n{json.dumps({'prompt': text}, ensure_ascii=False)}\n".encode())
    assert [row.prompt for row in prompts.read_prompts(path)] == [text, text]


@pytest.mark.parametrize(("data", "words"), [
    (b'{"prompt": "a"}\n{"prompt": "piano \\ud83d x"}\n', "line 2 holds a character"),
    (b'{"prompt": "a", "negative_prompt": "\\udcff"}', "line 1 holds a character"),
    (b"caf\xe9\n", "not UTF-8 text: byte 3 is 0xe9"),
    ("a\nb\n".encode("utf-16"), "UTF-16"),
    (b'{"prompt": "a", "seed": ' + b"9" * 400 + b"}", "line 1: seed 999"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "is outside 0 to"),
    (b'{"prompt": "a", "seconds": -' + b"9" * 5000 + b"}", "is outside 0.01 to"),
    (b'{"prompt": "a", "seed": -' + b"9" * 400 + b"}", "line 1: seed -999"),
    (b'{"prompt": "a", "seconds": ' + b"9" * 400 + b"}", "line 1: seconds 999"),
    (b'{"prompt": "a", "seconds": 1e999}', "line 1: seconds inf"),
    (b'{"prompt": "a", "seconds": NaN}', "line 1: seconds nan"),
    (b'{"prompt": "a", "seed": true}', "line 1: seed is True"),
    (b'{"prompt": ["a"]}', "line 1: prompt is ['a']"),
    (b'{"prompt": null}', "line 1: prompt is None"),
    (b"{" * 100_000, "line 1 begins with {"),
    (BOM, "no prompt"),
    (b"\r\n \t\r\n", "no prompt"),
])  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(data)
    with pytest.raises(ToolError) as caught:
        prompts.read_prompts(path)
    assert words in caught.value.message and len(caught.value.message) < 300 + len(str(path))


@pytest.mark.parametrize("flag", ["--prompt", "--negative-prompt"])
def test_bytes_of_another_encoding_are_refused_before_anything_is_loaded(flag: str) -> None:
    argv = ["--prompt", "x", "--cfg", "3", "--backend", "onnxruntime", flag, "caf\udce9"]
    assert_user_error(run(sa3_trt.main, argv), "not Unicode", "caf\\udce9")


@pytest.mark.parametrize("text", ["9" * 400, "-" + "9" * 400, "9" * 5000, "1e400", "0." + "0" * 5000 + "1", "٣" * 5000])
def test_numbers_of_any_length_are_read_or_refused(text: str) -> None:
    parser = Parser(prog="p")
    parser.add_argument("--x", type=number_type(0.5, 10, "seconds"))
    parser.add_argument("--n", type=integer_type(1, 8))
    for flag in ("--x", "--n"):
        with pytest.raises(ToolError) as caught:
            parser.parse_args([f"{flag}={text}"])
        assert "is outside" in caught.value.message or "is not a whole number" in caught.value.message
        assert len(caught.value.message) < 200


@pytest.mark.parametrize("bad", [
    {"seed": 10**400}, {"seed": -(10**5000)}, {"seconds": 10**400}, {"seconds": "5"}, {"steps": None}, {"cfg": 1e400},
    {"prompt": "a\ud800"}, {"prompt": None}, {"negative_prompt": 3, "cfg": 2.0}, {"duration_padding": -1.0},
    {"duration_padding": float("nan")}, {"schedule_order": "both"}, {"seed": True}, {"steps": 2.5}, {"seed": 1.0},
])  # fmt: skip
def test_the_python_door_refuses_them_too(bad: dict) -> None:
    with pytest.raises(ToolError) as caught:
        Request(**{"prompt": "x", **bad})
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(("line", "words"), [
    (["--device", "9" * 5000], "device"), (["--devices", "9" * 5000], "device"),
    (["--inpaint-range", "9" * 400], "not two numbers"),
    (["--inpaint-range", "0," + "9" * 400, "--init-audio", "absent.wav"], "in-painting range"),
    (["--seed", "9" * 400], "outside -1 to"), (["--chunk-frames", "9" * 400], "outside 0 to"),
])  # fmt: skip
def test_endless_numbers_on_the_command_line(line: list[str], words: str) -> None:
    result = run(sa3_trt.main, ["--prompt", "x", "--backend", "onnxruntime", "--dry-run", *line])
    assert_user_error(result, words)


def test_a_value_that_begins_with_a_dash_is_explained() -> None:
    argv = ["--prompt", "x", "--cfg", "3", "--dry-run", "--backend", "onnxruntime"]
    for flag in ("--negative-prompt", "--prompt", "--out", "--prompts-file"):
        result = run(sa3_trt.main, [*argv, flag, "-drums"])
        assert_user_error(result, flag)
        assert f"{flag}=-" in result.err
    result = run(sa3_trt.main, [*argv, "--negative-prompt=-drums"])
    assert result.code == 0, result.err


def test_minus_one_is_a_random_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--prompt", "x", "--dry-run", "--json", "--backend", "onnxruntime", "--seed", "-1"]
    seeds = {json.loads(run(sa3_trt.main, argv).out)["rows"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3 and all(seed >= 0 for seed in seeds)


NAMES = [
    "速い太鼓", "遅い太鼓", "быстрый", "медленный", "🎵", "🎶", "!!!", "???", "naïve", "ß", "ẞß",
    "a" * 60, "a" * 61, "slow piano, " * 9 + "no drums", "slow piano, " * 9 + "no bass", "e\u0301tude", "étude 2",
]  # fmt: skip


def test_prompts_that_differ_have_names_that_differ() -> None:
    slugs = [prompts.slug(name) for name in NAMES]
    assert len(set(slugs)) == len(NAMES), slugs
    assert all(slug.isascii() and 0 < len(slug) <= prompts.MAX_SLUG_LENGTH and slug[0].isalnum() for slug in slugs)
    assert (prompts.slug("Sad Säge, 90 BPM"), prompts.slug("Étude"), prompts.slug("")) == (
        "sad-sage-90-bpm", "etude", "untitled",
    )  # fmt: skip


def test_rows_of_one_run_never_share_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(
        '{"prompt": "a", "seed": 1}\n{"prompt": "a", "seed": 1}\n{"prompt": "A", "seed": 1}\n'
    )
    argv = ["--dry-run", "--json", "--backend", "onnxruntime", "--prompts-file", str(tmp_path / "rows"), "--count", "2"]
    rows = json.loads(run(sa3_trt.main, argv).out)["rows"]
    assert len({row["out"] for row in rows}) == len(rows) == 6
    assert [row["seed"] for row in rows] == [1, 2] * 3


def test_gates_may_begin_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "gates.toml").write_bytes(BOM + b'format = 1\n[[gate]]\nfigure = "x"\nat_least = 0.5\n')
    assert [gate.figure for gate in read_gates(tmp_path / "gates.toml")] == ["x"]


def test_a_prompt_typed_in_another_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return "caf\udce9\n"

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("sa3_trt_core.cli.job.sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.chdir(tmp_path)
    result = run(sa3_trt.main, ["--dry-run", "--backend", "onnxruntime"])
    assert result.code == 2 and "Traceback" not in result.err


@pytest.mark.parametrize("text", [None, "no sound"])
def test_a_dry_run_opens_the_sound_to_start_from(tmp_path: Path, text: str | None) -> None:
    sound = tmp_path / "a.wav"
    if text is not None:
        sound.write_text(text)
    argv = ["--prompt", "x", "--dry-run", "--backend", "onnxruntime", "--init-noise-level", ".5", "--init-audio", sound]
    assert_user_error(run(sa3_trt.main, argv), "a.wav")
