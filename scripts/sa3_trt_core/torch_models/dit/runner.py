"""Runs a DiT step by step: what a row is told is worked out when it changes, a step is one CUDA graph on a GPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sa3_trt_core.torch_models.dit.model import Dit, Told
from sa3_trt_core.torch_models.dit.range_watch import RangeWatch

KEPT_PLACES = 8  # shapes whose graph, activations and cross keys are kept (a ring runs 1 to 8 rows); the oldest goes
KEPT_LEVELS = 256  # modulations of (sigma, seconds): 1 MB each at full size
WARM_RUNS = 2  # a capture must meet kernels that are compiled and libraries that have chosen
CONDITIONING = ("t5_hidden", "t5_mask", "seconds_total", "local_add_cond")


class Runner:
    """Velocity of a batch by a Dit. Rows keep their place: one that is told what it was told before costs nothing."""

    def __init__(self, dit: Dit, device: torch.device) -> None:
        self.dit, self._device = dit, device
        self._places: OrderedDict[tuple[int, int, bool], _Place] = OrderedDict()
        self._levels: OrderedDict[tuple[float, float], Tensor] = OrderedDict()
        self._watch: RangeWatch | None = None  # while there is one, steps run operation by operation under it

    def velocity(self, x: Tensor, t: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Velocity (B, 256, L) fp32 of x (B, 256, L) and t (B,); `told` holds CONDITIONING, each with first axis B.

        On the runner's device, and valid until the next call.
        """
        return self.prepared(x, t, told)()

    def prepared(self, x: Tensor, t: Tensor, told: dict[str, Tensor]) -> Callable[[], Tensor]:
        """What `velocity` runs once everything lies in its place: on a GPU the replay of a graph."""
        rows, _, frames = x.shape
        key = (rows, frames, bool(told["local_add_cond"].any()))
        place = self._places.pop(key, None) or _Place(self.dit, self._device, *key)
        self._places[key] = place
        while len(self._places) > KEPT_PLACES:
            self._places.popitem(last=False)
        place.tell(told)
        for row, level in enumerate(zip(t.tolist(), told["seconds_total"].tolist(), strict=True)):
            place.modulation[:, :, row].copy_(self._modulation(*level))
        place.x.copy_(x)
        return place.run if self._watch is None else partial(place.run_under, self._watch)

    def weights_changed(self) -> None:
        """Forget what was computed from weights that have been replaced in place; graphs read the new ones."""
        self._levels.clear()
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
        self._levels.clear()

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
        self._graph: torch.cuda.CUDAGraph | None = None
        self._velocity: Tensor | None = None
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
        given = {name: told[name][changed].to(self.x.device) for name in CONDITIONING}
        self._told.keys[:, changed] = self._dit.keys(given["t5_hidden"], given["t5_mask"], given["seconds_total"])
        if self._keeps:
            self._told.local[:, changed] = self._dit.local(given["local_add_cond"])
        elif self._heard is None:
            # One frame of zeros speaks for all: without a kept latent the embedding is one constant a block.
            self._told.local.copy_(self._dit.local(given["local_add_cond"][:1, :, :1]))
        self._heard = {name: told[name].clone() for name in CONDITIONING}

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
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_RUNS):
                self._dit.step(self.x, self.modulation, self._told)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._velocity = self._dit.step(self.x, self.modulation, self._told)
