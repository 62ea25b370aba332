"""A graph with added outputs: new names replace equal names that an exporter gave to inner values."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser
import torch

from sa3_build.graph import io as graph_io
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

MODEL = """
<ir_version: 8, opset_import: ["" : 18]>
g (float[2] x) => (float[2] y) {
    seen_1 = Abs(x)
    seen_0 = Neg(seen_1)
    y = Add(seen_0, x)
}
"""


def test_new_outputs_may_have_the_names_of_values_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(onnx.parser.parse_model(MODEL), path)
    variant = graph_io.with_probe_outputs(path, {"seen_0": "seen_1", "seen_1": "seen_0"})
    with OnnxRuntimeEngine(path, variant) as engine:
        outputs = engine.run({"x": torch.tensor([-1.0, 2.0])})
    assert {name: value.tolist() for name, value in outputs.items()} == {
        "y": [-2.0, 0.0], "seen_0": [1.0, 2.0], "seen_1": [-1.0, -2.0]
    }  # fmt: skip
