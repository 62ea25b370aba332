"""Paths of engines and ONNX files on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from sa3_trt_core.errors import ToolError

ARCHES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121")
NO_GPU = "cpu"  # the architecture of a torch engine on a machine without a GPU
ONNX_ROOT_VARIABLE = "SA3_ONNX_DIR"
MODELS_VARIABLE = "SA3_MODELS_DIR"


def default_models_dir() -> Path:
    """Return $SA3_MODELS_DIR, else models/ of this checkout, else models/ of the working directory."""
    chosen = os.environ.get(MODELS_VARIABLE)
    if chosen:
        return Path(chosen)
    checkout = Path(__file__).resolve().parents[2]
    return checkout / "models" if (checkout / "pyproject.toml").is_file() else Path("models")


def onnx_root_from(value: str | Path | None) -> Path | None:
    """Return the ONNX folder: `value`, else $SA3_ONNX_DIR, else None for the hub. Raises ToolError for another path."""
    chosen = value or os.environ.get(ONNX_ROOT_VARIABLE)
    if not chosen:
        return None
    root = Path(chosen)
    if not root.is_dir():
        source = "`onnx_root`" if value else f"${ONNX_ROOT_VARIABLE}"
        raise ToolError(f"no such ONNX folder: {root}", f"set {source} to a folder with sa3-m/ and t5gemma/ in it")
    return root


@dataclass(frozen=True)
class ModelSource:
    """Source of a model's files: a folder of ONNX files (None: the hub) and a folder of engines.

    `revision` is a commit or branch of the hub, instead of the pinned one; `offline` takes the hub's cache only.
    """

    onnx_root: Path | None = None
    models_dir: Path = field(default_factory=default_models_dir)
    revision: str | None = None
    offline: bool = False

    @classmethod
    def of(
        cls,
        onnx_root: str | Path | None = None,
        models_dir: str | Path | None = None,
        revision: str | None = None,
        offline: bool = False,
    ) -> Self:
        """Return the source of a user's arguments; omitted folders come from the environment. Raises ToolError."""
        folder = default_models_dir() if models_dir is None else Path(models_dir)
        return cls(onnx_root_from(onnx_root), folder, revision, offline)


def parse_arches(text: str) -> list[str]:
    """Parse "sm_89,sm_120" into distinct names. Raises ToolError for one that is not an architecture."""
    arches = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [arch for arch in arches if arch not in (*ARCHES, NO_GPU)]
    if unknown or not arches:
        raise ToolError(f"unknown GPU architecture {(unknown or [text])[0]!r}", f"known: {', '.join(ARCHES)}")
    return arches
