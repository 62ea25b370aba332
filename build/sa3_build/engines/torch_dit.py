"""Packed DiT engine: written from ONNX, compared with ONNX Runtime on the same file, tuned on this GPU."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from sa3_build.engines import pack_dit
from sa3_trt_core import shapes
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.engines.packed import CACHE_VARIABLE, kernels_folder
from sa3_trt_core.engines.torch import open_runner
from sa3_trt_core.errors import GateError, ToolError
from sa3_trt_core.sampling import schedule
from sa3_trt_core.targets import Target
from sa3_trt_core.torch_models.dit import weights
from sa3_trt_core.torch_models.dit.runner import CONDITIONING

FORMAT = weights.FORMAT
LONG = ("x", "local_add_cond")  # inputs with an axis of latent frames
CHECKED_FRAMES, CHECKED_ROWS = 24, 2
CHECKED_SECONDS = (29.72, 47.0)  # durations for which seconds / 384 is inexact in 16 bits
TEXT_TOKENS_USED = (12, 90)
MIN_COSINE = 0.9999  # of the denoised latent, in 16 bits
# FP8 amplifies small differences: an activation that rounds to the neighbouring E4M3 value changes by 6 %. Therefore
# the error of the packed DiT may be up to MAX_RATIO times the graph's own response to relative noise INPUT_NOISE on x.
INPUT_NOISE, MAX_RATIO = 1e-4, 1.5


def make(onnx: Path, target: Target, out: Path) -> dict[str, Any]:
    """Write the packed DiT of a graph to `out`; return the results of its gates.

    Raises ToolError when the graph is not recognised, GateError when the packed DiT differs from the graph.
    """
    null_row = _write(onnx, target, out)
    return {**_compare(onnx, out, target), "null_row": null_row}


def _write(onnx: Path, target: Target, out: Path) -> bool:
    """Write the packed DiT; return True when it implements guidance's null row."""
    from safetensors.torch import save_file

    sizes, tensors = pack_dit.pack(pack_dit.read_graph(onnx))
    if sizes.precision != target.precision:
        raise ToolError(
            f"{onnx} is a DiT in {sizes.precision}, expected {target.precision}",
            f"rebuild the graph: {target.produced_by}",
        )
    save_file(tensors, str(out), metadata=weights.header(sizes))
    return sizes.null_rows


def _compare(onnx: Path, out: Path, target: Target) -> dict[str, float]:
    """Return the gates of the packed DiT against ONNX Runtime on the graph, over the sampler's noise levels.

    In 16 bits the gate is the denoised cosine; in FP8 the error relative to the graph's own response to INPUT_NOISE on
    x. Raises GateError.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runner, worst, error, noise_response = open_runner(out, device), 1.0, 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    with OnnxRuntimeEngine(onnx, low_memory=True) as reference, torch.inference_mode():
        for index, sigma in enumerate(schedule.sigmas(8)[:-1]):
            inputs = _inputs(float(sigma), generator, inpaint=index % 2 == 1)
            expected = reference.run(inputs)["velocity"]
            conditioning = {name: inputs[name] for name in CONDITIONING}
            actual = runner.velocity(inputs["x"], inputs["t"], conditioning).cpu()
            denoised, expected_denoised = (
                (inputs["x"] - sigma * output).double().flatten(1) for output in (actual, expected)
            )
            worst = min(worst, float(functional.cosine_similarity(denoised, expected_denoised).min()))
            if target.precision == "fp8":
                noisy = inputs | {"x": inputs["x"] + INPUT_NOISE * torch.randn(inputs["x"].shape, generator=generator)}
                error += float((actual - expected).double().square().sum())
                noise_response += float((reference.run(noisy)["velocity"] - expected).double().square().sum())
    gates = {"worst_denoised_cosine_vs_onnxruntime": worst}
    if target.precision == "fp8":
        gates["error_vs_input_noise_1e-4"] = ratio = math.sqrt(error / noise_response) if noise_response else math.inf
        failure = f"error is {ratio:.2f}x the graph's own response to {INPUT_NOISE:g} input noise (limit {MAX_RATIO}x)"
        holds = ratio <= MAX_RATIO
    else:
        failure, holds = f"worst denoised cosine {worst:.6f} < {MIN_COSINE}", worst >= MIN_COSINE
    if not holds:
        raise GateError(
            f"the packed DiT differs from {onnx}: {failure}", "report the graph; it runs with --backend onnxruntime"
        )
    return gates


def _inputs(sigma: float, generator: torch.Generator, inpaint: bool) -> dict[str, torch.Tensor]:
    """Return the six inputs of a batch: random latents and text.

    With `inpaint`, local_add_cond has a mask that keeps half of the frames.
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rows, frames = CHECKED_ROWS, CHECKED_FRAMES
    keep = (torch.arange(frames) % 2 * float(inpaint)).expand(rows, 1, frames)
    used = torch.arange(shapes.TEXT_TOKENS)[None] < torch.tensor(TEXT_TOKENS_USED)[:, None]
    return {
        "x": normal(rows, shapes.LATENT_CHANNELS, frames), "t": torch.full((rows,), sigma),
        "t5_hidden": 0.3 * normal(rows, shapes.TEXT_TOKENS, shapes.TEXT_CHANNELS), "t5_mask": used.float(),
        "seconds_total": torch.tensor(CHECKED_SECONDS),
        "local_add_cond": torch.cat([keep, keep * normal(rows, shapes.LATENT_CHANNELS, frames)], dim=1),
    }  # fmt: skip


def tune(packed: Path, out: Path) -> dict[str, Any] | None:
    """Return the tile sizes measured on this machine's GPU for an engine at `out`."""
    os.environ.setdefault(CACHE_VARIABLE, str(kernels_folder(out)))
    from sa3_trt_core.torch_models.dit.autotune import tuned

    device = torch.device("cuda")
    with torch.inference_mode():
        return asdict(tuned(weights.Packed.load(packed, device).sizes, device))


def warm(out: Path) -> None:
    """Run each kind of kernel at a short and a long length; Triton stores the compiled kernels beside the engine."""
    runner = open_runner(out, torch.device("cuda"))
    generator = torch.Generator().manual_seed(0)
    inputs = _inputs(0.5, generator, inpaint=True)
    for frames in (CHECKED_FRAMES, shapes.USUAL_FRAMES):
        longer = {name: value.repeat(1, 1, 1 + frames // value.shape[2])[..., :frames] if name in LONG else value
                  for name, value in inputs.items()}  # fmt: skip
        for row_inputs in (longer, longer | {"local_add_cond": torch.zeros_like(longer["local_add_cond"])}):
            runner.velocity(longer["x"], longer["t"], {name: row_inputs[name] for name in CONDITIONING})
