"""Every row of the table compiled by its own name with the real TensorRT-RTX builder, from tiny graphs of its kind.

The small DiTs and SAME-S have no exporter here: the tiny DiT and SAME-L graphs, of the same contracts, stand in.
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
    """The graph of the same kind, and where there is one of the same precision, that the tiny checkpoint gave."""
    made = [other for other in TARGETS if other.kind == target.kind and (root / other.onnx[0]).is_file()]
    made.sort(key=lambda other: other.precision != target.precision)
    return root / made[0].onnx[0]


@pytest.fixture(scope="module")
def whole_root(tiny_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX root with a graph for every row; where the hub has had several names, the last of them."""
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
    where = ["--onnx-root", whole_root, "--models-dir", tmp_path]
    done = run(build_from_onnx.main, [*names, *RTX, *where, "--json"])
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert [one["target"] for one in made] == names and {one["state"] for one in made} == {"built"}
    for one in made:
        settings = manifest.read_manifest(Path(one["path"])).settings
        assert manifest.verify_manifest(Path(one["path"]), deep=True) is None and settings["target"] == one["target"]
    states = json.loads(run(build.main, ["--list", "--json", *RTX, *where]).out)
    assert {entry["name"] for entry in states if entry["state"] == "current"} == set(names)
    assert run(build.main, ["--missing", *RTX, *where]).out == "nothing to build\n"
