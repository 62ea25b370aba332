"""The lossy formats: sound of any length is written with its metadata."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sa3_trt_core.audio import io as audio_io
from sa3_trt_core.errors import ToolError

RATE = 44_100
ABOUT = {"prompt": "Größe, 音", "seed": 7}


@pytest.mark.parametrize(("name", "codec", "rate"), [
    ("a.mp3", "MPEG_LAYER_III", RATE), ("a.OGG", "VORBIS", RATE), ("a.opus", "OPUS", 48_000),
])  # fmt: skip
def test_a_lossy_file_holds_the_sound_and_says_how_it_was_made(
    tmp_path: Path, name: str, codec: str, rate: int
) -> None:
    seconds = 30  # Vorbis fails in libsndfile on so many samples at once
    time = np.arange(seconds * RATE) / RATE
    tones = np.stack([0.4 * np.sin(2 * np.pi * hertz * time) for hertz in (440, 660)], axis=1)
    audio_io.write_audio(tmp_path / name, torch.from_numpy(tones).float(), "16", ABOUT)
    info = soundfile.info(tmp_path / name)
    assert (info.subtype, info.samplerate, info.channels) == (codec, rate, 2)
    assert info.frames == pytest.approx(seconds * rate, abs=0.05 * rate)
    decoded, _ = soundfile.read(tmp_path / name)
    for channel, hertz in enumerate((440, 660)):
        spectrum = np.abs(np.fft.rfft(decoded[rate : 2 * rate, channel]))
        assert int(spectrum.argmax()) == hertz and decoded[:, channel].std() == pytest.approx(0.4 / 2**0.5, rel=0.05)
    assert audio_io.read_metadata(tmp_path / name) == ABOUT


def test_resolutions_are_for_formats_that_have_them() -> None:
    for name in ("a.mp3", "a.ogg", "a.opus"):
        audio_io.check_output(Path(name), "16")
        with pytest.raises(ToolError, match="does not support `bits`"):
            audio_io.check_output(Path(name), "24")
    with pytest.raises(ToolError, match=r"does not end in \.wav, \.flac, \.mp3, \.ogg, \.opus"):
        audio_io.check_output(Path("a.aac"), "16")
