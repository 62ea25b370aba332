"""Format the report: Markdown of the document, and the summary for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sa3_trt_core import console
from sa3_validation import two_sample_report
from sa3_validation.gates import Verdict
from sa3_validation.metrics import STEP_FIGURES
from sa3_validation.study import CANDIDATE, OTHER, PERTURBED

NAMES = {CANDIDATE: "candidate", PERTURBED: "control: x off by 1e-3 at every step", OTHER: "control: other kernels"}
SHOWN = {"velocity": "velocity v", "denoised": "denoised x - sigma v", "euler": "Euler step x + dt v"}
PROBED = {"t": "noise levels", "seconds": "durations"}
SOUND_FIGURES = {
    "rms": "RMS curve", "spectral": "spectral, dB", "chroma": "chroma", "onsets": "onsets", "loudness": "loudness, LU",
    "clipped": "clipped, difference", "silent": "silent, difference",
}  # fmt: skip
Section = tuple[str, Sequence[str], list[list[str]]]


def sections(document: Mapping[str, Any]) -> list[Section]:
    """Return title, header and cells of every table of the report, in order."""
    return [
        *two_sample_report.section(document), *_steps(document), *_rollouts(document), *_audio(document),
        *_batches(document), *_fp16_collision(document),
    ]  # fmt: skip


def markdown(document: Mapping[str, Any], verdicts: Sequence[Verdict]) -> str:
    """Return the whole report as Markdown."""
    models = [document[name] for name in ("reference", "candidate")]
    descriptions = [f"{model['name']} ({model['backend']}, {model['file']})" for model in models]
    failed = [verdict for verdict in verdicts if not verdict.passed]
    lines = [
        f"# {models[1]['name']} against {models[0]['name']}", "",
        f"Reference: {descriptions[0]}  ", f"Candidate: {descriptions[1]}  ",
        *(f"Adapter of both: {line}  " for line in document.get("loras", [])),
        f"Created: {document['created']}, {', '.join(f'{k} {v}' for k, v in document['tools'].items())}", "",
        f"**{f'{len(failed)} of {len(verdicts)} gates failed' if failed else 'All gates pass'}.** {_same(document)}",
        "", *(f"- {verdict.line}" for verdict in failed or verdicts), "",
        "Meaning and limits of each figure: build/docs/validation.md of the project.", "",
    ]  # fmt: skip
    for title, header, rows in sections(document):
        lines += [f"## {title}", "", console.markdown(header, rows), ""]
        if title == two_sample_report.TITLE:
            lines += [*two_sample_report.words(document["two_sample"]), ""]
    lines += ["## Worst rows", "", *(_worst_line(kind, row) for kind, row in _worst(document)), ""]
    lines += ["## Speed", "", _speed(document), ""]
    return "\n".join(lines)


def summary(document: Mapping[str, Any], verdicts: Sequence[Verdict]) -> str:
    """Return the terminal summary: tables, worst rows and gates."""
    parts = [f"{title}\n{console.table(header, rows)}" for title, header, rows in sections(document)]
    if document.get("two_sample"):
        parts.insert(1, "\n".join(two_sample_report.words(document["two_sample"])))
    parts += ["\n".join(_worst_line(kind, row) for kind, row in _worst(document)), _speed(document)]
    failed = [verdict.line for verdict in verdicts if not verdict.passed]
    parts.append("\n".join(failed) if failed else f"all {len(verdicts)} gates pass. {_same(document)}".strip())
    return "\n\n".join(parts)


def _same(document: Mapping[str, Any]) -> str:
    return "Outputs are bit-identical to the reference." if document["identical"] else ""


def _steps(document: Mapping[str, Any]) -> list[Section]:
    steps = document["single_step"]
    header = ("figure", "rows", "worst cosine", "5 %", "median", "mean", "worst rel L2", "mean", "gain error")
    tables: list[Section] = []
    for output in STEP_FIGURES:
        rows = [[kind, *_step_cells(figures, output)] for kind, figures in steps["by_kind"].items()]
        rows += [[f"sigma {figures['sigma']:.4f}", *_step_cells(figures, output)] for figures in steps["by_sigma"]]
        tables.append((f"Single steps: {SHOWN[output]}", ("rows by", *header[1:]), rows))
    return tables


def _step_cells(figures: Mapping[str, Any], output: str) -> list[str]:
    cosine, relative, gain = (figures[output][name] for name in ("cosine", "relative", "gain"))
    gain_error = None if gain["worst"] is None else abs(gain["worst"] - 1.0)
    return [
        str(figures["rows"]), *(_number(cosine[name], 6) for name in ("worst", "p5", "median", "mean")),
        _small(relative["worst"]), _small(relative["mean"]), _small(gain_error),
    ]  # fmt: skip


def _rollouts(document: Mapping[str, Any]) -> list[Section]:
    rows = [
        [sampler.replace("_", "-"), kind, NAMES[name], str(figures["cosine"]["n"]),
         *(_number(figures["cosine"][key], 6) for key in ("worst", "p5", "median", "mean")),
         _small(figures["relative"]["median"])]
        for sampler, kinds in document["rollouts"].items()
        for kind, compared in kinds.items()
        for name, figures in compared.items()
    ]  # fmt: skip
    header = ("sampler", "kind", "against the reference", "n", "worst cosine", "5 %", "median", "mean", "median rel L2")
    return [("Whole generations, final latent", header, rows)]


def _audio(document: Mapping[str, Any]) -> list[Section]:
    rows = [
        [kind, NAMES[name], key, *(_number(figures[figure][key], 4) for figure in SOUND_FIGURES)]
        for kind, compared in document["audio"].items()
        for name, figures in compared.items()
        for key in ("worst", "median")
    ]
    return [
        ("Sound of the ping-pong generations", ("kind", "against the reference", "", *SOUND_FIGURES.values()), rows)
    ]


def _batches(document: Mapping[str, Any]) -> list[Section]:
    rows = [
        [name, str(figures["rows"]), _number(figures["cosine"]["worst"], 6), _small(figures["relative"]["worst"])]
        for name, sizes in document["batch"].items()
        for figures in sizes
    ]
    return [("Rows of a batch against the same rows alone", ("DiT", "B", "worst cosine", "worst rel L2"), rows)]


def _fp16_collision(document: Mapping[str, Any]) -> list[Section]:
    rows = [
        [PROBED[name], _small(max(figures["reference"])), _small(max(figures[CANDIDATE])),
         _number(figures["share"]["worst"], 3)]
        for name, figures in document["resolution"].items()
    ]  # fmt: skip
    header = ("two values that round to one fp16 number", "reference", "candidate", "worst share")
    return [("fp32 islands: relative L2 between velocities", header, rows)]


def _worst(document: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return list(document["single_step"]["worst"].items())


def _worst_line(kind: str, row: Mapping[str, Any]) -> str:
    prompt = f' "{row["prompt"]}"' if row["prompt"] else ""
    cosine = _number(row["cosine"], 6)
    return f"- worst {kind} row: {row['row']} at sigma {row['sigma']:.4f}, denoised cosine {cosine}{prompt}"


def _speed(document: Mapping[str, Any]) -> str:
    speed = document["speed"]
    return f"not measured: {speed['skipped']}" if "skipped" in speed else "measured by bench_dit.py: see bench/bench.md"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"
