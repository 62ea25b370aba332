"""Run DiT steps: conditioning is recomputed for changed rows only; on a GPU each (batch, length) is one CUDA graph."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sa3_trt_core.cuda_graph import capture
from sa3_trt_core.shapes import LOCAL_CHANNELS
from sa3_trt_core.torch_models.dit.model import Dit, RowConditioning
from sa3_trt_core.torch_models.dit.range_watch import RangeWatch
from sa3_trt_core.torch_models.kernels.graphs import Captured

if TYPE_CHECKING:
    from sa3_trt_core.conditioning import Conditioning

MAX_SLOTS = 8  # shapes with a kept graph, activations and cross keys (a ring runs 1 to 8 rows); least recently used out
MAX_LEVELS = 256  # kept modulations, one per (sigma, seconds): 1 MB each at full size
TEXT = ("t5_hidden", "t5_mask", "seconds_total")
WATCHED_STEPS = 8  # steps checked after adapters change: one generation; then graph replay resumes
CONDITIONING = ("t5_hidden", "t5_mask", "seconds_total", "local_add_cond")


class Runner:
    """Runner of a Dit. The conditioning of a row is recomputed only if it changed since the last call."""

    def __init__(self, dit: Dit, device: torch.device) -> None:
        self.dit, self._device = dit, device
        self._slots: OrderedDict[tuple[int, int, bool], _GraphSlot] = OrderedDict()
        self._levels: OrderedDict[tuple[float, float], Tensor] = OrderedDict()
        self._row_keys: Captured | None = None  # graph for `rows_velocity`
        self._watch: RangeWatch | None = None  # the watched steps run without a graph
        self._current: tuple[_GraphSlot, dict[str, Tensor], list[int | None]] | None = None

    def velocity(self, x: Tensor, t: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Return the velocity (B, 256, L) fp32 for x (B, 256, L), t (B,) and the CONDITIONING tensors (first axis B).

        The result is on the runner's device and valid until the next call.
        """
        return self.prepared(x, t, conditioning)()

    def prepared(self, x: Tensor, t: Tensor, conditioning: dict[str, Tensor]) -> Callable[[], Tensor]:
        """Copy the inputs into their slot; return the call that computes the velocity (on a GPU, a graph replay)."""
        watch = self._active_watch()
        with nullcontext() if watch is None else watch.watching():
            slot = self._slot_of(x, conditioning, watch is not None)
        return self._loaded(slot, x, t.tolist(), conditioning["seconds_total"].tolist())

    def rows_velocity(self, x: Tensor, t: Tensor, rows: Sequence[Conditioning]) -> Tensor:
        """Return `velocity` for one conditioning object (batch 1, on the runner's device) per row.

        A row is unchanged if its object is the same. On a GPU, with t (R,) on the CPU, the call does not synchronise.
        """
        self._current = None
        slot = self._slot(x.shape[0], x.shape[2], any(row.keeps for row in rows))
        watch = self._active_watch()
        with nullcontext() if watch is None else watch.watching():
            slot.update_rows(rows, partial(self._keys_of_row, watched=watch is not None))
        return self._loaded(slot, x, t.tolist(), [row.durations[0] for row in rows])()

    def _loaded(
        self, slot: _GraphSlot, x: Tensor, levels: Sequence[float], seconds: Sequence[float]
    ) -> Callable[[], Tensor]:
        """Copy x and the modulation of each row into a slot; return the call that runs it."""
        modulations = [self._modulation(*pair) for pair in zip(levels, seconds, strict=True)]
        torch.stack(modulations, dim=2, out=slot.modulation)
        slot.x.copy_(x)
        watch = self._active_watch()
        return slot.run if watch is None else partial(slot.run_under, watch)

    def _keys_of_row(self, row: Conditioning, watched: bool) -> Tensor:
        """Return the cross keys (depth, 1, T, 3 C) of one row; the next call overwrites them.

        On a GPU a CUDA graph computes them unless `watched`: launching 24 layers one by one takes 10 ms, which delays a
        new row.
        """
        inputs = {name: getattr(row, name).to(self._device) for name in TEXT}
        if self._device.type != "cuda" or watched:
            return self._text_keys(**inputs)
        if self._row_keys is None:
            self._row_keys = Captured(self._text_keys, inputs, self._device)
        return self._row_keys(inputs)

    def _text_keys(self, t5_hidden: Tensor, t5_mask: Tensor, seconds_total: Tensor) -> Tensor:
        return self.dit.keys(t5_hidden, t5_mask, seconds_total)

    def _active_watch(self) -> RangeWatch | None:
        """Return the RangeWatch during the first WATCHED_STEPS steps with new adapters; None afterwards."""
        return self._watch if self._watch is not None and self._watch.steps < WATCHED_STEPS else None

    def weights_changed(self) -> None:
        """Drop results computed from weights that were replaced in place; graphs read the new weights."""
        self._levels.clear()
        self._current = None
        for slot in self._slots.values():
            slot.forget()

    def watch_ranges(self, watch: bool) -> None:
        """Start or stop recording activation codes at the next step; in 16 bits there are no codes to record."""
        self._watch = RangeWatch(self.dit) if watch and self.dit.sizes.precision == "fp8" else None

    def saturated(self) -> list[str]:
        """Return the native names of layers whose activations exceeded the calibrated range, and stop checking."""
        watch, self._watch = self._watch, None
        return watch.saturated() if watch is not None else []

    def close(self) -> None:
        """Free all graphs and the cached conditioning and modulation."""
        self._slots.clear()
        self._current = self._row_keys = None
        self._levels.clear()

    def _slot_of(self, x: Tensor, conditioning: dict[str, Tensor], watched: bool) -> _GraphSlot:
        """Return the slot for a shape with the conditioning of its rows up to date, without a graph if `watched`.

        If the tensors are the same objects as in the last call and unmodified, skip the comparison, which would cost
        as many kernel launches as a step.
        """
        versions = [_version(conditioning[name]) for name in CONDITIONING]
        if self._current is not None:
            slot, before, known = self._current
            if known == versions and all(conditioning[name] is before[name] for name in CONDITIONING):
                return slot
        rows, _, frames = x.shape
        slot = self._slot(rows, frames, bool(conditioning["local_add_cond"].any()))
        slot.update_conditioning(conditioning, watched)
        self._current = slot, {name: conditioning[name] for name in CONDITIONING}, versions
        return slot

    def _slot(self, rows: int, frames: int, keeps: bool) -> _GraphSlot:
        """Return the slot for a shape, created if new; the least recently used slot is dropped."""
        key = (rows, frames, keeps)
        kept = self._slots.pop(key, None)
        slot = kept or _GraphSlot(self.dit, self._device, *key)
        self._slots[key] = slot
        while len(self._slots) > MAX_SLOTS:
            self._slots.popitem(last=False)
        return slot

    def _modulation(self, t: float, seconds: float) -> Tensor:
        key = (t, seconds)
        modulation = self._levels.pop(key, None)
        if modulation is None:
            level, duration = (torch.tensor([value], device=self._device) for value in key)
            modulation = self.dit.modulation(level, duration)[:, :, 0]
        self._levels[key] = modulation
        while len(self._levels) > MAX_LEVELS:
            self._levels.popitem(last=False)
        return modulation


class _GraphSlot:
    """Static tensors of one shape, and on a GPU the CUDA graph that reads and writes them."""

    def __init__(self, dit: Dit, device: torch.device, rows: int, frames: int, keeps: bool) -> None:
        sizes = dit.sizes
        self._dit, self._keeps = dit, keeps
        self._last_conditioning: dict[str, Tensor] | None = None
        self._known: list[weakref.ref[Conditioning] | None] = [None] * rows  # set by `update_rows`
        self._has_no_local = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._velocity: Tensor | None = None
        self._text: Captured | None = None
        self.x = torch.zeros((rows, dit.latent_channels, frames), device=device)
        self.modulation = torch.zeros((7, sizes.depth, rows, sizes.width), device=device)
        local = (rows, frames) if keeps else (1, 1)
        keys = (sizes.depth, rows, dit.cross_tokens, 3 * sizes.width)
        self._conditioning = RowConditioning(
            torch.zeros(keys, dtype=torch.float16, device=device),
            torch.zeros((sizes.depth, *local, sizes.width), dtype=torch.float16, device=device),
        )

    def update_conditioning(self, conditioning: dict[str, Tensor], watched: bool = False) -> None:
        """Recompute the conditioning of rows that changed since the last call, without a graph if `watched`."""
        changed = self._changed(conditioning)
        if not changed:
            return
        self._known = [None] * len(self._known)
        self._update_text({name: conditioning[name][changed] for name in TEXT}, changed, watched)
        local = conditioning["local_add_cond"]
        if self._keeps:
            self._conditioning.local[:, changed] = self._dit.local(local[changed].to(self.x.device))
        else:
            self._update_zero_local()
        self._last_conditioning = {name: conditioning[name].clone() for name in CONDITIONING}

    def update_rows(self, rows: Sequence[Conditioning], keys_of: Callable[[Conditioning], Tensor]) -> None:
        """Recompute the conditioning of rows with a new object; `keys_of` returns a row's keys (depth, 1, T, 3 C)."""
        changed = [row for row, kept in enumerate(self._known) if kept is None or kept() is not rows[row]]
        if not changed:
            return
        for row in changed:
            self._conditioning.keys[:, row].copy_(keys_of(rows[row])[:, 0])
            if self._keeps:
                self._conditioning.local[:, row].copy_(self._dit.local(rows[row].local_add_cond)[:, 0])
            self._known[row] = weakref.ref(rows[row])
        if not self._keeps:
            self._update_zero_local()
        self._last_conditioning = None

    def _update_zero_local(self) -> None:
        """Compute the local embedding for an all-zero local_add_cond: one constant per block."""
        if not self._has_no_local:
            zero = torch.zeros((1, LOCAL_CHANNELS, 1), device=self.x.device)
            self._conditioning.local.copy_(self._dit.local(zero))
            self._has_no_local = True

    def run(self) -> Tensor:
        """Return the velocity for the slot's inputs."""
        if self.x.device.type != "cuda":
            return self._dit.step(self.x, self.modulation, self._conditioning)
        if self._graph is None:
            self._capture()
        assert self._graph is not None and self._velocity is not None
        self._graph.replay()
        return self._velocity

    def run_under(self, watch: RangeWatch) -> Tensor:
        """Return the velocity for the slot's inputs, without a graph, while `watch` records activation codes."""
        watch.steps += 1
        with watch.watching():
            return self._dit.step(self.x, self.modulation, self._conditioning)

    def forget(self) -> None:
        """Mark the conditioning of every row as changed; the next call recomputes it."""
        self._last_conditioning = None
        self._known = [None] * len(self._known)
        self._has_no_local = False

    def _update_text(self, inputs: dict[str, Tensor], changed: list[int], watched: bool) -> None:
        """Compute the cross keys of the changed rows; if all rows change again, by a CUDA graph."""
        whole = len(changed) == self.x.shape[0]
        if self.x.device.type == "cuda" and self._last_conditioning is not None and whole and not watched:
            if self._text is None:
                self._text = Captured(self._all_keys, inputs, self.x.device)
            self._text(inputs)
            return
        self._conditioning.keys[:, changed] = self._dit.keys(*(inputs[name].to(self.x.device) for name in TEXT))

    def _all_keys(self, t5_hidden: Tensor, t5_mask: Tensor, seconds_total: Tensor) -> Tensor:
        return self._conditioning.keys.copy_(self._dit.keys(t5_hidden, t5_mask, seconds_total))

    def _changed(self, conditioning: dict[str, Tensor]) -> list[int]:
        last = self._last_conditioning
        if last is None:
            return list(range(self.x.shape[0]))
        rows: set[int] = set()
        for name in CONDITIONING:
            if not torch.equal(conditioning[name], last[name]):
                differs = (conditioning[name] != last[name]).reshape(self.x.shape[0], -1).any(1)
                rows.update(differs.nonzero().flatten().tolist())
        return sorted(rows)

    def _capture(self) -> None:
        self._graph, self._velocity = capture(lambda: self._dit.step(self.x, self.modulation, self._conditioning))


def _version(value: Tensor) -> int | None:
    """Return the count of in-place writes of a tensor; None in inference mode, where PyTorch does not count."""
    return None if value.is_inference() else value._version
