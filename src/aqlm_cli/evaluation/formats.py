"""Formats of activations and of the cache at evaluation time: values are rounded, and computed with as before.

- int8t: s = max |x| / 127 of each token, x^ = s clip(rnd(x / s), -127, 127);
- bfp{w}g{g}, with M = w - 1 bits of a mantissa and e = ceil(log2 max |x|) of each block of g neighbouring features:
  x^ = sign(x) 2^e clip(rnd(|x| 2^(M-e)), 0, 2^M - 1) / 2^M, with e in -128 .. 127 (block float, arXiv 2310.05079).

rnd is half to even. Tokens and blocks of zeros stay zero. What is not finite becomes NaN, so that it is found.
Rounding is in float32, or in the type of x where that is wider. Scales of int8t are not rounded.

Shapes: b sequences, L tokens, h key heads, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from aqlm_cli.errors import ModelError, UsageError
from aqlm_cli.events import Emit, Noted
from aqlm_cli.formatting import counted
from aqlm_cli.models.attention import attend_to, attention_layers
from aqlm_cli.models.blocks import find_blocks, linears, unfuse
from aqlm_cli.spec.formats import BlockFloat, Formats, parse_activations
from aqlm_kernels import quantized_layers

Format: TypeAlias = Callable[[Tensor], Tensor]
"""Values `[..., features]` -> the nearest that the format has, in the same type."""

LEVELS = 127  # of int8, on either side of zero
EXPONENTS = -128, 127  # of 8 bits


def int8_per_token(x: Tensor) -> Tensor:
    """x `[..., features]` in symmetric int8 with one scale for each token."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = values.abs().amax(-1, keepdim=True) / LEVELS
    levels = (values / scale).round().clamp_(-LEVELS, LEVELS)
    return (levels * scale).masked_fill_(scale == 0, 0).to(x.dtype)


def block_float(x: Tensor, block: BlockFloat) -> Tensor:
    """x `[..., features]` in blocks along the features, which the block size must divide."""
    values: Tensor = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, block.group))
    largest = values.abs().amax(-1, keepdim=True)
    fraction, exponent = torch.frexp(largest)  # largest = fraction 2^exponent with 0.5 <= fraction < 1
    exponent = (exponent - (fraction == 0.5).to(exponent.dtype)).clamp_(*EXPONENTS)
    step = torch.ldexp(torch.ones_like(largest), exponent - block.mantissa)
    step = torch.where(largest.isfinite(), step, torch.nan)
    most = 2**block.mantissa - 1
    return (values / step).round_().clamp_(-most, most).mul_(step).flatten(-2).to(x.dtype)


def activation_format(word: str) -> Format:
    """The format of activations that a word names. UsageError for a word that names none."""
    block = parse_activations(word)
    return int8_per_token if block is None else partial(block_float, block=block)


@contextmanager
def applied(network: nn.Module, formats: Formats, ids: Tensor, emit: Emit) -> Iterator[None]:
    """Let the network compute in these formats while open; `ids` `[L]` are the tokens that order its keys."""
    with ExitStack() as stack:
        if formats.cache is not None:
            block = BlockFloat.parse(formats.cache)
            stack.enter_context(rounded_cache(network, block, ids if formats.sort_keys else None, emit))
        if formats.activations is not None:
            stack.enter_context(rounded_inputs(network, formats.activations, emit))
        yield


# ---------------------------------------------------------------------------------------------------------- activations


@contextmanager
def rounded_inputs(network: nn.Module, word: str, emit: Emit) -> Iterator[None]:
    """Round the inputs of every linear layer in the blocks, quantized or not, while open.

    Fused experts are taken apart, which changes nothing that they compute, and stay so. Raises UsageError where a block
    of the format does not divide the inputs of a layer, and ModelError where there is no such layer.
    """
    rounded, layers = activation_format(word), linear_layers(network)
    if not layers:
        raise ModelError(f"{type(network).__name__} has no linear layers in its blocks; leave --activations out")
    block = parse_activations(word)
    for path, layer in layers.items():
        if block is not None and layer.in_features % block.group:
            raise UsageError(f"{word}: {path} has {layer.in_features} inputs, no multiple of the block size; change it")
    emit(Noted(f"inputs of {counted(len(layers), 'linear layer')} are rounded to {word}"))

    def enter(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return rounded(arguments[0]), *arguments[1:]

    hooks = [layer.register_forward_pre_hook(enter) for layer in layers.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def linear_layers(network: nn.Module) -> dict[str, Any]:
    """Every linear layer in the blocks by path, quantized or not; fused experts are taken apart in place."""
    blocks = find_blocks(network)
    layers: dict[str, Any] = {}
    for path, block in zip(blocks.paths, blocks.modules, strict=True):
        unfuse(block)
        layers |= {**linears(block, path), **quantized_layers(block, path)}
    return {path: layer for path, layer in layers.items() if hasattr(layer, "in_features")}  # no tables of embeddings


# ---------------------------------------------------------------------------------------------------------------- cache


@contextmanager
def rounded_cache(network: nn.Module, block: BlockFloat, sort_by: Tensor | None, emit: Emit) -> Iterator[None]:
    """Let attention read keys, after rotation, and values rounded in blocks inside a head, while open.

    With tokens `sort_by` `[L]` the blocks of keys are made in the order of `key_orders` (K-sort, arXiv 2403.20137).
    Keys return from it after rounding: a query in the same order has the same products, but for the order of the sum.
    Raises UsageError where the block size does not divide a head, and ModelError where attention cannot be changed.
    """
    names = attention_layers(network)
    orders = {} if sort_by is None else key_orders(network, sort_by)

    def change(module: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for kind, states in (("keys", keys), ("values", values)):
            if states.shape[-1] % block.group:
                raise UsageError(
                    f"{block}: {names[module]} has heads of {states.shape[-1]} features in its {kind}, no multiple of "
                    "the block size; change it"
                )
        order = orders.get(module)
        rounded = block_float(keys, block) if order is None else in_order(keys, order, block)
        return rounded, block_float(values, block)

    emit(Noted(f"keys and values of {counted(len(names), 'attention layer')} are rounded to {block}"))
    with attend_to(network, change):
        yield


def in_order(keys: Tensor, order: Tensor, block: BlockFloat) -> Tensor:
    """Keys `[b, h, L, d]` rounded in blocks of the features in the order `[h, d]` of their head, in their own order."""
    index = order[None, :, None].expand_as(keys)
    rounded = block_float(keys.gather(3, index), block)
    return torch.empty_like(keys).scatter_(3, index, rounded)


@torch.inference_mode()
def key_orders(network: nn.Module, ids: Tensor) -> dict[nn.Module, Tensor]:
    """The order `[h, d]` of the features of each key head, by attention layer: by falling RMS of the rotated keys.

    They are those of the tokens `ids` `[L]`, read together; where features are equal the first comes first.
    """
    squares: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = keys.double().square().sum((0, 2))  # [h, d]
        squares[module] = squares[module] + found if module in squares else found
        return keys, values

    model: Any = network
    with attend_to(network, watch):
        model(input_ids=ids[None], use_cache=False)
    return {module: found.argsort(dim=1, descending=True, stable=True) for module, found in squares.items()}
