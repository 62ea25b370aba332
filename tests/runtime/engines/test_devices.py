"""Models loaded one at a time, the choice of a device, and several devices with a worker that is killed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sa3_trt_core import Generator, Request
from sa3_trt_core.cli import devices
from sa3_trt_core.errors import ToolError
from sa3_trt_core.request import count_stages

BASE = Request("slow piano", 1.0, steps=2, seed=1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "noise.wav"
    soundfile.write(path, np.random.default_rng(1).normal(0, 0.1, (44_100, 2)), 44_100, subtype="FLOAT")
    return path


def test_one_model_at_a_time_gives_the_same_sounds(tiny_onnx: Path, sound: Path) -> None:
    rows = [BASE, replace(BASE, seed=2, init_audio=sound, init_noise_level=0.5), replace(BASE, seed=3, cfg=2.0)]
    rows.append(replace(BASE, prompt="techno", seed=4))
    settings = {"precision": "fp32", "backend": "onnxruntime", "onnx_root": tiny_onnx}
    with Generator.load(**settings) as generator:
        expected = dict(generator.generate_many(rows, batch=2))
        assert set(generator.engines.open_stages) == {"text", "encode", "dit", "decoder"}
    opened: list[str] = []
    with Generator.load(**settings, free_models=True, on_engine=lambda *step: opened.append(step[0])) as generator:
        open_stages = []

        def look(stage: str, index: int, total: int) -> None:
            open_stages.append(generator.engines.open_stages)

        for _ in range(2):  # it can be called again
            results = dict(generator.generate_many(rows, 2, look))
            assert generator.engines.open_stages == ()
        with pytest.raises(ToolError, match="all models at once"):
            next(generator.generate_ring(rows, 2))
    assert opened == [] and len(open_stages) == 2 * count_stages(rows, 2)
    order = [stages for step, stages in enumerate(open_stages) if step == 0 or stages != open_stages[step - 1]]
    assert order == 2 * [("text",), ("encode",), ("dit",), ("decoder",)]
    for index, result in expected.items():
        assert torch.equal(results[index].latents, result.latents) and torch.equal(results[index].audio, result.audio)
    assert results[0].timings["load"] > 0


def test_a_device_is_chosen_among_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.VISIBLE, "GPU-a, GPU-b")
    assert devices.choose_devices(None, "1,cpu,0") == ("1", "cpu", "0")
    assert os.environ[devices.VISIBLE] == "GPU-a, GPU-b"
    with pytest.raises(ToolError, match="no GPU 2 here: 2 visible"):
        devices.choose_devices("2", None)
    assert devices.choose_devices("1", None) == ()
    assert os.environ[devices.VISIBLE] == "GPU-b"
    devices.choose_devices("cpu", None)
    assert os.environ[devices.VISIBLE] == ""
