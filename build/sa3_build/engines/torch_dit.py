"""The DiT's packed engine: written from ONNX, compared with ONNX Runtime on the same file, tuned on this GPU."""

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
CHECKED_SECONDS = (29.72, 47.0)  # durations that a rounded seconds / 384 gets wrong
TEXT_TOKENS_USED = (12, 90)
MIN_COSINE = 0.9999  # of the denoised latent, in 16 bits
# FP8 amplifies the least difference: an activation that rounds to the other side of a step of E4M3 moves by 6 %. So
# the packed DiT may be as far from the graph as the graph is from itself when x is off by NUDGE of it, and some more.
NUDGE, MOST_APART = 1e-4, 1.5


def make(onnx: Path, target: Target, out: Path) -> dict[str, Any]:
    """Write the packed DiT of a graph to `out`; returns the results of its gates.

    Raises ToolError when the graph is not recognised, GateError when the packed DiT is not the graph's.
    """
    null_row = _write(onnx, target, out)
    return {**_compare(onnx, out, target), "null_row": null_row}


def _write(onnx: Path, target: Target, out: Path) -> bool:
    """Write the packed DiT; returns True when it has the rule of the null row."""
    from safetensors.torch import save_file

    sizes, tensors = pack_dit.pack(pack_dit.read_graph(onnx))
    if sizes.precision != target.precision:
        raise ToolError(
            f"{onnx} is a DiT in {sizes.precision}, not {target.precision}",
            f"make the graph again: {target.produced_by}",
        )
    save_file(tensors, str(out), metadata=weights.header(sizes))
    return sizes.null_rows


def _compare(onnx: Path, out: Path, target: Target) -> dict[str, float]:
    """Return the gates of the packed DiT against ONNX Runtime on the graph, over the sampler's noise levels.

    Raises GateError: the denoised cosine in 16 bits, in FP8 the distance as a share of what NUDGE does to the graph.
    """
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runner, worst, apart, nudged = open_runner(out, place), 1.0, 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    with OnnxRuntimeEngine(onnx, low_memory=True) as reference, torch.inference_mode():
        for index, sigma in enumerate(schedule.sigmas(8)[:-1]):
            inputs = _inputs(float(sigma), generator, inpaint=index % 2 == 1)
            theirs = reference.run(inputs)["velocity"]
            told = {name: inputs[name] for name in CONDITIONING}
            ours = runner.velocity(inputs["x"], inputs["t"], told).cpu()
            mine, right = ((inputs["x"] - sigma * velocity).double().flatten(1) for velocity in (ours, theirs))
            worst = min(worst, float(functional.cosine_similarity(mine, right).min()))
            if target.precision == "fp8":
                off = inputs | {"x": inputs["x"] + NUDGE * torch.randn(inputs["x"].shape, generator=generator)}
                apart += float((ours - theirs).double().square().sum())
                nudged += float((reference.run(off)["velocity"] - theirs).double().square().sum())
    gates = {"worst_denoised_cosine_vs_onnxruntime": worst}
    if target.precision == "fp8":
        gates["error_vs_input_noise_1e-4"] = share = math.sqrt(apart / nudged) if nudged else math.inf
        wrong = (
            f"it is {share:.2f} times as far away as {NUDGE:g} of noise on x takes the graph, more than {MOST_APART}"
        )
        holds = share <= MOST_APART
    else:
        wrong, holds = f"worst denoised cosine {worst:.6f} < {MIN_COSINE}", worst >= MIN_COSINE
    if not holds:
        raise GateError(
            f"the packed DiT is not {onnx}: {wrong}", "report the graph; --backend onnxruntime runs it as it is"
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
    """Return the tiles measured on this machine's GPU for an engine that is to lie at `out`."""
    os.environ.setdefault(CACHE_VARIABLE, str(kernels_folder(out)))
    from sa3_trt_core.torch_models.dit.autotune import tuned

    place = torch.device("cuda")
    with torch.inference_mode():
        return asdict(tuned(weights.Packed.load(packed, place).sizes, place))


def warm(out: Path) -> None:
    """Run each kind of kernel once at a short and a long length: what Triton compiles stays beside the engine."""
    runner = open_runner(out, torch.device("cuda"))
    generator = torch.Generator().manual_seed(0)
    inputs = _inputs(0.5, generator, inpaint=True)
    for frames in (CHECKED_FRAMES, shapes.USUAL_FRAMES):
        longer = {name: value.repeat(1, 1, 1 + frames // value.shape[2])[..., :frames] if name in LONG else value
                  for name, value in inputs.items()}  # fmt: skip
        for told in (longer, longer | {"local_add_cond": torch.zeros_like(longer["local_add_cond"])}):
            runner.velocity(longer["x"], longer["t"], {name: told[name] for name in CONDITIONING})
