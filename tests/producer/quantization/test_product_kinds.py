"""Layer roles of a DiT's products, recognised from the structure of a skeleton with meaningless names."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sa3_build.passes.rename_nodes import RenameNodes
from sa3_build.quantization import selection as quantization_selection
from sa3_build.quantization.layer_roles import KINDS, roles_of

LAYER_KINDS = KINDS[2:]


def two_layers(context: str) -> ir.Model:
    """Return a DiT's skeleton with meaningless names; `context` is the op between the text and each layer's k and v."""
    lines = [
        "g0 = MatMul(t, wt)\n c0 = MatMul(t5_hidden, w)\n c1 = Sigmoid(c0)\n c = MatMul(c1, w)",
        "h0 = MatMul(x, w)",
    ]
    for n in range(2):
        lines.append(f"""
            m{n} = Mul(h{n}, g0)   a{n} = MatMul(m{n}, w3)   q{n}, k{n}, v{n} = Split <axis=-1, num_outputs=3> (a{n})
            kt{n} = Transpose <perm=[0,2,1]> (k{n})   s{n} = MatMul(q{n}, kt{n})   p{n} = Softmax(s{n})
            o{n} = MatMul(p{n}, v{n})   b{n} = MatMul(o{n}, w)   d{n} = Add(h{n}, b{n})
            e{n} = MatMul(d{n}, w)   i{n} = {context}(c)   j{n} = MatMul(i{n}, w2)
            ck{n}, cv{n} = Split <axis=-1, num_outputs=2> (j{n})   ct{n} = Transpose <perm=[0,2,1]> (ck{n})
            cs{n} = MatMul(e{n}, ct{n})   cp{n} = Softmax(cs{n})   co{n} = MatMul(cp{n}, cv{n})
            cb{n} = MatMul(co{n}, w)   f{n} = Add(d{n}, cb{n})
            u{n} = MatMul(f{n}, w2)   u1{n}, u2{n} = Split <axis=-1, num_outputs=2> (u{n})   us{n} = Sigmoid(u2{n})
            z{n} = Mul(u1{n}, us{n})   y{n} = MatMul(z{n}, w)   h{n + 1} = Add(f{n}, y{n})""")
    body = "\n".join([*lines, "velocity = MatMul(h2, w)"]).replace("   ", "\n")
    text = f"g (float[1,5,4] x, float[1,1,4] t, float[1,3,4] t5_hidden) => (float[1,5,4] velocity) {{ {body} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 19]>\n{text}')
    widths = {"w": 4, "wt": 4, "w2": 8, "w3": 12}
    arrays = {name: np.ones((4, width), np.float32) for name, width in widths.items()}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    RenameNodes().call(model)
    return model


@pytest.mark.parametrize("context", ["Identity", "Sigmoid"])
def test_kinds_and_layers_are_read_from_the_structure(context: str) -> None:
    model = two_layers(context)
    selection = quantization_selection.select_linears(model)
    role_by_node = roles_of(model, selection)
    of_products = [role_by_node[product.node] for product in selection.quantized]
    expected = [(kind, None) for kind in KINDS[:2]]
    expected += [(kind, layer) for layer in range(2) for kind in LAYER_KINDS]
    assert [(role.kind, role.layer) for role in of_products] == expected
    outside = [reason for reason in selection.excluded.values() if reason in ("latent in", "velocity out")]
    assert sorted(outside) == ["latent in", "velocity out"]
