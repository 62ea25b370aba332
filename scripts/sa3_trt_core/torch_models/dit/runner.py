"""Runs a DiT step by step: what a row is told is worked out when it changes, a step is one CUDA graph on a GPU."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sa3_trt_core.cuda_graph import capture
from sa3_trt_core.shapes import LOCAL_CHANNELS
from sa3_trt_core.torch_models.dit.model import Dit, Told
from sa3_trt_core.torch_models.dit.range_watch import RangeWatch
from sa3_trt_core.torch_models.kernels.graphs import Captured

if TYPE_CHECKING:
    from sa3_trt_core.conditioning import Conditioning

KEPT_PLACES = 8  # shapes whose graph, activations and cross keys are kept (a ring runs 1 to 8 rows); the oldest goes
KEPT_LEVELS = 256  # modulations of (sigma, seconds): 1 MB each at full size
TEXT = ("t5_hidden", "t5_mask", "seconds_total")
WATCHED_STEPS = 8  # of a new set of adapters: a generation's; then the graph is replayed again
CONDITIONING = ("t5_hidden", "t5_mask", "seconds_total", "local_add_cond")


class Runner:
    """Velocity of a batch by a Dit. Rows keep their place: one that is told what it was told before costs nothing."""

    def __init__(self, dit: Dit, device: torch.device) -> None:
        self.dit, self._device = dit, device
        self._places: OrderedDict[tuple[int, int, bool], _Place] = OrderedDict()
        self._levels: OrderedDict[tuple[float, float], Tensor] = OrderedDict()
        self._watch: RangeWatch | None = None  # its first steps run operation by operation
        self._current: tuple[_Place, dict[str, Tensor], list[int | None]] | None = None

    def velocity(self, x: Tensor, t: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Velocity (B, 256, L) fp32 of x (B, 256, L) and t (B,); `told` holds CONDITIONING, each with first axis B.

        On the runner's device, and valid until the next call.
        """
        return self.prepared(x, t, told)()

    def prepared(self, x: Tensor, t: Tensor, told: dict[str, Tensor]) -> Callable[[], Tensor]:
        """What `velocity` runs once everything lies in its place: on a GPU the replay of a graph."""
        place = self._place_of(x, told)
        return self._loaded(place, x, t.tolist(), told["seconds_total"].tolist())

    def rows_velocity(self, x: Tensor, t: Tensor, rows: Sequence[Conditioning]) -> Tensor:
        """`velocity` for conditioning (1 row each) on the runner's device that is known again by identity.

        Waits for nothing on a GPU, where t (R,) lies on the CPU.
        """
        self._current = None
        place = self._kept_place(x.shape[0], x.shape[2], any(row.keeps for row in rows))
        place.tell_rows(rows)
        return self._loaded(place, x, t.tolist(), [row.durations[0] for row in rows])()

    def _loaded(
        self, place: _Place, x: Tensor, levels: Sequence[float], seconds: Sequence[float]
    ) -> Callable[[], Tensor]:
        """Put x and the modulation of each row into a place; return what runs it."""
        modulations = [self._modulation(*pair) for pair in zip(levels, seconds, strict=True)]
        torch.stack(modulations, dim=2, out=place.modulation)
        place.x.copy_(x)
        watch = self._watch
        return place.run if watch is None or watch.steps >= WATCHED_STEPS else partial(place.run_under, watch)

    def weights_changed(self) -> None:
        """Forget what was computed from weights that have been replaced in place; graphs read the new ones."""
        self._levels.clear()
        self._current = None
        for place in self._places.values():
            place.forget()

    def watch_ranges(self, watch: bool) -> None:
        """Look at the codes of activations from the next step on, or stop; nothing to look at in 16 bits."""
        self._watch = RangeWatch(self.dit) if watch and self.dit.sizes.precision == "fp8" else None

    def saturated(self) -> list[str]:
        """Return the native names of products whose activations left the calibrated range, and stop looking."""
        watch, self._watch = self._watch, None
        return watch.saturated() if watch is not None else []

    def close(self) -> None:
        """Let go of every graph and of what rows were told."""
        self._places.clear()
        self._current = None
        self._levels.clear()

    def _place_of(self, x: Tensor, told: dict[str, Tensor]) -> _Place:
        """The place of a shape, told what its rows are told.

        The very tensors of the last call, unchanged since, are not compared again: that would cost a step's launches.
        """
        versions = [_version(told[name]) for name in CONDITIONING]
        if self._current is not None:
            place, before, known = self._current
            if known == versions and all(told[name] is before[name] for name in CONDITIONING):
                return place
        rows, _, frames = x.shape
        place = self._kept_place(rows, frames, bool(told["local_add_cond"].any()))
        place.tell(told)
        self._current = place, {name: told[name] for name in CONDITIONING}, versions
        return place

    def _kept_place(self, rows: int, frames: int, keeps: bool) -> _Place:
        """The place of a shape, made where it is new; the one that was not used for longest goes."""
        key = (rows, frames, keeps)
        kept = self._places.pop(key, None)
        place = kept or _Place(self.dit, self._device, *key)
        self._places[key] = place
        while len(self._places) > KEPT_PLACES:
            self._places.popitem(last=False)
        return place

    def _modulation(self, t: float, seconds: float) -> Tensor:
        key = (t, seconds)
        found = self._levels.pop(key, None)
        if found is None:
            level, duration = (torch.tensor([value], device=self._device) for value in key)
            found = self.dit.modulation(level, duration)[:, :, 0]
        self._levels[key] = found
        while len(self._levels) > KEPT_LEVELS:
            self._levels.popitem(last=False)
        return found


class _Place:
    """The fixed tensors of one shape, and on a GPU the graph that reads and writes them."""

    def __init__(self, dit: Dit, device: torch.device, rows: int, frames: int, keeps: bool) -> None:
        sizes = dit.sizes
        self._dit, self._keeps = dit, keeps
        self._heard: dict[str, Tensor] | None = None
        self._known: list[weakref.ref[Conditioning] | None] = [None] * rows  # of `tell_rows`
        self._has_no_local = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._velocity: Tensor | None = None
        self._text: Captured | None = None
        self.x = torch.zeros((rows, dit.latent_channels, frames), device=device)
        self.modulation = torch.zeros((7, sizes.depth, rows, sizes.width), device=device)
        local = (rows, frames) if keeps else (1, 1)
        keys = (sizes.depth, rows, dit.cross_tokens, 3 * sizes.width)
        self._told = Told(
            torch.zeros(keys, dtype=torch.float16, device=device),
            torch.zeros((sizes.depth, *local, sizes.width), dtype=torch.float16, device=device),
        )

    def tell(self, told: dict[str, Tensor]) -> None:
        """Work out again what changed since the last call, row by row."""
        changed = self._changed(told)
        if not changed:
            return
        self._known = [None] * len(self._known)
        self._tell_text({name: told[name][changed] for name in TEXT}, changed)
        local = told["local_add_cond"]
        if self._keeps:
            self._told.local[:, changed] = self._dit.local(local[changed].to(self.x.device))
        else:
            self._tell_no_local()
        self._heard = {name: told[name].clone() for name in CONDITIONING}

    def tell_rows(self, rows: Sequence[Conditioning]) -> None:
        """Work out what is new of rows that are known again by identity; all new rows in one product each."""
        changed = [row for row, kept in enumerate(self._known) if kept is None or kept() is not rows[row]]
        if not changed:
            return
        new = [rows[row] for row in changed]
        keys = self._dit.keys(*(torch.cat([getattr(row, name) for row in new]) for name in TEXT))
        for number, row in enumerate(changed):
            self._told.keys[:, row].copy_(keys[:, number])
            if self._keeps:
                self._told.local[:, row].copy_(self._dit.local(new[number].local_add_cond)[:, 0])
            self._known[row] = weakref.ref(new[number])
        if not self._keeps:
            self._tell_no_local()
        self._heard = None

    def _tell_no_local(self) -> None:
        """The local embedding of local_add_cond that is zero throughout: one constant a block."""
        if not self._has_no_local:
            zero = torch.zeros((1, LOCAL_CHANNELS, 1), device=self.x.device)
            self._told.local.copy_(self._dit.local(zero))
            self._has_no_local = True

    def run(self) -> Tensor:
        """The velocity of what lies in the places."""
        if self.x.device.type != "cuda":
            return self._dit.step(self.x, self.modulation, self._told)
        if self._graph is None:
            self._capture()
        assert self._graph is not None and self._velocity is not None
        self._graph.replay()
        return self._velocity

    def run_under(self, watch: RangeWatch) -> Tensor:
        """The velocity of what lies in the places, each operation's result seen by `watch`."""
        with watch.step():
            return self._dit.step(self.x, self.modulation, self._told)

    def forget(self) -> None:
        """Compute the conditioning of every row again at the next call."""
        self._heard = None
        self._known = [None] * len(self._known)
        self._has_no_local = False

    def _tell_text(self, given: dict[str, Tensor], changed: list[int]) -> None:
        """Work out the cross keys of some rows: by a graph from the second time on that all rows change."""
        if self.x.device.type == "cuda" and self._heard is not None and len(changed) == self.x.shape[0]:
            if self._text is None:
                self._text = Captured(self._all_keys, given, self.x.device)
            self._text(given)
            return
        self._told.keys[:, changed] = self._dit.keys(*(given[name].to(self.x.device) for name in TEXT))

    def _all_keys(self, t5_hidden: Tensor, t5_mask: Tensor, seconds_total: Tensor) -> Tensor:
        return self._told.keys.copy_(self._dit.keys(t5_hidden, t5_mask, seconds_total))

    def _changed(self, told: dict[str, Tensor]) -> list[int]:
        heard = self._heard
        if heard is None:
            return list(range(self.x.shape[0]))
        rows: set[int] = set()
        for name in CONDITIONING:
            if not torch.equal(told[name], heard[name]):
                differs = (told[name] != heard[name]).flatten(1) if told[name].dim() > 1 else told[name] != heard[name]
                rows.update((differs.any(1) if differs.dim() > 1 else differs).nonzero().flatten().tolist())
        return sorted(rows)

    def _capture(self) -> None:
        self._graph, self._velocity = capture(lambda: self._dit.step(self.x, self.modulation, self._told))


def _version(value: Tensor) -> int | None:
    """How often a tensor was written in place; None for one of inference mode, which is not counted."""
    return None if value.is_inference() else value._version
