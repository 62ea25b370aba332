"""Check-row files: they read back as written, are small and reproducible, and a damaged one is refused."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sa3_trt_core import shapes
from sa3_trt_core.artifacts import check_rows
from sa3_trt_core.artifacts.check_rows import CheckSet
from sa3_trt_core.errors import ToolError

DIGEST = "0" * 64


def some_checks(kind: str = "dit") -> CheckSet:
    """Return check rows of a full-size graph of that kind with random outputs, which do not compress."""
    random = np.random.RandomState(0)
    rows = check_rows.planned_rows(kind)
    sizes = [row.batch * shapes.LATENT_CHANNELS * row.frames for row in rows]
    if kind == "same-decoder":
        sizes = [2 * row.frames * shapes.SAMPLES_PER_FRAME // check_rows.STRIDE for row in rows]
    expected = tuple(random.standard_normal(size).astype(np.float32) for size in sizes)
    return CheckSet(kind, 1e-3, (DIGEST,), rows, expected, tuple(float(size) for size in sizes))


@pytest.mark.parametrize("kind", ["dit", "t5gemma", "same-decoder", "same-encoder"])
def test_what_is_written_is_read_and_is_under_two_megabytes(kind: str, tmp_path: Path) -> None:
    checks, path = some_checks(kind), tmp_path / "x.check.npz"
    check_rows.write(path, checks)
    checks_read = check_rows.read(path)
    assert (checks_read.kind, checks_read.floor, checks_read.graph, checks_read.response) == (
        kind,
        1e-3,
        (DIGEST,),
        checks.response,
    )
    for row, expected in zip(checks_read.rows, checks.rows, strict=True):
        assert replace(row, sigma=(), seconds=()) == replace(expected, sigma=(), seconds=())
        assert np.allclose(row.sigma, expected.sigma, rtol=1e-7) and np.allclose(
            row.seconds, expected.seconds, rtol=1e-7
        )
    assert all(
        np.array_equal(row, expected) for row, expected in zip(checks_read.expected, checks.expected, strict=True)
    )
    assert path.stat().st_size < 2_000_000


def test_the_rows_of_a_dit_cover_what_engines_do() -> None:
    rows = check_rows.planned_rows("dit")
    plain = rows[:6]
    assert {(check_rows.PURPOSES[row.purpose], round(row.sigma[0], 3)) for row in plain} == {
        (kind, sigma) for kind in ("text", "inpaint") for sigma in (1.0, 0.746, 0.274)
    }  # fmt: skip
    assert {row.frames for row in plain} == {24, 70} and {row.batch for row in plain} == {1, 2}


def test_inputs_are_those_of_the_contract_and_the_same_every_time() -> None:
    for kind, contract in shapes.CONTRACTS.items():
        for row in check_rows.planned_rows(kind):
            first, second = check_rows.inputs_of(kind, row), check_rows.inputs_of(kind, row)
            assert set(first) == {spec.name for spec in contract.inputs}
            for spec in contract.inputs:
                assert first[spec.name].dtype == getattr(torch, spec.dtype) and first[spec.name].dim() == len(spec.dims)
                assert torch.equal(first[spec.name], second[spec.name])
    keep = check_rows.inputs_of("dit", check_rows.planned_rows("dit")[5])["local_add_cond"]
    assert set(keep[:, 0].unique().tolist()) == {0.0, 1.0} and not bool((keep[:, 1:] * (1 - keep[:, :1])).any())


def test_noise_on_the_inputs_is_a_ten_thousandth_of_them() -> None:
    row = check_rows.planned_rows("dit")[1]
    plain, off = (check_rows.inputs_of("dit", row, nudged)["x"] for nudged in (False, True))
    assert float((off - plain).norm() / plain.norm()) == pytest.approx(1e-4, rel=0.02)


def test_a_probe_is_two_rows_that_are_one_to_16_bits_and_two_to_32() -> None:
    for row, name in zip(check_rows.planned_rows("dit")[6:], ("t", "seconds_total"), strict=True):
        inputs = check_rows.inputs_of("dit", row)
        value = inputs.pop(name) if name == "t" else inputs.pop(name) / 384.0
        assert value[0] != value[1] and value[0].half() == value[1].half()
        assert all(torch.equal(tensor[0], tensor[1]) for tensor in inputs.values())


def members(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive}


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        kept = members(path)
        kept[name] = change(kept[name])
        np.savez(path, **kept)

    return damage


def without(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        kept = members(path)
        del kept[name]
        np.savez(path, **kept)

    return damage


def bomb(path: Path) -> None:
    """Write a few kB that unpack to 64 MB."""
    inner = io.BytesIO()
    np.save(inner, np.zeros(1 << 24, np.float32))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.npy", inner.getvalue())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-400]), "not an .npz file", id="truncated"),
        pytest.param(lambda path: path.write_bytes(b"x" * 1000), "not an .npz file", id="no archive"),
        pytest.param(lambda path: path.write_bytes(b"x" * (5 << 20)), "larger than", id="too large"),
        pytest.param(bomb, "unpacks to more", id="unpacks to too much"),
        pytest.param(without("response"), "no member 'response'", id="a member is missing"),
        pytest.param(changed("expected", lambda a: a.astype(object)), "not an .npz file", id="pickled"),
        pytest.param(changed("expected", lambda a: a.astype(np.float64)), "'expected' is float64", id="another type"),
        pytest.param(changed("expected", lambda a: a[:-1]), "contradict each other", id="an answer is cut"),
        pytest.param(changed("expected", lambda a: a * np.nan), "not finite", id="answers that are no numbers"),
        pytest.param(changed("response", lambda a: -a), "not finite", id="a negative response"),
        pytest.param(changed("seed", lambda a: a[:-1]), "'", id="a row less of one member"),
        pytest.param(changed("frames", lambda a: a * 0), "row 0 is malformed", id="no frames"),
        pytest.param(changed("sigma", lambda a: a * np.nan), "row 0 is malformed", id="no sigma"),
        pytest.param(changed("format", lambda a: a + 1), "format 2, this program reads 1", id="another format"),
        pytest.param(changed("kind", lambda a: np.asarray("vae")), "rows of a vae", id="another kind"),
        pytest.param(changed("graph", lambda a: np.asarray(["../x"])), "names no graph", id="no digest"),
        pytest.param(changed("floor", lambda a: a * np.inf), "contradict each other", id="everything allowed"),
    ],
)
def test_a_damaged_file_is_refused(damage: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.check.npz"
    check_rows.write(path, some_checks())
    damage(path)
    with pytest.raises(ToolError, match=words) as refused:
        check_rows.read(path)
    assert str(path) in refused.value.message and refused.value.exit_code == 2
