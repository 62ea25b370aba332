"""The Python interface: saving results, sounds as tensors, errors that name the argument, progress."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import sa3_trt
import sa3_trt_core
from helpers.commands import assert_user_error, run
from sa3_trt_core import GateError, Generator, Request, Result, ToolError
from sa3_trt_core.errors import as_flags

BASE = Request("slow piano", seconds=1.0, steps=2, seed=1)
NOISE = torch.from_numpy(np.random.default_rng(1).normal(0, 0.1, (2, 44_100)).astype(np.float32))


@pytest.fixture(scope="module")
def generator(tiny_onnx: Path) -> Iterator[Generator]:
    with Generator.load(precision="fp32", backend="onnxruntime", onnx_root=tiny_onnx) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def result(generator: Generator) -> Result:
    return generator.generate(BASE)


def test_a_result_knows_its_rate_and_both_layouts(result: Result) -> None:
    assert result.sample_rate == 44_100 and result.audio.shape == (44_100, 2)
    assert result.waveform.shape == (2, 44_100) and result.waveform.is_contiguous()
    assert torch.equal(result.waveform[1], result.audio[:, 1])


@pytest.mark.parametrize(
    ("bits", "subtype", "step"), [(16, "PCM_16", 2**-15), (24, "PCM_24", 2**-23), ("32f", "FLOAT", 0)]
)
def test_a_saved_result_is_its_audio(
    result: Result, tmp_path: Path, bits: int | str, subtype: str, step: float
) -> None:
    path = result.save(str(tmp_path / "new" / "a.wav"), bits=bits)
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.subtype) == (44_100, 2, subtype)
    read = torch.from_numpy(soundfile.read(path, dtype="float64")[0])
    assert float((read - result.audio.double().clamp(-1, 1)).abs().max()) <= 2 * step


def test_peaks_of_a_saved_result_are_scaled_down(result: Result, tmp_path: Path) -> None:
    loud = replace(result, samples=result.audio * 4 / result.audio.abs().max())
    read = soundfile.read(loud.save(tmp_path / "a.wav", bits="32f", peak="normalize"))[0]
    assert np.abs(read - (loud.audio / 4).numpy()).max() < 1e-6


@pytest.mark.parametrize(("name", "options", "word"), [
    ("a.txt", {}, "`path`"), ("a.wav", {"bits": 8}, "`bits`"), ("a.wav", {"peak": "louder"}, "`peak`"),
    ("a.flac", {"bits": "32f"}, "FLAC"),
])  # fmt: skip
def test_what_cannot_be_saved_is_a_value_error_and_writes_nothing(
    result: Result, tmp_path: Path, name: str, options: dict, word: str
) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        result.save(tmp_path / name, **options)
    assert isinstance(caught.value, ToolError) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rate", [44_100, 22_050])
@pytest.mark.parametrize("mono", [False, True])
def test_a_tensor_is_what_its_file_is(generator: Generator, tmp_path: Path, rate: int, mono: bool) -> None:
    samples = NOISE[:1] if mono else NOISE
    path = tmp_path / "noise.wav"
    soundfile.write(path, samples.T.numpy(), rate, subtype="FLOAT")
    request = replace(BASE, init_audio=(samples[0] if mono else samples, rate), init_noise_level=0.5, init_start=0.25)
    sounds = generator.generate_batch([request, replace(request, init_audio=str(path))])
    assert torch.equal(sounds[0].latents, sounds[1].latents)
    silent = generator.generate(replace(request, init_audio=(torch.zeros(2, 44_100), rate)))
    assert not torch.allclose(silent.latents, sounds[0].latents)


def test_requests_of_tensors_are_compared_and_copied() -> None:
    request = replace(BASE, init_audio=(NOISE, 44_100), init_noise_level=0.5)
    assert replace(request, seed=request.seed) == request and hash(request) == hash(replace(request))
    assert request != replace(request, init_audio=(NOISE.clone(), 44_100))
    assert request.mode == "audio-to-audio"


WRONG = {
    "steps": {"steps": 0}, "seconds": {"seconds": 1e9}, "seed": {"seed": -1}, "cfg": {"cfg": "high"},
    "negative_prompt": {"negative_prompt": "noise"}, "apg": {"apg": 0.5}, "schedule_order": {"schedule_order": "x"},
    "init_noise_level": {"init_noise_level": 0.5}, "inpaint": {"inpaint": ((0.0, 0.5),)},
    "paste_kept": {"paste_kept": True}, "duration_padding": {"duration_padding": -1.0},
    "init_audio": {"init_audio": (NOISE.int(), 44_100), "init_noise_level": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_a_value_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`") as caught:
        replace(BASE, **WRONG[name])
    assert isinstance(caught.value, ToolError) and "--" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("init_audio", [
    5, (NOISE,), (NOISE[None], 44_100), (NOISE[:, :0], 44_100), (torch.zeros(3, 100), 44_100), (NOISE, 0),
    (NOISE, 44_100.0), (NOISE.numpy(), 44_100),
])  # fmt: skip
def test_what_is_no_sound_is_refused(init_audio: object) -> None:
    with pytest.raises(ValueError, match="`init_audio`"):
        replace(BASE, init_audio=init_audio, init_noise_level=0.5)


def test_a_start_beyond_the_end_and_samples_that_are_not_finite_are_refused(generator: Generator) -> None:
    request = replace(BASE, init_audio=(NOISE, 44_100), init_noise_level=0.5)
    with pytest.raises(ToolError, match=r"ends at 1\.00 s"):
        generator.generate(replace(request, init_start=1.5))
    with pytest.raises(ToolError, match="not finite"):
        generator.generate(replace(request, init_audio=(torch.full((2, 100), float("nan")), 44_100)))


def test_progress_counts_every_stage_to_the_total(generator: Generator) -> None:
    stages_seen: list[tuple[str, int, int]] = []
    requests = [replace(BASE, seed=seed) for seed in range(3)]
    sounds = generator.generate_batch(requests, batch=2, on_stage=lambda *step: stages_seen.append(step))
    assert [(index, total) for _, index, total in stages_seen] == [
        (number, len(stages_seen)) for number in range(1, len(stages_seen) + 1)
    ]
    assert [stage for stage, _, _ in stages_seen].count("decoded") == 3 and stages_seen[0][0] == "text"
    for request, sound in zip(requests, sounds, strict=True):
        assert torch.allclose(sound.audio, generator.generate(request).audio, atol=1e-4)


def test_the_package_says_what_it_offers_and_that_it_is_typed() -> None:
    assert {"Generator", "Request", "Result", "ToolError", "GateError"} <= set(sa3_trt_core.__all__)
    assert issubclass(GateError, ToolError)
    assert importlib.resources.files(sa3_trt_core).joinpath("py.typed").is_file()


def test_the_command_line_adds_the_dashes() -> None:
    assert as_flags("`init_noise_level` and `inpaint`: `cfg=3`, `a b`") == (
        "--init-noise-level and --inpaint-range: --cfg 3, `a b`"
    )
    result = run(sa3_trt.main, ["--prompt", "x", "--apg", "0.5"])
    assert_user_error(result, "--apg does nothing")
    assert "--cfg 3" in result.err and "`" not in result.err
