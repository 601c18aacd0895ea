"""Score cards side by side, as tables of text for the terminal and the page."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from earthformer.scores import PROTOCOLS, Protocol
from pipelines.score import ScoreCard, check_comparable
from pipelines.tasks import Task

_HOW = {
    "pooled": "Counts of all lead times are added, then the ratios are taken",
    "frame-averaged": "Ratios are taken for each lead time, then their mean",
}


@dataclass(frozen=True)
class Sheet:
    """A table of text: the same on the terminal and on the page."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the best score, where forecasts are compared."""
    text_columns: int = 1
    """The first so many columns are words, the others numbers."""


def labels(cards: Sequence[ScoreCard], *, members: bool = False) -> list[str]:
    """Names that tell the forecasts apart: with the forecast's hash where two are of a name.

    Args:
        cards: of the forecasts.
        members: name ensembles by their members, not by their mean.
    """
    names = [card.member_label if members else card.label for card in cards]
    many = Counter(names)
    return [n if many[n] == 1 else f"{n} {c.forecast_hash[:6]}" for n, c in zip(names, cards, strict=True)]


def sheets(cards: Sequence[ScoreCard]) -> list[Sheet]:
    """A sheet for each protocol, the errors, and the probabilistic scores, the forecasts side by side.

    Raises:
        InputError: the forecasts are of different tasks, archives or windows.
        ValueError: their scores are of different thresholds, pools or scales.
    """
    check_comparable(cards)
    for one, other in itertools.pairwise(cards):
        one.errors.check_same(other.errors)
        for mine, theirs in zip(one.counts, other.counts, strict=True):
            mine.check_same(theirs)
    found = [_protocol_sheet(cards, protocol) for protocol in PROTOCOLS if cards[0].counts]
    if cards[0].nino is not None:
        found.append(_nino_sheet(cards))
    found += [_errors_sheet(cards), _probabilistic_sheet(cards)]
    if cards[0].counts:
        found.append(_events_sheet(cards))
        if any(card.probabilistic.member_counts for card in cards):
            found += [_protocol_sheet(cards, protocol, each=True) for protocol in PROTOCOLS]
    return found


def tables(cards: Sequence[ScoreCard]) -> list[Table]:
    """The sheets for the terminal."""
    found = []
    for sheet in sheets(cards):
        table = Table(
            title=sheet.title,
            caption=f"{sheet.note}\n",
            title_justify="left",
            title_style="bold",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
        )
        for i, name in enumerate(sheet.columns):
            table.add_column(
                name, justify="left" if i < sheet.text_columns else "right", no_wrap=name != "forecast"
            )
        for i, row in enumerate(sheet.rows):
            cells = [Text(c, style="bold" if (i, j) in sheet.best else "") for j, c in enumerate(row)]
            # A score's forecasts stand together: only its first row names it.
            named = i + 1 < len(sheet.rows) and sheet.rows[i + 1][0] != ""
            table.add_row(*cells, end_section=sheet.text_columns > 1 and named)
        found.append(table)
    return found


def _title(card: ScoreCard) -> str:
    return f"{card.task.name}, {card.split}, {card.windows} windows"


def _protocol_sheet(cards: Sequence[ScoreCard], protocol: Protocol, each: bool = False) -> Sheet:
    """`each`: every member is a forecast by itself, rather than their mean."""
    all_counts = [(each and card.probabilistic.member_counts) or card.counts for card in cards]
    thresholds = cards[0].task.thresholds
    rows: list[tuple[str, ...]] = []
    best: set[tuple[int, int]] = set()
    undefined = False
    kinds = [("CSI", i) for i in range(len(cards[0].counts))] + [("POD", 0), ("SUCR", 0), ("bias", 0)]
    for score_name, i in kinds:
        pool = cards[0].counts[i].pool
        title = score_name + (f" {pool}×{pool}" if pool > 1 else "")
        block = []
        for of_card in all_counts:
            counts = of_card[i].under(protocol)
            values, defined = counts.per_threshold()[score_name], counts.defined()[score_name]
            undefined |= not bool(defined.all())
            # In the published means CSI, POD and SUCR of what never occurs are 0; a bias has no such value.
            mean = float(values.mean()) if score_name != "bias" or bool(defined.all()) else math.nan
            block.append(
                [mean, *(v if d else math.nan for v, d in zip(values.tolist(), defined, strict=True))]
            )
        if score_name == "CSI":
            best |= {(len(rows) + r, c + 2) for c, r in _highest(block)}
        digits = 2 if score_name == "bias" else 4
        for n, (label, row) in enumerate(zip(labels(cards, members=each), block, strict=True)):
            rows.append((title if n == 0 else "", label, *(_number(v, digits) for v in row)))
    return Sheet(
        title=f"{_title(cards[0])}: protocol “{protocol}”" + (", each member by itself" if each else ""),
        note=(
            f"{_HOW[protocol]}. The mean is over thresholds (CSI: CSI-M). 4×4 and 16×16: maxima of so many "
            f"pixels. Bias: forecast over observed events, best 1."
            + (" –: no such events, 0 in a mean." if undefined else "")
        ),
        columns=("score", "forecast", "mean", *(f"≥{t:g}" for t in thresholds)),
        rows=tuple(rows),
        best=frozenset(best),
        text_columns=2,
    )


def _nino_sheet(cards: Sequence[ScoreCard]) -> Sheet:
    names = ("C-Nino3.4-M", "C-Nino3.4-WM", "RMSE")
    block = [[card.nino.result()[name] for name in names] for card in cards if card.nino is not None]
    best = {(r, c + 1) for c, r in _highest([[m, wm, -rmse] for m, wm, rmse in block])}
    return Sheet(
        title=f"{_title(cards[0])}: Niño3.4 index",
        note="Correlation with the labels, mean and weighted mean over lead months; RMSE in K.",
        columns=("forecast", "C-Nino3.4-M", "C-Nino3.4-WM", "RMSE (K)"),
        rows=tuple(
            (label, *(_number(v, 4) for v in values))
            for label, values in zip(labels(cards), block, strict=True)
        ),
        best=frozenset(best),
    )


def error_units(task: Task) -> tuple[tuple[str, float], tuple[str, float]]:
    """What MSE and MAE are called in tables, and the factor to the unit that they are shown in."""
    if task.error_scale == 1.0:
        unit = task.units.replace("mm h-1", "mm/h")
        return (f"MSE ({unit})²", 1.0), (f"MAE ({unit})", 1.0)
    scale = "normalised SST" if task.archive == "enso" else "0–1 scale"
    return (f"MSE ×10⁻³ ({scale})", 1e3), (f"MAE ×10⁻³ ({scale})", 1e3)


def _errors_sheet(cards: Sequence[ScoreCard]) -> Sheet:
    (mse, mse_factor), (mae, mae_factor) = error_units(cards[0].task)
    block = [
        [results["MSE"] * mse_factor, results["MAE"] * mae_factor]
        for results in (card.errors.result() for card in cards)
    ]
    pixels = {int(card.errors.count.sum()) for card in cards}
    return Sheet(
        title=f"{_title(cards[0])}: errors",
        note="Means over all pixels and lead times where truth and forecast are present"
        + ("." if len(pixels) == 1 else ", which are not the same for all forecasts."),
        columns=("forecast", mse, mae, "pixels"),
        rows=tuple(
            (label, *(_number(v, 4) for v in values), f"{int(card.errors.count.sum()):,}")
            for label, values, card in zip(labels(cards), block, cards, strict=True)
        ),
        best=frozenset((r, c + 1) for c, r in _highest([[-v for v in values] for values in block])),
    )


def crps_unit(task: Task) -> tuple[str, float]:
    """Unit in which CRPS is shown, and the factor to it: those of the MAE, which it is for one member."""
    (_, (mae, factor)) = error_units(task)
    return mae.removeprefix("MAE "), factor


def _probabilistic_sheet(cards: Sequence[ScoreCard]) -> Sheet:
    unit, factor = crps_unit(cards[0].task)
    columns = [f"CRPS {unit}", "fair CRPS", "spread", "spread/error", "outside"]
    block, signs = [], [-1.0, -1.0, 0.0, 0.0, 0.0]
    for card in cards:
        found = card.probabilistic
        crps = found.crps.result()
        spread = found.spread.result() if found.spread is not None else {}
        row = [crps["CRPS"] * factor, crps.get("fair CRPS", math.nan) * factor]
        row += [spread.get("spread", math.nan) * factor, spread.get("spread-skill", math.nan)]
        row.append(found.ranks.result()["outside"] if found.ranks is not None else math.nan)
        if found.nino_crps is not None:
            row.append(found.nino_crps.result()["CRPS"])
        block.append(row)
    if cards[0].probabilistic.nino_crps is not None:
        columns, signs = [*columns, "Niño3.4 CRPS (K)"], [*signs, -1.0]
    failed = [
        f"{card.probabilistic.failed:,} members of {name} hold no value: failed, or not drawn."
        for card, name in zip(cards, labels(cards, members=True), strict=True)
        if card.probabilistic.failed
    ]
    note = (
        "CRPS of a single forecast is its MAE; fair CRPS is what members without number would have. Spread "
        "and error of the mean are root mean squares, best when equal. Outside: truth beyond all members, in "
        "multiples of what is expected, best 1."
    )
    return Sheet(
        title=f"{_title(cards[0])}: probabilistic",
        note=" ".join([note, *failed]),
        columns=("forecast", *columns),
        rows=_rows(labels(cards, members=True), block, 4),
        best=frozenset((r, c + 1) for c, r in _highest([_signed(row, signs) for row in block])),
    )


def _signed(row: list[float], signs: list[float]) -> list[float]:
    """The higher the better; NaN where neither is."""
    return [sign * value if sign else math.nan for sign, value in zip(signs, row, strict=True)]


def _rows(names: Sequence[str], block: list[list[float]], digits: int) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (name, *(_number(value, digits) for value in row)) for name, row in zip(names, block, strict=True)
    )


def _event_scores(card: ScoreCard) -> dict[str, tuple[list[float], float, int]]:
    """By name: values at the thresholds, +1 or -1 where higher or lower is better, and digits shown."""
    found = card.probabilistic
    assert found.brier is not None
    assert found.fss is not None
    brier = found.brier.per_threshold()
    parts = {
        "Brier ×10⁻³": ((brier["Brier"] * 1e3).tolist(), -1.0, 2),
        "reliability": ((brier["reliability"] * 1e3).tolist(), -1.0, 2),
        "resolution": ((brier["resolution"] * 1e3).tolist(), 1.0, 2),
        "ROC area": (brier["ROC"].tolist(), 1.0, 4),
    }
    likely = found.brier.contingency()
    csi, defined = likely.per_threshold()["CSI"].tolist(), likely.defined()["CSI"].tolist()
    parts["CSI p≥50%"] = ([v if d else math.nan for v, d in zip(csi, defined, strict=True)], 1.0, 4)
    for name, state in (("FSS", found.fss), ("each FSS", found.member_fss or found.fss)):
        for scale, values in zip(state.scales, state.per_threshold()["FSS"].tolist(), strict=True):
            parts[f"{name} {scale}"] = (values, 1.0, 4)
    return parts


def _events_sheet(cards: Sequence[ScoreCard]) -> Sheet:
    names = labels(cards, members=True)
    parts = [_event_scores(card) for card in cards]
    # Without ensembles each member is the mean.
    ensembles = any(card.probabilistic.member_fss is not None for card in cards)
    rows: list[tuple[str, ...]] = []
    best: set[tuple[int, int]] = set()
    for title, (_, sign, digits) in parts[0].items():
        if title.startswith("each") and not ensembles:
            continue
        block = [part[title][0] for part in parts]
        best |= {(len(rows) + r, c + 2) for c, r in _highest([_signed(v, [sign] * len(v)) for v in block])}
        for n, row in enumerate(_rows(names, block, digits)):
            rows.append((title if n == 0 else "", *row))
    return Sheet(
        title=f"{_title(cards[0])}: probabilistic, events",
        note=(
            "A probability is the fraction of members at or above the threshold. Brier is reliability − "
            "resolution + uncertainty, which is the same for all forecasts of the same pixels. FSS: "
            "fractions of events in squares of so many pixels, of the mean"
            + (", then of each member by itself." if ensembles else ".")
        ),
        columns=("score", "forecast", *(f"≥{t:g}" for t in cards[0].task.thresholds)),
        rows=tuple(rows),
        best=frozenset(best),
        text_columns=2,
    )


def _highest(block: list[list[float]]) -> list[tuple[int, int]]:
    """(column, row) of the one highest value of each column; none where there is nothing to compare."""
    found = []
    for column, values in enumerate(zip(*block, strict=True)):
        finite = [v for v in values if math.isfinite(v)]
        if len(finite) > 1 and finite.count(max(finite)) == 1:
            found.append((column, values.index(max(finite))))
    return found


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"
