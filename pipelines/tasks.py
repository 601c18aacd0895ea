"""A `Task` binds what every stage must agree on: variable, windows, splits, scaling and thresholds."""

from dataclasses import dataclass, field, replace

import numpy as np

from earthformer.config import Scaling

ARCHIVES = ("sevir", "sevir-lr", "enso", "radar")


def _need(holds: bool, name: str, found: object, needed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {found!r}: needed {needed}")


@dataclass(frozen=True)
class Tiles:
    """How windows are cut from grids that are larger than the model's (radar composites).

    Tiles lie `stride` pixels apart, from the first row and column on; a grid's far edges may be left over.
    """

    size: int = 128
    stride: int = 64
    wet: float = 0.1
    """A pixel is wet from this rate on, in mm/h."""
    min_wet: float = 0.1
    """Least wet fraction of the *context*, which is all that a forecaster can see when choosing."""
    min_cover: float = 1.0
    """Least fraction of the window's pixels that the radar covers."""

    def __post_init__(self) -> None:
        _need(self.size >= 1, "tiles.size", self.size, "at least 1 pixel")
        _need(self.stride >= 1, "tiles.stride", self.stride, "at least 1 pixel")
        for name in ("min_wet", "min_cover"):
            value = getattr(self, name)
            _need(0 <= value <= 1, f"tiles.{name}", value, "a fraction from 0 to 1")


@dataclass(frozen=True)
class Splits:
    """Where train, val and test part: by date, except ENSO, which parts by source (climate model).

    A time belongs to `val` when it is later than `val_from` and not later than `test_from`, to `test` when
    later than `test_from`, else to `train`. SEVIR's events go whole by their `time_utc`, as published, though
    their frames reach two hours to either side; of a radar sequence every frame of a window must lie in the
    split. Without dates, the last date in the archive is the test set and the one before it the validation
    set.
    """

    val_from: str | None = None
    test_from: str | None = None
    val_fraction: float | None = None
    """SEVIR-LR as published (PreDiff, Sec. 4.1): a random tenth of the train *windows*, drawn with seed 0.
    Windows of one event overlap, so train and val share frames; the test set does not. For radar, where dates
    are too few to spare one."""

    def __post_init__(self) -> None:
        for name in ("val_from", "test_from"):
            _need(_is_date(getattr(self, name)), f"splits.{name}", getattr(self, name), "a date, YYYY-MM-DD")
        if self.val_from and self.test_from:
            ordered = bool(np.datetime64(self.val_from) <= np.datetime64(self.test_from))
            _need(ordered, "splits.val_from", self.val_from, f"no later than test_from, {self.test_from}")
        if self.val_fraction is not None:
            _need(0 < self.val_fraction < 1, "splits.val_fraction", self.val_fraction, "between 0 and 1")
            _need(self.val_from is None, "splits.val_from", self.val_from, "none beside val_fraction")


def _is_date(text: str | None) -> bool:
    try:
        return text is None or not np.isnat(np.datetime64(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class Task:
    """Frozen: two stages that hold equal tasks agree on everything."""

    name: str
    archive: str
    """Kind of archive: `sevir`, `sevir-lr`, `enso` or `radar`."""
    variable: str
    context: int
    """Frames in."""
    target: int
    """Frames out."""
    stride: tuple[int, int, int]
    """Steps between the starts of successive windows of a series, in train, val and test."""
    step_minutes: int | None
    """Time between frames; None for months."""
    scaling: Scaling
    splits: Splits = field(default_factory=Splits)
    tiles: Tiles | None = None
    thresholds: tuple[float, ...] = ()
    """Event thresholds in the units of the archive (SEVIR: encoded VIL)."""
    error_scale: float = 1.0
    """MSE and MAE are of values times this (SEVIR publishes them on the 0-1 scale)."""
    units: str = "1"
    model: str = ""
    """Preset of the model that is trained unless another is named."""

    def __post_init__(self) -> None:
        _need(self.archive in ARCHIVES, "task.archive", self.archive, "one of " + ", ".join(ARCHIVES))
        for name in ("context", "target"):
            _need(getattr(self, name) >= 1, f"task.{name}", getattr(self, name), "at least 1 frame")
        _need(min(self.stride) >= 1, "task.stride", self.stride, "steps of at least 1")
        step, monthly = self.step_minutes, self.archive == "enso"
        _need(
            step is None if monthly else step is not None and step >= 1,
            "task.step_minutes",
            step,
            "none for months, else minutes",
        )
        if monthly:
            fraction = self.splits.val_fraction
            _need(fraction is None, "splits.val_fraction", fraction, "none: ENSO parts by climate model")
            dates = (self.splits.val_from, self.splits.test_from)
            _need(dates == (None, None), "splits", dates, "no dates: ENSO parts by climate model")

    @property
    def frames(self) -> int:
        """Length of a window."""
        return self.context + self.target

    @property
    def monitor(self) -> str:
        """The validation score that picks the best checkpoint (higher is better)."""
        return "C-Nino3.4-M" if self.archive == "enso" else "CSI-M"


VIL_THRESHOLDS = (16.0, 74.0, 133.0, 160.0, 181.0, 219.0)
_VIL = Scaling(kind="linear", scale=1 / 255, offset=0.0)

_RADAR = Task(
    name="radar",
    archive="radar",
    variable="rate",
    context=12,
    target=12,
    stride=(6, 6, 6),
    step_minutes=5,
    scaling=Scaling(kind="log", r0=1.0),
    tiles=Tiles(),
    thresholds=(0.1, 0.5, 1.0, 2.0, 5.0, 10.0),
    units="mm h-1",
    model="earthformer_radar",
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="sevir",
            archive="sevir",
            variable="vil",
            context=13,
            target=12,
            stride=(12, 12, 12),
            step_minutes=5,
            scaling=_VIL,
            splits=Splits(val_from="2019-01-01", test_from="2019-06-01"),
            thresholds=VIL_THRESHOLDS,
            error_scale=1 / 255,
            model="earthformer_sevir",
        ),
        Task(
            name="sevir-lr",
            archive="sevir-lr",
            variable="vil",
            context=7,
            target=6,
            stride=(6, 6, 6),
            step_minutes=10,
            scaling=_VIL,
            splits=Splits(test_from="2019-06-01", val_fraction=0.1),
            thresholds=VIL_THRESHOLDS,
            error_scale=1 / 255,
            model="earthformer_sevir_lr",
        ),
        Task(
            name="enso",
            archive="enso",
            variable="sst",
            context=12,
            target=14,
            stride=(1, 1, 1),
            step_minutes=None,
            scaling=Scaling(
                kind="linear", scale=1 / (10.198975563049316 + 16.549121856689453), offset=16.549121856689453
            ),
            error_scale=1 / (10.198975563049316 + 16.549121856689453),
            units="K",
            model="earthformer_enso",
        ),
        _RADAR,
        replace(
            _RADAR,
            name="radar-256",
            context=13,
            stride=(2, 6, 6),
            splits=Splits(test_from="2017-01-01", val_fraction=0.1),
            tiles=Tiles(size=256, stride=64),
            model="",
        ),
    )
}
"""The tasks by name. ENSO keeps longitudes 95-330°E and, by the published configuration, forecasts 14
months; `stride=(10, 5, 1)` with `target=26` gives the counts of the paper's text (5,205/334/1,667)."""
