"""Score a demonstration checkpoint on held-out pieces: reconstruction, agreement with captions, repeatability.

Every figure is a rate or a distance, reported with the values of chance and of the data; there are no gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reprompt import deployed_text
from sa3_build.verification.parity import cosine, relative
from sa3_demo import listen
from sa3_demo.checkpoint_under_test import CheckpointUnderTest, GenerationRow, Pcm
from sa3_demo.music import FIRST_HELD_OUT, TONICS, Piece, draw_piece
from sa3_demo.synth import render
from sa3_trt_core import targets
from sa3_trt_core.audio import io as audio_io
from sa3_trt_core.console import Progress
from sa3_trt_core.engines.base import DiTVelocity
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.hub import resolve
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.sampling import inpainting
from sa3_trt_core.shapes import SAMPLE_RATE, SAMPLES_PER_FRAME
from sa3_validation import listener, spectra

SHOWN = 4  # prompts whose audio and spectrogram are written
INPAINTED = 4  # loops
ROLLED_OUT = 4  # prompts
ROLLOUT_COSINE = 0.999  # required of FP16-mixed against fp32
EDGE_FRAMES = 4  # excluded next to the span, because the decoder's receptive field is one frame per layer
FULL_SCALE = 32767.0


@dataclass(frozen=True)
class Estimates:
    """Tempo and key estimated from one clip; None where the estimator finds none."""

    bpm: float | None
    key: listener.Key | None


@dataclass(frozen=True)
class Loop:
    """One test piece: rendered, encoded, decoded. Samples are int16 (N, 2), latent (1, 256, L)."""

    piece: Piece
    caption: str
    rendered: Pcm
    decoded: Pcm
    latent: torch.Tensor


def held_out_captions(count: int, seconds: int, form: str) -> list[str]:
    """Return the captions of the first `count` test pieces of that length: deployed form, or requests."""
    pieces = [draw_piece(FIRST_HELD_OUT + index, seconds) for index in range(count)]
    return [deployed_text(piece.example()) if form == "deployed" else piece.request() for piece in pieces]


def held_out_loops(subject: CheckpointUnderTest, count: int, form: str) -> list[Loop]:
    """Return the first `count` test pieces of the checkpoint's length, encoded and decoded."""
    loops = []
    with Progress("autoencoder", count, "loops") as progress:
        for index in range(count):
            piece = draw_piece(FIRST_HELD_OUT + index, subject.seconds)
            rendered = np.round(render(piece) * FULL_SCALE).astype(np.int16)
            latent = subject.encode(rendered.astype(np.float32) / np.float32(FULL_SCALE))
            caption = deployed_text(piece.example()) if form == "deployed" else piece.request()
            loops.append(Loop(piece, caption, rendered.T, subject.decode(latent), latent))
            progress.advance()
    return loops


def autoencoder_score(subject: CheckpointUnderTest, loops: Sequence[Loop]) -> dict[str, Any]:
    """Return SI-SDR in dB of loops through the autoencoder: stereo, mono sum, and of a mono copy of the loop.

    Latents: mean and standard deviation over the frames with sound.
    """
    rows = []
    for loop in loops:
        mono = [side.mean(axis=1) for side in (loop.rendered, loop.decoded)]
        mono_copy = np.stack([mono[0], mono[0]], axis=1)
        ratios = {
            "stereo": listen.si_sdr(loop.rendered, loop.decoded),
            "mono_sum": listen.si_sdr(mono[0], mono[1]),
            "mono_copy": listen.si_sdr(loop.rendered, mono_copy),
        }
        rows.append({"piece_seed": loop.piece.seed, **{name: number(value) for name, value in ratios.items()}})
    latents = torch.cat([loop.latent[..., : subject.sounding] for loop in loops])
    names = ("stereo", "mono_sum", "mono_copy")
    return {
        "si_sdr_db": {name: summary([row[name] for row in rows]) for name in names},
        "latent": {"mean": number(float(latents.mean())), "std": number(float(latents.std()))},
        "loops": rows,
    }


def text_to_audio_score(
    subject: CheckpointUnderTest, loops: Sequence[Loop], seed: int, out: Path | None
) -> dict[str, Any]:
    """Generate every loop's caption and compare tempo, key and levels; also check that a batch is repeatable.

    Clip i has the noise of seed + i. With `out`, the first clips are written there next to those of the data.
    """
    rows = [GenerationRow(loop.caption, seed + index) for index, loop in enumerate(loops)]
    repeated_rows = rows[: subject.batch]
    with Progress("text to audio", (len(rows) + len(repeated_rows)) * (subject.steps + 1), "row steps") as progress:
        clips = _clips(subject, rows, progress)
        repeated_clips = _clips(subject, repeated_rows, progress)
    if out is not None:
        for index, (clip, loop) in enumerate(zip(clips[:SHOWN], loops, strict=False)):
            _write(out / f"prompt_{index:02d}_generated", clip)
            _write(out / f"prompt_{index:02d}_data", loop.rendered)
    estimates = {
        "generated": [hear(clip) for clip in clips],
        "data": [hear(loop.rendered) for loop in loops],
        "data_through_autoencoder": [hear(loop.decoded) for loop in loops],
    }
    pieces = [loop.piece for loop in loops]
    count = len(pieces)
    matched = [(i, i) for i in range(count)]
    mismatched = [(i, j) for i in range(count) for j in range(count) if i != j]
    rates = {"generated": agreement(estimates["generated"], pieces, matched)}
    rates["chance"] = agreement(estimates["generated"], pieces, mismatched)  # clip i against every other caption
    rates |= {name: agreement(estimated, pieces, matched) for name, estimated in estimates.items()}
    prompts = [
        {"caption": row.caption, "seed": row.seed, "piece_seed": piece.seed, "bpm": piece.bpm, "key": piece.key,
         **{name: shown(estimated[index]) for name, estimated in estimates.items()}}
        for index, (row, piece) in enumerate(zip(rows, pieces, strict=True))
    ]  # fmt: skip
    rendered, decoded = ([getattr(loop, side) for loop in loops] for side in ("rendered", "decoded"))
    balance = {
        "generated": level_differences(clips, rendered),
        "data_through_autoencoder": level_differences(decoded, rendered),
    }
    identical = all(
        np.array_equal(first, repeated_clips) for first, repeated_clips in zip(clips, repeated_clips, strict=False)
    )
    repeated = {"clips": len(repeated_rows), "identical_samples": identical}
    return {"rates": rates, "prompts": prompts, "balance_db": balance, "repeated": repeated}


def _clips(subject: CheckpointUnderTest, rows: Sequence[GenerationRow], progress: Progress) -> list[Pcm]:
    clips = []
    for latent in subject.latents(rows, on_step=progress.advance):
        clips.append(subject.decode(latent[None]))
        progress.advance()
    return clips


def _write(stem: Path, pcm: Pcm) -> None:
    audio_io.write_wav_16(stem.with_suffix(".wav"), pcm)
    spectra.spectrogram_png(stem.with_suffix(".png"), pcm / FULL_SCALE)


def hear(pcm: Pcm) -> Estimates:
    """Return tempo and key of a clip (N, 2), estimated from its samples."""
    samples = pcm / FULL_SCALE
    return Estimates(listener.estimate_tempo(samples, SAMPLE_RATE), listener.estimate_key(samples, SAMPLE_RATE))


def shown(estimates: Estimates) -> dict[str, Any]:
    """Return the estimates as a JSON document."""
    key = None if estimates.key is None else f"{TONICS[estimates.key[0]]} {estimates.key[1]}"
    return {"bpm": None if estimates.bpm is None else round(estimates.bpm, 2), "key": key}


def agreement(
    estimates: Sequence[Estimates], pieces: Sequence[Piece], pairs: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return how often clip i agrees with piece j, over pairs (i, j): counts, and rates (None without pairs).

    "tempo": within 4 %. "key": exact. "notes": exact or relative key, which have the same notes.
    """
    hits = {"tempo": 0, "key": 0, "notes": 0}
    for i, j in pairs:
        bpm, key, expected = estimates[i].bpm, estimates[i].key, (pieces[j].tonic, pieces[j].mode)
        hits["tempo"] += bpm is not None and abs(bpm / pieces[j].bpm - 1.0) <= listener.TEMPO_TOLERANCE
        hits["key"] += key == expected
        hits["notes"] += key is not None and listener.same_notes(key, expected)
    total = len(pairs)
    return {
        "of": total,
        **{name: {"hits": n, "rate": round(n / total, 4) if total else None} for name, n in hits.items()},
    }


def level_differences(clips: Sequence[Pcm], references: Sequence[Pcm]) -> dict[str, float | None]:
    """Return the level of clips relative to their references in dB per band, mean over clips; None for silence."""
    levels = [[listen.band_levels(pcm / FULL_SCALE, SAMPLE_RATE) for pcm in side] for side in (clips, references)]
    return {
        band: number(
            float(np.mean([clip[band] - reference[band] for clip, reference in zip(*levels, strict=True)])), digits=3
        )
        for band in levels[0][0]
    }


def inpainting_score(subject: CheckpointUnderTest, loops: Sequence[Loop], seed: int) -> dict[str, Any]:
    """Regenerate the middle third of loops and measure the kept part, with and without conditioning on it.

    Latents: relative L2 against the loop's own over the kept frames with sound. Samples: SI-SDR in dB against the
    rendered loop, EDGE_FRAMES away from the span; the autoencoder's own SI-SDR is the upper limit.
    """
    start, end = subject.seconds / 3, 2 * subject.seconds / 3
    first, last = inpainting.regenerated_frames(start, end)
    keep = inpainting.keep_mask(subject.seconds, subject.frames, [(start, end)])
    kept = torch.cat([torch.arange(first), torch.arange(last, subject.sounding)])
    clear = np.ones(subject.sounding * SAMPLES_PER_FRAME, dtype=bool)
    clear[max(0, first - EDGE_FRAMES) * SAMPLES_PER_FRAME : (last + EDGE_FRAMES) * SAMPLES_PER_FRAME] = False
    clear = clear[: len(loops[0].rendered)]
    conditioned = [
        GenerationRow(loop.caption, seed + index, inpainting.local_conditioning(loop.latent, keep))
        for index, loop in enumerate(loops)
    ]
    unconditioned = [GenerationRow(row.caption, row.seed) for row in conditioned]
    rows: list[dict[str, Any]] = [{"piece_seed": loop.piece.seed} for loop in loops]
    with Progress("in-painting", 2 * len(loops) * subject.steps, "row steps") as progress:
        for name, requests in (("conditioned", conditioned), ("unconditioned", unconditioned)):
            generated = subject.latents(requests, on_step=progress.advance)
            for row, loop, latent in zip(rows, loops, generated, strict=True):
                pcm = subject.decode(latent[None])
                row[name] = {
                    "latent_relative_l2": number(relative(loop.latent[0][:, kept].numpy(), latent[:, kept].numpy())),
                    "si_sdr_db": number(listen.si_sdr(loop.rendered[clear], pcm[clear])),
                }
    for row, loop in zip(rows, loops, strict=True):
        row["autoencoder"] = {"si_sdr_db": number(listen.si_sdr(loop.rendered[clear], loop.decoded[clear]))}
    figures = {
        name: {figure: summary([row[name][figure] for row in rows]) for figure in rows[0][name]}
        for name in ("conditioned", "unconditioned", "autoencoder")
    }
    return {"span_frames": [first, last], "frames": subject.sounding, **figures, "loops": rows}


def rollout_graphs(onnx_root: Path) -> list[Path]:
    """Return the fp32 and the FP16-mixed DiT under a root. Raises ToolError when one is missing."""
    source = ModelSource.of(onnx_root)
    return [
        resolve.resolve_onnx(targets.dit_target("medium", precision), source) for precision in ("fp32", "fp16mixed")
    ]


def rollout_score(
    subject: CheckpointUnderTest, loops: Sequence[Loop], seed: int, graphs: Sequence[Path]
) -> dict[str, Any]:
    """Return the cosines of final latents of generations from equal text features and noise, per prompt.

    "half": FP16-mixed against fp32, which has a required value. "export": fp32 against the checkpoint; far from 1 when
    the graphs are of another checkpoint. One graph is in memory at a time. Raises ToolError when one cannot be run.
    """
    rows = [GenerationRow(loop.caption, seed + index) for index, loop in enumerate(loops)]
    with Progress("rollouts", (1 + len(graphs)) * len(rows) * subject.steps, "row steps") as progress:
        latents_by_model = [subject.latents(rows, subject.model, progress.advance)]
        for path in graphs:
            with DiTVelocity(OnnxRuntimeEngine(path)) as engine:
                latents_by_model.append(subject.latents(rows, engine, progress.advance))
    source, full, fp16_mixed = (array.numpy().astype(np.float64) for array in latents_by_model)
    cosines_by_pair = {"half": list(map(cosine, full, fp16_mixed)), "export": list(map(cosine, source, full))}
    worst = {
        name: float(np.min(cosines)) for name, cosines in cosines_by_pair.items()
    }  # NaN stays NaN and so fails the required value
    prompts = [
        {
            "caption": row.caption,
            "seed": row.seed,
            **{name: number(cosines_by_pair[name][index], digits=9) for name in cosines_by_pair},
        }
        for index, row in enumerate(rows)
    ]
    return {
        "worst": {name: number(value, digits=9) for name, value in worst.items()},
        "required": ROLLOUT_COSINE,
        "met": worst["half"] >= ROLLOUT_COSINE,
        "prompts": prompts,
    }


def number(value: float, digits: int = 6) -> float | None:
    """Return a rounded figure for JSON; None when it is not finite."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None


def summary(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return mean, minimum and maximum of figures; all None when one of them is."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return {"mean": None, "least": None, "greatest": None}
    return {"mean": number(float(np.mean(known))), "least": min(known), "greatest": max(known)}
