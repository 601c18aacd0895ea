"""Reading published state dicts: their key names are known here and nowhere else."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from earthformer.cuboid import relative_position_index
from earthformer.presets import EARTHFORMERS
from earthformer.transformer import Earthformer

PUBLISHED = ("earthformer_sevir", "earthformer_enso")
_INDEX = ".relative_position_index"
_ONE_STAGE = {
    "initial_encoder.conv_block.": "initial_encoder.conv_block_list.0.",
    "initial_encoder.patch_merge.": "initial_encoder.patch_merge_list.0.",
    "final_decoder.upsample.": "final_decoder.upsample_list.0.",
    "final_decoder.conv_block.": "final_decoder.conv_block_list.0.",
}


def load_published(name: str, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The published model of that name with the given weights, float32, in eval mode.

    Weights of another floating-point type are converted to float32.

    Raises:
        ValueError: unknown name; a key that is missing, surplus or of another shape.
    """
    if name not in PUBLISHED:
        raise ValueError(f"model {name!r} is not published: needed one of {', '.join(PUBLISHED)}")
    model = Earthformer(EARTHFORMERS[name])
    load_weights(model, state_dict)
    return model.eval()


def load_weights(model: Earthformer, state_dict: Mapping[str, Tensor]) -> None:
    """Fill `model` from a state dict with published key names, converted to the model's own type.

    The published models also store which row of the bias table each pair of tokens reads
    (`relative_position_index`); it must be there, and is compared with what the model works out itself.

    Raises:
        ValueError: a key that is missing, surplus or of another shape, or another index; all are named.
    """
    needed = model.state_dict()
    found: dict[str, Tensor] = {}
    faults: list[str] = []
    for published, tensor in state_dict.items():
        key = our_key(published)
        if key.endswith(_INDEX):
            faults += _index_faults(model, key.removesuffix(_INDEX), published, tensor)
        elif key not in needed:
            faults.append(f"{published} is surplus")
        elif tensor.shape != needed[key].shape:
            faults.append(f"{published} has shape {tuple(tensor.shape)}: needed {tuple(needed[key].shape)}")
        found[key] = tensor
    single = len(model.config.stem) == 1
    indices = [f"{name}{_INDEX}" for name, module in model.named_modules() if _table_size(module) is not None]
    faults += [f"{published_key(key, single)} is missing" for key in (*needed, *indices) if key not in found]
    if faults:
        raise ValueError("state dict does not fit: " + "; ".join(faults))
    model.load_state_dict({key: tensor for key, tensor in found.items() if key in needed})


def our_key(published: str) -> str:
    """Our name of a published key: a stem of one stage is the first of a list."""
    for theirs, ours in _ONE_STAGE.items():
        if published.startswith(theirs):
            return ours + published.removeprefix(theirs)
    return published


def published_key(key: str, single_stage: bool) -> str:
    """The published name of our key, in a model whose stem has a single stage or several."""
    for theirs, ours in _ONE_STAGE.items():
        if single_stage and key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def _index_faults(model: nn.Module, path: str, published: str, tensor: Tensor) -> list[str]:
    size = _table_size(dict(model.named_modules()).get(path))
    if size is None:
        return [f"{published} is surplus"]
    index = relative_position_index(size)
    if tensor.shape != index.shape:
        return [f"{published} has shape {tuple(tensor.shape)}: needed {tuple(index.shape)}"]
    return [] if torch.equal(tensor.cpu().long(), index) else [f"{published} holds another order of tokens"]


def _table_size(module: nn.Module | None) -> tuple[int, int, int] | None:
    """Extent of the bias table of an attention layer with relative positions; None of any other module."""
    size: tuple[int, int, int] | None = getattr(module, "table_size", None)
    return size if hasattr(module, "relative_position_bias_table") else None
