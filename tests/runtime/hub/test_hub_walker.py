"""The reader of sidecar names compared with onnx, and the search for files in local folders."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from hypothesis import given, strategies as st
from onnx import TensorProto, helper

from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import resolve
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.targets import find_target


def external(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("offset", "0"), ("location", location), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(
    *tensors: TensorProto, constant: TensorProto | None = None, branch: TensorProto | None = None
) -> onnx.ModelProto:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    if constant is not None:
        nodes.append(helper.make_node("Constant", [], ["c"], value=constant))
    if branch is not None:
        inner = helper.make_graph([helper.make_node("Identity", ["w"], ["z"])], "inner", [], [], [branch])
        nodes.append(helper.make_node("If", ["b"], ["z"], then_branch=inner, else_branch=inner))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    inline = helper.make_tensor("inline", TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = helper.make_graph(nodes, "g", [value], [], [inline, *tensors])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])


def save(path: Path, proto: onnx.ModelProto) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    return path


def test_every_place_that_can_name_a_sidecar_is_read(tmp_path: Path) -> None:
    proto = model(
        external("a", "dit_fp8lin.onnx.data"),
        external("b", "dit_fp8lin.onnx.data"),
        external("c", "sub/more.bin"),
        constant=external("d", "constant.bin"),
        branch=external("e", "branch.bin"),
    )
    sidecar_names = resolve.external_data_names(save(tmp_path / "m.onnx", proto))
    assert sorted(sidecar_names) == ["branch.bin", "constant.bin", "dit_fp8lin.onnx.data", "sub/more.bin"]


def test_a_graph_with_its_weights_inside_has_no_sidecar(tmp_path: Path) -> None:
    assert resolve.external_data_names(save(tmp_path / "m.onnx", model())) == []


@pytest.mark.parametrize(
    "location", ["../x.data", "a/../../x", "/etc/passwd", "\\\\host\\x", "C:x", "..\\x", "", ".", "a\0b"]
)
def test_a_sidecar_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    path = save(tmp_path / "m.onnx", model(external("a", location)))
    with pytest.raises(ToolError, match="is not a file in its own folder"):
        resolve.external_data_names(path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "root" / "m.onnx", model(external("a", "w.data")))
    (tmp_path / "secret").write_bytes(b"\0" * 8)
    sidecar = path.parent / "w.data"
    for target in (tmp_path / "secret", Path("../secret"), Path("/etc/hostname"), Path("w.data")):
        sidecar.symlink_to(target)
        with pytest.raises(ToolError, match="is not a file in its own folder"):
            resolve.external_data_names(path)
        sidecar.unlink()
    (path.parent / "real.data").write_bytes(b"\0" * 8)
    sidecar.symlink_to("real.data")
    assert resolve.external_data_names(path) == ["w.data"]
    (tmp_path / "linked").symlink_to(path.parent)
    assert resolve.external_data_names(tmp_path / "linked" / "m.onnx") == ["w.data"]


@pytest.mark.parametrize(
    "garbage", [b"", b"\0", b"hello, this is no model", b"\xff" * 64, b"PK\x03\x04" + b"\0" * 60, b"\x08\x09"]
)
def test_garbage_is_refused(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(garbage)
    with pytest.raises(ToolError, match="is not an ONNX file"):
        resolve.external_data_names(path)


def test_every_truncation_is_refused_or_read(tmp_path: Path) -> None:
    whole = model(external("a", "x.data")).SerializeToString()
    path = tmp_path / "m.onnx"
    refused = 0
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        try:
            assert resolve.external_data_names(path) == ["x.data"]  # only the tail after the graph is cut
        except ToolError:
            refused += 1
    assert refused > len(whole) // 2


@given(st.binary(max_size=200))
def test_no_bytes_make_the_walker_fail_otherwise(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("walker") / "m.onnx"
    path.write_bytes(b"\x08\x09\x3a" + bytes([len(data) % 128]) + data)
    try:
        names = resolve.external_data_names(path)
    except ToolError:
        return
    assert all(names)


def test_a_deep_nest_of_subgraphs_is_refused(tmp_path: Path) -> None:
    graph = b""
    for _ in range(200):  # graph { node { attribute { g: graph } } }
        for key in (b"\x32", b"\x2a", b"\x0a"):
            graph = key + _size(len(graph)) + graph
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x09\x3a" + _size(len(graph)) + graph)
    with pytest.raises(ToolError, match="nested too deep"):
        resolve.external_data_names(path)


def test_a_missing_file_is_two_lines(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(ToolError, match="cannot read"):
            resolve.external_data_names(path)


def test_the_local_folder_is_searched_by_every_name(tmp_path: Path) -> None:
    target = find_target("sa3-m")
    assert resolve.local_onnx(tmp_path, target) is None
    older = save(tmp_path / target.onnx[1], model(external("a", "w.data")))
    with pytest.raises(ToolError, match=r"needs w\.data beside it"):
        resolve.local_onnx(tmp_path, target)
    (older.parent / "w.data").write_bytes(b"\0" * 8)
    assert resolve.local_onnx(tmp_path, target) == older
    newer = save(tmp_path / target.onnx[0], model())
    assert resolve.resolve_onnx(target, ModelSource(tmp_path)) == newer


def _size(value: int) -> bytes:
    digits = b""
    while value > 0x7F:
        digits += bytes([value & 0x7F | 0x80])
        value >>= 7
    return digits + bytes([value])
