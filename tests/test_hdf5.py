"""HDF5 by byte ranges: what HDF5 itself reads, of any layout, and no bytes that are not wanted."""

import zlib
from typing import ClassVar

import fsspec
import h5py
import numpy as np
import pytest

from pipelines.archives import hdf5

SHAPE = (7, 20, 30, 9)
ROWS = [5, 0, 1, 6]


def values(dtype: str = "i2") -> np.ndarray:
    """Of which some regions repeat, so that they can be packed."""
    drawn = np.random.default_rng(3).integers(0, 250, SHAPE)
    drawn[:, 5:15] = 7
    return drawn.astype(dtype)


def read(path, name="v", rows=ROWS):
    with h5py.File(path) as file:
        layout = hdf5.layout(file[name], rows)
        expected = {row: file[name][row] for row in rows}
    assert layout is not None
    found = dict(hdf5.read_rows(str(path), layout))
    assert sorted(found) == sorted(rows)
    for row in rows:
        np.testing.assert_array_equal(found[row], expected[row])
        assert found[row].dtype == expected[row].dtype
    return layout


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "f4"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (1, 20, 30, 9)},
        {"chunks": (1, 20, 30, 9), "compression": "gzip"},
        {"chunks": (1, 8, 7, 9), "compression": "gzip", "shuffle": True},
        {"chunks": (3, 20, 7, 4), "compression": "gzip", "shuffle": True, "fletcher32": True},
        {"chunks": True, "fletcher32": True},
    ],
    ids=str,
)
def test_rows_are_those_that_hdf5_reads(tmp_path, dtype, options):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("v", data=values(dtype), **options)
    read(tmp_path / "a.h5")


def test_what_was_never_written_is_the_fill_value(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = {"shape": SHAPE, "dtype": "i2", "fillvalue": -3}
        file.create_dataset("v", chunks=(1, 20, 10, 9), compression="gzip", **made)[5, :, :12] = 4
        file.create_dataset("w", **made)
    assert read(tmp_path / "a.h5").ranges(0) == []
    read(tmp_path / "a.h5", "w")


def test_a_filter_that_was_left_out_of_a_chunk_is_not_undone(tmp_path):
    packed = zlib.compress(values("u1")[1].tobytes())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        v = file.create_dataset("v", SHAPE, "u1", chunks=(1, *SHAPE[1:]), compression="gzip", shuffle=True)
        v.id.write_direct_chunk((0, 0, 0, 0), values("u1")[0].tobytes(), filter_mask=0b11)
        v.id.write_direct_chunk((1, 0, 0, 0), packed, filter_mask=0b01)
    read(tmp_path / "a.h5", rows=[0, 1, 2])


@pytest.mark.parametrize("case", ["lzf", "scaled", "compact", "external", "userblock"])
def test_what_is_packed_otherwise_is_left_to_hdf5(tmp_path, case):
    block = {"userblock_size": 512} if case == "userblock" else {}
    with h5py.File(tmp_path / "a.h5", "w", **block) as file:
        if case == "compact":
            stored = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            stored.set_layout(h5py.h5d.COMPACT)
            space = h5py.h5s.create_simple((2, 3))
            h5py.h5d.create(file.id, b"v", h5py.h5t.NATIVE_INT16, space, stored)
        else:
            more = {
                "lzf": {"compression": "lzf"},
                "scaled": {"scaleoffset": 0, "chunks": True},
                "external": {"external": [(str(tmp_path / "b"), 0, h5py.h5f.UNLIMITED)]},
                "userblock": {},
            }
            file.create_dataset("v", data=values(), **more[case])
    with h5py.File(tmp_path / "a.h5") as file:
        assert hdf5.layout(file["v"], [0, 1]) is None


def test_a_damaged_chunk_costs_the_rows_that_it_holds(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("v", data=values(), chunks=(2, *SHAPE[1:]), compression="gzip")
    with h5py.File(tmp_path / "a.h5") as file:
        layout = hdf5.layout(file["v"], range(6))
    (first, size), (last, _) = layout.ranges(2)[0], max(layout.ranges(row)[0] for row in range(6))
    with (tmp_path / "a.h5").open("r+b") as file:
        file.seek(first)
        file.write(bytes(size))
        file.truncate(last + 10)
    found = dict(hdf5.read_rows(str(tmp_path / "a.h5"), layout))
    assert [row for row in range(6) if isinstance(found[row], Exception)] == [2, 3, 4, 5]
    assert "the file is cut off" in str(found[5])
    np.testing.assert_array_equal(found[1], values()[1])


class Counting(fsspec.implementations.local.LocalFileSystem):
    """Remembers what is read."""

    protocol = "counting"
    requests: ClassVar[list[tuple[int, int]]] = []

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.requests.append((start, end))
        return super().cat_file(path, start, end, **kwargs)


def test_neighbours_are_fetched_at_once_and_nothing_else(tmp_path):
    fsspec.register_implementation("counting", Counting, clobber=True)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("v", data=values(), chunks=(1, 5, 30, 9), compression="gzip")
        file.create_dataset("between", data=np.zeros(10_000))
        w = file.create_dataset("w", SHAPE, "i2", chunks=(1, *SHAPE[1:]))
        for row in reversed(range(7)):
            w[row] = values()[row]
    for name, rows, requests in (("v", [2, 3], 1), ("v", [0, 6], 2), ("w", [1, 2, 3], 1)):
        with h5py.File(tmp_path / "a.h5") as file:
            layout = hdf5.layout(file[name], rows)
        Counting.requests.clear()
        dict(hdf5.read_rows(f"counting://{tmp_path}/a.h5", layout))
        assert len(Counting.requests) == requests
        wanted = sum(size for row in rows for _, size in layout.ranges(row))
        assert sum(end - start for start, end in Counting.requests) == wanted


def test_rows_that_share_a_chunk_are_read_together(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "GROUP_BYTES", 1)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("v", data=values(), chunks=(3, 20, 30, 9), compression="gzip")
    layout = read(tmp_path / "a.h5", rows=range(7))
    assert list(hdf5._groups(layout)) == [[0, 1, 2], [3, 4, 5], [6]]
