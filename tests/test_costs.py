"""What a job will cost: sums by hand, and tables that cannot be."""

import re

import pytest

from pipelines import costs
from pipelines.errors import InputError

WORK = costs.Work(
    tasks=1200,
    read_bytes=145e9,
    written_bytes=110e9,
    gets=20_000,
    puts=2_400,
    memory_bytes=900e6,
    cpu_hours=30.0,
    gpu_hours=2.0,
    hours=4.0,
    workers=8,
)


def test_a_price_is_the_sum_of_its_parts(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "currency: EUR\ncpu_hour: 0.05\ngpu_hour: 3\nread_gb: 0.02\nstored_gb_month: 0.025\n"
        "get_per_1000: 0.0005\nput_per_1000: 0.005\n"
    )
    prices = costs.read_prices(str(tmp_path / "p.yaml"))
    # 30 x 0.05 + 2 x 3 = 7.50; 20 x 0.0005 + 2.4 x 0.005 = 0.022; 145 x 0.02 = 2.90; 110 x 0.025 = 2.75.
    assert WORK.cost(prices) == (
        "10.42 EUR (computing 7.50, requests 0.02, transfer 2.90), and 2.75 a month to keep it"
    )
    assert WORK.rows(prices) == {
        "read": "145.0 GB, 20000 requests",
        "write": "110.0 GB, 2400 requests",
        "tasks": "1200, 900.0 MB of memory each",
        "time": "30 CPU-hours and 2 GPU-hours, 4.0 h by 8 worker(s)",
        "cost": WORK.cost(prices),
    }
    assert "cost" not in WORK.rows()


def test_the_prices_that_come_along_are_read():
    assert costs.read_prices("cluster/prices.yaml").cpu_hour > 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cpu_hours: 1", "cpu_hours is 1, extra inputs are not permitted; needed currency, cpu_hour"),
        ("cpu_hour: -1", "cpu_hour is -1, input should be greater than or equal to 0"),
        ("cpu_hour: much", "cpu_hour is 'much', input should be a valid number"),
        ("[1, 2]", "the table is [1, 2], input should be a valid dictionary"),
        ("{", "cannot be read: "),
        (None, "cannot be read: "),
    ],
)
def test_a_table_that_is_none_is_refused_in_one_line(tmp_path, text, told):
    if text is not None:
        (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(told)) as refused:
        costs.read_prices(str(tmp_path / "p.yaml"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("hours", "said"), [(0.01, "36 s"), (0.5, "30.0 min"), (3.0, "3.0 h"), (72.0, "3.0 days"), (0.0, "0 s")]
)
def test_times_are_told_in_their_own_units(hours, said):
    assert costs.duration(hours) == said


def test_sizes_are_told_in_their_own_units():
    assert [costs.size(n) for n in (3e6, 2e10, 3e13)] == ["3.0 MB", "20.0 GB", "30.0 TB"]
