"""Convert a graph of the older exporter to FP16-mixed the way the published graphs were converted.

Norm chains, rotary table and Fourier features stay fp32, with a Cast on every edge; the seconds / 384 path
becomes fp16, which is the defect that a strongly typed engine keeps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from helpers import published_style
from helpers.published_module import PublishedDit
from sa3_build.export.wrappers import DitContract

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
NORM_CORE = {"Pow", "ReduceMean", "Add", "Sqrt", "Div"}
ROTARY = {"Slice", "Unsqueeze", "Concat", "Einsum", "Mul", "Div", "Cast"}
FOURIER = {"Mul", "Cos", "Sin", "Concat", "Unsqueeze"}  # Unsqueeze is applied to the frequencies


def write_fp16_mixed(
    module: DitContract | PublishedDit, path: Path, scratch: Path, softmax: int = FLOAT, sidecar: str = "other.bin"
) -> Path:
    """Write the FP16-mixed graph of the published style, batch fixed at 1; `softmax` is the type of that op."""
    proto = published_style.exported(module, scratch)
    if isinstance(module, DitContract):
        published_style.count_positions_in_integers(proto)
    Fp16Conversion(proto, softmax, isinstance(module, PublishedDit) and module.conventions.fp32_duration).run()
    published_style.shuffle_nodes(proto)
    return published_style.save_graph(proto, path, sidecar)


class Fp16Conversion:
    """One conversion to FP16-mixed. Casts are appended at the end of the node list, after their users."""

    def __init__(self, proto: onnx.ModelProto, softmax: int, fp32_duration: bool = False) -> None:
        self._graph, self._softmax, self._fp32_duration = proto.graph, softmax, fp32_duration
        inferred = onnx.shape_inference.infer_shapes(proto)
        values = [*inferred.graph.value_info, *proto.graph.input, *proto.graph.output]
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._types |= {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
        self._initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._constants = {node.output[0]: node for node in proto.graph.node if node.op_type == "Constant"}
        self._users = {}
        for node in proto.graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._appended: list[onnx.NodeProto] = []
        self._levels = {"t"}  # values computed from the noise level up to its Fourier features
        for node in proto.graph.node:
            if node.op_type in ("Cast", "Unsqueeze") and node.input[0] in self._levels:
                self._levels.add(node.output[0])

    def run(self) -> None:
        rotations = self._rotations()
        type_by_output = {}
        for node in self._graph.node:
            if self._is_float(node) and node.op_type != "Constant":
                type_by_output[node.output[0]] = FLOAT if node.output[0] in rotations else self._wanted(node)
        self._converted_constants(type_by_output)
        for node in self._graph.node:
            if node.op_type == "Constant":
                continue
            if node.output[0] in type_by_output:
                kind = type_by_output[node.output[0]]
                if node.op_type == "Cast":
                    node.attribute[0].i = kind
                    continue
                for output in node.output:
                    self._types[output] = kind
                if node.name.endswith("norm/Mul_1") or "norm_1/Mul_1" in node.name:
                    self._chain_in_front(node)
        for node in self._graph.node:
            if node.op_type not in ("Constant", "Cast"):
                kind = type_by_output.get(node.output[0], FLOAT)
                for index, name in enumerate(node.input):
                    if self._types.get(name) in (FLOAT, FLOAT16) and self._types[name] != kind:
                        node.input[index] = self._cast(name, kind)
            elif node.op_type == "Cast" and node.output[0] in type_by_output:
                self._types[node.output[0]] = type_by_output[node.output[0]]
        self._restore_output()
        self._graph.node.extend(self._appended)

    def _wanted(self, node: onnx.NodeProto) -> int:
        name, op = node.name, node.op_type
        last = name.rpartition("/")[2]
        if "norm" in name:
            return FLOAT if op in NORM_CORE or last in ("Mul", "Cast") else FLOAT16
        if name.startswith("/duration/"):
            exact = self._fp32_duration and op != "Gemm"
            return FLOAT if op in FOURIER or exact else FLOAT16  # Clip, Sub and Div by 384 in 16 bits: the defect
        if "timestep_features" in name or node.output[0] in self._levels or "rotary" in name:
            return FLOAT
        return self._softmax if op == "Softmax" else FLOAT16

    def _rotations(self) -> set[str]:
        """Return the values of the rotary table after the Einsum, and the products and sums that rotate by it."""
        tables = {n.output[0] for n in self._graph.node if n.op_type in ("Cos", "Sin") and "self_attn" in n.name}
        makers = {output: node for node in self._graph.node for output in node.output}
        queue, rotary_values = [makers[name].input[0] for name in tables], set(tables)
        while queue:
            name = queue.pop()
            if name in makers and makers[name].op_type in ROTARY and self._types.get(name) == FLOAT:
                rotary_values.add(name)
                queue += makers[name].input
        products = {user.output[0] for name in tables for user in self._users[name]}
        products |= {user.output[0] for name in products for user in self._users[name] if user.op_type == "Mul"}
        sums = {user.output[0] for name in products for user in self._users[name] if user.op_type == "Add"}
        return rotary_values | products | sums

    def _is_float(self, node: onnx.NodeProto) -> bool:
        return any(self._types.get(name) == FLOAT for name in node.output)

    def _converted_constants(self, type_by_output: dict[str, int]) -> None:
        """Convert to fp16, in place, each constant that only fp16 nodes read."""
        for name, kind in list(self._types.items()):
            users = [user for user in self._users.get(name, []) if user.op_type != "Constant"]
            if kind != FLOAT or not users or any(type_by_output.get(user.output[0], FLOAT) == FLOAT for user in users):
                continue
            if name in self._initializers:
                self._initializers[name].CopyFrom(_as_fp16(self._initializers[name], name))
            elif name in self._constants:
                stored = self._constants[name].attribute[0]
                stored.t.CopyFrom(_as_fp16(stored.t, ""))
            elif all(user.op_type in ("Transpose", "Cast") for user in users):
                continue
            else:
                continue
            self._types[name] = FLOAT16

    def _chain_in_front(self, gamma: onnx.NodeProto) -> None:
        """Mul(fp32) -> Cast fp16 -> Cast fp32 -> Cast fp16 -> Mul gamma."""
        place = 1 if gamma.input[0].endswith(("gamma", "Cast_output_0", "Cast_1_output_0")) else 0
        name = gamma.input[place]
        for kind in (FLOAT16, FLOAT, FLOAT16):
            name = self._cast(name, kind)
        gamma.input[place] = name

    def _cast(self, name: str, kind: int) -> str:
        result = f"/surgery/Cast_{len(self._appended)}"
        self._appended.append(helper.make_node("Cast", [name], [result], result, to=kind))
        self._types[result] = kind
        return result

    def _restore_output(self) -> None:
        (output,) = self._graph.output
        (maker,) = [node for node in self._graph.node if output.name in node.output]
        maker.output[0] = "/surgery/velocity"
        self._types["/surgery/velocity"] = FLOAT16
        self._appended.append(helper.make_node("Cast", ["/surgery/velocity"], [output.name], "/surgery/last", to=FLOAT))


def _as_fp16(tensor: TensorProto, name: str) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), name)
