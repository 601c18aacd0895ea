"""SEVIR's catalogue: a row for each event and modality, read, repaired, and selected from."""

import warnings
from collections.abc import Sequence
from functools import reduce

import pandas as pd
import pyproj

from pipelines.archives import why
from pipelines.errors import InputError
from pipelines.storage import filesystem, join

PROJ = "+proj=laea +lat_0=38 +lon_0=-98 +units=m +a=6370997.0 +ellps=sphere"
NEEDED = ("id", "file_name", "file_index", "img_type", "time_utc", "pct_missing")
TEXTS = ("file_name", "event_type")
NUMBERS = (
    *("file_index", "episode_id", "event_id", "llcrnrlat", "llcrnrlon", "urcrnrlat", "urcrnrlon"),
    *("size_x", "size_y", "height_m", "width_m", "data_min", "data_max", "pct_missing"),
)
REPEATED = ("file_name", "event_type", "img_type", "minute_offsets", "proj")
"""The published columns are NEEDED, TEXTS, NUMBERS and REPEATED; spreadsheets add others."""
MONTH_FIRST = (
    *("%m/%d/%y %H:%M", "%m/%d/%Y %H:%M", "%m/%d/%y %H:%M:%S", "%m/%d/%Y %H:%M:%S"),
    "%Y-%m-%d %H:%M",
)
DAY_FIRST = ("%d/%m/%y %H:%M", "%d/%m/%Y %H:%M", "%d/%m/%y %H:%M:%S", "%d/%m/%Y %H:%M:%S")


def read_catalog(source: str) -> pd.DataFrame:
    """The catalogue, with times and numbers parsed and the damage of spreadsheets repaired.

    A cell that cannot be read is NaN (NaT), and `select` leaves its row out. Warnings tell of it, and of what
    is repaired.

    Args:
        source: folder that holds `CATALOG.csv`, or the URL of a catalogue of another name (`.csv`).

    Raises:
        InputError: no catalogue, one without a column that is needed, or one with days before months.
    """
    url = source if source.endswith(".csv") else join(source, "CATALOG.csv")
    raw = _read_text(url)
    absent = [name for name in NEEDED if name not in raw.columns]
    if absent:
        raise InputError(f"{url} has no column {absent[0]}: needed {', '.join(NEEDED)}")
    table = raw.copy(deep=False)
    table["time_utc"] = _times(raw["time_utc"], url)
    table["proj"] = _projections(raw["proj"] if "proj" in raw else pd.Series(PROJ, raw.index), url)
    for name in set(NUMBERS) & set(raw.columns):
        table[name] = pd.to_numeric(raw[name], errors="coerce").astype(float)
    table["file_index"] = table["file_index"].where(table["file_index"] % 1 == 0)
    damaged = table[list(NEEDED)].isna().to_numpy()
    if damaged.any():
        row = int(damaged.any(axis=1).argmax())
        column = NEEDED[int(damaged[row].argmax())]
        cell = raw[column].iloc[row]
        said = repr(cell) if isinstance(cell, str) else cell
        warnings.warn(
            f"{url}: {damaged.any(axis=1).sum()} rows have a cell that cannot be read and are left out, "
            f"the first (id {raw['id'].iloc[row]}) for {column} {said}",
            stacklevel=2,
        )
    return table


def _read_text(url: str) -> pd.DataFrame:
    """The published columns: numbers where all cells are, else text, which is held once where it repeats."""
    texts = dict.fromkeys({*NEEDED, *TEXTS} - {*NUMBERS}, "str") | dict.fromkeys(REPEATED, "category")
    fs, path = filesystem(url)
    try:
        with fs.open(path, "rb") as file:
            return pd.read_csv(file, dtype=texts, usecols=lambda name: name in texts or name in NUMBERS)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{url} is not a CSV table: {why(error)}") from error
    except OSError as error:
        found = "is absent" if isinstance(error, FileNotFoundError) else f"cannot be read ({why(error)})"
        raise InputError(f"{url} {found}: needed the SEVIR folder, of CATALOG.csv and data/") from error


def _times(texts: pd.Series, url: str) -> pd.Series:
    times = _parsed(texts, ["%Y-%m-%d %H:%M:%S"])
    odd = texts[times.isna() & texts.notna()]
    repaired, day_first = _parsed(odd, MONTH_FIRST), _parsed(odd, DAY_FIRST)
    if (repaired.isna() & day_first.notna()).any():
        raise InputError(
            f"{url} has time_utc {odd[repaired.isna() & day_first.notna()].iloc[0]!r}, the day before the "
            "month: needed YYYY-MM-DD HH:MM:SS (a spreadsheet's m/d/yy H:MM is read as well)"
        )
    if repaired.notna().any():
        warnings.warn(
            f"{url} went through a spreadsheet: times like {odd.iloc[0]!r} are read as m/d/yy H:MM",
            stacklevel=3,
        )
    return times.fillna(repaired)


def _parsed(texts: pd.Series, formats: Sequence[str]) -> pd.Series:
    tries = (pd.to_datetime(texts, format=one, errors="coerce") for one in formats)
    return reduce(pd.Series.fillna, (found.astype("datetime64[ns]") for found in tries))


def _projections(texts: pd.Series, url: str) -> pd.Series:
    counts = texts.value_counts(dropna=False)
    good = [str(text) for text in counts.index if _is_projection(str(text))]
    broken = counts.drop(good)
    if broken.sum():
        warnings.warn(
            f"{url} has proj {broken.index[0]!r} in {broken.sum()} rows: SEVIR's own is taken", stacklevel=3
        )
    if len(good) > 1:
        warnings.warn(f"{url} has proj {good[0]!r} and {good[1]!r}: the first is taken for all", stacklevel=3)
    return pd.Series(good[0] if good else PROJ, index=texts.index, dtype="category")


def _is_projection(text: str) -> bool:
    try:
        return pyproj.CRS.from_proj4(text).is_projected
    except pyproj.exceptions.CRSError:
        return False


def select(
    catalog: pd.DataFrame,
    modalities: Sequence[str] = ("vil",),
    start: str | None = None,
    end: str | None = None,
) -> pd.DataFrame:
    """Rows of the events that are kept, sorted by id: one row of every modality for each event.

    In the published order: time later than `start` and not later than `end`, nothing missing, the image
    types asked for, and every id with more (or fewer) than one row of each dropped.
    """
    rows = catalog
    if start is not None:
        rows = rows[rows["time_utc"] > pd.Timestamp(start)]
    if end is not None:
        rows = rows[rows["time_utc"] <= pd.Timestamp(end)]
    return rows[_verdicts(rows, modalities) == ""].sort_values(["id", "img_type"], kind="stable")


def left_out(catalog: pd.DataFrame, modalities: Sequence[str] = ("vil",)) -> dict[str, int]:
    """Rows of the modalities that `select` leaves out of a whole catalogue, by reason."""
    verdicts = _verdicts(catalog[catalog["img_type"].isin(modalities)], modalities)
    return {str(reason): int(n) for reason, n in verdicts[verdicts != ""].value_counts().items()}


def _verdicts(rows: pd.DataFrame, modalities: Sequence[str]) -> pd.Series:
    """Why each row is left out; empty where it is kept."""
    verdicts = pd.Series("", index=rows.index, dtype=object)

    def leave_out(chosen: pd.Series, reason: str) -> None:
        verdicts[chosen & (verdicts == "")] = reason

    leave_out(~rows["img_type"].isin(modalities), "of other image types")
    leave_out(rows[list(NEEDED)].isna().any(axis=1), "with unreadable cells")
    leave_out(rows["pct_missing"] != 0, "with pct_missing > 0")
    each = rows[verdicts == ""].groupby("id")["img_type"].agg(["size", "nunique"])
    leave_out(rows["id"].isin(each.index[each["size"] > each["nunique"]]), "of ids with more than one row")
    leave_out(rows["id"].isin(each.index[each["nunique"] < len(modalities)]), "of ids without all modalities")
    return verdicts
