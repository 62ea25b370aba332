"""The packed engines of the text encoder and the autoencoder: written from ONNX and compared with ONNX Runtime."""

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
from sa3_trt_core.engines.base import pick
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.engines.packed import CACHE_VARIABLE, kernels_folder
from sa3_trt_core.engines.torch_stages import open_decoder, open_same
from sa3_trt_core.errors import GateError
from sa3_trt_core.targets import Target
from sa3_trt_core.torch_models.same import weights as same
from sa3_trt_core.torch_models.t5gemma import weights as text
from sa3_trt_core.torch_models.t5gemma.model import Encoder

SAME_FORMAT, TEXT_FORMAT = same.FORMAT, text.FORMAT
CHECKED_FRAMES = 40
CHECKED_TOKENS = (9, 120, shapes.TEXT_TOKENS)
LEAST_DB = {"fp16": 25.0, "fp8": 10.0}  # against the graph, on noise, where trained sin gates amplify fp16 to 33 dB
MOST_APART = 1e-4  # relative L2 of text features
ADVICE = "report the graph; --backend onnxruntime runs it as it is"


def make_text(onnx: Path, target: Target, out: Path) -> dict[str, float]:
    """Write the packed text encoder of a graph to `out`; returns the results of its gates. Raises GateError."""
    from safetensors.torch import save_file

    sizes, tensors = pack_t5gemma.pack(plain_graph(onnx))
    save_file(tensors, str(out), metadata=text.header(sizes))
    encoder = _open_text(out)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    with OnnxRuntimeEngine(onnx, low_memory=True) as reference, torch.inference_mode():
        for used in CHECKED_TOKENS:
            ids = torch.randint(0, sizes.vocabulary, (1, shapes.TEXT_TOKENS), generator=generator)
            mask = (torch.arange(shapes.TEXT_TOKENS) < used).long()[None]
            theirs = pick(reference.run({"input_ids": ids, "attention_mask": mask}), "hidden_states").double()
            ours = encoder.hidden_states(ids, mask).cpu().double()
            worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    if not worst <= MOST_APART:
        raise GateError(f"the packed text encoder is not {onnx}: features {worst:.2e} apart, more than {MOST_APART:g}",
                        ADVICE)  # fmt: skip
    return {"features apart from ONNX Runtime": worst}


def make_decoder(onnx: Path, target: Target, out: Path) -> dict[str, float]:
    """Return the same for a SAME decoder."""

    def compare(reference: OnnxRuntimeEngine, generator: torch.Generator) -> float:
        latent = torch.randn((1, shapes.LATENT_CHANNELS, CHECKED_FRAMES), generator=generator)
        inputs = {"latent": latent}
        if "limiter_ceiling" in reference.input_names:
            inputs["limiter_ceiling"] = torch.tensor(1.0)
        outputs = reference.run(inputs)
        if "pcm" in outputs:
            theirs = outputs["pcm"].float()
        else:
            theirs = 32767.0 * pick(outputs, "audio").float().transpose(1, 2).clamp(-1.0, 1.0)
        return _decibels(open_decoder(out, _place()).pcm(latent).float(), theirs)

    return _make_same(onnx, target, out, "decoder", compare)


def make_encoder(onnx: Path, target: Target, out: Path) -> dict[str, float]:
    """Return the same for a SAME encoder."""

    def compare(reference: OnnxRuntimeEngine, generator: torch.Generator) -> float:
        samples = CHECKED_FRAMES * shapes.SAMPLES_PER_FRAME
        audio = 0.2 * torch.randn((1, shapes.AUDIO_CHANNELS, samples), generator=generator)
        theirs = pick(reference.run({"audio": audio}), "latent").float()
        return _decibels(open_same(out, _place()).latents(audio.to(_place())).cpu(), theirs)

    return _make_same(onnx, target, out, "encoder", compare)


def tune_same(packed: Path, out: Path) -> dict[str, Any] | None:
    """Return the tiles measured on this machine's GPU for a decoder that is to lie at `out`."""
    os.environ.setdefault(CACHE_VARIABLE, str(kernels_folder(out)))
    from sa3_trt_core.torch_models.same.autotune import tuned

    with torch.inference_mode():
        return asdict(tuned(same.Packed.load(packed, torch.device("cuda"))))


def no_tiles(packed: Path, out: Path) -> dict[str, Any] | None:
    """Return none: nothing is measured for this kind."""
    return None


def warm_text(out: Path) -> None:
    """Run the text encoder once."""
    ids = torch.zeros((1, shapes.TEXT_TOKENS), dtype=torch.int64)
    with torch.inference_mode():
        _open_text(out).hidden_states(ids, torch.ones_like(ids))


def warm_decoder(out: Path) -> None:
    """Run each kind of kernel once: what Triton compiles stays beside the engine."""
    with torch.inference_mode():
        open_decoder(out, _place()).pcm(torch.randn((1, shapes.LATENT_CHANNELS, shapes.MIN_CODEC_FRAMES)))


def warm_encoder(out: Path) -> None:
    """The same for an encoder."""
    samples = shapes.MIN_CODEC_FRAMES * shapes.SAMPLES_PER_FRAME
    with torch.inference_mode():
        open_same(out, _place()).latents(torch.randn((1, shapes.AUDIO_CHANNELS, samples), device=_place()))


def _make_same(
    onnx: Path, target: Target, out: Path, kind: str, compare: Callable[[OnnxRuntimeEngine, torch.Generator], float]
) -> dict[str, float]:
    """Write the half whose to_qkv order the comparison confirms."""
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
            found = compare(reference, torch.Generator().manual_seed(0))
            best = max(best, found)
            if found >= LEAST_DB[precision]:
                return {"dB against ONNX Runtime": found}
    raise GateError(
        f"the packed {kind} is not {onnx}: {best:.1f} dB from it on noise, less than {LEAST_DB[precision]:g}", ADVICE
    )


def _decibels(ours: Tensor, theirs: Tensor) -> float:
    """Signal to noise ratio of ours against theirs."""
    wanted, error = theirs.double().square().sum(), (ours.double() - theirs.double()).square().sum()
    return float(10.0 * torch.log10(wanted / error.clamp(min=1e-30)))


def _open_text(path: Path) -> Encoder:
    return Encoder(text.Packed.load(path, _place()), _place())


def _place() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
