"""Untrained competitors: known motions, real radar, members by seed, and fields that STEPS cannot take."""

import dataclasses
import importlib.util
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from test_motion import blobs

from pipelines import baselines
from pipelines.baselines import BASELINES, ENSEMBLES
from pipelines.errors import InputError
from pipelines.tasks import TASKS

TASK = dataclasses.replace(TASKS["radar"], context=4, target=6)
MOVING = sorted(set(BASELINES) - {"persistence"})
DETERMINISTIC = sorted(set(BASELINES) - set(ENSEMBLES))


def make(name, task=TASK):
    return BASELINES[name](task)


def seeds(windows, members=1):
    return torch.arange(windows * members).reshape(windows, members) * 2**40 + 7


def storms(velocity=(2.0, -1.0), seed=0, size=64):
    """A context (1, 4, size, size, 1) in mm/h, dry between the cells, and the 6 frames after it."""
    frames = blobs(velocity, count=TASK.frames, size=size, seed=seed)
    rates = torch.where(frames > 0.3, 4 * frames, 0.0)[None, ..., None]
    return rates[:, : TASK.context], rates[:, TASK.context :]


@pytest.fixture(scope="module")
def real(real_data):
    """Real rain: contexts (2, 4, 128, 128, 1) in mm/h and the 6 frames after each."""
    with h5py.File(real_data / "radar" / "mch_20170131.h5") as file:
        y, x = (int(n) + 128 for n in file.attrs["window384_row_col"])
        counts = np.stack([file["rate"][t : t + TASK.frames, y : y + 128, x : x + 128] for t in (4, 24)])
    rates = torch.from_numpy(np.where(counts == 65535, np.nan, counts * 0.01)).float()[..., None]
    return rates[:, : TASK.context], rates[:, TASK.context :]


def error(forecast, target):
    return float((forecast.mean(1) - target).abs().nanmean())


def test_a_known_motion_is_extrapolated():
    context, target = storms()
    # Away from the borders over which new cells come in.
    moved, still = (
        error(make(name).forecast(context, seeds(1))[..., :-16, 16:, :], target[..., :-16, 16:, :])
        for name in ("extrapolation", "persistence")
    )
    assert moved < 0.25 * still


@pytest.mark.real_data
def test_on_real_rain_flow_beats_persistence_and_ensembles_beat_flow(real):
    context, target = real
    crps = {}
    for name in BASELINES:
        members = make(name).forecast(context, seeds(2, 1 if name in DETERMINISTIC else 6))
        assert members.shape == (2, 1 if name in DETERMINISTIC else 6, 6, 128, 128, 1)
        assert members.dtype == torch.float32
        spread = (members[:, :, None] - members[:, None]).abs().mean((1, 2))
        crps[name] = float(((members - target[:, None]).abs().mean(1) - spread / 2).nanmean())
    assert crps["extrapolation"] < 0.9 * crps["persistence"]
    assert max(crps["displaced"], crps["steps"]) < 0.9 * crps["extrapolation"]


@pytest.mark.real_data
def test_steps_members_are_rain_in_the_same_units(real):
    context, _ = real
    members = make("steps").forecast(context, seeds(2, 3))
    last = context[:, -1]
    assert (members >= 0).all()
    assert ((members == 0) | (members > 0.099)).all()
    for window, observed in zip(members, last, strict=True):
        assert window.max() <= observed.max() * 1.001
        assert float(window[:, 0].mean()) == pytest.approx(float(observed.mean()), rel=0.2)
    assert (members[:, 0] - members[:, 1]).abs().mean() > 0.1 * last.mean()


def test_a_displaced_member_drifts_in_proportion_to_lead_time():
    context = torch.zeros(1, 4, 64, 64, 1)
    context[:, :, 28:36, 28:36] = 5.0
    members = make("displaced").forecast(context, seeds(1, 200))[0, ..., 0]
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    total = members.sum((2, 3))
    centres = torch.stack([(members * axis).sum((2, 3)) / total for axis in (x, y)])
    lead = torch.arange(1.0, 7)
    torch.testing.assert_close(centres.std(1) / lead, torch.ones(2, 6), atol=0.15, rtol=0)
    torch.testing.assert_close(centres.mean(1), torch.full((2, 6), 31.5), atol=1.5, rtol=0)
    drift = (centres - 31.5) / lead
    torch.testing.assert_close(drift[..., 0], drift[..., -1], atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_a_member_is_its_seeds_whatever_it_is_batched_with(name):
    contexts = torch.cat([storms(seed=1)[0], storms((-1.0, 1.0), seed=2)[0]])
    drawn = seeds(2, 3)
    drawn[1, 2] = -5
    together = make(name).forecast(contexts, drawn)
    turned = make(name).forecast(contexts.flip(0), drawn.flip(0, 1)).flip(0, 1)
    torch.testing.assert_close(turned, together, atol=1e-5, rtol=1e-5)
    alone = make(name).forecast(contexts[1:], drawn[1:, 2:])
    torch.testing.assert_close(alone[0, 0], together[1, 2], atol=1e-5, rtol=1e-5)
    same = make(name).forecast(contexts[:1], drawn[:1, :1].expand(-1, 2))
    torch.testing.assert_close(same[0, 0], same[0, 1], atol=0, rtol=0)
    assert (together[0, 0] != together[0, 1]).any()


@pytest.mark.parametrize("name", MOVING)
def test_nothing_is_printed_and_the_global_random_state_stays(name, capfd, recwarn):
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.random(2)  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    make(name).forecast(storms()[0], seeds(1))
    np.testing.assert_array_equal(np.random.random(2), expected)  # noqa: NPY002
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def spots(count, repeated=False):
    rng = np.random.default_rng(count)
    context = np.zeros((1, 4, 64, 64, 1), np.float32)
    rows, columns = rng.integers(20, 40, (2, count))
    for frame in range(4):
        rates = 3.0 if repeated else rng.uniform(0.1, 20, count)
        context[0, frame, rows, columns + (0 if repeated else frame), 0] = rates
    return torch.from_numpy(context)


def first_rain():
    context = spots(30)
    context[:, :-1] = 0
    return context


ODD = {
    "dry": spots(0),
    "one pixel": spots(1),
    "three pixels": spots(3),
    "a pixel that stays": spots(1, repeated=True),
    "frames repeated": storms()[0][:, :1].expand(-1, 4, -1, -1, -1),
    "the first rain": first_rain(),
    "over": first_rain().flip(1),
    "the same rain everywhere": torch.full((1, 4, 64, 64, 1), 2.0),
    "rain everywhere": torch.from_numpy(
        np.random.default_rng(0).uniform(1, 5, (1, 4, 64, 64, 1)).astype(np.float32)
    ),
    "below the threshold": torch.full((1, 4, 64, 64, 1), 0.05),
    "at the edge": torch.cat([torch.full((1, 4, 1, 64, 1), 3.0), torch.zeros(1, 4, 63, 64, 1)], 2),
    "odd sizes": storms(size=96)[0][:, :, :65, :47],
    "small": storms()[0][:, :, 20:37, 20:36],
}


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("case", list(ODD))
def test_any_field_has_a_forecast(name, case):
    context = ODD[case]
    members = make(name).forecast(context, seeds(1, 1 if name in DETERMINISTIC else 2))
    assert members.isfinite().all()
    assert (members >= 0).all()
    assert members.max() <= context.max() * 1.001
    if case == "dry":
        assert (members == 0).all()


def test_without_a_solution_steps_extrapolates():
    context = ODD["frames repeated"]
    members = make("steps").forecast(context, seeds(1, 2))
    extrapolated = make("extrapolation").forecast(context, seeds(1))
    torch.testing.assert_close(members, extrapolated.expand_as(members))
    assert members.max() > 1


@pytest.mark.parametrize("name", MOVING)
def test_only_what_the_last_frame_lacks_is_missing(name):
    context, _ = storms(seed=4)
    context[:, 1, :, :10] = torch.nan
    context[:, -1, 20:30, 40:50] = torch.nan
    lacking = context[:, -1].isnan()
    members = make(name).forecast(torch.cat([context, torch.full_like(context, torch.nan)]), seeds(2))
    assert (members[0, 0].isnan() == lacking).all()
    assert members[1].isnan().all()


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("task", ["sevir", "sevir-lr"])
def test_encoded_vil_stays_encoded_vil(name, task):
    context = (storms()[0] * 30).clamp(max=254).to(torch.uint8)
    context[:, -1, :3] = 255
    small = dataclasses.replace(TASKS[task], context=4, target=3)
    members = make(name, small).forecast(context, seeds(1))
    assert members.dtype == torch.float32
    assert members[:, :, :, :3].isnan().all()
    rest = members[:, :, :, 3:]
    assert ((rest >= 0) & (rest < 254.01)).all()
    assert float(rest.mean()) == pytest.approx(float(context[:, -1, 3:].float().mean()), rel=0.4)


def test_extrapolation_is_one_member():
    with pytest.raises(ValueError, match="2 members asked of a deterministic forecaster"):
        make("extrapolation").forecast(storms()[0], seeds(1, 2))


@pytest.mark.parametrize("name", MOVING)
def test_what_has_no_flow_is_refused(name):
    with pytest.raises(
        InputError, match=r"task enso has no optical flow: .* radar, radar-256, sevir, sevir-lr"
    ):
        make(name, TASKS["enso"])
    with pytest.raises(InputError, match=r"task.context is 2: optical flow needs 3 frames"):
        make(name, dataclasses.replace(TASK, context=2))


@pytest.mark.parametrize(("module", "what"), [("pysteps", "pysteps"), ("cv2", "OpenCV")])
def test_without_the_extra_it_is_named(module, what, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(baselines, "find_spec", lambda name: None if name == module else real(name))
    for name in ("extrapolation", "steps"):
        with pytest.raises(InputError, match=rf"{what} is not installed.*earthformer-ray\[steps\]"):
            make(name)
    make("persistence")
    make("displaced")


def test_an_extra_that_does_not_load_is_refused_too(monkeypatch, tmp_path):
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"cannot be imported: libGL.so.1.*earthformer-ray\[steps\]"):
        make("extrapolation").forecast(storms()[0], seeds(1))


@pytest.mark.parametrize("name", list(BASELINES))
def test_forecasters_travel_to_workers(name):
    context, _ = storms()
    copy = pickle.loads(pickle.dumps(make(name))).to("cpu")
    torch.testing.assert_close(
        copy.forecast(context, seeds(1)), make(name).forecast(context, seeds(1)), atol=0, rtol=0
    )


def test_making_one_imports_nothing_heavy():
    script = (
        "import sys; from pipelines import baselines; from pipelines.tasks import TASKS\n"
        "for make in baselines.BASELINES.values(): make(TASKS['radar'])\n"
        "print('pysteps' in sys.modules, 'cv2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
