"""Continuous batching: rows at different steps in one forward give the same sounds as alone."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch
from conftest import onnx_of
from hypothesis import given, settings, strategies as st

import sa3_trt
from helpers.commands import assert_user_error, listing_without_checks, run
from sa3_trt_core import Generator, Request, Result
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.errors import ToolError
from sa3_trt_core.request import count_stages, ring_groups
from sa3_trt_core.sampling.guidance import Guidance, GuidedVelocity, null_conditioning
from sa3_trt_core.sampling.ring import Ring, RingRow, ring
from sa3_trt_core.sampling.sampler import Trajectory, advance_together, ping_pong, row_noise
from sa3_trt_core.sampling.schedule import sigmas
from sa3_trt_core.stage_timer import Meter

CHANNELS, FRAMES = 4, 6
BASE = Request("slow piano, 70 BPM", 1.5, steps=3, seed=11)


class Wave:
    """A velocity that depends on x, sigma and the conditioning of its row; records the noise levels."""

    def __init__(self) -> None:
        self.levels: list[list[float]] = []

    def velocity(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        self.levels.append(t.tolist())
        return torch.sin(3 * x) + (t * cond.seconds_total + cond.t5_hidden[:, 0, 0])[:, None, None]

    def close(self) -> None: ...


def conditioning(number: int) -> Conditioning:
    return Conditioning(
        torch.full((1, 256, 768), 0.1 * number),
        torch.ones(1, 256),
        torch.tensor([1.0 + number]),
        torch.zeros(1, 257, 6),
    )


def guidance_of(number: int, cfg: float) -> Guidance | None:
    return None if cfg == 1 else Guidance(null_conditioning(conditioning(number)), cfg, apg=0.5)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1.0, 3.0]), st.booleans()), min_size=1, max_size=9),
    st.integers(1, 8),
)
@settings(max_examples=30, deadline=None)
def test_every_row_takes_the_path_that_it_takes_alone(kinds: list[tuple[int, float, bool]], depth: int) -> None:
    """Rows of any number of steps, with or without guidance and pasted frames, are bit-identical."""
    kept = (torch.ones(1, CHANNELS, FRAMES), (torch.arange(FRAMES) < 2).float().expand(1, 1, FRAMES))

    def row(number: int) -> RingRow:
        steps, cfg, pasted = kinds[number]
        path = Trajectory(row_noise([number], CHANNELS, FRAMES), sigmas(steps), kept=kept if pasted else None)
        return RingRow(path, conditioning(number), guidance_of(number, cfg), Meter())

    engine, rows_made, steps_seen = Wave(), [], []

    def rows() -> Iterator[tuple[int, RingRow]]:
        for number in range(len(kinds)):
            rows_made.append(number)
            assert len(rows_made) - len(latents_by_row) <= depth  # a row is made when its place is free, no earlier
            yield number, row(number)

    latents_by_row: dict[int, torch.Tensor] = {}
    for number, latents in ring(engine, rows(), depth, steps_seen.append):
        latents_by_row[number] = latents
    assert sorted(latents_by_row) == list(range(len(kinds)))
    assert len(steps_seen) == sum(steps for steps, _, _ in kinds)
    assert max(map(len, engine.levels)) <= 2 * depth
    for number, (steps, cfg, pasted) in enumerate(kinds):
        guidance = guidance_of(number, cfg)
        alone = Wave() if guidance is None else GuidedVelocity(Wave(), guidance)
        noise = row_noise([number], CHANNELS, FRAMES)
        expected = ping_pong(alone, noise, sigmas(steps), conditioning(number), kept=kept if pasted else None)
        assert torch.equal(latents_by_row[number], expected)


def test_rows_stand_at_different_steps_and_places_are_refilled() -> None:
    engine = Wave()
    rows = (
        (number, RingRow(Trajectory(row_noise([number], 4, 6), sigmas(4)), conditioning(number), None, Meter()))
        for number in range(6)
    )
    order = [number for number, _ in ring(engine, rows, 4)]
    assert order == list(range(6))
    assert [len(levels) for levels in engine.levels] == [1, 2, 3, 4, 4, 4, 3, 2, 1]
    assert all(len(set(levels)) == len(levels) for levels in engine.levels)


def test_rows_advance_together_as_they_do_alone() -> None:
    kept = (torch.ones(1, CHANNELS, FRAMES), (torch.arange(FRAMES) < 2).float().expand(1, 1, FRAMES))

    def paths() -> list[Trajectory]:
        noises = [row_noise([number], CHANNELS, FRAMES) for number in range(3)]
        made = [Trajectory(noise, sigmas(4 + number)) for number, noise in enumerate(noises[:2])]
        return [*made, Trajectory(noises[2], sigmas(5), kept=kept)]

    together, alone = paths(), paths()
    for step in range(3):
        velocities = torch.randn(3, CHANNELS, FRAMES, generator=torch.Generator().manual_seed(step))
        advance_together(together, velocities)
        for row, path in enumerate(alone):
            path.advance(velocities[row : row + 1])
        assert [path.step for path in together] == [path.step for path in alone]
        assert all(torch.equal(ours.x, theirs.x) for ours, theirs in zip(together, alone, strict=True))
    advance_together(together, torch.tensor([0.0, float("nan"), 0.0])[:, None, None].expand(3, CHANNELS, FRAMES))
    together[0].require_finite()
    with pytest.raises(ToolError, match="not finite at sigma"):
        together[1].require_finite()


def test_a_row_keeps_its_place_in_the_batch_while_others_leave_and_come() -> None:
    engine = Wave()
    places = Ring(engine, 3)

    def row(number: int, steps: int) -> RingRow:
        return RingRow(Trajectory(row_noise([number], 4, 6), sigmas(steps)), conditioning(number), None, Meter())

    for number, steps in enumerate((6, 1, 6)):
        places.admit(number, row(number, steps))
    assert [key for key, _ in places.step()] == [1]
    places.admit(3, row(3, 9))
    places.step()
    assert engine.levels[1] == [float(sigmas(6)[1]), float(sigmas(9)[0]), float(sigmas(6)[1])]
    assert places.remove(0) and not places.remove(0)
    places.step()
    assert engine.levels[2] == [float(sigmas(9)[1]), float(sigmas(6)[2])]


@pytest.fixture(scope="module")
def generator(tiny_onnx: Path) -> Iterator[Generator]:
    with Generator.load(precision="fp32", backend="onnxruntime", onnx_root=tiny_onnx) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "noise.wav"
    soundfile.write(path, np.random.default_rng(1).normal(0, 0.1, (88_200, 2)), 44_100, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def mixed(sound: Path) -> list[Request]:
    """Return requests of every mode with different numbers of steps, one of another length in the middle."""
    inpaint = replace(BASE, seed=2, init_audio=sound, inpaint=((0.5, 1.0),), steps=2)
    return [
        BASE,
        replace(BASE, prompt="techno", seed=5, steps=1),
        replace(BASE, seconds=2.5, seed=6, steps=2),
        inpaint,
        replace(inpaint, seed=3, paste_kept=True),
        replace(BASE, seed=4, init_audio=sound, init_noise_level=0.6),
        replace(BASE, prompt="bells", seed=7, seconds=1.51, steps=4),
        replace(BASE, prompt="bells", seed=8),
        replace(BASE, prompt="rain", seed=9),
    ]


@pytest.fixture(scope="module")
def alone(generator: Generator) -> object:
    return functools.cache(generator.generate)


def agree(results: dict[int, Result], requests: list[Request], alone) -> None:  # type: ignore[no-untyped-def]
    assert sorted(results) == list(range(len(requests)))
    for index, request in enumerate(requests):
        expected = alone(request)
        assert float((results[index].latents - expected.latents).abs().max()) <= 1e-5
        assert float((results[index].audio - expected.audio).abs().max()) <= 1e-4
        assert torch.equal(results[index].sigmas, expected.sigmas)


@pytest.mark.parametrize("depth", range(1, 9))
def test_a_ring_of_any_depth_equals_serial(generator: Generator, mixed: list[Request], alone, depth: int) -> None:
    notes: list[str] = []
    agree(dict(generator.generate_ring(mixed, depth, lambda *step: notes.append(step[0]))), mixed, alone)
    assert len(notes) == count_stages(mixed, 1)


def test_guided_rows_and_others_share_a_ring(generator: Generator, mixed: list[Request], alone) -> None:
    guided = [
        replace(mixed[0], cfg=3.0),
        mixed[1],
        replace(mixed[3], cfg=2.0, apg=0.0, negative_prompt="harsh noise"),
        replace(mixed[5], cfg=4.0, apg=0.5, negative_prompt=""),
    ]
    agree(dict(generator.generate_ring(guided, 4)), guided, alone)


def test_a_sound_is_handed_over_while_others_wait(generator: Generator) -> None:
    notes: list[str] = []
    requests = [replace(BASE, seed=seed) for seed in range(4)]
    sounds = generator.generate_ring(requests, 1, lambda *step: notes.append(step[0]))
    next(sounds)
    assert len(notes) < count_stages(requests, 1)
    assert [index for index, _ in sounds] == [1, 2, 3]


def test_lengths_are_grouped() -> None:
    rows = [replace(BASE, seconds=seconds) for seconds in (1.5, 9, 1.51, 30, 9)]
    assert ring_groups(rows, 8) == [[0, 2], [1, 4], [3]]


@pytest.fixture()
def one_row(tiny_onnx: Path, tmp_path: Path) -> Path:
    """Return an ONNX root whose DiT has a fixed batch of one, as the published ones have."""
    root = tmp_path / "one row"
    shutil.copytree(tiny_onnx, root)
    path = onnx_of(root, "sa3-m")
    proto = onnx.load(path, load_external_data=False)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(proto, path)
    for beside in (".manifest.json", ".check.npz"):  # with them it is known to be another file: exit 3
        Path(f"{path}{beside}").unlink()
    return root


def test_an_engine_of_fewer_rows_says_its_limit(one_row: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    argv = ["--prompt", "a", "--prompt", "b", "--onnx-root", one_row, "--backend", "onnxruntime", "--seconds", 1]
    before = listing_without_checks(tmp_path)
    result = run(sa3_trt.main, [*argv, "--quiet", "--steps", 1, "--depth", 2, "--out-dir", "d"])
    assert_user_error(result, "ring of 2", "takes 1 rows per forward")
    assert "--depth 1 to 1" in result.err
    assert listing_without_checks(tmp_path) == before
    with (
        Generator.load(backend="onnxruntime", onnx_root=one_row) as generator,
        pytest.raises(ToolError, match="1 rows"),
    ):
        next(generator.generate_ring([replace(BASE, cfg=2.0)], 1))


def test_the_command_in_a_ring_writes_what_it_writes_serially(tiny_onnx: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\n")
    argv = ["--prompts-file", prompts, "--onnx-root", tiny_onnx, "--backend", "onnxruntime", "--precision", "fp32"]
    argv += ["--seconds", 1, "--steps", 2, "--seed", 3, "--bits", "32f"]
    result = run(sa3_trt.main, [*argv, "--depth", 2, "--out-dir", tmp_path / "ring", "--json"])
    assert result.code == 0, result.err
    assert "generate: 12/12 stages 100%" in result.err
    document = json.loads(result.out)
    assert document["generations_per_second"] > 0
    assert [Path(row["out"]).name for row in document["rows"]] == ["001_one_3.wav", "002_two_4.wav", "003_three_5.wav"]
    result = run(sa3_trt.main, [*argv, "--out-dir", tmp_path / "serial", "--quiet"])
    assert result.code == 0 and "generations a second" in result.out, result.err
    for path in (tmp_path / "serial").iterdir():
        ring_samples, serial_samples = (
            soundfile.read(tmp_path / folder / path.name)[0] for folder in ("ring", "serial")
        )
        assert np.abs(ring_samples - serial_samples).max() <= 1e-4 and np.abs(serial_samples).max() > 0.01
