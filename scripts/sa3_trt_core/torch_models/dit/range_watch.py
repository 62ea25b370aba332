"""Largest activation codes of the quantised products while a DiT runs: an adapter may leave the calibrated range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from sa3_trt_core.lora.layers import layer_of_role
from sa3_trt_core.torch_models.dit.model import Dit

FULL_CODE = 448.0  # a code at E4M3's limit is a value at or beyond the headroom


class RangeWatch:
    """Reads the codes of every quantised product of a DiT, the text's once a text and the blocks' at every step."""

    def __init__(self, dit: Dit) -> None:
        blocks = {
            f"blocks.{i}.{name}": one for i, block in enumerate(dit.blocks) for name, one in block.products.items()
        }
        self._products = {role: one for role, one in (blocks | dit.front.products).items() if one.is_fp8}
        self._largest: dict[str, Tensor] = {}
        self.steps = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs in this block; nothing in it may be captured in a graph or replayed from one."""
        for role, product in self._products.items():
            product.watchers.append(partial(self._note, role))
        try:
            yield
        finally:
            for product in self._products.values():
                product.watchers.clear()

    def saturated(self) -> list[str]:
        """Return the native names of the products whose activations reached the end of E4M3's range."""
        return [layer_of_role(role) for role, code in self._largest.items() if float(code) >= FULL_CODE]

    def _note(self, role: str, codes: Tensor) -> None:
        code, before = codes.float().abs().amax(), self._largest.get(role)
        self._largest[role] = code if before is None else code.maximum(before)
