"""The benchmarks of the producers, of engines by their files and of a start, on real commands."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import bench_dit
import bench_generate
import bench_producer
import bench_start
import pytest
from conftest import onnx_of

from helpers import broken_fp8
from helpers.commands import assert_user_error, listing, run
from sa3_trt_core.errors import ToolError

PAIR = ["--engines", "fp16mixed@onnxruntime", "fp8@onnxruntime", "--lengths", "12", "--repeats", "1", "--batches"]


def test_a_step_is_measured(tmp_path: Path) -> None:
    argv = [
        "make_demo_checkpoint.py",
        "--random",
        "--out",
        str(tmp_path / "checkpoint"),
        "--width",
        "128",
        "--depth",
        "1",
    ]
    measured = bench_producer.measure("checkpoint", argv, tmp_path)
    weights = tmp_path / "checkpoint" / "model.safetensors"
    assert measured.written > weights.stat().st_size > 1_000_000
    assert measured.peak_memory > 100_000_000  # torch alone is more
    assert 0 < measured.peak_scratch <= 2 * measured.written  # made in a hidden folder and renamed


def test_a_step_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="step export ended with 2"):
        bench_producer.measure("export", ["export_onnx.py", "--model-dir", "absent", "--onnx-root", "x"], tmp_path)


@pytest.mark.parametrize("ptq", ["modelopt", "direct"])
def test_the_chain_is_made_of_commands_that_parse(tmp_path: Path, ptq: str) -> None:
    args = bench_producer.make_parser().parse_args(["--work", str(tmp_path), "--ptq", ptq, "--arch", "sm_89"])
    chain = bench_producer.steps(args, tmp_path)
    assert [step for step, _ in chain][-2:] == ["FP8", "engine"]
    for _, line in chain:
        module = importlib.import_module(re.sub(r"\.py$", "", line[0]))
        assert module.make_parser().parse_args(line[1:])


def test_engines_are_compared_by_their_files(tiny_fp8: Path, tmp_path: Path) -> None:
    result = run(bench_dit.main, [*PAIR, "2", "--onnx-root", tiny_fp8, "--out", tmp_path])
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "bench.json").read_text())
    half, fp8, half_rows, fp8_rows = record["timings"]
    assert [timing["contestant"] for timing in record["timings"][:2]] == PAIR[1:3] and record["judged"] == [PAIR[2]]
    assert half["cosine"] == pytest.approx(1.0, abs=1e-9) and 0.99 < fp8["cosine"] < 0.999999
    assert half_rows["rows"] == 2 and half_rows["batch_cosine"] is None and fp8_rows["batch_cosine"] > 0.999
    assert "against fp16mixed@onnxruntime" in result.out and "of the floor" not in result.out
    assert result.out.strip() == (tmp_path / "bench.md").read_text().strip()


def test_an_engine_that_computes_something_else_ends_the_run(tiny_fp8: Path, tmp_path: Path) -> None:
    root = tmp_path / "onnx"
    shutil.copytree(tiny_fp8, root)
    broken_fp8.break_graph(onnx_of(tiny_fp8, "sa3-m-fp8"), onnx_of(root, "sa3-m-fp8"), broken_fp8.swap_weights)
    for beside in (".manifest.json", ".check.npz"):  # with them it is known to be another file
        Path(f"{onnx_of(root, 'sa3-m-fp8')}{beside}").unlink()
    result = run(bench_dit.main, [*PAIR, "--onnx-root", root, "--out", tmp_path / "out"])
    assert result.code == 3 and "fp8@onnxruntime, 1 x 12: cosine" in result.err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["fp16mixed"], "'fp16mixed' is not PRECISION@BACKEND"),
        (["fp16mixed@onnx", "fp8@torch"], "'fp16mixed@onnx' is not PRECISION@BACKEND"),
        (["fp8@onnxruntime", "fp8@onnxruntime"], "is repeated"),
        (["fp8@onnxruntime"], "a comparison requires two engines"),
        (["fp8@onnxruntime", "fp8@torch"], "no engine"),
    ],
)
def test_engines_that_cannot_be_compared(tiny_fp8: Path, tmp_path: Path, words: list[str], reason: str) -> None:
    argv = ["--engines", *words, "--onnx-root", tiny_fp8, "--models-dir", tmp_path / "models", "--out", tmp_path]
    assert_user_error(run(bench_dit.main, argv), reason)
    assert listing(tmp_path) == {}


def test_a_start_is_taken_apart(tiny_fp8: Path) -> None:
    argv = ["--backend", "onnxruntime", "--onnx-root", tiny_fp8, "--seconds", "1", "--repeats", "1", "--json"]
    result = run(bench_start.main, argv)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    for kind in (bench_start.COLD, bench_start.WARM):
        *parts, whole = report["seconds"][kind].values()
        assert all(part > 0 for part in parts) and sum(parts) == pytest.approx(whole)
    cold, warm = (report["seconds"][kind]["seconds_to_first_step"] for kind in (bench_start.COLD, bench_start.WARM))
    assert report["cold_over_warm"] == pytest.approx(cold / warm)


def test_a_start_that_fails_is_named(tmp_path: Path) -> None:
    result = run(bench_start.main, ["--backend", "onnxruntime", "--onnx-root", tmp_path, "--repeats", "1"])
    assert result.code == 2 and "sa3_trt ended with 2" in result.err and "--steps 1" in result.err


def test_whole_generations_are_timed_beside_diffusers(tmp_path: Path) -> None:
    argv = [
        "--tiny",
        "--seconds",
        1,
        "--precisions",
        "fp16mixed",
        "--peers",
        "eager",
        "--repeats",
        1,
        "--ring",
        2,
        "--sounds",
        3,
    ]
    result = run(bench_generate.main, [*argv, "--out", tmp_path])
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "generate.json").read_text())
    assert [timing["contestant"] for timing in record["timings"]] == ["fp16mixed", "diffusers fp16 eager"]
    assert all(timing["ms"] > 0 and min(timing["stages"].values()) > 0 for timing in record["timings"])
    assert record["notes"]["fp16mixed: decoder against diffusers fp32"] > 50.0
    (ring,) = record["rings"]
    assert (ring["depth"], ring["sounds"]) == (2, 3) and 0 < ring["p50"] <= ring["p99"] and 0 < ring["dit_share"] <= 1
    assert "sounds per second" in result.out
    assert "published: TensorRT, H100" in result.out and (tmp_path / "generate.png").stat().st_size > 1000
