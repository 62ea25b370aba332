"""What a loaded model offers for adapters: the set that it runs with, and exchanging it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.errors import ToolWarning
from sa3_trt_core.lora.lora_set import LoraOptions, LoraSet, LoraSpec, as_spec

if TYPE_CHECKING:
    from sa3_trt_core.model_loader import EngineSet

Loras = Sequence[LoraSpec | tuple[str | Path, float] | str | Path]


class LoraOwner:
    """The part of a Generator that knows adapters: one set for every request."""

    engines: EngineSet

    @property
    def loras(self) -> LoraSet:
        """The adapters that the model runs with; equal `digest` means the same files, strengths, order and rules."""
        return self.engines.loras

    def set_loras(
        self, loras: Loras, lora_options: LoraOptions | None = None, lora_bases: Path | None = None
    ) -> LoraSet:  # fmt: skip
        """Run with these adapters, in order, from the next request on; an empty list runs without any.

        Each is "FILE:STRENGTH", a path, (path, strength) or a LoraSpec; `lora_bases` a native model.safetensors for the
        SVD of -xs adapters. The torch backend merges in place; the others open the merged graph or engine of the set.
        Raises ToolError, with the model as it was; a part of a file that has no effect is a ToolWarning.
        """
        chosen = read_loras(loras, lora_options)
        self.engines.set_loras(chosen, lora_bases)
        return chosen


def read_loras(loras: Loras, options: LoraOptions | None = None) -> LoraSet:
    """Read adapters; every part of a file that has no effect is a ToolWarning. Raises ToolError."""
    chosen = LoraSet.read([as_spec(lora) for lora in loras], options)
    for note in chosen.notes:
        warnings.warn(note, ToolWarning, stacklevel=3)
    return chosen
