"""Pictures that the report of a sweep may ask for: sensitivity, classifiers, features on the plane, missing modalities.

All are of the split whose numbers the table shows, at the epoch each run selected.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from counterpoise.reports.curves import (
    DASHES,
    GROUP_COLORS,
    Panel,
    Picture,
    modality_colors,
    shortened,
)
from counterpoise.reports.paper import modality_heading
from counterpoise.reports.records import FUSED, RunData, all_modalities
from counterpoise.reports.spec import ClassifiersSpec, MissingSpec, SensitivitySpec
from counterpoise.reports.tables import values_of

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

Labelled = Mapping[str, Sequence[RunData]]  # {label: its runs}


@dataclass(frozen=True)
class Plane:
    """Features of one modality of one run on the plane [N, 2], and their classes [N]."""

    label: str
    modality: str
    points: npt.NDArray[Any]
    classes: npt.NDArray[Any]


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample deviation; 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


# --- sensitivity


def lines_of(runs: Sequence[RunData], key: str, keys: Sequence[str]) -> dict[str, dict[float, list[RunData]]]:
    """{what the other keys are: {value of `key`: its runs}} for every line of two values or more.

    Numbers only; runs of a line agree in method and in all other keys.
    """
    others = [other for other in keys if other != key]
    found: dict[str, dict[float, list[RunData]]] = {}
    for run in runs:
        value = run.settings.get(key)
        if not run.finished or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        fixed = [f"{_short(other)} {run.settings.get(other)}" for other in others if other in run.settings]
        line = found.setdefault(", ".join([run.method, *fixed]), {})
        line.setdefault(float(value), []).append(run)
    return {name: dict(sorted(line.items())) for name, line in found.items() if len(line) > 1}


def sensitivity(groups: Labelled, spec: SensitivitySpec) -> Picture | None:
    runs = [run for group in groups.values() for run in group]
    names = all_modalities(runs)
    lines = {key: lines_of(runs, key, spec.keys) for key in spec.keys}
    curves = {key: found for key, own in lines.items() if own and (found := _curves(own, names))}
    if not curves:
        return None
    ends = [mean + sign * std for own in curves.values() for curve in own for mean, std in curve.points.values()
            for sign in (-1, 1)]  # fmt: skip
    margin = 0.08 * (max(ends) - min(ends)) or 0.02
    span = (max(0.0, min(ends) - margin), min(1.0, max(ends) + margin))
    return Picture(
        "sensitivity",
        "Sensitivity to settings",
        "Accuracy at the selected epoch over the values of a setting: the mean over seeds with one sample deviation. "
        "With one line, of all modalities together (Multi) and of each alone; with several, of all together.",
        tuple(_sensitivity_panel(key, own, span) for key, own in curves.items()),
    )


@dataclass(frozen=True)
class _Curve:
    """points: {value of the setting: (mean, deviation)}. color None: that of the ink."""

    label: str
    points: Mapping[float, tuple[float, float]]
    color: str | None
    dash: Any


def _curves(lines: Mapping[str, Mapping[float, Sequence[RunData]]], names: Sequence[str]) -> list[_Curve]:
    """Of one line, fused and every modality; of several, fused."""
    if len(lines) > 1:
        found = [
            _Curve(text, _spread(line, FUSED), GROUP_COLORS[i % len(GROUP_COLORS)], DASHES[i % len(DASHES)])
            for i, (text, line) in enumerate(lines.items())
        ]
    else:
        (line,) = lines.values()
        found = [
            _Curve(modality_heading(name), _spread(line, name), color, DASHES[i % len(DASHES)])
            for i, (name, color) in enumerate(modality_colors(names).items())
        ]
        found.append(_Curve("Multi", _spread(line, FUSED), None, "solid"))
    return [curve for curve in found if curve.points]


def _spread(line: Mapping[float, Sequence[RunData]], name: str) -> dict[float, tuple[float, float]]:
    return {x: mean_and_std(values) for x, runs in line.items()
            if (values := values_of(runs, "result", "accuracy", name))}  # fmt: skip


def _sensitivity_panel(key: str, curves: Sequence[_Curve], span: tuple[float, float]) -> Panel:
    def draw(figure: FigureBase, ink: str) -> None:
        ax: Axes = figure.subplots()
        values = sorted({value for curve in curves for value in curve.points})
        place = {value: i for i, value in enumerate(values)}  # as far apart as one another, whatever they are
        for i, curve in enumerate(curves):
            aside = 0.05 * (i - (len(curves) - 1) / 2)  # deviations stay told apart
            means, stds = zip(*curve.points.values(), strict=True)
            ax.errorbar([place[x] + aside for x in curve.points], means, yerr=stds, color=curve.color or ink,
                        linestyle=curve.dash, label=curve.label, marker="o", markersize=4, capsize=2.5, elinewidth=1,
                        linewidth=1.7 if curve.color else 2.4)  # fmt: skip
        ax.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        ax.set_xlim(-0.4, len(values) - 0.6)
        ax.set_ylim(span)
        _finish(ax, _short(key), "accuracy")

    return Panel(_short(key), draw)


def _short(key: str) -> str:
    return key.removeprefix("method.")


# --- classifiers


def classifiers(groups: Labelled, spec: ClassifiersSpec) -> Picture | None:
    """Bars of what a modality predicts with its first classifier, with all but the newest, and with all."""
    panels = [
        panel
        for label, group in groups.items()
        if (panel := _classifier_panel(spec.rows.get(label, label), [run for run in group if run.finished]))
    ]
    if not panels:
        return None
    return Picture(
        "classifiers",
        "All classifiers against the first",
        "Accuracy of each modality at the selected epoch, with its first classifier alone, with all but the newest, "
        "and with all; below, how many it has (a range where seeds differ). Mean over seeds with one sample deviation.",
        tuple(panels),
    )


def _classifier_panel(label: str, runs: Sequence[RunData]) -> Panel | None:
    names = [m for m in all_modalities(runs) if values_of(runs, "result", "accuracy_of_part", f"{m}/first")]
    if not names:
        return None

    def draw(figure: FigureBase, ink: str) -> None:
        ax: Axes = figure.subplots()
        colors = modality_colors(names)
        for i, name in enumerate(names):
            bars = {
                "first": values_of(runs, "result", "accuracy_of_part", f"{name}/first"),
                "all but\nthe newest": values_of(runs, "result", "accuracy_of_part", f"{name}/previous"),
                "all": values_of(runs, "result", "accuracy", name),
            }
            if not bars["all but\nthe newest"]:  # one classifier is all
                bars = {"": (), "first": bars["first"]}
            for j, (what, values) in enumerate(bars.items()):
                if values:
                    mean, std = mean_and_std(values)
                    x = i + 0.27 * (j - 1)
                    ax.bar(x, mean, 0.24, color=colors[name], alpha=(0.35, 0.65, 1.0)[j])
                    ax.errorbar(x, mean, yerr=std, color=ink, linewidth=1, capsize=2)
                    ax.annotate(f"{what}\n{mean:.3f}", (x, mean + std), xytext=(0, 3), textcoords="offset points",
                                ha="center", fontsize=7.5, color=ink)  # fmt: skip
        counts = [_counts(runs, name) for name in names]
        ax.set_xticks(range(len(names)), [f"{modality_heading(n)} ({c})" for n, c in zip(names, counts, strict=True)])
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.set_ylim(0, min(1.12, ax.get_ylim()[1] * 1.16))
        ax.set_ylabel("accuracy")
        ax.set_title(shortened(label, 52), loc="left")

    return Panel(label, draw)


def _counts(runs: Sequence[RunData], name: str) -> str:
    counts = [int(n) for run in runs if (n := ((run.summary or {}).get("classifiers") or {}).get(name)) is not None]
    low, high = min(counts, default=1), max(counts, default=1)
    return f"{low} classifier{'s' * (low > 1)}" if low == high else f"{low}-{high} classifiers"


# --- features on the plane


def planes(found: Sequence[Plane], classes: Sequence[str]) -> Picture | None:
    """Scatter plots, a row per label and a column per modality."""
    if not found:
        return None
    across = len({plane.modality for plane in found})

    def panel(plane: Plane) -> Panel:
        title = f"{plane.label}: {modality_heading(plane.modality)}"

        def draw(figure: FigureBase, ink: str) -> None:
            import matplotlib

            ax: Axes = figure.subplots()
            shades = matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20" if len(classes) <= 20 else "hsv"]
            for k, name in enumerate(classes):
                own = plane.points[plane.classes == k]
                color = shades(k if len(classes) <= 20 else k / len(classes))
                ax.plot(own[:, 0], own[:, 1], linestyle="none", marker="o", markersize=2.6, markeredgewidth=0,
                        alpha=0.8, color=color, label=shortened(str(name), 12))  # fmt: skip
            ax.set_aspect("equal", adjustable="datalim")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            ax.grid(False)
            ax.set_title(shortened(title, 52), loc="left")
            if len(classes) <= 12:
                ax.legend(
                    loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7.5, handletextpad=0.2, markerscale=1.6
                )

        return Panel(title, draw)

    number = len(found[0].points)
    return Picture(
        "tsne",
        "Features of each modality",
        f"Pooled features of {number:,} samples, the same in every panel, brought to the plane by t-SNE and "
        "coloured by class. Distances between clusters and axes mean nothing; whether classes part does.",
        tuple(map(panel, found)),
        across=across,
    )


# --- missing modalities


def missing(groups: Labelled, spec: MissingSpec) -> Picture | None:
    """Bars of fused accuracy with everything there, with a share missing, and without each modality."""
    cases: dict[str, tuple[str, ...]] = {"complete": ("accuracy", FUSED)}
    cases |= {f"{rate:.0%} lack one": ("missing_rates", f"{rate:g}", "accuracy") for rate in spec.rates}
    names = all_modalities([run for group in groups.values() for run in group])
    cases |= {f"no {modality_heading(name)}": ("missing", name, "accuracy") for name in names}
    found = {label: {case: values for case, path in cases.items() if (values := values_of(runs, "result", *path))}
             for label, runs in groups.items()}  # fmt: skip
    if not any(len(own) > 1 for own in found.values()):
        return None

    def draw(figure: FigureBase, ink: str) -> None:
        ax: Axes = figure.subplots()
        shown = [case for case in cases if any(case in own for own in found.values())]
        width = 0.8 / len(found)
        for i, (label, own) in enumerate(found.items()):
            spread = {j: mean_and_std(own[case]) for j, case in enumerate(shown) if case in own}
            places = [j + width * (i - (len(found) - 1) / 2) for j in spread]
            means, stds = [mean for mean, _ in spread.values()], [std for _, std in spread.values()]
            ax.bar(places, means, width * 0.9, color=GROUP_COLORS[i % len(GROUP_COLORS)],
                   label=shortened(spec.rows.get(label, label), 24))  # fmt: skip
            ax.errorbar(places, means, yerr=stds, color=ink, linewidth=1, capsize=2, linestyle="none")
        ax.set_xticks(range(len(shown)), shown)
        _finish(ax, "inputs", "accuracy")
        ax.set_ylim(bottom=0)

    return Picture(
        "missing",
        "Missing modalities",
        "Fused accuracy at the selected epoch while inputs are missing: nothing, one modality of a share of the "
        "samples (each as often), and one modality of all of them. Mean over seeds with one sample deviation.",
        (Panel("missing modalities", draw),),
    )


def _finish(ax: Axes, label: str, value: str) -> None:
    ax.set_xlabel(label)
    ax.set_ylabel(value)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2, columnspacing=1.2,
                  handletextpad=0.5)  # fmt: skip
