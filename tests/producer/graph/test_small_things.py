"""Duplicate names, added outputs with the names of inner values, calibration sets that do not state row kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from sa3_build.graph import io as graph_io
from sa3_trt_core.artifacts.calibration_set import CalibrationSet
from sa3_trt_core.errors import ToolError


def saved(path: Path, *nodes: onnx.NodeProto) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph(list(nodes), "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    return path


def test_a_value_of_theirs_may_have_the_name_of_an_output_of_ours(tmp_path: Path) -> None:
    nodes = (helper.make_node("Abs", ["x"], ["amax_0"]), helper.make_node("Sqrt", ["amax_0"], ["y"]))
    path = saved(tmp_path / "g.onnx", *nodes)
    session = onnxruntime.InferenceSession(graph_io.with_probe_outputs(path, {"amax_0": "amax_0"}))
    y, with_probe_outputs = session.run(None, {"x": np.array([-4.0, 9.0], np.float32)})
    assert y.tolist() == [2.0, 3.0] and with_probe_outputs.tolist() == [4.0, 9.0]


def test_a_name_that_stands_twice_is_the_cause(tmp_path: Path) -> None:
    nodes = (helper.make_node("Abs", ["x"], ["twice"]), helper.make_node("Sqrt", ["x"], ["twice"]),
             helper.make_node("Add", ["twice", "twice"], ["y"]))  # fmt: skip
    with pytest.raises(ToolError, match=r"'twice' is redeclared"):
        graph_io.load(saved(tmp_path / "g.onnx", *nodes))


def test_rows_with_a_mask_are_in_painting_where_no_kind_is_stated(tmp_path: Path) -> None:
    local = np.zeros((3, 257, 5), np.float32)
    local[1, 0] = 1.0
    np.savez(
        tmp_path / "rows.npz", x=np.zeros((3, 256, 5), np.float32), t=np.full(3, 0.5, np.float32),
        t5_hidden=np.zeros((3, 256, 768), np.float32), t5_mask=np.ones((3, 256), np.float32),
        seconds_total=np.ones(3, np.float32), local_add_cond=local,
    )  # fmt: skip
    rows = CalibrationSet.open(tmp_path / "rows.npz")
    assert rows.kinds() == ["text", "inpaint", "text"] and rows.subset([1, 2]).kinds() == ["inpaint", "text"]
