"""Windows as latents, encoded once before training: what trains on latents need not encode at every step.

RUN/latents.zarr: `(window, version, frame, y, x, channel)`, float16. Version 0 is the window as it is, the
others are it turned and mirrored. They are made by replicas of the autoencoder, shard by shard, resumable
like a forecast.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import dask.array
import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
import xarray as xr
from torch import Tensor, nn

from pipelines import configs, engine, runs, windows
from pipelines.archives import records, store
from pipelines.archives.store import Archive
from pipelines.series import Window
from pipelines.storage import filesystem, write_whole

AUTOENCODER = "autoencoder.safetensors"
SHARD_WINDOWS = 16


def stored(config: configs.Config) -> bool:
    """Whether this trainable's windows are encoded before training."""
    return config.trainable == "denoiser" and config.training.latent_versions > 0


def store_of(run: str) -> str:
    """URL of a run's latents."""
    return f"{run}/latents.zarr"


def turned(field: Tensor, turn: int) -> Tensor:
    """A window (T, H, W, C) by one of the eight symmetries of the square; of four if H and W differ."""
    if field.shape[1] != field.shape[2]:
        turn = (turn // 4) * 4 + (turn % 4) // 2 * 2
    field = field.rot90(turn % 4, (1, 2))
    return field.flip(2) if turn >= 4 else field


def take_autoencoder(run: str, source: runs.Run) -> None:
    """Copy a trained autoencoder into a run that builds on it, which then needs its own folder alone."""
    kept = ("objective.autoencoder.", "latent_std")
    weights = {n.removeprefix("objective."): t for n, t in source.weights().items() if n.startswith(kept)}
    content = safetensors.torch.save(weights)
    write_whole(run, AUTOENCODER, content)


def load_autoencoder(trainable: nn.Module, run: str) -> None:
    """Give a new trainable on latents the weights of the run's autoencoder.

    Raises:
        InputError: they are absent, or of another model.
    """
    fs, path = filesystem(run)
    weights = safetensors.torch.load(fs.cat_file(f"{path}/{AUTOENCODER}"))
    latents: Any = trainable.latents
    runs.load_weights(latents, weights, f"{run}/{AUTOENCODER}")


def encode(
    config: configs.Config, archive: Archive, run: str, *, workers: int, gpu: bool, progress: bool
) -> None:
    """Encode the training windows of a run; what is there stays.

    Raises:
        InputError: the folder holds something else.
    """
    keys, versions = windows.enumerate_windows(config.task, archive, "train"), config.training.latent_versions
    url, shards = store_of(run), math.ceil(len(keys) / SHARD_WINDOWS)
    settings = {"kind": "latents", "config": config.hash, **runs.provenance(run)}
    begun = records.begun(url, settings)
    if begun and records.is_complete(url):
        return
    todo = records.pending(url, shards) if begun else list(range(shards))
    store.create(url, {"": _template(config, keys, versions)}, config=settings, shards=shards)
    replica = {
        "config": config,
        "archive": archive,
        "run": run,
        "keys": keys,
        "versions": versions,
        "out": url,
    }
    engine.replicate(_Encoder, replica, todo, "latents", workers, gpu, progress)
    records.complete(url, {"counts": {"windows": len(keys), "versions": versions}})


def _template(config: configs.Config, keys: Sequence[Window], versions: int) -> xr.Dataset:
    shape = config.model.denoiser
    frames = {"context_latents": shape.context, "target_mean": shape.target, "target_logvar": shape.target}
    if shape.aligned_channels:
        frames["aligned"] = shape.target
    variables = {}
    for name, (t, h, w, c) in frames.items():
        each = (len(keys), versions, t, h, w, c)
        axis = "context_frame" if name == "context_latents" else "frame"
        variables[name] = xr.Variable(
            ("window", "version", axis, "y", "x", "channel"),
            dask.array.zeros(each, dtype=np.float16, chunks=each),
            encoding={
                "chunks": (1, 1, t, h, w, c),
                "shards": (min(SHARD_WINDOWS, len(keys)), versions, t, h, w, c),
            },
        )
    tiles = [key.tile or (-1, -1) for key in keys]
    coords = {
        "series": ("window", np.array([key.series for key in keys])),
        "start": ("window", np.array([key.start for key in keys])),
        "tile_y": ("window", np.array([y for y, _ in tiles])),
        "tile_x": ("window", np.array([x for _, x in tiles])),
    }
    return xr.Dataset(variables, coords=coords)


class _Encoder:
    """One replica of the autoencoder: encodes and writes whole shards."""

    def __init__(
        self,
        config: configs.Config,
        archive: Archive,
        run: str,
        keys: list[Window],
        versions: int,
        out: str,
        threads: int,
        device: str,
    ) -> None:
        engine.quiet()
        torch.set_num_threads(min(threads, engine.cores()))
        self.task, self.archive, self.keys, self.versions, self.out = (
            config.task,
            archive,
            keys,
            versions,
            out,
        )
        self.device = torch.device(device)
        module = runs.build(config)
        load_autoencoder(module, run)
        self.module: Any = module.eval().to(self.device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = int(row["shard"])
        place = slice(shard * SHARD_WINDOWS, min((shard + 1) * SHARD_WINDOWS, len(self.keys)))
        found: dict[str, list[np.ndarray]] = {}
        for number, key in enumerate(self.keys[place], place.start):
            pixels = windows.read(self.task, self.archive, [key])
            versions = [
                {
                    name: turned(torch.from_numpy(p[0]), turn)[None].to(self.device)
                    for name, p in pixels.items()
                }
                for turn in range(self.versions)
            ]
            seeds = torch.arange(self.versions) + number * self.versions
            encoded = [self.module.encode(each, s[None]) for each, s in zip(versions, seeds, strict=True)]
            for name in encoded[0]:
                each = torch.cat([latents[name] for latents in encoded])
                found.setdefault(name, []).append(each.half().cpu().numpy())
        region = {"window": place}
        crc32 = store.write_region(self.out, "", {n: np.stack(parts) for n, parts in found.items()}, region)
        records.write(self.out, shard, {"regions": [store.region_record("", region, crc32)]})
        return {"shard": shard}


def batches(
    url: str, keys: Sequence[Window], batch_size: int, epoch: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches of these windows' latents in this order, read ahead by Ray Data tasks.

    Each epoch takes another version of a window, in turn.
    """
    rows = [{"row": _rows(url)[key]} for key in keys]
    return windows.read_ahead(rows, partial(_read, url=url, epoch=epoch), batch_size, device)


def _read(table: pa.Table, url: str, epoch: int) -> dict[str, np.ndarray]:
    archive = _opened(url)
    names = [str(name) for name in archive.root.data_vars]
    versions = archive.root.sizes["version"]
    rows = table["row"].to_pylist()
    return {
        name: np.stack([archive.array("", name)[row, (row + epoch) % versions] for row in rows])
        for name in names
    }


@lru_cache(maxsize=4)
def _opened(url: str) -> Archive:
    return store.open_archive(url)


@lru_cache(maxsize=4)
def _rows(url: str) -> dict[Window, int]:
    root = _opened(url).root
    columns = (root[name].values.tolist() for name in ("series", "start", "tile_y", "tile_x"))
    return {
        Window(str(series), start, (y, x) if y >= 0 else None): row
        for row, (series, start, y, x) in enumerate(zip(*columns, strict=True))
    }
