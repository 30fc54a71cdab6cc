"""How many tokens a model can read at once, told by its network and not by its family.

Some networks look a position up in a table: learnt embeddings, or sines, cosines, biases and masks computed when the
network is made. More tokens than the table has rows are an error in the middle of a forward pass. Rotary embeddings are
computed as they are needed, and go on beyond the length that a model was trained for.

What config.json calls the length does not tell the two apart, nor how many rows a table has (RoBERTa's begins at the
padding token). So a small copy of the network, of the same number of positions, is tried.
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
"""What families call the length in config.json, the name that decides first where there are several."""

FEW = 4
"""Tokens that any network reads, or the copy is none of it."""

LARGEST = 2**27
"""Parameters of a copy."""

MOST_TRIED = 2**13
"""Tokens: scores of four heads for so many take 1 GB. A longer table is believed to be as long as config.json says."""


def refuse_too_long(source: ModelSource, tokens: int, lower: str) -> None:
    """ModelError where the model cannot read so many tokens at once; `lower` names what has to be given less.

    No weight is read.
    """
    said = model_config(source)
    if tokens <= (stated_length(said) or ("", 0))[1] // 2 or "rope_theta" in said or said.get("rope_parameters"):
        return  # without transformers' networks, which the compiled decoder does not need
    config = load_config(source)
    longest = _longest(config, tokens, source)
    if longest is not None:
        raise too_long(source, longest, tokens, lower, stated_length(config.to_dict()))


def refuse_longer_than_stated(source: ModelSource, tokens: int, lower: str) -> None:
    """The same, and where config.json names a smaller length: what is measured beyond it says nothing of a model."""
    stated = stated_length(model_config(source))
    if stated is not None and tokens > stated[1]:
        raise too_long(source, stated[1], tokens, lower, stated)
    refuse_too_long(source, tokens, lower)


def too_long(source: ModelSource, longest: int, tokens: int, lower: str, stated: tuple[str, int] | None) -> ModelError:
    where = "" if stated is None else f" (config.json: {stated[0]} {stated[1]})"
    return ModelError(f"{source.name} reads {longest} tokens, not {tokens}; lower {lower}{where}")


def stated_length(said: dict[str, Any]) -> tuple[str, int] | None:
    """The name of the length in these settings of a model, and its value."""
    text = said.get("text_config")
    both = {**(text if isinstance(text, dict) else {}), **said}
    return next(((name, both[name]) for name in NAMES if type(both.get(name)) is int and both[name] > 0), None)


def _longest(config: transformers.PreTrainedConfig, tokens: int, source: ModelSource) -> int | None:
    """The most tokens, fewer than `tokens`, that the network can read; None where it reads so many."""
    name_and_length = stated_length(config.to_dict())
    stated = None if name_and_length is None or name_and_length[1] >= tokens else name_and_length[1]
    for small in _copies(config):
        try:
            network = _made(small, source)
        except Exception:  # these widths do not go together in this family
            continue
        if network is None:
            return None
        if _reads(network, FEW):
            longest = _longest_read(network, min(tokens, MOST_TRIED))
            return stated if longest is None and (stated or 0) >= MOST_TRIED else longest
    return stated  # there is nothing better to go by


def _longest_read(network: nn.Module, tokens: int) -> int | None:
    """Doubled, and never more than needed: a network may have masks of the square of it."""
    works = fails = FEW
    while works == fails < tokens:
        fails = min(2 * works, tokens)
        works = fails if _reads(network, fails) else works
    while fails - works > 1:
        middle = (works + fails) // 2
        works, fails = (middle, fails) if _reads(network, middle) else (works, middle)
    return works if works < fails else None


def _copies(config: transformers.PreTrainedConfig) -> Iterator[transformers.PreTrainedConfig]:
    """Smaller and smaller changes: all that transformers names alike in every family, one block of it, or nothing."""
    for narrow, short in ((True, True), (True, False), (False, True), (False, False)):
        small: Any = copy.deepcopy(config)
        heads, width = getattr(small, "num_attention_heads", None), getattr(small, "hidden_size", None)
        if narrow and type(heads) is int and type(width) is int and heads > FEW and heads % FEW == 0:
            small.num_attention_heads, small.hidden_size = FEW, width // heads * FEW  # a head keeps its size
        if short and type(getattr(small, "num_hidden_layers", None)) is int:
            small.num_hidden_layers = 1
        yield small


def _made(config: transformers.PreTrainedConfig, source: ModelSource) -> nn.Module | None:
    """The network with random numbers; None where its positions are rotary. Raises ModelError if it is large."""
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
    """Whether it computes logits of so many tokens, none of which is padding."""
    padding = getattr(network.config, "pad_token_id", None)
    ids = torch.full((1, tokens), 0 if padding != 0 else 1)
    try:
        with quiet():
            network(input_ids=ids, use_cache=False)
    except Exception:  # of any kind: an index outside of the table, or shapes that do not fit
        return False
    return True
