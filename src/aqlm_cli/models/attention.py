"""Causal attention for training on a CPU: three bfloat16 matmuls and a softmax for each block of queries.

torch's flash attention works in float32 between its matmuls there; for heads of 64 and sequences of 512 this takes 0.7
of its time, forward and backward. Scores are rounded to bfloat16, as everything else between two matmuls is.
Keys that no query of a block sees are left out. Probabilities are computed again in the backward, so that memory stays
linear in the sequence length.

Shapes: b sequences, L tokens, h query heads, d features of a query or key, e features of a value; n = b * key heads,
r query heads share one key head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from aqlm_cli.errors import ModelError
from aqlm_cli.models.loading import quiet

NAME = "blockwise"

Attention: TypeAlias = Callable[..., tuple[Tensor, None]]
"""Signature in transformers: module, queries, keys, values and a mask -> the output `[b, L, heads, e]`."""

Change: TypeAlias = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""An attention layer, its keys `[b, key heads, L, d]` after rotation and its values `[b, key heads, L, e]` -> keys and
values of the same shapes."""

QUERIES = 64  # queries in a block


class BlockwiseAttention(torch.autograd.Function):
    """softmax(q k^T) v, causal, for q `[n, r, L, d]`, k `[n, L, d]` and v `[n, L, e]`: `[n, r, L, e]`.

    r query heads share one key head; n counts the key heads of all sequences.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[2])
        for block in _blocks(q.shape[2]):
            p = _probabilities(q, k, block)
            out[:, :, block] = (p @ v[:, : block.stop]).view_as(out[:, :, block])
        ctx.save_for_backward(q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k).float(), torch.zeros_like(v).float()
        for block in _blocks(q.shape[2]):
            seen = slice(block.stop)
            p, do = _probabilities(q, k, block), outer[:, :, block].flatten(1, 2)  # [n, r * queries, ...]
            dv[:, seen] += p.transpose(1, 2) @ do
            ds = torch._softmax_backward_data(do @ v[:, seen].transpose(1, 2), p, 2, p.dtype)
            dk[:, seen] += ds.transpose(1, 2) @ q[:, :, block].flatten(1, 2)
            dq[:, :, block] = (ds @ k[:, seen]).view_as(dq[:, :, block])
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _blocks(length: int) -> list[slice]:
    return [slice(first, min(first + QUERIES, length)) for first in range(0, length, QUERIES)]


def _probabilities(q: Tensor, k: Tensor, block: slice) -> Tensor:
    """Probabilities `[n, r * queries, keys]` of the block's queries for all keys that any of them sees."""
    queries = block.stop - block.start
    scores = q[:, :, block].flatten(1, 2) @ k[:, : block.stop].transpose(1, 2)
    later = torch.ones(queries, queries, dtype=torch.bool).triu(1)
    scores.view(len(q), -1, queries, block.stop)[..., block].masked_fill_(later, -torch.inf)
    return torch.softmax(scores, 2)


def _attention(
    module: nn.Module,
    query: Tensor,  # [b, heads, L, d]
    key: Tensor,  # [b, key heads, L, d]
    value: Tensor,  # [b, key heads, L, e]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Blockwise attention where it applies; torch's own elsewhere."""
    device, causal = query.device.type, getattr(module, "is_causal", True) and rest.get("is_causal") in (None, True)
    plain = causal and attention_mask is None and dropout == 0 and rest.get("position_bias") is None
    if not (plain and device == "cpu" and torch.is_autocast_enabled(device) and query.shape[2] == key.shape[2] > 1):
        options = {"dropout": dropout, "scaling": scaling, **rest}
        return torchs_attention(module, query, key, value, attention_mask, **options)
    dtype, (batch, heads, length, width) = torch.get_autocast_dtype(device), query.shape
    queries = query * (width**-0.5 if scaling is None else scaling)
    # The mean of all keys adds the same to all scores of a query; without it they keep their last bits in bfloat16.
    keys = key - key.detach().float().mean(2, keepdim=True)
    grouped = queries.to(dtype).reshape(batch * key.shape[1], -1, length, width)
    out: Tensor = BlockwiseAttention.apply(  # type: ignore[no-untyped-call]
        grouped, keys.to(dtype).flatten(0, 1), value.to(dtype).flatten(0, 1)
    )
    return out.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def attend_blockwise(network: nn.Module) -> None:
    """Use blockwise attention in a network that would use torch's and lets it be changed; change no other."""
    attend_by(network, NAME, _attention)


def attend_by(network: nn.Module, name: str, attention: Attention) -> None:
    """Use `attention` in such a network, registered in transformers by this name, with the masks of torch's."""
    from transformers import AttentionInterface, AttentionMaskInterface  # imports transformers' networks, in a second
    from transformers.masking_utils import sdpa_mask

    model: Any = network
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, sdpa_mask)
        with quiet():
            model.set_attn_implementation(name)


def torchs_attention(*tensors: Any, **options: Any) -> tuple[Tensor, None]:
    """Call torch's attention, the fallback of the others."""
    from transformers import AttentionInterface

    torchs: Any = AttentionInterface()["sdpa"]
    output: tuple[Tensor, None] = torchs(*tensors, **options)
    return output


# ------------------------------------------------------------------------------------------------ other keys and values


@contextmanager
def attend_to(network: nn.Module, change: Change) -> Iterator[None]:
    """Let attention of the network read what `change` returns in the place of keys and values, while open.

    Layers that do not go through transformers' table of attention functions stay as they are: see `attention_layers`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    model: Any = network
    before, name = model.config._attn_implementation, f"aqlm_{id(change)}"
    functions: Any = AttentionInterface
    masks: Any = AttentionMaskInterface

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        own = _eager(module) if before == "eager" else functions()[before]
        return own(module, query, *change(module, key, value), *rest, **options)

    functions.register(name, attention)
    masks.register(name, masks()[before])
    try:
        with quiet():
            model.set_attn_implementation(name)
        yield
    finally:
        with quiet():
            model.set_attn_implementation(before)
        for table in (functions, masks):  # which have no method that takes an entry out
            del table._global_mapping[name]


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The attention function of a layer's own module, which is in no table."""
    forward: Any = inspect.unwrap(type(module).forward)
    found: Callable[..., Any] | None = forward.__globals__.get("eager_attention_forward")
    if found is None:
        raise ModelError(f"{type(module).__name__} has an attention of its own, whose cache cannot be changed")
    return found


@torch.no_grad()
def attention_layers(network: nn.Module) -> dict[nn.Module, str]:
    """Layers whose keys and values `attend_to` changes, with their paths. ModelError where there is none."""
    called: set[nn.Module] = set()

    def watch(module: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        called.add(module)
        return keys, values

    model: Any = network
    with attend_to(network, watch):
        model(input_ids=torch.arange(4, device=model.device)[None], use_cache=False)
    if not called:
        raise ModelError(
            f"attention of {type(network).__name__} does not go through transformers' table of attention functions, so "
            "that its keys and values cannot be changed; leave --cache out"
        )
    return {module: path for path, module in network.named_modules() if module in called}
