"""Bad input to every command: exit 2, two lines that name the cause, and nothing written."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from helpers.commands import ROOT, assert_user_error, listing, listing_without_checks, run
from sa3_trt_core.targets import DITS, TARGETS, find_target

DIT, HALF, FP8, TEXT = (find_target(name).onnx[0] for name in ("sa3-m-fp32", "sa3-m", "sa3-m-fp8", "t5gemma"))
RTX = "--backend tensorrt_rtx"
CALIB = "make_calib --model-config {ck}/model_config.json --checkpoint {ck}/model.safetensors"
QUANTISE = f"build_dit_fp8 --input {{root}}/{HALF} --calib {{calib}}"
SOUND = "sa3_trt --prompt x --quiet --backend onnxruntime"


@pytest.fixture
def paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tiny_onnx: Path, tiny_calib: Path
) -> dict[str, Path]:
    """Return the paths named in the command lines below; the working directory holds only `empty/` and `a_file`."""
    for name in ("SA3_ONNX_DIR", "SA3_MODELS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("not what is wanted")
    return {"ck": tiny_checkpoint, "root": tiny_onnx, "calib": tiny_calib}


def refused(line: str, paths: dict[str, Path], *words: str) -> str:
    """Run a command line; assert two lines that name `words` and an unchanged working directory."""
    command, *arguments = line.format(**paths).split()
    before = listing_without_checks(Path.cwd())
    result = run(importlib.import_module(command).main, arguments)
    assert_user_error(result, *words)
    assert listing_without_checks(Path.cwd()) == before
    return result.err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("export_onnx --model-dir absent --onnx-root out", "absent"),
        ("export_onnx --model-dir a_file --onnx-root out", "a_file"),
        ("export_onnx --model-dir empty --onnx-root out", "empty/model_config.json"),
        (
            "make_calib --model-config absent.json --checkpoint {ck}/model.safetensors --out out/c.calib.npz",
            "absent.json",
        ),
        (
            "make_calib --model-config {ck}/model_config.json --checkpoint absent.safetensors --out out/c.calib.npz",
            "absent.safetensors",
        ),
        ("build_dit_fp16mixed --input absent.onnx --onnx out/half.onnx", "absent.onnx"),
        ("build_dit_fp16mixed --input empty --onnx out/half.onnx", "empty"),
        ("build_dit_fp8 --input absent.onnx --calib {calib} --onnx out/fp8.onnx", "absent.onnx"),
        (f"build_dit_fp8 --input {{root}}/{HALF} --calib absent.npz --onnx out/fp8.onnx", "absent.npz"),
        (f"build_from_onnx sa3-m {RTX} --arch sm_89 --models-dir out --onnx-root absent", "absent"),
        (f"build_from_onnx sa3-m {RTX} --arch sm_89 --models-dir out --onnx-root empty", HALF),
        (f"build --missing {RTX} --arch sm_89 --models-dir out --onnx-root absent", "absent"),
        (f"{SOUND} --onnx-root absent --out out/x.wav", "absent"),
        (f"{SOUND} --onnx-root empty --out out/x.wav", "tokenizer.json"),
        (f"{SOUND} --onnx-root {{root}} --precision fp8 --out out/x.wav", FP8),
    ],
)
def test_a_missing_file_is_named(paths: dict[str, Path], line: str, named: str) -> None:
    refused(line, paths, named)


@pytest.mark.parametrize("value", ["0", "-1", "1e9", "nan", "inf", "abc"])
@pytest.mark.parametrize(
    ("line", "flag"),
    [
        (f"{SOUND} --onnx-root {{root}} --out out/x.wav --seconds", "--seconds"),
        (f"{CALIB} --out out/c.calib.npz --duration", "--duration"),
        ("demo --out out --seconds", "--seconds"),
    ],
)
def test_an_impossible_length_is_named(paths: dict[str, Path], line: str, flag: str, value: str) -> None:
    refused(f"{line} {value}", paths, flag, value)


UNWRITABLE_FILES = [
    (f"{SOUND} --onnx-root {{root}} --out", ".wav"),
    (f"{SOUND} --onnx-root {{root}} --out ok.wav --save-latents", ".npz"),
    (f"{CALIB} --prompts 1 --duration 0.5 --steps 1 --out", ".npz"),
    (f"build_dit_fp16mixed --input {{root}}/{DIT} --onnx", ".onnx"),
    (f"{QUANTISE} --parity-rows 1 --onnx", ".onnx"),
]


@pytest.mark.parametrize(("line", "suffix"), UNWRITABLE_FILES)
@pytest.mark.parametrize("out", ["folder", "pipe", "a_file/x", "/proc/x"])
def test_an_unwritable_file_is_named(paths: dict[str, Path], line: str, suffix: str, out: str) -> None:
    Path(f"folder{suffix}").mkdir()
    os.mkfifo(f"pipe{suffix}")
    refused(f"{line} {out}{suffix}", paths, f"{out}{suffix}")


@pytest.mark.parametrize(
    "line",
    [
        "make_demo_checkpoint --random --width 128 --depth 1 --out",
        "export_onnx --model-dir {ck} --onnx-root",
        f"build_from_onnx t5gemma {RTX} --arch sm_89 --onnx-root {{root}} --models-dir",
        "demo --no-engines --prompts 1 --out",
    ],
)
@pytest.mark.parametrize("out", ["a_file", "a_file/x", "/proc/x"])
def test_an_unwritable_folder_is_named(paths: dict[str, Path], line: str, out: str) -> None:
    refused(f"{line} {out}", paths, out)


def test_a_folder_of_somebody_else_is_not_replaced(paths: dict[str, Path]) -> None:
    Path("mine").mkdir()
    Path("mine/.notes").write_text("keep")
    refused("make_demo_checkpoint --random --width 128 --depth 1 --out mine", paths, "mine")


@pytest.mark.parametrize("name", ["sa3-m-fp9", "", "ALL", "../sa3-m"])
def test_an_unknown_target_lists_the_good_ones(paths: dict[str, Path], name: str) -> None:
    before = listing(Path.cwd())
    build_from_onnx = importlib.import_module("build_from_onnx")
    result = run(build_from_onnx.main, [name, *RTX.split(), "--arch", "sm_89", "--models-dir", "out"])
    assert_user_error(result, repr(name))
    assert all(target.name in result.err for target in TARGETS)
    assert listing(Path.cwd()) == before


def test_an_unknown_dit_lists_the_good_ones(paths: dict[str, Path]) -> None:
    message = refused(f"{SOUND} --dit large --onnx-root {{root}} --out out/x.wav", paths, "large")
    assert all(dit in message for dit in DITS)


def test_an_fp8_engine_for_an_old_gpu_is_refused_before_its_graph_is_looked_for(paths: dict[str, Path]) -> None:
    line = f"build_from_onnx sa3-m-fp8 {RTX} --models-dir out --onnx-root empty --arch"
    message = refused(f"{line} sm_80", paths, "sa3-m-fp8", "sm_80", "FP8")
    assert "sa3-m\n" in message  # the engine to build instead
    refused(f"{line} sm_89,sm_80", paths, "sm_80")
    refused(f"{line} sm_89", paths, FP8)  # only a good architecture gets as far as the graph


@pytest.mark.parametrize(
    "line",
    [
        f"build_from_onnx t5gemma {RTX} --onnx-root {{root}} --models-dir out",
        "build_from_onnx t5gemma --onnx-root {root} --models-dir out --dry-run",
        f"build --missing {RTX} --onnx-root {{root}} --models-dir out",
        "build --list --models-dir out",
    ],
)
def test_an_unknown_architecture_lists_the_good_ones(paths: dict[str, Path], line: str) -> None:
    message = refused(f"{line} --arch sm_89,nonsense", paths, "'nonsense'")
    assert "sm_89" in message and "sm_120" in message


def test_fp8_for_a_dit_that_has_none_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """Run without site-packages: torch, ONNX Runtime and the hub client cannot be imported."""
    script = [sys.executable, "-S", str(ROOT / "scripts" / "sa3_trt.py"), "--prompt", "x", "--out", "x.wav"]
    result = subprocess.run([*script, "--precision", "fp8", "--dit", "sm-music"], check=False, **piped(tmp_path))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[0] == "error: the DiT sm-music has no fp8 engine (it has fp16mixed, fp32)"
    assert len(result.stderr.splitlines()) == 2
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    "line",
    [
        ["build/build_from_onnx.py", "sa3-m-fp8", *RTX.split(), "--arch", "sm_89", "--models-dir", "out"],
        ["scripts/sa3_trt.py", "--prompt", "x", "--precision", "fp8", "--backend", "onnxruntime", "--out", "x.wav"],
    ],
)
def test_a_file_that_the_hub_cannot_give_is_named(tmp_path: Path, line: list[str]) -> None:
    """Run in a subprocess: the hub's client reads its variables when it is imported."""
    cache, here = tmp_path / "cache", tmp_path / "here"
    here.mkdir()
    command = [sys.executable, str(ROOT / line[0]), *line[1:]]
    result = subprocess.run(command, check=False, **piped(here, HF_HUB_OFFLINE="1", HF_HOME=str(cache)))
    assert (result.returncode, result.stdout) == (2, "")
    first, second = result.stderr.splitlines()
    assert first.startswith("error: ") and FP8 in first and "HF_HUB_OFFLINE" in first
    assert second.startswith("  hint: ") and "--onnx-root" in second
    assert listing(here) == {}


@pytest.mark.parametrize("graph", [TEXT, find_target("same-l-decoder").onnx[0]])
@pytest.mark.parametrize(
    "line",
    [
        "build_dit_fp16mixed --input {root}/{graph} --onnx out/half.onnx",
        "build_dit_fp8 --input {root}/{graph} --calib {calib} --onnx out/fp8.onnx",
    ],
)
def test_a_graph_that_is_no_dit_is_named(paths: dict[str, Path], line: str, graph: str) -> None:
    refused(line, {**paths, "graph": Path(graph)}, graph, "is not a dit graph")


@pytest.mark.parametrize("name", [DIT, FP8])
def test_a_dit_of_another_precision_is_not_quantised(paths: dict[str, Path], tiny_fp8: Path, name: str) -> None:
    """An fp32 DiT would give FP8 products among fp32 layers; an FP8 one has no product left to quantise."""
    paths["other"] = tiny_fp8 / name
    refused("build_dit_fp8 --input {other} --calib {calib} --onnx out/new.onnx --parity-rows 1", paths, name)


@pytest.mark.parametrize("name", [HALF, FP8])
def test_a_dit_of_another_precision_is_not_converted(paths: dict[str, Path], tiny_fp8: Path, name: str) -> None:
    paths["other"] = tiny_fp8 / name
    refused("build_dit_fp16mixed --input {other} --onnx out/new.onnx", paths, name)


@pytest.mark.parametrize("damage", ["garbage", "nothing", "half", "no sidecar", "half a sidecar"])
@pytest.mark.parametrize(
    "line",
    [
        f"build_dit_fp16mixed --input copy/{DIT} --onnx out/half.onnx",
        f"build_dit_fp8 --input copy/{HALF} --calib {{calib}} --onnx out/fp8.onnx",
        f"build_from_onnx sa3-m {RTX} --arch sm_89 --onnx-root copy --models-dir out",
        f"{SOUND} --onnx-root copy --seconds 0.5 --steps 1 --out out/x.wav",
    ],
)
def test_a_damaged_graph_is_named(paths: dict[str, Path], tiny_onnx: Path, line: str, damage: str) -> None:
    shutil.copytree(tiny_onnx, "copy")
    name = DIT if DIT in line.split()[2] else HALF
    graph = Path("copy") / name
    sidecar = graph.with_name(f"{graph.name}.data")
    whole = graph.read_bytes()
    if damage in ("garbage", "nothing", "half"):
        graph.write_bytes({"garbage": b"\x93garbage" * 999, "nothing": b"", "half": whole[: len(whole) // 2]}[damage])
    elif damage == "no sidecar":
        sidecar.unlink()
    else:
        os.truncate(sidecar, sidecar.stat().st_size // 2)
    refused(line, paths, graph.name)


@pytest.mark.parametrize(
    "line",
    [
        f"build_from_onnx sa3-m {RTX} --arch sm_89 --onnx-root copy --models-dir out",
        f"{SOUND} --onnx-root copy --seconds 0.5 --steps 1 --out out/x.wav",
    ],
)
def test_another_graph_under_the_dits_name_is_named(paths: dict[str, Path], tiny_onnx: Path, line: str) -> None:
    shutil.copytree(tiny_onnx, "copy")
    for suffix in ("", ".data"):
        shutil.copyfile(f"copy/{TEXT}{suffix}", f"copy/{HALF}{suffix}")
    shutil.copyfile(f"copy/{TEXT}.data", f"copy/{Path(HALF).parent}/{Path(TEXT).name}.data")
    for beside in (".manifest.json", ".check.npz"):  # with them the file is known to be another: exit 3
        Path(f"copy/{HALF}{beside}").unlink()
    refused(line, paths, HALF)


def test_an_empty_prompt_is_allowed(paths: dict[str, Path]) -> None:
    import sa3_trt

    argv = ["--prompt", "", "--onnx-root", paths["root"], "--backend", "onnxruntime", "--seconds", 0.5, "--steps", 1]
    result = run(sa3_trt.main, [*argv, "--seed", 1, "--out", "sound/x.wav"])
    assert result.code == 0, result.err
    info = soundfile.info("sound/x.wav")
    assert (info.frames, info.samplerate, info.channels, info.subtype) == (22_050, 44_100, 2, "PCM_16")
    assert os.listdir("sound") == ["x.wav"]


def piped(folder: Path, **variables: str) -> dict[str, object]:
    """Return subprocess options that run a command in `folder` without this machine's settings."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SA3_", "HF_"))}
    return {"cwd": folder, "env": {**env, **variables}, "capture_output": True, "text": True}
