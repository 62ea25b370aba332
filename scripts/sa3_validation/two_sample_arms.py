"""The sounds of a two-sample test: the same prompts through one DiT after the other, kept so that a killed run goes on.

An arm is one DiT on one set of seeds. Only its final latents and the features of its sounds are kept.
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
from sa3_validation.cases import INPAINT, Case, in_painted
from sa3_validation.models import Side

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine
    from sa3_validation.embedding import Embedder

FORMAT = 2  # raised when the same arm comes to mean other figures
FOLDER = "two_sample"


@dataclass(frozen=True)
class Arm:
    """What an arm is: its name, how its DiT is opened, what that DiT is (for the key), and its generations."""

    name: str
    open: Callable[[], GraphEngine]
    identity: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Heard:
    """What is kept of an arm: latents (N, 256, L), features (N, D), and tempo and key that the listener hears.

    `levels` (N, MEL_BANDS, T) and `pitches` (N, PITCHES, T) are the sounds' spectrograms in fp16. `bpm` is NaN and
    `key` -1 where it hears none; a key is 12 times 0 for major, 1 for minor, plus the tonic from C.
    """

    latents: np.ndarray
    features: np.ndarray
    levels: np.ndarray
    pitches: np.ndarray
    bpm: np.ndarray
    key: np.ndarray


@dataclass(frozen=True)
class Recording:
    """How arms are made: sampler steps, the decoder's opener, an embedder if one is given, and the folder they go to.

    `reach` is how many latent frames to either side the decoder looks, None where it is not known.
    """

    steps: int
    decoder: Callable[[], GraphEngine]
    decoder_identity: str
    embedder: Embedder | None
    folder: Path
    reach: int | None

    def record(self, arm: Arm, progress: Progress) -> Heard:
        """The arm, generated and heard, or as an earlier run of the same settings kept it."""
        path = self.folder / f"{arm.name}.npz"
        key = self._key(arm)
        kept = _kept(path, key)
        if kept is not None:
            progress.advance(len(arm.cases) * (self.steps + 1), note=f"{arm.name}, kept")
            return kept
        with arm.open() as engine:
            latents = self._latents(engine, arm, progress)
        with self.decoder() as decoder:
            heard = self._heard(decoder, latents, arm, progress)
        with files.atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, settings=key, **vars(heard))
        return heard

    def _latents(self, engine: GraphEngine, arm: Arm, progress: Progress) -> np.ndarray:
        import torch

        limit = engine.max_batch
        size = shapes.MAX_BATCH if limit in (None, 1) else min(limit or 1, shapes.MAX_BATCH)
        levels, made = schedule.sigmas(self.steps), []
        for part in _batches(arm.cases, size):
            noise = row_noise([case.seed for case in part], shapes.LATENT_CHANNELS, part[0].frames)
            cond = Conditioning.joined([case.cond for case in part])
            note, count = f"{arm.name}, generations", len(part)
            with torch.inference_mode():
                found = ping_pong(
                    DiTVelocity(engine), noise, levels, cond,
                    lambda *_, count=count, note=note: progress.advance(count, note=note),
                )  # fmt: skip
            made.append(found.float().cpu().numpy())
        return np.concatenate(made)

    def _heard(self, decoder: GraphEngine, latents: np.ndarray, arm: Arm, progress: Progress) -> Heard:
        import torch

        rows, tempos, keys, spectrograms = [], [], [], []
        for case, latent in zip(arm.cases, latents, strict=True):
            sounding = -(-shapes.output_samples(case.seconds) // shapes.SAMPLES_PER_FRAME)
            last = latent.shape[1] if self.reach is None else min(sounding + self.reach, latent.shape[1])
            with torch.inference_mode():  # what lies beyond the decoder's reach is cut off again
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
            np.stack([getattr(one, name) for one in spectrograms]).astype(np.float16) for name in ("levels", "pitches")
        )
        return Heard(
            latents, np.stack(rows), levels, pitches, np.asarray(tempos, np.float64), np.asarray(keys, np.int64)
        )

    def _key(self, arm: Arm) -> str:
        """A digest of everything that an arm depends on."""
        cases = [(case.prompt, case.seed, case.seconds, case.kind, case.frames) for case in arm.cases]
        masked = hashlib.sha256(b"".join(_local_bytes(case) for case in arm.cases)).hexdigest()
        embedder = self.embedder.identity if self.embedder is not None else None
        settings = [FORMAT, arm.identity, self.steps, self.decoder_identity, embedder, cases, masked]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def side_identity(side: Side) -> str:
    """What a DiT is, for the key of an arm: file, size, time of change, backend."""
    stat = side.path.stat()
    return f"{side.path.resolve()} {stat.st_size} {stat.st_mtime_ns} {side.backend} {side.plain}"


def seeded(cases: Sequence[Case], count: int, seed: int) -> tuple[Case, ...]:
    """`count` generations of these prompts, over and over, with seeds from `seed` on."""
    return tuple(replace(cases[i % len(cases)], name=f"sound {i}", seed=seed + i) for i in range(count))


def repainted(cases: Sequence[Case], latents: np.ndarray, seed: int) -> tuple[Case, ...]:
    """In-painting of generations: the middle half of each is made anew, with other noise."""
    made = [in_painted(case, latents[index : index + 1]) for index, case in enumerate(cases)]
    return tuple(replace(case, name=f"{INPAINT} {i}", seed=seed + i) for i, case in enumerate(made))


def _batches(cases: Sequence[Case], size: int) -> Iterator[Sequence[Case]]:
    for first in range(0, len(cases), size):
        yield cases[first : first + size]


def _local_bytes(case: Case) -> bytes:
    return bytes(case.cond.local_add_cond.numpy().tobytes()) if case.kind == INPAINT else b""


def _kept(path: Path, key: str) -> Heard | None:
    """An arm that an earlier run left, when it has this key and is whole."""
    try:
        with np.load(path, allow_pickle=False) as held:
            if str(held["settings"]) != key:
                return None
            return Heard(**{each.name: held[each.name] for each in fields(Heard)})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
