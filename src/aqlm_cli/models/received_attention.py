"""The attention that each token receives, by which the inputs of the layers of keys and values are weighed.

An error of the values reaches the model through the probabilities A, [queries s, tokens t] of each head:

    sum_s |sum_t A_st dW x_t|^2  ~  sum_t w_t |dW x_t|^2        w_t = sum over heads and s of A_st^2

if the errors of two tokens have nothing in common. An error of the keys changes A_st by A_st (q_s . dW x_t), and so
counts by the same weights but for what queries and values add.

The first token of a sequence takes most of the attention of most queries (2309.17453) and is one of a thousand: where
all tokens count alike, error feedback makes up for the others at its expense. SmolLM2-135M, gptq int4g64 by 24
sequences, on 2 x 1,024 tokens of WikiText-2: the KL that all values cause alone falls from .142 to .007 by the weights,
that of the keys from .020 to .006. Weights by gradients of the loss (2505.07004) were no better there, and changed the
KL of no other kind of layer by a tenth; these need no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_cli.models.plain_linear import is_plain

NAMES = "k_proj", "v_proj"
"""Layers of keys and of values in the modules that call transformers' attention functions; those of most families."""

EVERY = 8
"""One query in so many takes part: the weights are sums over all of them."""

QUERIES = 64
"""Queries whose probabilities are in memory at once."""

TOLERANCE = 0.05
"""Relative distance between the output of the attention and that of the probabilities, which bfloat16 does not reach.

Beyond it the attention is not softmax(q k^T) v: it has a bias, a cap or a sink of its own.
"""


def receiving_layers(block: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """The paths in the block of the layers of keys and values, by the module that calls them."""
    found = {}
    for path, module in block.named_modules():
        children = dict(module.named_children())
        if all(name in children and is_plain(children[name]) for name in NAMES):
            found[module] = tuple(f"{path}.{name}" if path else name for name in NAMES)
    return found


@contextmanager
def received_attention(block: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Weights `[tokens]` by path in the block, with a mean of 1 in every sequence; each forward writes them again.

    A layer has none where its attention does not go through transformers' table of functions, or computes something
    else than softmax(q k^T) v, as the first forward tells.
    """
    from transformers import AttentionInterface  # imports transformers' networks, in a second

    layers, weights, strange = receiving_layers(block), dict[str, Tensor](), set[nn.Module]()
    table: Any = AttentionInterface
    before = dict(table._global_mapping)

    def watching(attention: Callable[..., Any]) -> Callable[..., Any]:
        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None = None,  # some families pass it by this name
            **options: Any,
        ) -> Any:
            output = attention(module, query, key, value, attention_mask, **options)
            if module in layers and module not in strange:
                received = _received(module, query, key, value, attention_mask, output[0], options)
                if received is None:
                    strange.add(module)
                else:
                    weights.update(dict.fromkeys(layers[module], received))
            return output

        return attend

    for name, attention in before.items():
        table.register(name, watching(attention))
    try:
        yield weights
    finally:
        table._global_mapping.update(before)


@torch.no_grad()
def _received(
    module: nn.Module,
    query: Tensor,  # [b, heads, L, d]
    key: Tensor,  # [b, key heads, L, d]
    value: Tensor,  # [b, key heads, L, e]
    mask: Tensor | None,  # broadcast to [b, heads, L, L]: true, or 0, where a query sees a token
    output: Tensor,  # [b, L, heads, e]
    options: dict[str, Any],
) -> Tensor | None:
    """The weights `[b * L]`; None where the probabilities do not give the output."""
    (batch, _, length, width), share = query.shape, query.shape[1] // key.shape[1]
    if key.shape[2] != length:
        return None
    scaling = options.get("scaling")
    query = query * (width**-0.5 if scaling is None else scaling)
    causal = mask is None and options.get("is_causal") is not False and getattr(module, "is_causal", True)
    chosen = torch.arange(length - 1, -1, -EVERY, device=query.device).flip(0)
    total = torch.zeros(batch, length, device=query.device)
    for part in chosen.split(QUERIES):
        seen = int(part[-1]) + 1 if causal else length
        keys = key[:, :, :seen].repeat_interleave(share, 1)
        scores = (query[:, :, part] @ keys.transpose(2, 3)).float()  # [b, heads, queries, seen]
        if causal:
            scores.masked_fill_(torch.arange(seen, device=part.device) > part[:, None], -torch.inf)
        elif mask is not None:
            rows = mask.expand(batch, mask.shape[1], length, length)[:, :, part]
            scores = scores.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else scores + rows
        probabilities = scores.softmax(3)
        total[:, :seen] += probabilities.square().sum((1, 2))
    values = value[:, :, :seen].repeat_interleave(share, 1).float()
    given, found = output[:, part].float(), (probabilities @ values).transpose(1, 2)
    if not bool((found - given).norm() <= TOLERANCE * given.norm()):
        return None
    return (total / total.mean(1, keepdim=True)).flatten()
