"""Rows of HDF5 datasets by the byte ranges of their chunks: in parallel, and no byte that is not wanted.

h5py reads a remote file piece after piece, each when it is needed. Here it reads nothing but the metadata,
which say where the chunks lie; the chunks are fetched many at a time and unpacked by the codecs of numcodecs.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product, zip_longest

import h5py
import numcodecs
import numpy as np

from pipelines.storage import filesystem

GROUP_BYTES = 16 << 20
"""Of stored chunks that are fetched together, while those before are unpacked."""
DEFLATE, SHUFFLE, FLETCHER32 = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32

GAP_BYTES, SPAN_BYTES = 1 << 10, 8 << 20
"""Chunks are fetched by one request where they lie no farther apart, up to so much of them."""

Range = tuple[int, int]
"""First byte, and number of bytes."""
_Stored = Mapping[Range, bytes | Exception]


@dataclass(frozen=True)
class Chunk:
    """A stored chunk."""

    place: tuple[int, ...]
    """Index of its first value."""
    range: Range
    skipped: int
    """Bit i is set where filter i was not applied."""


@dataclass(frozen=True)
class Layout:
    """Where some rows of a dataset lie in its file, and how they are packed."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    filters: tuple[int, ...]
    fill: np.generic
    rows: Mapping[int, tuple[Chunk, ...]]
    """Chunks that hold values of each row; none where nothing was ever written."""

    def ranges(self, row: int) -> list[Range]:
        """Bytes of the file that a row is made of."""
        return [chunk.range for chunk in self.rows[row]]


def layout(dataset: h5py.Dataset, rows: Sequence[int]) -> Layout | None:
    """Where rows (indices of the first axis) lie; None of a dataset that must be read by HDF5 itself.

    That is one that is packed by a filter other than deflate, shuffle and Fletcher-32, or lies in the
    metadata or in other files.
    """
    stored = dataset.id.get_create_plist()
    filters = tuple(stored.get_filter(i)[0] for i in range(stored.get_nfilters()))
    odd = stored.get_external_count() or dataset.file.userblock_size
    if odd or not set(filters) <= {DEFLATE, SHUFFLE, FLETCHER32}:
        return None
    if stored.get_layout() == h5py.h5d.CHUNKED:
        chunk = dataset.chunks
        found = {row: tuple(_chunks(dataset, chunk, row)) for row in rows}
    elif stored.get_layout() == h5py.h5d.CONTIGUOUS:
        chunk = (1, *dataset.shape[1:])
        size, first = int(np.prod(chunk)) * dataset.dtype.itemsize, dataset.id.get_offset()
        if first is None:
            found = dict.fromkeys(rows, ())
        else:
            places = {row: (row, *(0 for _ in chunk[1:])) for row in rows}
            found = {row: (Chunk(place, (first + row * size, size), 0),) for row, place in places.items()}
    else:
        return None
    return Layout(dataset.shape, dataset.dtype, chunk, filters, dataset.fillvalue, found)


def _chunks(dataset: h5py.Dataset, chunk: tuple[int, ...], row: int) -> Iterator[Chunk]:
    first = row // chunk[0] * chunk[0]
    for place in product((first,), *map(range, (0,) * len(chunk[1:]), dataset.shape[1:], chunk[1:])):
        info = dataset.id.get_chunk_info_by_coord(place)
        if info.byte_offset is not None:
            yield Chunk(place, (info.byte_offset, info.size), info.filter_mask)


def ranges(dataset: h5py.Dataset) -> list[Range]:
    """Bytes of the file that a whole dataset lies in."""
    if dataset.chunks is not None:
        infos = map(dataset.id.get_chunk_info, range(dataset.id.get_num_chunks()))
        return [(info.byte_offset, info.size) for info in infos]
    first = dataset.id.get_offset()
    return [] if first is None else [(first, dataset.id.get_storage_size())]


def read_rows(url: str, layout: Layout) -> Iterator[tuple[int, np.ndarray | Exception]]:
    """The rows of a layout with their values, or with what is wrong with their bytes.

    Raises:
        OSError: the file cannot be reached.
    """
    fs, path = filesystem(url)

    def fetch(rows: Sequence[int]) -> "_Stored":
        spans = list(_spans({chunk.range for row in rows for chunk in layout.rows[row]}))
        starts, ends = [span[0][0] for span in spans], [sum(span[-1]) for span in spans]
        found = fs.cat_ranges([path] * len(spans), starts, ends)
        return {
            each: _cut(part, each, span) for part, span in zip(found, spans, strict=True) for each in span
        }

    groups = list(_groups(layout))
    with ThreadPoolExecutor(1) as ahead:
        coming: Future[_Stored] | None = ahead.submit(fetch, groups[0]) if groups else None
        for rows, following in zip_longest(groups, groups[1:]):
            assert coming is not None
            stored = coming.result()
            coming = ahead.submit(fetch, following) if following else None
            unpacked: dict[Range, np.ndarray] = {}
            for row in rows:
                yield row, _row(layout, row, stored, unpacked)


def _spans(ranges: set[Range]) -> Iterator[list[Range]]:
    """Ranges in the order of the file, those together that follow one another: each is a request."""
    span: list[Range] = []
    for each in sorted(ranges):
        if span and (each[0] - sum(span[-1]) > GAP_BYTES or sum(each) - span[0][0] > SPAN_BYTES):
            yield span
            span = []
        span.append(each)
    if span:
        yield span


def _cut(found: bytes | Exception, each: Range, span: Sequence[Range]) -> bytes | Exception:
    if isinstance(found, Exception) or len(span) == 1:
        return found
    first = each[0] - span[0][0]
    return found[first : first + each[1]]


def _groups(layout: Layout) -> Iterator[list[int]]:
    """Rows in the order of the file, some together: rows that share a chunk always are."""
    rows: list[int] = []
    size = 0
    for row in sorted(layout.rows):
        apart = not rows or row // layout.chunk[0] != rows[-1] // layout.chunk[0]
        if rows and apart and size >= GROUP_BYTES:
            yield rows
            rows, size = [], 0
        rows.append(row)
        size += sum(n for _, n in layout.ranges(row)) if apart else 0
    if rows:
        yield rows


def _row(
    layout: Layout, row: int, stored: _Stored, unpacked: dict[Range, np.ndarray]
) -> np.ndarray | Exception:
    values = np.full(layout.shape[1:], layout.fill, layout.dtype)
    for chunk in layout.rows[row]:
        packed = stored[chunk.range]
        if isinstance(packed, Exception):
            return packed
        try:
            whole = unpacked[chunk.range] if chunk.range in unpacked else _unpacked(layout, chunk, packed)
        except (ValueError, RuntimeError, zlib.error) as error:
            return error
        if layout.chunk[0] > 1:
            # Of several rows, which are all among those that are read together.
            unpacked[chunk.range] = whole
        part = whole[row - chunk.place[0]]
        # Chunks at the edge hold more than the dataset.
        room = values[tuple(slice(i, i + n) for i, n in zip(chunk.place[1:], part.shape, strict=True))]
        room[...] = part[tuple(map(slice, room.shape))]
    return values


def _unpacked(layout: Layout, chunk: Chunk, packed: bytes) -> np.ndarray:
    if len(packed) != chunk.range[1]:
        raise ValueError(
            f"{len(packed)} bytes at {chunk.range[0]}: needed {chunk.range[1]}, the file is cut off"
        )
    for position in reversed(range(len(layout.filters))):
        if chunk.skipped >> position & 1:
            continue
        code = layout.filters[position]
        if code == DEFLATE:
            packed = zlib.decompress(packed)
        elif code == FLETCHER32:
            packed = numcodecs.Fletcher32().decode(packed)
        else:
            packed = numcodecs.Shuffle(layout.dtype.itemsize).decode(packed)
    return np.frombuffer(packed, layout.dtype).reshape(layout.chunk)
