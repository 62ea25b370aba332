"""Cutting a long sound into overlapping windows, so that the autoencoder's memory is that of one window."""

from __future__ import annotations

from dataclasses import dataclass

from sa3_trt_core.errors import InvalidRequest

# Frames a side that are run and thrown away: the autoencoder looks 12 to either side (build/FACTS.md, Autoencoder).
CONTEXT = 16
MIN_CHUNK = 64  # under it more is thrown away than kept
MAX_SHOT_LENGTH = 512  # frames that are run in one piece where nothing is asked for
USUAL_CHUNK = 256  # what longer ones are cut into then: an eighth of the work is done twice


@dataclass(frozen=True)
class Chunk:
    """Latent frames start..stop of a window that is run, and first..last of the whole that are kept of it."""

    start: int
    stop: int
    first: int
    last: int


def chunks(frames: int, size: int) -> list[Chunk]:
    """Windows of `size` frames, of which each frame is kept once, `CONTEXT` frames away from where its window is cut.

    0, or a size that holds them all, gives one window. The last window is shifted back and not shortened: an engine has
    a least length, and its shape stays the same.
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
    """Return the window for a sound of so many frames: what was asked for, else one piece unless it is long."""
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
