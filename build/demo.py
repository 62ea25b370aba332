"""Run the whole chain on the demonstration model, without a GPU: checkpoint, FP8, engines and two WAV files."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sa3_trt_core import console, engines, gpu, targets
from sa3_trt_core.artifacts import files
from sa3_trt_core.artifacts.calibration_kinds import TURNS
from sa3_trt_core.cli.arguments import Parser, integer_type, number_type, run_command
from sa3_trt_core.errors import GateError

PIECE = 10  # test piece whose caption is the prompt
VALIDATED, VALIDATED_SECONDS = 2, 5.0  # prompts and seconds of the short validation
ENGINES = ("sa3-m", "sa3-m-fp8", "t5gemma", "same-l-decoder")
ARCHES = "sm_89,sm_120"  # if the builder needs no GPU
MIN_COSINE = 0.99


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="demo.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("output"), help="folder of the WAV files (default: output/)")
    parser.add_argument(
        "--seconds",
        type=number_type(1, 120, "seconds"),
        default=10.0,
        help="length of the generated sound in seconds, 1..120 (default: 10)",
    )
    parser.add_argument(
        "--seed", type=integer_type(0, 2**31 - 1), default=0, help="seed of the generated sound (default: 0)"
    )
    parser.add_argument(
        "--prompts",
        type=integer_type(1, 47),
        default=len(TURNS),
        help="number of calibration prompts, 1..47 (default: %(default)s, every kind of row)",
    )
    parser.add_argument("--no-engines", action="store_true", help="skip the engines")
    return parser


class Demo:
    """Stages in order. Each stage's command skips current artefacts, so that a second run is fast."""

    def __init__(self, out: Path) -> None:
        self.work = out / "demo"
        self.rows: list[list[str]] = []

    def stage(self, name: str, command: Callable[[list[str]], int], argv: list[str], *made: Path) -> str:
        """Run one command, record its seconds and bytes, and return what it printed on stdout."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            command(argv)
        size = sum(_bytes_of(path) for path in made)
        self.rows.append([name, f"{time.monotonic() - started:.1f}", console.format_bytes(size)])
        return printed.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Run every stage, then print the tables."""
    args = make_parser().parse_args(argv)
    files.require_writable(args.out / "demo_fp8.wav", "--out")

    import build_dit_fp8
    import build_dit_fp16mixed
    import export_onnx
    import make_calib
    import make_demo_checkpoint

    from sa3_build.recipes.fp8 import report_path

    demo = Demo(args.out)
    checkpoint, root, models = demo.work / "checkpoint", demo.work / "onnx", demo.work / "models"
    calibration = demo.work / "sa3-m.calib.npz"
    dit, fp16_mixed, fp8 = (root / targets.dit_target("medium", p).onnx[0] for p in ("fp32", "fp16mixed", "fp8"))

    demo.stage("checkpoint", make_demo_checkpoint.main, ["--out", str(checkpoint)], checkpoint)
    demo.stage("export to ONNX", export_onnx.main, ["--model-dir", str(checkpoint), "--onnx-root", str(root)], root)
    mix = ["--input", str(dit), "--onnx", str(fp16_mixed)]
    demo.stage("DiT to FP16-mixed", build_dit_fp16mixed.main, mix, *_graph(fp16_mixed))
    capture = [
        "--model-config",
        str(checkpoint / "model_config.json"),
        "--checkpoint",
        str(checkpoint / "model.safetensors"),
    ]
    capture += ["--out", str(calibration), "--prompts", str(args.prompts), "--duration", "10"]
    demo.stage("calibration capture", make_calib.main, capture, calibration)
    quantise = ["--input", str(fp16_mixed), "--calib", str(calibration), "--onnx", str(fp8)]
    demo.stage("DiT to FP8", build_dit_fp8.main, quantise, *_graph(fp8))
    built = "" if args.no_engines else _engines(demo, root, models)

    prompt = asked_for(args.seconds)
    wavs = [_sound(demo, args, prompt, precision, root) for precision in ("fp16mixed", "fp8")]

    page = _validation(demo, root, fp16_mixed, fp8)
    report = json.loads(report_path(fp8).read_text())
    _show(demo, report, built)
    _print_sounds(prompt, wavs)
    print(f"To compare FP16-mixed and FP8 by ear, also in a blind test, open {page} in a browser.")
    worst = report["stages"]["parity"]["worst"]
    if not worst >= MIN_COSINE:
        raise GateError(
            f"worst denoised cosine {worst:.6f} (required >= {MIN_COSINE})", "the demo's FP8 build has regressed"
        )
    return 0


def _sound(demo: Demo, args: argparse.Namespace, prompt: str, precision: str, root: Path) -> Path:
    import sa3_trt

    wav: Path = args.out / f"demo_{precision}.wav"
    argv = ["--prompt", prompt, "--precision", precision, "--seconds", str(args.seconds), "--seed", str(args.seed)]
    argv += ["--backend", "onnxruntime", "--onnx-root", str(root), "--out", str(wav)]
    demo.stage(f"sound, {precision}", sa3_trt.main, argv, wav)
    return wav


def _validation(demo: Demo, root: Path, fp16_mixed: Path, fp8: Path) -> Path:
    """Write a short validation of the two DiTs and return its HTML page; both are kept if current."""
    import validate_fp8

    from sa3_trt_core.artifacts import manifest
    from sa3_trt_core.artifacts.build import build

    out = demo.work / "validation"
    report, page = out / "report.json", out / "listen.html"
    inputs = {path.name: str(manifest.identity(path)) for path in (fp16_mixed, fp8)}
    prompts = [asked_for(VALIDATED_SECONDS, PIECE + number) for number in range(VALIDATED)]
    settings = {"prompts": prompts, "seconds": VALIDATED_SECONDS}
    with build(report, "validation", inputs, settings) as draft:
        if draft is None:
            return page
        texts = demo.work / "prompts.txt"
        files.write_atomic_text(texts, "\n".join(prompts) + "\n")
        argv = ["--onnx-root", str(root), "--backend", "onnxruntime", "--prompts-file", str(texts), "--html"]
        argv += ["--seconds", str(VALIDATED_SECONDS), "--extra", "1", "--out", str(out)]
        draft.retire()
        demo.stage("validation and page", validate_fp8.main, argv, out)
        draft.finish([report, page])
    return page


def _engines(demo: Demo, root: Path, models: Path) -> str:
    """Compile the demo's engines: for this machine's GPU, else for ARCHES if the builder needs no GPU."""
    import build_from_onnx

    arch = gpu.current_arch()
    for backend in engines.BUILT.values():
        supported = all(backend.supports(targets.find_target(name)) for name in ENGINES)
        if supported and backend.available() and (backend.builds_elsewhere or arch is not None):
            break
    else:
        return "No engines were built: no backend that compiles all of them is installed.\n"
    argv = ["--backend", backend.name, "--arch", ARCHES if backend.builds_elsewhere else str(arch)]
    argv += ["--onnx-root", str(root), "--models-dir", str(models)]
    return demo.stage("engines", build_from_onnx.main, [*ENGINES, *argv], models)


def asked_for(seconds: float, piece: int = PIECE) -> str:
    """Return the caption of a test piece of this length."""
    from reprompt import deployed_text
    from sa3_demo.music import FIRST_HELD_OUT, draw_piece

    return deployed_text(dataclasses.replace(draw_piece(FIRST_HELD_OUT + piece).example(), seconds=seconds))


def _print_sounds(prompt: str, wavs: list[Path]) -> None:
    """Print the prompt, the paths of the sounds, and the tempo and key measured in them."""
    import soundfile

    from sa3_demo import score

    print(f"\nprompt: {prompt}")
    for wav in wavs:
        samples, rate = soundfile.read(wav, dtype="int16")
        measured = score.shown(score.hear(samples))
        bpm = "no tempo" if measured["bpm"] is None else f"{measured['bpm']:.1f} BPM"
        print(f"{wav}: {len(samples) / rate:g} s; estimated from the sound: {bpm}, {measured['key'] or 'no key'}")
    print("Made by a small demonstration model trained on synthetic loops (interface/demo_model/README.md),")
    print("not by Stable Audio 3.")


def _show(demo: Demo, report: dict[str, Any], built: str) -> None:
    from sa3_build.verification.parity import KIND_HEADER, PARITY_HEADER, KindParity, SigmaParity, parity_rows

    print(console.table(("stage", "seconds", "size"), demo.rows))
    print("\nDenoised latent, FP8 compared with FP16-mixed on the calibration rows, by sigma and by kind of row:")
    parity = report["stages"]["parity"]
    print(console.table(PARITY_HEADER, parity_rows([SigmaParity(**p) for p in parity["parity"]])))
    print(f"\n{console.table(KIND_HEADER, parity_rows([KindParity(**p) for p in parity['by_kind']]))}")
    if built:
        print(f"\n{built}", end="")


def _graph(path: Path) -> list[Path]:
    return [path, path.with_name(f"{path.name}.data")]


def _bytes_of(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
