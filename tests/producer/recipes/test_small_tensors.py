"""FP16-mixed graphs saved by other programs: small tensors in the sidecar, no manifest, names with suffixes."""

from __future__ import annotations

import shutil
from pathlib import Path

import build_dit_fp8
import onnx
import pytest
from conftest import onnx_of

from helpers.commands import run
from helpers.graphs import private_copy
from sa3_build.graph import io as graph_io
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.errors import ToolError


@pytest.mark.parametrize("threshold", [0, 64])
def test_fp8_is_made_of_it(tiny_onnx: Path, tiny_calib: Path, tmp_path: Path, threshold: int) -> None:
    source = tmp_path / "dit_fp16mixed.onnx"
    whole = onnx.load(private_copy(onnx_of(tiny_onnx, "sa3-m"), tmp_path / "own"))
    onnx.save(whole, source, save_as_external_data=True, location="w.data", size_threshold=threshold)
    shutil.copy(source.with_name("w.data"), tmp_path / "kept")
    argv = ["--input", source, "--calib", tiny_calib, "--onnx", tmp_path / "dit_fp8.onnx", "--ptq", "direct"]
    result = run(build_dit_fp8.main, [*argv, "--rounding", "nearest", "--parity-rows", 4, "--rollouts", 0])
    assert result.code == 0, result.err
    assert source.with_name("w.data").read_bytes() == (tmp_path / "kept").read_bytes()
    with OnnxRuntimeEngine(tmp_path / "dit_fp8.onnx") as engine:
        assert engine.output_names == ("velocity",)


def test_the_small_tensors_are_the_same_wherever_they_lie(tiny_onnx: Path, tmp_path: Path) -> None:
    path = private_copy(onnx_of(tiny_onnx, "sa3-m"), tmp_path / "own")
    onnx.save(onnx.load(path), tmp_path / "x.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    inside, outside = graph_io.load(path), graph_io.load(tmp_path / "x.onnx")
    assert inside.graph.initializers.keys() == outside.graph.initializers.keys()
    for name, value in inside.graph.initializers.items():
        outside_value = outside.graph.initializers[name].const_value
        assert value.const_value is not None and outside_value is not None
        assert (
            value.const_value.numpy() == outside_value.numpy()
        ).all() and value.const_value.dtype == outside_value.dtype


def test_a_session_says_what_it_cannot_read_and_how_to_save_it(tiny_onnx: Path, tmp_path: Path) -> None:
    whole = onnx.load(private_copy(onnx_of(tiny_onnx, "sa3-m"), tmp_path / "own"))
    onnx.save(whole, tmp_path / "x.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    with pytest.raises(ToolError) as caught:
        OnnxRuntimeEngine(tmp_path / "x.onnx")
    assert "sidecar" in caught.value.message and "size_threshold=1024" in caught.value.hint
    with OnnxRuntimeEngine(tmp_path / "x.onnx", graph_io.plain_bytes(tmp_path / "x.onnx")) as engine:
        assert engine.output_names == ("velocity",)
