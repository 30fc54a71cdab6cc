"""Texts sampled from a model, in batches, as in LLM-QAT (arXiv 2305.17888).

The first token is drawn evenly from all text tokens, the next few are the likeliest ones, all others are drawn from the
model's distribution at temperature 1. A text continues after an end-of-text token, so that all have the same length.

Shapes: b texts, L tokens of a text, p tokens of the opening, T tokens so far, T' new tokens, h query heads, g query
heads per key head, e features of a key, v features of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from aqlm_cli.models.attention import attend_by, torchs_attention
from aqlm_cli.models.loading import load_network, load_tokenizer
from aqlm_cli.models.source import ModelSource
from aqlm_cli.models.stepping import Stepping

LIKELIEST = 4
"""Greedy tokens after the first, before sampling starts; the paper has 3 to 5."""

CAPACITY_STEP = 64
"""Positions by which a tensor of keys or values grows at a time."""

ATTENTION = "aqlm_new_token"
"""Name of `attend` in transformers."""

UNDERSTOOD = {"dropout", "is_causal", "position_ids", "sliding_window", "use_cache"}
"""Arguments of attention that change nothing for one new token, or that cache and mask handle."""


@dataclass(frozen=True, eq=False)
class Sampling:
    network: nn.Module
    first_tokens: Tensor  # ids that a text may start with

    @torch.inference_mode()
    def texts(self, chances: Tensor, written: Callable[[int], None], opening: Sequence[int] = ()) -> Tensor:
        """Token ids `[b, L]`, each text drawn by its own row of `chances` `[b, L]`, float64 and uniform in [0, 1).

        Each is `opening`, of p tokens, and L - p tokens that follow it. `written` is called with the number of new
        tokens after each step.
        """
        model: Any = self.network
        chances = chances[:, len(opening) :]
        tokens = self.first_tokens[(chances[:, 0] * len(self.first_tokens)).long()]  # [b]
        given = torch.tensor(opening, dtype=tokens.dtype, device=tokens.device).repeat(len(tokens), 1)  # [b, p]
        texts, stepping = [*given.unbind(1), tokens], Stepping(model)
        read = torch.stack(texts, 1)
        written(read.numel())
        for place in range(1, chances.shape[1]):
            logits, cache = stepping(read), stepping.cache
            if place == 1 and isinstance(cache, DynamicCache) and model.config._attn_implementation == ATTENTION:
                layers = cache.layers
                cache.layers = [GrowingLayer.of(layer) if type(layer) is DynamicLayer else layer for layer in layers]
            tokens = logits.argmax(1) if place <= LIKELIEST else _drawn(logits, chances[:, place])
            texts.append(tokens)
            read = tokens[:, None]
            written(len(tokens))
        return torch.stack(texts, 1)


def open_sampling(source: ModelSource, dtype: torch.dtype, device: str | torch.device = "cpu") -> Sampling:
    """Sampling from a model on this disk, with weights and matmuls in `dtype`."""
    network = load_network(source, dtype, device)
    attend_by(network, ATTENTION, attend)
    return Sampling(network, _text_tokens(source).to(device))


def _text_tokens(source: ModelSource) -> Tensor:
    """Ids of all tokens but special ones, such as the end-of-text token."""
    tokenizer: Any = load_tokenizer(source)
    marks = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return torch.tensor(sorted({*tokenizer.get_vocab().values()} - marks - {*tokenizer.all_special_ids}))


def _drawn(logits: Tensor, chances: Tensor) -> Tensor:
    """The first token of each row `[b, vocabulary]` at which the cumulative probability exceeds its chance `[b]`."""
    # Summed in float64: in float32 the many rare tokens would add up to another value.
    sums = logits.softmax(1, dtype=torch.float32).cumsum(1, dtype=torch.float64)
    return torch.searchsorted(sums, chances[:, None] * sums[:, -1:], right=True)[:, 0]


# ---------------------------------------------------------------------------------------------- one new token at a time


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer, `[b, h / g, T, e]`, with spare capacity.

    transformers' own layer copies all of them for every new token.
    """

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        growing = cls()
        vars(growing).update(vars(layer))
        return growing

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None  # of the first token
        self.keys, self.values = _appended(self.keys, key_states), _appended(self.values, value_states)
        return self.keys, self.values


def _appended(states: Tensor, new: Tensor) -> Tensor:
    """`[b, h, T, e]` and `[b, h, 1, e]` together, as a view of a tensor with spare capacity."""
    whole, length = _whole(states), states.shape[2]
    if length == whole.shape[2]:
        whole = F.pad(whole, (0, 0, 0, CAPACITY_STEP))
    whole[:, :, length] = new[:, :, 0]
    longer: Any = whole[:, :, : length + 1]
    longer.whole = whole
    appended: Tensor = longer
    return appended


def _whole(states: Tensor) -> Tensor:
    """The tensor with its spare capacity, which is zero; then the rows of all heads are contiguous."""
    whole: Tensor = getattr(states, "whole", states)
    return whole


def attend(
    module: nn.Module,
    query: Tensor,  # [b, h, T', e]
    key: Tensor,  # [b, h / g, T, e]
    value: Tensor,  # [b, h / g, T, v]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # [b, T', h, v]
    """softmax(q k^T scaling) v of one new token a text, for the g query heads of a key head together.

    torch's own is slow for a single query in bfloat16 on a CPU: 5.7 ms where this takes 0.3, for 32 texts of 256 tokens
    with the heads of SmolLM2-135M on one core of an AMD EPYC. It is the fallback for a mask, several queries, or
    arguments outside of UNDERSTOOD.
    """
    if attention_mask is not None or query.shape[2] != 1 or not options.keys() <= UNDERSTOOD:
        return torchs_attention(module, query, key, value, attention_mask, scaling=scaling, **options)
    batch, heads, _, size = query.shape
    together = query.reshape(batch, key.shape[1], -1, size)  # [b, h / g, g, e]
    # With the spare capacity, because a matmul would copy keys and values that are not contiguous.
    scores = together @ _whole(key).transpose(2, 3) * (size**-0.5 if scaling is None else scaling)  # [b, h / g, g, T+]
    scores[..., key.shape[2] :] = -torch.inf
    return (scores.softmax(3) @ _whole(value)).reshape(batch, 1, heads, -1), None
