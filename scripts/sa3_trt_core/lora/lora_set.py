"""The adapters that a model runs with, in order, with their strengths: fit, digest, merged weights."""

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
from sa3_trt_core.lora.adapter import NAMED, Adapter, LayerFactors, read_adapter
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
    """One adapter as it is asked for: a file or folder and a strength."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class LoraOptions:
    """Options of adapters: strength rule, stacking rule, the duration embedder's layer, files with unknown layers.

    `chained`: each adapter takes the result of those before it as its base weight, as the native loader does.
    `summed`: W + sum of s (W_i(1) - W), as the native merge function does; it fades whatever `rule` says.
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

    Every part of a file that has no effect is a ToolWarning.
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
    """Return the spec of what a caller may write: "FILE:STRENGTH", a path, (path, strength), or a spec."""
    if isinstance(lora, LoraSpec):
        return lora
    if isinstance(lora, tuple):
        return LoraSpec(Path(lora[0]), float(lora[1]))
    return LoraSpec(lora) if isinstance(lora, Path) else parse_spec(lora)


def require_strength(value: float) -> float:
    """Return a strength. Raises ToolError outside +-MAX_STRENGTH or where it is not finite."""
    if not math.isfinite(value) or abs(value) > MAX_STRENGTH:
        raise ToolError(
            f"a LoRA strength of {value:g} is outside {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}", "1 is as trained"
        )
    return float(value)


@dataclass(frozen=True)
class LoraSet:
    """Adapters with their strengths, in order. An empty set changes nothing."""

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
        """Twelve letters that stand for files, strengths, order and rules; the same set has the same everywhere."""
        return hashlib.sha256(json.dumps(self.to_manifest(), sort_keys=True).encode()).hexdigest()[:DIGEST_LETTERS]

    @property
    def layers(self) -> frozenset[str]:
        """The native layers that the set changes."""
        names = {name for adapter, strength in self.adapters if strength for name in adapter.layers}
        return frozenset(names if self.options.duration else names - {DURATION})

    @property
    def notes(self) -> list[str]:
        """Every part of a file that has no effect, one line each."""
        lines = [f"{adapter.path}: {note}" for adapter, _ in self.adapters for note in adapter.notes]
        times = Counter(adapter.sha256 for adapter, _ in self.adapters)
        lines += [f"{adapter.path}: named more than once, it acts each time" for adapter, _ in self.adapters
                  if times[adapter.sha256] > 1]  # fmt: skip
        for adapter, strength in self.adapters:
            if strength == 0:
                lines.append(f"{adapter.path}: strength 0, it changes nothing")
            if not self.options.duration and DURATION in adapter.layers:
                lines.append(f"{adapter.path}: its layer of the duration embedder is left out, as asked")
        return list(dict.fromkeys(lines))

    def to_manifest(self) -> dict[str, Any]:
        """Return what identifies the set: the adapters' digests and strengths in order, and the rules that matter."""
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
        """Return one line an adapter: name, kind, rank, layers, strength."""
        return [
            f"{adapter.name}: {adapter.kind.name}, rank {'/'.join(map(str, adapter.ranks))}, "
            f"{len(adapter.layers)} layers, strength {strength:g}"
            for adapter, strength in self.adapters
        ]

    def require_fits(self, shapes: Shapes, model: str) -> None:
        """Raise ToolError when an adapter has a layer that the model lacks, or factors of another width.

        `shapes` are the (out, in) of every adaptable layer; `model` names it in the message.
        """
        for adapter, _ in self.adapters:
            bad = [text for name in adapter.layers if (text := _misfit(adapter, name, shapes))]
            if bad and not (self.options.partial and len(bad) < len(adapter.layers)):
                shown = "; ".join(bad[:NAMED]) + ("; ..." if len(bad) > NAMED else "")
                count = len(adapter.layers)
                raise ToolError(
                    f"{adapter.path} does not fit {model}: {count - len(bad)} of {count} layers fit; {shown}",
                    "give an adapter of this model's size, or a model of the adapter's",
                )

    def misfits(self, shapes: Shapes) -> list[str]:
        """Return one line for every layer that has no place in the model; empty unless partial files are allowed."""
        return [
            f"{adapter.path}: left out: {text}" for adapter, _ in self.adapters for name in adapter.layers
            if (text := _misfit(adapter, name, shapes))
        ]  # fmt: skip

    def merged(self, layer: str, weight: Tensor, bases: BasisSource | None = None) -> Tensor:
        """Return the weight (out, in) fp32 of a native layer with every adapter in it.

        `weight` is the base weight in native rows, without padding; `bases` gives U and V of the -xs kinds (default:
        computed from `weight`, kept nowhere). A layer that no adapter has comes back as it is, in fp32.
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
    """U and V of an -xs layer: the file's own, or those of the original weight, in a stack too."""
    if not adapter.kind.svd:
        return None
    if "U" in factors.tensors and "V" in factors.tensors:
        return factors.tensors["U"], factors.tensors["V"]
    return source.bases(layer, base, factors.rank)


def _misfit(adapter: Adapter, name: str, shapes: Shapes) -> str | None:
    """Return the reason why a layer of an adapter does not fit the model; None where it does."""
    layer, shape = adapter.layers[name], shapes.get(name)
    if shape is None:
        return f"{name} is not a layer of it"
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
