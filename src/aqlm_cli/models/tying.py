"""Tied embeddings: a head is tied if the files hold one tensor for both, regardless of config.json.

With `tie_word_embeddings`, transformers ties only if one of the two is not stored, or both are equal: a head that was
trained separately stays separate, with a warning.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import transformers
from torch import nn


def untie_stored(network: transformers.PreTrainedModel, stored: Collection[str]) -> None:
    """Untie parameters of a network without weights if both of a tied pair are `stored`: the files hold two tensors,
    and those of the packed model will."""
    for name, other in list(network.all_tied_weights_keys.items()):
        if _is_stored(name, stored) and _is_stored(other, stored):
            path, _, last = name.rpartition(".")
            own = nn.Parameter(torch.empty_like(network.get_parameter(name)), requires_grad=False)
            setattr(network.get_submodule(path), last, own)
            del network.all_tied_weights_keys[name]


def _is_stored(name: str, stored: Collection[str]) -> bool:
    """True for a stored name; some files omit its first part: "wte.weight" for "transformer.wte.weight"."""
    return name in stored or name.partition(".")[2] in stored
