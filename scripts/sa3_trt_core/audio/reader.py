"""Read sound files with libsndfile: any rate, mono or stereo, with or without a length in the header."""

from __future__ import annotations

import math
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core.audio.waveform import MAX_RATE, MIN_RATE, Waveform
from sa3_trt_core.errors import InvalidRequest, ToolError, ToolWarning
from sa3_trt_core.shapes import AUDIO_CHANNELS, SAMPLE_RATE

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

RESAMPLER_TAIL = 4096  # extra input samples at the end, so that the filter has no edge there
UNKNOWN_LENGTH = 1 << 62  # libsndfile returns about 2^63 for a header without length
BLOCK = 1 << 16  # frames decoded at a time from a file that is not seekable
SLACK_SECONDS = 0.1  # tolerance of the length in headers of lossy files
FAR_BEYOND = 8.0  # times full scale (18 dB), beyond any mix
INTEGER_SCALES = (1 << 15, 1 << 23, 1 << 31)  # full scale of unscaled integer samples
PIPED_LENGTH = 0x7FFF_0000  # bytes; sox leaves a little less than 2^31, ffmpeg 2^32 - 1
# Lengths in libsndfile's log: of the data in WAV, AIFF, 8SVX and AU, of the file in W64, in frames in RF64.
_DATA_SIZE = re.compile(
    r"^ *(?:data|SSND|BODY|Data Size|riff) *: (?P<stated>\d+) \(should be (?P<there>\d+)\)", re.MULTILINE
)
_FRAME_COUNT = re.compile(r"frame count (?P<there>\d+) does not match value from 'ds64' chunk of (?P<stated>\d+)")
_READABLE = "give a sound file that libsndfile reads: WAV, FLAC, AIFF, OGG, MP3 and others"


def check_input(path: Path, start: float = 0.0) -> None:
    """Raise ToolError for a sound that cannot be read, or that ends before `start` seconds."""
    with _opened(path) as sound:
        _read(sound, path, start, 1)


def read_audio(sound: Path | Waveform, start: float, samples: int) -> Tensor:
    """Return fp32 samples (2, `samples`) at 44.1 kHz of a sound file or a waveform, from `start` seconds on.

    Mono is copied to both channels; soxr converts other rates; a short file is padded with silence. A file that ends
    before the length in its header, or with samples far beyond full scale, issues a ToolWarning. Raises ToolError.
    """
    import numpy as np
    import torch

    if isinstance(sound, Waveform):
        rate = sound.sample_rate
        read = _of_waveform(sound, start, _wanted(samples, rate))
    else:
        with _opened(sound) as file:
            rate = file.samplerate
            read = _read(file, sound, start, _wanted(samples, rate))
            _require_finite(read, str(sound))
            scale = _integer_scale(file, sound, read)
        read = read / np.float32(scale)
    if rate != SAMPLE_RATE:
        import soxr

        read = soxr.resample(read, rate, SAMPLE_RATE, quality="VHQ")
    whole = np.zeros((AUDIO_CHANNELS, samples), np.float32)
    length = min(samples, len(read))
    whole[:, :length] = read[:length].T  # mono broadcasts to both channels
    return torch.from_numpy(whole)


def _wanted(samples: int, rate: int) -> int:
    """Return the number of samples to read at `rate` for `samples` at 44.1 kHz."""
    return math.ceil(samples * rate / SAMPLE_RATE) + (RESAMPLER_TAIL if rate != SAMPLE_RATE else 0)


def _of_waveform(sound: Waveform, start: float, wanted: int) -> np.ndarray:
    """Return up to `wanted` samples (N, channels) fp32 of a waveform. Raises InvalidRequest."""
    first, length = round(start * sound.sample_rate), sound.samples.shape[1]
    if first >= length:
        seconds = length / sound.sample_rate
        raise InvalidRequest(
            f"`init_audio` ends at {seconds:.2f} s, before `init_start={start:g}`", "choose an earlier start"
        )
    read: np.ndarray = sound.samples[:, first : first + wanted].float().cpu().numpy().T
    _require_finite(read, "`init_audio`")
    return read


def _require_finite(read: np.ndarray, name: str) -> None:
    import numpy as np

    if not np.isfinite(read).all():
        raise ToolError(f"{name} holds samples that are not finite", "repair it or give another one")


def _opened(path: Path) -> Any:
    """Open a file for reading; a file without length in its header is opened as not seekable."""
    import soundfile

    class Sequential(soundfile.SoundFile):
        """A file decoded sequentially: soundfile seeks after every read of a seekable file."""

        def seekable(self) -> bool:
            return False

    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
        raise ToolError(f"no such sound file: {path} {kind}", "give the path of a sound file")
    if path.stat().st_size == 0:
        raise ToolError(f"{path} is empty: it has 0 bytes", "give a sound file that is not empty")
    name = os.fsencode(path)  # bytes, because a file name need not be valid text
    try:
        sound = soundfile.SoundFile(name)
        if sound.frames >= UNKNOWN_LENGTH or not sound.seekable():
            sound.close()
            sound = Sequential(name)
    except (RuntimeError, TypeError) as error:  # TypeError: headerless formats need their parameters
        raise ToolError(f"cannot read {path}: {error}", _READABLE) from None
    right = 1 <= sound.channels <= AUDIO_CHANNELS and MIN_RATE <= sound.samplerate <= MAX_RATE
    if not right or sound.frames < 1:
        what = f"{sound.channels} channels, {sound.samplerate} Hz, {sound.frames} samples"
        sound.close()
        raise ToolError(f"{path} has {what}", "give a mono or stereo sound that is not empty")
    return sound


def _read(sound: Any, path: Path, start: float, wanted: int) -> np.ndarray:
    """Return up to `wanted` frames (N, channels) fp32 from `start` seconds on. Raises ToolError past the end."""
    import numpy as np

    first, rate = round(start * sound.samplerate), sound.samplerate
    stated = _stated_frames(sound)
    if stated is not None and first >= stated:
        raise ToolError(
            f"{path} ends at {stated / rate:.2f} s, before `init_start={start:g}`", "choose an earlier start"
        )
    try:
        if sound.seekable():
            sound.seek(min(first, sound.frames))
            read = sound.read(min(wanted, max(0, sound.frames - first)), dtype="float32", always_2d=True)
        else:
            parts, place = [], 0
            while place < first + wanted:
                block = sound.read(min(BLOCK, first + wanted - place), dtype="float32", always_2d=True)
                if not len(block):
                    break
                parts.append(block[max(0, first - place) :])
                place += len(block)
            read = np.concatenate(parts) if parts else np.zeros((0, sound.channels), np.float32)
    except (RuntimeError, OverflowError) as error:  # soundfile's errors are RuntimeErrors
        raise ToolError(f"cannot read {path}: {error}", _READABLE) from None
    if not len(read):
        says = "" if stated is None else f", although its header says that it lasts {stated / rate:.2f} s"
        raise ToolError(f"{path} holds no sample from {start:g} s on{says}", "choose an earlier start, or a whole file")
    missing = 0 if stated is None else min(wanted, stated - first) - len(read)
    if missing > SLACK_SECONDS * rate:
        warnings.warn(
            f"{path} is cut short: its header says {stated / rate:.2f} s, and {missing / rate:.2f} s of them are "
            "missing; silence takes their place", ToolWarning, stacklevel=2,
        )  # fmt: skip
    return read


def _stated_frames(sound: Any) -> int | None:
    """Return the number of frames in the header of a file; None without one.

    libsndfile reports the frames that fit the size on disk of an uncompressed file, and logs the number in the header.
    Programs that write to a pipe store a length near 2^31 or 2^32, which means unknown.
    """
    if sound.frames >= UNKNOWN_LENGTH:
        return None
    for pattern, among in ((_DATA_SIZE, False), (_FRAME_COUNT, True)):
        noted = pattern.search(sound.extra_info)
        if noted is None:
            continue
        there, stated = int(noted["there"]), int(noted["stated"])
        if 0 < there < stated < PIPED_LENGTH:
            return stated if among else round(sound.frames * stated / there)
    return int(sound.frames)


def _integer_scale(sound: Any, path: Path, read: np.ndarray) -> int:
    """Return the divisor of samples: 1, or the integer full scale of a float file with unscaled integers.

    It is derived from the peak of the whole file, so that a quiet part is scaled equally.
    """
    import numpy as np

    highest = float(np.abs(read).max())
    if sound.subtype not in ("FLOAT", "DOUBLE"):
        return 1
    if sound.seekable():
        sound.seek(0)
        for block in sound.blocks(BLOCK, dtype="float32", always_2d=True):
            highest = max(highest, float(np.nan_to_num(np.abs(block)).max(initial=0.0)))
    if highest <= FAR_BEYOND:
        return 1
    scale = next((scale for scale in INTEGER_SCALES if highest <= scale), None)
    if scale is None:
        raise ToolError(f"{path} reaches {highest:.3g} times full scale", "scale its samples to lie within 1")
    warnings.warn(
        f"{path} reaches {highest:.5g} times full scale: its samples are treated as integers and divided by {scale}",
        ToolWarning, stacklevel=2,
    )  # fmt: skip
    return scale
