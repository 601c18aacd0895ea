"""Regions of the earth, and which pixels of a window lie in them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyproj
import xarray as xr
from matplotlib.path import Path as Outline

Ring = tuple[tuple[float, float], ...]
KM_PER_DEGREE = 6371.0 * math.pi / 180
SEGMENTS = 16
"""Parts that an edge is cut into where its straight line on the map is bent on the grid."""


@dataclass(frozen=True)
class Region:
    """Part of the earth in degrees: a box, a polygon or a point; and how its pixels give one answer.

    Its pixels are those whose centres lie in it; of a region too small to hold one, the pixel of its middle.
    """

    box: tuple[float, float, float, float] | None = None
    """West, south, east, north. East of 180° may be given either way; west above east crosses 180°."""
    polygon: tuple[tuple[Ring, ...], ...] | None = None
    """Coordinates of a GeoJSON MultiPolygon: of each polygon its outer ring, then its holes."""
    point: tuple[float, float] | None = None
    """Longitude, latitude."""
    reduce: Literal["any", "fraction", "mean"] = "any"
    """Any pixel has the event, or at least `fraction` of them have, or their mean value has."""
    fraction: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("box", "polygon", "point") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"region has {' and '.join(given) or 'no place'}: needed box, polygon or point")
        if (self.reduce == "fraction") != (self.fraction is not None):
            raise ValueError(
                f"region.fraction is {self.fraction}: needed one with reduce: fraction, none otherwise"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"region.fraction is {self.fraction}: needed above 0 and up to 1")
        if self.polygon is not None and (
            not self.polygon or any(len(set(ring)) < 3 for rings in self.polygon for ring in rings or ((),))
        ):
            raise ValueError("region.polygon has a ring of fewer than 3 points: needed 3 or more")
        for lon, lat in self._corners():
            if not (-180 <= lon <= 360 and -90 <= lat <= 90):
                raise ValueError(
                    f"region.{given[0]} has longitude {lon:g}, latitude {lat:g}: "
                    "needed degrees, -180 to 360 and -90 to 90, longitude first"
                )
        if self.box is not None and not (self.box[1] < self.box[3] and self.box[0] != self.box[2]):
            raise ValueError(f"region.box is {list(self.box)}: needed west, south, east, north")

    def _corners(self) -> list[tuple[float, float]]:
        if self.box is not None:
            west, south, east, north = self.box
            return [(west, south), (east, north)]
        if self.polygon is not None:
            return [place for rings in self.polygon for ring in rings for place in ring]
        assert self.point is not None
        return [self.point]

    def outline(self) -> np.ndarray:
        """Points all along the region's edges, longitude (in one piece, so maybe above 180°) and latitude.

        Returns:
            float64 (P, 2).
        """
        if self.point is not None:
            return np.array([self.point], dtype=np.float64)
        if self.box is not None:
            west, south, east, north = self.box
            east = west + _width(west, east)
            rings = [np.array([(west, south), (east, south), (east, north), (west, north)])]
        else:
            rings = [polygon[0] for polygon in self._polygons()]
        along = np.arange(SEGMENTS)[:, None, None] / SEGMENTS
        cut = [(ring + along * (np.roll(ring, -1, axis=0) - ring)).reshape(-1, 2) for ring in rings]
        return np.concatenate(cut)

    def holds(self, lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
        """Whether places in degrees lie in the region (edges of a box count), bool of their shape."""
        if self.point is not None:
            return np.zeros(lon.shape, dtype=bool)
        if self.box is not None:
            west, south, east, north = self.box
            return ((lon - west) % 360 <= _width(west, east)) & (south <= lat) & (lat <= north)
        around = self.outline()[:, 0].mean()
        places = np.stack([(lon - around + 180) % 360 - 180 + around, lat], axis=-1).reshape(-1, 2)
        inside = np.zeros(len(places), dtype=bool)
        for rings in self._polygons():
            # Even-odd, so that holes are out.
            one = np.zeros(len(places), dtype=bool)
            for ring in rings:
                one ^= Outline(ring).contains_points(places)
            inside |= one
        return inside.reshape(lon.shape)

    def _polygons(self) -> list[list[np.ndarray]]:
        """Rings of each polygon, those beyond 180° beside the first: GeoJSON cuts what crosses it in two."""
        assert self.polygon is not None
        found = [[np.array(ring, dtype=np.float64) for ring in rings] for rings in self.polygon]
        middle = found[0][0][:, 0].mean()
        for rings in found[1:]:
            turn = 360 * np.round((middle - rings[0][:, 0].mean()) / 360)
            for ring in rings:
                ring[:, 0] += turn
        return found

    def __str__(self) -> str:
        return _span(*self.outline().T)


def _span(lon: np.ndarray, lat: np.ndarray) -> str:
    ends = (lon.min(), lon.max(), lat.min(), lat.max())
    return "lon {:.4g} to {:.4g}, lat {:.4g} to {:.4g}".format(*ends)


def _width(west: float, east: float) -> float:
    return 360.0 if east - west >= 360 else (east - west) % 360


def polygon_of(geojson: Any) -> tuple[tuple[Ring, ...], ...]:
    """Coordinates of a MultiPolygon from any GeoJSON that holds polygons.

    Raises:
        ValueError: it is no GeoJSON of polygons.
    """
    if isinstance(geojson, Mapping):
        kind = geojson.get("type")
        if kind == "FeatureCollection":
            parts = geojson.get("features")
            if not isinstance(parts, list):
                raise ValueError(f"GeoJSON's features are {parts!r:.60}: needed a list")
            return tuple(one for part in parts for one in polygon_of(part))
        if kind == "Feature":
            return polygon_of(geojson.get("geometry"))
        if kind == "Polygon":
            return _rings([geojson.get("coordinates")])
        if kind == "MultiPolygon":
            return _rings(geojson.get("coordinates"))
        raise ValueError(f"GeoJSON of type {kind!r}: needed Polygon, MultiPolygon or features of these")
    return _rings(geojson)


def _rings(coordinates: Any) -> tuple[tuple[Ring, ...], ...]:
    try:
        # A third number is a height.
        return tuple(
            tuple(tuple((float(place[0]), float(place[1])) for place in ring) for ring in rings)
            for rings in coordinates
        )
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"polygon's coordinates are {coordinates!r:.60}: needed rings of [lon, lat]"
        ) from error


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the pixels of windows lie: `windows.placement` as arrays."""

    dims: tuple[str, str]
    y: np.ndarray
    """Offsets of the pixels' centres from the window's origin, (H,): metres, or degrees without `proj`."""
    x: np.ndarray
    """(W,)"""
    y_origin: np.ndarray
    """(N,) windows, or one for all."""
    x_origin: np.ndarray
    proj: tuple[str, ...]
    """PROJ string of each window; empty: latitude and longitude."""

    @classmethod
    def of(cls, place: xr.Dataset) -> "Grid":
        """From what `windows.placement` returns."""
        ydim, xdim = (str(dim) for dim in place.sizes if dim != "window")
        y, x = (place[dim].values.astype(np.float64) for dim in (ydim, xdim))
        if "proj" not in place:
            return cls((ydim, xdim), y, x, np.zeros(1), np.zeros(1), ("",))
        y_origin, x_origin = (place[f"{axis}_origin"].values.astype(np.float64) for axis in "yx")
        return cls((ydim, xdim), y, x, y_origin, x_origin, tuple(map(str, place["proj"].values)))

    @property
    def shape(self) -> tuple[int, int]:
        """H, W."""
        return len(self.y), len(self.x)

    @property
    def step(self) -> tuple[float, float]:
        """From a row and column to the next, signed, in the units of `y` and `x`."""
        return _step(self.y), _step(self.x)

    def of_window(self, window: int) -> int:
        """Index of a window's origin."""
        return window if len(self.proj) > 1 else 0

    def pixel_km(self, window: int) -> tuple[float, float]:
        """Height and width of a pixel in km; without a projection, of one in the window's middle."""
        dy, dx = (abs(step) for step in self.step)
        i = self.of_window(window)
        if self.proj[i]:
            return dy / 1000, dx / 1000
        middle = math.radians(self.y_origin[i] + self.y.mean())
        return dy * KM_PER_DEGREE, dx * KM_PER_DEGREE * math.cos(middle)

    def contains(self, region: Region) -> np.ndarray:
        """Which windows the region lies wholly in, bool (N,)."""
        rows, columns = self._extent(region)
        edge = 1e-6
        return np.all(
            [
                span[:, end] * sign <= limit + edge
                for span, size in ((rows, len(self.y)), (columns, len(self.x)))
                for end, sign, limit in ((0, -1, 0.5), (1, 1, size - 0.5))
            ],
            axis=0,
        )

    def pixels(self, region: Region, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of a region's pixels in a window that contains it, two of int64 (P,), P ≥ 1."""
        i = self.of_window(window)
        spans = [span[i] for span in self._extent(region)]
        # One pixel more to either side: rounding is no reason to lose one.
        rows, columns = (
            np.arange(max(0, math.floor(low)), min(size, math.ceil(high) + 1))
            for (low, high), size in zip(spans, self.shape, strict=True)
        )
        lon, lat = self._degrees(
            self.proj[i],
            *np.meshgrid(self.x_origin[i] + self.x[columns], self.y_origin[i] + self.y[rows], indexing="xy"),
        )
        row, column = np.nonzero(region.holds(lon, lat))
        if len(row):
            return rows[row], columns[column]
        middle = [
            min(max(round((low + high) / 2), 0), size - 1)
            for (low, high), size in zip(spans, self.shape, strict=True)
        ]
        return np.array(middle[:1]), np.array(middle[1:])

    def degrees(self, window: int, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Longitude and latitude of the centres of some pixels of a window, of the shape of `rows`."""
        i = self.of_window(window)
        return self._degrees(
            self.proj[i], self.x_origin[i] + self.x[columns], self.y_origin[i] + self.y[rows]
        )

    def __str__(self) -> str:
        """The windows' extent in degrees."""
        (dy, dx), corners = self.step, []
        for y in (self.y[0] - dy / 2, self.y[-1] + dy / 2):
            for x in (self.x[0] - dx / 2, self.x[-1] + dx / 2):
                for proj in set(self.proj):
                    of = np.array([p == proj for p in self.proj])
                    corners.append(self._degrees(proj, self.x_origin[of] + x, self.y_origin[of] + y))
        lon, lat = (np.concatenate(values) for values in zip(*corners, strict=True))
        if not np.isfinite(lon).any():
            return "nowhere: the archive does not say where its windows lie"
        return _span(lon[np.isfinite(lon)], lat[np.isfinite(lat)])

    def _extent(self, region: Region) -> tuple[np.ndarray, np.ndarray]:
        """First and last row and column that the region reaches, as fractions, two of float64 (N, 2)."""
        lon, lat = region.outline().T
        spans = np.full((2, len(self.proj), 2), np.nan)
        for proj in set(self.proj):
            of = np.array([p == proj for p in self.proj])
            if proj:
                x, y = _transformer(proj).transform(lon, lat)
                shift = np.zeros(1)
            else:
                x, y = lon, lat
                # Whole turns, so that the region begins east of the window's western edge.
                west = self.x_origin[of] + self.x.min() - abs(self.step[1]) / 2
                shift = 360 * np.ceil((west - 1e-9 - x.min()) / 360)
            for axis, values, origin, first, step in (
                (0, y, self.y_origin[of], self.y[0], self.step[0]),
                (1, x, self.x_origin[of] - shift, self.x[0], self.step[1]),
            ):
                ends = (np.array([values.min(), values.max()]) - origin[:, None] - first) / step
                spans[axis, of] = np.sort(ends, axis=1)
        return spans[0], spans[1]

    @staticmethod
    def _degrees(proj: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _transformer(proj).transform(x, y, direction="INVERSE") if proj else (x, y)


def _step(axis: np.ndarray) -> float:
    return float(axis[-1] - axis[0]) / (len(axis) - 1) if len(axis) > 1 else 1.0


@lru_cache(maxsize=64)
def _transformer(proj: str) -> pyproj.Transformer:
    """From degrees to the projection."""
    crs = pyproj.CRS.from_proj4(proj)
    return pyproj.Transformer.from_crs(crs.geodetic_crs, crs, always_xy=True)
