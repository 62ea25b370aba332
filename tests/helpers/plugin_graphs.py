"""Small graphs with the window attention plug-in of the published autoencoders, and its definition in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEADS, WIDTH, SEGMENT = 2, 8, 17
FRAME = 4096
KINDS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
Nodes = list[onnx.NodeProto]


def dense_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return attention (B, N, H, D) of q, k, v (B, N, 2H, D) in float64, by definition over all N x N scores."""
    q, k, v = (np.asarray(part, np.float64).transpose(0, 2, 1, 3) for part in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    index = np.arange(q.shape[2])
    scores[..., np.abs(index[:, None] - index) > SEGMENT] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    first, last = np.split(weights / weights.sum(axis=-1, keepdims=True) @ v, 2, axis=1)
    return (first - last).transpose(0, 2, 1, 3)


def plugin_graph(
    path: Path, kind: str = "float32", shape: tuple[object, ...] = ("B", "N", 2 * HEADS, WIDTH), opset: int = 18,
    **attributes: object,
) -> Path:  # fmt: skip
    """Write a graph of one plug-in, q, k, v -> out, all of type `kind`; return its path."""
    inputs = [helper.make_tensor_value_info(name, KINDS[kind], shape) for name in "qkv"]
    out = helper.make_tensor_value_info("out", KINDS[kind], [*shape[:2], None, shape[3]] if len(shape) == 4 else shape)
    node = helper.make_node("diff_attn_swa", list("qkv"), ["out"], name="swa", domain="samel", **attributes)
    return _save(path, [node], inputs, [out], [], opset)


def plugin_decoder(path: Path, output: str = "pcm", ceiling: bool = False, typed: bool = True) -> Path:
    """Write a SAME decoder that meets the contract: two plug-ins, random weights, a sidecar. Return its path.

    `output` is pcm or audio; `ceiling` adds the scalar input that some builds have; `typed` False omits the types
    of inner values, as the older exporter does.
    """
    tensors = _weights()
    nodes = [
        helper.make_node("Transpose", ["latent"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["rows", "into"], ["wide"]),
        helper.make_node("Reshape", ["wide", "tokens"], ["hidden_0"]),
        *(node for layer in range(2) for node in _layer(layer)),
        helper.make_node("Reshape", ["hidden_2", "frames"], ["framed"]),
        helper.make_node("MatMul", ["framed", "out_of"], ["sounds"]),
        helper.make_node("Reshape", ["sounds", "samples"], ["interleaved"]),
    ]
    inputs = [helper.make_tensor_value_info("latent", TensorProto.FLOAT, [1, 256, "L"])]
    samples_name = "interleaved"
    if ceiling:
        inputs.append(helper.make_tensor_value_info("limiter_ceiling", TensorProto.FLOAT, []))
        nodes.append(helper.make_node("Mul", ["limiter_ceiling", "down"], ["floor"]))
        nodes.append(helper.make_node("Min", [samples_name, "limiter_ceiling"], ["lowered"]))
        nodes.append(helper.make_node("Max", ["lowered", "floor"], ["limited"]))
        samples_name = "limited"
    if output == "pcm":
        nodes.append(helper.make_node("Mul", [samples_name, "full"], ["scaled"]))
        nodes.append(helper.make_node("Cast", ["scaled"], ["pcm"], to=TensorProto.INT32))
        out = helper.make_tensor_value_info("pcm", TensorProto.INT32, [1, None, 2])
    else:
        nodes.append(helper.make_node("Transpose", [samples_name], ["audio"], perm=[0, 2, 1]))
        out = helper.make_tensor_value_info("audio", TensorProto.FLOAT, [1, 2, None])
    info = [
        helper.make_tensor_value_info(f"{part}{layer}", TensorProto.FLOAT, [1, None, 2 * HEADS, WIDTH])
        for layer in range(2)
        for part in "qkv"
    ]
    return _save(path, nodes, inputs, [out], tensors, 18, info if typed else [])


def _layer(layer: int) -> Nodes:
    nodes = []
    for part in "qkv":
        nodes.append(helper.make_node("MatMul", [f"hidden_{layer}", f"w_{part}{layer}"], [f"flat_{part}{layer}"]))
        nodes.append(helper.make_node("Reshape", [f"flat_{part}{layer}", "heads"], [f"{part}{layer}"]))
    names = [f"{part}{layer}" for part in "qkv"]
    nodes.append(helper.make_node("diff_attn_swa", names, [f"mixed{layer}"], domain="samel", num_heads=HEADS))
    nodes.append(helper.make_node("Reshape", [f"mixed{layer}", "back"], [f"merged{layer}"]))
    nodes.append(helper.make_node("Add", [f"hidden_{layer}", f"merged{layer}"], [f"hidden_{layer + 1}"]))
    return nodes


def _weights() -> list[onnx.TensorProto]:
    generator, width = np.random.default_rng(0), HEADS * WIDTH
    sizes = {"into": (256, SEGMENT * width), "out_of": (SEGMENT * width, 2 * FRAME)}
    sizes |= {f"w_{part}{layer}": (width, 2 * width) for layer in range(2) for part in "qkv"}
    shapes = {
        "tokens": (1, -1, width), "heads": (1, -1, 2 * HEADS, WIDTH), "back": (1, -1, width),
        "frames": (1, -1, SEGMENT * width), "samples": (1, -1, 2),
    }  # fmt: skip
    arrays = {name: generator.normal(0, size[0] ** -0.5, size).astype(np.float32) for name, size in sizes.items()}
    arrays |= {name: np.array(size, np.int64) for name, size in shapes.items()}
    arrays |= {"full": np.float32(32767), "down": np.float32(-1)}
    return [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]


def _save(
    path: Path, nodes: Nodes, inputs: list, outputs: list, tensors: list, opset: int, info: list | None = None
) -> Path:
    graph = helper.make_graph(nodes, "plugged", inputs, outputs, tensors, value_info=info or [])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("samel", 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        helper.make_model(graph, opset_imports=imports, ir_version=9), path, save_as_external_data=True,
        location=f"{path.name}.data", size_threshold=1024,
    )  # fmt: skip
    return path
