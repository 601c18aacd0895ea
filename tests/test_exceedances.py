"""Exceedances: how many members reach a threshold near a pixel, whatever chunks they came in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_grid import minutes, placed, rain

from pipelines.ensembles import Reduction, dilate, disk
from pipelines.events import bind
from pipelines.exceedances import Exceedances, Levels
from pipelines.tasks import TASKS

LEVELS = Levels((0.5, 1.0, 4.0), (0.0, 1.0, 2.5))


def rates(members, seed=0, missing=0.0):
    rng = np.random.default_rng(seed)
    drawn = (np.round(rng.gamma(0.5, 2.0, (members, 3, 9, 11)) * 2) / 2).astype(np.float32)
    return np.where(rng.random(drawn.shape) < missing, np.float32(np.nan), drawn)


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_counts_are_those_of_every_threshold_and_radius(missing):
    members = rates(7, missing=missing)
    found = Exceedances(LEVELS, (1.0, 1.0), members.shape[1:])
    for part in np.split(members, [2, 3]):
        found.add(part)
    for r, radius in enumerate(LEVELS.radii):
        for t, threshold in enumerate(LEVELS.thresholds):
            near = np.stack([dilate(each >= threshold, disk(radius, (1.0, 1.0))) for each in members])
            np.testing.assert_array_equal(found.count[r, t], near.sum(0))
    np.testing.assert_array_equal(found.known, np.isfinite(members).sum(0))


def test_every_task_has_levels():
    for task in TASKS.values():
        levels = Levels.of(task)
        assert levels.thresholds == tuple(sorted(levels.thresholds))
        assert len(levels.thresholds) >= 4
        assert levels.radii[0] == 0


@given(st.integers(2, 9), st.lists(st.integers(0, 9), max_size=3), st.sampled_from([0.0, 0.3]))
def test_sums_merged_are_the_sums_of_all_to_the_bit(count, cuts, missing):
    members, place = rates(count, missing=missing), placed(9, 11)
    bound = bind((rain(1.0), rain(2.0, name="near", radius=1.0)), TASKS["radar"], place, minutes(3))
    whole, merged = (Reduction(bound, 0, (0.1, 0.9)) for _ in range(2))
    counted, together = (Exceedances(LEVELS, (1.0, 1.0), members.shape[1:]) for _ in range(2))
    for part in np.split(members, sorted(cuts)):
        one, other = Reduction(bound, 0, (0.1, 0.9)), Exceedances(LEVELS, (1.0, 1.0), members.shape[1:])
        for sums in (whole, one, counted, other):
            sums.add(part)
        merged.merge(one.sums())
        together.merge(other.count, other.known)
    here, there = whole.result(), merged.result()
    assert here.keys() == there.keys()
    for name, values in here.items():
        np.testing.assert_array_equal(there[name], values, err_msg=name)
    np.testing.assert_array_equal(together.count, counted.count)
    assert whole.half_width() == merged.half_width()
