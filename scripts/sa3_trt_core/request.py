"""Request of one sound, validated before anything is loaded, and its grouping into batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core import shapes
from sa3_trt_core.audio.waveform import Waveform, as_waveform
from sa3_trt_core.errors import InvalidRequest

if TYPE_CHECKING:
    from torch import Tensor

MAX_STEPS = 1000
SCHEDULE_ORDERS = ("warp-then-scale", "scale-then-warp")  # for sigma_max below 1: sampling/schedule.py
MAX_SEED = 2**63 - 1
MAX_CFG = 100.0
MIN_NOISE = 0.01  # the published runtime's limit too: the model is not defined at sigma 0
FULL_APG = 1.0
MAX_SHOWN_LENGTH = 40  # letters of a value in a message
MAX_PADDING = 60.0  # seconds; the model's own interface offers 30


@dataclass(frozen=True)
class Request:
    """One sound to generate.

    Args:
        prompt: what to generate; may be empty.
        seconds: length in seconds, 0.5 to about 380 (default 30).
        steps: sampler steps, 1 to 1000 (default 8); diffusers' num_inference_steps.
        seed: of all noise, 0 to 2**63 - 1 (default 0); the sound does not depend on the machine or the batch size.
        negative_prompt: text to guide away from (default None: unconditional); needs `cfg` other than 1.
        cfg: scale of classifier-free guidance, 0 to 100 (default 1: no guidance); others than 1 double the batch;
            diffusers' guidance_scale.
        apg: strength of adaptive projected guidance: share of the guidance parallel to the denoised latent that is
            removed, 0 to 1 (default None: 1, the model's own default); needs `cfg` other than 1.
        init_audio: sound to start from (default None): the path of a sound file, or (tensor, sample_rate) with floating
            samples (2, N), (1, N) or (N,) within full scale, and Hz.
        init_start: seconds into `init_audio` where reading starts (default 0).
        init_noise_level: initial sigma of audio to audio, 0.01 (close to `init_audio`) to 1 (default None: 1).
        inpaint: ranges (start, end) in seconds to regenerate; the rest of `init_audio` is kept (default none).
        paste_kept: restore the kept latent after every step, as the published runtime does, unlike the model's own code
            (default False).
        legacy_schedule: noise levels and length rule of the published TensorRT runtime, which has no padding (default
            False).
        duration_padding: seconds generated after the end and cut off, 0 to 60 (default 6).
        schedule_order: order of warp and scale for `init_noise_level` below 1: "warp-then-scale" (default) or
            "scale-then-warp".

    Raises:
        InvalidRequest: arguments that contradict each other or lie outside their range.
    """

    prompt: str
    seconds: float = 30.0
    steps: int = 8
    seed: int = 0
    negative_prompt: str | None = None
    cfg: float = 1.0
    apg: float | None = None
    init_audio: str | Path | Waveform | tuple[Tensor, int] | None = None
    init_start: float = 0.0
    init_noise_level: float | None = None
    inpaint: tuple[tuple[float, float], ...] = ()
    paste_kept: bool = False
    legacy_schedule: bool = False
    duration_padding: float = shapes.PADDING_SECONDS
    schedule_order: str = SCHEDULE_ORDERS[0]

    def __post_init__(self) -> None:
        object.__setattr__(self, "init_audio", _sound(self.init_audio))
        require_text(self.prompt, "the prompt")
        if self.negative_prompt is not None:
            require_text(self.negative_prompt, "the negative prompt")
        _require_range("seconds", self.seconds, shapes.MIN_SECONDS, shapes.MAX_SECONDS)
        _require_range("steps", self.steps, 1, MAX_STEPS)
        _require_range("seed", self.seed, 0, MAX_SEED)
        for name in ("steps", "seed"):
            if not isinstance(getattr(self, name), int):
                raise InvalidRequest(f"`{name}` is {shown(getattr(self, name))}", f"choose a whole number of {name}")
        _require_range("cfg", self.cfg, 0.0, MAX_CFG)
        _require_range("duration_padding", self.duration_padding, 0.0, MAX_PADDING)
        if self.schedule_order not in SCHEDULE_ORDERS:
            raise InvalidRequest(
                f"unknown `schedule_order` {self.schedule_order!r}", f"known: {', '.join(SCHEDULE_ORDERS)}"
            )
        if self.cfg == 1.0 and self.negative_prompt is not None:
            raise InvalidRequest("`negative_prompt` does nothing at cfg 1", "add `cfg`, for example `cfg=3`")
        if self.cfg == 1.0 and self.apg is not None:
            raise InvalidRequest("`apg` does nothing at cfg 1", "add `cfg`, for example `cfg=3`")
        if self.apg is not None:
            _require_range("apg", self.apg, 0.0, FULL_APG)
        self._check_init()
        for start, end in self.inpaint:
            self._check_inpaint_range(start, end)

    @property
    def sound(self) -> Path | Waveform | None:
        """The sound to start from."""
        assert self.init_audio is None or isinstance(self.init_audio, Path | Waveform)
        return self.init_audio

    @property
    def mode(self) -> str:
        """text, audio-to-audio or inpainting."""
        if self.init_audio is None:
            return "text"
        return "inpainting" if self.inpaint else "audio-to-audio"

    @property
    def frames(self) -> int:
        """Number of latent frames of noise."""
        if self.legacy_schedule:
            return shapes.legacy_latent_frames(self.seconds)
        return shapes.latent_frames(self.seconds, self.duration_padding)

    @property
    def valid_frames(self) -> int:
        """Number of latent frames of DiT and decoder: the first ones of `frames`."""
        if self.legacy_schedule:
            return self.frames
        return shapes.valid_frames(self.seconds, self.frames, self.duration_padding)

    @property
    def sigma_max(self) -> float:
        """The initial sigma."""
        return 1.0 if self.init_noise_level is None else self.init_noise_level

    @property
    def forward_rows(self) -> int:
        """Number of rows in the DiT's batch: 2 with guidance (conditional and unconditional), else 1."""
        return 1 if self.cfg == 1.0 else 2

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Key of requests that can share a batch: equal length, noise levels and guidance."""
        return (
            self.frames, self.valid_frames, self.steps, self.cfg, self.apg, self.init_noise_level, self.paste_kept,
            self.legacy_schedule, self.schedule_order,
        )  # fmt: skip

    def _check_init(self) -> None:
        level = self.init_noise_level
        if self.init_audio is None:
            unused = {"inpaint": self.inpaint, "init_start": self.init_start, "paste_kept": self.paste_kept}
            for name, value in {**unused, "init_noise_level": level is not None}.items():
                if value:
                    raise InvalidRequest(f"`{name}` needs a sound to start from", "add `init_audio`")
            return
        if level is None and not self.inpaint:
            raise InvalidRequest(
                "`init_audio` needs `init_noise_level` or `inpaint`",
                "add `init_noise_level` (0.01 to 1) or `inpaint` (ranges in seconds)",
            )
        if level is not None:
            _require_range("init_noise_level", level, MIN_NOISE, 1.0)
        if self.paste_kept and not self.inpaint:
            raise InvalidRequest("`paste_kept` is for in-painting", "add `inpaint` (ranges in seconds)")
        _require_range("init_start", self.init_start, 0.0, math.inf)

    def _check_inpaint_range(self, start: float, end: float) -> None:
        if not (0.0 <= start < end <= self.seconds):
            raise InvalidRequest(
                f"the in-painting range {start:g},{end:g} is not inside 0 to {self.seconds:g} seconds",
                "give a start before the end, and an end within `seconds`",
            )
        if shapes.frames_before(start) == shapes.frames_before(end):  # sampling/inpainting.py
            raise InvalidRequest(
                f"the in-painting range {start:g},{end:g} is too short: no latent frame begins in it",
                f"a frame is {shapes.SAMPLES_PER_FRAME / shapes.SAMPLE_RATE:.3f} s",
            )


def batches(requests: Sequence[Request], batch: int) -> Iterator[list[int]]:
    """Yield the indices of requests in batches of equal `batch_key` and at most `batch` rows, ordered by first index.

    Raises InvalidRequest if a batch does not fit the engines.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, request in enumerate(requests):
        rows = batch * request.forward_rows
        if batch < 1 or rows > shapes.MAX_BATCH:
            largest_batch = shapes.MAX_BATCH // request.forward_rows
            guided = " of guided requests, two rows each," if request.forward_rows > 1 else ""
            raise InvalidRequest(
                f"a batch of {batch}{guided} does not fit an engine", f"choose `batch=1` to {largest_batch}"
            )
        groups.setdefault(request.batch_key, []).append(index)
    groups_of_rows = [group[at : at + batch] for group in groups.values() for at in range(0, len(group), batch)]
    yield from sorted(groups_of_rows)


def ring_groups(requests: Sequence[Request], depth: int, max_batch: int | None = None) -> list[list[int]]:
    """Return the indices of requests grouped by valid latent frames, ordered by first index.

    `max_batch` is the largest batch of the DiT's engine (None: unknown). Raises InvalidRequest if `depth` requests do
    not fit.
    """
    guided = any(request.forward_rows > 1 for request in requests)
    rows, limit = depth * (2 if guided else 1), min(shapes.MAX_BATCH, max_batch or shapes.MAX_BATCH)
    if depth < 1 or rows > limit:
        pairs = " of guided requests, two rows each," if guided else ""
        max_depth = limit // 2 if guided else limit
        mend = (
            f"choose `depth=1` to {max_depth}" if max_depth else "omit `depth`, or use a DiT with a dynamic batch axis"
        )
        raise InvalidRequest(
            f"a ring of {depth}{pairs} does not fit the DiT, which takes {limit} rows per forward", mend
        )
    groups: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.valid_frames, []).append(index)
    return list(groups.values())


def count_stages(requests: Sequence[Request], batch: int) -> int:
    """Return the number of progress reports for these requests: the `total` of the callback."""
    return sum(
        1 + any(requests[row].init_audio is not None for row in rows) + requests[rows[0]].steps + len(rows)
        for rows in batches(requests, batch)
    )


def _require_range(name: str, value: float, low: float, high: float) -> None:
    """Raise InvalidRequest unless a number is in its range; integers of any size are compared exactly."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidRequest(f"`{name}` is {shown(value)}, not a number", f"choose a number from {low:g} to {high:g}")
    if value != value or not low <= value <= high:  # noqa: PLR0124  # NaN alone differs from itself
        raise InvalidRequest(f"`{name}` {shown(value)} is outside {low:g} to {high:g}", f"choose another {name}")


def _sound(value: object) -> Path | Waveform | None:
    """Return `init_audio` as a path or a waveform. Raises InvalidRequest."""
    if value is None or isinstance(value, Path | Waveform):
        return value
    if isinstance(value, str):
        return Path(value)
    if isinstance(value, tuple) and len(value) == 2:
        return as_waveform(*value)
    kind = type(value).__name__
    raise InvalidRequest(f"`init_audio` is a {kind}, not a sound", "give a path, or (tensor, sample_rate)")


def require_text(text: str, where: str) -> None:
    """Raise InvalidRequest for text that cannot be encoded in UTF-8: bytes of another encoding, or a lone surrogate.

    Tokenizer, metadata and terminal all have to encode it.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"{where} is {shown(text)}, not text", "give a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = ascii(text[max(0, error.start - 20) : error.end + 20])
        raise InvalidRequest(f"{where} holds a character that is not Unicode: {near}", "write it in UTF-8") from None


def shown(value: object) -> str:
    """Format a value for an error message, truncated if long."""
    try:
        text = f"{value:g}" if isinstance(value, float) else repr(value)
    except ValueError:  # str() refuses integers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN_LENGTH else f"{text[:MAX_SHOWN_LENGTH]}..."
