"""The commands under test on a tiny model, each in a child process that can be killed, starved or started twice."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers import hub_server
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.cli.arguments import run_command
from sa3_trt_core.errors import ToolError
from sa3_trt_core.targets import (
    CHECKPOINT_REPOSITORY,
    CHECKPOINT_TOKENIZER_FOLDER,
    HUB_FOLDER,
    HUB_REPOSITORY,
    TOKENIZER_FILES,
    find_target,
)

RTX = ["--backend", "tensorrt_rtx", "--arch", "sm_89"]
REPEATED = (".onnx", ".data", ".npz", ".wav", ".safetensors")  # the same inputs give the same bytes
# Imported once, before the children are forked, so that a run's duration excludes the imports.
MODULES = (
    "make_demo_checkpoint", "export_onnx", "make_calib", "build_dit_fp16mixed", "build_dit_fp8", "build_from_onnx",
    "publish", "sa3_trt", "sa3_build.recipes.fp8",
    "sa3_build.export.export_checkpoint", "sa3_build.engines.build", "sa3_build.calibration.capture",
    "sa3_trt_core.pipeline", "torch", "onnxruntime", "tensorrt_rtx", "soundfile", "soxr", "tokenizers", "diffusers",
    "huggingface_hub", "huggingface_hub.file_download",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command: its module and a function from an output folder to its arguments."""

    name: str
    module: str
    line: Callable[[Path], list[object]]
    hub: bool = False


def preload() -> None:
    """Import everything that the commands use."""
    os.environ.setdefault("SOURCE_DATE_EPOCH", "1790000000")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in MODULES:
        importlib.import_module(name)


def graph(root: Path, target: str) -> Path:
    """Return the path of a target's graph under an ONNX root."""
    return root / find_target(target).onnx[0]


def commands(tiny: Path) -> list[Command]:
    """Return every producer and consumer command, in the order of the chain, on the files of `prepare`."""
    checkpoint, root, calib = tiny / "checkpoint", tiny / "onnx", tiny / "sa3-m.calib.npz"
    captured = ["--model-config", checkpoint / "model_config.json", "--checkpoint", checkpoint / "model.safetensors"]
    sound = ["--prompt", "x", "--precision", "fp8", "--seconds", 0.5, "--steps", 2, "--seed", 1, "--quiet"]
    return [
        Command("checkpoint", "make_demo_checkpoint",
                lambda out: ["--random", "--width", 128, "--depth", 1, "--out", out / "checkpoint"]),
        Command("export", "export_onnx",
                lambda out: ["--model-dir", checkpoint, "--onnx-root", out, "--only", "decoder"]),
        Command("fp16mixed", "build_dit_fp16mixed",
                lambda out: ["--input", graph(root, "sa3-m-fp32"), "--onnx", graph(out, "sa3-m")]),
        Command("calib", "make_calib",
                lambda out: [*captured, "--out", out / "a.calib.npz", "--prompts", 2, "--duration", 0.5, "--steps", 2,
                             "--cover", "text"]),
        Command("fp8", "build_dit_fp8",
                lambda out: ["--input", graph(root, "sa3-m"), "--calib", calib, "--onnx", graph(out, "sa3-m-fp8"),
                             "--ptq", "direct", "--parity-rows", 1]),
        Command("engines", "build_from_onnx",
                lambda out: ["sa3-m", "same-l-decoder", *RTX, "--onnx-root", root, "--models-dir", out]),
        Command("sound", "sa3_trt",
                lambda out: [*sound, "--onnx-root", root, "--out", out / "x.wav", "--models-dir", out]),
        Command("sound of the hub", "sa3_trt", lambda out: [*sound, "--out", out / "x.wav", "--models-dir", out], True),
        Command("publish", "publish", lambda out: ["--onnx", graph(root, "sa3-m-fp8"), "--send"], True),
    ]  # fmt: skip


def prepare(tiny: Path) -> None:
    """Make the tiny checkpoint, graphs and calibration set unless they exist."""
    if (tiny / "done").exists():
        return
    checkpoint, root = tiny / "checkpoint", tiny / "onnx"
    captured = ["--model-config", checkpoint / "model_config.json", "--checkpoint", checkpoint / "model.safetensors"]
    steps: list[tuple[str, list[object]]] = [
        ("make_demo_checkpoint", ["--random", "--width", 128, "--depth", 1, "--out", checkpoint]),
        ("export_onnx", ["--model-dir", checkpoint, "--onnx-root", root]),
        ("build_dit_fp16mixed", ["--input", graph(root, "sa3-m-fp32"), "--onnx", graph(root, "sa3-m")]),
        ("make_calib", [*captured, "--out", tiny / "sa3-m.calib.npz", "--prompts", 2, "--duration", 0.5, "--steps", 4,
                        "--cover", "text"]),
        ("build_dit_fp8", ["--input", graph(root, "sa3-m"), "--calib", tiny / "sa3-m.calib.npz", "--ptq", "direct",
                           "--onnx", graph(root, "sa3-m-fp8"), "--parity-rows", 4]),
    ]  # fmt: skip
    for module, line in steps:
        child = Child(Command(module, module, lambda out, line=line: line), tiny, tiny / "prepare.log")  # type: ignore[misc]
        assert child.wait() == 0, (tiny / "prepare.log").read_text()
    (tiny / "done").touch()


class Child:
    """A command in a forked process."""

    def __init__(self, command: Command, out: Path, log: Path, before: Callable[[], None] | None = None) -> None:
        """`before` is called in the child, for limits and mounts. Output goes to `log`."""
        self.started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                with log.open("wb") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                if before is not None:
                    before()
                module = importlib.import_module(command.module)
                code = run_command(lambda: module.main([str(word) for word in command.line(out)]))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self) -> int:
        """Wait for the end; return the exit code, negative for a signal."""
        _, status = os.waitpid(self.pid, 0)
        self.seconds = time.monotonic() - self.started
        return os.waitstatus_to_exitcode(status)

    def kill_after(self, seconds: float) -> int:
        """Send kill -9 after some seconds; return the exit code."""
        end = self.started + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()


@contextlib.contextmanager
def hub_for(command: Command, tiny: Path, cache: Path) -> Iterator[hub_server.LocalHub | None]:
    """Run the hub that a command needs, with the tiny model or empty; yield None if it needs none."""
    if not command.hub:
        yield None
        return
    root = tiny / "onnx"
    with hub_server.serve(hub_server.LocalHub(token="hf_secret")) as hub:
        files: dict[str, bytes] = {"README.md": b""}
        if command.module == "sa3_trt":
            for path in (graph(root, name) for name in ("t5gemma", "sa3-m-fp8", "same-l-decoder")):
                for file in (path, path.with_name(f"{path.name}.data")):
                    files[f"{HUB_FOLDER}/{file.relative_to(root)}"] = file.read_bytes()
        hub.commit(HUB_REPOSITORY, files)
        names = {f"{CHECKPOINT_TOKENIZER_FOLDER}/{Path(name).name}": root / name for name in TOKENIZER_FILES}
        hub.commit(CHECKPOINT_REPOSITORY, {name: path.read_bytes() for name, path in names.items()})
        with hub_server.client_at(hub.address, cache, token="hf_secret"):
            yield hub


def visible(out: Path) -> dict[str, bytes]:
    """Return the files that a reader may use: no hidden ones, nothing inside hidden folders."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(out).parts)
    }


def torn(out: Path, good: list[dict[str, bytes]]) -> list[str]:
    """Return the files that a reader would wrongly accept; `good` are the finished states whose files are valid.

    A manifest must match every file that it lists. A graph counts with its sidecars, and only if it can be read.
    """
    from sa3_trt_core.hub.resolve import external_data_names

    violations, files = [], visible(out)
    for name, data in files.items():
        path = out / name
        if name.endswith(manifest.MANIFEST_SUFFIX):
            artefact = path.with_name(path.name.removesuffix(manifest.MANIFEST_SUFFIX))
            try:
                reason = manifest.verify_manifest(artefact, deep=True)
            except ToolError as error:
                reason = error.message
            if reason is not None:
                violations.append(f"{name}: {reason}")
        elif name.endswith(".onnx"):
            try:
                group = {name, *(str(Path(name).parent / file_name) for file_name in external_data_names(path))}
            except ToolError:
                continue
            if all(file_name in files for file_name in group) and not any(
                all(state.get(file_name) == files[file_name] for file_name in group) for state in good
            ):
                violations.append(f"{name} is a mixture")
        elif name.endswith((".npz", ".wav")) and not any(state.get(name) == data for state in good):
            violations.append(f"{name} is torn")
    return violations


def fresh(folder: Path) -> Path:
    """Make an empty folder of that name; return it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
