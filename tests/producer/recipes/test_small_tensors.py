"""FP16-mixed graphs saved by other programs: small tensors in the sidecar, no manifest, names with suffixes."""

from __future__ import annotations

import shutil
from pathlib import Path

import build_dit_fp8
import onnx
import pytest
import torch
from conftest import onnx_of

from helpers.commands import run
from helpers.graphs import private_copy
from sa3_build.graph import io as graph_io
from sa3_trt_core.artifacts.external_data import with_small_tensors
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


GRAPHS = ("sa3-m-fp32", "sa3-m", "t5gemma", "same-l-decoder", "same-l-encoder")


def saved_outside(path: Path, out: Path, whole_nodes: bool = False) -> Path:
    """Return `out`, the graph of `path` saved by the onnx package with every tensor in its sidecar."""
    onnx.save(
        onnx.load(path), out, save_as_external_data=True, location=f"{out.name}.data", size_threshold=0,
        convert_attribute=whole_nodes,
    )  # fmt: skip
    return out


def answers(engine: OnnxRuntimeEngine) -> dict[str, torch.Tensor]:
    generator, feeds = torch.Generator().manual_seed(0), {}
    for name, spec in engine._inputs.items():
        shape = [1, 2, 4 * 4096] if name == "audio" else [size if isinstance(size, int) else 1 for size in spec.shape]
        whole = "int" in spec.type
        feeds[name] = torch.ones(shape, dtype=torch.int64) if whole else torch.rand(shape, generator=generator)
    return engine.run(feeds)


@pytest.mark.parametrize("target", GRAPHS)
@pytest.mark.parametrize("whole_nodes", [False, True], ids=["initializers", "constants too"])
def test_a_session_gives_the_same_from_a_graph_with_every_tensor_in_its_sidecar(
    tiny_onnx: Path, tmp_path: Path, target: str, whole_nodes: bool
) -> None:
    source = onnx_of(tiny_onnx, target)
    moved = saved_outside(source, tmp_path / "x.onnx", whole_nodes)
    with OnnxRuntimeEngine(source) as inside, OnnxRuntimeEngine(moved) as outside:
        expected, outputs = answers(inside), answers(outside)
    assert outputs.keys() == expected.keys() and all(torch.equal(outputs[name], expected[name]) for name in expected)


def test_what_is_put_inside_is_what_the_onnx_package_reads(tiny_onnx: Path, tmp_path: Path) -> None:
    """Byte for byte, whatever else the tensors have; larger tensors stay outside."""
    moved = saved_outside(onnx_of(tiny_onnx, "sa3-m"), tmp_path / "x.onnx", whole_nodes=True)
    made = onnx.ModelProto.FromString(with_small_tensors(moved))
    whole = onnx.load(moved)
    small = 0
    for actual, expected in zip(made.graph.initializer, whole.graph.initializer, strict=True):
        assert (actual.name, actual.data_type, list(actual.dims)) == (
            expected.name,
            expected.data_type,
            list(expected.dims),
        )
        outside = len(expected.raw_data) >= 1024
        assert (actual.data_location == onnx.TensorProto.EXTERNAL) == outside
        assert outside or actual.raw_data == expected.raw_data
        small += not outside
    assert small > 20
    made.graph.ClearField("initializer")
    whole.graph.ClearField("initializer")
    assert made == whole


@pytest.mark.parametrize("spoil", ["cut", "gone"])
def test_a_sidecar_that_is_not_whole_is_named(tiny_onnx: Path, tmp_path: Path, spoil: str) -> None:
    moved = saved_outside(onnx_of(tiny_onnx, "t5gemma"), tmp_path / "x.onnx")
    sidecar = tmp_path / "x.onnx.data"
    sidecar.write_bytes(sidecar.read_bytes()[:100]) if spoil == "cut" else sidecar.unlink()
    with pytest.raises(ToolError) as caught:
        OnnxRuntimeEngine(moved)
    assert "x.onnx" in caught.value.message and caught.value.hint
