"""Read and validate a LoRA adapter (file or PEFT folder): factors by native layer and tensor name."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.artifacts import files
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.kinds import BAKED_NORMS, KINDS, OWN_BASES, Kind
from sa3_trt_core.lora.layers import NATIVE_ORDER, QKV_PARTS, is_qkv
from sa3_trt_core.lora.names import TensorTarget, tensor_target
from sa3_trt_core.lora.safetensors_file import FLOATS, INTEGERS, SafetensorsFile
from sa3_trt_core.lora.settings import PEFT_CONFIG, AdapterSettings, read_settings

if TYPE_CHECKING:
    from torch import Tensor

PEFT_WEIGHTS = "adapter_model.safetensors"
UNUSED = ("lora_dropout_mask", "lora_strength")  # buffers of the trainer without weights
OTHER_METHODS = {
    "hada_": "a LoHa adapter", "lokr_": "a LoKr adapter", "oft_": "an OFT adapter", "a1.": "a GLoRA adapter",
    "lora_mid": "a LoCon adapter with a middle factor", "diff": "changes of whole weights or biases",
}  # fmt: skip
MAX_NAMED = 3  # layers or keys listed in a message
HINT = "give an adapter that was trained on Stable Audio 3; `sa3_lora info FILE` lists what it holds"


@dataclass(frozen=True)
class LayerFactors:
    """Tensors of one layer in native row order and the file's dtype, its rank and its scale k = alpha / rank."""

    tensors: Mapping[str, Tensor]
    rank: int
    scale: float


@dataclass(frozen=True)
class Adapter:
    """One adapter. `notes`: one line for each part of the file without effect and each assumption."""

    path: Path
    sha256: str
    kind: Kind
    naming: str
    layers: Mapping[str, LayerFactors]
    settings: AdapterSettings
    metadata: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's stem, or the folder's name."""
        return self.path.parent.name if self.path.name == PEFT_WEIGHTS else self.path.stem

    @property
    def ranks(self) -> list[int]:
        """Distinct ranks of the layers; more than one only with rank_pattern."""
        return sorted({layer.rank for layer in self.layers.values()})


def read_adapter(path: Path, partial: bool = False) -> Adapter:
    """Read a .safetensors file (native, PEFT, diffusers, ComfyUI names) or a PEFT folder.

    `partial` skips layers that no Stable Audio 3 DiT has, with a note, instead of raising. Raises
    ToolError: a pickle, a damaged file, an unknown kind or layer, a missing or malformed tensor, mixed ranks.
    """
    file = SafetensorsFile(_weights_file(path))
    settings = read_settings(file.path, file.metadata)
    notes: list[str] = []
    by_layer = _grouped(file, notes, partial)
    namings = sorted({target.naming for group in by_layer.values() for _, target in group.values()})
    kind = _kind_of(file, settings, by_layer, notes)
    layers = {name: _layer(file, settings, kind, name, group) for name, group in by_layer.items()}
    _require_one_rank(file.path, settings, layers)
    if not settings.source and not any("alpha" in group for group in by_layer.values()):
        notes.append("no alpha in the file: alpha = rank assumed (scale 1)")
    if all(_is_zero(layer) for layer in layers.values()) and not (kind.rows or kind.columns):
        notes.append("all low-rank factors are zero: no effect")
    digest = files.sha256_of(file.path)
    if (
        settings.source == PEFT_CONFIG
    ):  # the digest covers the config: the same factors with another alpha are another adapter
        digest = hashlib.sha256(f"{digest} {files.sha256_of(file.path.with_name(PEFT_CONFIG))}".encode()).hexdigest()
    return Adapter(file.path, digest, kind, " and ".join(namings), layers, settings, file.metadata, tuple(notes))


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise ToolError(f"no such adapter: {path}", "name an existing .safetensors file or PEFT folder")
        return path
    if (path / PEFT_WEIGHTS).is_file():
        return path / PEFT_WEIGHTS
    candidates = sorted(path.glob("*.safetensors"))
    if len(candidates) == 1:
        return candidates[0]
    if (path / "adapter_model.bin").is_file():
        raise ToolError(f"{path} holds a pickle, adapter_model.bin", "save it with PEFT's safe_serialization=True")
    if not candidates:
        raise ToolError(f"{path} holds no .safetensors file", f"a PEFT folder has {PEFT_CONFIG} and {PEFT_WEIGHTS}")
    raise ToolError(f"{path} holds {len(candidates)} .safetensors files", f"name one of them: {candidates[0]}")


Group = dict[str, tuple[str, TensorTarget]]  # native tensor name -> key in the file, target


def _grouped(file: SafetensorsFile, notes: list[str], partial: bool) -> dict[str, Group]:
    """Return the tensors of each known layer. Raises ToolError for unknown layers unless `partial`."""
    layers: dict[str, Group] = {}
    unknown: dict[str, list[str]] = {}
    foreign: list[str] = []
    baked = 0
    for key in sorted(file.entries):
        target = tensor_target(key)
        if target is None:
            if not key.endswith(UNUSED):
                foreign.append(key)
        elif not target.known:
            unknown.setdefault(target.layer, []).append(key)
        elif target.tensor in BAKED_NORMS:
            baked += 1
        else:
            group = layers.setdefault(target.layer, {})
            if target.tensor in group:
                raise ToolError(
                    f"{file.path} holds more than one adapter: {group[target.tensor][0]} and {key} have one place",
                    "save each adapter in a file of its own",
                )
            group[target.tensor] = key, target
    _refuse_other_methods(file.path, foreign)
    fits = f"{len(layers)} of its layers are known"
    if unknown and (not partial or not layers):
        raise ToolError(f"{file.path}: {listed(list(unknown), 'layer')} not of Stable Audio 3; {fits}", _hint(layers))
    if foreign and (not partial or not layers):
        raise ToolError(f"{file.path}: {listed(foreign, 'tensor')} no LoRA factors; {fits}", _hint(layers))
    if not layers:
        raise ToolError(f"{file.path} holds no adapter: it has {len(file.entries)} tensors", HINT)
    if unknown:
        notes.append(f"{listed(list(unknown), 'layer')} not of Stable Audio 3 and left out")
    if foreign:
        notes.append(f"{listed(foreign, 'tensor')} no LoRA factors and left out")
    if baked:
        notes.append(f"{baked} baked norms are not used: norms are computed from the base weights")
    return layers


def _refuse_other_methods(path: Path, foreign: list[str]) -> None:
    """Raise ToolError for tensors of other adapter methods, which would be applied partly or not at all."""
    for mark, method in OTHER_METHODS.items():
        keys = [key for key in foreign if f".{mark}" in key]
        if keys:
            raise ToolError(
                f"{path} holds {method}: {listed(keys, 'tensor')} no LoRA factors",
                f"only {', '.join(KINDS)} are read: train or export one of those",
            )


def _kind_of(file: SafetensorsFile, settings: AdapterSettings, layers: Mapping[str, Group], notes: list[str]) -> Kind:
    """Return the kind in the settings, else the kind inferred from the tensors."""
    tensors = {tensor for group in layers.values() for tensor in group}
    name = settings.kind
    if name is None:
        name = "bora" if "magnitude_r" in tensors else "dora" if "magnitude" in tensors else "lora"
        name = f"{name}-xs" if "M_xs" in tensors else name
        notes.append(f"no kind in the file: {name} inferred from its tensors")
    if name.startswith("dora") and name not in KINDS:
        # "dora" is an older name of dora-rows and dora-cols, distinguished by the shape of the magnitudes (1-D: rows).
        shapes = [file.entries[group["magnitude"][0]].shape for group in layers.values() if "magnitude" in group]
        columns = bool(shapes) and len(shapes[0]) == 2 and shapes[0][0] == 1
        name = name.replace("dora", "dora-cols" if columns else "dora-rows")
    kind = KINDS[name]
    unused = sorted(tensors - set(kind.tensors) - {"alpha"} - (set(OWN_BASES) if kind.svd else set()))
    if unused:
        notes.append(f"its {', '.join(unused)} have no effect: it states the kind {name}")
    missing = [
        f"{layer} has no {tensor}" for layer, group in layers.items() for tensor in kind.tensors if tensor not in group
    ]
    if missing:
        whole = sum(all(tensor in group for tensor in kind.tensors) for group in layers.values())
        raise ToolError(
            f"{file.path} is a {name} adapter and {listed(missing, 'factor')} missing; "
            f"{whole} of {len(layers)} layers are complete",
            HINT,
        )
    return kind


def _layer(file: SafetensorsFile, settings: AdapterSettings, kind: Kind, name: str, group: Group) -> LayerFactors:
    wanted = [*kind.tensors, *(own for own in OWN_BASES if kind.svd and own in group)]
    tensors = {tensor: _factor(file, tensor, group[tensor][0]) for tensor in wanted}
    if is_qkv(name) and any(target.regrouped for _, target in group.values()):
        tensors = _native_rows(file.path, name, kind, tensors)
    core = tensors["M_xs" if kind.svd else "lora_A"]
    rank = int(core.shape[0])
    if rank < 1 or (kind.svd and core.shape[1] != rank) or (not kind.svd and tensors["lora_B"].shape[1] != rank):
        other = tensors.get("lora_B", core)
        raise ToolError(
            f"{file.path}: the factors of {name} do not fit each other, {list(other.shape)} and {list(core.shape)}",
            HINT,
        )
    scale = settings.scale(name, rank)
    if "alpha" in group:
        entry = file.entries[group["alpha"][0]]
        one = entry.dtype in (*FLOATS, *INTEGERS) and math.prod(entry.shape) == 1
        alpha = float(file.tensor(group["alpha"][0]).reshape(-1)[0]) if one else math.nan
        if not math.isfinite(alpha):
            raise ToolError(f"{file.path}: {group['alpha'][0]} is not one finite number", HINT)
        scale = alpha / rank
    return LayerFactors(tensors, rank, scale)


def _factor(file: SafetensorsFile, tensor: str, key: str) -> Tensor:
    """Return one factor, 2-D or for magnitudes 1-D. Raises ToolError naming the key."""
    entry = file.entries[key]
    if entry.dtype not in FLOATS:
        raise ToolError(f"{file.path}: {key} is of type {entry.dtype}, not a floating-point one", HINT)
    value = file.tensor(key)
    value = value.float() if value.element_size() == 1 else value  # PyTorch has no E4M3 arithmetic
    flat = tensor.startswith("magnitude")
    if flat and sum(size != 1 for size in value.shape) <= 1:
        value = value.reshape(-1)
    elif not flat and value.dim() > 2 and all(size == 1 for size in value.shape[2:]):
        value = value.flatten(1)  # of a convolution with kernel size 1
    if value.dim() != (1 if flat else 2) or not value.numel():
        raise ToolError(f"{file.path}: {key} has shape {list(entry.shape)}", HINT)
    if not bool(value.isfinite().all()):
        raise ToolError(
            f"{file.path}: {key} has values that are not finite", "the training diverged: use an earlier save"
        )
    return value


def _native_rows(path: Path, layer: str, kind: Kind, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the factors of a to_qkv layer with diffusers' row order q | q2 | k | k2 | v in native order.

    Without differential attention both orders are q | k | v.
    """
    if "lora_A" in tensors and tensors["lora_B"].shape[0] != QKV_PARTS * tensors["lora_A"].shape[1]:
        return tensors
    by_rows = ("lora_B", "U", "magnitude_r" if kind.columns else "magnitude")
    return {
        name: reordered(path, f"{layer} {name}", value, NATIVE_ORDER) if name in by_rows else value
        for name, value in tensors.items()
    }


def reordered(path: Path, key: str, value: Tensor, order: tuple[int, ...]) -> Tensor:
    """Reorder the five equal parts of to_qkv's rows. Raises ToolError for another number of rows."""
    if value.shape[0] % QKV_PARTS:
        raise ToolError(f"{path}: {key} has {value.shape[0]} rows, not five equal parts", HINT)
    return value.unflatten(0, (QKV_PARTS, -1))[list(order)].flatten(0, 1)


def _require_one_rank(path: Path, settings: AdapterSettings, layers: Mapping[str, LayerFactors]) -> None:
    for name, layer in layers.items():
        stated = settings.stated_rank(name)
        if stated is not None and stated != layer.rank:
            raise ToolError(
                f"{path}: {name} has rank {layer.rank} and its settings say {stated}", "write the file again as trained"
            )
    ranks = sorted({layer.rank for layer in layers.values()})
    if len(ranks) > 1 and not settings.rank_pattern and settings.source:
        raise ToolError(f"{path}: layers of ranks {ranks} and no rank_pattern", "write the file again as trained")


def _is_zero(layer: LayerFactors) -> bool:
    core = layer.tensors.get("lora_B", layer.tensors.get("M_xs"))
    return core is None or not bool(core.any()) or layer.scale == 0


def listed(names: list[str], noun: str) -> str:
    """Return "3 layers (a, b, ...) are", with at most MAX_NAMED names."""
    shown = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
    return f"{len(names)} {noun} ({shown}) is" if len(names) == 1 else f"{len(names)} {noun}s ({shown}) are"


def _hint(layers: Mapping[str, Group]) -> str:
    return "--lora-partial leaves them out and uses the others" if layers else HINT
