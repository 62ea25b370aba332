"""Reasons to refuse a TensorRT engine that need no GPU, with engines of the real RTX builder."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import build_from_onnx
import onnx
import pytest
from conftest import onnx_of

import sa3_trt
from helpers.commands import assert_user_error, listing, run
from helpers.plugin_graphs import plugin_decoder
from sa3_trt_core import Generator, gpu
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.engines import open_engine
from sa3_trt_core.engines.tensorrt_checks import require_inside, require_ours, require_version
from sa3_trt_core.errors import ToolError, as_flags
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.targets import find_target

rtx = pytest.importorskip("tensorrt_rtx", reason="the RTX builder is part of requirements-cpu.txt only")
VERSION = str(rtx.__version__)
REBUILD = "python build/build_from_onnx.py same-l-decoder --backend tensorrt_rtx --arch sm_89"
CORE = Path(sa3_trt.__file__).parent / "sa3_trt_core"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return an ONNX root with a small decoder that has a manifest, and the engine built from it."""
    import lower_attention

    folder = tmp_path_factory.mktemp("built")
    source = plugin_decoder(folder / "published" / "dec.onnx")
    graph = onnx_of(folder / "onnx", "same-l-decoder")
    assert run(lower_attention.main, ["--input", source, "--onnx", graph]).code == 0
    argv = ["same-l-decoder", "--backend", "tensorrt_rtx", "--arch", "sm_89", "--json"]
    result = run(build_from_onnx.main, [*argv, "--onnx-root", folder / "onnx", "--models-dir", folder / "models"])
    assert result.code == 0, result.err
    return folder / "onnx", Path(json.loads(result.out)[0]["path"])


def refused(
    path: Path, version: str = VERSION, arch: str = "sm_89", onnx: Path | None = None, backend: str = ""
) -> str:
    with pytest.raises(ToolError) as caught:
        require_ours(path, backend or "tensorrt_rtx", version, arch, REBUILD, onnx)
    assert REBUILD in caught.value.hint
    return caught.value.message


def test_an_engine_of_ours_is_taken(built: tuple[Path, Path]) -> None:
    root, path = built
    record = require_ours(path, "tensorrt_rtx", VERSION, "sm_89", REBUILD, onnx_of(root, "same-l-decoder"))
    assert record.settings["target"] == "same-l-decoder"


def test_another_release_gpu_or_backend_is_told(built: tuple[Path, Path]) -> None:
    _, path = built
    assert f"was built for tensorrt_rtx {VERSION} sm_89; this machine has" in refused(path, version="1.0.0")
    assert "tensorrt_rtx 1.0.0 sm_89" in refused(path, version="1.0.0")
    assert f"{VERSION} sm_120" in refused(path, arch="sm_120")
    assert f"this machine has tensorrt {VERSION}" in refused(path, backend="tensorrt")


def test_an_engine_of_another_graph_is_told(built: tuple[Path, Path], tmp_path: Path) -> None:
    root, path = built
    shutil.copytree(root, tmp_path / "onnx")
    graph = onnx_of(tmp_path / "onnx", "same-l-decoder")
    note = manifest.manifest_path(graph)
    document = json.loads(note.read_text())
    document["files"][f"{graph.name}.data"]["sha256"] = "0" * 64
    note.write_text(json.dumps(document))
    assert f"built from another {graph.name}.data than the one in {graph.parent}" in refused(path, onnx=graph)
    note.unlink()
    assert require_ours(path, "tensorrt_rtx", VERSION, "sm_89", REBUILD, graph)  # nothing is known of such a graph


@pytest.mark.parametrize("damage", ["absent", "no manifest", "cut short", "grown"])
def test_an_engine_that_is_not_whole_is_told(built: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    _, source = built
    path = tmp_path / source.name
    if damage != "absent":
        data = source.read_bytes()
        path.write_bytes({"cut short": data[:-1], "grown": data + b"x"}.get(damage, data))
    if damage not in ("absent", "no manifest"):
        shutil.copy(manifest.manifest_path(source), manifest.manifest_path(path))
    words = {"absent": "no engine", "no manifest": "manifest.json is missing"}.get(damage, "bytes, its manifest says")
    assert words in refused(path)


def test_without_a_gpu_the_command_says_so(
    built: tuple[Path, Path], tiny_onnx: Path, tmp_path: Path, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    if gpu.has_nvidia_gpu():
        pytest.skip("there is a GPU here")
    root, path = built
    monkeypatch.chdir(tmp_path)
    argv = ["--prompt", "x", "--backend", "tensorrt_rtx", "--onnx-root", tiny_onnx, "--models-dir", path.parents[2]]
    assert_user_error(run(sa3_trt.main, [*argv, "--quiet"]), "tensorrt_rtx needs an NVIDIA GPU")
    assert listing(tmp_path) == {}
    with pytest.raises(ToolError, match="needs an NVIDIA GPU"):
        open_engine(find_target("same-l-decoder"), "tensorrt_rtx", ModelSource(root, path.parents[2]), path)


@pytest.mark.parametrize(
    ("backend", "version", "served"),
    [
        ("tensorrt", "10.14.1.48", False), ("tensorrt", "10.15.1.29", True), ("tensorrt", "10.16.1.11", True),
        ("tensorrt", "11.3.0", True), ("tensorrt", "12.0.0", False), ("tensorrt", "8.6.1", False),
        ("tensorrt_rtx", VERSION, True), ("tensorrt_rtx", "2.0.0.1", False),
    ],
)  # fmt: skip
def test_the_releases_that_are_served(backend: str, version: str, served: bool) -> None:
    if served:
        require_version(backend, version)
        return
    with pytest.raises(ToolError, match=f"{backend} {version} is not served"):
        require_version(backend, version)


X = ((1, 256, 32), (4, 256, 646))
CODEC = ((1, 2, 32 * 4096), (1, 2, 646 * 4096))


@pytest.mark.parametrize(
    ("name", "shape", "limits", "words", "mend"),
    [
        ("x", (1, 256, 647), X, "32 latent frames (3.0 s) to 646 latent frames (60.0 s), not 647", "--seconds"),
        ("x", (1, 256, 31), X, "not 31 latent frames (2.9 s)", "--seconds"),
        ("x", (5, 256, 64), X, "takes 1 to 4 rows per forward, not 5", "--depth"),
        ("t", (0,), ((1,), (4,)), "takes 1 to 4 rows per forward, not 0", "--batch"),
        ("audio", (1, 2, 700 * 4096), CODEC, "to 646 latent frames (60.0 s), not 700", "--chunk-frames"),
        ("x", (1, 255, 64), X, "x of shape [4, 256, 646], not [1, 255, 64]", REBUILD),
        ("unheard", (2,), ((1,), (1,)), "unheard of shape [1], not [2]", REBUILD),
        ("x", (1, 256), X, "x has 3 axes, not 2", REBUILD),
    ],
)
def test_limits_are_told_in_the_users_words(name: str, shape, limits, words: str, mend: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ToolError) as caught:
        require_inside(Path("dit_fp8.trt"), name, shape, limits, REBUILD)
    assert words in caught.value.message and "dit_fp8.trt" in caught.value.message
    assert mend in as_flags(caught.value.hint) and REBUILD in caught.value.hint


def test_the_limits_are_inside_and_the_next_sizes_are_not() -> None:
    for shape in ((1, 256, 32), (4, 256, 646), (2, 256, 100)):
        require_inside(Path("a"), "x", shape, X, REBUILD)
    for shape in ((1, 256, 31), (4, 256, 647), (5, 256, 646)):
        with pytest.raises(ToolError):
            require_inside(Path("a"), "x", shape, X, REBUILD)


def test_the_rtx_package_has_every_call_that_is_made() -> None:
    """Type checks use the other package's stubs, so they cannot detect a missing call."""
    classes = {"_context": rtx.IExecutionContext, "context": rtx.IExecutionContext, "engine": rtx.ICudaEngine,
               "runtime": rtx.Runtime, "_trt": rtx, "module": rtx}  # fmt: skip
    attributes = set()
    for name in ("tensorrt_context.py", "tensorrt.py"):
        for node in ast.walk(ast.parse((CORE / "engines" / name).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
                if owner in classes:
                    attributes.add(node.attr)
                    assert hasattr(classes[owner], node.attr), f"{owner}.{node.attr}"
    assert attributes >= {"execute_async_v3", "set_input_shape", "set_tensor_address", "deserialize_cuda_engine"}


def test_engines_that_load_beside_one_that_fails_are_closed(tiny_onnx: Path, tmp_path: Path) -> None:
    """Two graphs of three cannot be loaded: the error names the first in order, whichever was loaded first."""
    root = tmp_path / "onnx"
    shutil.copytree(tiny_onnx, root)
    for name in ("same-l-decoder", "t5gemma"):
        proto = onnx.load(onnx_of(root, name), load_external_data=False)
        proto.graph.node[0].op_type = "Unheard"
        onnx.save(proto, onnx_of(root, name))
    opened: list[tuple[str, int, int]] = []
    with pytest.raises(ToolError, match=r"encoder\.onnx"):
        Generator.load(backend="onnxruntime", onnx_root=root, on_engine=lambda *step: opened.append(step))
    assert opened == [("sa3-m (onnxruntime)", 1, 3)]
