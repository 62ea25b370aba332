"""Exported graphs compared with their torch modules, at lengths and batches they were not traced with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sa3_build.export import load_modules, text_encoder, torch_to_onnx
from sa3_build.export.model_config import load_geometry
from sa3_build.export.wrappers import DecoderContract, DitContract, EncoderContract, TextContract
from sa3_build.graph import contract as graph_contract, io as graph_io, query
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.targets import TOKENIZER_FILES, find_target


@pytest.fixture(scope="module")
def modules(tiny_checkpoint: Path) -> dict[str, torch.nn.Module]:
    geometry = load_geometry(tiny_checkpoint / "model_config.json")
    stored = load_modules.NativeWeights(tiny_checkpoint / "model.safetensors")
    dit = load_modules.load_dit(stored, geometry.dit)
    return {
        "sa3-m-fp32": DitContract(dit, load_modules.load_duration_embedder(stored, geometry.conditioner)),
        "same-l-decoder-fp32": DecoderContract(load_modules.load_autoencoder(stored, geometry.autoencoder)),
        "same-l-encoder": EncoderContract(load_modules.load_autoencoder(stored, geometry.autoencoder)),
        "t5gemma": TextContract(text_encoder.load_text_encoder(tiny_checkpoint / "t5gemma-b-b-ul2")),
    }


def both(modules: dict, root: Path, target: str, inputs: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        expected = modules[target](*inputs).numpy()
    with OnnxRuntimeEngine(root / find_target(target).onnx[0]) as engine:
        outputs = engine.run(dict(zip(engine.input_names, inputs, strict=True)))
    return expected.astype(np.float64), next(iter(outputs.values())).numpy().astype(np.float64)


@pytest.mark.parametrize("frames", [1, 7, 64, 646])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_dit_at_any_length_and_batch(modules, tiny_onnx: Path, frames: int, batch: int) -> None:
    """Include sigmas near 1, where the highest Fourier frequency turns an error of 1e-6 in a constant into 2.7e-3."""
    inputs = torch_to_onnx.example_inputs("dit", batch, frames, seed=frames)
    inputs[1] = torch.tensor([1.0, 0.99437559, 0.98448020])[:batch]
    expected, velocity = both(modules, tiny_onnx, "sa3-m-fp32", inputs)
    assert velocity.shape == (batch, 256, frames)
    assert np.abs(velocity - expected).max() <= 2e-5


@pytest.mark.parametrize("frames", [32, 33, 120])
def test_the_decoder_at_any_length(modules, tiny_onnx: Path, frames: int) -> None:
    inputs = torch_to_onnx.example_inputs("same-decoder", 1, frames, seed=frames)
    expected, pcm = both(modules, tiny_onnx, "same-l-decoder-fp32", inputs)
    assert pcm.shape == (1, frames * 4096, 2)
    assert np.linalg.norm(pcm - expected) / np.linalg.norm(expected) <= 1e-5
    assert np.abs(pcm - expected).max() <= 1  # one step of 16 bits, where rounding falls the other way


@pytest.mark.parametrize("frames", [33, 90])
def test_the_encoder_at_any_length(modules, tiny_checkpoint: Path, tiny_onnx: Path, frames: int) -> None:
    """The graph equals its module and, at one length, diffusers' encoder with its dense mask."""
    inputs = torch_to_onnx.example_inputs("same-encoder", 1, frames, seed=frames)
    expected, latents = both(modules, tiny_onnx, "same-l-encoder", inputs)
    assert latents.shape == (1, 256, frames)
    assert np.linalg.norm(latents - expected) / np.linalg.norm(expected) <= 1e-5
    if frames != 33:
        return
    geometry = load_geometry(tiny_checkpoint / "model_config.json")
    stored = load_modules.NativeWeights(tiny_checkpoint / "model.safetensors")
    with torch.inference_mode():
        dense = load_modules.load_autoencoder(stored, geometry.autoencoder).encode(inputs[0]).latents.numpy()
    assert np.linalg.norm(latents - dense) / np.linalg.norm(dense) <= 1e-5


def test_the_half_decoder_is_close(modules, tiny_onnx: Path) -> None:
    inputs = torch_to_onnx.example_inputs("same-decoder", 1, 40, seed=5)
    expected, _ = both(modules, tiny_onnx, "same-l-decoder-fp32", inputs)
    with OnnxRuntimeEngine(tiny_onnx / find_target("same-l-decoder").onnx[0]) as engine:
        pcm = engine.run({"latent": inputs[0]})["pcm"].numpy()
    relative = np.linalg.norm(pcm - expected) / np.linalg.norm(expected)
    assert 1e-5 < relative < 5e-3


@pytest.mark.parametrize("tokens", [1, 40, 256])
def test_the_text_encoder_follows_its_mask(modules, tiny_onnx: Path, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(5, 500, (1, 256), generator=generator)
    mask = (torch.arange(256) < tokens).long()[None]
    expected, features = both(modules, tiny_onnx, "t5gemma", [ids, mask])
    assert np.abs(features - expected)[0, :tokens].max() <= 2e-5
    changed = ids.clone()
    changed[:, tokens:] = 7
    with OnnxRuntimeEngine(tiny_onnx / find_target("t5gemma").onnx[0]) as engine:
        features_of_changed = engine.run({"input_ids": changed, "attention_mask": mask})["hidden_states"].numpy()
    assert np.allclose(features_of_changed[0, :tokens], features[0, :tokens], atol=1e-6)


@pytest.mark.parametrize(
    "target", ["sa3-m-fp32", "sa3-m", "same-l-decoder-fp32", "same-l-decoder", "same-l-encoder", "t5gemma"]
)
def test_graphs_keep_the_contract(tiny_onnx: Path, target: str) -> None:
    """Names, types, symbolic axes; valid ONNX; no path of the machine that exported it."""
    path = tiny_onnx / find_target(target).onnx[0]
    contract = graph_contract.require_contract(graph_io.load(path), find_target(target).kind, path)
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path, load_external_data=False)
    for values, specs in ((proto.graph.input, contract.inputs), (proto.graph.output, contract.outputs)):
        for value, spec in zip(values, specs, strict=True):
            dims = tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
            assert (value.name, dims) == (spec.name, spec.dims)
    assert b"site-packages" not in path.read_bytes()
    assert {entry.op_type for entry in proto.graph.node if entry.domain not in ("", "ai.onnx")} == set()


def test_the_tokenizer_comes_along(tiny_checkpoint: Path, tiny_onnx: Path) -> None:
    for name in TOKENIZER_FILES:
        assert (tiny_onnx / name).read_bytes() == (tiny_checkpoint / "t5gemma-b-b-ul2" / Path(name).name).read_bytes()


def test_the_half_dit_is_16_bit_between_its_islands(tiny_onnx: Path) -> None:
    """The attention core has one 16-bit type from the first MatMul to the second, so that it can fuse."""
    model = graph_io.load(tiny_onnx / find_target("sa3-m").onnx[0])
    half = {"MatMul": [], "Softmax": [], "Sin": [], "ReduceMean": []}
    for node in model.graph:
        if node.op_type in half:
            half[node.op_type].append(str(node.outputs[0].dtype))
    assert set(half["Softmax"]) == {"FLOAT16"} and len(half["Softmax"]) == 2  # one a pair of halves
    assert set(half["Sin"]) == set(half["ReduceMean"]) == {"FLOAT"}
    core = [node for node in model.graph if node.op_type == "MatMul" and query.weight_initializer(node) is None]
    assert len(core) == 4
    for softmax in (node for node in model.graph if node.op_type == "Softmax"):
        assert softmax.inputs[0].producer() in core
        assert all(use.node in core for use in softmax.outputs[0].uses())
    assert {str(node.outputs[0].dtype) for node in core} == {"FLOAT16"}
