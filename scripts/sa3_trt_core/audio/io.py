"""Sound files: any that libsndfile reads go in, at any rate; WAV and FLAC come out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core.artifacts.files import atomic_path
from sa3_trt_core.errors import ToolError
from sa3_trt_core.shapes import AUDIO_CHANNELS, SAMPLE_RATE
from sa3_trt_core.version import __version__

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FORMATS = {".wav": "WAV", ".flac": "FLAC"}
BITS = {"16": "PCM_16", "24": "PCM_24", "32f": "FLOAT"}
PEAKS = ("clip", "normalize", "limit")
LIMITER_MILLISECONDS = 5.0  # each side of a peak; shorter is heard as distortion, longer as pumping
RESAMPLER_TAIL = 4096  # input samples read beyond the end, so that the filter does not see the cut
HIGHEST_RATE = 768_000
MOST_WAV_TEXT = 1900  # bytes of title and comment together
_READABLE = "give a sound file that libsndfile reads: WAV, FLAC, AIFF, OGG, MP3 and others"


def check_output(path: Path, bits: str, flag: str = "--out") -> None:
    """Refuse a destination whose extension or resolution cannot be written. Raises ToolError."""
    if path.suffix.lower() not in FORMATS:
        raise ToolError(f"{flag} {path} does not end in .wav or .flac", f"{flag} writes WAV and FLAC files only")
    if path.suffix.lower() == ".flac" and bits == "32f":
        raise ToolError("a FLAC file holds no floating point samples", "choose --bits 16 or 24, or a .wav file")


def check_input(path: Path, start: float = 0.0) -> None:
    """Refuse a sound that cannot be read, or that ends before `start` seconds. Reads its header. Raises ToolError."""
    with _opened(path) as sound:
        _first_sample(sound, path, start)


def read_audio(path: Path, start: float, samples: int) -> Tensor:
    """fp32 samples (2, `samples`) at 44.1 kHz of a sound file, from `start` seconds on.

    Mono goes to both channels; another rate is converted by soxr; what is missing at the end is silence. Only the part
    that is needed is read. Raises ToolError.
    """
    import numpy as np
    import torch

    with _opened(path) as sound:
        first, rate = _first_sample(sound, path, start), sound.samplerate
        wanted = math.ceil(samples * rate / SAMPLE_RATE) + (RESAMPLER_TAIL if rate != SAMPLE_RATE else 0)
        try:
            sound.seek(first)
            read = sound.read(min(wanted, sound.frames - first), dtype="float32", always_2d=True)
        except RuntimeError as error:  # soundfile's own errors
            raise ToolError(f"cannot read {path}: {error}", _READABLE) from None
    if not np.isfinite(read).all():
        raise ToolError(f"{path} holds samples that are not finite", "repair the file or give another one")
    if rate != SAMPLE_RATE:
        import soxr

        read = soxr.resample(read, rate, SAMPLE_RATE, quality="VHQ")
    whole = np.zeros((AUDIO_CHANNELS, samples), np.float32)
    length = min(samples, len(read))
    whole[:, :length] = read[:length].T  # one channel spreads over both
    return torch.from_numpy(whole)


def tame(samples: Tensor, peak: str) -> Tensor:
    """Samples (N, 2) within full scale: `clip` cuts, `normalize` scales the highest to 1, `limit` turns peaks down."""
    import torch
    from torch.nn import functional

    if peak == "normalize":
        highest = samples.abs().max() if samples.numel() else torch.tensor(0.0)
        return (samples / highest if highest > 0 else samples).clamp(-1.0, 1.0)
    if peak == "limit" and samples.numel():
        reach = round(LIMITER_MILLISECONDS / 1000 * SAMPLE_RATE)
        width = 2 * reach + 1
        level = samples.abs().amax(dim=1).clamp(min=1.0).reshape(1, 1, -1)
        # The least gain of the neighbourhood, then its mean over as wide a one: never above what any peak allows.
        least = -functional.max_pool1d(-functional.pad(1.0 / level, (2 * reach, 2 * reach), value=1.0), width, stride=1)
        gain = functional.avg_pool1d(least.double(), width, stride=1).reshape(-1, 1)
        samples = (samples * gain).to(samples.dtype)
    return samples.clamp(-1.0, 1.0)


def write_audio(path: Path, samples: Tensor, bits: str, metadata: Mapping[str, Any], rate: int = SAMPLE_RATE) -> None:
    """A WAV or FLAC, by the extension, from fp32 samples (N, channels) within full scale, written atomically.

    `bits` is 16, 24 or 32f. The metadata goes into the comment as JSON, its "prompt" into the title. In a WAV long
    texts are cut and end in an ellipsis, because libsndfile drops every text when they are more than 2 kB together.
    """
    import numpy as np
    import soundfile

    values: np.ndarray = np.asarray(samples, np.float32)
    if bits == "16":
        values = np.round(values * np.float32(32767)).astype(np.int16)
    elif bits == "24":  # libsndfile takes the upper 24 of 32 bits
        values = np.round(values.astype(np.float64) * 8388607).astype(np.int32) << 8
    with (
        _written(path),
        atomic_path(path) as temporary,
        soundfile.SoundFile(
            str(temporary), "w", rate, values.shape[1], BITS[bits], format=FORMATS[path.suffix.lower()]
        ) as sound,
    ):
        title, sound.comment = _texts(metadata, MOST_WAV_TEXT if path.suffix.lower() == ".wav" else None)
        if title:  # an empty text is an error to libsndfile
            sound.title = title
        sound.software = f"sa3-trt {__version__}"
        sound.write(values)


def write_wav_16(path: Path, pcm: Tensor | np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """A 16-bit WAV from int16 samples (N, channels), written atomically."""
    import numpy as np
    import soundfile

    samples = np.asarray(pcm)
    if samples.dtype != np.int16 or samples.ndim != 2:
        raise ValueError(f"16-bit samples (N, channels) wanted, not {samples.dtype} {samples.shape}")
    with _written(path), atomic_path(path) as temporary:
        soundfile.write(str(temporary), samples, sample_rate, format="WAV", subtype="PCM_16")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """What libsndfile calls a "System error" while it writes is a disk that takes no more."""
    import soundfile

    try:
        yield
    except soundfile.LibsndfileError as error:
        raise ToolError(f"cannot write {path}: {error.error_string}", "see that its disk has room") from None


def _texts(metadata: Mapping[str, Any], most: int | None) -> tuple[str, str]:
    """Title and comment, every text cut as far as `most` bytes need."""
    for longest in (None, 600, 300, 150, 75):
        cut = {
            key: value[:longest] + "…" if longest and isinstance(value, str) and len(value) > longest else value
            for key, value in metadata.items()
        }
        title, comment = str(cut.get("prompt", "")), json.dumps(cut, ensure_ascii=False)
        if most is None or len((title + comment).encode()) <= most:
            break
    return title, comment


def _opened(path: Path) -> Any:
    """The file open for reading. Raises ToolError."""
    import soundfile

    if not path.is_file():
        raise ToolError(f"no such sound file: {path}", "give the path of a sound file")
    try:
        sound = soundfile.SoundFile(str(path))
    except (RuntimeError, TypeError) as error:  # TypeError: headerless formats, which need to be told what they are
        raise ToolError(f"cannot read {path}: {error}", _READABLE) from None
    if not 1 <= sound.channels <= AUDIO_CHANNELS or not 1 <= sound.samplerate <= HIGHEST_RATE or sound.frames < 1:
        found = f"{sound.channels} channels, {sound.samplerate} Hz, {sound.frames} samples"
        sound.close()
        raise ToolError(f"{path} has {found}", "give a mono or stereo sound that is not empty")
    return sound


def _first_sample(sound: Any, path: Path, start: float) -> int:
    first = round(start * sound.samplerate)
    if first >= sound.frames:
        length = sound.frames / sound.samplerate
        raise ToolError(f"{path} ends at {length:.2f} s, before --init-start {start:g}", "choose an earlier start")
    return first
