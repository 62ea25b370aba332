"""Map tensor keys of native, PEFT, diffusers, ComfyUI and kohya files to native layers and tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sa3_trt_core.lora.kinds import BAKED_NORMS, TENSORS
from sa3_trt_core.lora.layers import BLOCK, DURATION, role_of_layer

_NATIVE = re.compile(r"(?P<layer>.+)\.parametrizations\.weight\.(?P<index>\d+)\.(?P<tensor>\w+)")
# PEFT writes lora_A.weight (lora_A.<adapter>.weight in a full state dict); ComfyUI and kohya down, up, alpha.
_OTHERS = re.compile(
    r"(?P<layer>.+?)\.(?P<tensor>lora_A|lora_B|lora_down|lora_up|lora_magnitude_vector|dora_scale|alpha)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)\w+))?(?:\.(?P<part>weight|bias))?"
)
_TENSORS = {
    "lora_A": "lora_A", "lora_down": "lora_A", "lora_B": "lora_B", "lora_up": "lora_B", "alpha": "alpha",
    "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude",
}  # fmt: skip
_WRAPPERS = ("base_model.model.", "diffusion_model.", "model.diffusion_model.", "module.", "_orig_mod.", "dit.")
_KOHYA = ("lora_unet_", "lora_transformer_", "lycoris_")
_DIFFUSERS_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_DIFFUSERS_LAYERS = {"ff.proj_in": "ff.ff.0.proj", "ff.proj_out": "ff.ff.2"}
_DIFFUSERS_OTHER = {
    "proj_in": "model.transformer.project_in",
    "proj_out": "model.transformer.project_out",
    "global_cond_embedder.0": "model.transformer.global_cond_embedder.0",
    "global_cond_embedder.2": "model.transformer.global_cond_embedder.2",
}


@dataclass(frozen=True)
class TensorTarget:
    """Target of a tensor of a file: native layer and tensor name, and the file's own spelling.

    `known` is False for a layer that no Stable Audio 3 DiT has; `layer` is then the file's own name. `regrouped`: the
    rows of the fused to_qkv have diffusers' order q | q2 | k | k2 | v. `index` is that of the native parametrization.
    """

    layer: str
    tensor: str
    naming: str
    known: bool
    regrouped: bool = False
    index: int = 0
    adapter: str = ""


def tensor_target(key: str) -> TensorTarget | None:
    """Return the target of a tensor; None for other tensors, such as a bias or a full weight."""
    native = _NATIVE.fullmatch(key)
    if native is not None:
        tensor, index = native["tensor"], int(native["index"])
        if tensor not in (*TENSORS, *BAKED_NORMS):
            return None
        layer, known, regrouped = native_layer(native["layer"])
        return TensorTarget(layer, tensor, "native", known, regrouped, index)
    other = _OTHERS.fullmatch(key)
    if other is None or other["part"] == "bias":
        return None
    layer, known, regrouped = native_layer(other["layer"])
    naming = "PEFT" if other["tensor"] in ("lora_A", "lora_B", "lora_magnitude_vector") else "ComfyUI"
    if key.startswith(("diffusion_model.", *_KOHYA)):
        naming = "ComfyUI"
    return TensorTarget(layer, _TENSORS[other["tensor"]], naming, known, regrouped, adapter=other["adapter"] or "")


def native_layer(name: str) -> tuple[str, bool, bool]:
    """Return (native layer, known, rows regrouped) of a layer's name in any of the naming schemes."""
    if name.startswith(_KOHYA):
        layer = _kohya_layer(name)
        return (layer, True, False) if layer is not None else (name, False, False)
    for start in _stripped(name):
        for candidate in (start, f"model.{start}", f"model.transformer.{start}", start.removeprefix("conditioner.")):
            if role_of_layer(candidate) is not None:
                return candidate, True, False
        layer = _diffusers_layer(start)
        if layer is not None:
            return layer, True, layer.startswith(BLOCK)
    return name, False, False


def _stripped(name: str) -> list[str]:
    """Yield the name, and the name after the removal of each wrapper prefix."""
    names = [name]
    while True:
        for wrapper in (*_WRAPPERS, "transformer.", "model."):
            if names[-1].startswith(wrapper):
                names.append(names[-1].removeprefix(wrapper))
                break
        else:
            return names


def _diffusers_layer(name: str) -> str | None:
    block = _DIFFUSERS_BLOCK.fullmatch(name)
    if block is not None:
        layer = f"{BLOCK}{block[1]}.{_DIFFUSERS_LAYERS.get(block[2], block[2])}"
        return layer if role_of_layer(layer) is not None else None
    return _DIFFUSERS_OTHER.get(name)


def _kohya_layer(name: str) -> str | None:
    """Return the native layer of a kohya name, which has underscores instead of dots; None if unknown."""
    for prefix in _KOHYA:
        name = name.removeprefix(prefix)
    flat = re.sub(r"^(model_)?(transformer_)?", "", name)
    for layer in (*_FLAT_OTHER, DURATION):
        if re.sub(r"^(model\.)?(transformer\.)?", "", layer).replace(".", "_") == flat:
            return layer
    block = re.fullmatch(r"(?:layers|blocks)_(\d+)_(.+)", flat)
    if block is None:
        return None
    for inner in _FLAT_BLOCK:
        if inner.replace(".", "_") == block[2]:
            return f"{BLOCK}{block[1]}.{inner}"
    return None


def _flat_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    from sa3_trt_core.lora.layers import layer_of_role, roles

    layers = [layer_of_role(role) for role in roles(1)]
    inner = tuple(layer.removeprefix(f"{BLOCK}0.") for layer in layers if layer.startswith(BLOCK))
    return tuple(layer for layer in layers if not layer.startswith(BLOCK)), inner


_FLAT_OTHER, _FLAT_BLOCK = _flat_names()
