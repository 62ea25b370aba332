"""Merge adapters into a loaded DiT: in fp32 from 16-bit weights, in place in the tensors that kernels and graphs read.

No tensor moves and no shape changes, so every compiled kernel and captured CUDA graph stays valid. In FP8 a changed
weight gets new channel scales and codes by nearest rounding; activation scales stay those of the base build. Weights
that no adapter changes keep the codes from the build.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from sa3_trt_core.artifacts import manifest
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.layers import NATIVE_ORDER, QKV_PARTS, REGROUPED, layer_of_role, roles
from sa3_trt_core.lora.lora_set import LoraSet
from sa3_trt_core.lora.safetensors_file import SafetensorsFile
from sa3_trt_core.lora.svd_bases import FOLDER_SUFFIX, SvdBases
from sa3_trt_core.shapes import LOCAL_CHANNELS
from sa3_trt_core.torch_models.dit.merged_cache import MergedCache
from sa3_trt_core.torch_models.dit.model import Dit

E4M3_MAX = 448.0
FP16_MAX = 65504.0
SCALE_FLOOR = 2.0**-14  # the smallest normal fp16, in which a build stores its scales
CONVOLUTIONS = ("preprocess", "postprocess")
KEPT_BYTES = 4 << 30  # limit for merged weights in memory, cached by adapter-set digest
# Relative L2 error against the weight: 0.026 for nearest codes, 0.04 for GPTQ's, 1.4 for another model's weights.
MAX_DEVIATION = 0.15


class AdapterSlot:
    """Adapter set of one loaded DiT. `own` is its packed file, `base` the packed FP16-mixed file of the same model."""

    def __init__(self, dit: Dit, own: Path, base: Path, rebuild: str) -> None:
        """Open both files. Raises ToolError if `base` is missing or incomplete; the hint is the command `rebuild`."""
        if base != own:
            reason = f"no engine {base}" if not base.is_file() else manifest.verify_manifest(base)
            if reason is not None:
                raise ToolError(f"adapters are merged from 16-bit weights: {reason}", f"build them: {rebuild}")
        self._dit = dit
        self._base_path = base
        self._own, self._base = SafetensorsFile(own), SafetensorsFile(base)
        depth = dit.sizes.depth
        self._roles = {layer_of_role(role): role for role in roles(depth) if _key(role) in self._base.entries}
        self._changed: frozenset[str] = frozenset()
        self._compared: set[str] = set()
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._disk = MergedCache(own, base)

    @torch.no_grad()
    def set(self, loras: LoraSet, checkpoint: Path | None = None) -> None:
        """Replace the DiT's adapter set. Raises ToolError and leaves the DiT unchanged if the set cannot be merged.

        `checkpoint` is a native model.safetensors, which gives the SVD bases for -xs adapters.
        """
        loras.require_fits(self._shapes(), str(self._own.path))
        digest = loras.digest
        tensors = self._kept.pop(digest, None)
        if tensors is None:
            tensors = self._found_or_merged(loras, checkpoint)
        self._keep(digest, tensors)
        layers = loras.layers & self._roles.keys()
        for layer in self._changed - layers:
            for name in self._names(self._roles[layer]):
                self._dit.packed.tensor(name).copy_(self._stored(name))
        for name, value in tensors.items():
            self._dit.packed.tensor(name).copy_(value)
        self._changed = frozenset(layers)
        self._dit.refresh()

    def _found_or_merged(self, loras: LoraSet, checkpoint: Path | None) -> dict[str, Tensor]:
        """Return the set's tensors. On a CPU they are read from the disk cache, or merged and written to it."""
        on_cpu = self._dit.packed.tensor("memory").device.type == "cpu"
        stored = self._disk.read(loras, checkpoint) if on_cpu else None
        if stored is not None:
            return stored
        tensors = self._merged(loras, SvdBases(Path(f"{self._base_path}{FOLDER_SUFFIX}"), checkpoint))
        if on_cpu:
            self._disk.write(loras, checkpoint, tensors)
        return tensors

    def _merged(self, loras: LoraSet, bases: SvdBases) -> dict[str, Tensor]:
        """Return every tensor of the packed DiT that the set changes, on the DiT's device."""
        tensors: dict[str, Tensor] = {}
        for layer in sorted(loras.layers & self._roles.keys()):
            role = self._roles[layer]
            original = self._original(role)
            weight = self._packed_layout(role, loras.merged(layer, self._native(role, original), bases))
            largest = float(weight.abs().max())
            if not largest <= FP16_MAX:  # also True for NaN
                raise ToolError(
                    f"the merged weight of {layer} reaches {largest:g}, beyond fp16",
                    "lower the strengths, or use fewer adapters",
                )
            key = _key(role)
            if original.dtype == torch.float16:
                weight = weight.half().float()  # rounded as a merged graph stores it, so that the codes are equal
            if f"{role}.activation_scale" in self._own.entries:
                self._require_same(role, original)
                tensors[f"{role}.weight_scale"], tensors[key] = quantized(weight)
            else:
                tensors[key] = weight.to(self._dit.packed.tensor(key).dtype)
        return tensors

    def _original(self, role: str) -> Tensor:
        device = self._dit.packed.tensor(_key(role)).device
        return self._base.tensor(_key(role)).to(device)

    def _native(self, role: str, packed: Tensor) -> Tensor:
        """Return a packed weight in the checkpoint's layout: no padded columns, rows of to_qkv q | k | v | q2 | k2."""
        weight = packed.float()[:, : self._columns(role, packed)]
        return _reordered(weight, NATIVE_ORDER) if role.endswith("self_qkv") else weight

    def _packed_layout(self, role: str, native: Tensor) -> Tensor:
        weight = _reordered(native, REGROUPED) if role.endswith("self_qkv") else native
        extra = self._base.entries[_key(role)].shape[1] - weight.shape[1]
        return torch.nn.functional.pad(weight, (0, extra)) if extra else weight

    def _columns(self, role: str, packed: Tensor) -> int:
        true = {"local_in": LOCAL_CHANNELS, "ff_out": self._dit.sizes.inner}.get(role.rpartition(".")[2])
        return int(packed.shape[1]) if true is None else true

    def _shapes(self) -> dict[str, tuple[int, int]]:
        shapes = {}
        for layer, role in self._roles.items():
            entry = self._base.entries[_key(role)]
            packed = torch.empty(entry.shape, device="meta")
            shapes[layer] = (entry.shape[0], self._columns(role, packed))
        return shapes

    def _require_same(self, role: str, original: Tensor) -> None:
        """Raise ToolError if the FP8 codes are not those of the 16-bit weight; checked once per layer."""
        if role in self._compared:
            return
        scale = self._stored(f"{role}.weight_scale").to(original.device)
        codes = self._codes(role).to(original.device).float()
        wide = original.float()
        if codes.shape != wide.shape or (codes * scale[:, None] - wide).norm() > MAX_DEVIATION * wide.norm():
            raise ToolError(
                f"{self._own.path} was not made of the weights in {self._base_path}: {layer_of_role(role)} differs",
                "build both engines from the graphs of one model",
            )
        self._compared.add(role)

    def _codes(self, role: str) -> Tensor:
        return self._stored(_key(role))

    def _stored(self, name: str) -> Tensor:
        """Return a tensor from the DiT's own file, without adapters."""
        return self._own.tensor(name)

    def _names(self, role: str) -> list[str]:
        scale = f"{role}.weight_scale"
        return [_key(role), *([scale] if scale in self._own.entries else [])]

    def _keep(self, digest: str, tensors: dict[str, Tensor]) -> None:
        """Cache the most recently used merged weights, up to KEPT_BYTES; a GPU must have as much free besides."""
        size, device = _bytes(tensors), self._dit.packed.tensor("memory").device
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < KEPT_BYTES + size:
            return
        self._kept[digest] = tensors
        while sum(map(_bytes, self._kept.values())) > KEPT_BYTES:
            self._kept.popitem(last=False)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp16-representable scales (N,) fp32 and E4M3 codes (N, K), nearest and saturated, of a weight (N, K)."""
    wanted = (weight.abs().amax(dim=1) / E4M3_MAX).clamp(min=SCALE_FLOOR)
    stored = wanted.half()
    above = (stored.view(torch.int16) + 1).view(torch.float16)
    scale = torch.where(stored.float() < wanted, above, stored).float()  # rounded up, so that amax still fits
    codes = (weight / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return scale, codes


def _key(role: str) -> str:
    return role if role in CONVOLUTIONS else f"{role}.weight"


def _reordered(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    return rows.unflatten(0, (QKV_PARTS, -1))[list(order)].flatten(0, 1)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())
