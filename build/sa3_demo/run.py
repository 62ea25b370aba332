"""Training run: its stages in order, each resumed from the state on disk, each limited by a deadline."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reprompt import calibration_prompts, deployed_text
from sa3_build.export import load_modules as native
from sa3_build.export.model_config import Geometry
from sa3_demo import latents as encoded, stage_autoencoder, stage_flow, state
from sa3_demo.model import DemoModel, geometry_of, tokenizer_of
from sa3_demo.music import TEMPOS, draw_piece
from sa3_demo.plan import VOCABULARY, TrainingPlan
from sa3_demo.pool import LoopPool
from sa3_demo.state import TrainingState
from sa3_demo.trainer import Deadline, Keep

STAGES = ("autoencoder", "flow", "distillation", "done")
TOKENIZER_TEXTS = 2000  # pieces whose captions and requests the tokenizer learns from
TEMPO_REPEATS = 1000


@dataclass
class Run:
    """One training run in a work folder; state/ must be kept, everything else can be recomputed."""

    work: Path
    plan: TrainingPlan
    device: torch.device
    deadline: Deadline
    workers: int | None = None

    def __post_init__(self) -> None:
        self.folder = self.work / "state"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state = state.load(self.folder)
        self.geometry: Geometry = geometry_of(self.plan.size, self.folder)
        self.tokenizer: Any = tokenizer_of(self.folder, tokenizer_texts(), VOCABULARY)
        self._pool: LoopPool | None = None
        self._latents: torch.Tensor | None = None
        self._earlier_notes: list[dict[str, Any]] = []

    def go(self, stages: int = len(STAGES)) -> str:
        """Train at most `stages` stages or until the deadline; return the current stage, or "done"."""
        torch.backends.cuda.matmul.allow_tf32 = True
        last = STAGES[min(STAGES.index(self.state.stage) + stages, len(STAGES) - 1)]
        try:
            while self.state.stage != last and not self.deadline.passed():
                {"autoencoder": self._autoencoder, "flow": self._flow, "distillation": self._distillation}[
                    self.state.stage
                ]()
        finally:
            if self._pool is not None:
                self._pool.__exit__(None, None, None)
        return self.state.stage

    def _autoencoder(self) -> None:
        torch.manual_seed(self.plan.seed)
        if self.state.step:
            autoencoder = self._load_autoencoder()
        else:
            autoencoder = native.build_autoencoder(self.geometry.autoencoder).to(self.device)
            stage_autoencoder.wake(autoencoder)
        step, notes = stage_autoencoder.train_autoencoder(
            autoencoder, self.plan, self._loops(), self.state.step, self.deadline, self.device,
            self._keeper("autoencoder"),
        )  # fmt: skip
        finished = step >= self.plan.autoencoder.steps
        self.state.replace("autoencoder", autoencoder.state_dict())
        if finished:
            plain = self._load_autoencoder()  # not compiled for the crops' length
            stage_autoencoder.centre_latents(plain, self._loops(), self.device)
            self.state.replace("autoencoder", plain.state_dict())
        self._advance(step, notes, finished)
        if finished:
            self._latent_set()  # now, while the loops are in memory

    def _flow(self) -> None:
        torch.manual_seed(self.plan.seed + 1)
        model = self._model("model" if self.state.step else None)
        step, notes, result = stage_flow.train_flow(
            model, self.plan, self._latent_set(), self.state.step, self.deadline, self.device, self._keeper("model")
        )
        finished = step >= self.plan.flow.steps
        if finished:
            # The checkpoint stores its text encoder in bfloat16, so distillation must use the rounded weights.
            result.text.to(torch.bfloat16).to(torch.float32)
            self.state.replace("teacher", result.state_dict())
        self.state.replace("model", result.state_dict())
        self._advance(step, notes, finished)

    def _distillation(self) -> None:
        model, teacher = self._model("model"), self._model("teacher")
        step, notes, result = stage_flow.train_distillation(
            model, teacher, self.plan, self._latent_set(), self.state.step, self.deadline, self.device,
            self._keeper("model"),
        )  # fmt: skip
        self.state.replace("model", result.state_dict())
        finished = step >= self.plan.distillation.steps
        if finished:
            self.state.drop("teacher")
        self._advance(step, notes, finished)

    def _keeper(self, part: str) -> Keep:
        """Return the callback that saves a stage's progress; notes of earlier stages precede its own."""
        self._earlier_notes = list(self.state.notes)

        def keep(module: torch.nn.Module, step: int, notes: list[dict[str, Any]]) -> None:
            self.state.replace(part, module.state_dict())
            self.state.step, self.state.notes = step, self._earlier_notes + notes
            state.save(self.folder, self.state)

        return keep

    def _advance(self, step: int, notes: list[dict[str, Any]], finished: bool) -> None:
        self.state.notes = self._earlier_notes + notes
        self.state.step = step
        if finished:
            self.state.stage, self.state.step = STAGES[STAGES.index(self.state.stage) + 1], 0
        state.save(self.folder, self.state)

    def _loops(self) -> LoopPool:
        if self._pool is None:
            self._pool = LoopPool(self.plan.loops, self.plan.lengths, self.workers).__enter__()
        return self._pool

    def _load_autoencoder(self) -> Any:
        autoencoder = native.build_autoencoder(self.geometry.autoencoder)
        autoencoder.load_state_dict(self.state.part("autoencoder"))
        return autoencoder.to(self.device).requires_grad_(False)

    def _model(self, part: str | None) -> DemoModel:
        model = DemoModel(self.geometry, self.plan.size, self.tokenizer.get_vocab_size())
        if part is not None:
            model.load_state_dict(self.state.part(part))
        return model.to(self.device)

    def _latent_set(self) -> encoded.LatentSet:
        if self._latents is None:
            path = self.work / f"latents-{_digest(self.state)}.safetensors"
            self._latents = encoded.cached_latents(path)
            if self._latents is None:
                print("encode the loops", file=sys.stderr, flush=True)
                self._latents = encoded.encode_pool(self._load_autoencoder(), self.plan, self._loops(), self.device)
                encoded.store_latents(path, self._latents)
        return encoded.LatentSet(self.plan, self._latents, self.tokenizer, self.device)


def tokenizer_texts() -> list[str]:
    """Return the tokenizer's training texts: captions and requests of synthetic pieces, and the calibration captions.

    Tempos are repeated until each is one token; otherwise one small layer would have to combine the parts of a number.
    """
    pieces = [draw_piece(seed) for seed in range(TOKENIZER_TEXTS)]
    synthetic = [text for piece in pieces for text in (deployed_text(piece.example()), piece.request())]
    return synthetic + [f"Tempo: {bpm} BPM" for bpm in TEMPOS] * TEMPO_REPEATS + calibration_prompts()


def _digest(state: TrainingState) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(state.part("autoencoder").items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]
