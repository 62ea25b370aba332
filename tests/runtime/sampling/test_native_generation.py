"""Generations compared with figures of the native package: final latents, lengths and valid frames.

`native_generation.json` was made by that package (stable_audio_3 at commit 636f906 of its public repository) from the
checkpoint of the fixture tiny_checkpoint: CPU, fp32, its text encoder too, attention over the valid frames as flash
attention gives it, the audio encoder's noise off. Of each final latent it has the norm over the valid frames and the
values of every 51st channel at five frames spread evenly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from sa3_trt_core import Generator, Request, Result

FIGURES: dict[str, Any] = json.loads(Path(__file__).with_name("native_generation.json").read_text())
TOLERANCE = 5e-5  # relative L2


@pytest.fixture(scope="module")
def generator(tiny_onnx: Path) -> Iterator[Generator]:
    with Generator.load(precision="fp32", backend="onnxruntime", onnx_root=tiny_onnx) as opened:
        yield opened


@pytest.fixture(scope="module")
def tone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the input sound of the figures of in-painting and audio-to-audio."""
    time = np.arange(44_100 * 14) / 44_100
    left = np.sin(2 * np.pi * 220 * time) * np.exp(-(time % 0.5) * 4)
    right = np.sin(2 * np.pi * 331 * time) * np.exp(-(time % 0.7) * 3)
    path = tmp_path_factory.mktemp("tone") / "tone.wav"
    soundfile.write(path, np.stack([left, right], axis=1).astype(np.float32) * np.float32(0.3), 44_100, subtype="FLOAT")
    return path


def requested(name: str, tone: Path) -> Request:
    settings = dict(FIGURES[name]["settings"])
    if settings.keys() & {"inpaint", "init_noise_level"}:
        settings["init_audio"] = tone
    settings["inpaint"] = tuple(map(tuple, settings.get("inpaint", ())))
    return Request(**settings)


def picked(result: Result, valid: int) -> tuple[torch.Tensor, float]:
    latents = result.latents[0, :, :valid]
    return latents[::51, torch.linspace(0, valid - 1, 5).long()], float(latents.norm())


@pytest.mark.parametrize("name", FIGURES)
def test_final_latents_are_those_of_the_models_own_package(generator: Generator, tone: Path, name: str) -> None:
    figures, request = FIGURES[name], requested(name, tone)
    result = generator.generate(request)
    assert (request.frames, request.valid_frames) == (figures["frames"], figures["valid"])
    latents, norm = picked(result, figures["valid"])
    expected = torch.tensor(figures["latents"])
    assert float((latents - expected).norm() / expected.norm()) < TOLERANCE
    assert norm == pytest.approx(figures["norm"], rel=TOLERANCE)


def test_batches_and_rings_of_other_lengths_give_them_too(generator: Generator, tone: Path) -> None:
    """Batch rows of equal and of different valid lengths: 5 s has 118 of 120 frames, 5.127 s all 120."""
    names = ["text, 5 s", "no text", "text, 5.127 s", "in-painting", "in-painting, two ranges"]
    requests = [requested(name, tone) for name in names]
    together = dict(generator.generate_many(requests, batch=4))
    ring = dict(generator.generate_ring(requests, depth=3))
    for index, name in enumerate(names):
        expected = torch.tensor(FIGURES[name]["latents"])
        for result in (together[index], ring[index]):
            latents, _ = picked(result, FIGURES[name]["valid"])
            assert float((latents - expected).norm() / expected.norm()) < TOLERANCE, name


def test_every_rule_makes_a_difference_that_the_figures_would_show(generator: Generator, tone: Path) -> None:
    """A changed setting gives latents further from the figures than ten tolerances."""
    changes = {
        "text, 5 s": {"duration_padding": 6.05},
        "in-painting": {"inpaint": ((1.1, 2.5),)},
        "in-painting, to the end": {"inpaint": ((2.1, 5.127),)},
        "empty negative prompt": {"negative_prompt": None},
        "audio to audio": {"schedule_order": "warp-then-scale"},
        "in-painting from a noise level": {"init_noise_level": None},
    }
    for name, change in changes.items():
        result = generator.generate(replace(requested(name, tone), **change))
        latents, _ = picked(result, min(FIGURES[name]["valid"], result.latents.shape[-1]))
        expected = torch.tensor(FIGURES[name]["latents"])
        assert float((latents - expected).norm() / expected.norm()) > 10 * TOLERANCE, name
