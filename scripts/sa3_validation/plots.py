"""Plot a report: single steps by sigma, generations beside their controls, and audio distances."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa3_trt_core.artifacts.files import atomic_path
from sa3_validation.report import NAMES, SHOWN, SOUND_FIGURES

MIN_DIFFERENCE = 1e-12  # position of 1 - cosine = 0 on the logarithmic axis
COLOURS = {"candidate": "C0", "perturbed": "C2", "other_kernels": "C7"}


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write steps.png, rollouts.png and, when sounds exist, audio.png; return their paths."""
    paths = [_save(_steps(document), folder / "steps.png"), _save(_rollouts(document), folder / "rollouts.png")]
    if document["audio"]:
        paths.append(_save(_audio(document), folder / "audio.png"))
    return paths


def _figure(columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def _save(figure: Any, path: Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    return path


def _off(cosine: float | None) -> float:
    return MIN_DIFFERENCE if cosine is None else max(1.0 - cosine, MIN_DIFFERENCE)


def _steps(document: Mapping[str, Any]) -> Any:
    figure, (axes,) = _figure(1)
    rows = document["single_step"]["by_sigma"]
    for output, label in SHOWN.items():
        for key, style in (("worst", "o-"), ("median", ".:")):
            points = [_off(row[output]["cosine"][key]) for row in rows]
            axes.plot([row["sigma"] for row in rows], points, style, label=f"{label}, {key}", alpha=0.8)
    axes.set(xlabel="sigma", ylabel="1 - cosine", yscale="log", title="single steps")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def _rollouts(document: Mapping[str, Any]) -> Any:
    samplers = list(document["rollouts"])
    figure, all_axes = _figure(len(samplers))
    for axes, sampler in zip(all_axes, samplers, strict=True):
        cases = [case for case in document["cases"] if sampler in case["rollouts"]]
        for name, colour in COLOURS.items():
            points = [_off(c["rollouts"][sampler][name]["cosine"]) for c in cases if name in c["rollouts"][sampler]]
            if points:
                axes.plot(range(len(points)), points, "o", color=colour, label=NAMES[name])
        axes.set_xticks(range(len(cases)), [case["name"] for case in cases], rotation=60, ha="right", fontsize=7)
        axes.set(ylabel="1 - cosine of the final latent", yscale="log", title=sampler.replace("_", "-"))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def _audio(document: Mapping[str, Any]) -> Any:
    shown = [name for name in SOUND_FIGURES if name not in ("clipped", "silent")]
    figure, all_axes = _figure(len(shown))
    for axes, figure_name in zip(all_axes, shown, strict=True):
        for name, colour in COLOURS.items():
            cases = [case for case in document["cases"] if name in case["audio"]]
            points = [(i, case["audio"][name][figure_name]) for i, case in enumerate(cases)]
            points = [(i, value) for i, value in points if value is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o", color=colour, label=NAMES[name], alpha=0.8)
        axes.set(title=SOUND_FIGURES[figure_name], xlabel="generation")
        axes.grid(alpha=0.3)
    all_axes[0].legend(fontsize=7)
    return figure
