"""Encode sounds to bytes in memory, for responses of the server."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sa3_trt_core.audio import io as audio_io
from sa3_trt_core.shapes import AUDIO_CHANNELS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MEDIA_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "ogg": "audio/ogg"}


def audio_bytes(kind: str, samples: Tensor, metadata: Mapping[str, Any]) -> bytes:
    """Return the bytes that `write_audio` writes, 16 bits per sample, from samples (N, 2), fp32 or int16.

    `kind` is one of MEDIA_TYPES.
    """
    if kind == "wav" and not samples.is_floating_point():  # one copy: libsndfile's take 7 ms for 30 s
        return b"".join((wav_header(len(samples), metadata), _pcm(samples).data))
    out = io.BytesIO()
    audio_io.write_sound(out, f".{kind}", samples, audio_io.DEFAULT_BITS, metadata)
    return out.getvalue()


def pcm_bytes(samples: Tensor) -> bytes:
    """Return 16-bit little-endian interleaved samples from samples (N, 2), int16 or fp32 within full scale."""
    return _pcm(samples).tobytes()


def wav_header(samples: int, metadata: Mapping[str, Any]) -> bytes:
    """Return the WAV header of `audio_bytes` for a number of samples that follow later."""
    import torch

    head = bytearray(audio_bytes("wav", torch.zeros(0, AUDIO_CHANNELS), metadata))
    at = head.rindex(b"data")
    size = samples * AUDIO_CHANNELS * 2
    del head[at + 8 :]
    struct.pack_into("<I", head, at + 4, size)
    struct.pack_into("<I", head, 4, len(head) - 8 + size)
    return bytes(head)


def _pcm(samples: Tensor) -> np.ndarray:
    """Return samples as contiguous 16-bit little-endian integers, without a copy where they are that already."""
    import numpy as np

    values: np.ndarray = np.asarray(samples)
    whole = audio_io.quantized(values, "16") if samples.is_floating_point() else values
    return np.ascontiguousarray(whole.astype("<i2", copy=False))
