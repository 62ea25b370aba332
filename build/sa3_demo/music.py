"""Synthetic pieces of music for the demonstration model; every fact of a caption is drawn from one seed.

Tempo and key are drawn independently of everything else, so that neither can be inferred from the rest of a caption.
The music theory is that of dance loops: four beats per bar, sixteen steps per bar, one chord per bar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from reprompt import MusicExample
from sa3_validation.listener import SCALES, TEMPO_RANGE

TEMPOS = tuple(
    range(TEMPO_RANGE[0], TEMPO_RANGE[1] + 1, 4)
)  # beats per minute, far enough apart for the tempo estimator
LENGTHS = (4, 5, 6, 8, 10)  # seconds
TONICS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
PROGRESSIONS: Mapping[str, tuple[tuple[int, ...], ...]] = {  # scale degrees of the chords, one per bar
    "major": ((0, 4, 5, 3), (0, 5, 3, 4), (0, 3, 0, 4)),
    "minor": ((0, 5, 2, 6), (0, 3, 0, 4), (0, 6, 5, 6)),
}
FIRST_HELD_OUT = 1 << 30  # seeds from here on are for scoring; training uses lower seeds


@dataclass(frozen=True)
class Groove:
    """Drum pattern of one bar: the steps (of 16) of every voice, and its description."""

    genre: str
    words: str
    kick: tuple[int, ...]
    snare: tuple[int, ...]
    hat: tuple[int, ...]
    open_hat: tuple[int, ...] = ()


_BEATS = (0, 4, 8, 12)
_EIGHTHS = tuple(range(0, 16, 2))
GROOVES: tuple[Groove, ...] = (
    Groove("house", "four-on-the-floor kick with offbeat open hats", _BEATS, (4, 12), _BEATS, (2, 6, 10, 14)),
    Groove("techno", "straight kick and rolling sixteenth hats", (0, 4, 8, 12), (), tuple(range(16))),
    Groove("hip hop", "boom-bap kick and a hard backbeat", (0, 7, 10), (4, 12), _EIGHTHS),
    Groove("rock", "straight rock beat", (0, 8, 10), (4, 12), _EIGHTHS),
    Groove("downtempo", "soft kick on every beat", (0, 4, 8, 12), (), (2, 6, 10, 14)),
    Groove("electro", "syncopated kick and snare on two and four", (0, 3, 6, 10), (4, 12), _EIGHTHS, (14,)),
)  # fmt: skip
CHORDS = ("electric piano", "warm pad", "organ", "string section")
BASSES = ("sub bass", "saw bass", "picked bass")
LEADS = ("bell", "square lead", "flute", "plucked harp")
KITS = ("drum machine", "acoustic drum kit", "soft brushes")
BASS_LINES: Mapping[str, tuple[int, ...]] = {  # words -> steps of one bar
    "bass on the beat": (0, 4, 8, 12),
    "eighth-note bass": _EIGHTHS,
    "offbeat bass": (2, 6, 10, 14),
}
LEAD_LINES: Mapping[str, tuple[tuple[int, int], ...]] = {  # words -> (step, chord tone) of one bar
    "rising arpeggio": ((0, 0), (2, 1), (4, 2), (6, 3), (8, 0), (10, 1), (12, 2), (14, 3)),
    "falling arpeggio": ((0, 3), (2, 2), (4, 1), (6, 0), (8, 3), (10, 2), (12, 1), (14, 0)),
    "two-note riff": ((0, 2), (4, 0), (8, 2), (12, 0)),
    "long notes": ((0, 2), (8, 3)),
}
COLOURS = ("bright", "dark")
SPACES = ("dry", "roomy", "spacious")


@dataclass(frozen=True)
class Piece:
    """One loop. `tonic` is 0..11 from C, `bpm` beats per minute, `seconds` the length; the others are names from above.

    `progression` is an index into PROGRESSIONS of the mode; `seed` also determines what captions do not state.
    """

    seed: int
    bpm: int
    tonic: int
    mode: str
    progression: int
    groove: Groove
    chord: str
    bass: str
    lead: str
    kit: str
    bass_line: str
    lead_line: str
    colour: str
    space: str
    seconds: int

    @property
    def key(self) -> str:
        """The key as captions write it: "A minor"."""
        return f"{TONICS[self.tonic]} {self.mode}"

    def example(self) -> MusicExample:
        """Return the facts as a MusicExample, from which deployed captions are written."""
        return MusicExample(
            request=self.request(),
            genre=self.groove.genre,
            instruments=(self.chord, self.bass, self.lead, self.kit),
            rhythm=f"{self.groove.words}, {self.bass_line}, {self.lead_line}",
            mood=(self.colour, self.space),
            bpm=self.bpm,
            key=self.key,
            seconds=float(self.seconds),
        )

    def request(self) -> str:
        """Return a short request for the piece; the seed selects the facts, tempo and key are always included."""
        generator = np.random.default_rng((self.seed, 1))
        parts = [part for part in (self.chord, self.bass, self.lead, self.kit) if generator.random() < 0.5]
        mood = f"{self.colour} " if generator.random() < 0.5 else ""
        text = f"{mood}{self.groove.genre}" + (f" with {' and '.join(parts)}" if parts else "")
        facts = [f"{self.bpm} BPM", self.key]
        if generator.random() < 0.5:
            facts.reverse()
        text = f"{text}, {', '.join(facts)}"
        return text[0].upper() + text[1:] if generator.random() < 0.5 else text

    def chord_tones(self, bar: int) -> tuple[int, int, int, int]:
        """Return root, third, fifth and octave of a bar's chord, in semitones above the tonic."""
        scale, degrees = SCALES[self.mode], PROGRESSIONS[self.mode][self.progression]
        degree = degrees[bar % len(degrees)]
        root, third, fifth = (scale[(degree + up) % 7] + 12 * ((degree + up) // 7) for up in (0, 2, 4))
        return root, third, fifth, root + 12


def draw_piece(seed: int, seconds: int | None = None) -> Piece:
    """Return the piece of a seed, equal on every machine. `seconds` overrides its length."""
    generator = np.random.default_rng((seed, 0))

    def choose(options: tuple[Any, ...]) -> Any:
        return options[int(generator.integers(len(options)))]

    bpm, tonic, mode = choose(TEMPOS), int(generator.integers(12)), choose(tuple(SCALES))
    piece = Piece(
        seed=seed, bpm=bpm, tonic=tonic, mode=mode, progression=int(generator.integers(len(PROGRESSIONS[mode]))),
        groove=choose(GROOVES), chord=choose(CHORDS), bass=choose(BASSES), lead=choose(LEADS), kit=choose(KITS),
        bass_line=choose(tuple(BASS_LINES)), lead_line=choose(tuple(LEAD_LINES)), colour=choose(COLOURS),
        space=choose(SPACES), seconds=choose(LENGTHS),
    )  # fmt: skip
    return piece if seconds is None else replace(piece, seconds=seconds)
