"""Run the two-sample test of a command: from prompts and files to the figures of the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core import engines, targets
from sa3_trt_core.hub import resolve
from sa3_trt_core.number_formats import finite
from sa3_trt_core.text import Tokenizer
from sa3_validation.cases import Case, TextCaseOptions, text_cases
from sa3_validation.embedding import Embedder
from sa3_validation.models import ComparedModel, ModelPaths
from sa3_validation.two_sample_arms import FOLDER, Recording
from sa3_validation.two_sample_study import TwoSample

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine

Source = tuple[targets.Target, str, Path]  # a target, its backend and the file that it loads


@dataclass(frozen=True)
class TwoSampleRun:
    """Inputs of the test, resolved but not opened. Arms are kept in `out`/two_sample."""

    reference: ComparedModel
    candidate: ComparedModel
    published: ComparedModel | None
    model_paths: ModelPaths
    prompts: tuple[str, ...]
    count: int
    seed: int
    seconds: float
    steps: int
    out: Path
    text: Source
    decoder: Source
    embedder: Embedder | None

    def run(self) -> dict[str, Any]:
        """Generate, measure and compare. Raises ToolError and GateError as engines do."""
        stat = self.decoder[2].stat()
        recording = Recording(
            self.steps, lambda: self._open(self.decoder), f"{self.decoder[1:]} {stat.st_size} {stat.st_mtime_ns}",
            self.embedder, self.out / FOLDER, targets.find_dit(self.model_paths.dit).reach,
        )  # fmt: skip
        figures = TwoSample(
            self.reference, self.candidate, self.published, self.model_paths, self.count, self.seed, recording
        ).run(self._cases())
        return finite({"seconds": self.seconds, "seed": self.seed, **figures})

    def _cases(self) -> list[Case]:
        tokenizer = Tokenizer(resolve.resolve_tokenizer(self.model_paths.source))
        options = TextCaseOptions(self.prompts[: self.count], 1, self.seed, self.seconds)
        with self._open(self.text) as encoder:
            return text_cases(options, encoder, tokenizer)

    def _open(self, source: Source) -> GraphEngine:
        target, backend, path = source
        return engines.open_engine(target, backend, self.model_paths.source, path)
