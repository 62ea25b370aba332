"""Build an artefact unless it is current: under its lock, with its manifest written last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_trt_core.artifacts import files, locks, manifest


@dataclass
class Draft:
    """An artefact that is being built under its lock; `why` is the reason for the rebuild."""

    output: Path
    kind: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    why: str
    finished: bool = False

    def retire(self) -> None:
        """Remove the old manifest, before files are replaced: a killed build then leaves no current artefact."""
        manifest.manifest_path(self.output).unlink(missing_ok=True)

    def finish(self, written: Sequence[Path], gates: Mapping[str, Any] | None = None) -> None:
        """Write the manifest into the folder of the files, as the last step of the build."""
        artefact = written[0].with_name(self.output.name)
        manifest.write_manifest(artefact, self.kind, written, self.inputs, self.settings, gates)
        self.finished = True


@contextlib.contextmanager
def build(
    output: Path, kind: str, inputs: Mapping[str, str], settings: Mapping[str, Any], force: bool = False, *,
    also: Sequence[Mapping[str, Any]] = (), lock: Path | None = None,
) -> Iterator[Draft | None]:  # fmt: skip
    """Context manager that holds the lock of `output` during a build; yields None if the artefact is current.

    An artefact is current if it is complete and was built from `inputs` (name -> sha256) with `settings`, or with one
    of the equivalent settings `also`. This is checked before the lock is taken and again under it, because another
    process may have built it meanwhile. `lock` overrides the lock's path, for builds that replace the whole folder. The
    block must call `Draft.finish` last. Raises ToolError if the folder cannot be written.
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
        assert draft.finished, f"{output} was built without a manifest"
