"""The table of engines, from which names, groups, menus, downloads and paths are derived."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sa3_trt_core.errors import ToolError

HUB_REPOSITORY = "stabilityai/stable-audio-3-optimized"
HUB_REVISION = "main"  # revision of targets without their own; a commit pins the bytes for every machine
HUB_FOLDER = "onnx"  # every ONNX path below is under this folder of the hub repository
PREBUILT_FOLDER = "tensorRT"  # <arch>/<folder>/<stem>.trt below it
PREBUILT_TENSORRT = "10.15.1.29"  # the version of the hub's engines, which run with no other
CHECKPOINT_REPOSITORY = "stabilityai/stable-audio-3-medium"
CHECKPOINT_TOKENIZER_FOLDER = "t5gemma-b-b-ul2"
TOKENIZER_FILES = ("t5gemma/tokenizer.json", "t5gemma/tokenizer_config.json")  # under an ONNX root

Precision = Literal["fp32", "fp16mixed", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("fp16mixed", "fp32", "fp8")
TEXT_ENCODER = "t5gemma"
GROUPS = ("all", "all-fp32", "all-both")
_USUAL = ("all", "all-both")
_FP32 = ("all-fp32", "all-both")


@dataclass(frozen=True)
class DitModel:
    """One DiT: its folder under an ONNX root and under models/<arch>/, and the autoencoder that goes with it.

    `reach` is the receptive field of that autoencoder in latent frames to either side (build/FACTS.md, Autoencoder),
    None if unknown.
    """

    name: str
    folder: str
    autoencoder: str
    reach: int | None


MODELS = {
    dit.name: dit
    for dit in (
        DitModel("medium", "sa3-m", "same-l", 12),
        DitModel("sm-music", "sa3-sm-music", "same-s", None),
        DitModel("sm-sfx", "sa3-sm-sfx", "same-s", None),
    )
}
DITS = tuple(MODELS)


@dataclass(frozen=True)
class Target:
    """One engine that can be built and run.

    `kind` is its contract (shapes.CONTRACTS). `onnx` are paths under an ONNX root, our own name first, then the names
    that the hub has used. `engine` is folder/stem under models/<arch>/. `opt_in`: excluded from "build all".
    `revision` is the hub's commit or branch that the ONNX is taken from. `publishable`: build/publish.py uploads it.
    """

    name: str
    kind: str
    onnx: tuple[str, ...]
    engine: str
    groups: tuple[str, ...]
    precision: Precision
    dit: str | None
    opt_in: bool
    summary: str
    produced_by: str
    revision: str = HUB_REVISION
    publishable: bool = False


def _dit(dit: str, precision: Precision) -> Target:
    folder = MODELS[dit].folder
    return Target(
        name=folder if precision == "fp16mixed" else f"{folder}-{precision}",
        kind="dit",
        onnx=tuple(f"{folder}/{file}" for file in _DIT_FILES[precision]),
        engine=f"{folder}/dit_{precision}",
        groups={"fp16mixed": _USUAL, "fp32": _FP32, "fp8": ()}[precision],
        precision=precision,
        dit=dit,
        opt_in=precision == "fp8",
        summary=f"DiT {dit}, {precision}",
        produced_by=_PRODUCERS[precision].format(folder),
        publishable=precision == "fp8",
    )


def _same(  # one line per row of the table below
    name: str, kind: str, onnx: tuple[str, ...], engine: str, precision: Precision, groups: tuple[str, ...],
    summary: str, produced_by: str,
) -> Target:  # fmt: skip
    return Target(name, kind, onnx, engine, groups, precision, None, False, summary, produced_by)


_EXPORT = "python build/export_onnx.py --model-dir DIR --onnx-root ROOT"
_PRODUCERS: dict[Precision, str] = {  # of a DiT; {0} is its folder
    "fp16mixed": "python build/build_dit_fp16mixed.py --input ROOT/{0}/dit.onnx --onnx ROOT/{0}/dit_fp16mixed.onnx",
    "fp32": _EXPORT,
    "fp8": "python build/build_dit_fp8.py --input ROOT/{0}/dit_fp16mixed.onnx --calib {0}.calib.npz "
    "--onnx ROOT/{0}/dit_fp8.onnx",
}
_NO_PRODUCER = f"hf download {HUB_REPOSITORY}"  # this repository has no exporter for it yet
_DIT_FILES: dict[Precision, tuple[str, ...]] = {
    "fp16mixed": ("dit_fp16mixed.onnx", "dit_fp16.onnx"),
    "fp32": ("dit.onnx",),
    "fp8": ("dit_fp8.onnx",),
}
_SAME_S = ("same-s/dec_bf16.onnx", "same-s/dec_dynamic_bf16.onnx")

TARGETS: tuple[Target, ...] = (
    Target(
        name=TEXT_ENCODER,
        kind="t5gemma",
        onnx=("t5gemma/encoder.onnx",),
        engine="t5gemma/encoder",
        groups=_USUAL,
        precision="fp32",
        dit=None,
        opt_in=False,
        summary="text encoder T5Gemma",
        produced_by=_EXPORT,
    ),
    _same("same-s-encoder", "same-encoder", ("same-s/enc_dynamic_bf16.onnx",), "same-s/enc_dynamic_bf16", "fp32",
          _USUAL, "audio encoder of the small models", _NO_PRODUCER),
    _same("same-s-decoder", "same-decoder", _SAME_S, "same-s/dec_bf16", "fp32",
          _USUAL, "audio decoder of the small models", _NO_PRODUCER),
    _same("same-l-encoder", "same-encoder", ("same-l/enc_fp32.onnx", "same-l/enc_dynamic_triton_swa.onnx"),
          "same-l/enc_dynamic_triton_swa", "fp16mixed", _USUAL, "audio encoder of medium", _EXPORT),
    _same("same-l-decoder", "same-decoder", ("same-l/dec_fp16.onnx", "same-l/dec_dynamic_triton_swa.onnx"),
          "same-l/dec_fp16", "fp16mixed", _USUAL, "audio decoder of medium", _EXPORT),
    _dit("sm-music", "fp16mixed"),
    _dit("sm-sfx", "fp16mixed"),
    _dit("medium", "fp16mixed"),
    _dit("medium", "fp32"),
    _dit("sm-music", "fp32"),
    _dit("sm-sfx", "fp32"),
    _same("same-l-decoder-fp32", "same-decoder", ("same-l/dec_fp32.onnx",), "same-l/dec_fp32", "fp32",
          _FP32, "audio decoder of medium, fp32", _EXPORT),
    _same("same-s-decoder-fp32", "same-decoder", _SAME_S, "same-s/dec_fp32", "fp32",
          _FP32, "audio decoder of the small models, fp32", _NO_PRODUCER),
    _dit("medium", "fp8"),
)  # fmt: skip


def find_dit(name: str) -> DitModel:
    """Return the DiT of that name. Raises ToolError with the nearest name and all valid ones."""
    if name not in MODELS:
        raise _unknown(name, DITS, "DiT")
    return MODELS[name]


LORA_MARK = ".lora-"  # between a name and the digest of a set of adapters
_LORA_NAME = re.compile(r"(?P<base>.+)\.lora-(?P<digest>[0-9a-f]{12})")


def with_digest(file: str, digest: str) -> str:
    """Return the file name of a graph merged with the adapters of a digest: dit_fp8.lora-0123456789ab.onnx."""
    stem, dot, suffix = file.rpartition(".")
    return f"{stem}{LORA_MARK}{digest}{dot}{suffix}" if dot else f"{file}{LORA_MARK}{digest}"


def with_loras(target: Target, digest: str) -> Target:
    """Return the target of a DiT with a set of adapters merged into it: graph and engine carry the set's digest."""
    return replace(
        target,
        name=f"{target.name}{LORA_MARK}{digest}",
        onnx=tuple(with_digest(file, digest) for file in target.onnx),
        engine=f"{target.engine}{LORA_MARK}{digest}",
        groups=(),
        opt_in=True,
        summary=f"{target.summary}, adapters {digest}",
        produced_by=f"python build/merge_lora.py --input ROOT/{target.onnx[0]} --lora FILE:STRENGTH",
    )


def find_target(name: str) -> Target:
    """Return the target of a name, with or without an adapter digest. Raises ToolError with known names."""
    adapted = _LORA_NAME.fullmatch(name)
    if adapted is not None:
        base = find_target(adapted["base"])
        if base.kind != "dit":
            raise ToolError(f"{base.name} does not support adapters", "adapters change the DiT: sa3-m, sa3-m-fp8")
        return with_loras(base, adapted["digest"])
    for target in TARGETS:
        if target.name == name:
            return target
    raise _unknown(name, [target.name for target in TARGETS])


def expand(names: Sequence[str]) -> list[Target]:
    """Return the targets of names and groups, in that order, each once. Raises ToolError for an unknown name."""
    chosen: dict[str, Target] = {}
    for name in names:
        if name in GROUPS:
            matching = [target for target in TARGETS if name in target.groups]
        else:
            matching = [target for target in TARGETS if target.name == name]
        if not matching and _LORA_NAME.fullmatch(name):
            matching = [find_target(name)]
        if not matching:
            raise _unknown(name, [*(target.name for target in TARGETS), *GROUPS])
        chosen.update({target.name: target for target in matching})
    return list(chosen.values())


def missing_candidates() -> list[Target]:
    """Return the targets of "build all missing": all but the opt-in ones."""
    return [target for target in TARGETS if not target.opt_in]


def dit_target(dit: str, precision: str) -> Target:
    """Return the engine of a DiT at a precision. Raises ToolError that names the precisions it has."""
    find_dit(dit)
    by_precision = {target.precision: target for target in TARGETS if target.dit == dit}
    for name, target in by_precision.items():
        if name == precision:
            return target
    having = [target.dit for target in TARGETS if target.precision == precision and target.dit]
    elsewhere = f", or `dit={having[0]}` for {precision}" if having else ""
    raise ToolError(
        f"the DiT {dit} has no {precision} engine (it has {', '.join(by_precision)})",
        f"choose `precision={next(iter(by_precision))}`{elsewhere}",
    )


def publishable_at(onnx: Path) -> Target:
    """Return the publishable target at `onnx` under an ONNX root; the first one for a file in another folder."""
    having = [target for target in TARGETS if target.publishable]
    place = "/".join(onnx.absolute().parts[-2:])
    return next((target for target in having if target.onnx[0] == place), having[0])


def decoder_for(dit: str, precision: str) -> Target:
    """Return the decoder of a DiT; in fp32 only for an fp32 DiT."""
    base = f"{find_dit(dit).autoencoder}-decoder"
    return find_target(f"{base}-fp32" if precision == "fp32" else base)


def encoder_for(dit: str) -> Target:
    """Return the audio encoder of a DiT, the same at every precision: it runs once per request."""
    return find_target(f"{find_dit(dit).autoencoder}-encoder")


def _unknown(name: str, good: Sequence[str], what: str = "target") -> ToolError:
    near = difflib.get_close_matches(name, good, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return ToolError(f"unknown {what} {name!r}{guess}", f"known: {', '.join(good)}")
