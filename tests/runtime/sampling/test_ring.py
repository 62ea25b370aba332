"""The ring: rows at different steps in one forward, each the sound that it is alone."""

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
from helpers.commands import listing, run, two_lines
from sa3_trt_core import Generator, Request, Result
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.errors import ToolError
from sa3_trt_core.request import count_stages, ring_groups
from sa3_trt_core.sampling.guidance import Guidance, GuidedVelocity, null_conditioning
from sa3_trt_core.sampling.ring import RingRow, ring
from sa3_trt_core.sampling.sampler import Trajectory, ping_pong, row_noise
from sa3_trt_core.sampling.schedule import sigmas
from sa3_trt_core.stage_timer import Meter

CHANNELS, FRAMES = 4, 6
BASE = Request("slow piano, 70 BPM", 1.5, steps=3, seed=11)


class Wave:
    """A velocity that depends on x, sigma and the conditioning of its own row; keeps the noise levels it was given."""

    def __init__(self) -> None:
        self.levels: list[list[float]] = []

    def velocity(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        self.levels.append(t.tolist())
        return torch.sin(3 * x) + (t * cond.seconds_total + cond.t5_hidden[:, 0, 0])[:, None, None]

    def close(self) -> None: ...


def told(number: int) -> Conditioning:
    return Conditioning(
        torch.full((1, 256, 768), 0.1 * number),
        torch.ones(1, 256),
        torch.tensor([1.0 + number]),
        torch.zeros(1, 257, 6),
    )


def led(number: int, cfg: float) -> Guidance | None:
    return None if cfg == 1 else Guidance(null_conditioning(told(number)), cfg, apg=0.5)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1.0, 3.0]), st.booleans()), min_size=1, max_size=9),
    st.integers(1, 8),
)
@settings(max_examples=30, deadline=None)
def test_every_row_takes_the_path_that_it_takes_alone(kinds: list[tuple[int, float, bool]], depth: int) -> None:
    """Rows of any steps, guided or not, with something pasted back or not: equal to the bit."""
    kept = (torch.ones(1, CHANNELS, FRAMES), (torch.arange(FRAMES) < 2).float().expand(1, 1, FRAMES))

    def row(number: int) -> RingRow:
        steps, cfg, pasted = kinds[number]
        path = Trajectory(row_noise([number], CHANNELS, FRAMES), sigmas(steps), kept=kept if pasted else None)
        return RingRow(path, told(number), led(number, cfg), Meter())

    engine, asked, seen = Wave(), [], []

    def rows() -> Iterator[tuple[int, RingRow]]:
        for number in range(len(kinds)):
            asked.append(number)
            assert len(asked) - len(found) <= depth  # a row is made when its place is free, no earlier
            yield number, row(number)

    found: dict[int, torch.Tensor] = {}
    for number, latents in ring(engine, rows(), depth, seen.append):
        found[number] = latents
    assert sorted(found) == list(range(len(kinds)))
    assert len(seen) == sum(steps for steps, _, _ in kinds)
    assert max(map(len, engine.levels)) <= 2 * depth
    for number, (steps, cfg, pasted) in enumerate(kinds):
        guidance = led(number, cfg)
        alone = Wave() if guidance is None else GuidedVelocity(Wave(), guidance)
        noise = row_noise([number], CHANNELS, FRAMES)
        wanted = ping_pong(alone, noise, sigmas(steps), told(number), kept=kept if pasted else None)
        assert torch.equal(found[number], wanted)


def test_rows_stand_at_different_steps_and_places_are_refilled() -> None:
    engine = Wave()
    rows = (
        (number, RingRow(Trajectory(row_noise([number], 4, 6), sigmas(4)), told(number), None, Meter()))
        for number in range(6)
    )
    order = [number for number, _ in ring(engine, rows, 4)]
    assert order == list(range(6))
    assert [len(levels) for levels in engine.levels] == [1, 2, 3, 4, 4, 4, 3, 2, 1]
    assert all(len(set(levels)) == len(levels) for levels in engine.levels)


@pytest.fixture(scope="module")
def generator(tiny_onnx: Path) -> Iterator[Generator]:
    with Generator.load(precision="fp32", backend="onnxruntime", onnx_root=tiny_onnx) as found:
        yield found


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "noise.wav"
    soundfile.write(path, np.random.default_rng(1).normal(0, 0.1, (88_200, 2)), 44_100, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def mixed(sound: Path) -> list[Request]:
    """Every mode, other numbers of steps, and a length of its own in the middle."""
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


def agree(found: dict[int, Result], requests: list[Request], alone) -> None:  # type: ignore[no-untyped-def]
    assert sorted(found) == list(range(len(requests)))
    for index, request in enumerate(requests):
        wanted = alone(request)
        assert float((found[index].latents - wanted.latents).abs().max()) <= 1e-5
        assert float((found[index].audio - wanted.audio).abs().max()) <= 1e-4
        assert torch.equal(found[index].sigmas, wanted.sigmas)


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
    """An ONNX root whose DiT is fixed at one row, as the published ones are."""
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
    line = ["--prompt", "a", "--prompt", "b", "--onnx-root", one_row, "--backend", "onnxruntime", "--seconds", 1]
    for answers in one_row.rglob("*.checked.json"):
        answers.unlink()
    before = listing(tmp_path)
    done = run(sa3_trt.main, [*line, "--quiet", "--steps", 1, "--depth", 2, "--out-dir", "d"])
    two_lines(done, "ring of 2", "takes 1 rows a forward")
    assert "--depth 1 to 1" in done.err
    assert {name: one for name, one in listing(tmp_path).items() if not name.endswith(".checked.json")} == before
    with Generator.load(backend="onnxruntime", onnx_root=one_row) as found, pytest.raises(ToolError, match="1 rows"):
        next(found.generate_ring([replace(BASE, cfg=2.0)], 1))


def test_the_command_in_a_ring_writes_what_it_writes_serially(tiny_onnx: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\n")
    line = ["--prompts-file", prompts, "--onnx-root", tiny_onnx, "--backend", "onnxruntime", "--precision", "fp32"]
    line += ["--seconds", 1, "--steps", 2, "--seed", 3, "--bits", "32f"]
    done = run(sa3_trt.main, [*line, "--depth", 2, "--out-dir", tmp_path / "ring", "--json"])
    assert done.code == 0, done.err
    assert "generate: 12/12 stages 100%" in done.err
    document = json.loads(done.out)
    assert document["generations_per_second"] > 0
    assert [Path(row["out"]).name for row in document["rows"]] == ["001_one_3.wav", "002_two_4.wav", "003_three_5.wav"]
    done = run(sa3_trt.main, [*line, "--out-dir", tmp_path / "serial", "--quiet"])
    assert done.code == 0 and "generations a second" in done.out, done.err
    for path in (tmp_path / "serial").iterdir():
        found, wanted = (soundfile.read(tmp_path / folder / path.name)[0] for folder in ("ring", "serial"))
        assert np.abs(found - wanted).max() <= 1e-4 and np.abs(wanted).max() > 0.01
