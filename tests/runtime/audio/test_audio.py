"""Audio input and output: formats, rates, channels, lengths, peaks, metadata."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings, strategies as st

from sa3_trt_core.audio import encode, io as audio_io, reader
from sa3_trt_core.errors import ToolError

RATE = 44_100


def sine(rate: int, seconds: float, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.aiff", "a.ogg", "a.mp3"])
def test_any_format_and_mono_to_both_channels(tmp_path: Path, name: str) -> None:
    soundfile.write(tmp_path / name, sine(RATE, 1.0), RATE)
    audio = reader.read_audio(tmp_path / name, 0.0, RATE).numpy()
    assert audio.shape == (2, RATE) and audio.dtype == np.float32
    assert np.array_equal(audio[0], audio[1])
    middle = slice(RATE // 4, RATE // 2)
    assert np.abs(audio[0] - sine(RATE, 1.0))[middle].max() < (1e-3 if name[2:] in ("wav", "flac", "aiff") else 0.05)


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000, 96_000])
def test_any_rate_keeps_pitch_length_and_channels(tmp_path: Path, rate: int) -> None:
    left, right = sine(rate, 2.0), sine(rate, 2.0, 1000.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), rate, subtype="FLOAT")
    audio = reader.read_audio(tmp_path / "a.wav", 0.5, RATE).numpy()  # the second from 0.5 to 1.5 s
    for channel, hertz in enumerate((440.0, 1000.0)):
        expected = sine(RATE, 2.0, hertz)[RATE // 2 : RATE // 2 + RATE]
        # The start of the part that is read is a start for the filter too; its end is not.
        assert np.abs(audio[channel] - expected)[2000:].max() < 1e-3


def test_what_is_missing_at_the_end_is_silence(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full((1000, 2), 0.25), RATE, subtype="FLOAT")
    audio = reader.read_audio(tmp_path / "a.wav", 0.0, 4096)
    assert torch.equal(audio, torch.cat([torch.full((2, 1000), 0.25), torch.zeros(2, 3096)], dim=1))


def test_samples_that_are_not_finite_are_two_lines(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.array([[0.0, np.nan]]), RATE, subtype="FLOAT")
    with pytest.raises(ToolError, match="not finite"):
        reader.read_audio(tmp_path / "a.wav", 0.0, 4096)


KINDS = [
    ("a.wav", "16", "PCM_16", 1.6e-5), ("a.wav", "24", "PCM_24", 7e-8), ("a.wav", "32f", "FLOAT", 0.0),
    ("a.flac", "16", "PCM_16", 1.6e-5), ("a.flac", "24", "PCM_24", 7e-8),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bits", "subtype", "step"), KINDS)
def test_every_kind_of_output(tmp_path: Path, name: str, bits: str, subtype: str, step: float) -> None:
    samples = torch.rand(5000, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    samples[:2] = torch.tensor([[1.0, -1.0], [0.0, 1.0]])
    audio_io.write_audio(tmp_path / name, samples, bits, {"prompt": "x"})
    info = soundfile.info(tmp_path / name)
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (RATE, 2, subtype, 5000)
    full = {"16": 32767 / 32768, "24": 8388607 / 8388608, "32f": 1.0}[bits]
    written, _ = soundfile.read(tmp_path / name, dtype="float64")
    assert np.abs(written - samples.double().numpy() * full).max() <= step
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
@pytest.mark.parametrize("prompt", ["Größe 音楽 🎵", "long " * 2000, "音" * 5000, 'a "quote"\nand a line', ""])
def test_metadata_comes_back(tmp_path: Path, name: str, prompt: str) -> None:
    about = {"prompt": prompt, "seed": 2**63 - 1, "engines": {"dit": "0123456789abcdef", "text": None}}
    audio_io.write_audio(tmp_path / name, torch.zeros(10, 2), "16", about)
    with soundfile.SoundFile(tmp_path / name) as sound:
        metadata = sound.copy_metadata()
        comment = json.loads(metadata["comment"])
        longest = {"l": 600, "音": 150}.get(prompt[:1], 0) if name == "a.wav" else 0
        if longest:  # libsndfile holds 2 kB of text in a WAV
            assert comment["prompt"] == metadata["title"] == prompt[:longest] + "…"
            comment["prompt"] = prompt
        else:
            assert metadata.get("title", "") == prompt
        assert comment == about
        assert metadata["software"].startswith("sa3-trt ")
        assert sound.frames == 10


def test_clip_is_the_models_own() -> None:
    samples = torch.tensor([[0.5, -3.0], [1.0001, 0.0]])
    assert audio_io.tame(samples, "clip").tolist() == [[0.5, -1.0], [1.0, 0.0]]


@pytest.mark.parametrize("peak", audio_io.PEAKS)
@pytest.mark.parametrize(("name", "bits"), [("a.wav", "16"), ("a.wav", "24"), ("a.wav", "32f"), ("a.flac", "16")])
def test_16_bit_samples_give_the_file_of_their_floating_point_form(
    tmp_path: Path, name: str, bits: str, peak: str
) -> None:
    pcm = torch.randint(-32767, 32768, (5000, 2), dtype=torch.int16)
    files = [tmp_path / "whole" / name, tmp_path / "float" / name]
    for file, samples in zip(files, (pcm, pcm / 32767), strict=True):
        file.parent.mkdir()
        audio_io.write_audio(file, audio_io.tame(samples, peak), bits, {"prompt": "x"})
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("kind", ["wav", "flac"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_an_answer_has_the_bytes_of_the_file(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    pcm = torch.randint(-32767, 32768, (3001, 2), dtype=torch.int16)
    samples = pcm if dtype == torch.int16 else pcm / 32767
    audio_io.write_audio(tmp_path / f"a.{kind}", samples, "16", {"prompt": "x"})
    assert encode.audio_bytes(kind, samples, {"prompt": "x"}) == (tmp_path / f"a.{kind}").read_bytes()


@given(st.floats(0.01, 8.0))
@settings(max_examples=20, deadline=None)
def test_normalize_scales_and_no_more(gain: float) -> None:
    samples = torch.from_numpy(np.stack([sine(RATE, 0.05), -0.3 * sine(RATE, 0.05)], axis=1)).float()
    normalized = audio_io.tame(samples * gain, "normalize")
    assert float(normalized.abs().max()) == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(normalized, samples / samples.abs().max(), atol=1e-5)


def test_silence_stays_silence() -> None:
    for peak in audio_io.PEAKS:
        assert torch.equal(audio_io.tame(torch.zeros(100, 2), peak), torch.zeros(100, 2))


def test_limit_turns_peaks_down_smoothly_and_leaves_the_rest() -> None:
    quiet = torch.from_numpy(np.stack([sine(RATE, 0.5)] * 2, axis=1)).float()
    loud = quiet.clone()
    loud[10_000:10_040] *= 5
    limited = audio_io.tame(loud, "limit")
    assert float(limited.abs().max()) <= 1.0
    reach = 2 * round(RATE * audio_io.LIMITER_MILLISECONDS / 1000)
    assert torch.equal(limited[: 10_000 - reach], quiet[: 10_000 - reach])
    assert torch.equal(limited[10_040 + reach :], quiet[10_040 + reach :])
    assert torch.equal(audio_io.tame(quiet, "limit"), quiet)
    # Both channels get one gain, which moves by little from sample to sample: cutting would bend the wave instead.
    gain = (limited / loud).nan_to_num(1.0)[loud[:, 0].abs() > 1e-3]
    assert torch.allclose(gain[:, 0], gain[:, 1], atol=1e-6)
    assert float((limited / loud)[9_000:11_000, 0].nan_to_num(1.0).diff().abs().max()) < 0.01
    assert float((audio_io.tame(loud, "clip") - limited).abs().max()) > 0.3
