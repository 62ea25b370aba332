"""Generate the arms of a two-sample test and keep them on disk, so that a killed run resumes.

An arm is one DiT on one set of seeds. Its final latents and the features of its sounds are kept.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sa3_trt_core import shapes
from sa3_trt_core.artifacts import files
from sa3_trt_core.audio import autoencoder
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.console import Progress
from sa3_trt_core.engines.base import DiTVelocity
from sa3_trt_core.sampling import schedule
from sa3_trt_core.sampling.sampler import ping_pong, row_noise
from sa3_validation import listener, sound_features
from sa3_validation.cases import INPAINT, Case, inpaint_case
from sa3_validation.models import ComparedModel

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine
    from sa3_validation.embedding import Embedder

FORMAT = 2  # increased when the figures of an arm change their meaning
FOLDER = "two_sample"


@dataclass(frozen=True)
class Arm:
    """Specification of an arm: name, opener and identity of its DiT (part of the key), and its generations."""

    name: str
    open: Callable[[], GraphEngine]
    identity: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class ArmResult:
    """Results of an arm: latents (N, 256, L), features (N, D), estimated tempo and key.

    `levels` (N, MEL_BANDS, T) and `pitches` (N, PITCHES, T) are the sounds' spectrograms in fp16. `bpm` is NaN and
    `key` -1 where the estimator gives none; a key is 12 * (minor) + the tonic from C.
    """

    latents: np.ndarray
    features: np.ndarray
    levels: np.ndarray
    pitches: np.ndarray
    bpm: np.ndarray
    key: np.ndarray


@dataclass(frozen=True)
class Recording:
    """Settings of all arms: sampler steps, the decoder's opener, an optional embedder, and the output folder.

    `reach` is the decoder's receptive field to either side in latent frames, None where it is unknown.
    """

    steps: int
    decoder: Callable[[], GraphEngine]
    decoder_identity: str
    embedder: Embedder | None
    folder: Path
    reach: int | None

    def record(self, arm: Arm, progress: Progress) -> ArmResult:
        """Generate and measure the arm, or load it when an earlier run with the same settings kept it."""
        path = self.folder / f"{arm.name}.npz"
        key = self._key(arm)
        kept = _kept(path, key)
        if kept is not None:
            progress.advance(len(arm.cases) * (self.steps + 1), note=f"{arm.name}, kept")
            return kept
        with arm.open() as engine:
            latents = self._latents(engine, arm, progress)
        with self.decoder() as decoder:
            result = self._measured(decoder, latents, arm, progress)
        with files.atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, settings=key, **vars(result))
        return result

    def _latents(self, engine: GraphEngine, arm: Arm, progress: Progress) -> np.ndarray:
        import torch

        limit = engine.max_batch
        size = shapes.MAX_BATCH if limit in (None, 1) else min(limit or 1, shapes.MAX_BATCH)
        levels, latents = schedule.sigmas(self.steps), []
        for part in _batches(arm.cases, size):
            noise = row_noise([case.seed for case in part], shapes.LATENT_CHANNELS, part[0].frames)
            cond = Conditioning.joined([case.cond for case in part])
            note, count = f"{arm.name}, generations", len(part)
            with torch.inference_mode():
                final = ping_pong(
                    DiTVelocity(engine), noise, levels, cond,
                    lambda *_, count=count, note=note: progress.advance(count, note=note),
                )  # fmt: skip
            latents.append(final.float().cpu().numpy())
        return np.concatenate(latents)

    def _measured(self, decoder: GraphEngine, latents: np.ndarray, arm: Arm, progress: Progress) -> ArmResult:
        import torch

        rows, tempos, keys, spectrograms = [], [], [], []
        for case, latent in zip(arm.cases, latents, strict=True):
            sounding = -(-shapes.output_samples(case.seconds) // shapes.SAMPLES_PER_FRAME)
            last = latent.shape[1] if self.reach is None else min(sounding + self.reach, latent.shape[1])
            with torch.inference_mode():  # frames beyond the decoder's reach have no effect on the sound
                samples = autoencoder.decode(decoder, torch.from_numpy(latent[None, :, :last]))
                sound = autoencoder.finish(samples, case.seconds).numpy()
            embedding = self.embedder.embed(sound) if self.embedder is not None else None
            spectrograms.append(sound_features.spectrogram_of(sound))
            rows.append(sound_features.features_of(sound, latent[:, :sounding], embedding, spectrograms[-1]).values)
            tempo, key = listener.estimate_tempo(sound), listener.estimate_key(sound)
            tempos.append(np.nan if tempo is None else tempo)
            keys.append(-1 if key is None else 12 * (key[1] == "minor") + key[0])
            progress.advance(note=f"{arm.name}, sounds")
        levels, pitches = (
            np.stack([getattr(item, name) for item in spectrograms]).astype(np.float16)
            for name in ("levels", "pitches")
        )
        return ArmResult(
            latents, np.stack(rows), levels, pitches, np.asarray(tempos, np.float64), np.asarray(keys, np.int64)
        )

    def _key(self, arm: Arm) -> str:
        """Return a digest of all inputs of an arm."""
        cases = [(case.prompt, case.seed, case.seconds, case.kind, case.frames) for case in arm.cases]
        local_digest = hashlib.sha256(b"".join(_local_bytes(case) for case in arm.cases)).hexdigest()
        embedder = self.embedder.identity if self.embedder is not None else None
        settings = [FORMAT, arm.identity, self.steps, self.decoder_identity, embedder, cases, local_digest]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def model_identity(model: ComparedModel) -> str:
    """Return the identity of a DiT for the key of an arm: file, size, modification time, backend."""
    stat = model.path.stat()
    return f"{model.path.resolve()} {stat.st_size} {stat.st_mtime_ns} {model.backend} {model.plain}"


def seeded(cases: Sequence[Case], count: int, seed: int) -> tuple[Case, ...]:
    """Return `count` generations that cycle through these prompts, with seeds from `seed` on."""
    return tuple(replace(cases[i % len(cases)], name=f"sound {i}", seed=seed + i) for i in range(count))


def repainted(cases: Sequence[Case], latents: np.ndarray, seed: int) -> tuple[Case, ...]:
    """Return in-painting cases of generations: the middle half of each is regenerated with other noise."""
    inpainted = [inpaint_case(case, latents[index : index + 1]) for index, case in enumerate(cases)]
    return tuple(replace(case, name=f"{INPAINT} {i}", seed=seed + i) for i, case in enumerate(inpainted))


def _batches(cases: Sequence[Case], size: int) -> Iterator[Sequence[Case]]:
    for first in range(0, len(cases), size):
        yield cases[first : first + size]


def _local_bytes(case: Case) -> bytes:
    return bytes(case.cond.local_add_cond.numpy().tobytes()) if case.kind == INPAINT else b""


def _kept(path: Path, key: str) -> ArmResult | None:
    """Return the arm that an earlier run kept, when it is complete and has this key; otherwise None."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["settings"]) != key:
                return None
            return ArmResult(**{field.name: arrays[field.name] for field in fields(ArmResult)})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
