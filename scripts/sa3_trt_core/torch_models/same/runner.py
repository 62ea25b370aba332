"""Run a packed SAME decoder: CUDA graphs for repeated shapes, samples copied to the host through pinned memory."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from sa3_trt_core.torch_models.kernels.graphs import Captured
from sa3_trt_core.torch_models.same.model import TOKENS_IN_ONE, TOKENS_WITH_LITTLE_MEMORY, Same, SameOps
from sa3_trt_core.torch_models.same.weights import Packed

KEPT_GRAPHS = 2  # shapes with a kept graph and activations
MIN_FREE_BYTES_FOR_WIDE_PIECES = 2 << 30  # free GPU memory not reserved by PyTorch
PIECE_SIZES = (None, TOKENS_WITH_LITTLE_MEMORY, 1024, 512)  # tokens per piece, tried in this order when out of memory


class DecoderRunner:
    """Runner of one packed decoder on one device."""

    def __init__(self, packed: Packed, ops: SameOps, device: torch.device) -> None:
        self.sizes = packed.sizes
        self._models = [Same(packed, ops, tokens_at_once) for tokens_at_once in PIECE_SIZES]
        self._device = device
        self._seen: OrderedDict[tuple[int, ...], Captured | None] = OrderedDict()

    def pcm(self, latents: Tensor) -> Tensor:
        """Return samples (R, L * 4096, 2) int16 in host memory for latents (R, C, L) fp32 on any device.

        Raises torch.OutOfMemoryError if even the smallest pieces do not fit.
        """
        if self._device.type != "cuda":
            return self._models[0].pcm(latents)
        samples = self._on_gpu(latents)
        host = torch.empty(samples.shape, dtype=samples.dtype, pin_memory=True)
        host.copy_(samples, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return host

    def rows_at_once(self, frames: int) -> int:
        """Return the number of rows, each with `frames` latent frames, that run in one piece."""
        return max(1, TOKENS_IN_ONE // (frames * (self.sizes.stride + 1)))

    def close(self) -> None:
        """Free the graphs."""
        self._seen.clear()

    def _on_gpu(self, latents: Tensor) -> Tensor:
        """Return the samples, by a CUDA graph for a repeated shape of up to TOKENS_IN_ONE tokens.

        A graph saves time only from the second run on. Longer sounds gain nothing: their compute hides the launches.
        """
        shape = tuple(latents.shape)
        again = shape in self._seen
        graph = self._seen.pop(shape, None)
        tokens = shape[0] * shape[2] * (self.sizes.stride + 1)
        if graph is None and again and tokens <= TOKENS_IN_ONE:
            graph = self._captured(latents)
        self._seen[shape] = graph
        while len(self._seen) > KEPT_GRAPHS:
            self._seen.popitem(last=False)
        return self._eager(latents.to(self._device)) if graph is None else graph({"latents": latents})

    def _captured(self, latents: Tensor) -> Captured | None:
        """Return the graph for a shape; None if its activations do not fit in memory."""
        try:
            return Captured(self._models[0].pcm, {"latents": latents}, self._device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None

    def _has_plenty(self) -> bool:
        """Return True if the widest pieces may be used: on a CPU, or with MIN_FREE_BYTES_FOR_WIDE_PIECES free."""
        return self._device.type != "cuda" or torch.cuda.mem_get_info(self._device)[0] >= MIN_FREE_BYTES_FOR_WIDE_PIECES

    def _eager(self, latents: Tensor) -> Tensor:
        for model in self._models[0 if self._has_plenty() else 1 : -1]:
            try:
                return model.pcm(latents)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        return self._models[-1].pcm(latents)
