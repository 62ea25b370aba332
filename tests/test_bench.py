"""The producer benchmark: it measures real commands, and its chain is made of commands that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import bench_producer
import pytest

from sa3_trt_core.errors import ToolError


def test_a_step_is_measured(tmp_path: Path) -> None:
    line = [
        "make_demo_checkpoint.py",
        "--random",
        "--out",
        str(tmp_path / "checkpoint"),
        "--width",
        "128",
        "--depth",
        "1",
    ]
    one = bench_producer.measure("checkpoint", line, tmp_path)
    weights = tmp_path / "checkpoint" / "model.safetensors"
    assert one.made > weights.stat().st_size > 1_000_000
    assert one.peak_memory > 100_000_000  # torch alone is more
    assert 0 < one.peak_scratch <= 2 * one.made  # made in a hidden folder and renamed


def test_a_step_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="step export ended with 2"):
        bench_producer.measure("export", ["export_onnx.py", "--model-dir", "absent", "--onnx-root", "x"], tmp_path)


@pytest.mark.parametrize("ptq", ["modelopt", "direct"])
def test_the_chain_is_made_of_commands_that_parse(tmp_path: Path, ptq: str) -> None:
    args = bench_producer.parser().parse_args(["--work", str(tmp_path), "--ptq", ptq, "--arch", "sm_89"])
    chain = bench_producer.steps(args, tmp_path)
    assert [step for step, _ in chain][-2:] == ["FP8", "engine"]
    for _, line in chain:
        module = importlib.import_module(re.sub(r"\.py$", "", line[0]))
        assert module.parser().parse_args(line[1:])
