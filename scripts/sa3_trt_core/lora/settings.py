"""Read an adapter's settings (rank, alpha, kind) from native metadata or a PEFT adapter_config.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.kinds import KINDS

NATIVE_KEY = "lora_config"
PEFT_KEY = "lora_adapter_metadata"  # metadata key of files saved by diffusers
PEFT_CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
_HINT = "write the file again with the program that trained it"
# Initialisations of PEFT that change the base weights, for which alone the factors are valid.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterSettings:
    """Settings in an adapter file. `kind` None: not stated. `alpha` None: alpha / rank is 1."""

    source: str  # "lora_config", "adapter_config.json", ... or "" without any
    kind: str | None = None
    rank: int | None = None
    alpha: float | None = None
    sqrt_rank: bool = False  # rsLoRA: alpha / sqrt(rank)
    rank_pattern: Mapping[str, Any] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Any] = field(default_factory=dict)
    dora: bool = False

    def scale(self, layer: str, rank: int) -> float:
        """Return the scale k of a layer with factors of this rank."""
        alpha = _matched(self.alpha_pattern, layer, self.alpha)
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self.sqrt_rank else rank)

    def stated_rank(self, layer: str) -> int | None:
        """Return the rank of a layer in the settings; None if not stated."""
        rank = _matched(self.rank_pattern, layer, self.rank)
        return None if rank is None else int(rank)


def read_settings(path: Path, metadata: Mapping[str, str]) -> AdapterSettings:
    """Return the settings of an adapter file from its metadata or its config. Raises ToolError for malformed ones."""
    if NATIVE_KEY in metadata:
        return _native(path, _document(f"{path}: {NATIVE_KEY} in its metadata", metadata[NATIVE_KEY]))
    if PEFT_KEY in metadata:
        document = _document(f"{path}: {PEFT_KEY} in its metadata", metadata[PEFT_KEY])
        plain = {key.rpartition(".")[2] if key.count(".") == 1 else key: value for key, value in document.items()}
        return _peft(path, plain, PEFT_KEY)
    beside = path.with_name(PEFT_CONFIG)
    if beside.is_file():
        try:
            text = beside.read_bytes()[: MAX_CONFIG_BYTES + 1].decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ToolError(f"cannot read {beside}: {error}", _HINT) from None
        return _peft(beside, _document(str(beside), text), PEFT_CONFIG)
    return AdapterSettings("")


def _native(path: Path, document: Mapping[str, Any]) -> AdapterSettings:
    kind = document.get("adapter_type")
    kind = "lora" if kind is None else kind
    if kind != "dora" and kind not in KINDS:
        raise ToolError(f"{path} has the unknown adapter kind {kind!r}", f"known: {', '.join(KINDS)}, dora")
    return AdapterSettings(
        NATIVE_KEY, str(kind), _rank(path, document.get("rank")), _number(path, "alpha", document.get("alpha"))
    )


def _peft(path: Path, document: Mapping[str, Any], source: str) -> AdapterSettings:
    kind = str(document.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if kind != "LORA":
        raise ToolError(f"{path} is a PEFT adapter of type {kind}, not LORA", "only LoRA and DoRA are read")
    start = str(document.get("init_lora_weights")).lower()
    if start.startswith(_MOVES_BASE):
        raise ToolError(
            f"{path}: trained with init_lora_weights={start}, which changes the base weights themselves",
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    patterns = [document.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, Mapping) for pattern in patterns):
        raise ToolError(f"{path}: rank_pattern or alpha_pattern is not a mapping", _HINT)
    for pattern, name in zip(patterns, ("r", "alpha"), strict=True):
        for value in pattern.values():
            _number(path, name, value)
    dora = bool(document.get("use_dora", False))
    return AdapterSettings(
        source, "dora-rows" if dora else "lora", _rank(path, document.get("r")),
        _number(path, "lora_alpha", document.get("lora_alpha")), bool(document.get("use_rslora", False)),
        patterns[0], patterns[1], dora,
    )  # fmt: skip


def _matched(pattern: Mapping[str, Any], layer: str, otherwise: Any) -> Any:
    """Return the first entry whose key matches the end of a layer's name, as in PEFT."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", layer):
                return value
        except re.error:
            continue
    return otherwise


def _document(name: str, text: str) -> Mapping[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise ToolError(f"{name} is not JSON", _HINT) from None
    if not isinstance(document, Mapping):
        raise ToolError(f"{name} is not a JSON object", _HINT)
    return document


def _rank(path: Path, value: Any) -> int | None:
    number = _number(path, "rank", value)
    if number is None:
        return None
    if number < 1 or number != int(number):
        raise ToolError(f"{path}: rank {value!r} is not a whole number from 1", _HINT)
    return int(number)


def _number(path: Path, name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ToolError(f"{path}: {name} {value!r} is not a finite number", _HINT)
    return float(value)
