"""Pictures of runs, as SVG that suits light and dark pages and as PNG. Equal runs give equal SVG bytes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from counterpoise import storage
from counterpoise.reports.records import (
    FUSED,
    RunData,
    accuracy_series,
    all_modalities,
    classifier_steps,
    epochs_kept,
    reason,
    series,
    without_rehearsals,
)
from counterpoise.reports.tables import group_labels, group_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

# Told apart by people with any colour vision (hue and lightness differ), and at least 3:1 against white and #14171c.
MODALITY_COLORS = {
    "audio": "#2f7fd1",
    "visual": "#d9632a",
    "text": "#159a72",
    "image": "#a98600",
    "flow": "#b65aa6",
    "depth": "#8a6a52",
}
SPARE_COLORS = ("#1d97b5", "#c2566b", "#6f8f1f", "#8a6fd1", "#b07a3a")
GROUP_COLORS = ("#7a66d6", "#0f98a0", "#c94f7c", "#8c8a00", "#b06a3b", "#4f86c6", "#5b9a4a")
# For prints without colour: the second and later modalities are dashed.
DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.4)), (0, (1.2, 1.2)), (0, (5, 1.4, 1.2, 1.4)), (0, (8, 2)))
SVG_INK = "#767676"  # stands for the colour of the text around the picture
PNG_INK = "#30343b"
PANEL_INCHES = (4.9, 3.1)


@dataclass(frozen=True)
class Panel:
    title: str
    draw: Callable[[FigureBase, str], None]  # what to draw on, and the colour of the ink


@dataclass(frozen=True)
class Picture:
    """One question answered by one or more panels that share their scale. caption: how to read it."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    across: int = 3  # panels beside one another in a file; a page has as many as fit


def modality_colors(names: Sequence[str]) -> dict[str, str]:
    """A colour per modality: fixed for the usual names, spare ones in order for others."""
    spare = iter(SPARE_COLORS * (1 + len(names) // len(SPARE_COLORS)))
    return {name: MODALITY_COLORS.get(name) or next(spare) for name in names}


def pictures(runs: Sequence[RunData], groups: Mapping[str, Sequence[RunData]] | None = None) -> list[Picture]:
    """The pictures that these runs have data for.

    groups: {label: runs} whose curves are averaged; default: runs that differ only in seed and name, of `runs`.
    """
    runs = [run for run in runs if run.epochs]
    if not runs:
        return []
    grouped = _labelled(runs) if groups is None else groups
    several = {key: [run for run in group if len(run.modalities) > 1] for key, group in grouped.items()}
    names = all_modalities(runs)
    colors = modality_colors(names)
    dashes = {name: DASHES[i % len(DASHES)] for i, name in enumerate(names)}
    found = [_accuracy(runs, colors, dashes)]
    if grown := [run for run in runs if _has_stacks(run)]:
        found.append(_growth(grown, colors, dashes))
    if any(series(run, "gap")[0] for group in several.values() for run in group):
        found.append(
            _over_epochs(
                several,
                "gap",
                "Gap between modalities",
                "accuracy gap",
                lambda run: series(run, "gap"),
                "Accuracy of the best minus that of the worst modality after each epoch; 0 is balanced.",
            )
        )
    if len(grouped) > 1:
        found.append(
            _over_epochs(
                grouped,
                "learning",
                "Learning curves",
                "fused accuracy",
                lambda run: accuracy_series(run, FUSED),
                "Accuracy of all modalities together after each epoch, on valid where the corpus has it.",
            )
        )
    if any(series(run, "train", "loss")[0] for run in runs):
        found.append(
            _over_epochs(
                grouped,
                "loss",
                "Training loss",
                "loss",
                lambda run: series(run, "train", "loss"),
                "Mean training loss of each epoch; methods minimise different sums, so compare shapes, not heights.",
            )
        )
    return found


# --- the pictures


def _accuracy(runs: Sequence[RunData], colors: dict[str, str], dashes: dict[str, Any]) -> Picture:
    tops = [v for run in runs for name in (FUSED, *run.modalities) for v in accuracy_series(run, name)[1]]
    top = min(1.0, max(tops, default=1.0) * 1.08)

    def panel(run: RunData) -> Panel:
        def draw(figure: FigureBase, ink: str) -> None:
            ax: Axes = figure.subplots()
            for name in run.modalities:
                _line(ax, *accuracy_series(run, name), color=colors[name], linestyle=dashes[name], label=name)
            if len(run.modalities) > 1:
                _line(ax, *accuracy_series(run, FUSED), color=ink, linewidth=2.4, label=FUSED, zorder=4)
            if classes := len(run.start.get("classes") or ()):
                ax.axhline(1 / classes, color=ink, linewidth=0.9, linestyle=(0, (1, 2.5)), label="chance")
            best = (run.summary or {}).get("selected_epoch")
            at = dict(zip(*accuracy_series(run, FUSED), strict=True))
            if best in at:
                ax.plot([best], [at[best]], "o", markersize=8, fillstyle="none", color=ink, markeredgewidth=1.4,
                        label="selected", zorder=5)  # fmt: skip
            _decision_marks(ax, run, colors)
            ax.set_ylim(0, top)
            split = "valid" if series(run, "valid", "accuracy", FUSED)[0] else "train"
            _finish(ax, run.name, f"{split} accuracy", run.num_epochs)

        return Panel(run.name, draw)

    return Picture(
        "accuracy",
        "Accuracy of each modality",
        "Each panel is a run: accuracy of all modalities together (fused) and of each alone after every epoch; "
        "triangles on the axis mark epochs after which that modality got a classifier, the ring the selected epoch.",
        tuple(panel(run) for run in runs),
    )


def _has_stacks(run: RunData) -> bool:
    return any(max(classifier_steps(run, name)[1], default=0) > 1 for name in run.modalities) or any(
        reason(d).ratios for d in run.decisions
    )


def _growth(runs: Sequence[RunData], colors: dict[str, str], dashes: dict[str, Any]) -> Picture:
    top = max((n for run in runs for m in run.modalities for n in classifier_steps(run, m)[1]), default=1)
    ratios = [r for run in runs for d in run.decisions for r in reason(d).ratios.values()]
    lows = [low for run in runs for d in run.decisions if (low := reason(d).low) is not None]
    span = (min([*ratios, *lows], default=0.9), max([*ratios, *lows], default=1.1))

    def steps(run: RunData) -> Panel:
        def draw(figure: FigureBase, ink: str) -> None:
            from matplotlib.ticker import MaxNLocator

            ax: Axes = figure.subplots()
            ends: list[int] = []
            for i, name in enumerate(run.modalities):
                epochs, counts = classifier_steps(run, name)
                if not epochs:
                    continue
                # Steps that coincide stay visible: each modality is drawn a hair above the one before.
                raised = [n + 0.012 * i * top for n in counts]
                ax.step(epochs, raised, where="post", color=colors[name], linestyle=dashes[name], label=name)
                ax.annotate(
                    f"{counts[-1]}",
                    (epochs[-1], counts[-1] + 0.065 * top * ends.count(counts[-1])),  # equal ends above one another
                    xytext=(6, 0),
                    va="center",
                    textcoords="offset points",
                    color=colors[name],
                    fontweight="bold",
                    annotation_clip=False,
                )
                ends.append(counts[-1])
            _decision_marks(ax, run, colors)
            ax.set_ylim(0, top * 1.08 + 0.2)
            _finish(ax, run.name, "classifiers", run.num_epochs)
            ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))

        return Panel(f"{run.name}: classifiers", draw)

    def causes(run: RunData) -> Panel:
        def draw(figure: FigureBase, ink: str) -> None:
            ax: Axes = figure.subplots()
            for name in run.modalities:
                points = [(d["epoch"], r[name]) for d in run.decisions if name in (r := reason(d).ratios)]
                if points:
                    epochs, values = zip(*points, strict=True)
                    style = {"color": colors[name], "linestyle": dashes[name], "label": name}
                    _line(ax, epochs, values, marker="o", markersize=4, **style)
            thresholds = [low for d in run.decisions if (low := reason(d).low) is not None]
            if thresholds:
                ax.axhline(thresholds[-1], color=ink, linewidth=1, linestyle=(0, (1, 1.5)), label="threshold")
            _decision_marks(ax, run, colors)
            _ratio_axis(ax, *span)
            _finish(ax, run.name, "ratio to the others", run.num_epochs)

        return Panel(f"{run.name}: ratios", draw)

    panels = [
        p
        for run in runs
        for p in (steps(run), *([causes(run)] if any(reason(d).ratios for d in run.decisions) else []))
    ]
    return Picture(
        "growth",
        "Classifiers and what earned them",
        "The steps are classifiers per modality; the dots are the ratio of each modality's training score to the "
        "others' at each decision: a modality below the threshold gets one more classifier.",
        tuple(panels),
        across=2,
    )


def _ratio_axis(ax: Axes, low: float, high: float) -> None:
    """Linear for ratios near one another, else logarithmic: 1/4 is as far from balance as 4."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if low <= 0 or high / low <= 3:
        margin = 0.08 * (high - low) or 0.05
        ax.set_ylim(low - 2 * margin, high + margin)
        return
    ax.set_yscale("log")
    ax.set_ylim(low / (high / low) ** 0.16, high * (high / low) ** 0.08)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _labelled(runs: Sequence[RunData]) -> dict[str, list[RunData]]:
    """Runs that differ only in seed and name, by a label that tells them from the others."""
    groups = group_runs(runs)
    labels = group_labels(groups)
    if len({group[0].corpus for group in groups}) > 1:
        labels = [f"{group[0].corpus} {label}" for group, label in zip(groups, labels, strict=True)]
    return dict(zip(labels, groups, strict=True))


def _over_epochs(
    groups: Mapping[str, Sequence[RunData]],
    name: str,
    title: str,
    label: str,
    values: Callable[[RunData], tuple[list[int], list[float]]],
    caption: str,
) -> Picture:
    """All runs in one panel, coloured by group; where a group has several seeds, each thin and their mean thick."""
    groups = {key: having for key, group in groups.items() if (having := [run for run in group if values(run)[0]])}

    def kept(run: RunData) -> tuple[list[int], list[float]]:
        return without_rehearsals(run, *values(run))

    rehearsed = [key for key, group in groups.items() if any(kept(run) != values(run) for run in group)]
    if rehearsed:
        caption += f" Epochs that {', '.join(rehearsed)} rehearses and takes back are left out."
    if any(len(group) > 1 for group in groups.values()):
        caption += " Thin lines are single seeds, thick ones their mean."

    def draw(figure: FigureBase, ink: str) -> None:
        ax: Axes = figure.subplots()
        for i, (group_label, group) in enumerate(groups.items()):
            color, dash = GROUP_COLORS[i % len(GROUP_COLORS)], DASHES[i % len(DASHES)]
            if len(group) > 1:
                for run in group:
                    ax.plot(*kept(run), color=color, linewidth=0.8, alpha=0.5)
            # A run that is still under way has its thin line, but would cut the mean short.
            whole = [run for run in group if run.finished] or group
            if len(group) > 1:
                group_label = f"{group_label} (n = {len(whole)})"
            curves = [dict(zip(*kept(run), strict=True)) for run in whole]
            shared = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = [sum(curve[e] for curve in curves) / len(curves) for e in shared]
            _line(ax, shared, means, color=color, linestyle=dash, linewidth=2.2, label=group_label)
        ax.set_ylim(bottom=0)
        _finish(ax, None, label, max(epochs_kept(run) for group in groups.values() for run in group))

    return Picture(name, title, caption, (Panel(title, draw),))


# --- drawing


def _line(ax: Axes, epochs: Sequence[float], values: Sequence[float], **style: Any) -> None:
    marker = {"marker": "o", "markersize": 3} if len(epochs) <= 12 else {}
    ax.plot(epochs, values, **{"linewidth": 1.8, **marker, **style})


def _decision_marks(ax: Axes, run: RunData, colors: dict[str, str]) -> None:
    from matplotlib.transforms import blended_transform_factory

    place = blended_transform_factory(ax.transData, ax.transAxes)
    for decision in run.decisions:
        for i, name in enumerate(decision.get("add") or ()):
            color = colors.get(name, SVG_INK)
            ax.axvline(decision["epoch"], color=color, linewidth=0.8, alpha=0.35, zorder=1)
            ax.plot([decision["epoch"]], [0.03 + 0.06 * i], marker="^", markersize=6, color=color, zorder=6,
                    markeredgewidth=0, transform=place, clip_on=False)  # fmt: skip


def _finish(
    ax: Axes,
    title: str | None,
    label: str,
    epochs: int,
) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(1 - 0.02 * epochs, epochs + 0.02 * epochs + (epochs == 1))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.set_xlabel("epoch")
    ax.set_ylabel(label)
    handles, labels = ax.get_legend_handles_labels()
    rows = -(-sum(len(text) + 6 for text in labels) // 64)  # as many as fit beside one another
    if rows:
        ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=-(-len(handles) // rows),
                  borderaxespad=0.2, handlelength=1.9, columnspacing=1.2, handletextpad=0.5)  # fmt: skip
    if title is not None:
        ax.set_title(shortened(title, 52), loc="left", pad=6 + 15 * rows)


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


@contextmanager
def _style(ink: str, salt: str) -> Iterator[None]:
    import matplotlib

    settings: Any = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "text.parse_math": False,  # a "$" in a run's name is a dollar
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "grid.color": ink,
        "grid.alpha": 0.22,
        "grid.linewidth": 0.6,
        "text.color": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Names may hold characters that matplotlib's own font lacks; the browser has them.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
        yield


def _drawn(panels: Sequence[Panel], ink: str, across: int = 3) -> Any:
    from matplotlib.figure import Figure

    across = min(len(panels), across)
    down = -(-len(panels) // across)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    if len(panels) == 1:
        panels[0].draw(figure, ink)
        return figure
    cells = figure.subfigures(down, across, squeeze=False)
    for panel, cell in zip(panels, cells.flat, strict=False):
        panel.draw(cell, ink)
    return figure


def svg(panels: Sequence[Panel], name: str, across: int = 3) -> str:
    """Panels side by side as one <svg> element whose ink is the colour of the text around it.

    name: unique on the page, so that ids within the element are too.
    """
    with _style(SVG_INK, name):
        out = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        _drawn(panels, SVG_INK, across).savefig(out, format="svg", metadata=metadata)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(SVG_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # nothing refers to groups, and they repeat on a page
    title = escape(", ".join(panel.title for panel in panels))
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box, "matplotlib wrote an SVG without a viewBox"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box[1]}"'
    return re.sub(r"<svg[^>]*>", lambda _: f'{head} role="img">\n <title>{title}</title>', text, count=1).strip() + "\n"


def standalone_svg(picture: Picture) -> str:
    """The whole picture as an SVG file that follows the reader's light or dark setting."""
    return as_file(svg(picture.panels, picture.name, picture.across))


def as_file(text: str) -> str:
    """An <svg> element as a file of its own."""
    style = "<style>svg{color:#30343b}@media(prefers-color-scheme:dark){svg{color:#c9ced6}}</style>"
    return '<?xml version="1.0" encoding="utf-8"?>\n' + text.replace("</title>", f"</title>\n {style}", 1)


def png(picture: Picture, dpi: int = 160) -> bytes:
    """The whole picture on white."""
    return _on_white(picture, "png", dpi=dpi, metadata={"Software": None})


def pdf(picture: Picture) -> bytes:
    """The whole picture on white, for LaTeX."""
    return _on_white(picture, "pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})


def _on_white(picture: Picture, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    with _style(PNG_INK, picture.name):
        figure = _drawn(picture.panels, PNG_INK, picture.across)
        figure.savefig(out, format=form, facecolor="white", **options)
    return out.getvalue()


def write_pictures(found: Sequence[Picture], folder: str) -> list[str]:
    """Every picture as PNG, SVG and PDF in `folder`; the paths written."""
    paths = []
    for picture in found:
        files = {"png": png(picture), "svg": standalone_svg(picture).encode(), "pdf": pdf(picture)}
        for name, data in files.items():
            paths.append(storage.join(folder, f"{picture.name}.{name}"))
            storage.write_bytes(paths[-1], data)
    return paths
