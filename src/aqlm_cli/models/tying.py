"""A head is the embeddings where files hold one tensor for both, whatever config.json says of it.

transformers ties what `tie_word_embeddings` names only where one of the two is not stored, or both are equal: a head
that was trained apart stays its own, with a warning.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import transformers
from torch import nn


def untie_stored(network: transformers.PreTrainedModel, stored: Collection[str]) -> None:
    """Give each parameter of a network without weights that is tied to another, while both are `stored`, a place of its
    own: so many numbers are in the files, and will be in those of the packed model."""
    for name, other in list(network.all_tied_weights_keys.items()):
        if _is_stored(name, stored) and _is_stored(other, stored):
            path, _, last = name.rpartition(".")
            own = nn.Parameter(torch.empty_like(network.get_parameter(name)), requires_grad=False)
            setattr(network.get_submodule(path), last, own)
            del network.all_tied_weights_keys[name]


def _is_stored(name: str, stored: Collection[str]) -> bool:
    """Files of some families leave out the first part of a name: "wte.weight" for "transformer.wte.weight"."""
    return name in stored or name.partition(".")[2] in stored
