"""PyTorch backend for packed networks: Triton kernels on an NVIDIA GPU (no TensorRT), plain operations on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.engines.backend import Backend
from sa3_trt_core.engines.packed import PackedEngine, require_kernels, tiles_path
from sa3_trt_core.targets import Target

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sa3_trt_core.conditioning import Conditioning
    from sa3_trt_core.engines.base import GraphEngine
    from sa3_trt_core.lora.lora_set import LoraSet
    from sa3_trt_core.torch_models.dit.adapters import AdapterSlot
    from sa3_trt_core.torch_models.dit.model import BlockOps
    from sa3_trt_core.torch_models.dit.runner import Runner
    from sa3_trt_core.torch_models.dit.weights import Packed


class TorchEngine(PackedEngine):
    """Engine of one packed DiT (build_from_onnx.py --backend torch)."""

    kind = "dit"

    def __init__(self, path: Path, rebuild: str) -> None:
        super().__init__(path, rebuild)
        self._adapters: AdapterSlot | None = None
        self._runner: Runner | None = open_runner(path, self._place)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return {"velocity": (B, 256, L) fp32}, on the device of x, for the six inputs of the contract."""
        self.require_inputs(inputs)
        if self._runner is None:
            raise RuntimeError("this engine is closed")
        conditioning = {name: value.float() for name, value in inputs.items() if name not in ("x", "t")}
        runner, (rows, _, frames) = self._runner, inputs["x"].shape
        velocity = self.guarded(
            lambda: runner.velocity(inputs["x"].float(), inputs["t"].float(), conditioning),
            f"{rows} rows of {frames} latent frames",
        )
        place = inputs["x"].device
        return {self.output_names[0]: velocity.clone() if velocity.device == place else velocity.to(place)}

    def rows_velocity(self, x: Tensor, t: Tensor, rows: Sequence[Conditioning]) -> Tensor:
        """Return the velocity (R, 256, L) fp32 for rows with conditioning on the engine's device; see RowsEngine."""
        if self._runner is None:
            raise RuntimeError("this engine is closed")
        runner = self._runner
        return self.guarded(
            lambda: runner.rows_velocity(x, t, rows), f"{x.shape[0]} rows of {x.shape[-1]} latent frames"
        )

    def set_loras(self, loras: LoraSet, base: Path, rebuild: str, checkpoint: Path | None = None) -> None:
        """Merge adapters into the loaded weights, in place; an empty set restores the engine's own weights.

        `base` is the packed FP16-mixed engine of the same model, `rebuild` the command that builds it, `checkpoint` the
        native weights, which give the SVD bases for -xs adapters. Raises ToolError.
        """
        if self._runner is None:
            raise RuntimeError("this engine is closed")
        if self._adapters is None:
            from sa3_trt_core.torch_models.dit.adapters import AdapterSlot

            self._adapters = AdapterSlot(self._runner.dit, self._path, base, rebuild)
        self._adapters.set(loras, checkpoint)
        self._runner.weights_changed()
        self._runner.watch_ranges(bool(loras))

    def saturated(self) -> list[str]:
        """Return the layers whose activations exceeded the calibrated range since `set_loras`, and stop checking."""
        return [] if self._runner is None else self._runner.saturated()

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._runner = self._adapters = None


def open_packed(path: Path, target: Target, rebuild: str, onnx: Path | None) -> GraphEngine:
    """Return the engine of a packed network. Its manifest names its graph; the build compared the two."""
    if target.kind == TorchEngine.kind:
        return TorchEngine(path, rebuild)
    from sa3_trt_core.engines.torch_stages import TorchDecoder, TorchEncoder, TorchTextEncoder

    kinds: dict[str, Callable[[Path, str], GraphEngine]] = {
        TorchTextEncoder.kind: TorchTextEncoder, TorchDecoder.kind: TorchDecoder, TorchEncoder.kind: TorchEncoder,
    }  # fmt: skip
    return kinds[target.kind](path, rebuild)


def on_gpu() -> bool:
    """Return True if PyTorch can use this machine's GPU."""
    import torch

    return torch.cuda.is_available()


BACKEND = Backend(
    name="torch",
    label="PyTorch",
    package="torch",
    open=open_packed,
    suffix=".safetensors",
    runs={
        "dit": ("fp16mixed", "fp8"),
        "t5gemma": ("fp32",),
        "same-decoder": ("fp16mixed",),
        "same-encoder": ("fp16mixed",),
    },
    optional=("t5gemma", "same-decoder", "same-encoder"),
    on_cpu=True,
    on_gpu=on_gpu,
    builds_elsewhere=True,
    merges_adapters=True,
)


def open_runner(path: Path, device: torch.device) -> Runner:
    """Return a runner for a packed DiT: kernels on a GPU, plain PyTorch on a CPU. Raises ToolError."""
    from sa3_trt_core.torch_models.dit.model import Dit
    from sa3_trt_core.torch_models.dit.runner import Runner
    from sa3_trt_core.torch_models.dit.weights import Packed

    packed = Packed.load(path, device)
    return Runner(Dit(packed, _operations(packed, device, path)), device)


def _operations(packed: Packed, device: torch.device, path: Path) -> BlockOps:
    """Return the operations between the linear layers. Raises ToolError if FP8 is unsupported or Triton is missing."""
    tables = packed.tensor("cosine"), packed.tensor("sine")
    if device.type == "cpu":
        from sa3_trt_core.torch_models.dit.reference_ops import PlainOps

        return PlainOps(*tables)
    require_kernels(path, packed.sizes.precision == "fp8", device, "`precision=fp16mixed`")
    from sa3_trt_core.torch_models.dit.triton_ops import FusedOps, read_tiles

    return FusedOps(*tables, read_tiles(tiles_path(path)))
