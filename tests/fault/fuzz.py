"""Fuzz every reader of files and flags with damaged input: only a refusal in two lines or a result is allowed.

    python tests/fault/fuzz.py --inputs 10000 --work /tmp/fuzz

Every input is a valid one with edits (hypothesis, fixed seed). Required: no traceback, no file left, no file read that
lies outside the given folder, memory within MAX_GROWTH. Prints counts; exit 1 after any violation.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import resource
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

from helpers import graphs
from helpers.commands import listing, run
from sa3_trt_core.errors import ToolError

MAX_GROWTH = 1 << 30  # bytes of resident memory over all inputs of a reader
MAX_CLAIM = 1 << 48
WORDS = [
    "",
    "0",
    "-1",
    "nan",
    "1e999",
    "9" * 40,
    "../../etc/passwd",
    "/dev/null",
    "\0",
    "é\u202e",
    "a b",
    "--",
    "-",
    "*",
]
NAMES = st.text(max_size=12) | st.sampled_from([*WORDS, "link.data", "../outside.data"])
Edits = list[tuple[str, int, bytes]]
KINDS = st.sampled_from(["set", "cut", "insert", "drop", "zero"])
EDITS = st.lists(st.tuples(KINDS, st.integers(-4096, 1 << 24), st.binary(max_size=9)), max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def edited(data: bytes, edits: Edits) -> bytes:
    """Return the data after some edits; an offset beyond its end wraps round, a negative one counts from the end."""
    for action, offset, new in edits:
        offset %= len(data) + 1
        if action == "set":
            data = data[:offset] + new + data[offset + len(new) :]
        elif action == "cut":
            data = data[:offset]
        elif action == "insert":
            data = data[:offset] + new + data[offset:]
        elif action == "drop":
            data = data[:offset] + data[offset + 1 + len(new) :]
        else:
            data = data[:offset] + bytes(min(64, len(data) - offset)) + data[offset + 64 :]
    return data


def replaced(document: Any, steps: list[int], value: Any) -> Any:
    """Return a JSON document with `value` inserted at the position that the steps lead to."""
    if not steps or not isinstance(document, dict | list) or not document:
        return value
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = keys[steps[0] % len(keys)]
    copy: Any = dict(document) if isinstance(document, dict) else list(document)
    copy[key] = replaced(document[key], steps[1:], value)
    return copy


@dataclass(frozen=True)
class Reader:
    """A reader under test: `make` writes an example (edits or JSON) to a folder, `read` reads it with our code."""

    name: str
    make: Callable[[Path, Any], None]
    read: Callable[[Path], object]
    strategy: st.SearchStrategy[Any]


def readers(tiny: Path) -> list[Reader]:
    """Return every reader under test, on the files of a tiny model: checkpoint/, onnx/, sa3-m.calib.npz."""
    from sa3_build.engines import inspector, publish, tensorrt as compiler
    from sa3_build.export import model_config, native_weights
    from sa3_build.graph import io as graph_io
    from sa3_trt_core import text
    from sa3_trt_core.artifacts import manifest
    from sa3_trt_core.artifacts.calibration_set import CalibrationSet
    from sa3_trt_core.audio import reader
    from sa3_trt_core.cli import prompts
    from sa3_trt_core.hub import resolve
    from sa3_trt_core.targets import find_target

    half = find_target("sa3-m")
    calib, config = tiny / "sa3-m.calib.npz", tiny / "checkpoint" / "model_config.json"
    onnx, weights = tiny / "onnx" / half.onnx[0], tiny / "checkpoint" / "model.safetensors"
    artefact = tiny / "onnx" / find_target("sa3-m-fp8").onnx[0]
    sound, document = _sound(), json.loads(config.read_text())
    tokenizer = tiny / "onnx" / Path(find_target("t5gemma").onnx[0]).parent
    token_config = json.loads((tokenizer / "tokenizer_config.json").read_text())

    def calibration(folder: Path) -> None:
        rows_read = CalibrationSet.open(folder / "a.calib.npz")
        rows_read.check_values()
        assert len(list(rows_read)) == rows_read.rows

    def records(folder: Path) -> None:
        manifest.verify_manifest(folder / "a", deep=True)
        manifest.is_current(folder / "a", {}, {})

    def network(folder: Path) -> None:
        resolve.local_onnx(folder, half)
        compiler.check_graph(folder / half.onnx[0], half)
        graph_io.bytes_of(folder / half.onnx[0])

    def tokens(folder: Path) -> None:
        text.Tokenizer(folder / "tokenizer.json").encode(["x"])

    def weights_of(folder: Path) -> None:
        native_weights.NativeWeights(folder / "model.safetensors").refuse_leftovers("nothing.", [])

    proto = onnx.read_bytes()
    return [
        Reader("calibration sets", _bytes("a.calib.npz", calib.read_bytes()), calibration, EDITS),
        Reader("zip bombs", _bomb, calibration, st.tuples(st.integers(0, MAX_CLAIM), st.integers(0, 1 << 26))),
        Reader("ONNX protos", _bytes(half.onnx[0], proto, f"{half.onnx[0]}.data", onnx), network, EDITS),
        Reader("sidecar names", _sidecar(half.onnx[0]), network, NAMES),
        Reader("sidecars", _bytes(f"{half.onnx[0]}.data", _start(onnx), half.onnx[0], onnx), network, EDITS),
        Reader("WAV and FLAC", _bytes("a.wav", sound), lambda f: reader.read_audio(f / "a.wav", 0.0, 1 << 16), EDITS),
        Reader("model configs", _json("c.json", document), lambda f: model_config.load_geometry(f / "c.json"),
             _places(JSON)),
        Reader("manifests", _json("a.manifest.json", _manifest(artefact)), records, _places(JSON)),
        Reader("safetensors", _bytes("model.safetensors", weights.read_bytes()[:60_000]), weights_of, EDITS),
        Reader("tokenizer configs", _json("tokenizer_config.json", token_config, tokenizer / "tokenizer.json"), tokens,
             _places(JSON)),
        Reader("prompt files", _bytes("p.txt", b'slow piano\n{"prompt": "x", "seed": 1, "seconds": 2.5}\n'),
             lambda f: prompts.read_prompts(f / "p.txt"), EDITS),
        Reader("reports to publish", _report(artefact), lambda f: publish.check(f / artefact.name), EDITS),
        Reader("inspector JSON", _json("i.json", {"Layers": [{"LayerType": "gemm", "Inputs": [{"DataType": "FP8"}]}]}),
             lambda f: inspector.read_report((f / "i.json").read_text()), _places(JSON)),
        Reader("flags", _write_words, _flags, _words()),
    ]  # fmt: skip


def attempt(reader: Reader, examples: int, number: int, folder: Path) -> int:
    """Run a reader on that many inputs; return their number. Raises AssertionError with the smallest failing input."""
    count, here = 0, Path.cwd()

    @seed(number)
    @settings(max_examples=examples, database=None, deadline=None, phases=[Phase.generate, Phase.shrink],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(reader.strategy)
    def check_example(example: Any) -> None:
        nonlocal count
        count += 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        reader.make(folder, example)
        before = listing(folder)
        os.chdir(folder)
        try:
            reader.read(folder)
        except ToolError as error:
            assert len(error.lines().splitlines()) == 2
            assert SECRET not in error.lines()
        finally:
            os.chdir(here)
        assert listing(folder) == before, "a file was left or changed"

    secret = folder.parent / "outside.data"
    folder.parent.mkdir(parents=True, exist_ok=True)
    secret.write_text(SECRET * 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    check_example()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < MAX_GROWTH, f"{reader.name}: memory grew by {grown} bytes"
    return count


SECRET = "what lies outside "


def _bytes(name: str, data: bytes, beside: str = "", source: Path | None = None) -> Callable[[Path, Edits], None]:
    """Return a writer of one edited file and, beside it, a link to a valid one: the other half of a graph."""

    def make(folder: Path, edits: Edits) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(edited(data, edits))
        if source is not None:
            os.link(source if beside.endswith(".onnx") else source.with_name(f"{source.name}.data"), folder / beside)

    return make


def _start(onnx: Path) -> bytes:
    return onnx.with_name(f"{onnx.name}.data").read_bytes()


def _json(name: str, document: Any, *beside: Path) -> Callable[[Path, tuple[list[int], Any]], None]:
    def make(folder: Path, change: tuple[list[int], Any]) -> None:
        (folder / name).write_text(json.dumps(replaced(document, *change)))
        for path in beside:
            os.link(path, folder / path.name)

    return make


def _places(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(st.lists(st.integers(0, 20), min_size=1, max_size=6), values)


def _manifest(artefact: Path) -> Any:
    return json.loads(artefact.with_name(f"{artefact.name}.manifest.json").read_text())


def _sidecar(name: str) -> Callable[[Path, str], None]:
    def make(folder: Path, location: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        clean = location.encode("utf-8", "ignore").decode("utf-8")
        (folder / name).write_bytes(graphs.with_sidecar(clean or "../../outside.data"))
        (folder / name).with_name("link.data").symlink_to(folder.parent / "outside.data")

    return make


def _bomb(folder: Path, sizes: tuple[int, int]) -> None:
    """Write members that state `sizes[0]` rows and hold `sizes[1]` zeros, compressed."""
    claimed, zeros = sizes
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(
        header,
        {"descr": "<f4", "fortran_order": False, "shape": (claimed, 256, 70)},  # type: ignore[arg-type]
    )
    with zipfile.ZipFile(folder / "a.calib.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for key in ("x", "t", "t5_hidden", "t5_mask", "seconds_total", "local_add_cond"):
            archive.writestr(f"{key}.npy", header.getvalue() + bytes(zeros if key == "x" else 64))


def _report(artefact: Path) -> Callable[[Path, Edits], None]:
    names = [artefact.name, f"{artefact.name}.data", f"{artefact.name}.manifest.json"]

    def make(folder: Path, edits: Edits) -> None:
        for name in names:
            os.link(artefact.with_name(name), folder / name)
        report = artefact.with_name(f"{artefact.name}.report.json").read_bytes()
        (folder / f"{artefact.name}.report.json").write_bytes(edited(report, edits))

    return make


def _sound() -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.zeros((2000, 2), np.float32), 44100, format="WAV", subtype="PCM_16")
    return out.getvalue()


COMMANDS = {  # module -> arguments without which it would start its work
    "build_from_onnx": ["--dry-run"],
    "build": ["--list"],
    "sa3_trt": ["--dry-run"],
    "make_calib": ["--model-config", "absent", "--checkpoint", "absent", "--out", "a.calib.npz"],
    "build_dit_fp8": ["--input", "absent", "--calib", "absent", "--onnx", "a.onnx"],
    "build_dit_fp16mixed": ["--input", "absent", "--onnx", "a.onnx"],
    "export_onnx": ["--model-dir", "absent", "--onnx-root", "out"],
    "publish": ["--onnx", "absent"],
}


def _parser(name: str) -> argparse.ArgumentParser:
    module = importlib.import_module(name)
    parser: argparse.ArgumentParser = (module.make_parser if hasattr(module, "make_parser") else module.parser)()
    return parser


def _words() -> st.SearchStrategy[Any]:
    flags = {
        name: sorted({flag for action in _parser(name)._actions for flag in action.option_strings}) for name in COMMANDS
    }

    def of(name: str) -> st.SearchStrategy[Any]:
        word = st.sampled_from([*flags[name], *WORDS, "sa3-m", "all", "8", "0.5"]) | st.text(max_size=6)
        return st.tuples(st.just(name), st.lists(word, max_size=6))

    return st.sampled_from(sorted(COMMANDS)).flatmap(of)


def _write_words(folder: Path, words: Any) -> None:
    (folder / "words").write_text(json.dumps(words))


def _flags(folder: Path) -> None:
    name, words = json.loads((folder / "words").read_text())
    module = importlib.import_module(name)
    try:
        result = run(module.main, [*words, *COMMANDS[name]])
    except SystemExit as end:  # --help
        assert end.code == 0
        return
    assert result.code in (0, 2), result
    assert result.code == 0 or len(result.err.splitlines()) == 2, result


def main() -> int:
    """Run all readers and print the counts; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", action="append")
    args = parser.parse_args()
    from fault import place

    tiny = args.work / "tiny"
    tiny.mkdir(parents=True, exist_ok=True)
    place.prepare(tiny)
    chosen = [reader for reader in readers(tiny) if not args.only or reader.name in args.only]
    total, failed = 0, 0
    for reader in chosen:
        started = time.monotonic()
        try:
            count = attempt(reader, -(-args.inputs // len(chosen)), args.seed, args.work / "here")
            total += count
            print(f"{count:6}  {reader.name}  {time.monotonic() - started:.0f} s", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED  {reader.name}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
            print("\n".join(getattr(error, "__notes__", []))[:1500], flush=True)
    print(f"{total:6}  inputs, {failed} readers failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
