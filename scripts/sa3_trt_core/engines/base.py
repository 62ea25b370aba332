"""Engine protocols: GraphEngine (named tensors), VelocityEngine (DiT), and the adapter DiTVelocity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.conditioning import Conditioning


class GraphEngine(Protocol):
    """A loaded graph: named tensors in, named tensors out, on the device of the first input.

    `max_batch` is the largest batch of one run (None: unlimited). `device` is "cuda" or "cpu",
    `cpu_reason` the reason for the CPU on a machine with a GPU ("" otherwise). `takes_rows` is True for an encoder or
    decoder that takes any number of rows at once and bounds its own memory, so that the caller
    need not cut its input into windows.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    max_batch: int | None
    device: str
    cpu_reason: str
    takes_rows: bool

    @property
    def tensor_device(self) -> str: ...
    def rows_at_once(self, frames: int) -> int: ...
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class VelocityEngine(Protocol):
    """One DiT: velocity of a batch of latents, each row at its own noise level."""

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity (B, 256, L) fp32 for x (B, 256, L) and t (B,), both fp32."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class RowsEngine(Protocol):
    """A DiT that caches the conditioning of each row between calls, by object identity."""

    def rows_velocity(self, x: Tensor, t: Tensor, rows: Sequence[Conditioning]) -> Tensor:
        """Return the velocity (R, 256, L) on the engine's device, valid until the next call."""
        ...


class Closeable:
    """Base class with `close` as a context manager."""

    def close(self) -> None:
        """Free all resources; may be called repeatedly."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DeviceEngine(Closeable):
    """Base class of graph engines; by default on a GPU, with inputs and outputs on the CPU."""

    device: str = "cuda"
    cpu_reason: str = ""
    keeps_device: bool = False  # outputs stay on the GPU, and inputs there are not copied
    takes_rows: bool = False

    @property
    def tensor_device(self) -> str:
        """Device of inputs and outputs without a copy: "cuda" or "cpu"."""
        return self.device if self.keeps_device else "cpu"

    def rows_at_once(self, frames: int) -> int:
        """Return how many rows of `frames` latent frames a decoder decodes without tiling, at least 1."""
        return 1


class DiTVelocity(Closeable):
    """VelocityEngine on any GraphEngine of the six-input DiT graph. `close` closes the graph."""

    def __init__(self, graph: GraphEngine) -> None:
        self._graph = graph
        self.max_batch = graph.max_batch
        self.device = graph.tensor_device

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity (B, 256, L) fp32 for x (B, 256, L) and t (B,)."""
        inputs = {
            "x": x,
            "t": t,
            "t5_hidden": cond.t5_hidden,
            "t5_mask": cond.t5_mask,
            "seconds_total": cond.seconds_total,
            "local_add_cond": cond.local_add_cond,
        }
        return require_output(self._graph.run(inputs), "velocity").float()

    def rows_velocity(self, x: Tensor, t: Tensor, rows: Sequence[Conditioning]) -> Tensor:
        """Return `velocity` of rows with one conditioning object (batch 1) per row; valid until the next call."""
        from sa3_trt_core.conditioning import Conditioning

        if isinstance(self._graph, RowsEngine) and self.device != "cpu":
            return self._graph.rows_velocity(x, t, rows)
        return self.velocity(x, t, Conditioning.joined(rows))

    def close(self) -> None:
        self._graph.close()


def rows_velocity(engine: VelocityEngine, x: Tensor, t: Tensor, rows: Sequence[Conditioning]) -> Tensor:
    """Return the velocity (R, 256, L) for x (R, 256, L) and t (R,), with one conditioning object (batch 1) per row.

    A RowsEngine caches conditioning by object identity and processes only new objects.
    """
    from sa3_trt_core.conditioning import Conditioning

    if isinstance(engine, RowsEngine):
        return engine.rows_velocity(x, t, rows)
    return engine.velocity(x, t, Conditioning.joined(rows))


def require_output(outputs: Mapping[str, Tensor], name: str) -> Tensor:
    """Return an output by name. Raises ToolError if the graph does not have it."""
    if name not in outputs:
        raise ToolError(f"the graph gives {', '.join(outputs)}, not {name}", "use the ONNX or engine of that target")
    return outputs[name]


def run_rows(
    run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Run a graph of fixed batch 1 on each row of a batch and concatenate the outputs."""
    import torch

    rows = next(iter(inputs.values())).shape[0]
    parts = []
    for row in range(rows):
        parts.append(run({name: value[row : row + 1] if value.dim() else value for name, value in inputs.items()}))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
