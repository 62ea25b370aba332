"""Short versions of tests/fault: kills, full disks, two at once, wrong clocks, damaged files and odd flags."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fault import fuzz
from fault.place import torn, visible
from helpers import graphs
from helpers.commands import ROOT, kill_when, run
from sa3_build.graph import io as graphs_of
from sa3_trt_core.artifacts import locks, manifest
from sa3_trt_core.cli.arguments import run_command
from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import resolve
from sa3_trt_core.targets import find_target

EXAMPLES = 25  # per reader; tests/fault/fuzz.py gives 10,000 inputs
HALF = find_target("sa3-m")


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path, tiny_fp8: Path, tiny_calib: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model laid out as the scripts of tests/fault expect it."""
    folder = tmp_path_factory.mktemp("faults")
    for name, source in (("checkpoint", tiny_checkpoint), ("onnx", tiny_fp8), ("sa3-m.calib.npz", tiny_calib)):
        (folder / name).symlink_to(source)
    return folder


READERS = (
    "calibration sets", "zip bombs", "ONNX protos", "sidecar names", "sidecars", "WAV and FLAC", "model configs",
    "manifests", "safetensors", "tokenizer configs", "prompt files", "reports to publish", "inspector JSON", "flags",
)  # fmt: skip


def test_every_reader_is_tried(tiny: Path) -> None:
    assert tuple(reader.name for reader in fuzz.readers(tiny)) == READERS


@pytest.mark.parametrize("name", READERS)
def test_damaged_input_is_refused_or_read(tiny: Path, tmp_path: Path, name: str) -> None:
    (reader,) = [reader for reader in fuzz.readers(tiny) if reader.name == name]
    assert fuzz.attempt(reader, EXAMPLES, 7, tmp_path / "here") >= EXAMPLES


def test_the_fuzzer_sees_a_traceback_and_a_file_that_was_left(tiny: Path, tmp_path: Path) -> None:
    """The fuzzer fails for a reader with another exception and for one that writes."""
    good = next(reader for reader in fuzz.readers(tiny) if reader.name == "prompt files")
    for read in (lambda folder: 1 // 0, lambda folder: (folder / "left").touch()):
        with pytest.raises((AssertionError, ZeroDivisionError)):
            fuzz.attempt(fuzz.Reader("bad", good.make, read, good.strategy), 3, 7, tmp_path / "here")


def test_a_graph_that_is_being_replaced_is_not_taken(tiny_onnx: Path, tmp_path: Path) -> None:
    """Between the renames of sidecar and graph the marker exists, and the next writer removes it."""
    model = graphs_of.load(tiny_onnx / HALF.onnx[0])
    path = tmp_path / HALF.onnx[0]
    graphs_of.save(model, path)
    assert resolve.local_onnx(tmp_path, HALF) == path
    path.with_name(f".{path.name}.unfinished").touch()
    with pytest.raises(ToolError, match="was being replaced when that run was killed"):
        resolve.local_onnx(tmp_path, HALF)
    graphs_of.save(model, path)
    assert resolve.local_onnx(tmp_path, HALF) == path and len(list(path.parent.iterdir())) == 2


def test_a_kill_between_the_renames_leaves_the_marker(tiny_onnx: Path, tmp_path: Path) -> None:
    """A process is killed after the sidecar's rename and before the graph's."""
    source, path = tiny_onnx / HALF.onnx[0], tmp_path / HALF.onnx[0]
    graphs_of.save(graphs_of.load(source), path)
    code = (
        "import os, sys, pathlib\n"
        "from sa3_build.graph import io as graph\n"
        "replace = os.replace\n"
        "def once(a, b):\n"
        "    replace(a, b)\n"
        "    if pathlib.Path(b) == pathlib.Path(sys.argv[2] + '.data'): os._exit(9)\n"
        "os.replace = once\n"
        "graph.save(graph.load(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'build'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    assert subprocess.run([sys.executable, "-c", code, source, path], env=env, check=False).returncode == 9
    with pytest.raises(ToolError, match="was being replaced"):
        resolve.local_onnx(tmp_path, HALF)


def test_kill_9_of_a_build_leaves_no_engine_and_the_rerun_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    target = find_target("same-s-decoder")
    onnx = tmp_path / "root" / target.onnx[0]
    onnx.parent.mkdir(parents=True)
    onnx.write_bytes(graphs.contract_graph("same-decoder"))
    models = tmp_path / "models"
    argv = [sys.executable, str(ROOT / "build" / "build_from_onnx.py"), target.name, "--backend", "tensorrt_rtx",
            "--arch", "sm_89", "--onnx-root", str(tmp_path / "root"), "--models-dir", str(models)]  # fmt: skip
    kill_when(argv, lambda: any(models.rglob(".*.lock")))
    assert torn(models, [{}]) == [] and not any(name.endswith(".rtx") for name in visible(models))
    assert any(models.rglob(".*.lock")), "the file of a killed holder stays, and nobody waits for it"
    result = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=100)
    assert " built " in result.stdout
    assert sorted(visible(models)) == [
        f"sm_89/same-s/dec_bf16.rtx{suffix}" for suffix in ("", ".check.npz", ".manifest.json")
    ]


def test_the_checker_sees_torn_files(tmp_path: Path) -> None:
    good = {"m.onnx": graphs.with_sidecar("m.onnx.data"), "m.onnx.data": b"12345678", "a.npz": b"whole", "x.wav": b"w"}
    older = {**good, "m.onnx.data": b"87654321", "m.onnx": graphs.with_sidecar("m.onnx.data", "older")}
    for name, data in good.items():
        (tmp_path / name).write_bytes(data)
    manifest.write_manifest(tmp_path / "x.wav", "sound", [tmp_path / "x.wav"], {}, {})
    assert torn(tmp_path, [good, older]) == []
    (tmp_path / "m.onnx.data").write_bytes(older["m.onnx.data"])
    (tmp_path / "a.npz").write_bytes(b"whol")
    (tmp_path / "x.wav").write_bytes(b"")
    assert len(torn(tmp_path, [good, older])) == 4  # the pair, the npz, the wav and its manifest


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "x"),
        OSError("16384 requested and 1280 written"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_two_lines_in_every_librarys_words(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        try:
            raise error
        except Exception as cause:
            raise ValueError("while something was written") from cause

    assert run_command(fails) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: disk full")
    with pytest.raises(ValueError):
        run_command(lambda: int("x"))


def test_a_file_limit_stops_a_writer_in_two_lines(tiny_onnx: Path, tmp_path: Path) -> None:
    """The operating system rejects the write; a rerun then completes, with files dated 1970 and 2100."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "import build_dit_fp16mixed as command\n"
        "from sa3_trt_core.cli.arguments import run_command\n"
        "sys.exit(run_command(lambda: command.main(sys.argv[1:])))\n"
    )
    import build_dit_fp16mixed

    out = tmp_path / HALF.onnx[0]
    argv = ["--input", str(tiny_onnx / find_target("sa3-m-fp32").onnx[0]), "--onnx", str(out)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'build'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run([sys.executable, "-c", code, *argv], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert visible(tmp_path) == {}
    assert run(build_dit_fp16mixed.main, argv).code == 0
    whole = visible(tmp_path)
    for stamp in (0, 4_102_444_800):
        for path in tmp_path.rglob("*"):
            os.utime(path, (stamp, stamp))
        assert run(build_dit_fp16mixed.main, argv).out.strip().endswith("is current")
    assert visible(tmp_path) == whole


def test_locks_are_exclusive_and_leave_nothing(tmp_path: Path) -> None:
    place = tmp_path / "new" / "folder" / "x"
    with locks.exclusive_lock(locks.lock_path(place), "x"):
        code = (
            "import fcntl, sys\nfile = open(sys.argv[1], 'ab')\n"
            "try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept BlockingIOError: sys.exit(7)\n"
        )
        argv = [sys.executable, "-c", code, str(locks.lock_path(place))]
        assert subprocess.run(argv, check=False).returncode == 7
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ToolError, match="cannot lock"), locks.exclusive_lock(Path("/proc/x/.lock"), "x"):
        pass
