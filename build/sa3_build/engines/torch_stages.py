"""Packed engines of the text encoder and the autoencoder: written from ONNX and compared with ONNX Runtime."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3_build.engines import pack_same, pack_t5gemma
from sa3_build.passes.lower_plugins import lowered, plain_graph
from sa3_trt_core import shapes
from sa3_trt_core.engines.base import require_output
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.engines.packed import CACHE_VARIABLE, kernels_folder
from sa3_trt_core.engines.torch_stages import open_decoder, open_same, open_text
from sa3_trt_core.errors import GateError
from sa3_trt_core.targets import Target
from sa3_trt_core.torch_models.same import weights as same
from sa3_trt_core.torch_models.t5gemma import weights as text

SAME_FORMAT, TEXT_FORMAT = same.FORMAT, text.FORMAT
CHECKED_FRAMES = 40
CHECKED_TOKENS = (9, 120, shapes.TEXT_TOKENS)
MIN_SNR_DB = {"fp16": 25.0, "fp8": 10.0}  # against the graph, on noise; trained sin gates reach 33 dB in fp16
MAX_FEATURE_ERROR = 1e-4  # relative L2 of text features
HINT = "report the graph; it runs with --backend onnxruntime"


def make_text(onnx: Path, target: Target, out: Path) -> dict[str, float]:
    """Write the packed text encoder of a graph to `out`; return the results of its gates. Raises GateError."""
    from safetensors.torch import save_file

    os.environ.setdefault(CACHE_VARIABLE, str(kernels_folder(out)))
    sizes, tensors = pack_t5gemma.pack(plain_graph(onnx))
    save_file(tensors, str(out), metadata=text.header(sizes))
    encoder = open_text(out, _device())
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    with OnnxRuntimeEngine(onnx, low_memory=True) as reference, torch.inference_mode():
        for used in CHECKED_TOKENS:
            ids = torch.randint(0, sizes.vocabulary, (1, shapes.TEXT_TOKENS), generator=generator)
            mask = (torch.arange(shapes.TEXT_TOKENS) < used).long()[None]
            expected = require_output(
                reference.run({"input_ids": ids, "attention_mask": mask}), "hidden_states"
            ).double()
            features = encoder.hidden_states(ids, mask).cpu().double()
            worst = max(worst, float((features - expected).norm() / expected.norm()))
    if not worst <= MAX_FEATURE_ERROR:
        raise GateError(f"the packed text encoder differs from {onnx}: error {worst:.2e} (limit {MAX_FEATURE_ERROR:g})",
                        HINT)  # fmt: skip
    return {"feature_error_vs_onnxruntime": worst}


def make_decoder(onnx: Path, target: Target, out: Path) -> dict[str, float]:
    """Write the packed SAME decoder of a graph to `out`; return the results of its gates. Raises GateError."""

    def compare(reference: OnnxRuntimeEngine, generator: torch.Generator) -> float:
        latent = torch.randn((1, shapes.LATENT_CHANNELS, CHECKED_FRAMES), generator=generator)
        inputs = {"latent": latent}
        if "limiter_ceiling" in reference.input_names:
            inputs["limiter_ceiling"] = torch.tensor(1.0)
        outputs = reference.run(inputs)
        if "pcm" in outputs:
            reference_samples = outputs["pcm"].float()
        else:
            audio = require_output(outputs, "audio").float().transpose(1, 2).clamp(-1.0, 1.0)
            reference_samples = shapes.FULL_SCALE * audio
        return _decibels(open_decoder(out, _device()).pcm(latent).float(), reference_samples)

    return _make_same(onnx, target, out, "decoder", compare)


def make_encoder(onnx: Path, target: Target, out: Path) -> dict[str, float]:
    """Write the packed SAME encoder of a graph to `out`; return the results of its gates. Raises GateError."""

    def compare(reference: OnnxRuntimeEngine, generator: torch.Generator) -> float:
        samples = CHECKED_FRAMES * shapes.SAMPLES_PER_FRAME
        audio = 0.2 * torch.randn((1, shapes.AUDIO_CHANNELS, samples), generator=generator)
        reference_latents = require_output(reference.run({"audio": audio}), "latent").float()
        return _decibels(open_same(out, _device()).latents(audio.to(_device())).cpu(), reference_latents)

    return _make_same(onnx, target, out, "encoder", compare)


def tune_same(packed: Path, out: Path) -> dict[str, Any] | None:
    """Return the tile sizes measured on this machine's GPU for a decoder at `out`."""
    os.environ.setdefault(CACHE_VARIABLE, str(kernels_folder(out)))
    from sa3_trt_core.torch_models.same.autotune import tuned

    with torch.inference_mode():
        return asdict(tuned(same.Packed.load(packed, torch.device("cuda"))))


def no_tiles(packed: Path, out: Path) -> dict[str, Any] | None:
    """Return None: this kind of engine has no measured tile sizes."""
    return None


def warm_text(out: Path) -> None:
    """Run the text encoder once."""
    ids = torch.zeros((1, shapes.TEXT_TOKENS), dtype=torch.int64)
    with torch.inference_mode():
        open_text(out, _device()).hidden_states(ids, torch.ones_like(ids))


def warm_decoder(out: Path) -> None:
    """Run each kind of kernel, so that Triton's compiled kernels are stored beside the engine."""
    with torch.inference_mode():
        open_decoder(out, _device()).pcm(torch.randn((1, shapes.LATENT_CHANNELS, shapes.MIN_CODEC_FRAMES)))


def warm_encoder(out: Path) -> None:
    """Run each kind of kernel of an encoder, like `warm_decoder`."""
    samples = shapes.MIN_CODEC_FRAMES * shapes.SAMPLES_PER_FRAME
    with torch.inference_mode():
        open_same(out, _device()).latents(torch.randn((1, shapes.AUDIO_CHANNELS, samples), device=_device()))


def _make_same(
    onnx: Path, target: Target, out: Path, kind: str, compare: Callable[[OnnxRuntimeEngine, torch.Generator], float]
) -> dict[str, float]:
    """Write the decoder or encoder with the to_qkv order that the comparison confirms. Raises GateError."""
    from safetensors.torch import save_file

    os.environ.setdefault(CACHE_VARIABLE, str(kernels_folder(out)))
    model, precision = plain_graph(onnx), "fp8" if target.precision == "fp8" else "fp16"
    best = -math.inf
    with OnnxRuntimeEngine(onnx, lowered(onnx), low_memory=True) as reference, torch.inference_mode():
        for order in pack_same.ORDERS:
            sizes, tensors = pack_same.pack(model, kind, order)
            if precision == "fp8":
                sizes, tensors = same.quantized(sizes, tensors)
            save_file(tensors, str(out), metadata=same.header(sizes))
            snr = compare(reference, torch.Generator().manual_seed(0))
            best = max(best, snr)
            if snr >= MIN_SNR_DB[precision]:
                return {"snr_db_vs_onnxruntime": snr}
    raise GateError(
        f"the packed {kind} differs from {onnx}: SNR {best:.1f} dB on noise (limit {MIN_SNR_DB[precision]:g} dB)", HINT
    )


def _decibels(samples: Tensor, reference: Tensor) -> float:
    """Return the signal-to-noise ratio of `samples` against `reference`, in dB."""
    signal, error = reference.double().square().sum(), (samples.double() - reference.double()).square().sum()
    return float(10.0 * torch.log10(signal / error.clamp(min=1e-30)))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
