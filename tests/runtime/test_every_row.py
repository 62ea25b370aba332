"""Every target compiled by name with the real TensorRT-RTX builder, from tiny graphs of its kind.

The small DiTs and SAME-S have no exporter here: the tiny DiT and SAME-L graphs, of the same contracts, replace them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import build_from_onnx
import pytest

import build
from helpers.commands import run
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.hub import resolve
from sa3_trt_core.targets import TARGETS, Target

pytest.importorskip("tensorrt_rtx", reason="the RTX builder is part of requirements-cpu.txt only")
RTX = ["--backend", "tensorrt_rtx", "--arch", "sm_89"]


def tiny_graph(root: Path, target: Target) -> Path:
    """Return the tiny checkpoint's graph of the same kind and, if there is one, of the same precision."""
    candidates = [
        candidate for candidate in TARGETS if candidate.kind == target.kind and (root / candidate.onnx[0]).is_file()
    ]
    candidates.sort(key=lambda candidate: candidate.precision != target.precision)
    return root / candidates[0].onnx[0]


@pytest.fixture(scope="module")
def whole_root(tiny_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an ONNX root with a graph for every target, under the last of the names that the hub has used."""
    root = tmp_path_factory.mktemp("rows")
    for target in TARGETS:
        source, place = tiny_graph(tiny_fp8, target), root / target.onnx[-1]
        place.parent.mkdir(exist_ok=True)
        shutil.copy(source, place)
        for sidecar in resolve.external_data_names(source):
            shutil.copy(source.parent / sidecar, place.parent)
    return root


def test_every_row_compiles_by_its_name(whole_root: Path, tmp_path: Path) -> None:
    names = [target.name for target in TARGETS]
    folders = ["--onnx-root", whole_root, "--models-dir", tmp_path]
    result = run(build_from_onnx.main, [*names, *RTX, *folders, "--json"])
    assert result.code == 0, result.err
    reports = json.loads(result.out)
    assert [report["target"] for report in reports] == names and {report["state"] for report in reports} == {"built"}
    for report in reports:
        settings = manifest.read_manifest(Path(report["path"])).settings
        assert (
            manifest.verify_manifest(Path(report["path"]), deep=True) is None and settings["target"] == report["target"]
        )
    states = json.loads(run(build.main, ["--list", "--json", *RTX, *folders]).out)
    assert {entry["name"] for entry in states if entry["state"] == "current"} == set(names)
    assert run(build.main, ["--missing", *RTX, *folders]).out == "nothing to build\n"
