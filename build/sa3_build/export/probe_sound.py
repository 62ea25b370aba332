"""Synthesise a short musical signal for comparing two autoencoders, which are trained on music, not on noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sa3_trt_core.shapes import SAMPLE_RATE

NOTES_PER_SECOND = 4
HARMONICS = 6
PEAK = 0.5


def probe_sound(seed: int, seconds: int) -> NDArray[np.float32]:
    """Return decaying harmonic notes with a noise burst at each onset, (2, seconds * 44100), peak 0.5.

    Equal seeds give equal samples.
    """
    random = np.random.default_rng(seed)
    length = SAMPLE_RATE // NOTES_PER_SECOND
    time = np.arange(length) / SAMPLE_RATE
    notes = []
    for _ in range(NOTES_PER_SECOND * seconds):
        pitch = 110.0 * 2 ** (random.integers(0, 36) / 12)
        tone = sum(np.sin(2 * np.pi * pitch * n * time) / n for n in range(1, HARMONICS + 1))
        burst = random.standard_normal((2, length)) * np.exp(-60 * time)
        pan = random.uniform(0.2, 0.8)
        notes.append(np.stack([pan * tone, (1 - pan) * tone]) * np.exp(-6 * time) + 0.3 * burst)
    sound = np.concatenate(notes, 1)
    return (PEAK * sound / np.abs(sound).max()).astype(np.float32)
