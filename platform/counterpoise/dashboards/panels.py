"""How panels look, said once: queries, panels by kind, variables, and rows on Grafana's grid of 24 columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from counterpoise.dashboards.sdk import (
    JSONEncoder,
    bargauge,
    common,
    common_models,
    dashboard,
    models,
    prometheus,
    prometheus_models,
    stat,
    table,
    timeseries,
)

COLUMNS = 24
DATASOURCE = common_models.DataSourceRef(type_val="prometheus", uid="${datasource}")
RUNS = 'corpus=~"$corpus",method=~"$method",run=~"$run"'  # what the variables choose
GREEN, YELLOW, RED, BLUE = "green", "yellow", "red", "blue"
ALL = "$__all"

Panel = Any  # a panel builder of the SDK: they share their methods, not a base class
Steps = Sequence[tuple[float, str]]


def query(expr: str, legend: str = "", *, instant: bool = False) -> prometheus.Dataquery:
    """instant: only the newest value of each series."""
    made = prometheus.Dataquery().expr(expr).datasource(DATASOURCE)
    if legend:
        made = made.legend_format(legend)
    return made.instant() if instant else made.range()


def thresholds(first: str, steps: Steps) -> dashboard.ThresholdsConfig:
    """Colour `first` below the first step, then each step's from its value on."""
    found = [models.Threshold(value=None, color=first), *(models.Threshold(value=v, color=c) for v, c in steps)]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(found)


def _dress(
    panel: Panel, title: str, description: str, queries: Sequence[prometheus.Dataquery], unit: str, none: str
) -> Panel:
    """unit: as Grafana names it, or "" where it differs by column. none: shown where there is no series."""
    panel = panel.title(title).description(description).datasource(DATASOURCE)
    for number, one in enumerate(queries):
        panel = panel.with_target(one.ref_id(chr(ord("A") + number)))
    if none:
        panel = panel.no_value(none)
    return panel.unit(unit) if unit else panel


def line(
    title: str,
    description: str,
    *queries: prometheus.Dataquery,
    unit: str = "short",
    low: float | None = None,
    high: float | None = None,
    marks: Steps = (),
    log: bool = False,
    steps: bool = False,
    first: str = GREEN,
    none: str = "",
) -> Panel:
    """Series over time. low, high: ends of the axis. marks: dashed lines, (value, colour). log: an axis on which a
    half is as far from 1 as a double."""
    panel = _dress(timeseries.Panel(), title, description, queries, unit, none)
    panel = panel.line_width(2).fill_opacity(0).show_points(common_models.VisibilityMode.AUTO)
    panel = panel.legend(
        common.VizLegendOptions()
        .display_mode(common_models.LegendDisplayMode.LIST)
        .placement(common_models.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull"])
    )
    panel = panel.tooltip(
        common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI).sort(common_models.SortOrder.DESCENDING)
    )
    if low is not None:
        panel = panel.min(low)
    if high is not None:
        panel = panel.max(high)
    if marks:
        style = common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.DASHED)
        panel = panel.thresholds(thresholds(first, marks)).thresholds_style(style)
    if log:
        panel = panel.scale_distribution(
            common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(2)
        )
    if steps:
        panel = panel.line_interpolation(common_models.LineInterpolation.STEP_AFTER)
    return panel


def number(
    title: str,
    description: str,
    *queries: prometheus.Dataquery,
    unit: str = "short",
    first: str = GREEN,
    steps: Steps = (),
    decimals: int | None = None,
    none: str = "-",
    name: bool = False,
) -> Panel:
    """The newest value of each series, in the colour of its threshold."""
    panel = _dress(stat.Panel(), title, description, queries, unit, none).thresholds(thresholds(first, steps))
    panel = panel.color_mode(common_models.BigValueColorMode.VALUE).graph_mode(common_models.BigValueGraphMode.NONE)
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    panel = panel.text(common.VizTextDisplayOptions().title_size(14).value_size(32))
    mode = common_models.BigValueTextMode.VALUE_AND_NAME if name else common_models.BigValueTextMode.VALUE
    panel = panel.text_mode(mode)
    return panel if decimals is None else panel.decimals(decimals)


def bars(
    title: str,
    description: str,
    *queries: prometheus.Dataquery,
    unit: str = "short",
    low: float | None = 0,
    high: float | None = None,
    first: str = BLUE,
    steps: Steps = (),
    decimals: int | None = None,
    none: str = "",
) -> Panel:
    """The newest value of each series as a bar."""
    panel = _dress(bargauge.Panel(), title, description, queries, unit, none).thresholds(thresholds(first, steps))
    panel = panel.orientation(common_models.VizOrientation.HORIZONTAL)
    panel = panel.display_mode(common_models.BarGaugeDisplayMode.BASIC)
    panel = panel.name_placement(common_models.BarGaugeNamePlacement.TOP)
    panel = panel.text(common.VizTextDisplayOptions().title_size(12).value_size(14))
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    if decimals is not None:
        panel = panel.decimals(decimals)
    if low is not None:
        panel = panel.min(low)
    return panel if high is None else panel.max(high)


@dataclass(frozen=True)
class Column:
    """A column of a table: the label or value it shows, its heading, how it is drawn."""

    field: str
    heading: str
    unit: str = ""
    decimals: int | None = None
    width: int | None = None
    first: str = ""
    steps: Steps = ()
    link: str = ""  # URL that a click opens
    link_title: str = ""


def rows(
    title: str,
    description: str,
    columns: Sequence[Column],
    *queries: prometheus.Dataquery,
    sort: str = "",
    none: str = "",
) -> Panel:
    """A table of instant queries, merged by the labels they share; only `columns` are shown, in that order.

    sort: heading to sort by, largest first. Values of query A, B, ... are the fields "Value #A", "Value #B", ...,
    and "Value" where there is one query.
    """
    instant = [one.instant().format(prometheus_models.PromQueryFormat.TABLE) for one in queries]
    panel = _dress(table.Panel(), title, description, instant, "", none).show_header(True)
    shown = [column.field for column in columns]
    panel = panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    panel = panel.with_transformation(
        models.DataTransformerConfig(
            id_val="filterFieldsByName", options={"include": {"names": shown, "pattern": "", "variable": ""}}
        )
    )
    organised = {
        "excludeByName": {},
        "indexByName": {name: i for i, name in enumerate(shown)},
        "renameByName": {column.field: column.heading for column in columns},
        "includeByName": {},
    }
    panel = panel.with_transformation(models.DataTransformerConfig(id_val="organize", options=organised))
    for column in columns:
        if properties := _properties(column):
            panel = panel.override_by_name(column.heading, properties)
    if sort:
        panel = panel.sort_by([common.TableSortByFieldState().display_name(sort).desc(True)])
    return panel


def _properties(column: Column) -> list[models.DynamicConfigValue]:
    found: list[tuple[str, Any]] = []
    if column.unit:
        found.append(("unit", column.unit))
    if column.decimals is not None:
        found.append(("decimals", column.decimals))
    if column.width is not None:
        found.append(("custom.width", column.width))
    if column.steps:
        colours = [{"value": None, "color": column.first}, *({"value": v, "color": c} for v, c in column.steps)]
        found.append(("thresholds", {"mode": "absolute", "steps": colours}))
        found.append(("color", {"mode": "thresholds"}))
        found.append(("custom.cellOptions", {"type": "color-text"}))
    if column.link:
        found.append(("links", [{"title": column.link_title, "url": column.link}]))
    return [models.DynamicConfigValue(id_val=key, value=value) for key, value in found]


# --- variables


def datasource_variable() -> dashboard.DatasourceVariable:
    return dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")


def label_variable(name: str, label: str, metric: str, text: str, description: str) -> dashboard.QueryVariable:
    """Values of a label, many at a time, at first all. metric: a selector, which may name earlier variables."""
    found = f"label_values({metric}, {label})"
    return (
        dashboard.QueryVariable(name)
        .label(text)
        .description(description)
        .datasource(DATASOURCE)
        .query({"query": found, "refId": f"variable-{name}"})
        .definition(found)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text=["All"], value=[ALL]))
    )


def split_variable() -> dashboard.CustomVariable:
    return (
        dashboard.CustomVariable("split")
        .label("Measured on")
        .description("The split that accuracies are of. Choose train for a corpus without a valid split.")
        .values("valid,train")
        .current(models.VariableOption(selected=True, text="valid", value="valid"))
        .options(
            [
                models.VariableOption(selected=True, text="valid", value="valid"),
                models.VariableOption(selected=False, text="train", value="train"),
            ]
        )
    )


# --- the grid


@dataclass
class Row:
    """A heading and lines of panels below it. Each line is [(panel, columns), ...], 24 columns together, and a height
    in Grafana's units of 38 pixels. closed: its panels appear at a click."""

    title: str
    lines: list[tuple[int, list[tuple[Panel, int]]]]
    closed: bool = False


def place(board: dashboard.Dashboard, parts: Sequence[Row]) -> dashboard.Dashboard:
    """Put rows below one another. Panels get ids 1, 2, ... in reading order, so that links to them stay valid."""
    y = number = 0
    for part in parts:
        number += 1
        row = dashboard.Row(part.title).id(number).collapsed(part.closed)
        row_y = y
        row = row.grid_pos(models.GridPos(x=0, y=row_y, w=COLUMNS, h=1))
        y += 1
        inside = []
        for height, line in part.lines:
            assert sum(width for _, width in line) == COLUMNS, f"{part.title}: a line is not {COLUMNS} columns wide"
            x = 0
            for panel, width in line:
                number += 1
                inside.append(panel.id(number).grid_pos(models.GridPos(x=x, y=y, w=width, h=height)))
                x += width
            y += height
        if part.closed:
            y = row_y + 1  # the next row follows the heading
            for panel in inside:
                row = row.with_panel(panel)
            board = board.with_row(row)
        else:
            board = board.with_row(row)
            for panel in inside:
                board = board.with_panel(panel)
    return board


def to_json(board: dashboard.Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    content: dict[str, Any] = json.loads(JSONEncoder(sort_keys=True).encode(board.build()))
    for shown in (*content.get("links", []), *content.get("annotations", {}).get("list", [])):
        shown.pop("placement", None)  # the SDK knows only "in the menu", where nobody would see them
    return content
