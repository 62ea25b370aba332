"""Prebuilt engines from the hub: found under every name, checked, recorded, and used only for the same version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import hub_server
from helpers.hub_server import LocalHub
from sa3_build.engines import prebuilt
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.errors import ToolError
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.targets import HUB_REPOSITORY, find_target

HALF = find_target("sa3-m")
SETTINGS = {"target": "sa3-m", "backend": "tensorrt", "backend_version": "10.15.1.29", "arch": "sm_90"}
ENGINE = b"code of somebody" * 100


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalHub]:
    with hub_server.serve() as server:
        server.commit(HUB_REPOSITORY, {"tensorRT/sm_90/sa3-m/dit_fp16.trt": ENGINE})
        with hub_server.client_at(server.address, tmp_path / "cache"):
            yield server


def test_an_engine_is_taken_under_a_newer_name_and_recorded(local: LocalHub, tmp_path: Path) -> None:
    out = tmp_path / "models" / "dit_fp16mixed.trt"
    assert prebuilt.take(HALF, "sm_90", out, SETTINGS, ModelSource()) == (len(ENGINE), False)
    assert out.read_bytes() == ENGINE and manifest.verify_manifest(out, deep=True) is None
    record = manifest.read_manifest(out)
    assert record is not None and record.settings == {**SETTINGS, "prebuilt": True}
    assert list(record.inputs) == ["dit_fp16.trt"]
    assert prebuilt.take(HALF, "sm_90", out, SETTINGS, ModelSource(offline=True)) == (len(ENGINE), True)
    assert len([path for path in local.reads() if path.startswith("cdn/")]) == 1


def test_a_torn_one_is_put_right(local: LocalHub, tmp_path: Path) -> None:
    out = tmp_path / "dit_fp16mixed.trt"
    prebuilt.take(HALF, "sm_90", out, SETTINGS, ModelSource())
    out.unlink()
    out.write_bytes(ENGINE[:7])
    assert prebuilt.take(HALF, "sm_90", out, SETTINGS, ModelSource()) == (len(ENGINE), False)
    assert out.read_bytes() == ENGINE


def test_what_the_hub_does_not_have_is_compiled(local: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="the hub has no engine of sa3-m for sm_89") as caught:
        prebuilt.take(HALF, "sm_89", tmp_path / "x.trt", SETTINGS, ModelSource())
    assert "--prebuilt" in caught.value.hint and not (tmp_path / "x.trt").exists()
