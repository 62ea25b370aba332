"""Loading a native checkpoint: the network equals the native one; one test for each error-prone conversion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import native
from sa3_build.export import load_modules, text_encoder, torch_to_onnx
from sa3_build.export.model_config import load_geometry
from sa3_build.export.wrappers import DecoderContract, DitContract, TextContract

TOLERANCE = 1e-5  # max abs of a unit-scale velocity; every conversion error below costs at least 5e-5


@pytest.fixture(scope="module")
def weights(tiny_checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def dit(tiny_checkpoint: Path) -> DitContract:
    return load_dit(tiny_checkpoint)


def load_dit(folder: Path) -> DitContract:
    geometry = load_geometry(folder / "model_config.json")
    stored = load_modules.NativeWeights(folder / "model.safetensors")
    return DitContract(
        load_modules.load_dit(stored, geometry.dit), load_modules.load_duration_embedder(stored, geometry.conditioner)
    )


def difference(dit: DitContract, weights: dict[str, torch.Tensor], inputs: list[torch.Tensor]) -> float:
    with torch.inference_mode():
        return float((dit(*inputs) - native.velocity(weights, *inputs)).abs().max())


@pytest.mark.parametrize("sigma", [1.0, 0.99437, 0.5125, 0.2739])
@pytest.mark.parametrize("frames", [1, 9, 64])
def test_the_velocity_is_the_native_networks(dit, weights, sigma: float, frames: int) -> None:
    """Cover the key table, the qkv row groups, the head order, the Fourier frequencies and the modulation order."""
    inputs = torch_to_onnx.example_inputs("dit", batch=2, frames=frames, seed=frames)
    inputs[1] = torch.full((2,), sigma)
    assert difference(dit, weights, inputs) < TOLERANCE


@pytest.mark.parametrize("valid", [1, 7, 62, 64])
def test_running_the_valid_frames_alone_is_masking_the_others(dit, weights, valid: int) -> None:
    """Running only the valid frames gives the velocity with the others masked out of attention, in-painting too."""
    inputs = torch_to_onnx.example_inputs("dit", batch=2, frames=64, seed=valid)
    inputs[5] = torch.randn(2, 257, 64)
    cut = [inputs[0][..., :valid], *inputs[1:5], inputs[5][..., :valid]]
    with torch.inference_mode():
        velocity, unmasked = dit(*cut), dit(*inputs)[..., :valid]
        expected = native.velocity(weights, *inputs, valid=valid)[..., :valid]
    assert float((velocity - expected).abs().max()) < TOLERANCE
    assert valid == 64 or float((unmasked - expected).abs().max()) > 10 * TOLERANCE  # padding must not be attended


def test_trunk_norms_have_the_native_eps(dit, weights) -> None:
    """Rows of small variance, where 1e-5 and 1e-6 differ by far more than rounding."""
    quiet = {key: value * (0.02 if "memory_tokens" in key else 1.0) for key, value in weights.items()}
    with torch.no_grad():
        dit.dit.memory_tokens.mul_(0.02)
    try:
        inputs = torch_to_onnx.example_inputs("dit", batch=1, frames=8)
        inputs[0] = inputs[0] * 0.01
        assert difference(dit, quiet, inputs) < TOLERANCE
        assert {block.pre_norm.eps for block in dit.dit.transformer_blocks} == {1e-5}
        assert {block.self_attn.q_norm.eps for block in dit.dit.transformer_blocks} == {1e-6}
    finally:
        with torch.no_grad():
            dit.dit.memory_tokens.div_(0.02)


def test_padded_text_is_replaced_before_the_projection(dit) -> None:
    """Values at masked positions have no effect; the mask itself has."""
    inputs = torch_to_onnx.example_inputs("dit", batch=1, frames=8)
    garbage = [value.clone() for value in inputs]
    garbage[2][:, 100:] = 1e3
    unmasked = [*inputs[:3], torch.ones_like(inputs[3]), *inputs[4:]]
    with torch.inference_mode():
        assert torch.equal(dit(*inputs), dit(*garbage))
        assert (dit(*inputs) - dit(*unmasked)).abs().max() > 1e-2


def test_all_keys_are_attended(dit, weights) -> None:
    """Every text position is a key, padded or not: with all text masked the learned rows are still attended."""
    inputs = torch_to_onnx.example_inputs("dit", batch=1, frames=8)
    inputs[3] = torch.zeros_like(inputs[3])
    assert difference(dit, weights, inputs) < TOLERANCE


def test_zeros_are_not_absent_for_the_local_condition(dit, weights) -> None:
    """The local embedding has biases: a zero condition is an input like any other."""
    inputs = torch_to_onnx.example_inputs("dit", batch=1, frames=8)
    inputs[5] = torch.zeros_like(inputs[5])
    assert difference(dit, weights, inputs) < TOLERANCE
    seconds = dit.duration(inputs[4])
    text = torch.where(inputs[3][..., None] > 0.5, inputs[2], dit.dit.prompt_padding_embedding)
    context = torch.cat([text, seconds[:, None]], dim=1)
    with torch.inference_mode():
        skipped = dit.dit(inputs[0], inputs[1], context, seconds, return_dict=False)[0]
        assert (dit(*inputs) - skipped).abs().max() > 1e-2


def test_a_row_without_text_and_mask_is_the_models_null_row(dit) -> None:
    """All its cross-attention tokens are zero, the duration's too; a mask without text keeps the duration token."""
    inputs = torch_to_onnx.example_inputs("dit", batch=2, frames=8)
    row = [value[:1] for value in inputs]
    inputs = [torch.cat([value, value]) for value in row]
    inputs[2][1], inputs[3][1] = 0.0, 0.0
    with torch.inference_mode():
        seconds = dit.duration(row[4])
        zeros = torch.zeros(1, 257, 768)
        null = dit.dit(row[0], row[1], zeros, seconds, local_add_cond=row[5], return_dict=False)[0]
        both = dit(*inputs)
        assert torch.allclose(both[1:], null, atol=1e-5)
        assert torch.allclose(both[:1], dit(*row), atol=1e-5)
        assert (both[1] - both[0]).abs().max() > 1e-2
        empty = dit(*row[:2], torch.zeros_like(row[2]), torch.ones_like(row[3]), *row[4:])
        zeros[:, -1] = seconds
        with_duration = dit.dit(row[0], row[1], zeros, seconds, local_add_cond=row[5], return_dict=False)[0]
        assert torch.allclose(empty, with_duration, atol=1e-5) and (empty - null).abs().max() > 1e-3


def test_row_groups_of_qkv_round_trip() -> None:
    weight = torch.arange(20.0)[:, None]
    grouped = load_modules.regroup_qkv(weight)
    assert grouped[:, 0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 16, 17, 18, 19, 8, 9, 10, 11]
    assert torch.equal(load_modules.ungroup_qkv(grouped), weight)


def test_weights_stored_in_half_precision_are_loaded_as_fp32(tiny_checkpoint: Path, weights, tmp_path: Path) -> None:
    (tmp_path / "model_config.json").write_bytes((tiny_checkpoint / "model_config.json").read_bytes())
    halves = {key: value.half() if value.numel() else value for key, value in weights.items()}
    save_file(halves, tmp_path / "model.safetensors")
    loaded = load_dit(tmp_path)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    widened = {key: value.float() for key, value in halves.items()}
    assert difference(loaded, widened, torch_to_onnx.example_inputs("dit", batch=1, frames=8)) < TOLERANCE


def test_the_duration_token_is_the_native_one(dit, weights) -> None:
    """Fractions of a second reach the highest frequencies; beyond 384 s the number is clamped."""
    for seconds in (0.37, 29.72, 183.25, 384.0, 1000.0):
        inputs = torch_to_onnx.example_inputs("dit", batch=1, frames=4)
        inputs[4] = torch.tensor([seconds])
        assert difference(dit, weights, inputs) < TOLERANCE


def test_the_decoder_is_the_native_one(tiny_checkpoint: Path, weights) -> None:
    """Block-local attention equals dense native attention; the sinusoidal layers are those of the native config."""
    config = json.loads((tiny_checkpoint / "model_config.json").read_text())
    sinusoidal = config["model"]["pretransform"]["config"]["decoder"]["config"]["sinusoidal_blocks"][0]
    geometry = load_geometry(tiny_checkpoint / "model_config.json")
    stored = load_modules.NativeWeights(tiny_checkpoint / "model.safetensors")
    decoder = DecoderContract(load_modules.load_autoencoder(stored, geometry.autoencoder))
    for frames in (1, 2, 3, 37):
        latent = torch.randn(1, 256, frames, generator=torch.Generator().manual_seed(frames))
        with torch.inference_mode():
            expected = native.decode(weights, latent, sinusoidal)
            waveform = decoder.waveform(latent)
            pcm = decoder(latent)
        assert ((waveform - expected).norm() / expected.norm()) < TOLERANCE
        assert pcm.dtype == torch.int32 and pcm.shape == (1, frames * 4096, 2)
        assert torch.equal(pcm[0].T, torch.round(waveform[0].clamp(-1, 1) * 32767).to(torch.int32))


def test_loud_samples_are_clipped_not_wrapped(tiny_checkpoint: Path) -> None:
    geometry = load_geometry(tiny_checkpoint / "model_config.json")
    stored = load_modules.NativeWeights(tiny_checkpoint / "model.safetensors")
    decoder = DecoderContract(load_modules.load_autoencoder(stored, geometry.autoencoder))
    with torch.inference_mode():
        decoder.autoencoder.decoder.blocks[0].mapping.weight.mul_(100.0)
        pcm = decoder(torch.randn(1, 256, 4))
    assert pcm.max() == 32767 and pcm.min() == -32767


def test_text_features_are_fp32_and_offline(tiny_checkpoint: Path, monkeypatch) -> None:
    """The file is bf16; features computed in bf16 would be 0.04 off."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tiny_checkpoint / "t5gemma-b-b-ul2"
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    encoder = TextContract(text_encoder.load_text_encoder(folder))
    tokens = text_encoder.load_tokenizer(folder)(
        "drums, 120 BPM", padding="max_length", max_length=256, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = encoder(tokens.input_ids, tokens.attention_mask)
        coarse = encoder.to(torch.bfloat16)(tokens.input_ids, tokens.attention_mask)
    assert hidden.dtype == torch.float32 and hidden.shape == (1, 256, 768)
    assert (hidden - coarse.float()).abs().max() > 1e-3


def test_what_published_configs_leave_out_has_its_usual_value(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Encoders are published without sinusoidal_blocks, some decoders without sliding_window."""
    config = json.loads((tiny_checkpoint / "model_config.json").read_text())
    autoencoder = config["model"]["pretransform"]["config"]
    assert "sinusoidal_blocks" not in autoencoder["encoder"]["config"]  # as native configs have it
    del autoencoder["decoder"]["config"]["sliding_window"]
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    assert load_geometry(tmp_path / "model_config.json") == load_geometry(tiny_checkpoint / "model_config.json")


def test_every_native_tensor_is_used_once(tiny_checkpoint: Path) -> None:
    """522 + 472 + 3 tensors at full depth; the counts follow from the geometry here."""
    geometry = load_geometry(tiny_checkpoint / "model_config.json")
    keys = load_modules.NativeWeights(tiny_checkpoint / "model.safetensors").keys
    dit_keys = [key for key in keys if key.startswith(load_modules.DIT_PREFIX)]
    same_keys = [key for key in keys if key.startswith(load_modules.AUTOENCODER_PREFIX)]
    assert len(dit_keys) == 18 + 21 * geometry.dit.depth
    assert len(same_keys) == 16 + 19 * 2 * geometry.autoencoder.depths[0]
    assert len(keys) - len(dit_keys) - len(same_keys) == 3
