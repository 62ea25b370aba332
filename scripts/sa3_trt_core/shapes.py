"""Contracts of the graphs (inputs, outputs, optimisation profiles), and conversion of seconds to latent frames."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SAMPLE_RATE = 44_100  # Hz
FULL_SCALE = 32767  # of 16-bit samples
SAMPLES_PER_FRAME = 4096
LATENT_CHANNELS = 256
TEXT_TOKENS = 256
TEXT_CHANNELS = 768
LOCAL_CHANNELS = 257  # the keep mask, then the masked latent
AUDIO_CHANNELS = 2
PADDING_SECONDS = 6.0
USUAL_FRAMES = 1292  # latent frames that engines are tuned for: the middle of their optimisation profile
MIN_CODEC_FRAMES = 32
MAX_FRAMES = 4096
MAX_BATCH = 8
MIN_SECONDS = 0.01
MAX_SECONDS = MAX_FRAMES * SAMPLES_PER_FRAME / SAMPLE_RATE  # 380.4: the checkpoint's own sample_size

Which = Literal["min", "opt", "max"]
_POSITION = {"min": 0, "opt": 1, "max": 2}
_DIM = re.compile(r"([A-Z]+)(?:([*/])(\d+))?")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: a dimension is a number, a symbol, or a symbol times or over a number ("L*4096")."""

    name: str
    dtype: str
    dims: tuple[str | int, ...]


@dataclass(frozen=True)
class GraphContract:
    """One kind of graph: its tensors in order, and the optimisation profile (min, opt, max) of every symbol."""

    kind: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    def shapes(self, spec: TensorSpec, which: Which) -> tuple[int, ...]:
        """Return the concrete shape of a tensor at one end, or the middle, of the profile."""
        return tuple(self._extent(dim, which) for dim in spec.dims)

    def _extent(self, dim: str | int, which: Which) -> int:
        if isinstance(dim, int):
            return dim
        match = _DIM.fullmatch(dim)
        if match is None or match[1] not in self.profile:
            raise ValueError(f"{self.kind}: no such dimension {dim!r}")
        value = self.profile[match[1]][_POSITION[which]]
        if match[2] is None:
            return value
        return value * int(match[3]) if match[2] == "*" else value // int(match[3])


_CODEC_FRAMES = (MIN_CODEC_FRAMES, USUAL_FRAMES, MAX_FRAMES)
_CODEC_SAMPLES = (
    MIN_CODEC_FRAMES * SAMPLES_PER_FRAME,
    USUAL_FRAMES * SAMPLES_PER_FRAME,
    MAX_FRAMES * SAMPLES_PER_FRAME,
)

CONTRACTS: Mapping[str, GraphContract] = {
    contract.kind: contract
    for contract in (
        GraphContract(
            kind="t5gemma",
            inputs=(
                TensorSpec("input_ids", "int64", (1, TEXT_TOKENS)),
                TensorSpec("attention_mask", "int64", (1, TEXT_TOKENS)),
            ),
            outputs=(TensorSpec("hidden_states", "float32", (1, TEXT_TOKENS, TEXT_CHANNELS)),),
        ),
        GraphContract(
            kind="dit",
            inputs=(
                TensorSpec("x", "float32", ("B", LATENT_CHANNELS, "L")),
                TensorSpec("t", "float32", ("B",)),
                TensorSpec("t5_hidden", "float32", ("B", TEXT_TOKENS, TEXT_CHANNELS)),
                TensorSpec("t5_mask", "float32", ("B", TEXT_TOKENS)),
                TensorSpec("seconds_total", "float32", ("B",)),
                TensorSpec("local_add_cond", "float32", ("B", LOCAL_CHANNELS, "L")),
            ),
            outputs=(TensorSpec("velocity", "float32", ("B", LATENT_CHANNELS, "L")),),
            profile={"B": (1, 1, MAX_BATCH), "L": (1, USUAL_FRAMES, MAX_FRAMES)},
        ),
        GraphContract(
            kind="same-decoder",
            inputs=(TensorSpec("latent", "float32", (1, LATENT_CHANNELS, "L")),),
            outputs=(TensorSpec("pcm", "int32", (1, f"L*{SAMPLES_PER_FRAME}", AUDIO_CHANNELS)),),
            profile={"L": _CODEC_FRAMES},
        ),
        GraphContract(
            kind="same-encoder",
            inputs=(TensorSpec("audio", "float32", (1, AUDIO_CHANNELS, "N")),),
            outputs=(TensorSpec("latent", "float32", (1, LATENT_CHANNELS, f"N/{SAMPLES_PER_FRAME}")),),
            profile={"N": _CODEC_SAMPLES},
        ),
    )
}


def output_samples(seconds: float) -> int:
    """Return the samples per channel of the finished audio: int(seconds * 44100)."""
    return int(seconds * SAMPLE_RATE)


def latent_frames(seconds: float, padding: float = PADDING_SECONDS, cap: int = MAX_FRAMES) -> int:
    """Return the latent frames of noise for a length, with `padding` seconds, rounded up to even, and capped.

    The cap is the checkpoint's sample_size; lengths within 6 s of it have less padding. Source: the model's own
    generation.
    """
    frames = frames_before(seconds + padding)
    return min(frames + frames % 2, cap)


def legacy_latent_frames(seconds: float) -> int:
    """Return the latent frames that the published TensorRT runtime generates: no padding, not made even.

    Source: optimized/tensorRT/scripts/sa3_trt_core.py of github.com/Stability-AI/stable-audio-3, commit 0450443.
    """
    return max(1, math.ceil(seconds * SAMPLE_RATE / SAMPLES_PER_FRAME))


def valid_frames(seconds: float, frames: int, padding: float = PADDING_SECONDS) -> int:
    """Return the valid ones of `frames` latent frames: the length itself and whole frames of `padding`.

    The model's own attention masks the frames after them. Source: the model's own generation.
    """
    return min(frames_before(seconds) + int(padding * SAMPLE_RATE / SAMPLES_PER_FRAME), frames)


def frames_before(seconds: float) -> int:
    """Return the first latent frame whose first sample lies at or after int(seconds * 44100)."""
    return -(-output_samples(seconds) // SAMPLES_PER_FRAME)
