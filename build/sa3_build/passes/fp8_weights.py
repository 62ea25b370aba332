"""Store quantised weights as E4M3: half the sidecar, and no quantizer left to run or to fold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sa3_build import graph
from sa3_build.passes.base import GraphNotRecognised, PassResult
from sa3_trt_core import files

SUFFIX = "_e4m3"
E4M3 = ml_dtypes.float8_e4m3fn
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Codes:
    """E4M3 codes that were chosen for one weight, in an .npy file: read when needed, all are half the source."""

    path: Path

    @classmethod
    def write(cls, path: Path, codes: np.ndarray) -> Codes:
        """Whole or not at all; as bytes, for NumPy has no E4M3 of its own."""
        with files.atomic_path(path) as temporary:
            np.save(temporary, codes.view(np.uint8))
        return cls(path)

    def read(self) -> np.ndarray:
        return np.load(self.path, allow_pickle=False).view(E4M3)

    def external(self, folder: Path) -> ir.ExternalTensor:
        """The same as the data of a graph in `folder`, or in a folder above."""
        mapped = np.load(self.path, mmap_mode="r", allow_pickle=False)
        begin, name = self.path.stat().st_size - mapped.nbytes, str(self.path.relative_to(folder))
        kind, shape = ir.DataType.FLOAT8E4M3FN, ir.Shape(mapped.shape)
        return ir.ExternalTensor(name, begin, mapped.nbytes, kind, shape=shape, name=name, base_dir=folder)


class StoreWeightsAsFp8:
    """Replace weight -> QuantizeLinear -> DequantizeLinear by an E4M3 initializer -> DequantizeLinear.

    Needs Q/DQ pairs on weights with constant scales along one axis. Leaves activation pairs alone; a weight that feeds
    several pairs is stored once a pair. `codes` gives those of some weights, by name; the others' are the nearest.
    """

    name = "fp8-weights"

    def __init__(self, codes: Mapping[str, Codes] | None = None) -> None:
        self._codes = dict(codes or {})

    def requires(self, model: ir.Model) -> None:
        for quantize in _weight_quantizers(model):
            if graph.constant_of(quantize.inputs[1]) is None:
                raise GraphNotRecognised(f"{quantize.name} has a computed scale")

    def call(self, model: ir.Model) -> PassResult:
        quantizers = list(_weight_quantizers(model))
        for quantize in quantizers:
            weight, scale = quantize.inputs[0], graph.constant_of(quantize.inputs[1])
            assert weight is not None and weight.const_value is not None and scale is not None
            axis = quantize.attributes.get_int("axis", 1)
            given = self._codes.get(str(weight.name))
            stored = given.read() if given is not None else quantized(weight.const_value.numpy(), scale, axis)
            value = ir.val(f"{weight.name}{SUFFIX}", const_value=ir.tensor(stored))
            model.graph.register_initializer(value)
            for use in list(quantize.outputs[0].uses()):
                use.node.replace_input_with(use.idx, value)
            model.graph.remove(quantize, safe=True)
            if not weight.uses() and not weight.is_graph_output():
                model.graph.initializers.pop(str(weight.name))
        return PassResult(self.name, {"weights": len(quantizers)})

    def ensures(self, model: ir.Model) -> None:
        assert not list(_weight_quantizers(model)), "a weight is still quantised at run time"


def quantized(weight: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    """E4M3 codes of weight / scale, rounded to nearest even and saturated at +-448. scale is one number a channel."""
    shape = [1] * weight.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    ratio = weight.astype(np.float32) / scale.astype(np.float32).reshape(shape)
    return np.clip(ratio, -E4M3_MAX, E4M3_MAX).astype(E4M3)


def _weight_quantizers(model: ir.Model) -> list[ir.Node]:
    return [
        node
        for node in model.graph
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer()
    ]
