"""A DiT graph whose quantizers can be switched at run time: one session evaluates every choice of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnx_ir as ir

from sa3_build.e4m3 import SUFFIX, Codes
from sa3_build.graph import io as graph_io, quantizers
from sa3_build.passes.base import run_passes
from sa3_build.passes.insert_qdq import InsertQuantizers
from sa3_build.quantization import scales, selection as quantization_selection
from sa3_trt_core.artifacts.calibration_set import Row, tensors

SWITCHES = "quantised"  # additional graph input: int64 (U,), 1 for each quantizer group that runs in FP8


@dataclass(frozen=True)
class QuantizerGroup:
    """The linear layers that read one activation; they are switched together.

    The quantizer belongs to the activation. If one of its readers stayed in 16 bits, an engine would have to write the
    activation in both types, which costs what FP8 saves in the others.
    """

    activation: str
    linears: tuple[quantization_selection.Linear, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of one token."""
        return sum(linear.k * linear.n for linear in self.linears)


def groups_of(selection: quantization_selection.Selection) -> tuple[QuantizerGroup, ...]:
    """Return the groups of a selection, in graph order."""
    return tuple(
        QuantizerGroup(name, tuple(linear for linear in selection.quantized if linear.activation == name))
        for name in selection.activations
    )


class SwitchableDit:
    """One session of a clean FP16-mixed DiT in which every quantizer group can be switched on or off in each run."""

    def __init__(
        self, source: Path, selection: quantization_selection.Selection, amax: np.ndarray, headroom: float,
        codes: Mapping[str, Codes] | None = None,
    ) -> None:  # fmt: skip
        """`amax` is (R, A) from `amax.measure_amax`; `codes` are files below `source`'s folder.

        The graph exists in memory only; weights stay on disk.
        """
        from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

        self.groups = groups_of(selection)
        self._engine = OnnxRuntimeEngine(
            source, switchable(source, selection, amax, headroom, codes or {}), low_memory=True
        )
        self.forwards = 0

    def denoised(self, row: Row, quantised: Sequence[bool]) -> np.ndarray:
        """Return x - sigma v (1, 256, L) in fp64 of one calibration row, with the groups `quantised` in FP8."""
        import torch

        switches = torch.tensor([int(on) for on in quantised], dtype=torch.int64)
        velocity = self._engine.run({**tensors(row), SWITCHES: switches})["velocity"].cpu().numpy()
        self.forwards += 1
        return row["x"].astype(np.float64) - float(row["t"][0]) * velocity.astype(np.float64)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.close()


def switchable(
    source: Path,
    selection: quantization_selection.Selection,
    amax: np.ndarray,
    headroom: float,
    codes: Mapping[str, Codes],
) -> bytes:
    """Return the graph of a `SwitchableDit`, serialised; its weights are those of `source`'s sidecar.

    Each Q/DQ pair moves into a branch of an If, so that a pair that is off costs neither rounding nor time. The
    weight's If depends on its group's activation: a session runs nodes as soon as they are ready, and would otherwise
    keep a copy of every weight.
    """
    model = graph_io.load(source)
    run_passes(model, [InsertQuantizers({linear.node: linear.channel_axis for linear in selection.quantized})])
    scales.apply_scales(model, selection, amax, headroom, calibrated=False)
    switches = _input(model, len(selection.activations))
    nodes = {str(node.name): node for node in model.graph}
    first = next(iter(model.graph))
    for index, group in enumerate(groups_of(selection)):
        switch = _switch(model, first, switches, index)
        pairs = [quantizers.dequantizers(nodes[linear.node]) for linear in group.linears]
        activation = _put_in_branch(model, switch, pairs[0][0], codes, source.parent)  # shared by all layers of a group
        weight_switch = _after(model, activation, switch)
        for _, weight in pairs:
            _put_in_branch(model, weight_switch, weight, codes, source.parent)
    return graph_io.serialized(model)


def _input(model: ir.Model, groups: int) -> ir.Value:
    value = ir.val(SWITCHES, ir.DataType.INT64, [groups])
    model.graph.inputs.append(value)
    return value


def _switch(model: ir.Model, before: ir.Node, switches: ir.Value, index: int) -> ir.Value:
    """Return the switch of one group, as the scalar condition of an If."""
    position = ir.val(f"group_{index}", const_value=ir.tensor(np.array(index, np.int64), name=f"group_{index}"))
    model.graph.register_initializer(position)
    number = ir.node("Gather", [switches, position], name=f"group_{index}_gather")
    switch = ir.node("Cast", number.outputs, {"to": int(ir.DataType.BOOL)}, name=f"group_{index}_chosen")
    model.graph.insert_before(before, _named([number, switch]))
    return switch.outputs[0]


def _after(model: ir.Model, switched: ir.Node, chosen: ir.Value) -> ir.Value:
    """Return the switch with a data dependency on the activation, so that the weight branch is not run early.

    `Size > 0` is always true.
    """
    size = ir.node("Size", switched.outputs, name=f"{switched.name}_size")
    computed = ir.node("Cast", size.outputs, {"to": int(ir.DataType.BOOL)}, name=f"{switched.name}_there")
    delayed = ir.node("And", [chosen, computed.outputs[0]], name=f"{switched.name}_later")
    model.graph.insert_after(switched, _named([size, computed, delayed]))
    return delayed.outputs[0]


def _named(nodes: list[ir.Node]) -> list[ir.Node]:
    for node in nodes:
        node.outputs[0].name = f"{node.name}_value"
    return nodes


def _put_in_branch(
    model: ir.Model, chosen: ir.Value, dequantize: ir.Node | None, codes: Mapping[str, Codes], folder: Path
) -> ir.Node:
    """Replace a Q/DQ pair by an If: `chosen` selects the pair (or a weight's codes) or the unquantised value."""
    assert dequantize is not None
    quantize = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
    assert quantize is not None and quantize.inputs[0] is not None
    source, result = quantize.inputs[0], dequantize.outputs[0]
    unquantised, switched = ir.node("Identity", [source]), ir.node("If", [chosen])
    for node, suffix in ((unquantised, "plain"), (switched, "switched")):
        node.name = f"{result.name}_{suffix}"
        node.outputs[0].name, node.outputs[0].type = f"{node.name}_value", source.type
    model.graph.insert_after(dequantize, switched)
    for use in list(result.uses()):
        use.node.replace_input_with(use.idx, switched.outputs[0])
    model.graph.remove([dequantize, quantize])
    pair = [quantize, dequantize]
    if str(source.name) in codes:
        stored = ir.val(f"{source.name}{SUFFIX}", const_value=codes[str(source.name)].external(folder))
        model.graph.register_initializer(stored)
        dequantize.replace_input_with(0, stored)
        pair = [dequantize]
    for branch, outputs, nodes in (("then", [result], pair), ("else", unquantised.outputs, [unquantised])):
        body = ir.Graph([], outputs, nodes=nodes, name=f"{result.name}_{branch}")
        switched.attributes[f"{branch}_branch"] = ir.AttrGraph(f"{branch}_branch", body)
    return switched
