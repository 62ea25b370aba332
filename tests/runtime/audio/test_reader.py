"""Sound files with wrong headers, in codecs that cannot seek, and with values outside full scale."""

from __future__ import annotations

import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sa3_trt_core.audio import reader
from sa3_trt_core.errors import ToolError, ToolWarning

RATE = 44_100
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)


def quietly(path: Path, start: float = 0.0, samples: int = RATE) -> np.ndarray:
    """Read audio (2, samples) and fail on any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ToolWarning)
        reader.check_input(path, start)
        return reader.read_audio(path, start, samples).numpy()


def without_length(path: Path) -> Path:
    """Write a FLAC as an encoder does that writes into a pipe: its header says 0 samples, which means unknown."""
    data = bytearray(path.read_bytes())
    data[8 + 13] &= 0xF0
    data[8 + 14 : 8 + 18] = bytes(4)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("start", [0.0, 0.25, 0.9])
def test_a_flac_of_unknown_length_is_read_as_it_is(tmp_path: Path, start: float) -> None:
    for channels in (1, 2):
        known, unknown = tmp_path / f"known{channels}.flac", tmp_path / f"unknown{channels}.flac"
        for path in (known, unknown):
            soundfile.write(path, np.stack([TONE, -TONE][:channels], axis=1), RATE)
        assert np.array_equal(quietly(without_length(unknown), start), quietly(known, start))


def test_a_flac_of_unknown_length_that_ends_before_the_start(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", TONE, RATE)
    with pytest.raises(ToolError, match="no sample from 2 s on"):
        reader.check_input(without_length(tmp_path / "a.flac"), 2.0)


CODECS = [
    ("a.wav", "GSM610", 8000), ("a.aiff", "GSM610", 8000), ("a.wav", "G721_32", 8000), ("a.w64", "GSM610", 8000),
    ("a.au", "G723_24", 8000), ("a.wav", "NMS_ADPCM_32", 8000), ("a.wav", "IMA_ADPCM", 22050),
    ("a.opus", "OPUS", 48000),
]  # fmt: skip


@pytest.mark.parametrize(("name", "subtype", "rate"), CODECS)
def test_codecs_that_cannot_seek_are_decoded_up_to_the_start(
    tmp_path: Path, name: str, subtype: str, rate: int
) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 200 * np.arange(2 * rate) / rate)
    shape = "OGG" if name.endswith("opus") else None
    soundfile.write(tmp_path / name, tone, rate, subtype=subtype, format=shape)
    whole, late = quietly(tmp_path / name, 0.0, 2 * RATE), quietly(tmp_path / name, 1.0, RATE // 2)
    assert np.corrcoef(late[0, 2000:20_000], whole[0, RATE + 2000 : RATE + 20_000])[0, 1] > 0.99
    with pytest.raises(ToolError, match="before `init_start=3`"):
        reader.check_input(tmp_path / name, 3.0)


@pytest.mark.parametrize("name", ["a.mp3", "a.ogg"])
def test_a_sound_that_is_cut_short_says_so(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    soundfile.write(path, np.random.default_rng(1).normal(0, 0.1, (4 * RATE, 2)), RATE)
    assert quietly(path, 0.0, 4 * RATE).shape == (2, 4 * RATE)
    if name == "a.ogg":  # its length is read off its last page, so that a cut one has no false header
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert quietly(path, 0.0, 4 * RATE)[:, RATE].any()
        return
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(ToolWarning, match=r"cut short: its header says 4\.\d\d s, and [12]\.\d\d s"):
        audio = reader.read_audio(path, 0.0, 4 * RATE).numpy()
    assert audio[:, RATE].any() and not audio[:, 3 * RATE :].any()
    with pytest.raises(ToolError, match="although its header says"):
        reader.check_input(path, 3.5)


@pytest.mark.parametrize(("name", "format", "subtype"), [
    ("a.wav", "WAV", "PCM_16"), ("a.wav", "WAV", "FLOAT"), ("a.wav", "WAVEX", "PCM_24"), ("a.wav", "RF64", "PCM_16"),
    ("a.wav", "WAV", "GSM610"), ("a.wav", "WAV", "IMA_ADPCM"), ("a.aiff", "AIFF", "PCM_16"), ("a.au", "AU", "PCM_16"),
    ("a.w64", "W64", "PCM_16"), ("a.svx", "SVX", "PCM_16"),
])  # fmt: skip
def test_an_uncompressed_file_that_ends_before_its_header_says_so(
    tmp_path: Path, name: str, format: str, subtype: str
) -> None:
    """libsndfile corrects such a length by itself, so that the rest of a broken download would be silence."""
    path = tmp_path / name
    soundfile.write(path, np.tile(TONE, 4), RATE, subtype=subtype, format=format)
    quietly(path, 0.0, 4 * RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 8 * 4])
    quietly(path, 0.0, RATE)  # what is there
    with pytest.warns(ToolWarning, match=r"cut short: its header says [34]\.\d\d s, and [12]\.\d\d s"):
        audio = reader.read_audio(path, 0.0, 4 * RATE).numpy()
    assert audio[:, RATE + 25].any() and not audio[:, 3 * RATE :].any()
    with pytest.raises(ToolError, match="although its header says"):
        reader.check_input(path, 3.5)
    with pytest.raises(ToolError, match="before `init_start=9`"):
        reader.check_input(path, 9.0)


@pytest.mark.parametrize("stated", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF - 36])
def test_a_wav_written_to_a_pipe_states_no_length(tmp_path: Path, stated: int) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, TONE, RATE)
    data = bytearray(path.read_bytes())
    data[40:44] = struct.pack("<I", stated)
    path.write_bytes(data)
    assert np.abs(quietly(path, 0.0, 2 * RATE)[0, :RATE] - TONE).max() < 1e-4


@pytest.mark.parametrize(("subtype", "scale"), [("FLOAT", 2.0**15), ("DOUBLE", 2.0**23), ("FLOAT", 2.0**31)])
def test_integers_in_a_float_file_are_scaled_with_a_warning(tmp_path: Path, subtype: str, scale: float) -> None:
    path = tmp_path / "a.wav"
    quiet_then_loud = np.concatenate([TONE * 1e-4, TONE])
    soundfile.write(path, quiet_then_loud * scale, RATE, subtype=subtype)
    with pytest.warns(ToolWarning, match="times full scale"):
        audio = reader.read_audio(path, 0.0, RATE).numpy()  # the quiet half: the loud one decides
    assert np.abs(audio[0] - TONE * 1e-4).max() < 1e-6


def test_what_is_a_little_over_full_scale_is_kept_and_what_is_no_sound_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "over.wav", TONE * 5, RATE, subtype="FLOAT")
    assert np.abs(quietly(tmp_path / "over.wav")).max() == pytest.approx(2.5, abs=1e-3)
    soundfile.write(tmp_path / "far.wav", TONE * 1e12, RATE, subtype="FLOAT")
    with pytest.raises(ToolError, match="times full scale"):
        reader.read_audio(tmp_path / "far.wav", 0.0, RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(10, np.inf), RATE, subtype="FLOAT")
    with pytest.raises(ToolError, match="not finite"):
        reader.read_audio(tmp_path / "nan.wav", 0.0, RATE)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("rate", [8000, RATE, 192_000])
def test_sounds_of_a_few_samples(tmp_path: Path, length: int, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(length, 0.5), rate)
    audio = quietly(tmp_path / "a.wav", 0.0, 4096)
    assert audio.shape == (2, 4096) and np.isfinite(audio).all() and not audio[:, 100:].any()


def test_what_is_no_sound_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("not a sound")
    os.mkfifo(tmp_path / "pipe.wav")
    soundfile.write(tmp_path / "eight.wav", np.zeros((100, 8)), RATE)
    soundfile.write(tmp_path / "one-hertz.wav", np.zeros(100), 1)
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 2)), RATE)
    expected = {
        "empty.wav": "0 bytes", "text.wav": "cannot read", "pipe.wav": "not a regular file", ".": "is a folder",
        "eight.wav": "8 channels", "one-hertz.wav": "1 Hz", "none.wav": "0 samples", "absent.wav": "does not exist",
    }  # fmt: skip
    for name, words in expected.items():
        with pytest.raises(ToolError, match=words):
            reader.check_input(tmp_path / name)
    with pytest.raises(ToolError, match="not a regular file"):
        reader.check_input(Path("/dev/null"))


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    soundfile.write(os.fsencode(path), TONE, RATE)
    assert np.abs(quietly(path)[0] - TONE).max() < 1e-4
