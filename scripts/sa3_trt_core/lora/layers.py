"""Adaptable layers: native names, and roles in a packed DiT.

Native names are those of the model's own trainer: `model.` and the layer's path in the DiT, or the duration embedder
among the conditioners. The checkpoint's tensor is `model.<layer>.weight`, the duration embedder's
`conditioner.<layer>.weight`.
"""

from __future__ import annotations

import re

DURATION = "conditioners.seconds_total.embedder.embedding.1"
BLOCK = "model.transformer.layers."
_BLOCK_ROLES = {
    "self_qkv": "self_attn.to_qkv",
    "self_out": "self_attn.to_out",
    "cross_q": "cross_attn.to_q",
    "cross_kv": "cross_attn.to_kv",
    "cross_out": "cross_attn.to_out",
    "ff_in": "ff.ff.0.proj",
    "ff_out": "ff.ff.2",
    "local_in": "to_local_embed.0",
    "local_out": "to_local_embed.2",
}
_OTHER_ROLES = {
    "input": "model.transformer.project_in",
    "output": "model.transformer.project_out",
    "preprocess": "model.preprocess_conv",
    "postprocess": "model.postprocess_conv",
    "context_in": "model.to_cond_embed.0",
    "context_out": "model.to_cond_embed.2",
    "time.0": "model.to_timestep_embed.0",
    "time.2": "model.to_timestep_embed.2",
    "global.0": "model.to_global_embed.0",
    "global.2": "model.to_global_embed.2",
    "modulation.0": "model.transformer.global_cond_embedder.0",
    "modulation.2": "model.transformer.global_cond_embedder.2",
    "seconds": DURATION,
}
_BLOCK_LAYERS = {layer: role for role, layer in _BLOCK_ROLES.items()}
_OTHER_LAYERS = {layer: role for role, layer in _OTHER_ROLES.items()}
SELF_QKV = "self_attn.to_qkv"
QKV_PARTS = 5  # q, k, v, q2, k2
# Permutation of to_qkv's parts from native order to q | q2 | k | k2 | v (diffusers, packed DiTs), and its inverse.
REGROUPED = (0, 3, 1, 4, 2)
NATIVE_ORDER = (0, 2, 4, 1, 3)


def layer_of_role(role: str) -> str:
    """Return the native layer of a role of a packed DiT, such as `blocks.3.self_qkv` or `time.0`.

    Raises KeyError for any other role.
    """
    if role.startswith("blocks."):
        _, index, name = role.split(".", 2)
        return f"{BLOCK}{index}.{_BLOCK_ROLES[name]}"
    return _OTHER_ROLES[role]


def role_of_layer(layer: str) -> str | None:
    """Return the role of a native layer in a packed DiT; None for a name that this network does not have."""
    if layer.startswith(BLOCK):
        index, _, name = layer.removeprefix(BLOCK).partition(".")
        role = _BLOCK_LAYERS.get(name)
        return f"blocks.{index}.{role}" if role is not None and re.fullmatch(r"0|[1-9]\d{0,3}", index) else None
    return _OTHER_LAYERS.get(layer)


def roles(depth: int) -> list[str]:
    """List the roles of every adaptable layer of a DiT: 9 per block of `depth`, and 13 others."""
    return [*_OTHER_ROLES, *(f"blocks.{index}.{name}" for index in range(depth) for name in _BLOCK_ROLES)]


def checkpoint_key(layer: str) -> str:
    """Return the name of a layer's weight in a native checkpoint."""
    return f"conditioner.{layer}.weight" if layer == DURATION else f"model.{layer}.weight"


def layer_of_checkpoint_key(key: str) -> str | None:
    """Return the layer whose weight a native checkpoint stores under `key`; None for any other tensor."""
    for prefix in ("model.", "conditioner."):
        layer = key.removeprefix(prefix).removesuffix(".weight")
        if key == f"{prefix}{layer}.weight" and role_of_layer(layer) is not None and checkpoint_key(layer) == key:
            return layer
    return None


def is_qkv(layer: str) -> bool:
    """Return True for the fused self-attention projection, whose rows some programs reorder."""
    return layer.startswith(BLOCK) and layer.endswith(SELF_QKV)
