"""The PyTorch engine: packed from ONNX by structure, same output as ONNX Runtime on the same file."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import bench_dit
import build_dit_fp16mixed
import build_from_onnx
import onnx
import pytest
import torch
from conftest import onnx_of, run_checked
from torch import Tensor
from torch.nn import functional

import build
import sa3_trt
from helpers.commands import run
from sa3_trt_core import paths
from sa3_trt_core.artifacts.check_rows import check_path
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.engines import BACKENDS
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.engines.torch import TorchEngine
from sa3_trt_core.sampling import schedule
from sa3_trt_core.targets import find_target

ALIKE = {"sa3-m": 0.999999, "sa3-m-fp8": 0.9998}  # FP8: an activation at a step of E4M3 may fall on either side
FRAMES = 20
STAGES = ("t5gemma", "same-l-encoder", "same-l-decoder")


def packed(models: Path, name: str) -> Path:
    return BACKENDS["torch"].engine_path(models, paths.NO_GPU, find_target(name))


@pytest.fixture(scope="session")
def tiny_models(tiny_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the torch engines of every stage and both precisions, built by the command. Read only."""
    models = tmp_path_factory.mktemp("tiny") / "models"
    argv = [*STAGES, "sa3-m", "sa3-m-fp8", "--backend", "torch", "--arch", "cpu", "--onnx-root", tiny_fp8]
    run_checked(build_from_onnx.main, [*argv, "--models-dir", models])
    return models


def test_the_menu_shows_torch_engines_beside_the_others(tiny_models: Path) -> None:
    argv = ["--list", "--json", "--arch", "cpu", "--models-dir", tiny_models]
    target_by_name = {target["name"]: target for target in json.loads(run(build.main, argv).out)}
    assert (
        target_by_name["sa3-m-fp8"]["engines"]["torch"]["state"] == "current"
        and target_by_name["sa3-m-fp8"]["state"] != "current"
    )
    state_by_name = {
        target["name"]: target["state"] for target in json.loads(run(build.main, [*argv, "--backend", "torch"]).out)
    }
    assert (state_by_name["sa3-m-fp8"], state_by_name["sa3-sm-sfx"], state_by_name["t5gemma"]) == (
        "current",
        "missing",
        "current",
    )
    assert re.search(r"^sa3-m .* missing; torch current +[\d.]+ [kM]B$", run(build.main, argv[:1] + argv[2:]).out, re.M)


def inputs_at(sigma: float, seed: int = 0, rows: int = 3) -> dict[str, Tensor]:
    """Return DiT inputs of a text row, an in-painting row and an unconditional row."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 0.3 * torch.randn(rows, 256, 768, generator=generator)
    mask = (torch.arange(256) < 30).float().repeat(rows, 1)
    local = torch.zeros(rows, 257, FRAMES)
    if rows > 1:
        local[1, 0, ::2] = 1.0
        local[1, 1:, ::2] = torch.randn(256, FRAMES // 2, generator=generator)
        hidden[-1], mask[-1] = 0.0, 0.0
    return {
        "x": torch.randn(rows, 256, FRAMES, generator=generator), "t": torch.full((rows,), sigma),
        "t5_hidden": hidden, "t5_mask": mask,
        "seconds_total": torch.tensor([29.72, 47.0, 183.25])[:rows].contiguous(), "local_add_cond": local,
    }  # fmt: skip


def worst_cosine(engine: TorchEngine, reference: OnnxRuntimeEngine) -> float:
    """Return the lowest cosine of the denoised latents over the sampler's noise levels and the rows."""
    worst = 1.0
    for index, sigma in enumerate(schedule.sigmas(8)[:-1]):
        inputs = inputs_at(float(sigma), seed=index)
        denoised = [
            (inputs["x"] - sigma * model.run(inputs)["velocity"]).double().flatten(1) for model in (engine, reference)
        ]  # fmt: skip
        worst = min(worst, float(functional.cosine_similarity(denoised[0], denoised[1]).min()))
    return worst


@pytest.mark.parametrize("name", ALIKE)
def test_it_gives_what_onnx_runtime_gives_on_the_same_file(tiny_fp8: Path, tiny_models: Path, name: str) -> None:
    engine = TorchEngine(packed(tiny_models, name), "again")
    with engine, OnnxRuntimeEngine(onnx_of(tiny_fp8, name)) as reference:
        assert worst_cosine(engine, reference) > ALIKE[name]


def test_the_fp8_engine_runs_fp8_products_and_not_the_16_bit_ones(tiny_fp8: Path, tiny_models: Path) -> None:
    engine = TorchEngine(packed(tiny_models, "sa3-m-fp8"), "again")
    with engine, OnnxRuntimeEngine(onnx_of(tiny_fp8, "sa3-m")) as half:
        assert worst_cosine(engine, half) < ALIKE["sa3-m-fp8"]


@pytest.mark.parametrize("switches", [["--no-bake-rope", "--no-stack-attention", "--no-pad-k"], ["--no-pad-k"]])
def test_graphs_of_other_shapes_are_packed_too(tiny_onnx: Path, tmp_path: Path, switches: list[str]) -> None:
    root = tmp_path / "onnx"
    half = onnx_of(root, "sa3-m")
    run_checked(build_dit_fp16mixed.main, ["--input", onnx_of(tiny_onnx, "sa3-m-fp32"), "--onnx", half, *switches])
    argv = ["sa3-m", "--backend", "torch", "--arch", "cpu", "--onnx-root", root, "--models-dir", tmp_path / "models"]
    run_checked(build_from_onnx.main, argv)
    with TorchEngine(packed(tmp_path / "models", "sa3-m"), "again") as engine, OnnxRuntimeEngine(half) as reference:
        assert worst_cosine(engine, reference) > ALIKE["sa3-m"]


def test_a_row_that_is_told_something_else_is_worked_out_again_and_its_neighbours_stay(tiny_models: Path) -> None:
    first, other_inputs = inputs_at(0.9), inputs_at(0.9, seed=7)
    for name in ("t5_hidden", "t5_mask", "seconds_total", "local_add_cond"):
        changed = {key: value.clone() for key, value in first.items()}
        changed[name][1] = 1.0 - changed[name][1] if name == "t5_mask" else other_inputs[name][1] + 0.5
        with TorchEngine(packed(tiny_models, "sa3-m"), "again") as engine:
            before = engine.run(first)["velocity"]
            after = engine.run(changed)["velocity"]
        with TorchEngine(packed(tiny_models, "sa3-m"), "again") as fresh:
            expected = fresh.run(changed)["velocity"]
        assert torch.equal(after, expected), name
        assert not torch.equal(after[1], before[1]), name
        assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2]), name


def test_a_row_written_in_place_is_noticed(tiny_models: Path) -> None:
    inputs = inputs_at(0.5)
    with TorchEngine(packed(tiny_models, "sa3-m"), "again") as engine:
        before = engine.run(inputs)["velocity"]
        inputs["seconds_total"][0] = 5.0
        inputs["t5_hidden"][0] *= -1.0
        after = engine.run(inputs)["velocity"]
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1:], before[1:])


def test_rows_given_one_by_one_are_those_of_the_batch_and_only_new_ones_are_taken_in(tiny_models: Path) -> None:
    inputs, others = inputs_at(0.7), inputs_at(0.7, seed=9)
    names = [field.name for field in fields(Conditioning)]

    def rows_of(tensors: dict[str, torch.Tensor]) -> list[Conditioning]:
        return [Conditioning(*(tensors[name][row : row + 1] for name in names)) for row in range(3)]

    def batch(rows: list[Conditioning]) -> torch.Tensor:
        joined = Conditioning.joined(rows)
        with TorchEngine(packed(tiny_models, "sa3-m"), "again") as new:
            return new.run({"x": x, "t": t, **{name: getattr(joined, name) for name in names}})["velocity"]

    def fresh(rows: list[Conditioning]) -> torch.Tensor:
        with TorchEngine(packed(tiny_models, "sa3-m"), "again") as new:
            return new.rows_velocity(x, t, rows)

    x, t, rows = inputs["x"], inputs["t"], rows_of(inputs)
    silent = replace(rows[0], local_add_cond=torch.zeros_like(rows[0].local_add_cond))
    with TorchEngine(packed(tiny_models, "sa3-m"), "again") as engine:
        for order in (rows, [rows[0], rows_of(others)[1], rows[2]], [silent, silent, silent], rows):
            velocity = engine.rows_velocity(x, t, order)
            # The cross-attention keys of one row round otherwise than those of three.
            assert torch.equal(velocity, fresh(order)) and torch.allclose(velocity, batch(order), atol=5e-3)
        rows[0].t5_hidden.mul_(-1.0)  # the same object: it must not be changed in place, and is not compared again
        assert not torch.allclose(engine.rows_velocity(x, t, rows), batch(rows), atol=5e-3)
        assert torch.equal(engine.rows_velocity(x, t, [replace(rows[0]), *rows[1:]]), fresh(rows))


def test_rows_do_not_depend_on_their_neighbours(tiny_models: Path) -> None:
    inputs = inputs_at(0.7)
    with TorchEngine(packed(tiny_models, "sa3-m-fp8"), "again") as engine:
        together = engine.run(inputs)["velocity"]
        for row in range(3):
            alone = engine.run({name: value[row : row + 1] for name, value in inputs.items()})["velocity"]
            assert torch.allclose(together[row], alone[0], atol=1e-5)


MODES: dict[str, list[object]] = {
    "text": [],
    "guided": ["--cfg", 3, "--negative-prompt", "noise"],
    "audio to audio": ["--init-noise-level", 0.6],
    "in-painting": ["--inpaint-range", "0.2,0.6"],
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_sounds_as_through_onnx_runtime(
    tiny_fp8: Path, tiny_models: Path, tmp_path: Path, mode: str
) -> None:
    import soundfile

    line: list[object] = ["--prompt", "slow piano", "--seconds", 1, "--seed", 3, "--steps", 2, "--quiet"]
    line += ["--onnx-root", tiny_fp8, "--models-dir", tiny_models, *MODES[mode]]
    if mode in ("audio to audio", "in-painting"):
        soundfile.write(tmp_path / "in.wav", 0.3 * torch.randn(44100, 2).numpy(), 44100)
        line += ["--init-audio", tmp_path / "in.wav"]
    sounds = []
    for backend in ("torch", "onnxruntime"):
        out = tmp_path / f"{backend}.wav"
        run_checked(sa3_trt.main, [*line, "--backend", backend, "--out", out])
        sounds.append(torch.from_numpy(soundfile.read(out)[0]).flatten())
    assert sounds[0].abs().max() > 0
    assert functional.cosine_similarity(sounds[0], sounds[1], dim=0) > 0.9999


def test_what_is_current_is_kept_and_a_changed_graph_is_packed_again(tiny_fp8: Path, tmp_path: Path) -> None:
    root = tmp_path / "onnx"
    shutil.copytree(tiny_fp8, root)
    argv = ["sa3-m", "--backend", "torch", "--arch", "cpu", "--onnx-root", root, "--models-dir", tmp_path / "models"]
    states = []
    for _ in range(2):
        states += json.loads(run(build_from_onnx.main, [*argv, "--json"]).out)
    model = onnx.load(onnx_of(root, "sa3-m"), load_external_data=False)
    model.doc_string = "another"
    onnx_of(root, "sa3-m").write_bytes(model.SerializeToString())
    check_path(onnx_of(root, "sa3-m")).unlink()  # the answers of the other graph
    states += json.loads(run(build_from_onnx.main, [*argv, "--json"]).out)
    assert [state["state"] for state in states] == ["built", "current", "built"]


@pytest.mark.parametrize(("name", "reason"), [("sa3-m", "worst denoised cosine"), ("sa3-m-fp8", "own response to")])
def test_a_graph_that_computes_something_else_is_a_failed_gate(
    tiny_fp8: Path, tmp_path: Path, name: str, reason: str
) -> None:
    root = tmp_path / "onnx"
    shutil.copytree(tiny_fp8, root)
    path = onnx_of(root, name)
    model = onnx.load(path, load_external_data=False)
    gate = [node for node in model.graph.node if node.op_type == "Sigmoid"][-1]
    gate.op_type = "Tanh"
    path.write_bytes(model.SerializeToString())
    argv = [name, "--backend", "torch", "--arch", "cpu", "--onnx-root", root, "--models-dir", tmp_path / "models"]
    result = run(build_from_onnx.main, argv)
    assert result.code == 3 and reason in result.err
    assert not packed(tmp_path / "models", name).exists()


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["same-l-decoder-fp32", "--arch", "cpu"], "no torch engine"),
        (["sa3-m-fp32", "--arch", "cpu"], "no torch engine"),
        (["sa3-m", "--arch", "cpu", "--best-of", "2"], "GPU"),
        (["sa3-m", "--arch", "cpu", "--prebuilt"], "TensorRT"),
        (["sa3-m-fp8", "--arch", "sm_80"], "FP8 tensor cores"),
    ],
)
def test_what_it_cannot_build_is_said_in_two_lines(
    tiny_fp8: Path, tmp_path: Path, argv: list[object], reason: str
) -> None:
    result = run(build_from_onnx.main, [*argv, "--backend", "torch", "--onnx-root", tiny_fp8, "--models-dir", tmp_path])
    assert result.code == 2 and reason in result.err and len(result.err.strip().splitlines()) == 2
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_graph_of_another_precision_is_refused(tiny_fp8: Path, tmp_path: Path) -> None:
    root = tmp_path / "onnx"
    shutil.copytree(tiny_fp8, root)
    for suffix in ("", ".data"):
        source, target = (Path(f"{onnx_of(root, name)}{suffix}") for name in ("sa3-m", "sa3-m-fp8"))
        shutil.copy(source, target)
    model = onnx.load(onnx_of(root, "sa3-m-fp8"), load_external_data=False)
    assert model.graph.node
    argv = ["sa3-m-fp8", "--backend", "torch", "--arch", "cpu", "--onnx-root", root, "--models-dir", tmp_path / "m"]
    result = run(build_from_onnx.main, argv)
    assert result.code == 2 and "is a DiT in fp16mixed, expected fp8" in result.err


def test_a_torn_engine_and_a_missing_one_say_how_to_build_it(tiny_fp8: Path, tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models, tmp_path / "models")
    engine = packed(tmp_path / "models", "sa3-m")
    argv = ["--prompt", "x", "--seconds", 1, "--quiet", "--backend", "torch", "--onnx-root", tiny_fp8]
    argv += ["--models-dir", tmp_path / "models", "--out", tmp_path / "a.wav"]
    engine.write_bytes(engine.read_bytes()[:-100])
    torn = run(sa3_trt.main, argv)
    engine.unlink()
    missing = run(sa3_trt.main, argv)
    for result in (torn, missing):
        assert result.code == 2 and "build_from_onnx.py sa3-m --backend torch" in result.err
        assert len(result.err.strip().splitlines()) == 2
    assert not (tmp_path / "a.wav").exists()


def test_the_benchmark_compares_with_diffusers_on_the_same_weights(tmp_path: Path) -> None:
    argv = ["--tiny", "--lengths", 12, "--batches", "--peers", "eager", "--repeats", 1, "--out", tmp_path]
    run_checked(bench_dit.main, argv)
    record = json.loads((tmp_path / "bench.json").read_text())
    cosines = {timing["contestant"]: timing["cosine"] for timing in record["timings"]}
    assert cosines["fp16mixed"] > 0.99999 and 0.999 < cosines["fp8"] < cosines["fp16mixed"]
    assert "diffusers fp16" in (tmp_path / "bench.md").read_text() and (tmp_path / "bench.png").stat().st_size > 1000
