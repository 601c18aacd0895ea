"""The presets: every network by name, published and tiny."""

from dataclasses import replace

from earthformer.config import (
    Attention,
    EarthformerConfig,
    FeedForward,
    FieldShape,
    GlobalVectors,
    StemStage,
)
from earthformer.prediff_config import (
    AlignmentConfig,
    AutoencoderConfig,
    DenoiserConfig,
    DiffusionConfig,
    PreDiffConfig,
)

_SEVIR = EarthformerConfig(
    context=(13, 384, 384, 1),
    target=(12, 384, 384, 1),
    widths=(128, 256),
    stem=(StemStage(16, (1, 3, 3)), StemStage(64, (1, 2, 2)), StemStage(128, (1, 2, 2))),
    global_vectors=GlobalVectors(count=8),
)
_TINY = EarthformerConfig(
    context=(7, 128, 128, 1),
    target=(6, 128, 128, 1),
    widths=(32, 64),
    stem=(StemStage(4, (1, 4, 4), convs=1), StemStage(32, (1, 2, 2), convs=1)),
    attention=Attention(dropout=0.0, projection_dropout=0.0),
    feed_forward=FeedForward(dropout=0.0),
    global_vectors=GlobalVectors(count=4),
)

EARTHFORMERS: dict[str, EarthformerConfig] = {
    "earthformer_sevir": _SEVIR,
    "earthformer_sevir_tiny": replace(
        _TINY,
        context=(13, 384, 384, 1),
        target=(12, 384, 384, 1),
        stem=(StemStage(4, (1, 6, 6), convs=1), StemStage(32, (1, 4, 4), convs=1)),
    ),
    "earthformer_sevir_lr": replace(
        _SEVIR,
        context=(7, 128, 128, 1),
        target=(6, 128, 128, 1),
        widths=(64, 128),
        stem=(StemStage(4), StemStage(16, (1, 2, 2)), StemStage(64, (1, 2, 2))),
        global_vectors=GlobalVectors(),
    ),
    "earthformer_sevir_lr_tiny": replace(_TINY, from_last_frame=True),
    "earthformer_enso": EarthformerConfig(
        context=(12, 24, 48, 1),
        target=(14, 24, 48, 1),
        widths=(64, 128),
        stem=(StemStage(64, (1, 1, 2), convs=2, groups=16, final_convs=1),),
    ),
    "earthformer_enso_tiny": replace(
        _TINY,
        context=(12, 24, 48, 1),
        target=(14, 24, 48, 1),
        stem=(StemStage(32, (1, 2, 4), convs=1),),
        global_vectors=GlobalVectors(),
    ),
    "earthformer_radar": replace(
        _SEVIR,
        context=(12, 128, 128, 1),
        target=(12, 128, 128, 1),
        stem=(StemStage(32, (1, 2, 2)), StemStage(128, (1, 2, 2))),
    ),
    "earthformer_radar_tiny": replace(
        _TINY, context=(12, 128, 128, 1), target=(12, 128, 128, 1), from_last_frame=True
    ),
}
"""Gao et al. (2022) published `earthformer_sevir` (8,659,677 parameters), `earthformer_enso` (1,394,325)."""

_STEADY = Attention(dropout=0.0, projection_dropout=0.0)
_STEADY_FFN = FeedForward(dropout=0.0)


def _latents(autoencoder: AutoencoderConfig, context: int, target: int) -> tuple[FieldShape, FieldShape]:
    """(T, H, W, C) of context and target latents."""
    return (context, *autoencoder.latent), (target, *autoencoder.latent)


def _tiny_denoiser(
    autoencoder: AutoencoderConfig,
    context: int,
    target: int,
    widths: tuple[int, ...],
    aligned: bool = False,
    residual: bool = False,
    drift: float = 0.0,
    match: bool = False,
) -> PreDiffConfig:
    """Few data and few steps: it predicts velocity, and is shown the context moved along its motion."""
    known, made = _latents(autoencoder, context, target)
    return PreDiffConfig(
        DenoiserConfig(
            known,
            made,
            aligned_channels=autoencoder.latent_channels if aligned else 0,
            widths=widths,
            depth=(1,) * len(widths),
            attention=_STEADY,
            feed_forward=_STEADY_FFN,
            scale_shift=True,
            dropout=0.0,
        ),
        DiffusionConfig(prediction="velocity"),
        ema_decay=0.995,
        normalise=True,
        residual=residual,
        drift=drift,
        match=match,
        detail=aligned,
    )


AUTOENCODERS: dict[str, AutoencoderConfig] = {
    "prediff_sevir_lr": AutoencoderConfig(frame=(128, 128, 1)),
    "prediff_sevir_lr_tiny": AutoencoderConfig(
        frame=(128, 128, 1),
        widths=(16, 32, 32, 64),
        layers=1,
        latent_channels=8,
        groups=8,
        frames_per_window=2,
        crop=64,
    ),
    "prediff_radar_256": AutoencoderConfig(
        frame=(256, 256, 1),
        widths=(16, 32, 32, 64),
        layers=1,
        latent_channels=16,
        groups=8,
        frames_per_window=1,
        crop=128,
    ),
    "prediff_enso_tiny": AutoencoderConfig(
        frame=(24, 48, 1), widths=(16, 32, 32), layers=1, latent_channels=8, groups=8
    ),
}
DENOISERS: dict[str, PreDiffConfig] = {
    "prediff_sevir_lr": PreDiffConfig(
        DenoiserConfig(*_latents(AUTOENCODERS["prediff_sevir_lr"], 7, 6), widths=(256, 512), depth=(4, 4))
    ),
    "prediff_sevir_lr_tiny": _tiny_denoiser(
        AUTOENCODERS["prediff_sevir_lr_tiny"],
        3,
        6,
        widths=(32, 64),
        aligned=True,
        residual=True,
        drift=0.5,
    ),
    "prediff_radar_256": _tiny_denoiser(
        AUTOENCODERS["prediff_radar_256"],
        2,
        12,
        widths=(32, 64),
        aligned=True,
        residual=True,
        drift=0.7,
        match=True,
    ),
    "prediff_enso_tiny": _tiny_denoiser(AUTOENCODERS["prediff_enso_tiny"], 12, 14, widths=(64, 96)),
}
ALIGNMENTS: dict[str, AlignmentConfig] = {
    "prediff_sevir_lr": AlignmentConfig(target=(6, 16, 16, 64), widths=(128, 256), depth=(1, 1)),
    "prediff_sevir_lr_tiny": AlignmentConfig(
        target=(6, 16, 16, 8),
        widths=(32, 64),
        depth=(1, 1),
        scale_shift=True,
        attention=_STEADY,
        feed_forward=_STEADY_FFN,
        dropout=0.0,
        normalise=True,
        strength=1e5,
    ),
}
"""Gao et al. (2023) published `prediff_sevir_lr`: 84,499,393 parameters the autoencoder, 136,817,538 the
denoiser and 8,937,033 the alignment network."""
