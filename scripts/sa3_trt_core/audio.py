"""Writing sound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.files import atomic_path
from sa3_trt_core.shapes import SAMPLE_RATE

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def write_wav_16(path: Path, pcm: Tensor | np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """A 16-bit WAV from int16 samples (N, channels), written atomically."""
    import numpy as np
    import soundfile

    samples = np.asarray(pcm)
    if samples.dtype != np.int16 or samples.ndim != 2:
        raise ValueError(f"16-bit samples (N, channels) wanted, not {samples.dtype} {samples.shape}")
    with atomic_path(path) as temporary:
        soundfile.write(str(temporary), samples, sample_rate, format="WAV", subtype="PCM_16")
