"""Training: the schedule, what is decayed, and that kills and worker counts change nothing."""

import json

import numpy as np
import pytest
from torch import nn

from pipelines import runs
from pipelines.errors import InputError
from pipelines.train import accumulation, learning_rate, parameter_groups, schedule_steps


@pytest.mark.parametrize("name", ["sevir", "enso"])
def test_learning_rate_is_the_published_one(parity, name):
    numbers = np.load(parity / "earthformer" / "x05_lr_schedule.npz")
    settings = json.loads(str(numbers[f"{name}/settings"]))
    training = runs.Training(
        learning_rate=settings["lr"],
        min_lr_ratio=settings["min_lr_ratio"],
        warmup=settings["warmup"] / settings["total"],
        published_schedule=True,
    )
    ours = [learning_rate(k, settings["total"], training) for k in range(len(numbers[name]))]
    np.testing.assert_allclose(ours, numbers[name], rtol=1e-12, atol=1e-18)


def test_learning_rate_stays_at_its_floor():
    training = runs.Training(learning_rate=1e-3)
    assert learning_rate(250, 100, training) == learning_rate(100, 100, training) == pytest.approx(1e-6)


def test_schedule_counts_of_the_published_runs():
    sevir = runs.Training(published_schedule=True)
    assert schedule_steps(sevir, 35_718) == 55_809
    assert schedule_steps(runs.Training(), 35_718) == 111_618
    assert schedule_steps(runs.resolve("enso").training, 52_350) == 81_796


def test_layer_norms_and_biases_are_not_decayed():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.layer_norm = nn.LayerNorm(2)
            self.group_norm = nn.GroupNorm(1, 2)
            self.relative_position_bias_table = nn.Parameter(self.linear.weight.detach().clone())

    layer = Layer()
    decayed, free = (group["params"] for group in parameter_groups(layer, 0.1))
    assert {id(p) for p in decayed} == {id(layer.linear.weight), id(layer.group_norm.weight)}
    assert len(free) == 5


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"batch_size 32 is no multiple of 3 worker\(s\) times .* 2"):
        accumulation(runs.Training(), 3)
    assert accumulation(runs.Training(), 2) == 8
