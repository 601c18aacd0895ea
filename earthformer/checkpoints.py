"""Reading published state dicts: their key names are known here and nowhere else."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from earthformer.alignment import AlignmentNetwork
from earthformer.autoencoder import Autoencoder
from earthformer.cuboid import relative_position_index
from earthformer.denoiser import Denoiser
from earthformer.presets import ALIGNMENTS, AUTOENCODERS, DENOISERS, EARTHFORMERS
from earthformer.transformer import Earthformer

PUBLISHED: dict[str, Callable[[], nn.Module]] = {
    "earthformer_sevir": lambda: Earthformer(EARTHFORMERS["earthformer_sevir"]),
    "earthformer_enso": lambda: Earthformer(EARTHFORMERS["earthformer_enso"]),
    "prediff_autoencoder": lambda: Autoencoder(AUTOENCODERS["prediff_sevir_lr"]),
    "prediff_denoiser": lambda: Denoiser(DENOISERS["prediff_sevir_lr"].denoiser),
    "prediff_alignment": lambda: AlignmentNetwork(ALIGNMENTS["prediff_sevir_lr"]),
}
_INDEX = ".relative_position_index"
# Ours and theirs.
_ONE_STAGE = {
    "initial_encoder.conv_block_list.0.": "initial_encoder.conv_block.",
    "initial_encoder.patch_merge_list.0.": "initial_encoder.patch_merge.",
    "final_decoder.upsample_list.0.": "final_decoder.upsample.",
    "final_decoder.conv_block_list.0.": "final_decoder.conv_block.",
}
_AUTOENCODER = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
    "network.": "",
}


def load_published(name: str, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The published model of that name with the given weights, float32, in eval mode.

    Weights of another floating-point type are converted to float32.

    Raises:
        ValueError: unknown name; a key that is missing, surplus or of another shape.
    """
    if name not in PUBLISHED:
        raise ValueError(f"model {name!r} is not published: needed one of {', '.join(PUBLISHED)}")
    model = PUBLISHED[name]()
    load_weights(model, state_dict)
    return model.eval()


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Fill `model` from a state dict with published key names, converted to the model's own type.

    The published models also store which row of the bias table each pair of tokens reads
    (`relative_position_index`); it must be there, and is compared with what the model works out itself.

    Raises:
        ValueError: a key that is missing, surplus or of another shape, or another index; all are named.
    """
    one_stage = any(key.startswith("initial_encoder.conv_block.") for key in state_dict)
    needed = {published_key(key, model, one_stage): (key, own) for key, own in model.state_dict().items()}
    tables = {
        f"{name}{_INDEX}": size
        for name, module in model.named_modules()
        if (size := _table_size(module)) is not None
    }
    faults: list[str] = []
    for key, tensor in state_dict.items():
        if key in tables:
            faults += _index_faults(key, tensor, tables[key])
        elif key not in needed:
            faults.append(f"{key} is surplus")
        elif tensor.shape != needed[key][1].shape:
            faults.append(_misshapen(key, tensor, needed[key][1]))
    faults += [f"{key} is missing" for key in (*needed, *tables) if key not in state_dict]
    if faults:
        raise ValueError("state dict does not fit: " + "; ".join(faults))
    model.load_state_dict({own: state_dict[key] for key, (own, _) in needed.items()})


def published_key(key: str, model: nn.Module, one_stage: bool = False) -> str:
    """The published name of the key of `model`; with `one_stage`, the only stage of a stem has no number."""
    names = _AUTOENCODER if isinstance(model, Autoencoder) else _ONE_STAGE if one_stage else {}
    for ours, theirs in names.items():
        key = key.replace(ours, theirs)
    return key


def _index_faults(key: str, tensor: Tensor, size: tuple[int, int, int]) -> list[str]:
    index = relative_position_index(size)
    if tensor.shape != index.shape:
        return [_misshapen(key, tensor, index)]
    if tensor.is_floating_point():
        return [f"{key} is {tensor.dtype}: needed whole numbers"]
    return [] if torch.equal(tensor.cpu().long(), index) else [f"{key} holds another order of tokens"]


def _misshapen(key: str, found: Tensor, needed: Tensor) -> str:
    return f"{key} has shape {tuple(found.shape)}: needed {tuple(needed.shape)}"


def _table_size(module: nn.Module) -> tuple[int, int, int] | None:
    """Extent of the bias table of an attention layer with relative positions; None of any other module."""
    size: tuple[int, int, int] | None = getattr(module, "table_size", None)
    return size if hasattr(module, "relative_position_bias_table") else None
