"""Memory and disk requirements of a build, printed and checked before it starts."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import build_dit_fp8
import numpy as np
import onnx_ir as ir
import pytest

from helpers.commands import listing, run
from sa3_build import memory
from sa3_build.graph import io as graph_io
from sa3_build.graph.io import save_linked
from sa3_build.recipes import requirements_check
from sa3_trt_core.targets import dit_target

# A stage that frees every other one of many blocks, so that glibc keeps the fragmented memory between them.
FRAGMENTS = """
import sys
from pathlib import Path
import numpy as np
from sa3_build.recipes.stages import Stage, WorkingFolder

def resident():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmRSS"].split()[0]) * 1024

kept = []

def work():
    blocks = [np.ones(12_500) for _ in range(4000)]  # of 100 kB each
    kept.extend(blocks[::2])
    return {"resident": resident()}

folder = WorkingFolder(Path(sys.argv[1]), {})
folder.open()
folder.run(Stage("work", (), (), work))
print(folder.done["work"]["resident"] - resident())
"""

HALF, FP8 = (dit_target("medium", precision).onnx[0] for precision in ("fp16mixed", "fp8"))


def test_modelopt_is_taken_only_where_its_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.available_memory()
    assert free is not None and 0 < free < 1 << 50
    for size, expected in ((free // 20, "modelopt"), (free, "direct")):
        chosen, reason = requirements_check.choose_ptq(size)
        assert chosen == expected and "free" in reason


def test_a_dry_run_says_what_it_takes_and_writes_nothing(tiny_fp8: Path, tiny_calib: Path, tmp_path: Path) -> None:
    argv = ["--input", tiny_fp8 / HALF, "--calib", tiny_calib, "--onnx", tmp_path / "new" / "dit_fp8.onnx"]
    result = run(build_dit_fp8.main, [*argv, "--dry-run", "--ptq", "direct", "--work-dir", tmp_path / "work"])
    assert result.code == 0 and listing(tmp_path) == {}
    for words in (
        "clean",
        "quantized.onnx",
        "parity",
        "memory",
        "result",
        str(tmp_path / "work"),
        "nothing was",
    ):
        assert words in result.out, result.out
    current = ["--input", tiny_fp8 / HALF, "--calib", tiny_calib, "--onnx", tiny_fp8 / FP8, "--parity-rows", 8]
    assert "nothing to do" in run(build_dit_fp8.main, [*current, "--dry-run"]).out


def test_a_full_disk_is_told_before_the_start(tmp_path: Path) -> None:
    needed = shutil.disk_usage(tmp_path).total * 2
    with pytest.raises(Exception, match="free; the build needs") as refused:
        requirements_check.require_disk(tmp_path / "not" / "there", needed)
    assert "--work-dir" in refused.value.hint
    assert requirements_check.require_disk(tmp_path, 1) is None


def test_estimates_hold_for_what_is_made(tiny_fp8: Path) -> None:
    made = requirements_check.estimate(10 << 30, 8 << 30, 0, "direct", "fp8", "nearest")
    assert made.result - requirements_check.MARGIN == 6 << 30 and made.disk == made.result
    assert requirements_check.estimate(10 << 30, 8 << 30, 0, "direct", "fp16", "nearest").result > made.result
    assert requirements_check.estimate(10 << 30, 8 << 30, 1 << 30, "modelopt", "fp8", "nearest").disk > 40 << 30
    assert requirements_check.estimate(10 << 30, 8 << 30, 0, "direct", "fp8", "gptq").disk == made.disk + (4 << 30)
    assert graph_io.bytes_of(tiny_fp8 / FP8) < graph_io.bytes_of(tiny_fp8 / HALF)


def test_intermediates_are_kept_where_they_were_asked_for(tiny_fp8: Path, tiny_calib: Path, tmp_path: Path) -> None:
    """Output bytes are unchanged; other files in that folder stay; weights are hard-linked, not copied."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "mine.txt").write_text("mine")
    out = tmp_path / "out" / "dit_fp8.onnx"
    argv = ["--input", tiny_fp8 / HALF, "--calib", tiny_calib, "--onnx", out, "--parity-rows", 8, "--ptq", "direct"]
    result = run(build_dit_fp8.main, [*argv, "--work-dir", work, "--keep-intermediates"])
    assert result.code == 0 and (work / "mine.txt").read_text() == "mine", result.err
    kept = work / ".dit_fp8.partial"
    assert str(kept) in result.out
    assert {"clean.onnx", "quantized.onnx", "amax.npy", "stages.json"} <= {path.name for path in kept.iterdir()}
    sidecar = (tiny_fp8 / HALF).with_name(f"{Path(HALF).name}.data")
    shared = list(kept.glob("shared-*.data"))
    assert len(shared) == 1 and shared[0].samefile(sidecar)
    bytes_written = sum(path.stat().st_size for path in kept.iterdir() if path.is_file() and path.stat().st_nlink == 1)
    assert bytes_written < sidecar.stat().st_size / 2
    first = {path.name: path.read_bytes() for path in out.parent.iterdir() if path.suffix in (".onnx", ".data")}
    again = run(build_dit_fp8.main, [*argv, "--work-dir", tmp_path / "other", "--force"])
    assert again.code == 0 and not (tmp_path / "other" / ".dit_fp8.partial").exists()
    assert first == {path.name: path.read_bytes() for path in out.parent.iterdir() if path.suffix in (".onnx", ".data")}


def test_a_linked_graph_is_the_graph(tiny_onnx: Path, tmp_path: Path) -> None:
    """Unchanged weights stay in their file, changed ones go to a new sidecar; the source files are not written."""
    source = tiny_onnx / dit_target("medium", "fp16mixed").onnx[0]
    before = {file.name: file.read_bytes() for file in graph_io.files_of(source)}
    model = graph_io.load(source)
    large = [v for v in model.graph.initializers.values() if isinstance(v.const_value, graph_io.StoredTensor)]
    assert len(large) > 10
    changed = large[0]
    changed.const_value = ir.tensor(changed.const_value.numpy() + np.float16(1), name=changed.name)
    save_linked(model, tmp_path / "linked.onnx")
    assert not isinstance(changed.const_value, ir.ExternalTensor)  # the loaded model is unchanged
    again = graph_io.load(tmp_path / "linked.onnx")
    for name, value in model.graph.initializers.items():
        assert again.graph.initializers[name].const_value.tobytes() == value.const_value.tobytes(), name
    assert (tmp_path / "linked.onnx.data").stat().st_size == changed.const_value.nbytes
    assert {file.name: file.read_bytes() for file in graph_io.files_of(source)} == before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library has no malloc_trim")
def test_a_stage_gives_back_what_it_freed(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", FRAGMENTS, str(tmp_path / "work")]
    env = {**os.environ, "PYTHONPATH": str(Path(requirements_check.__file__).parents[2])}
    result = subprocess.run(argv, check=True, capture_output=True, text=True, env=env)
    assert int(result.stdout) > 150_000_000  # of 200 MB that were freed
