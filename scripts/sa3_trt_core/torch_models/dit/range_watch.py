"""Largest activation codes of the quantised products while a DiT runs: an adapter may leave the calibrated range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sa3_trt_core.lora.layers import layer_of_role
from sa3_trt_core.torch_models.dit.model import Dit

FULL_CODE = 448.0  # a code at E4M3's limit is a value at or beyond the headroom
# The order in which a step's operations give the activations of a block's products.
STEP_ORDER = ("self_qkv", "self_out", "cross_q", "cross_out", "ff_in", "ff_out")
WATCHED = ("normed", "add_normed", "self_attention", "cross_attention", "gated")


class RangeWatch:
    """Stands between a DiT and its operations for some steps, and reads the codes that they hand on."""

    def __init__(self, dit: Dit) -> None:
        self._dit = dit
        self._ops: Any = None
        self._place = self.steps = 0
        self._largest: dict[str, Tensor] = {}
        self._order = [f"blocks.{index}.{name}" for index in range(dit.sizes.depth) for name in STEP_ORDER]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Watch the one step that runs in this block; nothing is replayed from a graph meanwhile."""
        self._place, self._ops = 0, self._dit.ops
        self.steps += 1
        self._dit.ops = self
        try:
            yield
        finally:
            self._dit.ops = self._ops

    def saturated(self) -> list[str]:
        """Return the native names of the products whose activations reached the end of E4M3's range."""
        return [layer_of_role(role) for role, code in self._largest.items() if float(code) >= FULL_CODE]

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)
        if name not in WATCHED:
            return operation

        def watched(*args: Any, **options: Any) -> Any:
            result = operation(*args, **options)
            self._note(result[1] if isinstance(result, tuple) else result)
            return result

        return watched

    def _note(self, handed_on: Tensor) -> None:
        if self._place < len(self._order) and handed_on.element_size() == 1:  # E4M3 codes; 16 bits have no scale
            role, code = self._order[self._place], handed_on.float().abs().amax()
            before = self._largest.get(role)
            self._largest[role] = code if before is None else code.maximum(before)
        self._place += 1
