"""The longest input of a model, determined by its network and not by its model type.

Some networks look a position up in a table: learnt embeddings, or sines, cosines, biases and masks computed when the
network is made. More tokens than the table has rows are an error in the middle of a forward pass. Rotary embeddings are
computed as they are needed, also beyond the length that a model was trained for.

The length in config.json does not tell the two apart, nor how many rows a table has (RoBERTa's starts at the padding
token). So a small copy of the network, with the same number of positions, is tried.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from aqlm_cli.errors import ModelError
from aqlm_cli.models.blocks import count_parameters
from aqlm_cli.models.loading import load_config, quiet, without_weights
from aqlm_cli.models.source import ModelSource, model_config
from aqlm_cli.models.untrusted_config import MOST_PARTS, at_most

NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_target_positions",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
)
"""Names of the length in config.json; the first one that is set counts."""

FEW = 4
"""Tokens that any network accepts; if the copy does not, it is not a valid copy."""

LARGEST = 2**27
"""Limit for the parameters of a copy."""

MOST_TRIED = 2**13
"""Tokens tried at most: scores of four heads then take 1 GB. Beyond, the length in config.json is taken as true."""


def refuse_too_long(source: ModelSource, tokens: int, lower: str) -> None:
    """Raise ModelError if the model cannot take so many tokens at once; `lower` names the setting to lower.

    No weight is read.
    """
    settings = model_config(source)
    rotary = "rope_theta" in settings or settings.get("rope_parameters")
    if tokens <= (stated_length(settings) or ("", 0))[1] // 2 or rotary:
        return  # without transformers' networks, which the compiled decoder does not need
    config = load_config(source)
    longest = _longest(config, tokens, source)
    if longest is not None:
        raise too_long(source, longest, tokens, lower, stated_length(config.to_dict()))


def refuse_longer_than_stated(source: ModelSource, tokens: int, lower: str) -> None:
    """Raise ModelError also if config.json names a smaller length: results beyond it say nothing about a model."""
    stated = stated_length(model_config(source))
    if stated is not None and tokens > stated[1]:
        raise too_long(source, stated[1], tokens, lower, stated)
    refuse_too_long(source, tokens, lower)


def too_long(source: ModelSource, longest: int, tokens: int, lower: str, stated: tuple[str, int] | None) -> ModelError:
    where = "" if stated is None else f" (config.json: {stated[0]} {stated[1]})"
    return ModelError(f"{source.name} accepts {longest} tokens, not {tokens}; lower {lower}{where}")


def stated_length(settings: dict[str, Any]) -> tuple[str, int] | None:
    """The name of the length in these settings of a model, and its value."""
    text = settings.get("text_config")
    both = {**(text if isinstance(text, dict) else {}), **settings}
    return next(((name, both[name]) for name in NAMES if type(both.get(name)) is int and both[name] > 0), None)


def _longest(config: transformers.PreTrainedConfig, tokens: int, source: ModelSource) -> int | None:
    """The most tokens, fewer than `tokens`, that the network accepts; None if it accepts `tokens`."""
    name_and_length = stated_length(config.to_dict())
    stated = None if name_and_length is None or name_and_length[1] >= tokens else name_and_length[1]
    for small in _copies(config):
        try:
            network = _made(small, source)
        except Exception:  # these widths do not fit together in this model type
            continue
        if network is None:
            return None
        if _reads(network, FEW):
            longest = _longest_read(network, min(tokens, MOST_TRIED))
            return stated if longest is None and (stated or 0) >= MOST_TRIED else longest
    return stated  # no better source


def _longest_read(network: nn.Module, tokens: int) -> int | None:
    """Search by doubling, never beyond what is needed: a network may have masks of the square of the length."""
    works = fails = FEW
    while works == fails < tokens:
        fails = min(2 * works, tokens)
        works = fails if _reads(network, fails) else works
    while fails - works > 1:
        middle = (works + fails) // 2
        works, fails = (middle, fails) if _reads(network, middle) else (works, middle)
    return works if works < fails else None


def _copies(config: transformers.PreTrainedConfig) -> Iterator[transformers.PreTrainedConfig]:
    """Copies of the config, ever less reduced: fewer heads and one block, fewer heads, one block, unchanged."""
    for narrow, short in ((True, True), (True, False), (False, True), (False, False)):
        small: Any = copy.deepcopy(config)
        heads, width = getattr(small, "num_attention_heads", None), getattr(small, "hidden_size", None)
        if narrow and type(heads) is int and type(width) is int and heads > FEW and heads % FEW == 0:
            small.num_attention_heads, small.hidden_size = FEW, width // heads * FEW  # a head keeps its size
        if short and type(getattr(small, "num_hidden_layers", None)) is int:
            small.num_hidden_layers = 1
        yield small


def _made(config: transformers.PreTrainedConfig, source: ModelSource) -> nn.Module | None:
    """The network with random weights; None if its positions are rotary. Raises ModelError if it is large."""
    with quiet(), at_most(MOST_PARTS, source.name):
        empty = without_weights(config, source.trust_remote_code)
        if any(name.endswith("inv_freq") for name, _ in empty.named_buffers()):
            return None
        if count_parameters(empty) > LARGEST:
            raise ModelError(f"{source.name}: too large to be tried")
        with torch.random.fork_rng():
            network: nn.Module = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=source.trust_remote_code
            )
    return network.eval()


@torch.no_grad()
def _reads(network: Any, tokens: int) -> bool:
    """True if the network computes logits for so many tokens, none of which is padding."""
    padding = getattr(network.config, "pad_token_id", None)
    ids = torch.full((1, tokens), 0 if padding != 0 else 1)
    try:
        with quiet():
            network(input_ids=ids, use_cache=False)
    except Exception:  # an index outside of the table, shapes that do not fit, or any other error
        return False
    return True
