"""Atomic writes, the check of a destination, and manifests, which detect incomplete artefacts."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sa3_trt_core.artifacts import files, manifest
from sa3_trt_core.errors import ToolError


def test_a_finished_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.npz"
    files.write_atomic_bytes(target, b"one")
    files.write_atomic_text(target, "zwei ü")
    assert target.read_bytes() == "zwei ü".encode()
    assert os.listdir(target.parent) == ["a.npz"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_an_exception_keeps_the_old_file_or_none(tmp_path: Path, error: type[BaseException], existing: bool) -> None:
    target = tmp_path / "a.npz"
    if existing:
        target.write_bytes(b"old")
    with pytest.raises(error), files.atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".npz"
        temporary.write_bytes(b"half")
        raise error
    assert os.listdir(tmp_path) == (["a.npz"] if existing else [])
    assert not existing or target.read_bytes() == b"old"


def test_a_killed_run_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom sa3_trt_core.artifacts.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(target)], check=False, env=_environment())
    assert result.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"


def test_sha256(tmp_path: Path) -> None:
    data = os.urandom(3 * files.CHUNK + 5)
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_a_good_destination_passes_and_nothing_is_made(tmp_path: Path) -> None:
    files.require_writable(tmp_path / "x.wav", "--out")
    files.require_writable(tmp_path / "a" / "b" / "x.wav", "--out")
    (tmp_path / "old.wav").write_bytes(b"old")
    files.require_writable(tmp_path / "old.wav", "--out")
    assert os.listdir(tmp_path) == ["old.wav"]


def test_bad_destinations_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    bad = [
        tmp_path,
        tmp_path / "file" / "x.wav",
        tmp_path / "file" / "deeper" / "x.wav",
        Path("/proc/x.wav"),
        Path("/proc/no/such/x.wav"),
        Path("/dev/null"),
        tmp_path / ("n" * 300),
    ]
    for path in bad:
        with pytest.raises(ToolError, match="cannot write --out") as caught:
            files.require_writable(path, "--out")
        assert caught.value.exit_code == 2
    assert os.listdir(tmp_path) == ["file"]


def artefact_in(folder: Path) -> Path:
    artefact = folder / "dit.onnx"
    artefact.write_bytes(b"graph")
    (folder / "dit.onnx.data").write_bytes(b"weights")
    manifest.write_manifest(
        artefact,
        "dit",
        [artefact, folder / "dit.onnx.data"],
        inputs={"checkpoint": "ab" * 32},
        settings={"opset": 19, "arches": ("sm_89", "sm_120"), "eps": 1e-5},
        gates={"cosine": 0.99999},
    )
    return artefact


def test_a_manifest_comes_back_as_written(tmp_path: Path) -> None:
    artefact = artefact_in(tmp_path)
    assert manifest.manifest_path(artefact).name == "dit.onnx.manifest.json"
    record = manifest.read_manifest(artefact)
    assert record is not None
    assert record.kind == "dit"
    assert record.files["dit.onnx.data"] == manifest.FileRecord(hashlib.sha256(b"weights").hexdigest(), 7)
    assert record.settings["arches"] == ["sm_89", "sm_120"]
    assert record.gates == {"cosine": 0.99999}
    assert record.tools["torch"]
    assert manifest.verify_manifest(artefact, deep=True) is None
    assert manifest.read_manifest(tmp_path / "absent") is None


def test_the_same_artefact_gives_the_same_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    first = manifest.manifest_path(artefact_in(tmp_path)).read_bytes()
    assert manifest.manifest_path(artefact_in(tmp_path)).read_bytes() == first
    assert json.loads(first)["created"] == "1970-01-02T00:00:00Z"


def test_torn_and_changed_artefacts_are_told(tmp_path: Path) -> None:
    artefact = artefact_in(tmp_path)
    sidecar = tmp_path / "dit.onnx.data"
    sidecar.write_bytes(b"WEIGHTS")  # as long as before
    assert manifest.verify_manifest(artefact) is None
    assert "dit.onnx.data is not the file" in (manifest.verify_manifest(artefact, deep=True) or "")
    sidecar.write_bytes(b"weig")
    assert "has 4 bytes" in (manifest.verify_manifest(artefact) or "")
    sidecar.unlink()
    assert manifest.verify_manifest(artefact) == "dit.onnx.data is missing"
    manifest.manifest_path(artefact).unlink()
    assert manifest.verify_manifest(artefact) == "dit.onnx.manifest.json is missing"


def test_an_artefact_is_current_only_for_its_inputs_and_settings(tmp_path: Path) -> None:
    artefact = artefact_in(tmp_path)
    inputs = {"checkpoint": "ab" * 32}
    settings = {"opset": 19, "arches": ("sm_89", "sm_120"), "eps": 1e-5}
    assert manifest.is_current(artefact, inputs, settings) == (True, "current")
    assert manifest.is_current(artefact, {"checkpoint": "cd" * 32}, settings) == (False, "input checkpoint has changed")
    assert manifest.is_current(artefact, inputs, {**settings, "opset": 20}) == (False, "setting opset has changed")
    assert manifest.is_current(artefact, inputs, {**settings, "new": 1}) == (False, "setting new has changed")
    artefact.unlink()
    assert manifest.is_current(artefact, inputs, settings) == (False, "dit.onnx is missing")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: text.replace('"dit.onnx.data"', '"../dit.onnx.data"'),
        lambda text: text.replace('"bytes": 7', '"bytes": "7"'),
        lambda text: text.replace('"settings"', '"sittings"'),
        lambda text: text + " " * manifest.MAX_BYTES,
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    artefact = artefact_in(tmp_path)
    path = manifest.manifest_path(artefact)
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(ToolError, match="is not a manifest"):
        manifest.read_manifest(artefact)
    current, reason = manifest.is_current(artefact, {}, {})
    assert not current
    assert "is not a manifest" in reason


def test_files_of_another_folder_do_not_go_into_a_manifest(tmp_path: Path) -> None:
    artefact = artefact_in(tmp_path)
    (tmp_path / "sub").mkdir()
    file_elsewhere = tmp_path / "sub" / "x"
    file_elsewhere.write_bytes(b"")
    with pytest.raises(ValueError, match="is not in the folder"):
        manifest.write_manifest(artefact, "dit", [artefact, file_elsewhere], {}, {})


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
