"""Every engine is run on the check rows of its graph before its first use; a wrong one is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import onnx_of
from onnx import numpy_helper

import sa3_trt
from helpers import broken_fp8
from helpers.broken_fp8 import quantised_products, set_values
from helpers.commands import run
from sa3_build.engines.torch_engine import pack_engine
from sa3_build.graph.check_row_files import place_check_rows, write_check_rows
from sa3_build.graph.errors import GraphNotRecognised
from sa3_trt_core import engines
from sa3_trt_core.artifacts import check_rows, manifest
from sa3_trt_core.artifacts.check_rows import check_path
from sa3_trt_core.engines import self_check
from sa3_trt_core.errors import GateError, ToolError
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.targets import find_target

FP8 = find_target("sa3-m-fp8")
Breaking = Callable[[onnx.ModelProto], None]


def exponent_flipped(model: onnx.ModelProto) -> None:
    """Flip one exponent bit of the scale of one channel of one weight."""
    scales = list(quantised_products(model))[1].weight_scales
    values = numpy_helper.to_array(scales).copy()
    bits = values.view(np.uint16 if values.dtype == np.float16 else np.uint32)
    bits.ravel()[0] ^= np.asarray(1 << (8 * values.itemsize - 4), bits.dtype)
    set_values(scales, values)


def row_zeroed(model: onnx.ModelProto) -> None:
    """Set one row of one weight to zero."""
    weight = list(quantised_products(model))[1].weight
    codes = np.frombuffer(weight.raw_data, np.uint8).reshape(list(weight.dims)).copy()
    codes[0] = 0
    weight.raw_data = codes.tobytes()


def not_a_number(model: onnx.ModelProto) -> None:
    """Set the scale of one channel of one weight to NaN."""
    scales = list(quantised_products(model))[1].weight_scales
    values = numpy_helper.to_array(scales).copy()
    values.ravel()[0] = np.nan
    set_values(scales, values)


WRONG: dict[str, Breaking] = {
    "one scale x 4": broken_fp8.quadruple_weight_scales,
    "uncalibrated scales": broken_fp8.reset_activation_scales,
    "two swapped weights": broken_fp8.swap_weights,
    "an island in fp16: t": partial(broken_fp8.round_island_to_fp16, input_name="t"),
    "an island in fp16: the duration": partial(broken_fp8.round_island_to_fp16, input_name="seconds_total"),
    "a NaN": not_a_number,
}
SUBTLE: dict[str, Breaking] = {"an exponent bit of a scale": exponent_flipped, "a zeroed row": row_zeroed}


@pytest.fixture
def root(tiny_fp8: Path, tmp_path: Path) -> Path:
    """Return a copy of the ONNX root that a test may break; records of passed check rows are not copied."""
    return shutil.copytree(tiny_fp8, tmp_path / "root", ignore=shutil.ignore_patterns("*.checked.json"))


@pytest.fixture(scope="module")
def torch_models(tiny_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of engines with the FP8 DiT packed for PyTorch. Read only."""
    models = tmp_path_factory.mktemp("models")
    pack_engine(onnx_of(tiny_fp8, FP8.name), FP8, "cpu", engine_of(models))
    return models


def engine_of(models: Path) -> Path:
    return engines.BACKENDS["torch"].engine_path(models, "cpu", FP8)


def opened(source: ModelSource, backend: str = "onnxruntime") -> None:
    engines.open_engine(FP8, backend, source).close()


def refusal(source: ModelSource, backend: str = "onnxruntime") -> GateError:
    with pytest.raises(GateError) as refused:
        opened(source, backend)
    assert refused.value.exit_code == 3
    return refused.value


def broken(root: Path, breaking: Breaking, tmp_path: Path) -> Path:
    """Break the FP8 graph of a root in place; manifest and check rows stay those of the valid graph."""
    graph = onnx_of(root, FP8.name)
    made = broken_fp8.break_graph(graph, tmp_path / "broken" / graph.name, breaking)
    for name in (graph.name, f"{graph.name}.data"):
        shutil.copyfile(made.with_name(name), graph.with_name(name))
    return graph


def test_every_graph_of_the_producer_brings_check_rows_in_its_manifest(tiny_fp8: Path) -> None:
    for name in ("sa3-m", "sa3-m-fp8", "t5gemma", "same-l-decoder", "same-l-decoder-fp32", "same-l-encoder"):
        graph = onnx_of(tiny_fp8, name)
        record = manifest.read_manifest(graph)
        assert record is not None and check_path(graph).name in record.files, name
        checks = check_rows.read(check_path(graph))
        assert checks.kind == find_target(name).kind and check_path(graph).stat().st_size < 2_000_000
        names = [graph.name, *(file_name for file_name in record.files if file_name == f"{graph.name}.data")]
        assert sorted(record.files[file_name].sha256 for file_name in names) == list(checks.graph)


@pytest.mark.parametrize("name", ["sa3-m", "sa3-m-fp8", "t5gemma", "same-l-decoder", "same-l-encoder"])
def test_a_good_graph_passes_and_its_answer_is_kept(name: str, root: Path) -> None:
    target, source = find_target(name), ModelSource(root)
    first = engines.check_engine(target, "onnxruntime", source)
    assert (
        len(first) == len(check_rows.planned_rows(target.kind))
        and max(outcome.error_over_limit for outcome in first) <= 1.0
    )
    graph = onnx_of(root, name)
    device = self_check.CheckEnvironment.of(engines.BACKENDS["onnxruntime"])
    with engines.BACKENDS["onnxruntime"].open(graph, target, "x", None) as engine:
        assert self_check.require_correct(engine, graph, device, "x") == []
        later = self_check.CheckEnvironment(device.card, device.driver, "onnxruntime 99")
        assert len(self_check.require_correct(engine, graph, later, "x")) == len(first)
    kept = json.loads(graph.with_name(f"{graph.name}.checked.json").read_text())
    assert [outcome["key"]["library"] for outcome in kept["answers"]] == [device.library, "onnxruntime 99"]


def test_a_graph_without_check_rows_runs(root: Path, tmp_path: Path) -> None:
    lone = tmp_path / "lone" / FP8.onnx[0]
    lone.parent.mkdir(parents=True)
    for file in (onnx_of(root, FP8.name), onnx_of(root, FP8.name).with_name("dit_fp8.onnx.data")):
        shutil.copyfile(file, lone.with_name(file.name))
    opened(ModelSource(tmp_path / "lone"))
    assert engines.check_engine(FP8, "onnxruntime", ModelSource(tmp_path / "lone")) == []


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_graph_is_refused_by_its_answers(case: str, root: Path, tmp_path: Path) -> None:
    """The check rows state the broken file's digests, as a faulty build would write them; there is no manifest."""
    rows = shutil.copyfile(check_path(onnx_of(root, FP8.name)), tmp_path / "good.check.npz")
    graph = broken(root, WRONG[case], tmp_path)
    manifest.manifest_path(graph).unlink()
    place_check_rows(rows, graph)
    error = refusal(ModelSource(root))
    assert "check rows" in error.message and str(graph) in error.message
    assert "build_dit_fp8.py" in error.hint and "gpu_report.py" in error.hint
    refusal(ModelSource(root))  # a wrong answer is not kept as a right one


@pytest.mark.parametrize("case", {**WRONG, **SUBTLE})
def test_a_graph_whose_bytes_have_changed_is_refused(case: str, root: Path, tmp_path: Path) -> None:
    opened(ModelSource(root))
    graph = broken(root, {**WRONG, **SUBTLE}[case], tmp_path)
    error = refusal(ModelSource(root))
    assert "changed since it was built" in error.message and "build_dit_fp8.py" in error.hint
    manifest.manifest_path(graph).unlink()  # without a manifest the check rows identify their graph
    assert "answers of other bytes" in refusal(ModelSource(root)).message


def test_a_truncated_graph_is_refused(root: Path) -> None:
    sidecar = onnx_of(root, FP8.name).with_name("dit_fp8.onnx.data")
    sidecar.write_bytes(sidecar.read_bytes()[:-4096])
    with pytest.raises(ToolError):
        opened(ModelSource(root))


def test_damaged_check_rows_are_a_mistake_and_not_a_pass(root: Path) -> None:
    rows = check_path(onnx_of(root, FP8.name))
    rows.write_bytes(rows.read_bytes()[:-100])
    with pytest.raises(ToolError, match="not a file of check rows") as refused:
        opened(ModelSource(root))
    assert refused.value.exit_code == 2


def test_the_command_leaves_with_3_and_says_what_to_do(root: Path, tmp_path: Path) -> None:
    broken(root, broken_fp8.quadruple_weight_scales, tmp_path)
    argv = ["--prompt", "bells", "--seconds", 0.5, "--precision", "fp8", "--backend", "onnxruntime"]
    result = run(sa3_trt.main, [*argv, "--onnx-root", root, "--out", tmp_path / "a.wav"])
    assert result.code == 3 and "Traceback" not in result.err and not (tmp_path / "a.wav").exists()
    assert (
        "changed since it was built" in result.err
        and "hint: build it again: python build/build_dit_fp8.py" in result.err
    )


def test_a_torch_engine_answers_the_rows_of_its_graph(tiny_fp8: Path, torch_models: Path) -> None:
    engine = engine_of(torch_models)
    graph_rows, engine_rows = (check_path(artefact).read_bytes() for artefact in (onnx_of(tiny_fp8, FP8.name), engine))
    assert graph_rows == engine_rows
    record = manifest.read_manifest(engine)
    assert record is not None and check_path(engine).name in record.files
    outcomes = engines.check_engine(FP8, "torch", ModelSource(None, torch_models))
    assert len(outcomes) == 8 and 0.0 < max(outcome.error_over_limit for outcome in outcomes) <= 1.0


@pytest.mark.parametrize("case", WRONG)
def test_a_torch_engine_of_a_wrong_graph_is_refused(case: str, tiny_fp8: Path, root: Path, tmp_path: Path) -> None:
    graph = broken(root, WRONG[case], tmp_path)
    for beside in (check_path(graph), manifest.manifest_path(graph)):
        beside.unlink()
    models = tmp_path / "models"
    try:
        pack_engine(graph, FP8, "cpu", engine_of(models))
    except (GateError, GraphNotRecognised):
        return  # already the builder, which reads the graph and compares the engine with it
    source = ModelSource(tiny_fp8, models)
    assert "another graph than its check rows" in refusal(source, "torch").message
    if case != "an island in fp16: t":  # the packed DiT makes its own Fourier features, in fp32: it is right
        checks = check_rows.read(check_path(onnx_of(tiny_fp8, FP8.name)))
        with engines.BACKENDS["torch"].open(engine_of(models), FP8, "x", None) as engine:
            assert [outcome.failure for outcome in self_check.outcomes(checks, engine.run) if outcome.failure]


def changed_in_place(engine: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    """Change values of a packed DiT; its size and its manifest stay the same."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(engine), "pt") as packed:
        metadata, tensors = packed.metadata(), {name: packed.get_tensor(name).clone() for name in packed.keys()}  # noqa: SIM118
    change(tensors)
    size = engine.stat().st_size
    save_file(tensors, str(engine), metadata)
    assert engine.stat().st_size == size


def flip_a_bit(tensors: dict) -> None:  # type: ignore[type-arg]
    name = next(name for name in sorted(tensors) if "ratio" in name or "scale" in name)
    tensors[name].view(-1)[:1].mul_(2.0)


def zero_a_row(tensors: dict) -> None:  # type: ignore[type-arg]
    import torch

    name = next(name for name in sorted(tensors) if tensors[name].dim() == 2 and tensors[name].element_size() == 1)
    tensors[name].view(torch.uint8)[0] = 0


@pytest.mark.parametrize("change", [flip_a_bit, zero_a_row])
def test_a_torch_engine_whose_bytes_have_changed_is_refused(
    change: Callable[[dict], None], torch_models: Path, tmp_path: Path  # type: ignore[type-arg]
) -> None:  # fmt: skip
    models = shutil.copytree(torch_models, tmp_path / "models")
    opened(ModelSource(None, models), "torch")
    changed_in_place(engine_of(models), change)
    assert "changed since it was built" in refusal(ModelSource(None, models), "torch").message


def test_a_truncated_torch_engine_is_refused(torch_models: Path, tmp_path: Path) -> None:
    models = shutil.copytree(torch_models, tmp_path / "models")
    engine_of(models).write_bytes(engine_of(models).read_bytes()[:-4096])
    with pytest.raises(ToolError, match="bytes, its manifest says"):
        opened(ModelSource(None, models), "torch")


def test_a_swapped_torch_engine_is_refused(
    tiny_fp8: Path, root: Path, torch_models: Path, tmp_path: Path
) -> None:  # fmt: skip
    """Another graph's engine under this one's name: with its own manifest and rows, or the file alone."""
    graph = broken(root, broken_fp8.swap_weights, tmp_path)
    manifest.manifest_path(graph).unlink()
    write_check_rows(graph, "dit", "fp8")
    other_models = tmp_path / "other"
    pack_engine(graph, FP8, "cpu", engine_of(other_models))
    opened(ModelSource(root, other_models), "torch")  # right for its own graph
    assert "another graph" in refusal(ModelSource(tiny_fp8, other_models), "torch").message
    models = shutil.copytree(torch_models, tmp_path / "models")
    shutil.copyfile(engine_of(other_models), engine_of(models))
    refusal(ModelSource(None, models), "torch")


def other_weights(model: onnx.ModelProto) -> None:
    """Reverse the codes of every weight: the weights of another checkpoint of the same sizes."""
    for product in quantised_products(model):
        product.weight.raw_data = product.weight.raw_data[::-1]


def replaced(target: Path, source: Path) -> None:
    """Put another file's bytes in a file's place; size and times stay, as archives with one fixed time leave them."""
    times = target.stat()
    assert source.stat().st_size == times.st_size and source.read_bytes() != target.read_bytes()
    shutil.copyfile(source, target)
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_checked_artefact_that_is_exchanged_is_checked_again_whatever_its_times(
    root: Path, torch_models: Path, tmp_path: Path
) -> None:
    """Both an engine, and the sidecar of a graph without a manifest."""
    graph = onnx_of(root, FP8.name)
    other_graph = broken_fp8.break_graph(graph, tmp_path / "other" / graph.name, other_weights)
    rewritten = broken_fp8.break_graph(graph, tmp_path / "same" / graph.name, lambda model: None)
    pack_engine(other_graph, FP8, "cpu", tmp_path / "other" / "dit_fp8.safetensors")
    models = shutil.copytree(torch_models, tmp_path / "models")
    opened(ModelSource(None, models), "torch")
    replaced(engine_of(models), tmp_path / "other" / "dit_fp8.safetensors")
    assert "changed since it was built" in refusal(ModelSource(None, models), "torch").message

    manifest.manifest_path(graph).unlink()
    for name in (graph.name, f"{graph.name}.data"):
        shutil.copyfile(rewritten.with_name(name), graph.with_name(name))
    write_check_rows(graph, "dit", "fp8")
    opened(ModelSource(root))
    replaced(graph.with_name(f"{graph.name}.data"), other_graph.with_name(f"{graph.name}.data"))
    assert "answers of other bytes" in refusal(ModelSource(root)).message


# Graphs that only each stage's check rows can refuse: the digests are those of the wrong file, as a faulty build's.
DAMAGED: dict[str, tuple[str, str, float | None]] = {
    "a layer's bias zeroed": ("sa3-m", "modulation.0.bias", 0.0),
    "rotary columns shifted": ("sa3-m", "sine", None),
    "the text's last norm x 1.1": ("t5gemma", "norm", 1.1),
    "a text layer's products zeroed": ("t5gemma", "layers.0.down.weight", 0.0),
    "the decoder's last product zeroed": ("same-l-decoder", "output.weight", 0.0),
}


@pytest.fixture(scope="module")
def stage_models(tiny_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of the engines that DAMAGED names. Read only."""
    models = tmp_path_factory.mktemp("stage-models")
    for name in {name for name, _, _ in DAMAGED.values()}:
        target = find_target(name)
        pack_engine(
            onnx_of(tiny_fp8, name), target, "cpu", engines.BACKENDS["torch"].engine_path(models, "cpu", target)
        )
    return models


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_engine_fails_the_rows_of_its_graph(case: str, stage_models: Path, tmp_path: Path) -> None:
    name, tensor, factor = DAMAGED[case]
    target = find_target(name)
    built = engines.BACKENDS["torch"].engine_path(stage_models, "cpu", target)
    shutil.copytree(built.parent, tmp_path / "engine")
    engine = tmp_path / "engine" / built.name

    def damage(tensors: dict) -> None:  # type: ignore[type-arg]
        values = tensors[tensor]
        tensors[tensor] = values.roll(1, 1).contiguous() if factor is None else (values * factor).to(values.dtype)

    changed_in_place(engine, damage)
    with engines.BACKENDS["torch"].open(engine, target, "x", None) as opened_engine:
        outcomes = self_check.outcomes(check_rows.read(check_path(engine)), opened_engine.run)
    assert any(outcome.failure for outcome in outcomes)


def test_an_engine_of_a_graph_without_rows_gets_them_when_it_is_built(root: Path, tmp_path: Path) -> None:
    graph = onnx_of(root, FP8.name)
    for beside in (check_path(graph), manifest.manifest_path(graph)):
        beside.unlink()
    pack_engine(graph, FP8, "cpu", engine_of(tmp_path))
    assert not check_path(graph).exists()
    assert len(engines.check_engine(FP8, "torch", ModelSource(None, tmp_path))) == 8
