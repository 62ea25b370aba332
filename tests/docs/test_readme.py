"""Run `make demo`, then every command of the pages on its output."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helpers.commands import ROOT
from helpers.pages import blocks, lines, parser_of
from helpers.service import started
from sa3_trt_core.engines import BACKENDS
from sa3_trt_core.targets import find_target

ENGINES = ("sa3-m", "sa3-m-fp8", "t5gemma", "same-l-decoder")
SIGMAS = ("1.0000", "0.9944", "0.9845", "0.9579", "0.8909", "0.7455", "0.5125", "0.2739")


def shell(line: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one command as a user with an activated environment does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        line, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )


def parsed(words: list[str]) -> argparse.Namespace:
    """Return what the parser of a command makes of its words."""
    parser = parser_of(Path(words[0]).stem)
    assert parser is not None, words
    return parser.parse_args(words[1:])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A working folder with the sources in it and an output/ of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("build", "scripts", "interface"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def demo(checkout: Path) -> str:
    """Run `make demo` in an empty output/; return what it prints."""
    result = shell(["python", "build/demo.py"], checkout)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("precision", ["fp8", "fp16mixed"])
def test_the_demo_ends_with_sound(demo: str, checkout: Path, precision: str) -> None:
    path = checkout / "output" / f"demo_{precision}.wav"
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (44100, 2, "PCM_16", 441000)
    samples, _ = soundfile.read(path)
    assert np.sqrt(np.square(samples).mean()) > 0.01 and np.abs(samples).max() < 0.999
    assert str(path.relative_to(checkout)) in demo


def test_the_demo_shows_stages_parity_and_engines(demo: str, checkout: Path) -> None:
    for stage in ("checkpoint", "export to ONNX", "DiT to FP16-mixed", "calibration capture", "DiT to FP8", "engines"):
        assert re.search(rf"^{stage} +\d+\.\d +\d+\.\d [kMG]B$", demo, re.MULTILINE), stage
    for sigma in SIGMAS:
        row = re.search(rf"^{sigma} +4 +(0\.\d+)", demo, re.MULTILINE)
        assert row is not None and float(row[1]) >= 0.99, sigma
    for kind in ("text", "inpaint", "audio", "null"):
        assert re.search(rf"^{kind} +\d+ +0\.99\d+", demo, re.MULTILINE), kind
    for name in ENGINES:
        for arch in ("sm_89", "sm_120"):
            engine = BACKENDS["tensorrt_rtx"].engine_path(Path("output/demo/models"), arch, find_target(name))
            assert str(engine) in demo and (checkout / engine).stat().st_size > 100_000


def test_the_demo_leaves_a_page_to_listen_to(demo: str, checkout: Path) -> None:
    page = checkout / "output/demo/validation/listen.html"
    assert page.stat().st_size > 1_000_000 and str(page.relative_to(checkout)) in demo
    report = json.loads(page.with_name("report.json").read_text())
    assert report["candidate"]["name"] == "fp8" and all(gate["passed"] for gate in report["gates"])


def test_a_second_demo_makes_nothing_again(demo: str, checkout: Path) -> None:
    def made() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (checkout / "output/demo").rglob("*") if path.is_file()}

    before = made()
    result = shell(["python", "build/demo.py"], checkout)
    assert result.returncode == 0, result.stderr
    changed = {path.name for path, stamp in made().items() if before.get(path) != stamp}
    assert changed <= {"tokenizer.json", "tokenizer_config.json"}
    assert result.stdout.count(" current ") == 2 * len(ENGINES)


def test_the_commands_of_the_pages_run(demo: str, checkout: Path) -> None:
    """Commands run in document order, each on the output of those before it."""
    assert len(lines("sh")) >= 15
    for line in lines("sh"):
        result = shell(shlex.split(line), checkout)
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        assert result.stdout.strip(), line
    assert soundfile.info(checkout / "output/techno.wav").frames == 5 * 44100
    assert len(list((checkout / "output/many").iterdir())) == 2, "half of them by --shard, the other half by --ray"


def test_the_python_of_the_pages_runs(demo: str, checkout: Path) -> None:
    for block in blocks("python"):
        result = shell(["python", "-c", block.text], checkout)
        assert result.returncode == 0 and result.stdout == f"torch.Size([{5 * 44100}, 2])\n", result.stderr
    assert soundfile.info(checkout / "output/piano.flac").subtype == "PCM_24"


def test_the_service_of_the_pages_answers_their_requests(demo: str, checkout: Path) -> None:
    (serve,) = set(lines("sh serve"))
    words = shlex.split(serve)
    assert words[0] == "sa3_serve" and parsed(words).port == 8000
    with started([*words[1:], "--port", "0"], checkout) as service:
        for line in lines("sh curl"):
            assert "localhost:8000" in line
            result = shell(shlex.split(line.replace("localhost:8000", f"127.0.0.1:{service.port}")), checkout)
            assert result.returncode == 0, f"{line}\n{result.stderr}"
        assert service.metric("sa3_requests_total", 'status="200"') == len(lines("sh curl")) - 1
        assert service.stop() == 0
    for name in ("served", "bells_served", "rain"):
        assert soundfile.info(checkout / f"output/{name}.wav").frames == 5 * 44100, name


def test_the_commands_for_a_gpu_host_parse() -> None:
    """They are not run here, but an unknown flag or target is detected."""
    gpu = [shlex.split(line) for line in lines("sh gpu")]
    assert gpu
    for line in gpu:
        if line[0] == "sa3_trt":
            assert parsed(line).prompt
        else:
            assert line[:2] == ["python", "build/build_from_onnx.py"]
            assert all(find_target(name) for name in parsed(line[1:]).names)


def test_the_commands_of_a_contributor_name_what_is_there() -> None:
    develop = [shlex.split(line, comments=True) for line in lines("sh develop")]
    assert [line[0] for line in develop] == ["make", ".venv/bin/python", ".venv/bin/ruff", "pipx", "chromium"]
    assert shell(["make", "--dry-run", *develop[0][1:]], ROOT).returncode == 0
    (test,) = [word for word in develop[1] if word.endswith(".py")]
    assert f"{develop[1][develop[1].index('-k') + 1]}" in (ROOT / test).read_text()
    (picture,) = [word.partition("=")[2] for word in develop[-1] if word.startswith("--screenshot=")]
    assert f"({picture})" in (ROOT / "README.md").read_text() and (ROOT / picture).stat().st_size < 200_000


def test_make_knows_the_two_commands() -> None:
    assert [line.split("#")[0].strip() for line in lines("sh make")] == ["make demo", "make test"]
    for goal, expected in (("demo", "build/demo.py"), ("test", "-m pytest")):
        planned = shell(["make", "--dry-run", goal], ROOT)
        assert planned.returncode == 0 and expected in planned.stdout


def test_every_command_of_the_producer_page_parses() -> None:
    """The table of build/README.md: each command exists and takes the flags shown."""
    rows = re.findall(r"\| \d \| `(\S+\.py) (.*?)` \|", (ROOT / "build/README.md").read_text())
    assert len(rows) == 4
    for script, flags in rows:
        assert parsed([script, *shlex.split(flags)])
