"""Where forecasts are kept: a folder for each, until it expires.

RESULTS/<id>/request.json    what was asked, written when it is accepted
RESULTS/<id>/sums.npz        sums over the chunks drawn so far, from which an interrupted forecast goes on
RESULTS/<id>/forecast.zarr   the result, a store like any forecast's
RESULTS/<id>/status.json     how it ended, written last: without it a forecast is not finished
RESULTS/<id>/expired.json    all that is left of it after its time
"""

import io
import re
import secrets
import time
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.storage import filesystem, read_json, write_json, write_whole

ID = re.compile(r"[A-Za-z0-9_-]{22}")


def new_id() -> str:
    """128 bits that nobody can guess."""
    return secrets.token_urlsafe(16)


class Results:
    """The forecasts under a URL."""

    def __init__(self, url: str, keep_hours: float) -> None:
        self.url, self._keep = url.rstrip("/"), keep_hours * 3600
        self._ends: dict[str, float] = {}
        """When forecasts ended, as far as that was looked up."""

    def folder(self, number: str) -> str:
        """URL of a forecast's folder."""
        if not ID.fullmatch(number):
            raise ValueError(f"id {number!r}")
        return f"{self.url}/{number}"

    def store(self, number: str) -> str:
        """URL of a forecast's Zarr."""
        return f"{self.folder(number)}/forecast.zarr"

    def accept(self, number: str, request: Mapping[str, Any]) -> None:
        """Remember what was asked."""
        write_json(self.folder(number), "request.json", request)

    def request(self, number: str) -> dict[str, Any] | None:
        """What was asked."""
        return read_json(self.folder(number), "request.json")

    def checkpoint(self, number: str, chunks: int, sums: Mapping[str, np.ndarray]) -> None:
        """Remember the sums over the first chunks."""
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, chunks=np.array(chunks), **sums)
        write_whole(self.folder(number), "sums.npz", content.getvalue())

    def progress(self, number: str) -> tuple[int, dict[str, np.ndarray]] | None:
        """How many chunks were drawn, and their sums; None where nothing whole was written."""
        fs, path = filesystem(self.folder(number))
        try:
            with np.load(io.BytesIO(fs.cat_file(f"{path}/sums.npz")), allow_pickle=False) as found:
                sums = {name: found[name] for name in found.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None
        return int(sums.pop("chunks")), sums

    def end(self, number: str, status: Mapping[str, Any]) -> None:
        """Say how a forecast ended; all else has been written before."""
        write_json(self.folder(number), "status.json", {**status, "ended_at": time.time()})
        fs, path = filesystem(self.folder(number))
        if fs.exists(f"{path}/sums.npz"):
            fs.rm_file(f"{path}/sums.npz")

    def status(self, number: str) -> dict[str, Any] | None:
        """How a forecast ended; None where it is unknown or has not."""
        return read_json(self.folder(number), "status.json")

    def expired(self, number: str) -> bool:
        """Whether there was such a forecast, and its time is over."""
        return read_json(self.folder(number), "expired.json") is not None

    def unfinished(self) -> list[str]:
        """Forecasts that were accepted and have not ended."""
        return [n for n in self._all() if self.request(n) is not None and self.status(n) is None]

    def sweep(self) -> None:
        """Delete what has been kept for long enough, and after as long again the trace of it."""
        now, found = time.time(), set(self._all())
        for number in found:
            if number not in self._ends:
                record = read_json(self.folder(number), "expired.json") or self.status(number)
                if record is None:
                    continue
                self._ends[number] = float(record["ended_at"])
            if now > self._ends[number] + self._keep:
                self._expire(number, now)
        self._ends = {number: end for number, end in self._ends.items() if number in found}

    def _expire(self, number: str, now: float) -> None:
        fs, path = filesystem(self.folder(number))
        if now > self._ends[number] + 2 * self._keep:
            fs.rm(path, recursive=True)
            return
        if not self.expired(number):
            # The trace first: whoever asks in between is told the truth.
            write_json(self.folder(number), "expired.json", {"ended_at": self._ends[number]})
        for each in fs.ls(path, detail=False):
            if not each.rstrip("/").endswith("expired.json"):
                fs.rm(each, recursive=True)

    def _all(self) -> list[str]:
        fs, path = filesystem(self.url)
        fs.invalidate_cache()
        found = fs.ls(path, detail=False) if fs.exists(path) else []
        names = [name.rstrip("/").rpartition("/")[2] for name in found]
        return sorted(name for name in names if ID.fullmatch(name))
