"""Paths that the system rejects, in every path flag of every command: two lines, no traceback."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import ROOT, listing, run

COMMANDS = sorted(
    path.stem
    for folder in ("build", "scripts")
    for path in (ROOT / folder).glob("*.py")
    if "run_command" in path.read_text()
)
LONG, FAR = "n" * 300, "/".join(["d" * 200] * 30)  # a name, and a path, that no system takes


def path_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        action
        for action in parser._actions
        if action.option_strings and (action.type is Path or action.metavar in ("DIR", "D", "F"))
    ]


def line_with(parser: argparse.ArgumentParser, flags: dict[str, str]) -> list[str]:
    """Return a command line with these flags and a placeholder for every other required one."""
    argv = []
    for action in parser._actions:
        name = action.option_strings[-1] if action.option_strings else ""
        if name in flags:
            argv += [name, flags[name]]
        elif name and action.required:
            choices = [str(choice) for choice in action.choices or ()]
            argv += [name, choices[0] if choices else "absent.safetensors" if action.type is Path else "1"]
        elif name == "--arch":
            argv += [name, "sm_89"]
        elif not name and action.nargs not in ("*", "?"):
            argv.append("sa3-m")
    return [*argv, *(["--prompt", "x"] if parser.prog == "sa3_trt" else [])]


@pytest.mark.parametrize("name", COMMANDS)
def test_names_that_are_too_long(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = importlib.import_module(name)
    parser = module.make_parser()
    flags = [action.option_strings[-1] for action in path_flags(parser)]
    tried = [{flag: bad} for flag in flags for bad in (LONG, FAR)] + [{flag: LONG for flag in flags}]
    for flag_values in tried[-1:] if name == "bench_start" else tried:  # it starts a process each time
        result = run(module.main, line_with(parser, flag_values))
        assert result.code == 2, (flag_values, result)
        lines = result.err.splitlines()
        assert lines[0].startswith("error: ") and lines[1].startswith("  hint: "), (flag_values, result.err)
        assert len(lines) == 2 or name == "bench_start"  # which also prints its child's stderr
    assert listing(tmp_path) == {}


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs another user")
def test_a_folder_that_is_closed_to_this_user(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    lines = [
        ["scripts/sa3_trt.py", "--prompt", "x", "--out", "closed/a.wav"],
        ["scripts/sa3_trt.py", "--prompt", "x", "--prompts-file", "closed/p.txt"],
        ["build/publish.py", "--onnx", "closed/dit_fp8.onnx"],
        ["build/build_dit_fp16mixed.py", "--input", "closed/dit.onnx", "--onnx", "o.onnx"],
    ]
    as_nobody = ["unshare", "--user", "--map-user=12345", "--map-group=12345", sys.executable]
    if subprocess.run([*as_nobody, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip("this machine gives no user namespaces")
    for script, *words in lines:
        result = subprocess.run(
            [*as_nobody, ROOT / script, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 2 and result.stdout == "", result
        assert len(result.stderr.splitlines()) == 2 and result.stderr.startswith("error: "), result.stderr
    closed.chmod(0o700)
    assert list(closed.iterdir()) == []
