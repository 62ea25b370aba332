"""Track the largest activation codes of a DiT's FP8 linear layers: adapters may exceed the calibrated range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from sa3_trt_core.lora.layers import layer_of_role
from sa3_trt_core.torch_models.dit.model import Dit

FULL_CODE = 448.0  # E4M3's limit: the value is at or beyond the calibrated range


class RangeWatch:
    """Largest activation code per FP8 linear layer of a DiT: text layers once per text, block layers at every step."""

    def __init__(self, dit: Dit) -> None:
        blocks = {
            f"blocks.{i}.{name}": one for i, block in enumerate(dit.blocks) for name, one in block.products.items()
        }
        self._products = {role: one for role, one in (blocks | dit.front.products).items() if one.is_fp8}
        self._largest: dict[str, Tensor] = {}
        self.steps = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the codes of steps run inside this context. No step may be captured in or replayed from a graph."""
        for role, product in self._products.items():
            product.watchers.append(partial(self._note, role))
        try:
            yield
        finally:
            for product in self._products.values():
                product.watchers.clear()

    def saturated(self) -> list[str]:
        """Return the native names of the layers whose activations reached the limit of E4M3's range."""
        return [layer_of_role(role) for role, code in self._largest.items() if float(code) >= FULL_CODE]

    def _note(self, role: str, codes: Tensor) -> None:
        code, before = codes.float().abs().amax(), self._largest.get(role)
        self._largest[role] = code if before is None else code.maximum(before)
