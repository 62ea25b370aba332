"""TensorRT on this machine's GPU: engines are built, timed, inspected and compared with ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import build_from_onnx
import pytest
import torch

from helpers import graphs
from helpers.commands import run
from sa3_build.engines.builders import BUILDERS
from sa3_build.export.torch_to_onnx import example_inputs
from sa3_trt_core import engines, gpu
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.engines.tensorrt import TensorRtEngine
from sa3_trt_core.shapes import CONTRACTS
from sa3_trt_core.targets import find_target

BACKENDS = [name for name, builder in BUILDERS.items() if builder.compiles and gpu.tensorrt_module(name) is not None]
pytestmark = pytest.mark.skipif(
    gpu.current_arch() is None or not BACKENDS or not torch.cuda.is_available(), reason="no NVIDIA GPU with TensorRT"
)


def built(name: str, root: Path, models: Path, *words: str) -> tuple[Path, dict]:
    """Build one engine by this machine's TensorRT; return its path and the command's report."""
    argv = [name, "--backend", BACKENDS[0], "--onnx-root", root, "--models-dir", models, "--json", *words]
    result = run(build_from_onnx.main, argv)
    assert result.code == 0, result.err
    (report,) = json.loads(result.out)
    return Path(report["path"]), report


def test_the_fastest_of_three_is_kept(tmp_path: Path) -> None:
    target = find_target("same-s-decoder")
    onnx = tmp_path / target.onnx[0]
    onnx.parent.mkdir()
    onnx.write_bytes(graphs.contract_graph("same-decoder"))
    path, _ = built(target.name, tmp_path, tmp_path / "models", "--best-of", "3")
    record = manifest.read_manifest(path)
    assert record is not None and len(record.gates["milliseconds"]) == 3 and record.gates["run_on_gpu"] is True


@pytest.mark.parametrize("name", ["sa3-m", "sa3-m-fp8"])
def test_an_engine_gives_what_its_graph_gives(tiny_fp8: Path, tmp_path: Path, name: str) -> None:
    path, about = built(name, tiny_fp8, tmp_path, "--engine-report")
    assert about["layers"]["layers"] > 0 and (about["layers"]["fp8_gemms"] > 0) == name.endswith("fp8")
    names = [spec.name for spec in CONTRACTS["dit"].inputs]
    inputs = dict(zip(names, example_inputs("dit", batch=2, frames=70), strict=True))
    with TensorRtEngine(path, BACKENDS[0]) as engine:
        velocity = engine.run(inputs)["velocity"].flatten()
    with OnnxRuntimeEngine(tiny_fp8 / find_target(name).onnx[0]) as engine:
        expected = engine.run(inputs)["velocity"].flatten()
    assert torch.nn.functional.cosine_similarity(velocity, expected, dim=0) > 0.99


def test_a_second_build_reads_the_timing_cache(tiny_fp8: Path, tmp_path: Path) -> None:
    if engines.BACKENDS[BACKENDS[0]].builds_elsewhere:
        pytest.skip("TensorRT-RTX times nothing when it builds")
    path, _ = built("sa3-m", tiny_fp8, tmp_path)
    (cache,) = path.parent.parent.glob(".timing-*.cache")
    cache.write_bytes(b"damaged")
    built("sa3-m", tiny_fp8, tmp_path, "--force")
    assert cache.stat().st_size > len(b"damaged")
