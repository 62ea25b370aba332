"""The PyTorch engines of text encoder and autoencoder: same output as ONNX Runtime on the same file."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build_from_onnx
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import onnx_of, run_checked
from torch import Tensor

import sa3_trt
from helpers import plugin_same
from helpers.commands import assert_user_error, run
from sa3_build.engines import pack_t5gemma
from sa3_build.graph import query
from sa3_build.passes.lower_plugins import plain_graph
from sa3_trt_core import Generator, Request, paths
from sa3_trt_core.engines import BACKENDS
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.engines.torch_stages import TorchDecoder, TorchEncoder, TorchTextEncoder
from sa3_trt_core.errors import ToolError
from sa3_trt_core.sampling.sampler import row_noise
from sa3_trt_core.sampling.upload import UploadedNoise
from sa3_trt_core.targets import find_target
from sa3_trt_core.torch_models.kernels.linear import quantize_rows
from sa3_trt_core.torch_models.same.model import Same
from sa3_trt_core.torch_models.same.reference_ops import ReferenceOps
from sa3_trt_core.torch_models.same.weights import HEAD_CHANNELS, Packed, paired, quantized
from sa3_trt_core.torch_models.t5gemma import weights as text_weights
from sa3_trt_core.torch_models.t5gemma.reference_ops import product_input

NAMES = ("t5gemma", "same-l-encoder", "same-l-decoder")
FRAMES = 37
CPU = torch.device("cpu")


def packed(models: Path, name: str) -> Path:
    return BACKENDS["torch"].engine_path(models, paths.NO_GPU, find_target(name))


@pytest.fixture(scope="module")
def models(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the three engines, built by the command. Read only."""
    folder = tmp_path_factory.mktemp("stages") / "models"
    argv = [*NAMES, "--backend", "torch", "--arch", "cpu", "--onnx-root", tiny_onnx, "--models-dir", folder]
    run_checked(build_from_onnx.main, argv)
    return folder


def latents(rows: int = 1, frames: int = FRAMES) -> Tensor:
    return torch.randn(rows, 256, frames, generator=torch.Generator().manual_seed(rows))


def decibels(samples: Tensor, reference: Tensor) -> float:
    error = (samples.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / error))


def test_the_decoder_gives_the_graphs_samples(tiny_onnx: Path, models: Path) -> None:
    with (
        TorchDecoder(packed(models, "same-l-decoder"), "again") as engine,
        OnnxRuntimeEngine(onnx_of(tiny_onnx, "same-l-decoder-fp32")) as reference,
    ):
        inputs = {"latent": latents()}
        expected = reference.run(inputs)["pcm"]
        pcm = engine.run(inputs)["pcm"]
        assert pcm.dtype == torch.int16 and pcm.shape == expected.shape
        assert decibels(pcm, expected) > 55.0


def test_rows_decode_as_they_do_alone(models: Path) -> None:
    together = latents(rows=3)
    with TorchDecoder(packed(models, "same-l-decoder"), "again") as engine:
        pcm = engine.run({"latent": together})["pcm"]
        for row in range(3):
            assert torch.equal(engine.run({"latent": together[row : row + 1]})["pcm"][0], pcm[row])


@pytest.mark.parametrize("tokens", [1, 20, 200, 17 * FRAMES])
def test_the_samples_do_not_depend_on_the_pieces(models: Path, tokens: int) -> None:
    half = Packed.load(packed(models, "same-l-decoder"), CPU)
    ops = ReferenceOps(half.rates)
    assert torch.equal(Same(half, ops, tokens).pcm(latents(rows=2)), Same(half, ops).pcm(latents(rows=2)))


def test_fp8_products_stay_near_and_are_not_the_16_bit_ones(models: Path) -> None:
    half = Packed.load(packed(models, "same-l-decoder"), CPU)
    fp8 = Packed(*quantized(half.sizes, half.tensors))
    fp16_samples, fp8_samples = (Same(weights, ReferenceOps(half.rates)).samples(latents()) for weights in (half, fp8))
    assert 25.0 < decibels(fp8_samples, fp16_samples) < 45.0


def test_a_scale_of_each_row_makes_its_largest_value_the_largest_code() -> None:
    codes, scale = quantize_rows(torch.tensor([[1.0, -0.5, 0.25], [-3e4, 10.0, 0.0], [0.0, 0.0, 0.0]]))
    assert codes.float().abs().amax(dim=1).tolist() == [448.0, 448.0, 0.0]
    assert torch.allclose((codes.float() * scale[:, None])[0], torch.tensor([1.0, -0.5, 0.25]))


def test_the_encoder_gives_the_graphs_latents(tiny_onnx: Path, models: Path) -> None:
    audio = 0.2 * torch.randn(1, 2, FRAMES * 4096, generator=torch.Generator().manual_seed(5))
    with (
        TorchEncoder(packed(models, "same-l-encoder"), "again") as engine,
        OnnxRuntimeEngine(onnx_of(tiny_onnx, "same-l-encoder")) as reference,
    ):
        expected = reference.run({"audio": audio})["latent"]
        encoded = engine.run({"audio": audio})["latent"]
    assert encoded.shape == expected.shape and decibels(encoded, expected) > 50.0


@pytest.mark.parametrize("used", [1, 40, 256])
def test_the_text_encoder_gives_the_graphs_features(tiny_onnx: Path, models: Path, used: int) -> None:
    ids = torch.randint(0, 300, (2, 256), generator=torch.Generator().manual_seed(used))
    mask = (torch.arange(256) < used).long().expand(2, -1).contiguous()
    inputs = {"input_ids": ids, "attention_mask": mask}
    with (
        TorchTextEncoder(packed(models, "t5gemma"), "again") as engine,
        OnnxRuntimeEngine(onnx_of(tiny_onnx, "t5gemma")) as reference,
    ):
        expected, features = (model.run(inputs)["hidden_states"] for model in (reference, engine))
    assert float((features - expected).norm() / expected.norm()) < 1e-5


def test_a_value_is_the_sum_of_two_halves_in_bf16() -> None:
    value = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    halves, (whole,) = product_input(value, True), product_input(value, False)
    assert halves.dtype == torch.bfloat16 and torch.equal(whole, value)
    assert float(((halves.double().sum(0) - value.double()) / value.double()).abs().max()) < 2.0**-17


def test_a_table_of_angles_that_the_exporter_left_unfolded_is_read_too(tiny_onnx: Path, models: Path) -> None:
    """As of torch 2.11 and transformers 5.17: half of the angles, transposed and joined in the graph."""
    model = plain_graph(onnx_of(tiny_onnx, "t5gemma"))
    (cosine,) = (node for node in model.graph if node.op_type == "Cos")
    folded = query.constant_of(cosine.inputs[0])
    assert folded is not None
    half = ir.Value(name="half", const_value=ir.tensor(np.swapaxes(folded[..., :32], -1, -2).copy()))
    model.graph.register_initializer(half)
    turned = ir.node("Transpose", [half], {"perm": [0, 2, 1]})
    joined = ir.node("Concat", [turned.outputs[0], turned.outputs[0]], {"axis": -1})
    model.graph.insert_before(cosine, [turned, joined])
    for node in model.graph:
        if node.op_type in ("Cos", "Sin"):
            node.replace_input_with(0, joined.outputs[0])
    sizes, tensors = pack_t5gemma.pack(model)
    known = text_weights.Packed.load(packed(models, "t5gemma"), CPU)
    assert sizes == known.sizes
    for name in ("cosine", "sine"):
        assert torch.equal(tensors[name], known.tensor(name)) and tensors[name].is_contiguous()


def test_a_token_that_the_encoder_does_not_know_is_the_users_mistake(models: Path) -> None:
    ids = torch.full((1, 256), 10**6)
    with (
        TorchTextEncoder(packed(models, "t5gemma"), "again") as engine,
        pytest.raises(ToolError, match="text encoder's vocabulary"),
    ):
        engine.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_published_decoders_are_lowered_and_packed(tiny_onnx: Path, models: Path, tmp_path: Path) -> None:
    root = tmp_path / "onnx"
    target = onnx_of(root, "same-l-decoder")
    assert plugin_same.insert_plugins(onnx_of(tiny_onnx, "same-l-decoder-fp32"), target) > 0
    argv = ["same-l-decoder", "--backend", "torch", "--arch", "cpu", "--onnx-root", root, "--models-dir", tmp_path]
    run_checked(build_from_onnx.main, argv)
    exported = Packed.load(packed(models, "same-l-decoder"), CPU)
    published = Packed.load(packed(tmp_path, "same-l-decoder"), CPU)
    assert exported.sizes == published.sizes
    samples, expected = (
        Same(weights, ReferenceOps(weights.rates)).samples(latents()) for weights in (published, exported)
    )
    assert decibels(samples, expected) > 55.0


@pytest.mark.parametrize("name", ["t5gemma", "same-l-decoder", "same-l-encoder"])
def test_a_graph_that_computes_something_else_is_a_failed_gate(tiny_onnx: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / "onnx"
    shutil.copytree(onnx_of(tiny_onnx, name).parent, onnx_of(root, name).parent)
    path = onnx_of(root, name)
    model = onnx.load(path, load_external_data=False)
    last = [node for node in model.graph.node if node.op_type == "Softmax"][-1]
    last.op_type, axes = "LogSoftmax", list(last.attribute)
    del last.attribute[:]
    last.attribute.extend(axes)
    path.write_bytes(model.SerializeToString())
    argv = [name, "--backend", "torch", "--arch", "cpu", "--onnx-root", root, "--models-dir", tmp_path / "models"]
    result = run(build_from_onnx.main, argv)
    assert result.code == 3 and "differs from" in result.err and not packed(tmp_path / "models", name).exists()


@pytest.mark.parametrize("name", ["t5gemma", "same-l-decoder"])
def test_a_graph_without_its_structure_is_said_in_two_lines(tiny_onnx: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / "onnx"
    shutil.copytree(onnx_of(tiny_onnx, name).parent, onnx_of(root, name).parent)
    path = onnx_of(root, name)
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.op_type = "Sigmoid" if node.op_type == "Tanh" else node.op_type
    path.write_bytes(model.SerializeToString())
    argv = [name, "--backend", "torch", "--arch", "cpu", "--onnx-root", root, "--models-dir", tmp_path / "models"]
    assert_user_error(run(build_from_onnx.main, argv), "")


def test_a_torn_decoder_says_how_to_build_it(tiny_onnx: Path, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "models")
    engine = packed(tmp_path / "models", "same-l-decoder")
    engine.write_bytes(engine.read_bytes()[:-100])
    with pytest.raises(ToolError) as caught:
        TorchDecoder(engine, "the command")
    assert "the command" in caught.value.hint


def test_a_rotary_pair_lies_half_a_head_apart() -> None:
    order = paired()
    assert sorted(order) == list(range(HEAD_CHANNELS))
    assert [order[32 + i] - order[i] for i in range(16)] == [16] * 16


def test_uploaded_noise_is_the_samplers_to_the_bit() -> None:
    uploaded, drawn = UploadedNoise([3, 9], 4, 24, 17, "cpu"), row_noise([3, 9], 4, 24, 17)
    uploaded.draw_ahead(2)
    for _ in range(3):
        assert torch.equal(next(uploaded), next(drawn))
    with ThreadPoolExecutor(1) as pool:  # one thread draws what another takes
        pool.submit(uploaded.draw_ahead, 200)
        for _ in range(250):
            assert torch.equal(next(uploaded), next(drawn))


def test_sounds_decoded_together_keep_what_is_their_own(tiny_onnx: Path, models: Path, tmp_path: Path) -> None:
    """Requests of one length and other steps: sigmas, timings and memory of each, and the sound that it is alone."""
    folder = shutil.copytree(models, tmp_path / "m")
    argv = ["sa3-m", "--backend", "torch", "--arch", "cpu", "--onnx-root", tiny_onnx, "--models-dir", folder]
    run_checked(build_from_onnx.main, argv)
    requests = [Request("a", 1.0, steps=2, seed=1), Request("b", 1.0, steps=3, seed=2)]
    with Generator.load(backend="torch", onnx_root=tiny_onnx, models_dir=folder) as generator:
        assert generator.decoder_rows(FRAMES) > 1
        jobs = [generator.ring_batch(request)[0] for request in requests]
        for seed, job in enumerate(jobs):
            job.latents = latents(seed + 1)[:1]
            job.meter.memory["text"] = seed
        together = generator.decoded_together(jobs)
        alone = [generator.decoded(job) for job in jobs]
    for result, expected in zip(together, alone, strict=True):
        assert torch.equal(result.sigmas, expected.sigmas) and torch.equal(result.latents, expected.latents)
        assert result.timings.keys() == expected.timings.keys() and {"text", "decode"} <= result.timings.keys()
        assert result.memory == expected.memory
        assert torch.allclose(result.audio, expected.audio, atol=1e-3)
    assert [len(result.sigmas) for result in together] == [3, 4]


def test_the_command_names_the_engines_that_it_runs(tiny_onnx: Path, models: Path, tmp_path: Path) -> None:
    argv = [
        "sa3-m",
        "--backend",
        "torch",
        "--arch",
        "cpu",
        "--onnx-root",
        tiny_onnx,
        "--models-dir",
        tmp_path / "m",
    ]
    shutil.copytree(models, tmp_path / "m")
    run_checked(build_from_onnx.main, argv)
    sound_argv = ["--prompt", "x", "--seconds", 1, "--steps", 1, "--json", "--quiet", "--backend", "torch"]
    sound_argv += ["--onnx-root", tiny_onnx, "--models-dir", tmp_path / "m", "--out", tmp_path / "a.wav"]
    backends = []
    for engine in (None, packed(tmp_path / "m", "same-l-decoder")):
        if engine is not None:
            engine.unlink()
        result = run(sa3_trt.main, sound_argv)
        assert result.code == 0, result.err
        backends.append({stage: backend for stage, (_, backend) in json.loads(result.out)["engines"].items()})
    assert set(backends[0].values()) == {"torch"} and backends[1]["decoder"] == "onnxruntime"
