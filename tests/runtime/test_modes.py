"""Every mode through ONNX Runtime compared with a loop in torch over the checkpoint, on the same noise."""

from __future__ import annotations

import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sa3_build.calibration.capture import CheckpointModel
from sa3_build.export import load_modules
from sa3_build.export.model_config import load_geometry
from sa3_trt_core import Generator, Request, Result
from sa3_trt_core.sampling.guidance import guided, parallel_part
from sa3_trt_core.sampling.schedule import legacy_sigmas, sigmas

RATE = 44_100
SECONDS = 1.5
PUBLISHED = [1.0, 0.9250, 0.8409, 0.7459, 0.6378, 0.5138, 0.3699, 0.2010, 0.0]  # build/FACTS.md, Generation: at L = 646
BASE = Request("slow piano, 70 BPM", SECONDS, steps=3, seed=11)


# Every mode runs on each backend; the value is the tolerance of its fp32 latents.
BACKENDS = {"onnxruntime": 5e-5}


@pytest.fixture(scope="module", params=BACKENDS)
def generator(request: pytest.FixtureRequest, tiny_onnx: Path) -> Iterator[Generator]:
    with Generator.load(precision="fp32", backend=request.param, onnx_root=tiny_onnx) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write ten seconds of a decaying chord with noise."""
    path = tmp_path_factory.mktemp("sound") / "chord.wav"
    time = np.arange(10 * RATE) / RATE
    chord = sum(np.sin(2 * np.pi * hertz * time) for hertz in (220, 277, 330)) * np.exp(-(time % 1.0)) / 4
    noise = np.random.default_rng(1).normal(0, 0.02, (len(time), 2))
    soundfile.write(path, chord[:, None] + noise, RATE, subtype="FLOAT")
    return path


class Plain:
    """The native generation as a loop in torch: build/FACTS.md, Generation."""

    def __init__(self, folder: Path) -> None:
        config, weights = folder / "model_config.json", folder / "model.safetensors"
        self.model = CheckpointModel(config, weights, "cpu")
        geometry = load_geometry(config)
        self.autoencoder = load_modules.load_autoencoder(load_modules.NativeWeights(weights), geometry.autoencoder)

    def encode(self, request: Request, frames: int) -> torch.Tensor:
        """Return the latents of the input sound, padded with silence, by diffusers' encoder."""
        samples, _ = soundfile.read(request.init_audio, dtype="float32")
        samples = samples[round(request.init_start * RATE) :][: frames * 4096]
        padded = torch.zeros(1, 2, frames * 4096)
        padded[0, :, : len(samples)] = torch.from_numpy(samples.T)
        return self.autoencoder.encode(padded).latents

    @torch.inference_mode()
    def latents(self, request: Request) -> torch.Tensor:
        drawn = math.ceil(int((request.seconds + request.duration_padding) * RATE) / 4096)
        drawn += drawn % 2
        sounding = math.ceil(int(request.seconds * RATE) / 4096)
        frames = min(sounding + int(request.duration_padding * RATE / 4096), drawn)  # those that are attended
        if request.legacy_schedule:
            frames = drawn = math.ceil(request.seconds * RATE / 4096)
        level = request.init_noise_level or 1.0
        levels = sigmas(request.steps) * level
        if request.legacy_schedule:
            levels = legacy_sigmas(request.steps, frames, level)
        if request.schedule_order == "scale-then-warp":
            levels = torch.sigmoid(8.2 * torch.linspace(level, 0, request.steps + 1) - 2)
            levels[0], levels[-1] = level, 0.0
        cond = self.model.conditioning(request.prompt, request.seconds, frames)
        init, keep, local = None, torch.zeros(1, 1, frames), cond.local_add_cond
        if request.init_audio is not None:
            init = self.encode(request, drawn)[..., :frames]
        if request.inpaint:
            samples = torch.ones(frames * 4096)  # the mask is made in samples; a frame has that of its first one
            for start, end in (*request.inpaint, (request.seconds, math.inf)):
                samples[int(start * RATE) : None if end == math.inf else int(end * RATE)] = 0
            keep = samples[::4096].reshape(1, 1, frames)
            local = torch.cat([keep, init * keep], dim=1)
        null, mask = torch.zeros_like(cond.t5_hidden), torch.zeros_like(cond.t5_mask)  # together: the null row
        if request.negative_prompt is not None:
            negative = self.model.conditioning(request.negative_prompt, request.seconds, frames)
            null, mask = torch.where(negative.t5_mask[..., None] > 0, negative.t5_hidden, 0.0), torch.ones_like(mask)
        torch.manual_seed(request.seed)
        x = torch.randn(1, 256, drawn)[..., :frames]
        if request.init_noise_level is not None:
            x = init * (1 - level) + x * level
        for now, after in itertools.pairwise(levels):
            rest = (cond.seconds_total, local)
            clean = x - now * self.model.module(x, now[None], cond.t5_hidden, cond.t5_mask, *rest)
            if request.cfg != 1:
                away = clean - (x - now * self.model.module(x, now[None], null, mask, *rest))
                unit = clean / clean.norm()
                across = away - (away * unit).sum() * unit
                apg = 1.0 if request.apg is None else request.apg
                clean = clean + (request.cfg - 1) * (apg * across + (1 - apg) * away)
            x = (1 - after) * clean + after * torch.randn(1, 256, drawn)[..., :frames]
            if request.paste_kept:
                x = init * keep + x * (1 - keep)
        return x


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> Plain:
    return Plain(tiny_checkpoint)


GUIDED = {"cfg": 3.0}
HALF = ((0.5, 1.0),)
TWO = ((0.0, 0.3), (0.9, SECONDS))
MODES = {
    "text": {},
    "text, published schedule": {"legacy_schedule": True},
    "audio to audio": {"init_noise_level": 0.6},
    "audio to audio from 2 s": {"init_noise_level": 0.05, "init_start": 2.0},
    "audio to audio past the end": {"init_noise_level": 0.6, "init_start": 9.0},
    "audio to audio, published schedule": {"init_noise_level": 0.4, "legacy_schedule": True, "seconds": 3.5},
    "in-painting": {"inpaint": HALF},
    "in-painting, two ranges": {"inpaint": TWO},
    "in-painting, pasted": {"inpaint": TWO, "paste_kept": True},
    "in-painting from a noise level": {"inpaint": HALF, "init_noise_level": 0.6},
    "scaled, then warped": {"init_noise_level": 0.6, "schedule_order": "scale-then-warp"},
    "no padding": {"duration_padding": 0.0},
    "more padding": {"duration_padding": 7.3},
    "guidance": GUIDED,
    "plain guidance": {**GUIDED, "apg": 0.0},
    "half projected guidance": {**GUIDED, "apg": 0.5},
    "negative prompt": {**GUIDED, "negative_prompt": "harsh noise"},
    "empty negative prompt": {**GUIDED, "negative_prompt": ""},
    "guided audio to audio": {**GUIDED, "init_noise_level": 0.8},
    "guided in-painting away from a text": {"cfg": 2.0, "inpaint": HALF, "negative_prompt": "drums"},
}


def requested(name: str, sound: Path) -> Request:
    settings = MODES[name]
    init = sound if {"init_noise_level", "inpaint"} & settings.keys() else None
    return replace(BASE, init_audio=init, **settings)


@pytest.fixture(scope="module")
def made(generator: Generator, sound: Path) -> Callable[[str], Result]:
    """Return a function that generates the result of a mode once."""
    return functools.cache(lambda name: generator.generate(requested(name, sound)))


@pytest.mark.parametrize("name", MODES)
def test_latents_are_those_of_a_plain_loop(
    generator: Generator, made: Callable[[str], Result], plain: Plain, sound: Path, name: str
) -> None:
    """Every mode on every backend."""
    request = requested(name, sound)
    result, expected = made(name), plain.latents(request)
    assert result.latents.shape == expected.shape == (1, 256, request.valid_frames)
    tolerance = BACKENDS[generator.engines.plan.backends["dit"]]
    assert float((result.latents - expected).abs().max()) <= tolerance
    assert result.audio.shape == (int(request.seconds * RATE), 2) and result.audio.dtype == torch.float32
    assert bool(torch.isfinite(result.audio).all()) and float(result.audio.abs().max()) > 0.01


def test_every_setting_changes_the_sound(made: Callable[[str], Result]) -> None:
    """Equality with the loop proves nothing for a setting that both ignore."""
    latents_by_mode = {name: made(name).latents for name in MODES}
    for first, second in itertools.combinations(latents_by_mode, 2):
        if latents_by_mode[first].shape == latents_by_mode[second].shape:
            assert float((latents_by_mode[first] - latents_by_mode[second]).abs().max()) > 1e-3, (first, second)


@pytest.mark.parametrize("settings", [{}, GUIDED, {"inpaint": HALF}], ids=["text", "guided", "in-painting"])
def test_a_row_does_not_depend_on_its_neighbours(generator: Generator, sound: Path, settings: dict) -> None:
    """Rows of different prompts, seeds, lengths and negative prompts equal the same rows alone."""
    first = replace(BASE, init_audio=sound if "inpaint" in settings else None, **settings)
    rows = [first, replace(first, prompt="techno", seed=5), replace(first, seconds=2.0), replace(first, seconds=1.51)]
    if "cfg" in settings:
        rows[1] = replace(rows[1], negative_prompt="voices")
    together = dict(generator.generate_many(rows, batch=3))
    assert sorted(together) == [0, 1, 2, 3] and rows[3].batch_key == rows[0].batch_key != rows[2].batch_key
    for index, row in enumerate(rows):
        alone = generator.generate(row)
        assert float((together[index].latents - alone.latents).abs().max()) <= 1e-5
        assert float((together[index].audio - alone.audio).abs().max()) <= 1e-4
        assert together[index].audio.shape == (int(row.seconds * RATE), 2)


def test_the_kept_region_is_kept_and_the_rest_is_not_seen(
    generator: Generator, plain: Plain, sound: Path, tmp_path: Path
) -> None:
    request = replace(BASE, seconds=3.0, steps=2, init_audio=sound, inpaint=((0.5, 2.5),), paste_kept=True)
    latents = generator.generate(request).latents
    init = plain.encode(request, request.frames)
    kept = torch.zeros(request.valid_frames, dtype=torch.bool)
    kept[:33] = True
    kept[6:27] = False  # 0.5 s lies in frame 5, 2.5 s in frame 26, 3 s in frame 32
    init = init[..., : request.valid_frames]
    assert torch.allclose(latents[..., kept], init[..., kept], atol=1e-5)
    assert float((latents[..., ~kept] - init[..., ~kept]).abs().mean()) > 0.1
    # Sound well inside the range plays no part, sound outside does, with nothing pasted either.
    samples, _ = soundfile.read(sound)
    free = replace(request, paste_kept=False)
    unchanged_latents = generator.generate(free).latents
    for second, same in ((1.5, True), (2.7, False)):
        changed = samples.copy()
        changed[int(second * RATE) : int((second + 0.2) * RATE)] = 0.5
        soundfile.write(tmp_path / "changed.wav", changed, RATE, subtype="FLOAT")
        changed_latents = generator.generate(replace(free, init_audio=tmp_path / "changed.wav")).latents
        assert torch.equal(changed_latents, unchanged_latents) == same


def test_the_published_schedule_has_its_published_levels() -> None:
    levels = legacy_sigmas(8, 646)
    assert [round(level, 4) for level in levels.tolist()] == PUBLISHED
    assert not torch.allclose(legacy_sigmas(8, 1292), levels, atol=1e-3)
    scaled = legacy_sigmas(8, 646, 0.5)
    assert (float(scaled[0]), float(scaled[-1])) == (0.5, 0.0)


def test_guidance_of_one_is_none_and_the_parallel_part_is_parallel() -> None:
    text, null, clean = torch.randn(3, 2, 256, 40, generator=torch.Generator().manual_seed(2)).unbind()
    assert torch.equal(guided(text, null, 1.0), text)
    assert torch.allclose(guided(text, null, 0.0), null, atol=1e-6)
    part = parallel_part(text, clean)
    rest = text - part
    for row in range(2):  # each row by itself
        assert abs(float((rest[row] * clean[row]).sum())) < 1e-2
        ratio = part[row] / clean[row]
        assert float(ratio.max() - ratio.min()) < 1e-3
    assert torch.allclose(parallel_part(clean, clean), clean, atol=1e-6)


def test_many_generations_hold_nothing(generator: Generator, sound: Path) -> None:
    """Neither the bytes of live tensors nor the resident memory of the process grow with the generations."""
    request = replace(requested("audio to audio", sound), seconds=5.0, steps=1)

    def tensor_bytes() -> int:
        gc.collect()
        return sum(t.numel() * t.element_size() for t in gc.get_objects() if type(t) is torch.Tensor)

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096

    for _ in range(4):
        generator.generate(request)
    tensors, growths = tensor_bytes(), []
    for _ in range(3):  # in a long test process the allocator may take a block once; a leak grows every time
        memory = resident()
        for seed in range(8):
            sizes = {result.audio.nbytes for _, result in generator.generate_many([replace(request, seed=seed)])}
        growths.append(resident() - memory)
        if growths[-1] < 8 * 1_500_000:
            break
    assert sizes == {5 * RATE * 2 * 4}
    assert tensor_bytes() == tensors
    assert min(growths) < 8 * 1_500_000  # a sound is 1.8 MB: one kept a generation is more


def test_a_closed_generator_says_so(tiny_onnx: Path) -> None:
    with Generator.load(precision="fp32", backend="onnxruntime", onnx_root=tiny_onnx) as loaded:
        assert loaded.clips
    with pytest.raises(RuntimeError, match="closed"):
        loaded.generate(BASE)
    loaded.close()
