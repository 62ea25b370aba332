"""Render a synthetic piece: oscillators, drums, reverb and mix, in NumPy and determined by the piece's seed.

Additive tones stop below 16 kHz, so that nothing aliases. Notes are cached: a piece uses a few dozen of them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sa3_demo.music import BASS_LINES, LEAD_LINES, Piece
from sa3_trt_core.shapes import SAMPLE_RATE

Sound = NDArray[np.float32]

MAX_NOTE_SECONDS = 3.6  # seconds: a bar at the slowest tempo, and a little
MAX_PARTIAL = 16_000.0  # Hz
MIX_RMS = 0.14
FADE = 441  # samples at the cut: 10 ms
STEPS = 16  # of a bar
_SEED = 20_260_101  # seed of the drums' and rooms' noise, which is the same in every piece
REVERB_SECONDS = {"dry": 0.0, "roomy": 0.5, "spacious": 1.4}
REVERB_GAIN = {"dry": 0.0, "roomy": 0.25, "spacious": 0.35}


def render(piece: Piece) -> Sound:
    """Return the samples of a piece: float32 (2, seconds * 44100) within +-1; equal pieces give equal samples."""
    length = piece.seconds * SAMPLE_RATE
    step = 60.0 / piece.bpm / 4.0
    bars = int(np.ceil(piece.seconds / (step * STEPS)))
    chords, bass, lead = (np.zeros((2, length), np.float32) for _ in range(3))
    drums = np.zeros((2, length), np.float32)
    for bar in range(bars):
        start = bar * STEPS * step
        _chord_bar(chords, piece, bar, start, step)
        _bass_bar(bass, piece, bar, start, step)
        _lead_bar(lead, piece, bar, start, step)
        _drum_bar(drums, piece, start, step)
    dry = 0.30 * chords + 0.62 * bass + 0.34 * lead + 0.80 * drums
    wet = _reverb(0.30 * chords + 0.34 * lead + 0.30 * drums, piece.space)
    mix = dry + REVERB_GAIN[piece.space] * wet
    mix *= MIX_RMS / max(float(np.sqrt(np.mean(np.square(mix)))), 1e-6)
    mix = np.tanh(mix)
    mix[:, -FADE:] *= np.linspace(1.0, 0.0, FADE, dtype=np.float32)
    return np.ascontiguousarray(mix, dtype=np.float32)


def _chord_bar(out: Sound, piece: Piece, bar: int, start: float, step: float) -> None:
    root, third, fifth, _ = piece.chord_tones(bar)
    for index, tone in enumerate((root, third, fifth)):
        # Kept within one octave from F3: close voicings, no jumps.
        midi = 53 + (piece.tonic + tone - 53) % 12
        note = tone_of(piece.chord, midi, piece.colour)
        _add(out, note, start, STEPS * step, pan=(0.35, 0.5, 0.65)[index])


def _bass_bar(out: Sound, piece: Piece, bar: int, start: float, step: float) -> None:
    midi = 29 + (piece.tonic + piece.chord_tones(bar)[0] - 29) % 12
    note = tone_of(piece.bass, midi, piece.colour)
    for at in BASS_LINES[piece.bass_line]:
        _add(out, note, start + at * step, 1.9 * step, pan=0.5)


def _lead_bar(out: Sound, piece: Piece, bar: int, start: float, step: float) -> None:
    tones = piece.chord_tones(bar)
    line = LEAD_LINES[piece.lead_line]
    for (at, tone), (until, _) in zip(line, (*line[1:], (STEPS, 0)), strict=True):
        midi = 65 + (piece.tonic + tones[0] - 65) % 12 + tones[tone] - tones[0]
        note = tone_of(piece.lead, midi, piece.colour)
        _add(out, note, start + at * step, (until - at) * step, pan=0.62 if at % 4 else 0.42)


def _drum_bar(out: Sound, piece: Piece, start: float, step: float) -> None:
    groove = piece.groove
    for voice, steps, pan in (
        ("kick", groove.kick, 0.5), ("snare", groove.snare, 0.5),
        ("hat", groove.hat, 0.6), ("open", groove.open_hat, 0.4),
    ):  # fmt: skip
        hit = drum(piece.kit, voice)
        for at in steps:
            accent = 1.0 if at % 4 == 0 else 0.75
            _add(out, accent * hit, start + at * step, hit.size / SAMPLE_RATE, pan)


def _add(out: Sound, note: Sound, start: float, duration: float, pan: float) -> None:
    """Mix in a mono note at `start` seconds, with an 8 ms release at its end, at an equal-power pan position."""
    first = round(start * SAMPLE_RATE)
    size = min(round(duration * SAMPLE_RATE), note.size, out.shape[1] - first)
    if size <= 0:
        return
    body = note[:size].copy()
    release = min(353, size)
    body[size - release :] *= np.linspace(1.0, 0.0, release, dtype=np.float32)
    out[0, first : first + size] += np.float32(np.cos(pan * np.pi / 2) * np.sqrt(2)) * body
    out[1, first : first + size] += np.float32(np.sin(pan * np.pi / 2) * np.sqrt(2)) * body


@lru_cache(maxsize=4096)
def tone_of(timbre: str, midi: int, colour: str) -> Sound:
    """Return one sustained note of an instrument, (samples,) float32, MAX_NOTE_SECONDS long, peak about 1."""
    time = np.arange(int(MAX_NOTE_SECONDS * SAMPLE_RATE), dtype=np.float32) / np.float32(SAMPLE_RATE)
    frequency = 440.0 * 2.0 ** ((midi - 69) / 12)
    wave = np.zeros_like(time)
    slope = 0.6 if colour == "dark" else 0.0  # extra roll-off of the partials, as a power of their number
    for number, gain, decay in _partials(timbre):
        partial = frequency * number
        if partial > MAX_PARTIAL:
            continue
        level = gain / number**slope
        # Phase in float64: at 16 kHz and 3 s the error of a float32 angle is audible.
        angle = np.mod(partial * np.arange(time.size) / SAMPLE_RATE, 1.0).astype(np.float32)
        tone = np.float32(level) * np.sin(np.float32(2 * np.pi) * angle)
        wave += tone * np.exp(np.float32(-decay) * time) if decay else tone
    attack = {"warm pad": 0.12, "string section": 0.06, "flute": 0.03, "organ": 0.008}.get(timbre, 0.003)
    wave *= np.minimum(time / np.float32(attack), 1.0)
    wave.flags.writeable = False
    return wave


def _partials(timbre: str) -> list[tuple[float, float, float]]:
    """Return (number, gain, decay per second) of every partial of an instrument."""
    if timbre == "electric piano":
        return [(1, 0.8, 1.2), (2, 0.25, 2.0), (3, 0.10, 3.0), (4, 0.12, 4.0), (7, 0.05, 9.0)]
    if timbre == "warm pad":
        return [(n, 0.6 / n**1.6, 0.0) for n in range(1, 9)] + [(1.004, 0.4, 0.0), (2.006, 0.15, 0.0)]
    if timbre == "organ":
        return [(n, g, 0.0) for n, g in ((0.5, 0.3), (1, 0.5), (2, 0.35), (3, 0.25), (4, 0.18), (6, 0.1), (8, 0.08))]
    if timbre == "string section":
        return [(n * d, 0.35 / n**1.1, 0.0) for n in range(1, 14) for d in (1.0, 1.003)]
    if timbre == "sub bass":
        return [(1, 1.0, 0.3), (2, 0.12, 1.0)]
    if timbre == "saw bass":
        return [(n, 0.6 / n, 0.8 + 0.4 * n) for n in range(1, 24)]
    if timbre == "picked bass":
        return [(n, 0.8 / n**1.2, 1.5 + 0.9 * n) for n in range(1, 16)]
    if timbre == "bell":
        return [(1, 0.6, 2.2), (2.76, 0.3, 4.0), (5.4, 0.15, 7.0), (2, 0.15, 3.0)]
    if timbre == "square lead":
        return [(n, 0.6 / n, 0.5) for n in range(1, 20, 2)]
    if timbre == "flute":
        return [(1, 0.8, 0.0), (2, 0.18, 0.0), (3, 0.06, 0.0)]
    if timbre == "plucked harp":
        return [(n, 0.7 / n**0.9, 2.5 + 0.8 * n) for n in range(1, 14)]
    raise ValueError(f"no such instrument: {timbre}")


@lru_cache(maxsize=64)
def drum(kit: str, voice: str) -> Sound:
    """Return one hit of a drum, (samples,) float32, peak about 1."""
    generator = np.random.default_rng((_SEED, sum(map(ord, kit + voice))))
    tight = {"drum machine": 1.0, "acoustic drum kit": 1.4, "soft brushes": 2.0}[kit]
    seconds = {"kick": 0.32, "snare": 0.22, "hat": 0.07, "open": 0.24}[voice]
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = generator.standard_normal(time.size)
    if voice == "kick":
        low, drop = {"drum machine": (46.0, 160.0), "acoustic drum kit": (60.0, 90.0), "soft brushes": (70.0, 50.0)}[
            kit
        ]
        phase = 2 * np.pi * (low * time + drop / 38.0 * (1 - np.exp(-38.0 * time)))
        hit = np.sin(phase) * np.exp(-time * 11.0) + 0.15 * _high(noise) * np.exp(-time * 400.0)
    elif voice == "snare":
        body = np.sin(2 * np.pi * 185.0 * time) * np.exp(-time * 30.0)
        hit = 0.5 * body / tight + 0.32 * _high(noise) * np.exp(-time * 17.0 * (0.6 if kit == "soft brushes" else 1.0))
    else:
        rate = 16.0 if voice == "open" else 60.0
        hit = 0.25 / tight**0.5 * _high(_high(noise)) * np.exp(-time * rate)
    hit *= np.minimum(time / 0.0008, 1.0) * np.minimum((time[-1] - time) / 0.004, 1.0)
    out = (hit * (0.6 if kit == "soft brushes" else 1.0)).astype(np.float32)
    out.flags.writeable = False
    return out


def _high(noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the first difference, which attenuates the lower half of the spectrum at about the same level."""
    return np.diff(noise, prepend=0.0) / np.sqrt(2.0)


@lru_cache(maxsize=16)
def _room(space: str, size: int) -> NDArray[np.complex64]:
    """Return the spectra (2, size/2 + 1) of a room's impulse response.

    It is exponentially decaying noise with unit energy per side.
    """
    generator = np.random.default_rng((_SEED, 7))
    seconds = REVERB_SECONDS[space]
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = generator.standard_normal((2, time.size)) * np.exp(-6.9 * time / seconds)
    noise = np.cumsum(noise * 0.5, axis=1) - np.cumsum(np.pad(noise * 0.5, ((0, 0), (4, 0)))[:, : time.size], axis=1)
    noise /= np.sqrt(np.square(noise).sum(axis=1, keepdims=True))
    return np.fft.rfft(noise.astype(np.float32), size).astype(np.complex64)


def _reverb(send: Sound, space: str) -> Sound:
    if space == "dry":
        return np.zeros_like(send)
    length = send.shape[1]
    size = _fast_size(length + int(REVERB_SECONDS[space] * SAMPLE_RATE))
    spectrum = np.fft.rfft(send.mean(axis=0), size)
    return np.fft.irfft(spectrum * _room(space, size), size)[:, :length].astype(np.float32)


def _fast_size(minimum: int) -> int:
    """Return the smallest 2^a 3^b 5^c that is at least `minimum`, a fast FFT length."""
    best = 1 << (minimum - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            size = three
            while size < minimum:
                size *= 2
            best = min(best, size)
            three *= 3
        five *= 5
    return best
