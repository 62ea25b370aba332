"""Many engines in one run, by the real TensorRT-RTX builder: failures, reuse and its reasons, states, locks, menu."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import build_from_onnx
import pytest

import build
from helpers import graphs
from helpers.commands import ROOT, assert_user_error, run
from sa3_trt_core.artifacts import locks, manifest
from sa3_trt_core.artifacts.check_rows import check_path
from sa3_trt_core.engines import BACKENDS
from sa3_trt_core.targets import TARGETS, find_target

pytest.importorskip("tensorrt_rtx", reason="the RTX builder is part of requirements-cpu.txt only")
RTX = ["--backend", "tensorrt_rtx", "--arch", "sm_89"]
DECODER, ENCODER = find_target("same-s-decoder"), find_target("same-s-encoder")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an ONNX root with a valid graph, one that the builder refuses, and one that is cut short."""
    folder = tmp_path_factory.mktemp("root")
    for target in (DECODER, ENCODER):
        (folder / target.onnx[0]).parent.mkdir(exist_ok=True)
    (folder / DECODER.onnx[0]).write_bytes(graphs.contract_graph("same-decoder"))
    (folder / ENCODER.onnx[0]).write_bytes(graphs.contract_graph("same-encoder", spoilt=True))
    (folder / "t5gemma").mkdir()
    (folder / "t5gemma" / "encoder.onnx").write_bytes(b"\x08\x09torn")
    return folder


def built(*words: object) -> tuple[int, list[dict], str]:
    code, out, err = run(build_from_onnx.main, [*words, *RTX, "--json"])
    return code, json.loads(out), err


def states(models: Path, *words: object) -> dict[str, dict]:
    out = run(build.main, ["--list", "--json", *RTX, "--models-dir", models, *words]).out
    return {entry["name"]: entry for entry in json.loads(out)}


def test_one_that_fails_does_not_stop_the_others(root: Path, tmp_path: Path) -> None:
    folders = ["--onnx-root", root, "--models-dir", tmp_path]
    code, reports, errors = built("t5gemma", ENCODER.name, DECODER.name, "sa3-m", *folders)
    assert code == 2
    assert [report["state"] for report in reports] == ["failed", "failed", "built", "failed"]
    assert reports[2]["why"] == "missing" and reports[3]["error"].startswith("no sa3-m/dit_fp16mixed.onnx")
    assert "error: 3 of 4 engines failed: t5gemma sm_89, same-s-encoder sm_89, sa3-m sm_89" in errors
    for name in ("t5gemma", "same-s-encoder", "sa3-m"):
        assert f"{name} sm_89: error: " in errors
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "dec_bf16.rtx", "dec_bf16.rtx.check.npz", "dec_bf16.rtx.manifest.json"
    }  # fmt: skip
    again = built(DECODER.name, *folders)[1][0]
    assert (again["state"], again["why"]) == ("current", "built from the same graph with the same settings")


def test_a_reason_is_given_for_each_build(root: Path, tmp_path: Path) -> None:
    onnx_root, models = tmp_path / "root", tmp_path / "models"
    shutil.copytree(root / "same-s", onnx_root / "same-s")
    argv = [DECODER.name, "--onnx-root", onnx_root, "--models-dir", models]
    assert built(*argv)[1][0]["why"] == "missing"
    assert built(*argv, "--force")[1][0]["why"] == "--force: current"
    (onnx_root / DECODER.onnx[0]).write_bytes(graphs.contract_graph("same-decoder", name="newer"))
    assert built(*argv)[1][0]["why"] == "input dec_bf16.onnx has changed"
    engine = BACKENDS["tensorrt_rtx"].engine_path(models, "sm_89", DECODER)
    engine.write_bytes(engine.read_bytes()[:-1])
    assert "its manifest says" in built(*argv)[1][0]["why"]
    assert manifest.verify_manifest(engine, deep=True) is None


def test_states_and_sizes(root: Path, tmp_path: Path) -> None:
    assert {entry["state"] for entry in states(tmp_path).values()} == {"missing"}
    built(DECODER.name, "--onnx-root", root, "--models-dir", tmp_path)
    engine = BACKENDS["tensorrt_rtx"].engine_path(tmp_path, "sm_89", DECODER)
    status = states(tmp_path)[DECODER.name]
    assert (status["state"], status["bytes"]) == ("current", engine.stat().st_size)
    record = manifest.manifest_path(engine)
    manifest_text = record.read_text()
    document = json.loads(manifest_text)
    document["settings"]["backend_version"] = "1.0"
    record.write_text(json.dumps(document))
    status = states(tmp_path)[DECODER.name]
    assert status["state"] == "stale" and status["reason"].startswith("built with tensorrt_rtx 1.0; ")
    record.write_text(manifest_text[:40])
    assert states(tmp_path)[DECODER.name]["state"] == "stale"
    record.unlink()
    assert states(tmp_path)[DECODER.name]["state"] == "foreign"
    plan = json.loads(
        run(build_from_onnx.main, [DECODER.name, *RTX, "--dry-run", "--json", "--models-dir", tmp_path]).out
    )
    assert plan[0]["state"] == "foreign: no manifest"


def test_a_graph_with_a_newer_manifest_makes_its_engine_stale(root: Path, tmp_path: Path) -> None:
    onnx_root, models = tmp_path / "root", tmp_path / "models"
    shutil.copytree(root / "same-s", onnx_root / "same-s")
    onnx = onnx_root / DECODER.onnx[0]
    manifest.write_manifest(onnx, "onnx", [onnx], {}, {})
    built(DECODER.name, "--onnx-root", onnx_root, "--models-dir", models)
    assert states(models, "--onnx-root", onnx_root)[DECODER.name]["state"] == "current"
    onnx.write_bytes(graphs.contract_graph("same-decoder", name="newer"))
    manifest.write_manifest(onnx, "onnx", [onnx], {}, {})
    status = states(models, "--onnx-root", onnx_root)[DECODER.name]
    assert status["state"] == "stale" and status["reason"].endswith("dec_bf16.onnx has changed")


def test_missing_builds_all_but_opt_in_and_goes_on(root: Path, tmp_path: Path) -> None:
    result = run(build.main, ["--missing", *RTX, "--models-dir", tmp_path, "--onnx-root", root])
    assert result.code == 2
    rows = {line.split()[0]: line for line in result.out.splitlines()[2:]}
    assert rows.keys() == {target.name for target in TARGETS if not target.opt_in}
    assert " built " in rows[DECODER.name] and " failed " in rows["t5gemma"]
    assert "11 of 13 engines failed" in result.err


def test_the_menu_builds_what_is_chosen(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    number = 1 + [target.name for target in TARGETS].index(DECODER.name)
    for answer, code in ((str(number), 0), ("99", 2), ("q", 0)):
        monkeypatch.setattr(sys, "stdin", Terminal(f"{answer}\n"))
        assert run(build.main, [*RTX, "--models-dir", tmp_path, "--onnx-root", root]).code == code
    assert [entry["name"] for entry in states(tmp_path).values() if entry["state"] == "current"] == [DECODER.name]


def test_what_needs_a_gpu_is_refused_without_one(root: Path, tmp_path: Path) -> None:
    argv = [DECODER.name, *RTX, "--onnx-root", root, "--models-dir", tmp_path]
    assert_user_error(run(build_from_onnx.main, [*argv, "--best-of", "3"]), "--best-of")
    assert_user_error(run(build_from_onnx.main, [*argv, "--engine-report"]), "--engine-report")
    assert_user_error(run(build_from_onnx.main, [*argv, "--prebuilt"]), "10.15.1.29")
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_waits_and_then_has_nothing_to_do(root: Path, tmp_path: Path) -> None:
    """This process holds the lock; a second one is started, waits, and then reuses the built engine."""
    argv = [DECODER.name, *RTX, "--onnx-root", str(root), "--models-dir", str(tmp_path), "--json"]
    engine = BACKENDS["tensorrt_rtx"].engine_path(tmp_path, "sm_89", DECODER)
    ready = built(DECODER.name, "--onnx-root", root, "--models-dir", tmp_path / "elsewhere")[1][0]["path"]
    with locks.exclusive_lock(locks.lock_path(engine), "the test"):
        second_run = subprocess.Popen(
            [sys.executable, str(ROOT / "build" / "build_from_onnx.py"), *argv],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert second_run.stderr is not None and "waiting: another run holds" in second_run.stderr.readline()
        shutil.copy(ready, engine)
        shutil.copy(check_path(Path(ready)), engine.parent)
        shutil.copy(manifest.manifest_path(Path(ready)), manifest.manifest_path(engine))
    out, _ = second_run.communicate(timeout=60)
    assert second_run.returncode == 0 and json.loads(out)[0]["state"] == "current"
    assert not locks.lock_path(engine).exists()


def test_leftovers_of_a_killed_build_are_removed_and_do_not_hinder(root: Path, tmp_path: Path) -> None:
    engine = BACKENDS["tensorrt_rtx"].engine_path(tmp_path, "sm_89", DECODER)
    engine.parent.mkdir(parents=True)
    (engine.parent / ".dec_bf16.0123456789ab.tmp.rtx").write_bytes(b"torn")
    (engine.parent / ".dec_fp32.0123456789ab.tmp.rtx").write_bytes(b"of another")
    locks.lock_path(engine).touch()
    engine.write_bytes(b"torn")
    assert built(DECODER.name, "--onnx-root", root, "--models-dir", tmp_path)[1][0]["state"] == "built"
    assert {path.name for path in engine.parent.iterdir()} == {
        "dec_bf16.rtx", "dec_bf16.rtx.check.npz", "dec_bf16.rtx.manifest.json", ".dec_fp32.0123456789ab.tmp.rtx"
    }  # fmt: skip
