"""Holds the reader of sidecar names against onnx itself, and the search for files against local folders."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import onnx
import pytest
from huggingface_hub import errors as hub_errors
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sa3_trt_core import hub
from sa3_trt_core.errors import ToolError
from sa3_trt_core.targets import HUB_REPOSITORY, find_target


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
    found = hub.external_data_names(save(tmp_path / "m.onnx", proto))
    assert sorted(found) == ["branch.bin", "constant.bin", "dit_fp8lin.onnx.data", "sub/more.bin"]


def test_a_graph_with_its_weights_inside_has_no_sidecar(tmp_path: Path) -> None:
    assert hub.external_data_names(save(tmp_path / "m.onnx", model())) == []


@pytest.mark.parametrize(
    "location", ["../x.data", "a/../../x", "/etc/passwd", "\\\\host\\x", "C:x", "..\\x", "", ".", "a\0b"]
)
def test_a_sidecar_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    path = save(tmp_path / "m.onnx", model(external("a", location)))
    with pytest.raises(ToolError, match="is not a file in its own folder"):
        hub.external_data_names(path)


@pytest.mark.parametrize(
    "garbage", [b"", b"\0", b"hello, this is no model", b"\xff" * 64, b"PK\x03\x04" + b"\0" * 60, b"\x08\x09"]
)
def test_garbage_is_refused(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(garbage)
    with pytest.raises(ToolError, match="is not an ONNX file"):
        hub.external_data_names(path)


def test_every_truncation_is_refused_or_read(tmp_path: Path) -> None:
    whole = model(external("a", "x.data")).SerializeToString()
    path = tmp_path / "m.onnx"
    refused = 0
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        try:
            assert hub.external_data_names(path) == ["x.data"]  # only the tail after the graph is cut
        except ToolError:
            refused += 1
    assert refused > len(whole) // 2


@given(st.binary(max_size=200))
def test_no_bytes_make_the_walker_fail_otherwise(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("walker") / "m.onnx"
    path.write_bytes(b"\x08\x09\x3a" + bytes([len(data) % 128]) + data)
    try:
        names = hub.external_data_names(path)
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
        hub.external_data_names(path)


def test_a_missing_file_is_two_lines(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(ToolError, match="cannot read"):
            hub.external_data_names(path)


def test_the_local_folder_is_searched_by_every_name(tmp_path: Path) -> None:
    target = find_target("sa3-m")
    assert hub.local_onnx(tmp_path, target) is None
    older = save(tmp_path / target.onnx[1], model(external("a", "w.data")))
    with pytest.raises(ToolError, match=r"needs w\.data beside it"):
        hub.local_onnx(tmp_path, target)
    (older.parent / "w.data").write_bytes(b"\0" * 8)
    assert hub.local_onnx(tmp_path, target) == older
    ours = save(tmp_path / target.onnx[0], model())
    assert hub.resolve_onnx(target, tmp_path) == ours


def test_a_given_folder_is_the_only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(ToolError) as caught:
        hub.resolve_onnx(find_target("sa3-m-fp8"), tmp_path)
    assert "build/build_dit_fp8.py" in caught.value.hint
    with pytest.raises(ToolError, match=r"tokenizer\.json"):
        hub.resolve_tokenizer(tmp_path)


class Hub:
    """Stands for the hub's client: a folder of files, or an error for every question."""

    def __init__(self, folder: Path, failure: Callable[[], Exception] | None = None) -> None:
        self.folder, self.failure, self.asked = folder, failure, list[str]()

    def __call__(self, repository: str, name: str, local_files_only: bool = False) -> str:
        self.asked.append(name)
        if self.failure is not None:
            raise self.failure()
        path = self.folder / name
        if not path.is_file():
            raise hub_errors.EntryNotFoundError(name)
        return str(path)


def test_the_hub_gives_graph_and_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = find_target("sa3-m")
    path = save(tmp_path / "onnx" / target.onnx[1], model(external("a", "odd name.data")))
    fake = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    with pytest.raises(ToolError, match=r"odd name\.data of sa3-m is not published"):
        hub.resolve_onnx(target, None)
    (path.parent / "odd name.data").write_bytes(b"\0" * 8)
    assert hub.resolve_onnx(target, None) == path
    assert fake.asked[-1] == "onnx/sa3-m/odd name.data"


def test_what_is_not_published_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Hub(tmp_path))
    with pytest.raises(ToolError) as caught:
        hub.resolve_onnx(find_target("sa3-m-fp8"), None)
    assert "not published yet" in caught.value.message
    assert HUB_REPOSITORY in caught.value.message
    assert "python build/build_dit_fp8.py" in caught.value.hint


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (lambda: hub_errors.LocalEntryNotFoundError("x"), "cannot be reached"),
        (lambda: hub_errors.OfflineModeIsEnabled("x"), "cannot be reached"),
        (lambda: hub_errors.HfHubHTTPError.__mro__[1]("no route"), "cannot be reached"),  # the client's transport error
        (lambda: OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_hub_failures_are_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[[], Exception], words: str
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Hub(tmp_path, failure))
    with pytest.raises(ToolError, match=words):
        hub.resolve_onnx(find_target("sa3-m"), None)
    with pytest.raises(ToolError, match=words):
        hub.resolve_tokenizer(None)


def answered(kind: type[hub_errors.HfHubHTTPError], status: int) -> hub_errors.HfHubHTTPError:
    transport = importlib.import_module(hub_errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    request = transport.Request("GET", "https://huggingface.co/x")
    return kind("no", response=transport.Response(status, request=request))


def behind_the_cache(status: int) -> Exception:
    """What the client raises when the file is not in the cache and the hub answered with an error."""
    error = hub_errors.LocalEntryNotFoundError("x")
    error.__cause__ = answered(hub_errors.HfHubHTTPError, status)
    return error


@pytest.mark.parametrize(
    ("failure", "words", "hint"),
    [
        (lambda: answered(hub_errors.GatedRepoError, 403), "does not give", "accept its licence"),
        (lambda: answered(hub_errors.RepositoryNotFoundError, 404), "does not give", "hf auth login"),
        (lambda: answered(hub_errors.HfHubHTTPError, 401), "does not give", "hf auth login"),
        (lambda: behind_the_cache(403), "does not give", "hf auth login"),
        (lambda: behind_the_cache(503), "answered 503", "later"),
        (lambda: answered(hub_errors.RemoteEntryNotFoundError, 404), "not published yet", "build/build_dit_fp8.py"),
    ],
)
def test_the_hubs_answers_are_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[[], Exception], words: str, hint: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Hub(tmp_path, failure))
    with pytest.raises(ToolError, match=words) as caught:
        hub.resolve_onnx(find_target("sa3-m-fp8"), None)
    assert hint in caught.value.hint


def test_offline_asks_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ToolError, match="is switched off"):
        hub.resolve_onnx(find_target("sa3-m"), None, offline=True)


def _size(value: int) -> bytes:
    digits = b""
    while value > 0x7F:
        digits += bytes([value & 0x7F | 0x80])
        value >>= 7
    return digits + bytes([value])
