"""Tile a long sound into overlapping windows, so that the autoencoder's memory is that of one window."""

from __future__ import annotations

from dataclasses import dataclass

from sa3_trt_core.errors import InvalidRequest

# Overlap in frames per side, discarded: the receptive field is 12 frames to either side (build/FACTS.md, Autoencoder).
CONTEXT = 16
MIN_CHUNK = 64  # smaller windows discard more than they keep
MAX_SHOT_LENGTH = 512  # frames that run in one piece by default
USUAL_CHUNK = 256  # default window of longer sounds: an eighth of the work is redundant


@dataclass(frozen=True)
class Chunk:
    """One window: latent frames start..stop are run, first..last are kept."""

    start: int
    stop: int
    first: int
    last: int


def chunks(frames: int, size: int) -> list[Chunk]:
    """Return windows of `size` frames; each frame is kept from one window, at least `CONTEXT` frames from its cuts.

    Size 0, or at least `frames`, gives one window. The last window is shifted back instead of shortened: an engine has
    a minimum length, and its shape stays the same.
    """
    if size == 0 or frames <= size:
        return [Chunk(0, frames, 0, frames)]
    tiles, first = [], 0
    while first < frames:
        start = max(0, min(first - CONTEXT, frames - size))
        stop = start + size
        last = frames if stop == frames else stop - CONTEXT
        tiles.append(Chunk(start, stop, first, last))
        first = last
    return tiles


def chunk_frames(frames: int, asked: int | None) -> int:
    """Return the window size for a sound: the requested one; by default one piece unless the sound is long."""
    if asked is not None:
        return asked
    return 0 if frames <= MAX_SHOT_LENGTH else USUAL_CHUNK


def require_chunk(size: int) -> None:
    """Raise InvalidRequest unless a window is 0 (one piece) or at least MIN_CHUNK frames."""
    if size != 0 and size < MIN_CHUNK:
        raise InvalidRequest(
            f"chunks of {size} latent frames are too short: {2 * CONTEXT} of each are run twice",
            f"choose `chunk_frames={MIN_CHUNK}` or more, or 0 for one piece",
        )
