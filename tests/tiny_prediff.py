"""PreDiff in seconds: a task, networks, and runs trained in this process for a step or two."""

from typing import Any

import torch

from pipelines import configs, latents, loop, runs
from pipelines.archives import store

ALONE = loop.Ranks(0, 1, torch.device("cpu"))
TASK = {"context": 3, "target": 2, "stride": [11, 22, 22]}
OVERLAYS: dict[str, dict[str, Any]] = {
    "autoencoder": {
        "frame": [48, 48, 1],
        "widths": [8, 8, 16],
        "latent_channels": 4,
        "groups": 4,
        "frames_per_window": 2,
        "crop": 24,
        "adversarial_start": 2,
        "discriminator_layers": 1,
        "discriminator_width": 8,
    },
    "denoiser": {
        "denoiser": {
            "context": [3, 12, 12, 4],
            "target": [2, 12, 12, 4],
            "aligned_channels": 4,
            "widths": [32],
            "depth": [1],
            "scale_shift": True,
        }
    },
    "alignment": {
        "target": [2, 12, 12, 4],
        "widths": [32],
        "depth": [1],
        "scale_shift": True,
        "context_frames": 3,
    },
}
TRAINING = {"batch_size": 4, "micro_batch": 2, "epochs": 1, "log_steps": 1, "learning_rate": 1e-3}


def config(trainable: str, autoencoder: str | None = None, **training: Any) -> configs.Config:
    """A configuration of a few seconds on synthetic SEVIR of 48 × 48 pixels."""
    overlay = {"task": TASK, "model": OVERLAYS[trainable], "training": {**TRAINING, **training}}
    overlay["task"] = {**TASK, "splits": {"val_from": "2019-01-01", "val_fraction": None}}
    return configs.resolve(
        "sevir-lr", "prediff_sevir_lr_tiny", overlay, trainable=trainable, autoencoder=autoencoder
    )


def begun(config: configs.Config, archive: str, run: str, autoencoder: str | None = None) -> loop.Loop:
    """The training loop in this process, where the run stands."""
    opened = store.open_archive(archive)
    provenance = {"archive": archive, "archive_hash": opened.config_hash}
    if autoencoder is not None:
        source = runs.open_run(autoencoder)
        provenance |= {"autoencoder": autoencoder, "autoencoder_hash": source.hash}
    runs.start(run, config, provenance)
    if autoencoder is not None:
        latents.take_autoencoder(run, source)
    if latents.stored(config):
        latents.encode(config, opened, run, workers=1, gpu=False, progress=False)
    return loop.begin(config, opened, run, ALONE)


def trained(trainable: str, archive: str, run: str, autoencoder: str | None = None, **training: Any) -> str:
    """A finished run, and its URL."""
    asked = config(trainable, autoencoder, **training)
    for _ in begun(asked, archive, run, autoencoder).steps():
        pass
    runs.complete(run, asked, runs.provenance(run))
    return run
