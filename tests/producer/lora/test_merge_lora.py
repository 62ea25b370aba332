"""Adapters in graphs and engines: same velocities as the native network with weights merged in NumPy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import build_from_onnx
import merge_lora
import numpy as np
import onnx
import pytest
import torch
from torch.nn.functional import cosine_similarity

import sa3_trt
from helpers import adapters, native
from helpers.commands import assert_user_error, listing, run
from sa3_build.export import torch_to_onnx
from sa3_build.lora.graph_layers import find_layers
from sa3_build.lora.merge import merge_graph
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.artifacts.check_rows import check_path
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.engines.torch import TorchEngine
from sa3_trt_core.lora.lora_set import LoraSet, LoraSpec
from sa3_trt_core.lora.svd_bases import SvdBases
from sa3_trt_core.shapes import CONTRACTS
from sa3_trt_core.torch_models.dit.adapters import quantized

FRAMES = 24
STRENGTHS = (-1.0, 0.3, 1.0, 2.0)
Adapted = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def weights(tiny_checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(tiny_checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> dict[str, np.ndarray]:
    return adapters.native_weights(tiny_checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def adapted(base: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """Return a function that writes an adapter of a kind and seed that changes every layer of the tiny network."""
    folder = tmp_path_factory.mktemp("adapters")
    shapes = {layer: weight.shape for layer, weight in base.items()}

    def written(kind: str, seed: int = 0) -> Path:
        path = folder / f"{kind}-{seed}.safetensors"
        return path if path.exists() else adapters.write_native(path, kind, shapes, seed=seed, norms=base)

    return written


def inputs(rows: int = 2) -> dict[str, torch.Tensor]:
    made = torch_to_onnx.example_inputs("dit", batch=rows, frames=FRAMES)
    named = {spec.name: value for spec, value in zip(CONTRACTS["dit"].inputs, made, strict=True)}
    named["t5_hidden"] *= 0.3
    return named


def merged_velocity(
    weights: Mapping[str, torch.Tensor], base: dict[str, np.ndarray], *specs: tuple[Path, float]
) -> torch.Tensor:
    """Return the native network's velocity with every weight merged in NumPy, one adapter after the other."""
    changed = dict(weights)
    for layer, original in base.items():
        weight = original
        for path, strength in specs:
            weight = adapters.merged_weight(path, layer, weight, strength, original)
        key = ("conditioner." if layer == adapters.DURATION else "model.") + f"{layer}.weight"
        changed[key] = torch.from_numpy(np.ascontiguousarray(weight)).reshape(weights[key].shape)
    with torch.no_grad():
        return native.velocity(changed, **inputs())


def velocity(path: Path) -> torch.Tensor:
    with OnnxRuntimeEngine(path) as engine:
        return engine.run(inputs())["velocity"]


def relative_difference(velocity: torch.Tensor, reference: torch.Tensor) -> float:
    return float((velocity - reference).abs().max() / reference.abs().max())


def worst_cosine(velocity: torch.Tensor, reference: torch.Tensor) -> float:
    return float(cosine_similarity(velocity.double().flatten(1), reference.double().flatten(1)).min())


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_a_merged_fp32_graph_gives_the_velocities_of_weights_merged_by_hand(
    kind: str, tiny_onnx: Path, weights: dict[str, torch.Tensor], base: dict[str, np.ndarray], adapted: Adapted,
    tmp_path: Path,
) -> None:  # fmt: skip
    strength = STRENGTHS[adapters.KINDS.index(kind) % len(STRENGTHS)]
    loras = LoraSet.read([LoraSpec(adapted(kind, 0), strength)])
    merged = merge_graph(tiny_onnx / "sa3-m" / "dit.onnx", loras, tmp_path / "merged.onnx", SvdBases())
    expected = merged_velocity(weights, base, (adapted(kind, 0), strength))
    # Singular vectors of random weights are nearly degenerate: two fp32 decompositions differ by 1e-4.
    assert relative_difference(velocity(tmp_path / "merged.onnx"), expected) < (5e-4 if kind.endswith("-xs") else 1e-5)
    assert len(merged.changes) == len(base) == 22
    assert relative_difference(merged_velocity(weights, base), expected) > 0.05


@pytest.mark.parametrize("order", ((0, 1), (1, 0)))
def test_a_pair_is_merged_in_the_order_that_it_is_named(
    order: tuple[int, int], tiny_onnx: Path, weights: dict[str, torch.Tensor], base: dict[str, np.ndarray],
    adapted: Adapted, tmp_path: Path,
) -> None:  # fmt: skip
    pair = [(adapted("dora-rows", 1), 1.3), (adapted("bora", 2), 0.6)]
    specs = [pair[index] for index in order]
    loras = LoraSet.read([LoraSpec(*spec) for spec in specs])
    merge_graph(tiny_onnx / "sa3-m" / "dit.onnx", loras, tmp_path / "merged.onnx", SvdBases())
    expected, reversed_order = merged_velocity(weights, base, *specs), merged_velocity(weights, base, *specs[::-1])
    assert (
        relative_difference(velocity(tmp_path / "merged.onnx"), expected)
        < 1e-5
        < relative_difference(reversed_order, expected)
    )


class Native(torch.nn.Module):
    """The native network as a module, with the native row order of to_qkv."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        used = {key: value for key, value in weights.items() if not key.startswith("pretransform.")}
        self.held = torch.nn.ParameterList([torch.nn.Parameter(value, requires_grad=False) for value in used.values()])
        self.names = list(used)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return native.velocity(dict(zip(self.names, self.held, strict=True)), *inputs)


def turn_weights(path: Path) -> None:
    """Store the weights of every MatMul (out, in), each behind a Transpose, as exporters without folding do."""
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    turned = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            tensor = stored[node.input[1]]
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).T.copy(), tensor.name))
            turned.append(onnx.helper.make_node("Transpose", [tensor.name], [f"{tensor.name}_turned"], perm=[1, 0]))
            node.input[1] = turned[-1].output[0]
    nodes = [*turned, *model.graph.node]
    del model.graph.node[:], model.graph.value_info[:]  # the latter has the shapes of before
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def test_a_graph_with_native_rows_behind_transposes_is_told_from_one_with_regrouped_rows(
    tiny_onnx: Path, weights: dict[str, torch.Tensor], base: dict[str, np.ndarray], adapted: Adapted, tmp_path: Path
) -> None:
    frames = torch.export.Dim("L", min=2, max=4096)
    dims = tuple({i: frames for i, d in enumerate(spec.dims) if d == "L"} for spec in CONTRACTS["dit"].inputs)
    path = tmp_path / "native.onnx"
    with torch.no_grad():
        torch.onnx.export(
            Native(weights).eval(), tuple(inputs(1).values()), str(path), dynamo=True, verbose=False,
            input_names=[spec.name for spec in CONTRACTS["dit"].inputs], output_names=["velocity"],
            dynamic_shapes=(dims,),
        )  # fmt: skip
    turn_weights(path)
    _, layers = find_layers(path)
    assert layers[adapters.QKV].rows is None and layers[adapters.QKV].weight.transposed is False
    assert find_layers(tiny_onnx / "sa3-m" / "dit.onnx")[1][adapters.QKV].rows is not None
    assert {layer: item.shape for layer, item in layers.items()} == {k: v.shape for k, v in base.items()}
    for layer, item in layers.items():
        assert np.array_equal(item.native(), base[layer]), layer
    merge_graph(path, LoraSet.read([LoraSpec(adapted("dora-rows", 0))]), tmp_path / "merged.onnx", SvdBases())
    assert (
        relative_difference(
            velocity(tmp_path / "merged.onnx"), merged_velocity(weights, base, (adapted("dora-rows", 0), 1.0))
        )
        < 1e-3  # the exporter rounds angles of 62,832 rad in another order; a wrong order of rows gives 0.1
    )


@pytest.fixture(scope="module")
def root(tiny_fp8: Path, adapted: Adapted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an ONNX root with an adapter merged into FP16-mixed and FP8, and the torch engines."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copytree(tiny_fp8, folder / "onnx")
    half, fp8 = (folder / "onnx" / "sa3-m" / f"dit_{name}.onnx" for name in ("fp16mixed", "fp8"))
    result = run(merge_lora.main, ["--input", half, "--lora", f"{adapted('dora-rows', 0)}:0.8", "--fp8-base", fp8])
    assert result.code == 0, result.err
    argv = ["sa3-m", "sa3-m-fp8", "--backend", "torch", "--arch", "cpu", "--onnx-root", folder / "onnx"]
    result = run(build_from_onnx.main, [*argv, "--models-dir", folder / "models"])
    assert result.code == 0, result.err
    return folder


@pytest.fixture(scope="module")
def loras(adapted: Adapted) -> LoraSet:
    return LoraSet.read([LoraSpec(adapted("dora-rows", 0), 0.8)])


def graph(root: Path, precision: str, digest: str = "") -> Path:
    return root / "onnx" / "sa3-m" / (f"dit_{precision}.lora-{digest}.onnx" if digest else f"dit_{precision}.onnx")


def test_an_adapted_fp8_graph_is_as_near_to_its_fp16_graph_as_the_base_is(root: Path, loras: LoraSet) -> None:
    plain, quantised = velocity(graph(root, "fp16mixed")), velocity(graph(root, "fp8"))
    merged = velocity(graph(root, "fp16mixed", loras.digest))
    fp8 = velocity(graph(root, "fp8", loras.digest))
    assert worst_cosine(merged, plain) < 0.97, "the adapter does something"
    assert worst_cosine(fp8, merged) > worst_cosine(quantised, plain) - 0.001
    record = manifest.read_manifest(graph(root, "fp8", loras.digest))
    assert record is not None and record.settings["loras"] == json.loads(json.dumps(loras.to_manifest()))
    assert record.settings["rounding"] == "nearest" and record.inputs.keys() >= {"dit_fp8.onnx", "dit_fp16mixed.onnx"}


def test_a_merged_graph_tests_itself_at_load_and_keeps_the_rule_of_the_null_row(
    root: Path, loras: LoraSet, adapted: Adapted, tmp_path: Path
) -> None:
    line = ["--prompt", "x", "--seconds", 1, "--steps", 1, "--cfg", 3, "--precision", "fp8", "--backend", "onnxruntime",
            "--lora", f"{adapted('dora-rows', 0)}:0.8", "--out", tmp_path / "x.wav", "--quiet"]  # fmt: skip
    done = run(sa3_trt.main, [*line, "--onnx-root", root / "onnx"])
    assert done.code == 0 and "null row" not in done.err, done.err
    other = Path(shutil.copytree(root / "onnx", tmp_path / "onnx"))
    for merged in (graph(root, precision, loras.digest) for precision in ("fp16mixed", "fp8")):
        stated = manifest.read_manifest(merged)
        assert stated is not None and check_path(merged).name in stated.files
    swapped = graph(tmp_path, "fp8", loras.digest)
    shutil.copyfile(check_path(graph(tmp_path, "fp8")), check_path(swapped))  # of the model without the adapter
    done = run(sa3_trt.main, [*line, "--onnx-root", other])
    assert done.code == 3 and "changed since it was built" in done.err, done.err


def test_adapters_that_leave_no_finite_output_fail_a_gate_and_write_nothing(
    root: Path, adapted: Adapted, tmp_path: Path
) -> None:
    folder = shutil.copytree(root / "onnx" / "sa3-m", tmp_path / "sa3-m", ignore=shutil.ignore_patterns("*lora*"))
    before = listing(folder)
    huge = adapters.write_native(
        tmp_path / "huge.safetensors", "lora", {"model.transformer.project_out": (256, 128)}, alpha=4e6
    )
    done = run(merge_lora.main, ["--input", folder / "dit_fp16mixed.onnx", "--lora", f"{huge}:100"])
    assert done.code in (2, 3) and ("beyond fp16" in done.err or "no finite output" in done.err), done.err
    assert {name for name in listing(folder) if not name.endswith(".lock")} == set(before)


def test_scales_of_activations_and_16_bit_products_are_those_of_the_base(root: Path, loras: LoraSet) -> None:
    from sa3_build.engines.pack_weights import activation_scale

    _, before = find_layers(graph(root, "fp8"))
    _, after = find_layers(graph(root, "fp8", loras.digest))
    quantised = {layer for layer, item in before.items() if item.weight.scale is not None}
    assert len(quantised) == 9 and quantised == {k for k, v in after.items() if v.weight.scale is not None}
    for layer in before:
        assert activation_scale(before[layer].node) == activation_scale(after[layer].node)
    for layer in quantised:
        source = find_layers(graph(root, "fp16mixed", loras.digest))[1][layer].native()
        off = np.linalg.norm(after[layer].native() - source) / np.linalg.norm(source)
        assert off < 0.035, "nearest codes of the merged weight"


def test_the_torch_engine_changes_in_place_and_comes_back(root: Path, loras: LoraSet, adapted: Adapted) -> None:
    folder = root / "models" / "cpu" / "sa3-m"
    half = folder / "dit_fp16mixed.safetensors"
    for precision, limit in (("fp16mixed", 0.002), ("fp8", 0.05)):
        with TorchEngine(folder / f"dit_{precision}.safetensors", "build it") as engine:
            before = engine.run(inputs())["velocity"]
            engine.set_loras(loras, half, "build it")
            during = engine.run(inputs())["velocity"]
            expected = velocity(graph(root, precision, loras.digest))
            assert (
                float((during - expected).norm() / expected.norm())
                < limit
                < float((before - expected).norm() / expected.norm())
            )
            engine.set_loras(LoraSet.read([LoraSpec(adapted("lora", 3))]), half, "build it")
            assert not torch.equal(engine.run(inputs())["velocity"], during)
            engine.set_loras(loras, half, "build it")
            assert torch.equal(engine.run(inputs())["velocity"], during)
            engine.set_loras(LoraSet(), half, "build it")
            assert torch.equal(engine.run(inputs())["velocity"], before)


def test_codes_of_the_torch_engine_are_those_of_the_merged_graph(root: Path, loras: LoraSet) -> None:
    _, merged = find_layers(graph(root, "fp16mixed", loras.digest))
    _, fp8 = find_layers(graph(root, "fp8", loras.digest))
    layer = "model.transformer.layers.0.cross_attn.to_kv"
    scale, codes = quantized(torch.from_numpy(merged[layer].native()))
    assert fp8[layer].weight.scale is not None
    assert np.array_equal(codes.view(torch.uint8).numpy(), fp8[layer].weight.codes().view(np.uint8))
    assert np.array_equal(scale.numpy(), fp8[layer].weight.scale.astype(np.float32).reshape(-1))
    _, saturated = quantized(torch.tensor([[1e5, -1e5, 1.0]]))
    assert saturated.float().tolist()[0][:2] == [448.0, -448.0]


def test_merged_weights_are_kept_on_disk_and_made_again_when_damaged(
    root: Path, adapted: Adapted, tmp_path: Path
) -> None:
    folder = shutil.copytree(root / "models" / "cpu" / "sa3-m", tmp_path / "sa3-m")
    own, half = (folder / f"dit_{name}.safetensors" for name in ("fp8", "fp16mixed"))
    kept = folder / f"{own.name}.loras"
    shutil.rmtree(kept, ignore_errors=True)

    def velocity_with(path: Path) -> torch.Tensor:
        with TorchEngine(own, "build it") as engine:
            engine.set_loras(LoraSet.read([LoraSpec(path)]), half, "build it")
            return engine.run(inputs())["velocity"]

    adapter = tmp_path / "a.safetensors"
    shutil.copy(adapted("lora", 3), adapter)
    fresh = velocity_with(adapter)
    (file,) = kept.glob("*.safetensors")
    written = file.read_bytes()
    replaced = from_another(file, adapted("lora", 4), velocity_with)
    assert torch.equal(velocity_with(adapter), replaced), "the file is read, not merged anew"
    record = manifest.read_manifest(file)
    assert record is not None
    manifest.write_manifest(file, record.kind, [file], record.inputs, {**record.settings, "loras": []}, tools={})
    assert torch.equal(velocity_with(adapter), fresh), "a whole file that states another set is not this one's"
    file.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))  # as long as before, one bit off
    assert torch.equal(velocity_with(adapter), fresh)
    assert file.read_bytes() == written
    file.with_name(file.name + ".manifest.json").write_text("{")
    assert torch.equal(velocity_with(adapter), fresh)
    shutil.copy(adapted("lora", 5), adapter)  # another file under the same name
    assert not torch.equal(velocity_with(adapter), fresh)
    assert len(list(kept.glob("*.safetensors"))) == 3


def from_another(file: Path, other: Path, velocity_with: Callable[[Path], torch.Tensor]) -> torch.Tensor:
    """Put the kept weights of another adapter in the place of `file`, under the settings of its own manifest.

    Returns the velocity of the other.
    """
    record = manifest.read_manifest(file)
    assert record is not None
    before = set(file.parent.glob("*.safetensors"))
    velocity_of_other = velocity_with(other)
    (made,) = set(file.parent.glob("*.safetensors")) - before
    shutil.copy(made, file)
    manifest.write_manifest(file, record.kind, [file], record.inputs, record.settings, tools=record.tools)
    return velocity_of_other


def adapted_shape(root: Path, layer: str) -> tuple[int, int]:
    return find_layers(graph(root, "fp16mixed"))[1][layer].shape


def test_activations_beyond_the_calibrated_range_are_named(root: Path, adapted: Adapted) -> None:
    folder = root / "models" / "cpu" / "sa3-m"
    with TorchEngine(folder / "dit_fp8.safetensors", "build it") as engine:
        engine.set_loras(LoraSet.read([LoraSpec(adapted("lora", 0), 60.0)]), folder / "dit_fp16mixed.safetensors", "x")
        engine.run(inputs())
        assert any(layer.startswith("model.transformer.layers.0.") for layer in engine.saturated())
        assert engine.saturated() == []
        text = "model.to_cond_embed.2"  # its own input stays, the inputs of the products behind it do not
        only = adapters.write_native(root / "text.safetensors", "lora", {text: adapted_shape(root, text)})
        engine.set_loras(LoraSet.read([LoraSpec(only, 60.0)]), folder / "dit_fp16mixed.safetensors", "x")
        engine.run(inputs())
        assert "model.transformer.layers.0.cross_attn.to_kv" in engine.saturated()
        engine.set_loras(LoraSet.read([LoraSpec(adapted("lora", 0), 0.01)]), folder / "dit_fp16mixed.safetensors", "x")
        engine.run(inputs())
        assert engine.saturated() == []


def test_the_command_makes_the_same_sound_of_a_merged_graph_and_of_a_merge_at_load(
    root: Path, adapted: Adapted, tmp_path: Path
) -> None:
    import soundfile

    argv = ["--prompt", "x", "--seconds", 1, "--seed", 3, "--precision", "fp16mixed", "--onnx-root", root / "onnx",
            "--models-dir", root / "models"]  # fmt: skip
    sounds = {}
    for name, more in {
        "plain": ["--backend", "torch"],
        "torch": ["--backend", "torch", "--lora", f"{adapted('dora-rows', 0)}:0.8"],
        "graph": ["--backend", "onnxruntime", "--lora", f"{adapted('dora-rows', 0)}:0.8"],
    }.items():
        result = run(
            sa3_trt.main, [*argv, *more, "--out", tmp_path / f"{name}.wav", "--save-latents", tmp_path / "l.npz"]
        )
        assert result.code == 0, result.err
        assert ("LoRA dora-rows-0: dora-rows, rank 4, 22 layers, strength 0.8" in result.err) == (name != "plain")
        sounds[name] = np.load(tmp_path / "l.npz")["latents"]
    off = np.linalg.norm(sounds["torch"] - sounds["graph"]) / np.linalg.norm(sounds["graph"])
    assert off < 0.02 < np.linalg.norm(sounds["plain"] - sounds["graph"]) / np.linalg.norm(sounds["graph"])
    again = run(sa3_trt.main, [*argv[6:], "--again", tmp_path / "graph.wav", "--backend", "onnxruntime",
                               "--out", tmp_path / "again.wav"])  # fmt: skip
    assert again.code == 0, again.err
    assert np.array_equal(soundfile.read(tmp_path / "again.wav")[0], soundfile.read(tmp_path / "graph.wav")[0])


def test_a_missing_merged_graph_is_refused_with_the_command_that_makes_it(
    root: Path, adapted: Adapted, tmp_path: Path
) -> None:
    before = listing(root)
    argv = ["--prompt", "x", "--seconds", 1, "--precision", "fp8", "--onnx-root", root / "onnx", "--models-dir",
            tmp_path, "--out", tmp_path / "x.wav", "--lora", f"{adapted('lora', 5)}:0.7"]  # fmt: skip
    result = run(sa3_trt.main, [*argv, "--backend", "onnxruntime"])
    assert_user_error(result, "sa3-m-fp8.lora-")
    hint = result.err.splitlines()[1]
    assert "merge_lora.py --input" in hint and f"{adapted('lora', 5)}:0.7" in hint and "--fp8-base" in hint
    assert_user_error(run(sa3_trt.main, [*argv, "--backend", "torch"]), "no engine")
    assert listing(root) == before


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--input", "dit_fp8.onnx"], "quantised"),
        (["--rounding", "gptq"], "--rounding gptq requires"),
        (["--fp8-base", "dit_other.onnx"], "was not built from"),
        (["--onnx", "dit_fp16mixed.onnx"], "is also an input"),
    ],
)
def test_a_merge_that_would_be_wrong_is_refused_and_writes_nothing(
    more: list[str], word: str, root: Path, adapted: Adapted, tmp_path: Path
) -> None:
    folder = tmp_path / "sa3-m"
    shutil.copytree(root / "onnx" / "sa3-m", folder, ignore=shutil.ignore_patterns("*lora*"))
    if word == "was not built from":
        other_loras = LoraSet.read([LoraSpec(adapted("lora", 8), 9.0)])
        from sa3_build.lora.requantize import requantize

        requantize(folder / "dit_fp8.onnx", folder / "dit_fp16mixed.onnx", other_loras, folder / more[1], SvdBases())
    before = listing(folder)
    words = [str(folder / value) if value.endswith(".onnx") else value for value in more]
    argv = ["--input", folder / "dit_fp16mixed.onnx", "--lora", adapted("lora", 0), *words]
    result = run(merge_lora.main, [*argv, *(["--onnx", folder / "new.onnx"] if "--onnx" not in more else [])])
    assert result.code == 2 and word in result.err, result
    new_files = {name for name in listing(folder) if name not in before}
    assert not [name for name in new_files if name.startswith("dit_fp8.lora")], new_files


def test_calibration_rows_are_those_of_the_adapted_model(
    tiny_checkpoint: Path, tiny_calib: Path, adapted: Adapted, tmp_path: Path
) -> None:
    import make_calib

    from sa3_trt_core.artifacts.calibration_set import CalibrationSet, tensors

    config, stored = tiny_checkpoint / "model_config.json", tiny_checkpoint / "model.safetensors"
    argv = ["--model-config", config, "--checkpoint", stored, "--prompts", 2, "--duration", 0.5, "--steps", 4,
            "--cover", "text", "--lora", f"{adapted('dora-rows', 0)}:0.8", "--out", tmp_path / "a.npz"]  # fmt: skip
    result = run(make_calib.main, argv)
    assert result.code == 0, result.err
    rows, plain = (list(CalibrationSet.open(path)) for path in (tmp_path / "a.npz", tiny_calib))
    with_adapter, without = tensors(rows[1]), tensors(plain[1])
    assert torch.equal(tensors(rows[0])["x"], tensors(plain[0])["x"])  # the same noise
    assert not torch.allclose(with_adapter["x"], without["x"], atol=1e-3)
    record = manifest.read_manifest(tmp_path / "a.npz")
    assert record is not None and record.settings["loras"]["adapters"][0]["strength"] == 0.8


def test_validation_compares_both_precisions_with_the_adapter(root: Path, adapted: Adapted, tmp_path: Path) -> None:
    import validate_fp8

    argv = ["--backend", "onnxruntime", "--onnx-root", root / "onnx", "--models-dir", root / "models", "--prompts", 1,
            "--seconds", 1, "--extra", 0, "--no-audio", "--out", tmp_path]  # fmt: skip
    result = run(validate_fp8.main, [*argv, "--lora", f"{adapted('dora-rows', 0)}:0.8"])
    assert result.code in (0, 3), result.err
    about = json.loads((tmp_path / "report.json").read_text())
    text = json.dumps(about)
    assert "dit_fp16mixed.lora-" in text and "dit_fp8.lora-" in text
    assert "dora-rows-0: dora-rows, rank 4, 22 layers, strength 0.8" in text
    assert "Adapter of both: dora-rows-0: dora-rows" in (tmp_path / "report.md").read_text()
    assert_user_error(run(validate_fp8.main, [*argv, "--lora", f"{adapted('dora-rows', 0)}:0.7"]), "sa3-m.lora-")
