"""The original PreDiff's constructor arguments, as the parity fixtures hold them, in our configurations."""

from typing import Any

import torch

from earthformer.config import Attention, Cuboid, FeedForward, GlobalVectors
from earthformer.prediff_config import AlignmentConfig, DenoiserConfig


def weights_of(numbers: Any, prefix: str = "sd/") -> dict[str, torch.Tensor]:
    """The state dict that a fixture holds under a prefix."""
    return {
        k.removeprefix(prefix): torch.from_numpy(numbers[k]) for k in numbers.files if k.startswith(prefix)
    }


def reference_denoiser(kwargs: dict[str, Any]) -> DenoiserConfig:
    """Our configuration for the original denoiser's arguments, dropout off."""
    return DenoiserConfig(
        context=tuple(kwargs["input_shape"]),
        target=tuple(kwargs["target_shape"]),
        global_vectors=GlobalVectors(
            count=kwargs["num_global_vectors"],
            ratio=kwargs["global_dim_ratio"],
            separate_projections=kwargs["separate_global_qkv"],
            attend_each_other=kwargs["use_global_self_attn"],
            feed_forward=kwargs["use_global_vector_ffn"],
        ),
        skips=kwargs["unet_res_connect"],
        **_shared(kwargs),
    )


def reference_alignment(kwargs: dict[str, Any]) -> AlignmentConfig:
    """Our configuration for the original alignment network's arguments, dropout off."""
    return AlignmentConfig(
        target=tuple(kwargs["input_shape"]),
        out_channels=kwargs["out_channels"],
        per_frame=kwargs["readout_seq"],
        **_shared(kwargs),
    )


def _shared(kwargs: dict[str, Any]) -> dict[str, Any]:
    base, rate = kwargs["base_units"], kwargs["downsample"] ** kwargs["scale_alpha"]
    widths = kwargs.get("block_units") or [base * int(rate**i) for i in range(len(kwargs["depth"]))]
    return {
        "widths": tuple(widths),
        "depth": tuple(kwargs["depth"]),
        "patterns": _patterns(kwargs),
        "downsample": kwargs["downsample"],
        "attention": Attention(
            heads=kwargs["num_heads"],
            padding=kwargs["padding_type"],
            relative_position=kwargs["use_relative_pos"],
            output_projection=kwargs["self_attn_use_final_proj"],
            dropout=0.0,
            projection_dropout=0.0,
        ),
        "feed_forward": FeedForward(kwargs["ffn_activation"], kwargs["gated_ffn"], 0.0),
        "positions": kwargs["pos_embed_type"],
        "inter_ffn": kwargs.get("use_inter_ffn", True),
        "scale_shift": kwargs["time_embed_use_scale_shift_norm"],
        "time_width": kwargs["time_embed_channels_mult"],
        "dropout": 0.0,
    }


def _patterns(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    names = kwargs["block_attn_patterns"]
    if "block_cuboid_size" not in kwargs:
        return (names,) if isinstance(names, str) else tuple(names)
    parts = (kwargs[f"block_cuboid_{part}"] for part in ("size", "strategy", "shift_size"))
    return tuple(
        tuple(
            Cuboid(tuple(size), tuple(strategy), tuple(shift))
            for size, strategy, shift in zip(*level, strict=True)
        )
        for level in zip(*parts, strict=True)
    )
