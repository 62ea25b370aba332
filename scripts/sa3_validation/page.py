"""Write the listening page: one HTML file with sounds, spectrograms, figures and a blind test; no network access."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from sa3_trt_core.artifacts.files import write_atomic_text
from sa3_trt_core.shapes import SAMPLE_RATE
from sa3_validation import two_sample_report
from sa3_validation.report import NAMES, SOUND_FIGURES
from sa3_validation.spectra import spectrogram
from sa3_validation.study import CANDIDATE, COMPARED, StudyResult

PARTS = {"@STYLE@": "page.css", "@SCRIPT@": "page.js"}
PICTURE_HOP = 1024  # samples: 43 columns a second, as wide as a screen for 10 s


def write(path: Path, document: Mapping[str, Any], result: StudyResult) -> Path:
    """Write the page of a report and its sounds atomically; return its path."""
    names = [document[dit]["name"] for dit in ("reference", "candidate")]
    if names[0] == names[1]:
        names = [f"{name} ({dit})" for name, dit in zip(names, ("reference", "candidate"), strict=True)]
    shown = [name for name in COMPARED if name in result.sounds]
    failed = [verdict for verdict in document["gates"] if not verdict["passed"]]
    passed = f"All {len(document['gates'])} gates pass." if not failed else f"{len(failed)} gates failed: "
    data = {
        "names": names,
        "sampleRate": SAMPLE_RATE,
        "created": document["created"],
        "verdict": passed + "; ".join(verdict["line"] for verdict in failed),
        "columns": ["against the reference", *(NAMES[name] for name in shown)],
        "twoSample": _two_sample(document),
        "cases": [_case(case, result, shown) for case in document["cases"]],
    }
    text = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    for placeholder, name in PARTS.items():
        text = text.replace(placeholder, resources.files(__package__).joinpath(name).read_text("utf-8"))
    text = text.replace("@TITLE@", html.escape(f"{names[1]} against {names[0]}"))
    text = text.replace("@ADAPTERS@", _adapters(document.get("loras", [])))
    # A "<" would let a prompt end the script element.
    text = text.replace("@DATA@", json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
    write_atomic_text(path, text)
    return path


def _adapters(lines: Sequence[str]) -> str:
    """Return the adapters that both models ran with as HTML, a list item each; nothing without any."""
    # An "@" could be one of the marks that are replaced after this one.
    items = "".join(f"<li>{html.escape(line).replace('@', '&#64;')}</li>" for line in lines)
    return f'<p>Both with the adapters</p>\n<ul id="adapters">{items}</ul>\n' if items else ""


def _two_sample(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the table and the explanation of the two-sample test; None when it was not run."""
    figures = document.get("two_sample")
    if not figures:
        return None
    return {
        "title": two_sample_report.TITLE, "header": two_sample_report.HEADER, "rows": two_sample_report.rows(figures),
        "words": two_sample_report.words(figures),
    }  # fmt: skip


def _case(case: Mapping[str, Any], result: StudyResult, shown: list[str]) -> dict[str, Any]:
    pair = [result.sounds[dit][case["name"]] for dit in ("reference", CANDIDATE)]
    rows = [["final latent, cosine", *(f"{case['rollouts']['ping_pong'][name]['cosine']:.6f}" for name in shown)]]
    rows += [[label, *(_cell(case["audio"][name][key]) for name in shown)] for key, label in SOUND_FIGURES.items()]
    loudness = [case["levels"][dit]["loudness"] for dit in ("reference", CANDIDATE)]
    rows.append(["LUFS (reference, candidate)", ", ".join("-" if x is None else f"{x:.1f}" for x in loudness)])
    rows[-1] += [""] * (len(shown) - 1)
    return {
        "name": case["name"],
        "prompt": case["prompt"],
        "sounds": [_base64(flac(samples)) for samples in pair],
        "pictures": [_base64(spectrogram(samples, SAMPLE_RATE, PICTURE_HOP)) for samples in pair],
        "metrics": rows,
    }


def flac(samples: np.ndarray) -> bytes:
    """Return a 16-bit FLAC of fp32 samples (N, 2): lossless, and supported by all browsers."""
    import soundfile

    out = io.BytesIO()
    pcm = np.round(np.clip(samples, -1.0, 1.0) * np.float32(32767)).astype(np.int16)
    soundfile.write(out, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
