"""Summarize an adapter: kind, rank, alpha, layers, trigger words, relative change of the weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.adapter import Adapter
from sa3_trt_core.lora.layers import BLOCK, checkpoint_key
from sa3_trt_core.lora.lora_set import LoraSet
from sa3_trt_core.lora.safetensors_file import FLOATS, SafetensorsFile
from sa3_trt_core.lora.settings import NATIVE_KEY, PEFT_KEY
from sa3_trt_core.lora.svd_bases import FOLDER_SUFFIX, SvdBases

if TYPE_CHECKING:
    from torch import Tensor

MAX_SIDE_FILE = 1 << 20  # bytes
MAX_SHOWN = 300  # characters of a metadata value


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return the metadata and the parsed properties of an adapter as one JSON document."""
    scales = sorted({round(layer.scale, 6) for layer in adapter.layers.values()})
    blocks = [layer for layer in adapter.layers if layer.startswith(BLOCK)]
    kinds = Counter(
        layer.removeprefix(BLOCK).partition(".")[2] if layer in blocks else layer for layer in adapter.layers
    )
    return {
        "file": str(adapter.path), "sha256": adapter.sha256, "kind": adapter.kind.name, "naming": adapter.naming,
        "ranks": adapter.ranks, "alpha": adapter.settings.alpha, "scales": scales,
        "settings_from": adapter.settings.source or None, "layers": len(adapter.layers),
        "blocks": len({layer.removeprefix(BLOCK).partition(".")[0] for layer in blocks}), "by_layer": dict(kinds),
        "trigger_words": trigger_words(adapter), "notes": list(adapter.notes),
        "metadata": {key: value[:MAX_SHOWN] for key, value in adapter.metadata.items() if key != PEFT_KEY},
    }  # fmt: skip


def trigger_words(adapter: Adapter) -> list[str]:
    """Return the trigger words of an adapter, from its metadata and the trainer's files beside it."""
    words = [value for key, value in adapter.metadata.items() if "trigger" in key.lower() and value]
    words += _words_of(_document(adapter.metadata.get(NATIVE_KEY, "")))
    beside = adapter.path.with_name(f"{adapter.path.stem}.metadata.json")
    words += _words_of(_document(_text(beside)))
    words += [_text(adapter.path.with_name(f"{adapter.path.stem}.trigger.txt")).strip()]
    return [word for word in dict.fromkeys(words) if word]


def changes(adapter: Adapter, weights: Path) -> dict[str, float]:
    """Return |W' - W| / |W| of every layer at strength 1, for the weights of a native model.safetensors.

    Raises ToolError if the weights belong to a model of another size.
    """
    file = SafetensorsFile(weights)
    loras = LoraSet(((adapter, 1.0),))
    shapes = {}
    for layer in adapter.layers:
        entry = file.entries.get(checkpoint_key(layer))
        if entry is not None and entry.dtype in FLOATS and len(entry.shape) >= 2:
            shapes[layer] = (entry.shape[0], entry.shape[1])
    if not shapes:
        raise ToolError(
            f"{weights} has none of the adapter's layers", "name the model.safetensors of a native checkpoint"
        )
    loras.require_fits(shapes, str(weights))
    bases = SvdBases(weights.with_name(weights.name + FOLDER_SUFFIX))
    return {layer: _change(loras, layer, file.tensor(checkpoint_key(layer)), bases) for layer in sorted(shapes)}


def _change(loras: LoraSet, layer: str, stored: Tensor, bases: SvdBases) -> float:
    weight = stored.float().flatten(1)
    return float((loras.merged(layer, weight, bases) - weight).norm() / weight.norm().clamp(min=1e-30))


def _words_of(document: Any) -> list[str]:
    if not isinstance(document, dict):
        return []
    trigger_values = [value for key, value in document.items() if "trigger" in str(key).lower()]
    return [str(word) for value in trigger_values for word in (value if isinstance(value, list) else [value]) if word]


def _document(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_bytes()[:MAX_SIDE_FILE].decode("utf-8", "replace") if path.is_file() else ""
    except OSError:
        return ""
