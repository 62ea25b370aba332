"""Write sound files with libsndfile: WAV, FLAC, MP3, OGG and Opus."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sa3_trt_core.artifacts.files import atomic_path
from sa3_trt_core.audio.waveform import as_float
from sa3_trt_core.errors import InvalidRequest, ToolError
from sa3_trt_core.shapes import FULL_SCALE, SAMPLE_RATE
from sa3_trt_core.version import __version__

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FORMATS = {".wav": "WAV", ".flac": "FLAC", ".mp3": "MP3", ".ogg": "OGG", ".opus": "OGG"}
CODECS = {".mp3": "MPEG_LAYER_III", ".ogg": "VORBIS", ".opus": "OPUS"}  # codecs of the lossy formats
OPUS_RATE = 48_000  # Hz: Opus does not support 44,100
BLOCK = 1 << 16  # frames per write to libsndfile: its Vorbis coder fails on millions at once
BITS = {"16": "PCM_16", "24": "PCM_24", "32f": "FLOAT"}
DEFAULT_BITS = "16"
PEAKS = ("clip", "normalize", "limit")
LIMITER_MILLISECONDS = 5.0  # to each side of a peak; shorter is audible as distortion, longer as pumping
MAX_WAV_TEXT = 1900  # bytes of title and comment together
MAX_TITLE_LENGTH = 100  # letters
CUTS = (600, 300, 150, 75)  # length limits of each text, tried in order
ELLIPSIS = "…"  # end of a truncated text


def has_bits(suffix: str, bits: object) -> bool:
    """Return True if files of an extension support samples of these `bits`."""
    return suffix.lower() not in CODECS and not (suffix.lower() == ".flac" and bits == "32f")


def check_output(path: Path, bits: str, flag: str = "--out") -> None:
    """Raise InvalidRequest for a destination whose extension or resolution cannot be written."""
    suffix = path.suffix.lower()
    if bits not in BITS:
        raise InvalidRequest(f"unsupported `bits` {bits}", f"known: {', '.join(BITS)}")
    if suffix not in FORMATS:
        raise InvalidRequest(f"{flag} {path} does not end in {', '.join(FORMATS)}", "give a name that does")
    if suffix in CODECS and bits != DEFAULT_BITS:
        raise InvalidRequest(f"a {suffix} file does not support `bits`", "omit `bits`, or write .wav or .flac")
    if not has_bits(suffix, bits) and suffix not in CODECS:
        raise InvalidRequest("FLAC does not support floating-point samples", "choose `bits=16` or 24, or a .wav file")


def tame(samples: Tensor, peak: str) -> Tensor:
    """Samples (N, 2) within full scale: `clip` cuts, `normalize` scales the highest to 1, `limit` turns peaks down.

    int16 samples, which are within full scale, come back as they are unless they are scaled.
    """
    import torch
    from torch.nn import functional

    if not samples.is_floating_point():
        if peak != "normalize":
            return samples
        samples = as_float(samples)
    if peak == "normalize":
        highest = samples.abs().max() if samples.numel() else torch.tensor(0.0)
        return (samples / highest if highest > 0 else samples).clamp(-1.0, 1.0)
    if peak == "limit" and samples.numel():
        reach = round(LIMITER_MILLISECONDS / 1000 * SAMPLE_RATE)
        width = 2 * reach + 1
        level = samples.abs().amax(dim=1).clamp(min=1.0).reshape(1, 1, -1)
        # Minimum gain over a window, then the mean over an equal window: nowhere above the gain that a peak allows.
        least = -functional.max_pool1d(-functional.pad(1.0 / level, (2 * reach, 2 * reach), value=1.0), width, stride=1)
        gain = functional.avg_pool1d(least.double(), width, stride=1).reshape(-1, 1)
        samples = (samples * gain).to(samples.dtype)
    return samples.clamp(-1.0, 1.0)


def write_audio(path: Path, samples: Tensor, bits: str, metadata: Mapping[str, Any], rate: int = SAMPLE_RATE) -> None:
    """Write a sound file, its format by the extension, from samples (N, channels) within full scale, fp32 or int16.

    The write is atomic. `bits` is 16, 24 or 32f, ignored for lossy formats; Opus is written at 48 kHz. The metadata is
    stored as JSON in the comment, the beginning of its "prompt" in the title. In a WAV long texts are truncated with an
    ellipsis, because libsndfile drops all texts above 2 kB in total. Raises ToolError.
    """
    with _written(path), atomic_path(path) as temporary:
        write_sound(os.fsencode(temporary), path.suffix.lower(), samples, bits, metadata, rate)


def write_sound(
    target: bytes | BinaryIO, suffix: str, samples: Tensor, bits: str, metadata: Mapping[str, Any],
    rate: int = SAMPLE_RATE,
) -> None:  # fmt: skip
    """Write the file of `write_audio` in the format of a suffix to a path or a seekable file object."""
    import numpy as np
    import soundfile

    ready = suffix not in CODECS and bits == "16" and not samples.is_floating_point()
    values: np.ndarray = np.asarray(samples if ready else as_float(samples))
    if suffix == ".opus" and rate != OPUS_RATE:
        import soxr

        values, rate = np.clip(soxr.resample(values, rate, OPUS_RATE, quality="VHQ"), -1.0, 1.0), OPUS_RATE
    elif suffix not in CODECS and not ready:
        values = quantized(values, bits)
    subtype = CODECS.get(suffix, BITS[bits])
    with soundfile.SoundFile(target, "w", rate, values.shape[1], subtype, format=FORMATS[suffix]) as sound:
        title, sound.comment = _texts(metadata, MAX_WAV_TEXT if suffix == ".wav" else None, suffix == ".mp3")
        if title:  # libsndfile rejects an empty text
            sound.title = title
        sound.software = f"sa3-trt {__version__}"
        for first in range(0, len(values), BLOCK):
            sound.write(values[first : first + BLOCK])


def quantized(values: np.ndarray, bits: str) -> np.ndarray:
    """Round fp32 samples to integers of `bits`; return them unchanged for 32f."""
    import numpy as np

    if bits == "16":
        return np.round(values * np.float32(FULL_SCALE)).astype(np.int16)
    if bits == "24":  # libsndfile takes the upper 24 of 32 bits
        return np.round(values.astype(np.float64) * 8388607).astype(np.int32) << 8
    return values


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata that `write_audio` put into a sound file. Raises ToolError for a file without it."""
    import soundfile

    hint = "give a sound that sa3_trt has written"
    if not path.is_file():
        raise ToolError(f"no such sound file: {path}", hint)
    try:
        with soundfile.SoundFile(os.fsencode(path)) as sound:
            metadata = json.loads(sound.comment)
    except (RuntimeError, TypeError, UnicodeError) as error:
        raise ToolError(f"cannot read {path}: {error}", hint) from None
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
        raise ToolError(f"{path} has no metadata of sa3_trt", hint)
    return metadata


def write_wav_16(path: Path, pcm: Tensor | np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Write a 16-bit WAV of int16 samples (N, channels), atomically."""
    import numpy as np
    import soundfile

    samples = np.asarray(pcm)
    if samples.dtype != np.int16 or samples.ndim != 2:
        raise ValueError(f"16-bit samples (N, channels) wanted, not {samples.dtype} {samples.shape}")
    with _written(path), atomic_path(path) as temporary:
        soundfile.write(os.fsencode(temporary), samples, sample_rate, format="WAV", subtype="PCM_16")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Raise OSError for a full disk in place of libsndfile's "System error" while it writes."""
    import soundfile

    try:
        yield
    except soundfile.LibsndfileError as error:
        raise ToolError(f"cannot write {path}: {error.error_string}", "check the free space of its disk") from None


def was_cut(path: Path, text: object) -> bool:
    """Return True if `write_audio` truncated this text of a file's metadata."""
    ends = isinstance(text, str) and text.endswith(ELLIPSIS) and len(text) - len(ELLIPSIS) in CUTS
    return ends and path.suffix.lower() == ".wav"


def _texts(metadata: Mapping[str, Any], max_bytes: int | None, ascii_only: bool) -> tuple[str, str]:
    """Return title and comment, truncated to `max_bytes` bytes in total, the title first.

    `ascii_only` is for MP3, whose texts libsndfile writes as UTF-8 but marks as Latin-1: the comment uses JSON escapes,
    and the title loses its accents.
    """
    for longest, title_length in ((None, None), (None, MAX_TITLE_LENGTH), *((length, length) for length in CUTS)):
        cut = {key: _cut(value, longest) if isinstance(value, str) else value for key, value in metadata.items()}
        title, comment = _cut(str(metadata.get("prompt", "")), title_length), json.dumps(cut, ensure_ascii=ascii_only)
        if max_bytes is None or len((title + comment).encode()) <= max_bytes:
            break
    if ascii_only:
        title = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    return title.replace("\0", " "), comment  # libsndfile ends texts at a null character


def _cut(text: str, longest: int | None) -> str:
    return text if longest is None or len(text) <= longest else text[:longest] + ELLIPSIS
