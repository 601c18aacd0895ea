"""Events: what may be asked, and that what cannot be answered is refused before anything is computed."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from tiny_grid import box, enso_placed, minutes, placed, rain

from pipelines.errors import InputError
from pipelines.events import NINO34, Event, bind, parse_events, plain_units, read_events, vil_kg_m2
from pipelines.regions import Region
from pipelines.tasks import TASKS

RADAR, SEVIR, ENSO = TASKS["radar"], TASKS["sevir"], TASKS["enso"]
SQUARE = {"type": "Polygon", "coordinates": [[[5, 51.9], [5.1, 51.9], [5.1, 52], [5, 52], [5, 51.9]]]}
MONTHS = np.arange(1, 15)


def bound(event, task=RADAR):
    place, leads = (enso_placed(), MONTHS) if task is ENSO else (placed(16, 16), minutes(12))
    return bind((event,), task, place, leads).events[0]


def written(tmp_path, text):
    (tmp_path / "events.yaml").write_text(text, encoding="utf-8")
    return str(tmp_path / "events.yaml")


def documented():
    """The example of `read_events`."""
    text = read_events.__doc__.split("```")[1].removeprefix("yaml\n")
    return "\n".join(line.removeprefix("    ") for line in text.splitlines())


def test_the_documented_example_reads(tmp_path):
    (tmp_path / "city.geojson").write_text(json.dumps({"type": "Feature", "geometry": SQUARE}))
    heavy, wet, lull, nino = read_events(written(tmp_path, documented()))
    assert heavy == rain(5, name="heavy rain nearby", lead_time=(0, 60), radius=5)
    assert wet.accumulated
    assert wet.region.polygon[0][0][1] == (5.1, 51.9)
    assert (wet.region.reduce, wet.region.fraction) == ("fraction", 0.1)
    assert (lull.comparison, lull.duration, lull.region.point) == ("<", 6, (4.76, 52.31))
    assert (nino.name, nino.variable, nino.units) == ("El Niño", NINO34, "K")


def test_events_survive_yaml_and_json(tmp_path):
    asked = (
        rain(5, region=Region(polygon=((((5.0, 52.0), (5.1, 52.0), (5.1, 52.1)),),))),
        rain(2, name="b", region=box(5, 51, 6, 52, reduce="fraction", fraction=0.5), lead_time=(5, 60)),
    )
    plain = json.loads(json.dumps([dataclasses.asdict(event) for event in asked]))
    assert parse_events(plain, "request") == asked
    assert read_events(written(tmp_path, yaml.safe_dump(plain))) == asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"treshold": 1}, r"key 'treshold' is unknown: the nearest is 'threshold'"),
        ({"region": {"boxx": [1, 2, 3, 4]}}, r"key 'region.boxx' is unknown: the nearest is 'region.box'"),
        ({"threshold": "many"}, r"threshold is 'many': Input should be a valid number"),
        ({"threshold": float("nan")}, r"threshold is nan: needed a number below 1e30"),
        ({"threshold": 1e300}, r"threshold is 1e\+300: needed a number below 1e30"),
        ({"comparison": "=="}, r"comparison is '==': Input should be '>=', '>', '<=' or '<'"),
        ({"lead_time": [60, 5]}, r"lead_time is \[60.0, 5.0\]: needed \[from, to\]"),
        ({"lead_time": [60]}, r"has no lead_time.1: needed one"),
        ({"radius": -1}, r"radius is -1.0: needed 0 km or more"),
        ({"duration": 0}, r"duration is 0: needed 1 frame or more"),
        ({"duration": 2, "accumulated": True}, r"duration is 2: needed 1 beside accumulated"),
        ({"name": " "}, r"name is ' ': needed some text"),
        ({"region": {}}, r"region has no place: needed box, polygon or point"),
        (
            {"region": {"box": [5, 51, 6, 52], "point": [5, 51]}},
            r"region has box and point: needed box",
        ),
        ({"region": {"box": [5, 52, 6, 51]}}, r"region.box is \[5.0, 52.0, 6.0, 51.0\]: needed west, south"),
        ({"region": {"point": [52, 95]}}, r"region.point has longitude 52, latitude 95: needed degrees"),
        ({"region": {"box": [5, 51, float("nan"), 52]}}, r"region.box has longitude nan"),
        ({"region": {"point": [5, 51], "reduce": "fraction"}}, r"fraction is None: needed one with reduce"),
        ({"region": {"point": [5, 51], "fraction": 0.5}}, r"fraction is 0.5: needed one with reduce"),
        (
            {"region": {"point": [5, 51], "reduce": "fraction", "fraction": 10}},
            r"region.fraction is 10.0: needed above 0 and up to 1",
        ),
        ({"region": {"point": [5, 51], "reduce": "mean"}, "radius": 5}, r"radius is 5.0: needed 0 beside"),
        (
            {"region": {"polygon": {"type": "Point", "coordinates": [5, 52]}}},
            r"GeoJSON of type 'Point'",
        ),
        (
            {"region": {"polygon": {"type": "Polygon", "coordinates": [5, 52]}}},
            r"coordinates are \[\[5",
        ),
        (
            {"region": {"polygon": {"type": "Polygon", "coordinates": [[[5, 52], [6, 52], [5, 52]]]}}},
            r"ring of fewer than 3 points: needed 3 or more",
        ),
        ({"region": {"polygon": {"type": "FeatureCollection", "features": []}}}, r"fewer than 3 points"),
        (
            {"region": {"polygon": {"type": "FeatureCollection"}}},
            r"GeoJSON's features are None: needed a list",
        ),
        ({"region": {"polygon": {"type": "Feature", "geometry": None}}}, r"coordinates are None"),
        ({"variable": NINO34, "radius": 3}, r"radius is 3.0: needed 0 for nino34"),
        ({"variable": NINO34, "region": {"point": [5, 51]}}, r"region is 'given': needed none"),
    ],
)
def test_a_bad_event_is_refused_by_name(change, message):
    event = {"name": "rain", "variable": "rate", "threshold": 1, "units": "mm/h"} | change
    with pytest.raises(InputError, match=message) as error:
        parse_events([event], "events.yaml")
    assert str(error.value).startswith("events.yaml, event 1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no events: needed a list"),
        ("[]", "holds no events: needed a list"),
        ("name: rain", "holds a dict: needed a list of events"),
        ("- rain", r"event 1 is 'rain': needed a mapping"),
        ("- {name: a, variable: rate, units: mm/h}", r"event 1 \(a\) has no threshold: needed one"),
        ("- {name: a, name", "cannot be read"),
        (
            "- &e {name: a, variable: rate, units: mm/h, threshold: 1}\n- *e",
            "holds 2 events named 'a': needed one each",
        ),
        (
            "- {name: a, variable: rate, units: mm/h, threshold: 1, region: {polygon: gone.geojson}}",
            r"polygon .*gone.geojson cannot be read",
        ),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        read_events(written(tmp_path, text))
    assert "\n" not in str(error.value)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_events(str(tmp_path / "none.yaml"))


def test_a_request_from_afar_reads_no_files(tmp_path):
    (tmp_path / "city.geojson").write_text(json.dumps(SQUARE))
    asked = {"name": "a", "variable": "rate", "units": "mm/h", "threshold": 1}
    region = {"polygon": str(tmp_path / "city.geojson")}
    with pytest.raises(InputError, match=r"region.polygon is a path: needed GeoJSON"):
        parse_events([asked | {"region": region}], "request")
    assert parse_events([asked | {"region": region}], "file", folder="elsewhere")[0].region.polygon


@pytest.mark.parametrize(
    "text", ["mm h-1", "mm/h", "mm / h", "mm hr-1", "mm/hour", "mm h^-1", "mm h**-1", "mm·h⁻¹", " mm  h-1 "]
)
def test_units_have_one_spelling(text):
    assert plain_units(text) == "mm h-1"


@pytest.mark.parametrize(
    ("text", "plain"),
    [("kg/m^2", "kg m-2"), ("kg/m²", "kg m-2"), ("kg m-2/s", "kg m-2 s-1"), ("1", "1"), ("°C", "degC")],
)
def test_other_units(text, plain):
    assert plain_units(text) == plain


@pytest.mark.parametrize(
    ("units", "threshold", "found"),
    [("mm/h", 0.1, 0.1), ("m s-1", 1e-6, 3.6), ("kg m-2 s-1", 0.001, 3.6), ("in/h", 1, 25.4)],
)
def test_thresholds_of_rates_become_mm_per_hour(units, threshold, found):
    assert bound(rain(threshold, units=units)).threshold == pytest.approx(found, rel=1e-12)


def test_an_accumulated_threshold_becomes_a_sum_of_rates():
    # 1 mm in frames of 5 min: 12 frames of 1 mm/h, or one of 12.
    assert bound(rain(1, units="mm", accumulated=True)).threshold == 12
    assert bound(rain(0.1, units="cm", accumulated=True)).threshold == pytest.approx(12)


def test_vil_is_asked_encoded_or_in_kg_per_square_metre():
    encoded = bound(Event("a", "vil", 133, "1"), SEVIR)
    assert (encoded.threshold, encoded.kg_m2) == (133, False)
    physical = bound(Event("a", "vil", 3.5, "kg m^-2"), SEVIR)
    assert (physical.threshold, physical.kg_m2) == (3.5, True)


def test_vil_in_kg_per_square_metre():
    encoded = np.array([0, 5, 6, 18, 19, 133, 254, np.nan], dtype=np.float32)
    needed = [0, 0, 4 / 90.66, 16 / 90.66, np.exp(-64.9 / 38.9), np.exp(49.1 / 38.9), np.exp(170.1 / 38.9)]
    found = vil_kg_m2(encoded)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [*needed, np.nan], rtol=1e-6)


@pytest.mark.parametrize(
    ("event", "task", "message"),
    [
        (rain(units="K"), RADAR, r"units 'K' do not fit rate: needed mm h-1, mm min-1"),
        (rain(units="dBZ"), RADAR, r"units 'dBZ' do not fit rate"),
        (rain(units="mm"), RADAR, r"units 'mm' do not fit rate"),
        (
            rain(units="mm/h", accumulated=True),
            RADAR,
            r"'mm/h' do not fit an accumulated rate: needed mm",
        ),
        (Event("a", "vil", 74, "mm/h"), SEVIR, r"units 'mm/h' do not fit vil: needed 1, kg m-2"),
        (Event("a", "vil", 74, "1", accumulated=True), SEVIR, r"vil in 1 adds up to nothing"),
        (Event("a", "sst", 1, "mm"), ENSO, r"units 'mm' do not fit sst: needed K, degC"),
        (Event("a", "sst", 1, "K", radius=500), ENSO, r"radius is 500 km: needed 0"),
        (Event("a", "nino3", 1, "K"), ENSO, r"variable 'nino3' is unknown: the nearest is 'nino34'"),
        (Event("a", "vil", 1, "1"), RADAR, r"variable 'vil' is unknown: the nearest is 'rate'"),
        (Event("a", NINO34, 1, "K"), RADAR, r"variable 'nino34' is unknown"),
        (rain(lead_time=(0, 61)), RADAR, r"lead_time is \[0, 61\] min: needed up to 60"),
        (rain(lead_time=(1, 4)), RADAR, r"no frame has a lead_time within \[1, 4\] min: needed one of 5, 10"),
        (rain(duration=13), RADAR, r"duration is 13 frames, its lead_time holds 12"),
        (rain(duration=3, lead_time=(5, 10)), RADAR, r"duration is 3 frames, its lead_time holds 2"),
        (Event("a", NINO34, 0.5, "K", lead_time=(1, 13)), ENSO, r"\[1, 13\] months: needed up to 12"),
        (Event("a", NINO34, 0.5, "K", duration=13), ENSO, r"duration is 13 frames, its lead_time holds 12"),
        (rain(radius=17), RADAR, r"radius is 17 km, the grid 16 km wide: needed less"),
        (rain(region=box(7, 51.9, 7.1, 51.95)), RADAR, r"region, lon 7 to 7.1, .* lies wholly in none"),
        (rain(region=box(5.1, 51.9, 7.1, 51.95)), RADAR, r"windows: needed one within lon 4.99\d to 5.2"),
    ],
)
def test_what_cannot_be_answered_is_refused(event, task, message):
    with pytest.raises(InputError, match=message) as error:
        bound(event, task)
    assert f"event {event.name!r}: " in str(error.value)
    assert "\n" not in str(error.value)


def test_nino34_needs_its_grid():
    cut = enso_placed().isel(lon=slice(0, 40), lat=slice(1, 24))
    with pytest.raises(InputError, match=r"the grid is 23 × 40, .*: nino34 needs the 24 × 48 grid"):
        bind((Event("a", NINO34, 0.5, "K"),), ENSO, cut, MONTHS)


def test_a_place_that_is_not_known_is_said():
    lost = placed(16, 16, ((np.nan, np.nan),))
    with pytest.raises(InputError, match="nowhere: the archive does not say where its windows lie"):
        bind((rain(region=box(5, 51.9, 5.1, 51.95)),), RADAR, lost, minutes(12))


@pytest.mark.parametrize(
    ("asked", "frames"),
    [(None, (0, 12)), ((0, 60), (0, 12)), ((10, 10), (1, 2)), ((7, 31), (1, 6)), ((55, 60), (10, 12))],
)
def test_lead_times_include_both_ends(asked, frames):
    assert bound(rain(lead_time=asked)).frames == slice(*frames)


def test_lead_times_of_enso_are_months():
    sst = bound(Event("a", "sst", 1, "degC", lead_time=(2, 14)), ENSO)
    index = bound(Event("a", NINO34, 0.5, "K"), ENSO)
    assert (sst.frames, index.frames) == (slice(1, 14), slice(0, 12))
    assert (sst.scalar, index.scalar) == (False, True)
