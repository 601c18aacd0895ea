"""Regions: which pixels of which windows lie in a box, a polygon or around a point."""

import numpy as np
import pyproj
import pytest
from tiny_grid import PROJ, box, enso_placed, placed

from pipelines.regions import Grid, Region, polygon_of

TO_DEGREES = pyproj.Transformer.from_crs(PROJ, pyproj.CRS(PROJ).geodetic_crs, always_xy=True)


def degrees(x, y):
    """Longitude and latitude of a place in the projection of `placed`."""
    return TO_DEGREES.transform(x, y)


def chosen(place, region, window=0):
    """Pixels of a region as a mask."""
    grid = Grid.of(place)
    mask = np.zeros(grid.shape, dtype=bool)
    mask[grid.pixels(region, window)] = True
    return mask


def around(*xy):
    """The polygon of a region through places in metres."""
    return Region(polygon=((tuple(degrees(*place) for place in xy),),))


def test_the_pixels_of_a_box_have_their_centres_in_it():
    place = placed(24, 20, ((10_000.0, -8_000.0),))
    region = box(4.95, 51.95, 5.08, 52.03)
    y, x = np.meshgrid(10_000 - np.arange(24) * 1000, -8_000 + np.arange(20) * 1000, indexing="ij")
    lon, lat = degrees(x, y)
    needed = (lon >= 4.95) & (lon <= 5.08) & (lat >= 51.95) & (lat <= 52.03)
    assert needed.sum() > 20
    assert np.array_equal(chosen(place, region), needed)


@pytest.mark.parametrize("step", [(-1000.0, 1000.0), (1000.0, 1000.0), (-3000.0, 2000.0)])
def test_a_polygon_in_metres_is_found_whichever_way_rows_run(step):
    place = placed(12, 12, step=step)
    row, column = slice(3, 7), slice(2, 9)
    y, x = place["y"].values, place["x"].values
    half = np.abs(step) / 2
    south, north = min(y[3], y[6]) - half[0], max(y[3], y[6]) + half[0]
    west, east = x[2] - half[1], x[8] + half[1]
    region = around((west, south), (east, south), (east, north), (west, north))
    needed = np.zeros((12, 12), dtype=bool)
    needed[row, column] = True
    assert np.array_equal(chosen(place, region), needed)


def test_a_box_and_the_same_polygon_have_the_same_pixels():
    place = placed(40, 40, ((20_000.0, -20_000.0),))
    west, south, east, north = 4.8731, 51.9127, 5.1119, 52.0713
    ring = ((west, south), (east, south), (east, north), (west, north), (west, south))
    same = chosen(place, Region(polygon=((ring,),)))
    assert 100 < same.sum() < 1000
    assert np.array_equal(same, chosen(place, box(west, south, east, north)))


def test_a_hole_is_out_and_a_second_polygon_in():
    place = placed(20, 20, ((9_500.0, -9_500.0),))
    ring = [(-8e3, -8e3), (2e3, -8e3), (2e3, 2e3), (-8e3, 2e3)]
    hole = [(-5e3, -5e3), (-1e3, -5e3), (-1e3, -1e3), (-5e3, -1e3)]
    other = [(4e3, 4e3), (9e3, 4e3), (9e3, 9e3), (4e3, 9e3)]
    one, two = ([[list(degrees(*xy)) for xy in part] for part in parts] for parts in ([ring, hole], [other]))
    region = Region(polygon=polygon_of({"type": "MultiPolygon", "coordinates": [one, two]}))
    y, x = np.meshgrid(9_500 - np.arange(20) * 1000, -9_500 + np.arange(20) * 1000, indexing="ij")

    def within(low, high):
        return (x > low) & (x < high) & (y > low) & (y < high)

    needed = within(-8e3, 2e3) & ~within(-5e3, -1e3) | within(4e3, 9e3)
    assert np.array_equal(chosen(place, region), needed)


def test_the_pixel_of_a_point_holds_it():
    place = placed(8, 8)
    for row, column in ((0, 0), (7, 7), (3, 5)):
        lon, lat = degrees(column * 1000 + 499, -row * 1000 - 499)
        mask = chosen(place, Region(point=(lon, lat)))
        assert np.argwhere(mask).tolist() == [[row, column]]


def test_a_region_without_a_pixels_centre_is_the_pixel_of_its_middle():
    place = placed(8, 8)
    region = around((3200, -4300), (3400, -4300), (3400, -4100), (3200, -4100))
    assert np.argwhere(chosen(place, region)).tolist() == [[4, 3]]


def test_windows_contain_what_lies_wholly_in_them():
    corners = ((0.0, 0.0), (4000.0, 0.0), (0.0, 20_000.0), (-4000.0, 3000.0), (np.nan, np.nan))
    grid = Grid.of(placed(12, 12, corners))
    inner = around((3600, -8000), (8000, -8000), (8000, -4600), (3600, -4600))
    assert grid.contains(inner).tolist() == [True, False, False, True, False]
    whole = around((-500, -11_500), (11_500, -11_500), (11_500, 500), (-500, 500))
    # Its straight edges on the map are bent on the grid, by less than a metre.
    assert grid.contains(around((-490, -11_490), (11_490, -11_490), (11_490, 490), (-490, 490)))[0]
    assert not grid.contains(whole)[1:].any()
    assert grid.contains(Region(point=degrees(11_499, -11_499)))[0]
    assert not grid.contains(Region(point=degrees(11_501, -11_499)))[0]


def test_a_ring_around_the_window_is_not_in_it():
    far = around((-50e3, -50e3), (50e3, -50e3), (50e3, 50e3), (-50e3, 50e3))
    assert not Grid.of(placed(8, 8)).contains(far).any()


def test_the_same_region_lies_elsewhere_in_another_window():
    place = placed(10, 10, ((0.0, 0.0), (2000.0, -3000.0)))
    region = around((2600, -4400), (5400, -4400), (5400, -1600), (2600, -1600))
    first, second = (np.argwhere(chosen(place, region, window)) for window in (0, 1))
    assert len(first) == 9
    assert np.array_equal(first + np.array([2, 3]), second)


def test_windows_of_several_projections_are_told_apart():
    place = placed(10, 10, ((0.0, 0.0), (0.0, 0.0)))
    place["proj"] = ("window", np.array([PROJ, PROJ.replace("lon_0=5", "lon_0=9")]))
    region = Region(point=degrees(4000, -4000))
    assert Grid.of(place).contains(region).tolist() == [True, False]


@pytest.mark.parametrize(
    ("region", "lon", "lat"),
    [
        (box(190, -5, 240, 5), (190, 240), (-5, 5)),
        (box(-170, -5, -120, 5), (190, 240), (-5, 5)),
        (box(170, -5, -170, 5), (170, 190), (-5, 5)),
        (box(92.5, -57.5, 332.5, 62.5), (95, 330), (-55, 60)),
    ],
)
def test_boxes_on_latitudes_and_longitudes(region, lon, lat):
    place = enso_placed()
    grid = Grid.of(place)
    assert grid.contains(region).tolist() == [True]
    rows, columns = grid.pixels(region, 7)
    lons, lats = place["lon"].values[columns], place["lat"].values[rows]
    assert (lons.min(), lons.max(), lats.min(), lats.max()) == (*lon, *lat)
    assert len(rows) == ((lon[1] - lon[0]) / 5 + 1) * ((lat[1] - lat[0]) / 5 + 1)


@pytest.mark.parametrize(
    "region", [box(0, -5, 20, 5), box(-60, -5, 100, 5), box(0, -50, 360, 50), box(120, -80, 140, 0)]
)
def test_what_lies_beyond_the_pacific_is_not_contained(region):
    assert not Grid.of(enso_placed()).contains(region).any()


def test_a_polygon_cut_at_the_antimeridian_is_one():
    halves = [
        [[[170, -10], [180, -10], [180, 10], [170, 10], [170, -10]]],
        [[[-180, -10], [-160, -10], [-160, 10], [-180, 10], [-180, -10]]],
    ]
    region = Region(polygon=polygon_of({"type": "MultiPolygon", "coordinates": halves}))
    grid = Grid.of(enso_placed())
    assert grid.contains(region).all()
    lon = enso_placed()["lon"].values[grid.pixels(region, 0)[1]]
    assert {175, 180, 185, 195} <= set(lon.tolist())
    assert (lon.min(), lon.max()) >= (170, 195)
    assert lon.max() <= 200


def test_sizes_of_pixels():
    assert Grid.of(placed(8, 8, step=(-3000.0, 2000.0))).pixel_km(0) == (3, 2)
    north = placed(8, 8, ((60.035, 5.0),), step=(-0.01, 0.01), proj="")
    height, width = Grid.of(north).pixel_km(0)
    assert height == pytest.approx(1.112, abs=1e-3)
    assert width == pytest.approx(height / 2, rel=1e-3)


@pytest.mark.parametrize("kind", ["Polygon", "Feature", "FeatureCollection", "MultiPolygon"])
def test_every_geojson_of_polygons_is_read(kind):
    ring = [[5, 52, 7.5], [6, 52, 7.5], [6, 53, 7.5], [5, 52, 7.5]]
    polygon = {"type": "Polygon", "coordinates": [ring]}
    feature = {"type": "Feature", "properties": {}, "geometry": polygon}
    given = {
        "Polygon": polygon,
        "Feature": feature,
        "FeatureCollection": {"type": "FeatureCollection", "features": [feature]},
        "MultiPolygon": {"type": "MultiPolygon", "coordinates": [[ring]]},
    }[kind]
    assert polygon_of(given) == ((((5, 52), (6, 52), (6, 53), (5, 52)),),)
