"""Schema of a request for a sound (JSON or form fields), and its conversion to a Request."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sa3_serve.settings import ServiceSettings
from sa3_trt_core import shapes
from sa3_trt_core.errors import ToolError
from sa3_trt_core.request import FULL_APG, MAX_CFG, MAX_SEED, MAX_STEPS, MIN_NOISE, Request

MAX_PROMPT_LENGTH = 4096  # characters; the text encoder reads 256 tokens
MAX_RANGES = 32
MAX_START = 1e6  # seconds
HINT = "the fields and their ranges are on the page /docs"

_Finite = {"allow_inf_nan": False}
Range = tuple[Annotated[float, Field(ge=0, **_Finite)], Annotated[float, Field(gt=0, **_Finite)]]


class SoundRequest(BaseModel):
    """One sound. In a form, `init_audio` is a sound file, and `inpaint` is A,B in seconds and may repeat."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(max_length=MAX_PROMPT_LENGTH, description="Text to generate from; may be empty")
    seconds: float = Field(30.0, ge=shapes.MIN_SECONDS, le=shapes.MAX_SECONDS, description="Length")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Seed of all noise; random by default")
    steps: int = Field(8, ge=1, le=MAX_STEPS, description="Steps of the sampler")
    cfg: float = Field(1.0, ge=0, le=MAX_CFG, description="Classifier-free guidance scale; 1 disables it")
    apg: float | None = Field(
        None, ge=0, le=FULL_APG, description="Strength of the guidance's projection: 0 is plain guidance"
    )
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT_LENGTH, description="Text to guide away from")
    format: Literal["wav", "flac", "mp3", "ogg"] = Field("wav", description="Format of the response")
    init_start: float = Field(0.0, ge=0, le=MAX_START, description="Seconds into init_audio where reading starts")
    init_noise_level: float | None = Field(
        None, ge=MIN_NOISE, le=1, description="Initial sigma of audio to audio: 1 ignores init_audio"
    )
    inpaint: list[Range] = Field([], max_length=MAX_RANGES, description="Ranges of init_audio in seconds to regenerate")

    loras_digest: str | None = Field(
        None, max_length=64, description="Digest of the required adapters, as in /v1/models"
    )

    def request(self, settings: ServiceSettings, init_audio: Path | None) -> Request:
        """Return the Request. Raises ToolError that names the fields."""
        for name, value, limit in (
            ("seconds", self.seconds, settings.max_seconds), ("steps", self.steps, settings.max_steps)
        ):  # fmt: skip
            if value > limit:
                raise ToolError(f"{name} {value:g} is more than this server's {limit:g}", f"choose another {name}")
        return Request(
            self.prompt, self.seconds, self.steps, secrets.randbelow(2**32) if self.seed is None else self.seed,
            self.negative_prompt, self.cfg, self.apg, init_audio, self.init_start, self.init_noise_level,
            tuple(self.inpaint),
        )  # fmt: skip


def parse_json(body: bytes) -> SoundRequest:
    """Parse a request in JSON, in which numbers must not be strings. Raises ToolError."""
    try:
        return SoundRequest.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise _refusal(error) from None


def parse_form(fields: Mapping[str, list[str]]) -> SoundRequest:
    """Parse a request from the fields of a form, each a string. Raises ToolError."""
    values_by_name: dict[str, Any] = {name: values[0] for name, values in fields.items() if name != "inpaint"}
    twice = [name for name, values in fields.items() if name != "inpaint" and len(values) > 1]
    if twice:
        raise ToolError(f"{_shown(twice[0])} is repeated", HINT)
    values_by_name["inpaint"] = [part.split(",") for part in fields.get("inpaint", [])]
    try:
        return SoundRequest.model_validate(values_by_name)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ToolError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    location = ".".join(str(part) for part in first["loc"])
    return ToolError(f"{_shown(location) or 'the request'}: {first['msg'][:200]}", HINT)


def _shown(name: str) -> str:
    """Return a field name of a client, escaped and shortened for one line."""
    return ascii(name)[1:-1][:60]
