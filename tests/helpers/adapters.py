"""Write adapter files of every kind and compute the adapted weights with NumPy alone, from the published formulas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

KINDS = ("lora", "dora-rows", "dora-cols", "bora", "lora-xs", "dora-rows-xs", "dora-cols-xs", "bora-xs")
Shapes = Mapping[str, tuple[int, int]]
QKV = "model.transformer.layers.0.self_attn.to_qkv"
DURATION = "conditioners.seconds_total.embedder.embedding.1"
# (out, in) of layers of a DiT of width 128, one of each special case: fused rows, K = 257, a convolution, the embedder.
LAYER_SHAPES = {
    QKV: (640, 128), "model.transformer.layers.0.to_local_embed.0": (128, 257), "model.preprocess_conv": (256, 256),
    DURATION: (768, 256), "model.transformer.layers.0.ff.ff.2": (128, 512),
}  # fmt: skip


def native_weights(path: Path) -> dict[str, np.ndarray]:
    """Return every adaptable weight (out, in) of a native checkpoint by layer, fp32."""
    weights = {}
    for key, value in read_tensors(path)[0].items():
        if key.endswith(".weight") and key.startswith(("model.model.", "conditioner.conditioners.seconds")):
            layer = key.partition(".")[2].removesuffix(".weight")
            weights[layer] = value.reshape(value.shape[0], -1)
    return {layer: value for layer, value in weights.items() if value.ndim == 2 and value.shape[1] > 1}


def write_native(
    path: Path, kind: str, shapes: Shapes, rank: int = 4, alpha: float | None = 6.0, seed: int = 0,
    norms: Mapping[str, np.ndarray] | None = None, config: Mapping[str, object] | None = None,
) -> Path:  # fmt: skip
    """Write an adapter as the native trainer does: fp16 factors, `lora_config`; magnitudes near those of `norms`."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer, (out, into) in shapes.items():
        prefix = f"{layer}.parametrizations.weight.0."
        if kind.endswith("-xs"):
            tensors[f"{prefix}M_xs"] = 0.4 * generator.standard_normal((rank, rank))
        else:
            tensors[f"{prefix}lora_A"] = generator.standard_normal((rank, into)) / np.sqrt(into)
            tensors[f"{prefix}lora_B"] = 0.2 * generator.standard_normal((out, rank))
        base = norms[layer] if norms is not None else np.ones((out, into), np.float32)
        rows, columns = (_random_magnitudes(np.linalg.norm(base, axis=axis), generator) for axis in (1, 0))
        if kind.startswith("dora"):
            tensors[f"{prefix}magnitude"] = rows if "rows" in kind else columns
        if kind.startswith("bora"):
            tensors[f"{prefix}magnitude_r"], tensors[f"{prefix}magnitude_c"] = rows, columns
    fields = {"rank": rank, "alpha": alpha, "adapter_type": kind, "dropout": 0.0, "include": None, "exclude": None}
    fields = fields if config is None else dict(config)
    write_tensors(path, {key: value.astype(np.float16) for key, value in tensors.items()},
                  {"lora_config": json.dumps(fields)})  # fmt: skip
    return path


def _random_magnitudes(norm: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return random magnitudes 10 % around a norm, some of them negative as in real files."""
    sign = np.where(generator.random(norm.shape) < 0.03, -1.0, 1.0)
    return norm * (1.0 + 0.1 * generator.standard_normal(norm.shape)) * sign


def merged_weight(
    path: Path, layer: str, weight: np.ndarray, strength: float, original: np.ndarray | None = None
) -> np.ndarray:
    """Return the weight of a layer with a native adapter applied, fp32, by the native trainer's formulas.

    `original` is the base of the SVD if `weight` is another adapter's result.
    """
    tensors, metadata = read_tensors(path)
    config = json.loads(metadata["lora_config"])
    factors = {key.rpartition(".")[2]: value for key, value in tensors.items()
           if key.startswith(f"{layer}.parametrizations.weight.0.")}  # fmt: skip
    if not factors or strength == 0:
        return weight
    if "M_xs" in factors:
        left, _, right = np.linalg.svd(weight if original is None else original, full_matrices=False)
        for column in range(left.shape[1]):
            if left[np.argmax(np.abs(left[:, column])), column] < 0:
                left[:, column], right[column] = -left[:, column], -right[column]
        rank = len(factors["M_xs"])
        delta = left[:, :rank] @ factors["M_xs"] @ right[:rank]
    else:
        rank = len(factors["lora_A"])
        delta = factors["lora_B"] @ factors["lora_A"]
    alpha = config.get("alpha", rank)
    whole = weight + (rank if alpha is None else alpha) / rank * strength * delta
    kind = config["adapter_type"]
    if kind.startswith(("dora-rows", "bora")):
        magnitude = factors["magnitude_r" if kind.startswith("bora") else "magnitude"]
        whole = magnitude[:, None] * whole / (np.linalg.norm(whole, axis=1, keepdims=True) + 1e-12)
    if kind.startswith(("dora-cols", "bora")):
        magnitude = factors["magnitude_c" if kind.startswith("bora") else "magnitude"]
        whole = whole / (np.linalg.norm(whole, axis=0, keepdims=True) + 1e-12) * magnitude[None, :]
    return whole


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return tensors as fp32 and metadata, parsed by the safetensors layout: a length, a JSON header, raw bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    types = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    tensors = {}
    for key, entry in header.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        if entry["dtype"] in types:
            tensors[key] = (
                np.frombuffer(data[first:last], types[entry["dtype"]]).reshape(entry["shape"]).astype(np.float32)
            )
    return tensors, metadata


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file."""
    from safetensors.numpy import save_file

    arrays = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    save_file(arrays, str(path), metadata=dict(metadata or {}))
