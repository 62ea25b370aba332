"""Make an artefact once: kept when it is current, made under its lock otherwise, its manifest written last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_trt_core.artifacts import files, locks, manifest


@dataclass
class Draft:
    """An artefact that is being made by the holder of its lock; `why` is the reason that the old one is not kept."""

    output: Path
    kind: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    why: str
    finished: bool = False

    def retire(self) -> None:
        """Remove the old manifest: the last thing before a file is replaced, so that a kill leaves nothing current."""
        manifest.manifest_path(self.output).unlink(missing_ok=True)

    def finish(self, written: Sequence[Path], gates: Mapping[str, Any] | None = None) -> None:
        """Write the manifest, as the last step, beside the files (in their own folder, which may move as a whole)."""
        artefact = written[0].with_name(self.output.name)
        manifest.write_manifest(artefact, self.kind, written, self.inputs, self.settings, gates)
        self.finished = True


@contextlib.contextmanager
def build(
    output: Path, kind: str, inputs: Mapping[str, str], settings: Mapping[str, Any], force: bool = False, *,
    also: Sequence[Mapping[str, Any]] = (), lock: Path | None = None,
) -> Iterator[Draft | None]:  # fmt: skip
    """Hold the lock of `output` while the block makes it; yields None when there is nothing to make.

    An artefact is current when it is whole and was made from `inputs` (name to sha256) with `settings`, or with one of
    `also`, whose result is the same. That is looked up before the lock is taken, and again under it: another process
    may have made it meanwhile. `lock` replaces the lock's place when the artefact's folder is replaced as a whole.
    Whoever makes it calls `Draft.finish` last. Raises ToolError when nothing can be written there.
    """
    known = (settings, *also)
    if not force and any(manifest.is_current(output, inputs, one)[0] for one in known):
        yield None
        return
    files.require_writable(output, kind)
    with locks.exclusive_lock(lock or locks.lock_path(output), f"the build of {output}"):
        states = [manifest.is_current(output, inputs, one) for one in known]
        if not force and any(current for current, _ in states):
            yield None
            return
        files.remove_leftovers(output)
        why = states[0][1] if output.exists() else "missing"
        draft = Draft(output, kind, inputs, settings, f"--force: {why}" if force else why)
        yield draft
        assert draft.finished, f"{output} was made without a manifest"
