"""Write the settings of a sound into its metadata, and rebuild the flags of `sa3_trt` from them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa3_trt_core.audio import io as audio_io
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.lora_set import parse_spec
from sa3_trt_core.request import Request, shown
from sa3_trt_core.version import __version__

TEXTS = ("prompt", "negative_prompt", "init_audio", "schedule_order", "dit", "precision", "peak", "bits", "lora_rule",
         "lora_stacking")  # fmt: skip
NUMBERS = (
    "seed", "seconds", "steps", "cfg", "apg", "init_start", "init_noise_level", "duration_padding", "chunk_frames"
)  # fmt: skip
SWITCHES = ("paste_kept", "legacy_schedule", "lora_no_duration", "lora_partial")
LORA_FLAGS = ("lora_rule", "lora_stacking", "lora_no_duration", "lora_partial")
OF_THE_RUN = ("dit", "precision", "peak", "bits", "chunk_frames")  # flags outside the request
DEFAULTS: dict[str, Any] = {
    "negative_prompt": None, "cfg": 1.0, "apg": None, "init_audio": None, "init_start": 0.0, "init_noise_level": None,
    "inpaint": (), "paste_kept": False, "legacy_schedule": False, "duration_padding": Request.duration_padding,
    "schedule_order": Request.schedule_order, "chunk_frames": None,
    "lora_rule": "native", "lora_stacking": "chained", "lora_no_duration": False, "lora_partial": False, "lora": [],
}  # fmt: skip


def metadata(request: Request, run: Mapping[str, Any], identities: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the metadata of a sound: all settings that reproduce it, and the manifest ids of the engines.

    Default settings are omitted. `run` has the flags OF_THE_RUN; init audio is stored as an absolute path.
    """
    start = {"init_audio": str(request.sound.resolve())} if isinstance(request.sound, Path) else {}
    names = [name for name in (*TEXTS, *NUMBERS, *SWITCHES) if name not in (*OF_THE_RUN, *LORA_FLAGS)]
    settings = (
        {name: getattr(request, name) for name in names}
        | start
        | {name: run.get(name, DEFAULTS.get(name)) for name in OF_THE_RUN}
    )
    settings |= {name: run.get(name, DEFAULTS[name]) for name in LORA_FLAGS}
    settings["lora"] = [f"{spec.path.resolve()}:{spec.strength!r}" for spec in map(parse_spec, run.get("lora") or [])]
    if request.inpaint:
        settings["inpaint"] = [list(part) for part in request.inpaint]
    request_fields = {
        name: value for name, value in settings.items() if name not in DEFAULTS or value != DEFAULTS[name]
    } | {"mode": request.mode}  # fmt: skip
    return {**request_fields, "engines": dict(identities), "version": __version__}


def again_line(path: Path, args: argparse.Namespace) -> list[str]:
    """Return the flags that made a sound, without those that `args`, the flags of this run, replace as a whole.

    The caller puts them before the user's own flags, which then override them. Raises ToolError for a file without such
    metadata or with truncated texts.
    """
    note = audio_io.read_metadata(path)
    prompted = args.prompt is not None or args.prompts_file is not None
    if any(audio_io.was_cut(path, note.get(name)) for name in TEXTS if not (name == "prompt" and prompted)):
        raise ToolError(
            f"the texts in {path} were cut: a WAV file holds 2 kB of them", "give --prompt too, or write .flac files"
        )
    line = []
    kind = args.out.suffix if args.out is not None else f".{args.format}" if args.format else path.suffix
    left_out = {"prompt": prompted, "bits": not audio_io.has_bits(kind, note.get("bits"))}
    for name in TEXTS:
        if name in note and not left_out.get(name):
            line.append(f"{_flag(name)}={_text(path, name, note[name])}")
    for name in NUMBERS:
        if name in note:
            line.append(f"{_flag(name)}={_number(path, name, note[name])!r}")
    line += [_flag(name) for name in SWITCHES if note.get(name) is True]
    ranges = note.get("inpaint", [])
    if not isinstance(ranges, list) or not all(isinstance(part, list) and len(part) == 2 for part in ranges):
        raise _damaged(path, "inpaint", ranges)
    if not args.inpaint_range:
        line += [f"--inpaint-range={','.join(repr(_number(path, 'inpaint', n)) for n in part)}" for part in ranges]
    adapters = note.get("lora", [])
    if not isinstance(adapters, list):
        raise _damaged(path, "lora", adapters)
    if args.lora is None:
        line += [f"--lora={_text(path, 'lora', one)}" for one in adapters]
    if args.out is None and args.format is None and path.suffix.lower() in audio_io.FORMATS:
        line.append(f"--format={path.suffix.lower()[1:]}")
    return line


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _text(path: Path, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _damaged(path, name, value)
    return value


def _number(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _damaged(path, name, value)
    return value


def _damaged(path: Path, name: str, value: object) -> ToolError:
    return ToolError(f"{path} says that its {name} is {shown(value)}", "give a sound that sa3_trt has written")
