"""Maps for the page: frames side by side, members as postage stamps, probabilities; as images in text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from pipelines.plots import style
from pipelines.score import Source
from pipelines.tasks import Task

MISSING = "#b9bec5"
VIL_LEVELS = (0, 16, 31, 59, 74, 100, 133, 160, 181, 219, 255)
VIL_COLOURS = (
    "#ffffff",  # Below 16 there is nothing to see: left as blank as the page.
    "#28be28",
    "#199619",
    "#0a690a",
    "#0a4b0a",
    "#f5f500",
    "#edac00",
    "#f06e00",
    "#a00000",
    "#e700ff",
)
RAIN_LEVELS = (0, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 100)
RAIN_COLOURS = (
    "#ffffff",
    "#d3e6f5",
    "#9fcbe8",
    "#5a9fd4",
    "#2b6cb0",
    "#2ca25f",
    "#a6d854",
    "#ffd92f",
    "#f5892a",
    "#d7191c",
)
SST_RANGE = 3.0
"""K either side of no anomaly."""
OUTLINE = "#12b5a6"
LEFT, BELOW, TITLE, GAP = 0.8, 0.95, 0.25, 0.05
"""Inches beside, below and above the panels of a figure, and between them."""
PROBABILITY_LEVELS = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


@dataclass(frozen=True)
class Row:
    """Fields side by side."""

    name: str
    fields: Sequence[np.ndarray]
    """(y, x) each, masked where missing."""
    titles: Sequence[str] = ()
    """Above them; none to have none."""
    outlines: Sequence[np.ndarray] = field(default=())
    """Bool (y, x) each: what is drawn around in the fields."""


@dataclass(frozen=True)
class Palette:
    """Colours of a kind of values."""

    cmap: Colormap
    norm: Normalize
    extra: dict[str, Any]
    """Arguments of the colour bar."""
    label: str


def palette(task: Task) -> Palette:
    """Colours of the task's variable."""
    if task.variable == "sst":
        cmap = mpl.colormaps["RdBu_r"].with_extremes(bad=MISSING)
        return Palette(cmap, Normalize(-SST_RANGE, SST_RANGE), {"extend": "both"}, "SST anomaly (K)")
    vil = task.variable == "vil"
    levels, colours = (VIL_LEVELS, VIL_COLOURS) if vil else (RAIN_LEVELS, RAIN_COLOURS)
    cmap = ListedColormap(list(colours)).with_extremes(bad=MISSING, under=colours[0], over=colours[-1])
    label = "vertically integrated liquid (encoded)" if vil else "rain rate (mm/h)"
    return Palette(cmap, BoundaryNorm(levels, cmap.N), {"ticks": levels, "format": "%g"}, label)


def probabilities() -> Palette:
    """Colours of probabilities: blank below 5 %."""
    colours = mpl.colormaps["magma_r"](np.linspace(0.03, 0.88, len(PROBABILITY_LEVELS) - 2))
    cmap = ListedColormap([(1.0, 1.0, 1.0, 1.0), *map(tuple, colours)]).with_extremes(bad=MISSING)
    extra = {"ticks": PROBABILITY_LEVELS, "format": "%g"}
    return Palette(cmap, BoundaryNorm(PROBABILITY_LEVELS, cmap.N), extra, "probability")


@dataclass(frozen=True)
class View:
    """How a window lies on the page."""

    extent: tuple[float, float, float, float]
    """West, east, south and north edges, in km from the south-western corner or in degrees."""
    origin: Literal["upper", "lower"]
    """Row 0 is the north or the south edge."""

    @classmethod
    def of(cls, y: np.ndarray, x: np.ndarray, metres: bool) -> "View":
        """From the pixels' centres."""
        return cls((*_span(x, metres), *_span(y, metres)), "upper" if y[0] > y[-1] else "lower")


def draw(view: View, rows: Sequence[Row], colours: Palette) -> Figure:
    """The rows on the grid of a window."""
    extent, origin = view.extent, view.origin
    columns = max(len(row.fields) for row in rows)
    width = min(12 / columns, 3.0)
    height = width * (extent[3] - extent[2]) / (extent[1] - extent[0])
    # Laid out by hand, in inches: that panels are equal is known, and Matplotlib's own layout of a hundred of
    # them takes longer than drawing them.
    above = [TITLE if row.titles else 0.0 for row in rows]
    size = (LEFT + columns * (width + GAP), sum(above) + len(rows) * (height + GAP) + BELOW)
    with style():
        figure = Figure(size)

        def place(x: float, y: float, w: float, h: float) -> Axes:
            return figure.add_axes((x / size[0], y / size[1], w / size[0], h / size[1]))

        y = size[1]
        for number, row in enumerate(rows):
            y -= above[number] + height
            under = len(rows[number + 1].fields) if number + 1 < len(rows) else 0
            for c, values in enumerate(row.fields):
                axes = place(LEFT + c * (width + GAP), y, width, height)
                drawn = axes.imshow(
                    values,
                    cmap=colours.cmap,
                    norm=colours.norm,
                    origin=origin,
                    extent=extent,
                    interpolation="nearest",
                    aspect="auto",
                )
                if row.outlines:
                    _outline(axes, row.outlines[c], extent, origin)
                _plain(axes, left=c == 0, below=c >= under)
                if row.titles:
                    axes.set_title(row.titles[c], fontsize=8.5, pad=3)
                if c == 0:
                    axes.set_ylabel(row.name.replace(" (", "\n("), fontsize=9, fontweight="bold")
            y -= GAP
        length = min(7.0, 0.9 * size[0])
        bar = figure.colorbar(
            drawn,
            cax=place((size[0] - length) / 2, 0.45, length, 0.14),
            orientation="horizontal",
            **colours.extra,
        )
        bar.set_label(colours.label, fontsize=8.5)
        bar.ax.tick_params(labelsize=8, length=2)
        bar.outline.set(edgecolor="#9aa4ae", linewidth=0.7)
        return figure


def _outline(axes: Axes, where: np.ndarray, extent: tuple[float, ...], origin: Any) -> None:
    # Nothing and everything have no outline, of which Matplotlib would warn.
    if where.any() and not where.all() and min(where.shape) > 1:
        axes.contour(
            where.astype(float), levels=[0.5], colors=OUTLINE, linewidths=1.1, extent=extent, origin=origin
        )


def view(source: Source, index: int) -> View:
    """How a window of a forecast lies on the page."""
    root, in_metres = source.store.root, metric(source)
    y, x = (root[name].values for name in root[source.name].dims[-2:])
    if not in_metres and "x_origin" in root.coords:
        y, x = y + root["y_origin"].values[index], x + root["x_origin"].values[index]
    return View.of(y, x, in_metres)


def metric(source: Source) -> bool:
    """Whether the grid is in metres."""
    root = source.store.root
    return root[root[source.name].dims[-1]].attrs.get("units") == "m"


def _span(centres: np.ndarray, metric: bool) -> tuple[float, float]:
    """Outer edges of an axis: in km from its lower end where it is in metres, else as it is."""
    low, high = float(centres.min()), float(centres.max())
    half = (high - low) / max(1, len(centres) - 1) / 2
    return (0.0, (high - low + 2 * half) / 1000) if metric else (low - half, high + half)


def _plain(axes: Axes, left: bool, below: bool) -> None:
    """Ticks at the edges of the whole alone."""
    for axis, labelled in ((axes.xaxis, below), (axes.yaxis, left)):
        axis.set_major_locator(MaxNLocator(3, integer=True) if labelled else NullLocator())
    axes.tick_params(labelsize=7.5, length=2, color="#9aa4ae")
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color("#c9d0d6")
        spine.set_linewidth(0.7)
