"""What does not fit is refused with a 4xx that says which field and why; nothing is read as a pickle."""

import base64
import io
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_service import EVENTS

PROJ = "+proj=laea +lat_0=52 +lon_0=5 +units=m"
AXIS = [8000.0 * n for n in range(48)]
TIMES = ["2019-07-01T12:00", "2019-07-01T12:10", "2019-07-01T12:20"]
PIXELS = np.random.default_rng(0).integers(0, 200, (3, 48, 48)).astype(np.uint8)


def npy(values, **more):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return encoded(npy=buffer.getvalue(), **more)


def encoded(**fields):
    inline = {"times": TIMES, "units": "1", "proj": PROJ, "y": AXIS, "x": AXIS, **fields}
    return {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in inline.items()}


def zipped(tmp_path, dataset, change=None):
    folder = tmp_path / "c.zarr"
    dataset.to_zarr(folder, zarr_format=3, consolidated=False)
    for path in folder.rglob("zarr.json"):
        path.write_bytes((change or bytes)(path.read_bytes()))
    packed = shutil.make_archive(str(folder), "zip", folder)
    return {"zarr_zip": base64.b64encode(Path(packed).read_bytes()).decode()}


def chunks(metadata, shape):
    return re.sub(rb'"chunk_shape":\s*\[[^]]*\]', b'"chunk_shape": ' + shape, metadata)


def dataset(pixels=PIXELS, times=TIMES, proj=PROJ, **attrs):
    return xr.Dataset(
        {"vil": (("time", "y", "x"), pixels, {"units": "1", "grid_mapping": "crs", **attrs})}
        | ({"crs": ((), 0, {"proj4": proj})} if proj else {}),
        coords={
            "time": np.array(times, "datetime64[ns]"),
            "y": ("y", np.array(AXIS), {"units": "m"}),
            "x": ("x", np.array(AXIS), {"units": "m"}),
        },
    )


def refused(answer, status=422):
    assert answer.status_code == status, answer.text
    assert "Traceback" not in answer.text
    first = answer.json()["detail"][0]
    return ".".join(map(str, first["loc"])), first["msg"]


class Bomb:
    """Says so, when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


NAN = np.where(np.arange(48) == 3, np.nan, PIXELS.astype(np.float32))
ASKED = [
    ("members", {"members": 257}, "members", "is 257: this service allows 256"),
    ("one member", {"members": 1}, "members", "greater than or equal to 2"),
    ("steps", {"steps": 65}, "steps", "is 65: this service allows 64"),
    ("no steps", {"steps": 0}, "steps", "greater than or equal to 1"),
    ("sampler", {"sampler": "dpm+"}, "sampler", "Input should be 'ddpm', 'ddim', 'dpm\\+\\+' or 'unipc'"),
    ("seed", {"seed": -1}, "seed", "greater than or equal to 0"),
    ("deadline", {"deadline": 0}, "deadline", "greater than 0"),
    ("quantile", {"quantiles": [1.5]}, "quantiles.0", "less than or equal to 1"),
    ("too many events", {"events": [{**EVENTS[0], "name": str(n)} for n in range(9)]}, "events", "allows 8"),
    ("unknown key", {"member": 3}, "member", "Extra inputs are not permitted"),
    (
        "no such variable",
        {"events": [{**EVENTS[0], "variable": "rate"}]},
        "events",
        "variable 'rate' is unknown",
    ),
    ("units of an event", {"events": [{**EVENTS[0], "units": "K"}]}, "events", "units 'K' do not fit vil"),
    ("lead time", {"events": [{**EVENTS[0], "lead_time": [0, 99]}]}, "events", "needed up to 20"),
    ("event key", {"events": [{**EVENTS[0], "treshold": 3}]}, "events", "the nearest is 'threshold'"),
    ("far region", {"events": [{**EVENTS[0], "region": {"box": [0, 0, 1, 1]}}]}, "events", "in none of"),
    ("a path", {"events": [{**EVENTS[0], "region": {"polygon": "/etc/passwd"}}]}, "events", "is a path"),
    ("until_ci alone", {"until_ci": 0.1, "events": []}, "events", "needed --events"),
    ("strength", {"guidance": {"strength": -1}}, "guidance.strength", "greater than or equal to 0"),
    ("archive", {"context": {"archive": "../etc", "event": "e"}}, "context.archive", "is unknown"),
    ("event", {"context": {"archive": "storms", "event": "S0"}}, "context", "event 'S0' is unknown"),
    (
        "tile",
        {"context": {"archive": "storms", "event": "S800008", "tile": [0, 0]}},
        "context",
        "needed none",
    ),
    (
        "start",
        {"context": {"archive": "storms", "event": "S800008", "start": 99}},
        "context",
        "needed 0 to 22",
    ),
    ("nothing inline", {"context": {"zarr_zip": None}}, "context", "needed either npy or zarr_zip"),
    ("base64", {"context": {"npy": "abc"}}, "context.inline.npy", "[Bb]ase64"),
    (
        "shape",
        {"context": npy(PIXELS[:, :40])},
        "context.npy",
        r"has shape \(3, 40, 48\): needed \(3, 48, 48\)",
    ),
    ("frames", {"context": npy(PIXELS[:2])}, "context.npy", r"has shape \(2, 48, 48\)"),
    ("dtype", {"context": npy(PIXELS.astype(np.int64))}, "context.npy", "has dtype int64: needed uint8"),
    ("NaN", {"context": npy(NAN)}, "context.npy", "has dtype float32: needed uint8"),
    ("all missing", {"context": npy(np.full_like(PIXELS, 255))}, "context.npy", "no value but missing"),
    ("units", {"context": npy(PIXELS, units="mm/h")}, "context.units", "do not fit vil: needed 1"),
    ("no projection", {"context": npy(PIXELS, proj=None)}, "context.proj", "is missing"),
    ("projection", {"context": npy(PIXELS, proj="+proj=nonsense")}, "context.proj", "needed a PROJ string"),
    (
        "a grid file",
        {"context": npy(PIXELS, proj=PROJ + " +nadgrids=/etc/passwd")},
        "context.proj",
        r"has '\+nadgrids'",
    ),
    ("an init file", {"context": npy(PIXELS, proj="+init=/etc/passwd:x")}, "context.proj", r"has '\+init'"),
    ("EPSG", {"context": npy(PIXELS, proj="EPSG:28992")}, "context.proj", "needed a PROJ string"),
    ("times", {"context": npy(PIXELS, times=TIMES[:2])}, "context.times", "are 2: needed one of each of 3"),
    ("no times", {"context": npy(PIXELS, times=["noon"] * 3)}, "context.times", "are no times"),
    (
        "gap",
        {"context": npy(PIXELS, times=[*TIMES[:2], "2019-07-01T12:30"])},
        "context.times",
        "have a step of 20 min after 2019-07-01T12:10:00: needed 10 min",
    ),
    ("axis", {"context": npy(PIXELS, x=AXIS[:-1])}, "context.x", "has 47 values: needed 48"),
    ("uneven", {"context": npy(PIXELS, y=[*AXIS[:-1], 9e9])}, "context.y", "has unequal steps"),
    ("no npy", {"context": encoded(npy=b"not numpy")}, "context.npy", "is not a .npy file"),
    ("a pickle", {"context": encoded(npy=pickle.dumps(Bomb()))}, "context.npy", "is not a .npy file"),
    ("objects", {"context": npy(np.array([Bomb()]))}, "context.npy", "is not a .npy file of numbers"),
    ("no zip", {"context": {"zarr_zip": base64.b64encode(b"PK").decode()}}, "context.zarr_zip", "is no zip"),
]


@pytest.mark.parametrize(("what", "more", "field", "message"), ASKED, ids=[each[0] for each in ASKED])
def test_what_does_not_fit_is_refused_by_name(what, more, field, message, served, http):
    found, said = refused(http.post("/v1/forecasts", json=served.request(**more)))
    assert found.startswith(f"body.{field}") or found.startswith(f"body.context.reference.{field}")
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("what", "make", "message"),
    [
        (
            "gap",
            lambda p: zipped(p, dataset(times=[*TIMES[:2], "2019-07-01T13:00"])),
            "have a step of 50 min",
        ),
        (
            "shape",
            lambda p: zipped(p, dataset(PIXELS[:, :, :48]).isel(y=slice(40))),
            r"has shape \(3, 40, 48\)",
        ),
        ("dtype", lambda p: zipped(p, dataset(PIXELS.astype(float))), "has dtype float64"),
        ("no projection", lambda p: zipped(p, dataset(proj=None)), "grid_mapping 'crs' is absent"),
        ("units", lambda p: zipped(p, dataset(units="K")), "units 'K' do not fit vil"),
        (
            "a grid file",
            lambda p: zipped(p, dataset(proj=PROJ + " +nadgrids=/etc/passwd")),
            r"has '\+nadgrids'",
        ),
        (
            "pickles",
            lambda p: zipped(p, dataset(), lambda t: t.replace(b'"zstd"', b'"pickle"')),
            "has codec pickle",
        ),
        (
            "a bomb",
            lambda p: zipped(p, dataset(), lambda t: t.replace(b"48", b"480000")),
            "unpacks to too much",
        ),
        (
            "a bomb in one chunk",
            lambda p: zipped(p, dataset(), lambda t: chunks(t, b"[1000000000, 48, 48]")),
            "unpacks to too much",
        ),
        ("chunks", lambda p: zipped(p, dataset(), lambda t: chunks(t, b"5")), "without a shape and chunks"),
        ("cut off", lambda p: {"zarr_zip": zipped(p, dataset())["zarr_zip"][:2000]}, "is no zip"),
        ("said twice", lambda p: {**zipped(p, dataset()), "units": "1"}, "says it itself"),
    ],
)
def test_a_zarr_that_does_not_fit_is_refused(what, make, message, served, http, tmp_path):
    answer = http.post("/v1/forecasts", json=served.request(context=make(tmp_path)))
    field, said = refused(answer)
    assert field.startswith("body.context")
    assert re.search(message, said), said


def test_what_is_too_large_is_refused_before_it_is_read(served, http):
    large = b"[" + b" " * 3_000_000 + b"]"
    for content in (large, iter([large[:1_500_000], large[1_500_000:]])):
        answer = http.post("/v1/forecasts", content=content, headers={"Content-Type": "application/json"})
        assert refused(answer, 413) == ("body", "is too large: needed 2000000 bytes or less")


def test_no_other_site_may_have_its_name_point_here(served, http):
    for path in ("/", "/v1/models"):
        assert http.get(path, headers={"Host": "evil.example"}).status_code == 400
        assert http.get(path, headers={"Host": "localhost"}).status_code == 200


def test_malformed_bytes_are_refused(served, http):
    for content in (b"", b"{", b"\xff\xfe", b"null", b"[]", b'{"context": NaN}', b"1" * 5000):
        answer = http.post("/v1/forecasts", content=content, headers={"Content-Type": "application/json"})
        refused(answer, 400 if len(content) == 5000 else 422)


def test_no_id_is_a_path_and_none_can_be_guessed(served, http):
    for number in ("x", "..", "%2e%2e%2fetc", "A" * 22, "A" * 500):
        for path in ("", "/probability?event=e", "/mean", "/members/0", "/result", "/exceedance"):
            assert http.get(f"/v1/forecasts/{number}{path}").status_code == 404
        assert http.delete(f"/v1/forecasts/{number}").status_code in (404, 405)
    assert http.get("/v1/archives/nowhere/events").status_code == 404


def test_queries_that_do_not_fit_are_refused(served, http):
    answer = http.post("/v1/forecasts", params={"wait": "true"}, json=served.request())
    where = f"/v1/forecasts/{answer.json()['id']}"
    for path, field, message in (
        ("probability?event=no", "query.event", "event 'no' is unknown: the nearest is"),
        ("probability", "query.event", "Field required"),
        ("mean?format=png&lead_time=7", "query.lead_time", "is 7: needed one of 10, 20"),
        ("mean?format=gif", "query.format", "Input should be 'netcdf' or 'png'"),
        ("quantile?q=0.5", "query.q", "needed a forecast that was asked for quantiles"),
        ("exceedance?threshold=3", "query.threshold", "is 3: needed one of 16.0"),
        ("exceedance?radius=1", "query.radius", "is 1: needed one of 0.0"),
        ("point?row=48&column=0", "query.row", "is 48: needed 0 to 47"),
    ):
        found, said = refused(http.get(f"{where}/{path}"))
        assert (found, message in said) == (field, True), said
    assert refused(http.get(f"{where}/members/16"), 404)[0] == "path.k"


@given(content=st.binary(max_size=300))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_an_upload_are_refused(content, served, http):
    for context in (encoded(npy=content), {"zarr_zip": base64.b64encode(content).decode()}):
        refused(http.post("/v1/forecasts", json=served.request(context=context)))
