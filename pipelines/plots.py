"""Plots for the page: scores against lead time, and what probabilities and ensembles are judged by."""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from earthformer.spatial_scores import Spectrum
from pipelines.score import ScoreCard
from pipelines.sheets import crps_unit, error_units, labels

INK, PAPER = "#1c2733", "#ffffff"
SOFT, GRID = "#9aa4ae", "#e4e8ec"
LINES = ("#8a94a0", "#1f6fb2", "#d1495b", "#3a8f5c", "#8e5ea2", "#c98a1b")
"""The first forecast, most often the baseline, is grey."""


def curves(cards: Sequence[ScoreCard]) -> list[tuple[str, str]]:
    """(title, image) of each score against lead time."""
    (mse, factor), _ = error_units(cards[0].task)
    means, members = labels(cards), labels(cards, members=True)
    plots: list[tuple[str, list[str], list[np.ndarray | None]]] = []
    csi = [card.counts[0].per_lead_time()["CSI"].numpy() for card in cards if card.counts]
    if csi:
        plots.append(("CSI-M, mean over thresholds", means, [each.mean(0) for each in csi]))
    nino = [card.nino.per_lead_time() for card in cards if card.nino is not None]
    for name, title in (("C-Nino3.4", "Correlation of Niño3.4"), ("RMSE", "RMSE of Niño3.4 in K")):
        if nino:
            plots.append((title, means, [each[name].numpy() for each in nino]))
    errors = [card.errors.per_lead_time()["MSE"].numpy() * factor for card in cards]
    plots.append((mse, means, [*errors]))
    unit, factor = crps_unit(cards[0].task)
    crps = [card.probabilistic.crps.per_lead_time()["CRPS"].numpy() * factor for card in cards]
    plots.append((f"CRPS {unit}", members, [*crps]))
    spreads = [card.probabilistic.spread for card in cards]
    ratios = [each.per_lead_time()["spread-skill"].numpy() if each else None for each in spreads]
    if any(spreads):
        plots.append(("Spread over error of the mean, best 1", members, ratios))
    unit = " mm/h" if cards[0].task.variable == "rate" else ""
    for i, threshold in enumerate(cards[0].task.thresholds):
        plots.append((f"CSI at ≥ {threshold:g}{unit}", means, [each[i] for each in csi]))
    return [(title, _curve(cards, title, names, lines)) for title, names, lines in plots]


def _curve(cards: Sequence[ScoreCard], title: str, names: list[str], lines: list[np.ndarray | None]) -> str:
    unit = "months" if cards[0].task.archive == "enso" else "min"
    drawn = [(name, line, colour) for name, line, colour in zip(names, lines, _colours(cards), strict=True)]
    with style():
        figure = Figure(figsize=(4.2, 2.7), layout="constrained")
        axes = figure.subplots()
        for name, line, colour in drawn:
            if line is not None:
                # Niño3.4 has two leads fewer: a lead is the mean of three months.
                lead = cards[0].lead_times[: len(line)]
                axes.plot(lead, line, "o-", color=colour, label=name, lw=1.8, ms=3.5)
        lowest = [np.nanmin(line, initial=0.0) for line in lines if line is not None]
        if "best 1" in title:
            axes.axhline(1, color=INK, lw=0.8, ls=":")
        axes.set_xlabel(f"lead time ({unit})")
        axes.set_ylim(bottom=min(0.0, *lowest, 0.0))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", color=GRID, lw=0.8)
        axes.legend(frameon=False, fontsize=8.5, loc="best")
        return image(figure, "svg")


def _colours(cards: Sequence[ScoreCard]) -> list[str]:
    return [LINES[i % len(LINES)] for i in range(len(cards))]


# --------------------------------------------------------------------------------------------- diagrams


@dataclass(frozen=True)
class Diagram:
    """A figure with what it says."""

    title: str
    note: str
    image: str


def diagrams(cards: Sequence[ScoreCard], side: tuple[float, str]) -> list[Diagram]:
    """What probabilities and members are judged by.

    Args:
        cards: of comparable forecasts.
        side: length and unit of the grid's longer side.
    """
    found = []
    if cards[0].task.thresholds:
        found += [_reliability(cards), _roc(cards)]
    if any(card.probabilistic.ranks for card in cards):
        found.append(_ranks(cards))
    return [*found, _spectrum(cards, *side)]


def _panels(cards: Sequence[ScoreCard]) -> tuple[Figure, list[Axes]]:
    """A panel for each threshold, three in a row."""
    thresholds = cards[0].task.thresholds
    columns = min(3, len(thresholds))
    rows = -(-len(thresholds) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.4 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    unit = " mm/h" if cards[0].task.variable == "rate" else ""
    for axes, threshold in zip(panels, thresholds, strict=False):
        axes.set_title(f"≥ {threshold:g}{unit}", fontsize=9.5)
        axes.plot([0, 1], [0, 1], color=SOFT, lw=0.8, ls=":")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.grid(color=GRID, lw=0.8)
    for axes in panels[len(thresholds) :]:
        axes.set_visible(False)
    return figure, panels[: len(thresholds)]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)


def _tenths(bins: np.ndarray) -> np.ndarray:
    """Sums of (thresholds, 101) around 0, 10, …, 100 %: (thresholds, 11)."""
    return np.stack([bins[:, max(0, i - 5) : i + 5].sum(1) for i in range(0, 101, 10)], axis=1)


def _reliability(cards: Sequence[ScoreCard]) -> Diagram:
    with style():
        figure, panels = _panels(cards)
        for card, name, colour in zip(cards, labels(cards, members=True), _colours(cards), strict=True):
            brier = card.probabilistic.brier
            assert brier is not None
            sums = (brier.count, brier.observed, brier.probability)
            count, observed, total = (_tenths(each.sum(1).numpy()) for each in sums)
            some = np.maximum(count, 1)
            for i, axes in enumerate(panels):
                shown = count[i] > 0
                x, y = (total[i] / some[i])[shown], (observed[i] / some[i])[shown]
                axes.plot(x, y, color=colour, label=name, lw=1.6, clip_on=False)
                size = 5 + 110 * np.sqrt(count[i][shown] / max(1, count[i].sum()))
                axes.scatter(x, y, size, color=colour, linewidth=0, alpha=0.75, clip_on=False)
        for axes in panels:
            axes.set(xlabel="forecast probability", ylabel="observed frequency")
        _legend(figure, panels[0])
        drawn = image(figure, "svg")
    note = (
        "How often the event happened where it was forecast with so much probability, in tenths: on the "
        "diagonal, probabilities are what they say. The larger a dot, the more forecasts it is of."
    )
    return Diagram("Reliability", note, drawn)


def _roc(cards: Sequence[ScoreCard]) -> Diagram:
    names = labels(cards, members=True)
    with style():
        figure, panels = _panels(cards)
        for card, name, colour in zip(cards, names, _colours(cards), strict=True):
            brier = card.probabilistic.brier
            assert brier is not None
            false_alarms, hits = brier.roc()
            for axes, x, y in zip(panels, false_alarms.numpy(), hits.numpy(), strict=True):
                # The members' own probabilities are what can be warned of: the other bins add no point.
                new = np.r_[True, (np.diff(x) != 0) | (np.diff(y) != 0)]
                axes.plot(x[new], y[new], ".-", color=colour, label=name, lw=1.6, ms=4)
        for axes in panels:
            axes.set(xlabel="false alarm rate", ylabel="hit rate")
        _legend(figure, panels[0])
        drawn = image(figure, "svg")
    note = "Hits against false alarms of warning from each probability on; the area under it is in the table."
    return Diagram("Relative operating characteristic", note, drawn)


def _ranks(cards: Sequence[ScoreCard]) -> Diagram:
    shown = [
        (card.probabilistic.ranks, name, colour)
        for card, name, colour in zip(cards, labels(cards, members=True), _colours(cards), strict=True)
    ]
    ensembles = [(ranks, name, colour) for ranks, name, colour in shown if ranks is not None]
    with style():
        columns = min(3, len(ensembles))
        rows = -(-len(ensembles) // columns)
        figure = Figure(figsize=(3.6 * columns, 2.5 * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (ranks, name, colour) in zip(panels, ensembles, strict=False):
            count = ranks.count.sum(0).double().numpy()
            relative = count / max(1.0, count.sum()) * len(count)
            axes.bar(np.arange(len(count)), relative, width=1.0, color=colour, linewidth=0)
            axes.axhline(1, color=INK, lw=0.8, ls=":")
            tied = int(ranks.tied.sum())
            share = tied / max(1.0, tied + count.sum())
            axes.set_title(f"{name}\n{share:.0%} of pixels tied, left out", fontsize=8.5)
            axes.set(xlabel="members below the truth", ylabel="frequency, 1 expected")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for axes in panels[len(ensembles) :]:
            axes.set_visible(False)
        drawn = image(figure, "svg")
    note = (
        "Flat where truth and members are of one distribution; high ends: too little spread; slope: a bias. "
        "Ties are broken at random; where truth and all members are equal there is nothing to rank."
    )
    return Diagram("Rank histogram", note, drawn)


def _spectrum(cards: Sequence[ScoreCard], side: float, unit: str) -> Diagram:
    def draw(axes: Axes, spectrum: Spectrum, last: int, **how: Any) -> None:
        power = spectrum.per_lead_time()["power"][last].numpy()[1:]
        if np.isfinite(power).any() and (power > 0).any():
            axes.plot(side / np.arange(1, len(power) + 1), power, lw=1.6, **how)

    names, colours = labels(cards), _colours(cards)
    leads = sorted({0, len(cards[0].lead_times) - 1})
    when = "months" if cards[0].task.archive == "enso" else "min"
    with style():
        figure = Figure(figsize=(5.2 * len(leads), 3.9), layout="constrained")
        for axes, lead in zip(figure.subplots(1, len(leads), squeeze=False)[0], leads, strict=True):
            draw(axes, cards[0].probabilistic.truth_spectrum, lead, color=INK, label="truth")
            for card, mean, each, colour in zip(
                cards, names, labels(cards, members=True), colours, strict=True
            ):
                found = card.probabilistic
                single = found.member_spectrum is None
                how = {"color": colour, "ls": "-" if single else "--", "label": mean}
                draw(axes, found.mean_spectrum, lead, **how)
                if found.member_spectrum is not None:
                    draw(axes, found.member_spectrum, lead, color=colour, label=each)
            axes.set(xscale="log", yscale="log", xlabel=f"wavelength ({unit})", ylabel="power")
            axes.set_title(f"{cards[0].lead_times[lead]:g} {when}", fontsize=9.5)
            axes.invert_xaxis()
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(color=GRID, lw=0.8)
        _legend(figure, axes)
        drawn = image(figure, "svg")
    note = (
        "Radially averaged power spectrum, mean over frames without a missing pixel. Below the truth on the "
        "right: too smooth, as means are (dashed)."
    )
    return Diagram("Power spectrum", note, drawn)


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for the page."""
    with mpl.rc_context(
        {
            "font.family": "sans-serif",
            "font.size": 9,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": "#9aa4ae",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": INK,
            "ytick.color": INK,
            "figure.facecolor": PAPER,
            "svg.hashsalt": "earthformer",
        }
    ):
        yield


def rendered(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """A figure as an image."""
    buffer = io.BytesIO()
    with style():
        if kind == "svg":
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        else:
            figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def image(figure: Figure, kind: Literal["png", "svg"]) -> str:
    """A figure as the address of an image that holds itself."""
    name = "svg+xml" if kind == "svg" else kind
    return f"data:image/{name};base64,{base64.b64encode(rendered(figure, kind)).decode()}"
