"""Ordered set of adapters with strengths: checks against a model, digest, merged weights."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core.errors import ToolError, ToolWarning
from sa3_trt_core.lora.adapter import MAX_NAMED, Adapter, LayerFactors, read_adapter
from sa3_trt_core.lora.formulas import RULES, STACKINGS, Rule, Stacking, adapted
from sa3_trt_core.lora.layers import DURATION
from sa3_trt_core.lora.svd_bases import BasisSource, SvdBases

if TYPE_CHECKING:
    from torch import Tensor

MAX_STRENGTH = 100.0
DIGEST_LETTERS = 12
Shapes = Mapping[str, tuple[int, int]]  # native layer -> (out, in) of a model's weight


@dataclass(frozen=True)
class LoraSpec:
    """Specification of one adapter: file or folder, and strength."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class LoraOptions:
    """Options of adapters: strength rule, stacking rule, the duration embedder's layer, files with unknown layers.

    `chained`: the base weight of each adapter is the result of the previous ones, as in the native loader.
    `summed`: W + sum of s (W_i(1) - W), as in the native merge function; equals `fade` for any `rule`.
    """

    rule: Rule = "native"
    stacking: Stacking = "chained"
    duration: bool = True
    partial: bool = False

    def __post_init__(self) -> None:
        if self.rule not in RULES or self.stacking not in STACKINGS:
            raise ToolError(
                f"unknown LoRA rule {self.rule!r} or stacking {self.stacking!r}",
                f"rules: {', '.join(RULES)}; stackings: {', '.join(STACKINGS)}",
            )


Loras = Sequence[LoraSpec | tuple[str | Path, float] | str | Path]


def read_loras(loras: Loras, options: LoraOptions | None = None) -> LoraSet:
    """Read adapters, each "FILE:STRENGTH", a path, (path, strength) or a LoraSpec, in order. Raises ToolError.

    Issues a ToolWarning for every part of a file without effect.
    """
    chosen = LoraSet.read([as_spec(lora) for lora in loras], options)
    for note in chosen.notes:
        warnings.warn(note, ToolWarning, stacklevel=3)
    return chosen


def parse_spec(text: str) -> LoraSpec:
    """Return the spec of "FILE" or "FILE:STRENGTH". Raises ToolError for a strength that is not a number in range."""
    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists() or not path:
        return LoraSpec(Path(text))
    try:
        value = float(strength)
    except ValueError:
        if "/" in strength or "\\" in strength or Path(strength).suffix:
            return LoraSpec(Path(text))
        raise ToolError(f"--lora {text}: strength {strength!r} is not a number", "write --lora FILE:0.8") from None
    return LoraSpec(Path(path), require_strength(value))


def as_spec(lora: LoraSpec | tuple[str | Path, float] | str | Path) -> LoraSpec:
    """Convert "FILE:STRENGTH", a path, (path, strength) or a spec to a spec."""
    if isinstance(lora, LoraSpec):
        return lora
    if isinstance(lora, tuple):
        return LoraSpec(Path(lora[0]), float(lora[1]))
    return LoraSpec(lora) if isinstance(lora, Path) else parse_spec(lora)


def require_strength(value: float) -> float:
    """Return a strength as float. Raises ToolError if it is not finite or beyond +-MAX_STRENGTH."""
    if not math.isfinite(value) or abs(value) > MAX_STRENGTH:
        raise ToolError(
            f"a LoRA strength of {value:g} is outside {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}", "1 is as trained"
        )
    return float(value)


@dataclass(frozen=True)
class LoraSet:
    """Ordered adapters with strengths; may be empty."""

    adapters: tuple[tuple[Adapter, float], ...] = ()
    options: LoraOptions = field(default_factory=LoraOptions)

    @classmethod
    def read(cls, specs: Sequence[LoraSpec], options: LoraOptions | None = None) -> LoraSet:
        """Read every adapter of `specs`. Raises ToolError."""
        chosen = options or LoraOptions()
        pairs = [(read_adapter(spec.path, chosen.partial), require_strength(spec.strength)) for spec in specs]
        return cls(tuple(pairs), chosen)

    def __bool__(self) -> bool:
        return bool(self.adapters)

    @property
    def digest(self) -> str:
        """Digest (12 letters) of files, strengths, order and rules, equal on every machine."""
        return hashlib.sha256(json.dumps(self.to_manifest(), sort_keys=True).encode()).hexdigest()[:DIGEST_LETTERS]

    @property
    def layers(self) -> frozenset[str]:
        """Native layers changed by the set."""
        names = {name for adapter, strength in self.adapters if strength for name in adapter.layers}
        return frozenset(names if self.options.duration else names - {DURATION})

    @property
    def notes(self) -> list[str]:
        """One line for every part of a file without effect."""
        lines = [f"{adapter.path}: {note}" for adapter, _ in self.adapters for note in adapter.notes]
        times = Counter(adapter.sha256 for adapter, _ in self.adapters)
        lines += [f"{adapter.path}: listed more than once, and applied each time" for adapter, _ in self.adapters
                  if times[adapter.sha256] > 1]  # fmt: skip
        for adapter, strength in self.adapters:
            if strength == 0:
                lines.append(f"{adapter.path}: strength 0 has no effect")
            if not self.options.duration and DURATION in adapter.layers:
                lines.append(f"{adapter.path}: its layer of the duration embedder is not applied (--lora-no-duration)")
        return list(dict.fromkeys(lines))

    def to_manifest(self) -> dict[str, Any]:
        """Return the content of the digest: digests and strengths in order, and the effective rules."""
        stated: dict[str, Any] = {
            "adapters": [{"sha256": adapter.sha256, "strength": strength} for adapter, strength in self.adapters]
        }
        if any(adapter.kind.rows or adapter.kind.columns for adapter, _ in self.adapters):
            stated["rule"] = self.options.rule
        if len(self.adapters) > 1:
            stated["stacking"] = self.options.stacking
        if any(DURATION in adapter.layers for adapter, _ in self.adapters):
            stated["duration"] = self.options.duration
        return stated

    def described(self) -> list[str]:
        """Return one line per adapter: name, kind, rank, layers, strength."""
        return [
            f"{adapter.name}: {adapter.kind.name}, rank {'/'.join(map(str, adapter.ranks))}, "
            f"{len(adapter.layers)} layers, strength {strength:g}"
            for adapter, strength in self.adapters
        ]

    def require_fits(self, shapes: Shapes, model: str) -> None:
        """Raise ToolError if an adapter has a layer that the model lacks, or factors of other sizes.

        `shapes` are the (out, in) of every adaptable layer; `model` names it in the message.
        """
        for adapter, _ in self.adapters:
            bad = [text for name in adapter.layers if (text := _misfit(adapter, name, shapes))]
            if bad and not (self.options.partial and len(bad) < len(adapter.layers)):
                shown = "; ".join(bad[:MAX_NAMED]) + ("; ..." if len(bad) > MAX_NAMED else "")
                count = len(adapter.layers)
                raise ToolError(
                    f"{adapter.path} does not fit {model}: {count - len(bad)} of {count} layers fit; {shown}",
                    "give an adapter of this model's size, or a model of the adapter's",
                )

    def misfits(self, shapes: Shapes) -> list[str]:
        """Return one line for every layer that the model lacks; empty unless partial files are allowed."""
        return [
            f"{adapter.path}: left out: {text}" for adapter, _ in self.adapters for name in adapter.layers
            if (text := _misfit(adapter, name, shapes))
        ]  # fmt: skip

    def merged(self, layer: str, weight: Tensor, bases: BasisSource | None = None) -> Tensor:
        """Return the weight (out, in) fp32 of a native layer with every adapter in it.

        `weight` is the base weight in native row order, without padding; `bases` provides U and V of the -xs kinds
        (default: computed from `weight`, not cached). A layer without adapter is returned unchanged, in fp32.
        """
        base = weight.float()
        if layer == DURATION and not self.options.duration:
            return base
        result = base
        for adapter, strength in self.adapters:
            factors = adapter.layers.get(layer)
            if factors is None or strength == 0.0 or _misfit(adapter, layer, {layer: _shape(base)}):
                continue
            both = _bases(adapter, layer, factors, base, bases or SvdBases())
            if self.options.stacking == "summed":
                whole = adapted(base, factors.tensors, adapter.kind, factors.scale, 1.0, "native", both)
                result = result + strength * (whole - base)
            else:
                result = adapted(
                    result, factors.tensors, adapter.kind, factors.scale, strength, self.options.rule, both
                )
        return result


def _shape(weight: Tensor) -> tuple[int, int]:
    return int(weight.shape[0]), int(weight.shape[1])


def _bases(
    adapter: Adapter, layer: str, factors: LayerFactors, base: Tensor, source: BasisSource
) -> tuple[Tensor, Tensor] | None:
    """Return U and V of an -xs layer: the file's own, else those of the original weight, also in a stack."""
    if not adapter.kind.svd:
        return None
    if "U" in factors.tensors and "V" in factors.tensors:
        return factors.tensors["U"], factors.tensors["V"]
    return source.bases(layer, base, factors.rank)


def _misfit(adapter: Adapter, name: str, shapes: Shapes) -> str | None:
    """Return the reason why a layer does not fit the model; None if it fits."""
    layer, shape = adapter.layers[name], shapes.get(name)
    if shape is None:
        return f"the model has no layer {name}"
    out, into = shape
    tensors = layer.tensors
    if "M_xs" in tensors:
        if layer.rank > min(out, into):
            return f"{name} has rank {layer.rank}, its weight is {out} x {into}"
    elif (tensors["lora_B"].shape[0], tensors["lora_A"].shape[1]) != (out, into):
        return f"{name} is {tensors['lora_B'].shape[0]} x {tensors['lora_A'].shape[1]}, the model's is {out} x {into}"
    sizes = {"magnitude": out if adapter.kind.rows else into, "magnitude_r": out, "magnitude_c": into,
             "U": out, "V": into}  # fmt: skip
    for tensor, size in sizes.items():
        if tensor in tensors and tensors[tensor].shape[0] != size:
            return f"{name} has {tensors[tensor].shape[0]} values of {tensor}, its weight is {out} x {into}"
    return None
