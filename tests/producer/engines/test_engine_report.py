"""Layer counts from the inspector's JSON of TensorRT 10 and 11, and the gates on them."""

from __future__ import annotations

import json

import pytest

from sa3_build.engines import inspector
from sa3_trt_core.errors import ToolError
from sa3_trt_core.targets import find_target

FP8, HALF, TEXT = (find_target(name) for name in ("sa3-m-fp8", "sa3-m", "t5gemma"))
LAYERS = [
    (
        "gemm",
        ["Row major linear FP8E4M3FN format", "Row major linear FP8E4M3FN format"],
        "Row major linear FP16 format",
    ),
    ("gemm", ["FP8", "FP8"], "BFloat16"),
    ("MatrixMultiply", ["Half", "Half"], "Half"),
    ("gemm", ["Float", "Float"], "Float"),
    ("fusion_mha", ["Half", "Half", "Half"], "Half"),
    ("kgen", ["Float", "Half"], "Float"),
    ("kgen", ["Half"], "Half"),
    ("Reformat", ["Float"], "Float"),
]


def written(dialect: int, layers: list[tuple[str, list[str], str]]) -> str:
    """Return the JSON that the inspector of TensorRT 10 or 11 writes for such layers."""

    def tensor(name: str, kind: str) -> dict[str, object]:
        about = {"Format/Datatype": kind} if dialect == 10 else {"DataType": kind, "Format": "kLINEAR"}
        return {"Name": name, "Dimensions": [1, 64], **about}

    entries = [
        {"Name": f"layer {index}", "LayerType": kind, "Inputs": [tensor(f"in {index}", kind_in) for kind_in in sources],
         "Outputs": [tensor(f"out {index}", result)], "TacticName": "some_kernel"}
        for index, (kind, sources, result) in enumerate(layers)
    ]  # fmt: skip
    ends = {"Bindings": ["x"]} if dialect == 10 else {"I/O Tensors": [{"Name": "x", "DataType": "Float"}]}
    return json.dumps({"Layers": entries, **ends})


@pytest.mark.parametrize("dialect", [10, 11])
def test_layers_are_counted_in_both_dialects(dialect: int) -> None:
    report = inspector.read_report(written(dialect, LAYERS))
    assert report.as_dict == {
        "layers": 8, "fp8_gemms": 2, "fp16_gemms": 1, "fp32_gemms": 1, "fused_attention": 1,
        "unfused_softmax": 0, "islands": 1,
    }  # fmt: skip


def test_gates_say_what_an_engine_must_not_be() -> None:
    half = inspector.read_report(written(11, [LAYERS[2], LAYERS[2], LAYERS[0]]))
    assert inspector.broken_gates(half, HALF) == []
    assert inspector.broken_gates(half, FP8) == ["1 of 3 GEMMs are in FP8 (required: more than half)"]
    loose = inspector.read_report(written(10, [LAYERS[0], ("SoftMax", ["Float"], "Float")]))
    assert inspector.broken_gates(loose, FP8) == ["1 unfused softmax layers: attention was not fused"]
    wide = inspector.read_report(written(10, [LAYERS[3]]))
    assert inspector.broken_gates(wide, HALF) == ["1 of 1 GEMMs are in fp32"]
    assert inspector.broken_gates(wide, TEXT) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": []}', '{"Layers": ["names only"]}', "[" * 9999])
def test_what_is_no_report_is_two_lines(text: str) -> None:
    with pytest.raises(ToolError, match="cannot read the engine's layers"):
        inspector.read_report(text)
