"""A DiT whose quantizers can be switched while a session runs: one session serves every choice of products."""

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

SWITCHES = "quantised"  # the further graph input: int64 (U,), 1 for each unit that shall run in FP8


@dataclass(frozen=True)
class Unit:
    """The products that read one activation: they are switched together.

    A quantizer belongs to the activation. If one of its readers stayed in 16 bits, an engine would have to write the
    activation in both types, which costs what the FP8 of the others saves.
    """

    activation: str
    products: tuple[quantization_selection.Product, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of one token."""
        return sum(product.k * product.n for product in self.products)


def units_of(selection: quantization_selection.Selection) -> tuple[Unit, ...]:
    """The units of a selection, in graph order."""
    return tuple(
        Unit(name, tuple(product for product in selection.quantized if product.activation == name))
        for name in selection.activations
    )


class SwitchableDit:
    """One session of a clean FP16-mixed DiT in which every unit can be quantised or not, anew at each run."""

    def __init__(
        self, source: Path, selection: quantization_selection.Selection, amax: np.ndarray, headroom: float,
        codes: Mapping[str, Codes] | None = None,
    ) -> None:  # fmt: skip
        """`amax` is (R, A) as `ptq.measure_amax` gives it; `codes` lie in files below `source`'s folder.

        The graph is held in memory only, weights stay on disk.
        """
        from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

        self.units = units_of(selection)
        self._engine = OnnxRuntimeEngine(
            source, switchable(source, selection, amax, headroom, codes or {}), low_memory=True
        )
        self.forwards = 0

    def denoised(self, row: Row, quantised: Sequence[bool]) -> np.ndarray:
        """x - sigma v (1, 256, L) in fp64 of one calibration row, with the named units in FP8."""
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
    """The graph of a `SwitchableDit`, serialised; its weights are those of `source`'s sidecar.

    Each Q/DQ pair moves into the branch of an If, so that a pair which is off costs no rounding and no time. A weight's
    waits for its unit's activation: a session runs what is ready, and would else hold a copy of every weight.
    """
    model = graph_io.load(source)
    run_passes(model, [InsertQuantizers({product.node: product.channel_axis for product in selection.quantized})])
    scales.apply_scales(model, selection, amax, headroom, calibrated=False)
    switches = _input(model, len(selection.activations))
    by_name = {str(node.name): node for node in model.graph}
    first = next(iter(model.graph))
    for index, unit in enumerate(units_of(selection)):
        chosen = _switch(model, first, switches, index)
        pairs = [quantizers.dequantizers(by_name[product.node]) for product in unit.products]
        activation = _put_in_branch(model, chosen, pairs[0][0], codes, source.parent)  # one for all products of a unit
        later = _after(model, activation, chosen)
        for _, weight in pairs:
            _put_in_branch(model, later, weight, codes, source.parent)
    return graph_io.serialized(model)


def _input(model: ir.Model, units: int) -> ir.Value:
    value = ir.val(SWITCHES, ir.DataType.INT64, [units])
    model.graph.inputs.append(value)
    return value


def _switch(model: ir.Model, before: ir.Node, switches: ir.Value, index: int) -> ir.Value:
    """The switch of one unit, as the scalar that an If takes."""
    place = ir.val(f"unit_{index}", const_value=ir.tensor(np.array(index, np.int64), name=f"unit_{index}"))
    model.graph.register_initializer(place)
    number = ir.node("Gather", [switches, place], name=f"unit_{index}_gather")
    chosen = ir.node("Cast", number.outputs, {"to": int(ir.DataType.BOOL)}, name=f"unit_{index}_chosen")
    model.graph.insert_before(before, _named([number, chosen]))
    return chosen.outputs[0]


def _after(model: ir.Model, switched: ir.Node, chosen: ir.Value) -> ir.Value:
    """The same switch, known only when the activation behind it is: its size is never zero."""
    size = ir.node("Size", switched.outputs, name=f"{switched.name}_size")
    there = ir.node("Cast", size.outputs, {"to": int(ir.DataType.BOOL)}, name=f"{switched.name}_there")
    later = ir.node("And", [chosen, there.outputs[0]], name=f"{switched.name}_later")
    model.graph.insert_after(switched, _named([size, there, later]))
    return later.outputs[0]


def _named(nodes: list[ir.Node]) -> list[ir.Node]:
    for node in nodes:
        node.outputs[0].name = f"{node.name}_value"
    return nodes


def _put_in_branch(
    model: ir.Model, chosen: ir.Value, dequantize: ir.Node | None, codes: Mapping[str, Codes], folder: Path
) -> ir.Node:
    """Replace a Q/DQ pair by an If: if chosen then the pair, or the codes of a weight, else the value as it is."""
    assert dequantize is not None
    quantize = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
    assert quantize is not None and quantize.inputs[0] is not None
    source, result = quantize.inputs[0], dequantize.outputs[0]
    same, switched = ir.node("Identity", [source]), ir.node("If", [chosen])
    for node, suffix in ((same, "plain"), (switched, "switched")):
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
    for branch, outputs, nodes in (("then", [result], pair), ("else", same.outputs, [same])):
        body = ir.Graph([], outputs, nodes=nodes, name=f"{result.name}_{branch}")
        switched.attributes[f"{branch}_branch"] = ir.AttrGraph(f"{branch}_branch", body)
    return switched
