"""The DiT's engine for PyTorch: packed from ONNX, compared with ONNX Runtime on the same file, tuned on this GPU."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from sa3_build.engines import pack_dit
from sa3_build.engines.tensorrt import CURRENT, Built, check_graph
from sa3_build.graph import io as graph_io
from sa3_build.graph.check_row_files import engine_check_rows
from sa3_trt_core import gpu, shapes
from sa3_trt_core.artifacts import files
from sa3_trt_core.artifacts.build import build
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.engines.torch import BACKEND, CACHE_VARIABLE, kernels_folder, open_runner, tiles_path
from sa3_trt_core.errors import GateError, ToolError
from sa3_trt_core.sampling import schedule
from sa3_trt_core.targets import Target
from sa3_trt_core.torch_models.dit import weights
from sa3_trt_core.torch_models.dit.runner import CONDITIONING, Runner

LONG = ("x", "local_add_cond")  # inputs with an axis of latent frames
CHECKED_FRAMES, CHECKED_ROWS = 24, 2
CHECKED_SECONDS = (29.72, 47.0)  # durations that a rounded seconds / 384 gets wrong
TEXT_TOKENS_USED = (12, 90)
MIN_COSINE = 0.9999  # of the denoised latent, in 16 bits
# FP8 amplifies the least difference: an activation that rounds to the other side of a step of E4M3 moves by 6 %. So
# the packed DiT may be as far from the graph as the graph is from itself when x is off by NUDGE of it, and some more.
NUDGE, MOST_APART = 1e-4, 1.5


def build_settings(target: Target, arch: str) -> dict[str, Any]:
    """What a packed DiT depends on besides its ONNX."""
    profile = {symbol: list(limits) for symbol, limits in shapes.CONTRACTS[target.kind].profile.items()}
    return {
        "target": target.name, "backend": BACKEND.name, "backend_version": weights.FORMAT, "arch": arch,
        "precision": target.precision, "profile": profile,
    }  # fmt: skip


def pack_engine(onnx: Path, target: Target, arch: str, out: Path, force: bool = False) -> Built:
    """Pack `onnx` into `out`, or keep it when its manifest says it is current.

    On a GPU of that architecture the kernels are tuned and compiled too, so that the next start finds them. Raises
    ToolError when the graph is not recognised, GateError when the packed DiT is not the graph's.
    """
    BACKEND.require_engine(target)
    check_graph(onnx, target)
    settings = build_settings(target, arch)
    inputs = {file.name: files.sha256_of(file) for file in graph_io.files_of(onnx)}
    with build(out, "engine", inputs, settings, force) as draft:
        if draft is None:
            return Built(out, 0.0, out.stat().st_size, reused=True, why=CURRENT)
        started = time.monotonic()
        with files.atomic_path(out) as fresh:
            null_row = _write(onnx, target, fresh)
            gates = _compare(onnx, fresh, target)
            tiles = _tiles(fresh, out, arch)
            draft.retire()
        made = [out, *engine_check_rows(onnx, target, out)]
        tiles_path(out).unlink(missing_ok=True)
        if tiles is not None:
            files.write_atomic_text(tiles_path(out), json.dumps(tiles, indent=2) + "\n")
            _warm(open_runner(out, torch.device("cuda")))
            made.append(tiles_path(out))
        draft.finish(made, gates | {"tuned on a GPU": tiles is not None, "null row": null_row})
    return Built(out, time.monotonic() - started, out.stat().st_size, reused=False, why=draft.why)


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
    """The gates of the packed DiT against ONNX Runtime on the graph, over the sampler's noise levels.

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
    gates = {"worst denoised cosine with ONNX Runtime": worst}
    if target.precision == "fp8":
        gates["apart, of what a nudge does"] = share = math.sqrt(apart / nudged) if nudged else math.inf
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
    """The six inputs of a batch: random latents and text, and where asked a mask that keeps half of the frames."""

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


def _tiles(packed: Path, out: Path, arch: str) -> dict[str, Any] | None:
    """The tiles measured on this machine's GPU; None where it is not of `arch`."""
    if gpu.current_arch() != arch or not torch.cuda.is_available():
        return None
    os.environ.setdefault(CACHE_VARIABLE, str(kernels_folder(out)))
    from sa3_trt_core.torch_models.dit.autotune import tuned

    place = torch.device("cuda")
    with torch.inference_mode():
        return asdict(tuned(weights.Packed.load(packed, place).sizes, place))


def _warm(runner: Runner) -> None:
    """Run each kind of kernel once at a short and a long length: what Triton compiles stays beside the engine."""
    generator = torch.Generator().manual_seed(0)
    inputs = _inputs(0.5, generator, inpaint=True)
    for frames in (CHECKED_FRAMES, shapes.USUAL_FRAMES):
        longer = {name: value.repeat(1, 1, 1 + frames // value.shape[2])[..., :frames] if name in LONG else value
                  for name, value in inputs.items()}  # fmt: skip
        for told in (longer, longer | {"local_add_cond": torch.zeros_like(longer["local_add_cond"])}):
            runner.velocity(longer["x"], longer["t"], {name: told[name] for name in CONDITIONING})
