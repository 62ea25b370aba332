"""The demo, whole, and then every command of the READMEs on what it made."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import build_from_onnx
import numpy as np
import pytest
import soundfile

import sa3_trt
from sa3_serve import command
from sa3_trt_core.engines import BACKENDS
from sa3_trt_core.targets import find_target

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("sa3-m", "sa3-m-fp8", "t5gemma", "same-l-decoder")
SIGMAS = ("1.0000", "0.9944", "0.9845", "0.9579", "0.8909", "0.7455", "0.5125", "0.2739")


def commands(kind: str) -> list[str]:
    """The lines of the README's ```sh blocks of one kind ("" is run as it stands)."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(rf"^```sh{kind and ' '}{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def shell(line: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one command as a user with an activated environment does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        line, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A working folder with the sources in it and an output/ of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("build", "scripts", "interface"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def demo(checkout: Path) -> str:
    """What `make demo` prints, after it has run from nothing."""
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


def test_the_readmes_commands_run(demo: str, checkout: Path) -> None:
    """In the order they stand in, each on what the one before it made."""
    lines = commands("")
    assert len(lines) >= 5
    for line in lines:
        result = shell(shlex.split(line), checkout)
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        assert result.stdout.strip(), line
    assert soundfile.info(checkout / "output/techno.wav").frames == 5 * 44100


def test_the_commands_for_a_gpu_host_parse() -> None:
    """They are not run here; a flag or target that does not exist would be found."""
    lines = [shlex.split(line) for line in commands("gpu")]
    assert lines
    for line in lines:
        if line[0] == "sa3_trt":
            assert sa3_trt.parser().parse_args(line[1:]).prompt
        else:
            assert line[:2] == ["python", "build/build_from_onnx.py"]
            assert all(find_target(name) for name in build_from_onnx.parser().parse_args(line[2:]).names)


def test_the_commands_of_a_service_and_of_bulk_jobs_parse() -> None:
    """They are tested in tests/serve and tests/bulk; a flag that does not exist would be found here."""
    bulk, (serve,) = [shlex.split(line) for line in commands("bulk")], [shlex.split(line) for line in commands("serve")]
    assert [line[0] for line in bulk] == ["sa3_trt"] * 2 and serve[0] == "sa3_serve"
    assert all(sa3_trt.parser().parse_args(line[1:]).prompts_file for line in bulk)
    assert command.parser().parse_args(serve[1:]).port == 8000


def test_make_knows_the_two_commands() -> None:
    assert [line.split("#")[0].strip() for line in commands("make")] == ["make demo", "make test"]
    for goal, wanted in (("demo", "build/demo.py"), ("test", "-m pytest")):
        planned = shell(["make", "--dry-run", goal], ROOT)
        assert planned.returncode == 0 and wanted in planned.stdout


def test_every_command_of_the_producer_page_parses() -> None:
    """The table of build/README.md: each command exists and takes the flags shown."""
    rows = re.findall(r"\| \d \| `(\S+\.py) (.*?)` \|", (ROOT / "build/README.md").read_text())
    assert len(rows) == 4
    for script, flags in rows:
        module = __import__(script.removesuffix(".py"))
        assert module.parser().parse_args(shlex.split(flags))
