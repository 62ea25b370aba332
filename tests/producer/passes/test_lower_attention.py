"""The window attention plug-in of the published autoencoders, lowered to plain ops: equal to its definition."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import build_from_onnx
import lower_attention
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from conftest import onnx_of
from hypothesis import given, settings, strategies as st
from onnx.reference import ReferenceEvaluator

import sa3_trt
from helpers.commands import assert_user_error, listing, run
from helpers.plugin_graphs import HEADS, WIDTH, dense_attention, plugin_decoder, plugin_graph
from sa3_build.passes.lower_plugins import lowered
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.audio.autoencoder import decode, is_clipped
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

SHAPE = (2 * HEADS, WIDTH)
PUBLISHED = Path("same-l") / "dec_dynamic_triton_swa.onnx"


def drawn(batch: int, frames: int, seed: int = 0, size: float = 1.0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(0, size, (batch, 17 * frames, *SHAPE)).astype(np.float32) for _ in range(3)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    """Return a session of one lowered plug-in, for every batch and length."""
    path = plugin_graph(tmp_path_factory.mktemp("swa") / "swa.onnx", num_heads=HEADS)
    return onnxruntime.InferenceSession(lowered(path))


@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 99), st.sampled_from([0.1, 1.0, 20.0]))
@settings(max_examples=40, deadline=None)
def test_the_block_form_is_the_definition(single, batch: int, frames: int, seed: int, size: float) -> None:  # type: ignore[no-untyped-def]
    parts = drawn(batch, frames, seed, size)
    (output,) = single.run(None, dict(zip("qkv", parts, strict=True)))
    expected = dense_attention(*parts)
    assert output.shape == expected.shape == (batch, 17 * frames, HEADS, WIDTH)
    # A score of magnitude 400 has an fp32 step of 3e-5, which is the error of its softmax weight.
    assert np.abs(output - expected).max() <= 2e-5 * max(1.0, size) ** 2


@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 2e-5), ("float16", 6e-3), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("shape", [("B", "N", *SHAPE), (1, "N", *SHAPE), ("B", "N", "H2", "D")])
def test_every_type_and_what_is_known_of_the_shape(tmp_path: Path, kind: str, tolerance: float, shape) -> None:  # type: ignore[no-untyped-def]
    path = plugin_graph(tmp_path / "swa.onnx", kind, shape, num_heads=2 * HEADS)
    proto = onnx.load_from_string(lowered(path))
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]
    numpy_kind = ml_dtypes.bfloat16 if kind == "bfloat16" else np.dtype(kind)
    parts = [part.astype(numpy_kind) for part in drawn(1, 5)]
    feeds = dict(zip("qkv", parts, strict=True))
    if kind == "bfloat16":  # ONNX Runtime has no such products on a CPU
        (output,) = ReferenceEvaluator(proto).run(None, feeds)
    else:
        (output,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)
    assert output.dtype == numpy_kind
    assert np.abs(output.astype(np.float64) - dense_attention(*parts)).max() <= tolerance


def test_opset_13_is_served_too(tmp_path: Path) -> None:
    parts = drawn(1, 3)
    session = onnxruntime.InferenceSession(lowered(plugin_graph(tmp_path / "swa.onnx", opset=13, num_heads=HEADS)))
    assert np.abs(session.run(None, dict(zip("qkv", parts, strict=True)))[0] - dense_attention(*parts)).max() <= 2e-5


BAD = {
    "window": ({"window": 9}, "attribute window"),
    "tokens": ({"shape": (1, 18, *SHAPE)}, "18 tokens"),
    "odd heads": ({"shape": (1, 17, 3, WIDTH)}, "(B, N, 2H, D)"),
    "three axes": ({"shape": (1, 17, 32)}, "(B, N, 2H, D)"),
    "heads": ({"num_heads": 3}, "declares 3 heads"),
    "opset": ({"opset": 12}, "opset 12"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_recognised_is_refused(tmp_path: Path, name: str) -> None:
    changes, words = BAD[name]
    path = plugin_graph(tmp_path / "in" / "swa.onnx", **changes)
    before = listing(tmp_path)
    assert_user_error(
        run(lower_attention.main, ["--input", path, "--onnx", tmp_path / "out" / "swa.onnx"]), "swa.onnx", words
    )
    assert listing(tmp_path) == before


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an ONNX root with a decoder under its published name, with plug-ins and without inner types."""
    root = tmp_path_factory.mktemp("published")
    plugin_decoder(root / PUBLISHED, typed=False)
    return root


def test_the_lowered_file_runs_in_onnxruntime_and_is_kept(published: Path, tmp_path: Path) -> None:
    path = onnx_of(tmp_path, "same-l-decoder")
    argv = ["--input", published / PUBLISHED, "--onnx", path]
    result = run(lower_attention.main, argv)
    assert (result.code, result.out) == (0, f"{path}: 2 window attentions lowered\n"), result.err
    assert manifest.verify_manifest(path, deep=True) is None
    before = listing(tmp_path)
    again = run(lower_attention.main, argv)
    assert (again.code, again.out) == (0, f"{path} is current\n") and listing(tmp_path) == before
    with OnnxRuntimeEngine(path) as engine:
        latents = torch.randn(1, 256, 200, generator=torch.Generator().manual_seed(0)) / 8
        whole, windows = decode(engine, latents), decode(engine, latents, 64)
    assert float((whole - windows).abs().max()) <= 2 / 32767 and float(whole.abs().max()) > 0.01
    assert_user_error(run(lower_attention.main, ["--input", path, "--onnx", tmp_path / "x.onnx"]), "no plug-in")
    assert_user_error(run(lower_attention.main, [*argv[:2], "--onnx", argv[1]]), "is also the input")


def test_the_published_file_is_compiled_as_it_is(published: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the RTX builder is part of requirements-cpu.txt only")
    argv = ["same-l-decoder", "--backend", "tensorrt_rtx", "--arch", "sm_89", "--json", "--models-dir", tmp_path]
    before = listing(published)
    result = run(build_from_onnx.main, [*argv, "--onnx-root", published])
    assert result.code == 0, result.err
    (built,) = json.loads(result.out)
    assert built["bytes"] > 100_000 and listing(published) == before
    record = manifest.read_manifest(Path(built["path"]))
    assert record is not None and record.gates["attention_lowered"] is True
    assert set(record.inputs) == {PUBLISHED.name, f"{PUBLISHED.name}.data"}


@pytest.mark.parametrize(("change", "words"), [("another op", "samel::other"), ("three heads", "declares 3 heads")])
def test_a_plug_in_that_is_not_known_is_refused_still(tmp_path: Path, change: str, words: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the RTX builder is part of requirements-cpu.txt only")
    path = plugin_decoder(tmp_path / "root" / PUBLISHED)
    proto = onnx.load(path, load_external_data=False)
    swa = next(node for node in proto.graph.node if node.domain)
    if change == "another op":
        swa.op_type = "other"
    else:
        swa.attribute[0].i = 3
    onnx.save(proto, path)
    argv = ["same-l-decoder", "--backend", "tensorrt_rtx", "--arch", "sm_89", "--onnx-root", tmp_path / "root"]
    assert_user_error(run(build_from_onnx.main, [*argv, "--models-dir", tmp_path / "models"]), words)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("ceiling", [False, True])
@pytest.mark.parametrize("output", ["pcm", "audio"])
def test_every_flavour_of_decoder_makes_sound(tiny_onnx: Path, tmp_path: Path, output: str, ceiling: bool) -> None:
    """The command lowers decoders of every output form for ONNX Runtime, and TensorRT-RTX compiles them."""
    source = plugin_decoder(tmp_path / "published" / PUBLISHED, output, ceiling)
    root = tmp_path / "root"
    shutil.copytree(tiny_onnx, root, ignore=shutil.ignore_patterns("dec_*", "enc_*"))
    assert run(lower_attention.main, ["--input", source, "--onnx", onnx_of(root, "same-l-decoder")]).code == 0
    out = tmp_path / "x.wav"
    argv = ["--prompt", "x", "--onnx-root", root, "--backend", "onnxruntime", "--seconds", 1, "--steps", 1, "--seed", 1]
    result = run(sa3_trt.main, [*argv, "--quiet", "--out", out, "--bits", "32f", "--peak", "normalize"])
    assert result.code == 0, result.err
    samples, _ = soundfile.read(out)
    assert samples.shape == (44_100, 2) and np.abs(samples).max() == pytest.approx(1.0, abs=1e-4)
    limited = run(sa3_trt.main, [*argv, "--quiet", "--out", out, "--peak", "limit"])
    with OnnxRuntimeEngine(onnx_of(root, "same-l-decoder")) as engine:
        assert ("limiter_ceiling" in engine.input_names) == ceiling
        assert limited.code == (2 if is_clipped(engine) else 0)
        assert is_clipped(engine) == (output == "pcm" and not ceiling)
    if output == "audio":
        pytest.importorskip("tensorrt_rtx", reason="the RTX builder is part of requirements-cpu.txt only")
        argv = ["same-l-decoder", "--backend", "tensorrt_rtx", "--arch", "sm_89", "--onnx-root", tmp_path / "published"]
        assert run(build_from_onnx.main, [*argv, "--models-dir", tmp_path / "models"]).code == 0
