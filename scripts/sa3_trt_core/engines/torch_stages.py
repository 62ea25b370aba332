"""Packed PyTorch engines of the text encoder and the autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sa3_trt_core.engines.packed import PackedEngine, require_kernels, tiles_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sa3_trt_core.torch_models.same.model import Same, SameOps
    from sa3_trt_core.torch_models.same.runner import DecoderRunner
    from sa3_trt_core.torch_models.same.weights import Packed
    from sa3_trt_core.torch_models.t5gemma.model import Encoder, TextOps
    from sa3_trt_core.torch_models.t5gemma.weights import Packed as PackedText

Model = TypeVar("Model")


class TorchTextEncoder(PackedEngine):
    """Engine of T5Gemma in fp32; on a GPU each batch size is one CUDA graph."""

    kind = "t5gemma"

    def __init__(self, path: Path, rebuild: str) -> None:
        super().__init__(path, rebuild)
        self._encoder: Encoder | None = open_text(path, self._place)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return {"hidden_states": (B, 256, 768) fp32} for input_ids and attention_mask (B, 256), on their device."""
        self.require_inputs(inputs)
        encoder = _opened(self._encoder)
        ids, mask = (inputs[name] for name in self.input_names)
        features = self.guarded(lambda: encoder.hidden_states(ids.cpu(), mask.cpu()), "a text")
        return {self.output_names[0]: features.clone() if features.device == ids.device else features.to(ids.device)}

    def close(self) -> None:
        if self._encoder is not None:
            self._encoder.close()
        self._encoder = None


class TorchDecoder(PackedEngine):
    """Engine of a SAME decoder, for any number of rows, with bounded memory; its samples are in host memory."""

    kind = "same-decoder"
    takes_rows = True

    def __init__(self, path: Path, rebuild: str) -> None:
        super().__init__(path, rebuild)
        self._runner: DecoderRunner | None = open_decoder(path, self._place)

    def rows_at_once(self, frames: int) -> int:
        """Return the number of rows, each with `frames` latent frames, that are decoded in one piece."""
        return _opened(self._runner).rows_at_once(frames)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return {"pcm": (R, L * 4096, 2) int16} for latent (R, 256, L) on any device."""
        self.require_inputs(inputs)
        runner, latents = _opened(self._runner), inputs[self.input_names[0]].float()
        rows, _, frames = latents.shape
        pcm = self.guarded(lambda: runner.pcm(latents), f"{rows} sounds of {frames} latent frames")
        return {self.output_names[0]: pcm}

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._runner = None


class TorchEncoder(PackedEngine):
    """Engine of a SAME encoder, with bounded memory."""

    kind = "same-encoder"
    takes_rows = True

    def __init__(self, path: Path, rebuild: str) -> None:
        super().__init__(path, rebuild)
        self._model: Same | None = open_same(path, self._place)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return {"latent": (R, 256, N / 4096) fp32} for audio (R, 2, N), on the device of the audio."""
        self.require_inputs(inputs)
        model, audio = _opened(self._model), inputs[self.input_names[0]]
        latents = self.guarded(lambda: model.latents(audio.to(self._place)), f"{audio.shape[-1]} samples")
        return {self.output_names[0]: latents.to(audio.device)}

    def close(self) -> None:
        self._model = None


def open_text(path: Path, device: torch.device) -> Encoder:
    """Load a packed text encoder and its operations for `device`. Raises ToolError."""
    from sa3_trt_core.torch_models.t5gemma.model import Encoder
    from sa3_trt_core.torch_models.t5gemma.weights import Packed

    packed = Packed.load(path, device)
    return Encoder(packed, text_operations(packed, device), device)


def text_operations(packed: PackedText, device: torch.device) -> TextOps:
    """Return the operations between the linear layers of a text encoder; on a GPU without Triton, in plain PyTorch."""
    if device.type == "cpu" or find_spec("triton") is None:
        from sa3_trt_core.torch_models.t5gemma.reference_ops import ReferenceOps

        return ReferenceOps(packed)
    from sa3_trt_core.torch_models.t5gemma.triton_ops import TritonOps

    return TritonOps(packed)


def open_decoder(path: Path, device: torch.device) -> DecoderRunner:
    """Load a packed decoder and its operations for `device`. Raises ToolError."""
    from sa3_trt_core.torch_models.same.runner import DecoderRunner
    from sa3_trt_core.torch_models.same.weights import Packed

    packed = Packed.load(path, device)
    return DecoderRunner(packed, same_operations(packed, device, path), device)


def open_same(path: Path, device: torch.device) -> Same:
    """Load a packed SAME decoder or encoder and its operations for `device`. Raises ToolError."""
    from sa3_trt_core.torch_models.same.model import Same
    from sa3_trt_core.torch_models.same.weights import Packed

    packed = Packed.load(path, device)
    return Same(packed, same_operations(packed, device, path))


def same_operations(packed: Packed, device: torch.device, path: Path) -> SameOps:
    """Return the operations between the linear layers of a SAME decoder or encoder. Raises ToolError."""
    if device.type == "cpu":
        from sa3_trt_core.torch_models.same.reference_ops import ReferenceOps

        return ReferenceOps(packed.rates)
    require_kernels(path, packed.sizes.precision == "fp8", device, "the fp16 decoder")
    from sa3_trt_core.torch_models.same.triton_ops import TritonOps, read_tiles

    return TritonOps(packed.rates, read_tiles(tiles_path(path)))


def _opened(model: Model | None) -> Model:
    if model is None:
        raise RuntimeError("this engine is closed")
    return model
