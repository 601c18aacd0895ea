"""The original's constructor arguments, as the parity fixtures hold them, in terms of our configuration."""

import math
from typing import Any

import torch
from torch import nn

from earthformer.config import (
    Attention,
    CrossCuboid,
    Cuboid,
    Decoder,
    EarthformerConfig,
    Encoder,
    FeedForward,
    GlobalVectors,
    StemStage,
)
from earthformer.cuboid import CuboidSelfAttention, decompose, relative_position_index


def reference_config(kwargs: dict[str, Any]) -> EarthformerConfig:
    """Our configuration for the original's arguments, dropout off."""
    levels = len(kwargs["enc_depth"])
    base, rate = kwargs["base_units"], max(_triple(kwargs["downsample"]))
    widths = kwargs["block_units"] or [base * int(rate ** (kwargs["scale_alpha"] * i)) for i in range(levels)]
    return EarthformerConfig(
        context=tuple(kwargs["input_shape"]),
        target=tuple(kwargs["target_shape"]),
        widths=tuple(widths),
        stem=_stem(kwargs),
        downsample=rate,
        stem_activation=kwargs["initial_downsample_activation"],
        encoder=Encoder(
            tuple(kwargs["enc_depth"]),
            _self_patterns(kwargs, "enc_attn_patterns", "enc_{}"),
            kwargs["enc_use_inter_ffn"],
        ),
        decoder=Decoder(
            depth=tuple(kwargs["dec_depth"]),
            self_patterns=_self_patterns(kwargs, "dec_self_attn_patterns", "dec_self_{}"),
            cross_patterns=_cross_patterns(kwargs),
            inter_ffn=kwargs["dec_use_inter_ffn"],
            first_self_attention=kwargs["dec_use_first_self_attn"],
            cross_start=kwargs["dec_cross_start"],
            cross_last_frames=kwargs["dec_cross_last_n_frames"],
            initial=kwargs["z_init_method"],
            level_positions=kwargs["dec_hierarchical_pos_embed"],
        ),
        attention=Attention(
            heads=kwargs["num_heads"],
            padding=kwargs["padding_type"],
            relative_position=kwargs["use_relative_pos"],
            output_projection=kwargs["self_attn_use_final_proj"],
            dropout=0.0,
            projection_dropout=0.0,
        ),
        feed_forward=FeedForward(kwargs["ffn_activation"], kwargs["gated_ffn"], 0.0),
        global_vectors=GlobalVectors(
            count=kwargs["num_global_vectors"],
            ratio=kwargs["global_dim_ratio"],
            separate_projections=kwargs["separate_global_qkv"],
            attend_each_other=kwargs["use_global_self_attn"],
            feed_forward=kwargs["use_global_vector_ffn"],
            in_decoder_self=kwargs["use_dec_self_global"],
            in_decoder_cross=kwargs["use_dec_cross_global"],
            updated_in_decoder=kwargs["dec_self_update_global"],
        ),
        norm=kwargs["norm_layer"],
        positions=kwargs["pos_embed_type"],
    )


def _triple(scale: Any) -> tuple[int, int, int]:
    if isinstance(scale, int):
        return (1, scale, scale)
    return (1, *scale) if len(scale) == 2 else tuple(scale)


def _stem(kwargs: dict[str, Any]) -> tuple[StemStage, ...]:
    if kwargs["initial_downsample_type"] == "conv":
        scale = _triple(kwargs["initial_downsample_scale"])
        convs, final = kwargs["initial_downsample_conv_layers"], kwargs["final_upsample_conv_layers"]
        return (StemStage(kwargs["base_units"], scale, convs, groups=16, final_convs=final),)
    dims = kwargs["initial_downsample_stack_conv_dim_list"]
    count = kwargs["initial_downsample_stack_conv_num_layers"]
    return tuple(
        StemStage(dim, _triple(scale), convs)
        for dim, scale, convs in zip(
            dims or [kwargs["base_units"]] * count,
            kwargs["initial_downsample_stack_conv_downscale_list"],
            kwargs["initial_downsample_stack_conv_num_conv_list"],
            strict=True,
        )
    )


def _self_patterns(kwargs: dict[str, Any], names: str, prefix: str) -> tuple[Any, ...]:
    if kwargs[names] is not None:
        return tuple(kwargs[names])
    layers = zip(
        *(kwargs[prefix.format(part)] for part in ("cuboid_size", "cuboid_strategy", "shift_size")),
        strict=True,
    )
    return (tuple(Cuboid(tuple(size), tuple(strategy), tuple(shift)) for size, strategy, shift in layers),)


def _cross_patterns(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    if kwargs["dec_cross_attn_patterns"] is not None:
        return tuple(kwargs["dec_cross_attn_patterns"])
    layers = zip(
        *(kwargs[f"dec_cross_{part}"] for part in ("cuboid_hw", "cuboid_strategy", "shift_hw", "n_temporal")),
        strict=True,
    )
    return (tuple(CrossCuboid(tuple(hw), tuple(s), tuple(shift), n) for hw, s, shift, n in layers),)


def put_bugs_back(model: nn.Module) -> nn.Module:
    """Two bugs of the original that we do not share, put into our model to compare all the rest of it.

    The corner of the whole cuboid's relative index stands for a clipped cuboid's, and the mask of the global
    vectors is laid in (T, H, W) order on keys in cuboid order.
    """
    for layer in model.modules():
        if not isinstance(layer, CuboidSelfAttention):
            continue
        if layer._index is not None:
            volume = math.prod(layer.size)
            layer._index = relative_position_index(layer.table_size)[:volume, :volume]
        if layer._real is not None:
            real = layer._real.reshape(1, *layer.padded, 1)
            shift = tuple(-s for s in layer.shift)
            order = torch.arange(real.numel()).reshape(real.shape).roll(shift, (1, 2, 3))
            order = decompose(order, layer.size, layer.strategy).flatten()
            wrong = torch.empty_like(layer._real)
            wrong[order] = real.roll(shift, (1, 2, 3)).flatten()
            layer._real = wrong
    return model
