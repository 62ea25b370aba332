"""What is asked for: one sound, its mode and its settings, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sa3_trt_core import shapes
from sa3_trt_core.errors import ToolError

MOST_STEPS = 1000
SCHEDULE_ORDERS = ("warp-then-scale", "scale-then-warp")  # of noise levels below 1: sampling/schedule.py
MOST_SEED = 2**63 - 1
MOST_CFG = 100.0
LEAST_NOISE = 0.01  # the published runtime's limit too: the model is not defined at sigma 0
FULL_APG = 1.0
LONGEST_SHOWN = 40  # letters of a value in a message
MOST_PADDING = 60.0  # seconds; the model's own interface offers 30


@dataclass(frozen=True)
class Request:
    """One sound. Raises ToolError for settings that contradict each other or lie outside their range.

    `prompt` may be empty; `seconds` is the length; `steps` of the sampler; `seed` of all noise. `cfg` 1 is no guidance
    and one row a forward; anything else is two. `negative_prompt` takes the place of the null row. `apg` 0 to 1 is how
    much of the guidance along the sound itself is taken away (None: all of it, the model's own default).
    `init_audio` is any sound file, read from `init_start` seconds on: with `init_noise_level` (0.01 to 1) it is varied
    (audio to audio), with `inpaint`, ranges (start, end) in seconds, it is kept outside of them; both may be given.
    `paste_kept` puts the kept latent back after every step, as the published runtime does and the model's own code
    does not. `duration_padding` is the seconds that are generated after the end and thrown away. `schedule_order` is
    the order of warp and scale where `init_noise_level` is below 1 (sampling schedule). `legacy_schedule` takes the
    published TensorRT runtime's noise levels and length rule, which has no padding.
    """

    prompt: str
    seconds: float = 30.0
    steps: int = 8
    seed: int = 0
    negative_prompt: str | None = None
    cfg: float = 1.0
    apg: float | None = None
    init_audio: Path | None = None
    init_start: float = 0.0
    init_noise_level: float | None = None
    inpaint: tuple[tuple[float, float], ...] = ()
    paste_kept: bool = False
    legacy_schedule: bool = False
    duration_padding: float = shapes.PADDING_SECONDS
    schedule_order: str = SCHEDULE_ORDERS[0]

    def __post_init__(self) -> None:
        require_text(self.prompt, "the prompt")
        if self.negative_prompt is not None:
            require_text(self.negative_prompt, "the negative prompt")
        _require_range("seconds", self.seconds, shapes.MIN_SECONDS, shapes.MAX_SECONDS)
        _require_range("steps", self.steps, 1, MOST_STEPS)
        _require_range("seed", self.seed, 0, MOST_SEED)
        _require_range("cfg", self.cfg, 0.0, MOST_CFG)
        _require_range("duration_padding", self.duration_padding, 0.0, MOST_PADDING)
        if self.schedule_order not in SCHEDULE_ORDERS:
            raise ToolError(f"unknown schedule order {self.schedule_order!r}", f"known: {', '.join(SCHEDULE_ORDERS)}")
        if self.cfg == 1.0 and self.negative_prompt is not None:
            raise ToolError("a negative prompt does nothing at cfg 1", "add --cfg, for example --cfg 3")
        if self.cfg == 1.0 and self.apg is not None:
            raise ToolError("apg does nothing at cfg 1", "add --cfg, for example --cfg 3")
        if self.apg is not None:
            _require_range("apg", self.apg, 0.0, FULL_APG)
        self._check_init()
        for start, end in self.inpaint:
            self._check_inpaint_range(start, end)

    @property
    def mode(self) -> str:
        """text, audio-to-audio or inpainting."""
        if self.init_audio is None:
            return "text"
        return "inpainting" if self.inpaint else "audio-to-audio"

    @property
    def frames(self) -> int:
        """Latent frames whose noise is drawn."""
        if self.legacy_schedule:
            return shapes.legacy_latent_frames(self.seconds)
        return shapes.latent_frames(self.seconds, self.duration_padding)

    @property
    def valid_frames(self) -> int:
        """Latent frames that the DiT runs on and the decoder decodes: the first of `frames`."""
        if self.legacy_schedule:
            return self.frames
        return shapes.valid_frames(self.seconds, self.frames, self.duration_padding)

    @property
    def sigma_max(self) -> float:
        """The first noise level."""
        return 1.0 if self.init_noise_level is None else self.init_noise_level

    @property
    def forward_rows(self) -> int:
        """Rows of the DiT's batch that this request takes: itself, and its null row if it is guided."""
        return 1 if self.cfg == 1.0 else 2

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Requests with the same key can be rows of one batch: equal length, noise levels and guidance."""
        return (
            self.frames, self.valid_frames, self.steps, self.cfg, self.apg, self.init_noise_level, self.paste_kept,
            self.legacy_schedule, self.schedule_order,
        )  # fmt: skip

    def _check_init(self) -> None:
        level = self.init_noise_level
        if self.init_audio is None:
            given = {"an in-painting range": self.inpaint, "init_start": self.init_start, "paste_kept": self.paste_kept}
            for name, value in {**given, "init_noise_level": level is not None}.items():
                if value:
                    raise ToolError(f"{name} needs a sound to start from", "add --init-audio FILE")
            return
        if level is None and not self.inpaint:
            raise ToolError(
                "an init audio alone says nothing of what to do with it",
                "add --init-noise-level (0.01 to 1: the more, the freer) or --inpaint-range A,B",
            )
        if level is not None:
            _require_range("init_noise_level", level, LEAST_NOISE, 1.0)
        if self.paste_kept and not self.inpaint:
            raise ToolError("paste_kept is for in-painting", "add --inpaint-range A,B")
        _require_range("init_start", self.init_start, 0.0, math.inf)

    def _check_inpaint_range(self, start: float, end: float) -> None:
        if not (0.0 <= start < end <= self.seconds):
            raise ToolError(
                f"the in-painting range {start:g},{end:g} is not inside 0 to {self.seconds:g} seconds",
                "give A,B with 0 <= A < B <= --seconds",
            )
        if shapes.frames_before(start) == shapes.frames_before(end):  # sampling/inpainting.py
            raise ToolError(
                f"the in-painting range {start:g},{end:g} holds the beginning of no latent frame",
                f"a frame is {shapes.SAMPLES_PER_FRAME / shapes.SAMPLE_RATE:.3f} s",
            )


def batches(requests: Sequence[Request], batch: int) -> Iterator[list[int]]:
    """The requests' indices in batches of at most `batch`, in order of each batch's first; equal keys only.

    Raises ToolError when a batch would not fit the engines.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, request in enumerate(requests):
        rows = batch * request.forward_rows
        if batch < 1 or rows > shapes.MAX_BATCH:
            most = shapes.MAX_BATCH // request.forward_rows
            guided = " of guided requests, two rows each," if request.forward_rows > 1 else ""
            raise ToolError(f"a batch of {batch}{guided} does not fit an engine", f"choose --batch 1 to {most}")
        groups.setdefault(request.batch_key, []).append(index)
    found = [group[at : at + batch] for group in groups.values() for at in range(0, len(group), batch)]
    yield from sorted(found)


def ring_groups(requests: Sequence[Request], depth: int, max_batch: int | None = None) -> list[list[int]]:
    """The requests' indices by valid latent frames, in order of each length's first: one forward has one length.

    `max_batch` is what the DiT's engine takes in one forward, where it is known. Raises ToolError when `depth` of them
    would not fit.
    """
    guided = any(request.forward_rows > 1 for request in requests)
    rows, limit = depth * (2 if guided else 1), min(shapes.MAX_BATCH, max_batch or shapes.MAX_BATCH)
    if depth < 1 or rows > limit:
        pairs = " of guided requests, two rows each," if guided else ""
        most = limit // 2 if guided else limit
        mend = f"choose --depth 1 to {most}" if most else "leave --depth away, or give a DiT with a free batch axis"
        raise ToolError(f"a ring of {depth}{pairs} does not fit the DiT, which takes {limit} rows a forward", mend)
    groups: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.valid_frames, []).append(index)
    return list(groups.values())


def count_stages(requests: Sequence[Request], batch: int) -> int:
    """How often the generator tells of its progress for these requests."""
    return sum(
        1 + any(requests[row].init_audio is not None for row in rows) + requests[rows[0]].steps + len(rows)
        for rows in batches(requests, batch)
    )


def _require_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ToolError unless a number lies within its range; a whole number of any size is compared as it is."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ToolError(f"{name} is {shown(value)}, not a number", f"choose a number from {low:g} to {high:g}")
    if value != value or not low <= value <= high:  # noqa: PLR0124  # NaN alone differs from itself
        raise ToolError(f"{name} {shown(value)} is outside {low:g} to {high:g}", f"choose another {name}")


def require_text(text: str, where: str) -> None:
    """Raise ToolError for text that is no Unicode: bytes of another encoding, or half of a surrogate pair.

    A tokenizer, a sound's metadata and a terminal all need to encode it.
    """
    if not isinstance(text, str):
        raise ToolError(f"{where} is {shown(text)}, not text", "give a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = ascii(text[max(0, error.start - 20) : error.end + 20])
        raise ToolError(f"{where} holds a character that is no Unicode: {near}", "write it in UTF-8") from None


def shown(value: object) -> str:
    """Return a value as an error message shows it, cut where it is long."""
    try:
        text = f"{value:g}" if isinstance(value, float) else repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
