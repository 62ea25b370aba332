"""Read the sizes of a native Stable Audio 3 checkpoint from its model_config.json.

All code takes its geometry from here and has no size constants, so that a demo checkpoint and the real one run through
the same code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_trt_core.errors import ToolError

MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True)
class DitGeometry:
    """Sizes of the diffusion transformer: arguments of `StableAudio3DiTModel`."""

    io_channels: int
    embed_dim: int
    depth: int
    num_heads: int
    cond_token_dim: int
    global_cond_dim: int
    local_add_cond_dim: int
    ff_mult: float
    num_memory_tokens: int
    differential: bool


@dataclass(frozen=True)
class AutoencoderGeometry:
    """Sizes of the SAME autoencoder: arguments of `AutoencoderSAME`."""

    audio_channels: int
    patch_size: int
    channels: int
    c_mults: tuple[int, ...]
    strides: tuple[int, ...]
    depths: tuple[int, ...]
    latent_dim: int
    dim_heads: int
    differential: bool
    sliding_window: int
    encoder_sinusoidal: tuple[int, ...]
    decoder_sinusoidal: tuple[int, ...]
    sample_rate: int


@dataclass(frozen=True)
class ConditionerGeometry:
    """Sizes of the text and duration conditioners."""

    text_folder: str
    text_tokens: int
    cond_dim: int
    seconds_min: float
    seconds_max: float


@dataclass(frozen=True)
class Geometry:
    """All sizes of one checkpoint."""

    dit: DitGeometry
    autoencoder: AutoencoderGeometry
    conditioner: ConditionerGeometry


def load_geometry(config_file: Path) -> Geometry:
    """Return the geometry in a `model_config.json`.

    Raises ToolError when the file is missing, is not JSON, lacks a required value (named with its path inside the
    file), or describes an unsupported network.
    """
    try:
        with config_file.open("rb") as stream:
            config = json.loads(stream.read(MAX_CONFIG_BYTES))
    except OSError as error:
        raise ToolError(
            f"cannot read {config_file}: {error.strerror}", "give the checkpoint's model_config.json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ToolError(f"{config_file} is not JSON ({error})", "download or export the checkpoint again") from None
    reader = _ConfigReader(config, config_file)
    if reader.text("model.diffusion.diffusion_objective") != "rf_denoiser":
        raise ToolError(
            f"{config_file}: model.diffusion.diffusion_objective is not rf_denoiser",
            "only rectified-flow ping-pong checkpoints of Stable Audio 3 are supported",
        )
    return Geometry(_dit(reader), _autoencoder(reader), _conditioner(reader))


class _ConfigReader:
    """Values of a nested JSON document by dotted path; errors name the path."""

    def __init__(self, document: Any, source: Path) -> None:
        self._document = document
        self._source = source

    def get(self, path: str) -> Any:
        value = self._document
        for step in path.split("."):
            if not isinstance(value, Mapping) or step not in value:
                raise self._error(path, "is missing")
            value = value[step]
        return value

    def integer(self, path: str, low: int = 1, high: int = 1 << 20) -> int:
        value = self.get(path)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._error(path, f"must be a whole number from {low} to {high}")
        return value

    def number(self, path: str, low: float = -math.inf) -> float:
        value = self.get(path)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < low:
            raise self._error(path, "must be a finite number" + (f" from {low:g}" if math.isfinite(low) else ""))
        return float(value)

    def flag(self, path: str) -> bool:
        value = self.get(path)
        if not isinstance(value, bool):
            raise self._error(path, "must be true or false")
        return value

    def text(self, path: str) -> str:
        value = self.get(path)
        if not isinstance(value, str):
            raise self._error(path, "must be a string")
        return value

    def has(self, path: str) -> bool:
        """Return True if there is a value at this path; published files omit default values."""
        parent, _, last = path.rpartition(".")
        mapping = self.get(parent)
        return isinstance(mapping, Mapping) and mapping.get(last) is not None

    def integers(self, path: str, low: int = 1, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        if default is not None and not self.has(path):
            return default
        value = self.get(path)
        if (
            not isinstance(value, list)
            or not 1 <= len(value) <= 16
            or not all(isinstance(v, int) and not isinstance(v, bool) and low <= v <= 1 << 20 for v in value)
        ):
            raise self._error(path, f"must be a list of whole numbers from {low}")
        return tuple(value)

    def conditioner(self, name: str) -> _ConfigReader:
        """Return the config of the conditioner whose id is `name`."""
        entries = self.get("model.conditioning.configs")
        if not isinstance(entries, list):
            raise self._error("model.conditioning.configs", "must be a list")
        for entry in entries:
            if isinstance(entry, Mapping) and entry.get("id") == name:
                return _ConfigReader(entry, self._source)
        raise self._error(f"model.conditioning.configs[id={name}]", "is missing")

    def _error(self, path: str, problem: str) -> ToolError:
        return ToolError(f"{self._source}: {path} {problem}", "use the model_config.json that came with the checkpoint")


def _dit(reader: _ConfigReader) -> DitGeometry:
    base = "model.diffusion.config"
    embed_dim = reader.integer(f"{base}.embed_dim", high=1 << 14)
    num_heads = reader.integer(f"{base}.num_heads", high=1 << 8)
    if embed_dim % num_heads or (embed_dim // num_heads) % 4:
        raise reader._error(f"{base}.num_heads", "must split embed_dim into heads of a multiple of 4 channels")
    return DitGeometry(
        io_channels=reader.integer(f"{base}.io_channels"),
        embed_dim=embed_dim,
        depth=reader.integer(f"{base}.depth", high=256),
        num_heads=num_heads,
        cond_token_dim=reader.integer(f"{base}.cond_token_dim"),
        global_cond_dim=reader.integer(f"{base}.global_cond_dim"),
        local_add_cond_dim=reader.integer(f"{base}.local_add_cond_dim"),
        ff_mult=reader.number(f"{base}.ff_kwargs.mult", low=0.25),
        num_memory_tokens=reader.integer(f"{base}.num_memory_tokens", low=0),
        differential=reader.flag(f"{base}.attn_kwargs.differential"),
    )


def _autoencoder(reader: _ConfigReader) -> AutoencoderGeometry:
    base = "model.pretransform.config"
    encoder, decoder = f"{base}.encoder.config", f"{base}.decoder.config"
    strides = reader.integers(f"{decoder}.strides")
    ratio = reader.integer(f"{base}.downsampling_ratio")
    if ratio % math.prod(strides):
        raise reader._error(f"{base}.downsampling_ratio", f"must be a multiple of the strides' product {strides}")
    depths = reader.integers(f"{encoder}.transformer_depths")
    if len(depths) != len(strides):
        raise reader._error(f"{encoder}.transformer_depths", f"must have {len(strides)} entries, as the strides")
    return AutoencoderGeometry(
        audio_channels=reader.integer(f"{base}.io_channels"),
        patch_size=ratio // math.prod(strides),
        channels=reader.integer(f"{encoder}.channels"),
        c_mults=reader.integers(f"{encoder}.c_mults"),
        strides=strides,
        depths=depths,
        latent_dim=reader.integer(f"{base}.latent_dim"),
        dim_heads=reader.integer(f"{encoder}.dim_heads"),
        differential=reader.flag(f"{encoder}.differential"),
        sliding_window=reader.integers(f"{decoder}.sliding_window", default=(1,))[0],
        encoder_sinusoidal=_sinusoidal(reader, f"{encoder}.sinusoidal_blocks", depths),
        decoder_sinusoidal=_sinusoidal(reader, f"{decoder}.sinusoidal_blocks", depths),
        sample_rate=reader.integer("sample_rate"),
    )


def _sinusoidal(reader: _ConfigReader, path: str, depths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of last layers of each level with sin gates; 0 where the file does not state it."""
    counts = reader.integers(path, low=0, default=(0,) * len(depths))
    if len(counts) != len(depths) or any(count > depth + 1 for count, depth in zip(counts, depths, strict=False)):
        raise reader._error(path, f"must have {len(depths)} entries of at most the depth {depths} + 1")
    return counts


def _conditioner(reader: _ConfigReader) -> ConditionerGeometry:
    prompt, seconds = reader.conditioner("prompt"), reader.conditioner("seconds_total")
    folder = prompt.text("config.subfolder")
    if folder in ("", ".", "..") or "/" in folder or "\\" in folder:
        raise reader._error("conditioning prompt config.subfolder", "must be a plain folder name")
    return ConditionerGeometry(
        text_folder=folder,
        text_tokens=prompt.integer("config.max_length"),
        cond_dim=reader.integer("model.conditioning.cond_dim"),
        seconds_min=seconds.number("config.min_val"),
        seconds_max=seconds.number("config.max_val"),
    )
