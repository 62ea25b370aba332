"""Engines compiled by the real TensorRT-RTX builder, without a GPU, from the tiny graphs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import build_from_onnx
import onnx
import pytest

from helpers.commands import run
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.engines import BACKENDS
from sa3_trt_core.targets import dit_target, find_target

pytest.importorskip("tensorrt_rtx", reason="the RTX builder is part of requirements-cpu.txt only")
RTX = ["--backend", "tensorrt_rtx"]
NAMES = ("sa3-m", "sa3-m-fp8", "t5gemma", "same-l-decoder")


@pytest.fixture(scope="module")
def engines(tiny_fp8: Path, tmp_path_factory) -> tuple[Path, list[dict]]:
    models = tmp_path_factory.mktemp("models")
    argv = [*NAMES, *RTX, "--arch", "sm_89,sm_120", "--json"]
    code, printed, errors = run(
        build_from_onnx.main, [*argv, "--onnx-root", str(tiny_fp8), "--models-dir", str(models)]
    )
    assert code == 0, errors
    return models, json.loads(printed)


def test_four_engines_for_two_architectures(engines: tuple[Path, list[dict]]) -> None:
    models, built = engines
    assert len(built) == 8
    for engine in built:
        path = Path(engine["path"])
        assert path == BACKENDS["tensorrt_rtx"].engine_path(models, engine["arch"], find_target(engine["target"]))
        assert path.stat().st_size == engine["bytes"] > 100_000
        assert manifest.verify_manifest(path, deep=True) is None
        settings = manifest.read_manifest(path).settings
        assert (settings["arch"], settings["backend"]) == (engine["arch"], "tensorrt_rtx")


def test_the_dit_profile_is_the_contracts(engines: tuple[Path, list[dict]]) -> None:
    models, _ = engines
    path = BACKENDS["tensorrt_rtx"].engine_path(models, "sm_89", dit_target("medium", "fp8"))
    assert manifest.read_manifest(path).settings["profile"] == {"B": [1, 1, 8], "L": [1, 1292, 4096]}


def test_fp8_makes_another_engine_than_fp16(engines: tuple[Path, list[dict]]) -> None:
    """If the builder dropped the Q/DQ pairs, the two engines would have the same size."""
    sizes = {(engine["target"], engine["arch"]): engine["bytes"] for engine in engines[1]}
    for arch in ("sm_89", "sm_120"):
        assert sizes["sa3-m-fp8", arch] != sizes["sa3-m", arch]


def test_what_is_current_is_kept_and_what_changed_is_built(
    engines: tuple[Path, list[dict]], tiny_fp8, tmp_path
) -> None:
    models, _ = engines
    argv = ["same-l-decoder", *RTX, "--arch", "sm_89", "--models-dir", str(models), "--json"]
    assert json.loads(run(build_from_onnx.main, [*argv, "--onnx-root", str(tiny_fp8)])[1])[0]["reused"]
    other_root = tmp_path / "root"
    shutil.copytree(tiny_fp8 / "same-l", other_root / "same-l")
    path = other_root / find_target("same-l-decoder").onnx[0]
    model = onnx.load(path, load_external_data=False)
    model.graph.name = "another"
    path.write_bytes(model.SerializeToString())
    assert not json.loads(run(build_from_onnx.main, [*argv, "--onnx-root", str(other_root)])[1])[0]["reused"]


def test_sm_80_is_refused_for_fp8_in_words_and_served_otherwise(tiny_fp8: Path, tmp_path: Path) -> None:
    argv = ["sa3-m-fp8", *RTX, "--arch", "sm_80", "--onnx-root", str(tiny_fp8), "--models-dir", str(tmp_path)]
    code, _, errors = run(build_from_onnx.main, argv)
    assert code == 2
    assert errors.splitlines() == [
        "error: sa3-m-fp8 needs FP8 tensor cores, which sm_80 does not have (sm_89 and later do)",
        "  hint: build the FP16-mixed engine instead: sa3-m",
    ]
    assert list(tmp_path.iterdir()) == []
    assert run(build_from_onnx.main, ["sa3-m", *argv[1:]])[0] == 0


@pytest.mark.parametrize("damage", ["garbage", "another graph", "no sidecar"])
def test_a_file_that_is_no_such_graph_is_refused(tiny_fp8: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "root" / find_target("sa3-m").onnx[0]
    path.parent.mkdir(parents=True)
    if damage == "garbage":
        path.write_bytes(b"\x08\x09not a graph")
    elif damage == "another graph":
        source = tiny_fp8 / find_target("same-l-decoder").onnx[0]
        shutil.copy(source, path)
        shutil.copy(f"{source}.data", path.parent)
    else:
        shutil.copy(tiny_fp8 / find_target("sa3-m").onnx[0], path)
    models = tmp_path / "models"
    argv = ["sa3-m", *RTX, "--arch", "sm_89", "--onnx-root", str(tmp_path / "root"), "--models-dir", str(models)]
    code, _, errors = run(build_from_onnx.main, argv)
    assert code == 2
    assert len([text for text in errors.splitlines() if not text.startswith("engines:")]) == 2
    assert not models.exists()


def test_opt_in_is_in_no_group(engines: tuple[Path, list[dict]]) -> None:
    for group in ("all", "all-fp32", "all-both"):
        plan = run(build_from_onnx.main, [group, *RTX, "--arch", "sm_89", "--dry-run", "--json"])[1]
        names = [step["target"] for step in json.loads(plan)]
        assert names and "sa3-m-fp8" not in names
    plan = run(build_from_onnx.main, ["sa3-m-fp8", *RTX, "--arch", "sm_89", "--dry-run", "--json"])[1]
    assert [step["target"] for step in json.loads(plan)] == ["sa3-m-fp8"]
