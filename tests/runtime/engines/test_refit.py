"""Refittable engines, as far as a machine without a GPU goes: what the builder takes, what is recorded and refused."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import build_from_onnx
import merge_lora
import pytest

import sa3_trt
from helpers import adapters
from helpers.commands import assert_user_error, listing, run
from sa3_build.engines import refittable
from sa3_build.lora.graph_layers import find_layers
from sa3_trt_core import gpu
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.engines import BACKENDS, tensorrt_refit
from sa3_trt_core.engines.tensorrt_refit import require_refittable
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.lora_set import LoraSet, LoraSpec
from sa3_trt_core.targets import find_target, with_loras

rtx = pytest.importorskip("tensorrt_rtx", reason="the RTX builder is part of requirements-cpu.txt only")
FP8 = find_target("sa3-m-fp8")
RTX = ["--backend", "tensorrt_rtx", "--arch", "sm_89"]
REBUILD = "python build/build_from_onnx.py sa3-m-fp8 --backend tensorrt_rtx --arch sm_89"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.write_native(tmp_path_factory.mktemp("adapter") / "a.safetensors", "lora", adapters.LAYER_SHAPES)


@pytest.fixture(scope="module")
def root(tiny_fp8: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX root with the adapter merged into FP8, and the FP8 engine without it, which is not refittable."""
    folder = tmp_path_factory.mktemp("refit")
    shutil.copytree(tiny_fp8, folder / "onnx")
    half, fp8 = (folder / "onnx" / "sa3-m" / f"dit_{name}.onnx" for name in ("fp16mixed", "fp8"))
    done = run(merge_lora.main, ["--input", half, "--lora", adapter, "--fp8-base", fp8])
    assert done.code == 0, done.err
    line = ["sa3-m-fp8", *RTX, "--onnx-root", folder / "onnx", "--models-dir", folder / "models"]
    done = run(build_from_onnx.main, line)
    assert done.code == 0, done.err
    return folder


def engine_of(root: Path) -> Path:
    return BACKENDS["tensorrt_rtx"].engine_path(root / "models", "sm_89", FP8)


def merged_of(root: Path, adapter: Path) -> Path:
    digest = LoraSet.read([LoraSpec(adapter)]).digest
    return root / "onnx" / with_loras(FP8, digest).onnx[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sa3-m-fp8", *RTX], "only on a machine with an NVIDIA GPU"),
        (["sa3-m-fp8", "--backend", "torch", "--arch", "cpu"], "--refittable is not available with torch"),
        (["t5gemma", *RTX], "t5gemma cannot be refittable"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(
    words: list[str], said: str, root: Path, tmp_path: Path
) -> None:
    if gpu.has_nvidia_gpu() and "GPU only" in said:
        pytest.skip("there is a GPU here")
    folders = ["--onnx-root", root / "onnx", "--models-dir", tmp_path]
    assert_user_error(run(build_from_onnx.main, [*words, "--refittable", *folders]), said)
    assert listing(tmp_path) == {}


def test_the_plan_records_it_and_an_engine_that_is_not_is_built_again(root: Path) -> None:
    line = ["sa3-m-fp8", *RTX, "--dry-run", "--json", "--onnx-root", root / "onnx", "--models-dir", root / "models"]
    (plain,) = json.loads(run(build_from_onnx.main, line).out)
    (wanted,) = json.loads(run(build_from_onnx.main, [*line, "--refittable"]).out)
    assert plain["state"] == "current" and "refittable" not in plain
    assert wanted["refittable"] == "yes" and wanted["state"] == "stale: it was built without --refittable"


def test_the_builder_marks_every_adaptable_weight_and_scale_and_nothing_else(root: Path) -> None:
    graph = root / "onnx" / FP8.onnx[0]
    names = refittable.weights_of(graph)
    _, layers = find_layers(graph)
    quantised = sum(layer.weight.scale is not None for layer in layers.values())
    assert len(names) == len(layers) + quantised > len(layers)
    builder = rtx.Builder(gpu.tensorrt_logger(rtx))
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert rtx.OnnxParser(network, gpu.tensorrt_logger(rtx)).parse_from_file(str(graph))
    config = builder.create_builder_config()
    refittable.mark(rtx, network, config, names)
    assert config.get_flag(rtx.BuilderFlag.REFIT_INDIVIDUAL) and not config.get_flag(rtx.BuilderFlag.REFIT)
    assert all(network.are_weights_marked_refittable(name) for name in names)
    with pytest.raises(ToolError, match="has no weight absent"):
        refittable.mark(rtx, network, config, ["absent"])


def test_an_engine_that_was_not_built_for_it_is_refused(root: Path, adapter: Path, tmp_path: Path) -> None:
    merged = merged_of(root, adapter)
    with pytest.raises(ToolError, match="was not built to be refitted") as caught:
        require_refittable(engine_of(root), REBUILD, merged)
    assert caught.value.hint == f"build it so: {REBUILD} --refittable"
    path = tmp_path / engine_of(root).name
    for file in (engine_of(root), manifest.manifest_path(engine_of(root))):
        shutil.copy(file, tmp_path)
    document = json.loads(manifest.manifest_path(path).read_text())
    document["settings"]["refittable"] = True
    manifest.manifest_path(path).write_text(json.dumps(document))
    require_refittable(path, REBUILD, merged)
    document["inputs"]["dit_fp8.onnx.data"] = "0" * 64
    manifest.manifest_path(path).write_text(json.dumps(document))
    with pytest.raises(ToolError, match=r"was not merged from the dit_fp8\.onnx\.data that"):
        require_refittable(path, REBUILD, merged)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "auto"])
def test_other_backends_refuse_to_refit(backend: str, root: Path, adapter: Path, tmp_path: Path) -> None:
    line = ["--prompt", "x", "--precision", "fp8", "--lora", adapter, "--refit", "--out", tmp_path / "x.wav",
            "--onnx-root", root / "onnx", "--models-dir", tmp_path / "none"]  # fmt: skip
    assert_user_error(run(sa3_trt.main, [*line, "--backend", backend]), "--refit is not supported by the")
    assert listing(tmp_path) == {}


def test_refit_without_adapters_without_a_merged_graph_or_a_gpu_is_refused(
    root: Path, adapter: Path, tmp_path: Path
) -> None:
    line = ["--prompt", "x", "--precision", "fp8", "--backend", "tensorrt_rtx", "--refit", "--out", tmp_path / "x.wav",
            "--onnx-root", root / "onnx", "--models-dir", root / "models"]  # fmt: skip
    assert_user_error(run(sa3_trt.main, line), "--refit requires --lora")
    done = run(sa3_trt.main, [*line, "--lora", f"{adapter}:0.25"])
    assert_user_error(done, "takes its weights from the merged graph")
    assert "build/merge_lora.py --input" in done.err and "build_from_onnx.py" not in done.err
    if not gpu.has_nvidia_gpu():
        assert_user_error(run(sa3_trt.main, [*line, "--lora", adapter]), "needs an NVIDIA GPU")
    assert listing(tmp_path) == {}


def test_the_rtx_package_has_every_call_of_a_refit() -> None:
    classes = {"refitter": rtx.Refitter, "parser": rtx.OnnxParserRefitter, "engine": rtx.ICudaEngine, "module": rtx}
    seen = set()
    for node in ast.walk(ast.parse(Path(str(tensorrt_refit.__file__)).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in classes:
            seen.add(node.attr)
            assert hasattr(classes[node.value.id], node.attr), f"{node.value.id}.{node.attr}"
    assert seen >= {"refit_from_file", "get_missing_weights", "refit_cuda_engine", "refittable", "Refitter"}
