"""Bytes that one token reads while decoding, by the part of the model: what memory bounds, and what is left to shrink.

Every matrix is read once, but of embeddings one row, and of experts those that the router selects. A table that is the
head too is read whole by the head, and its row with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from aqlm_cli.spec.evaluate import Head
from aqlm_kernels import CompressedEmbedding, QuantizedLayer

ATTENTION, MLP, NORMS, ROW, HEAD, OTHER = "attention", "mlp", "norms", "embedding_row", "head", "other"
PARTS = (ATTENTION, MLP, NORMS, ROW, HEAD, OTHER)


def bytes_by_part(network: Any, tensors: Mapping[str, int], head: Head = "exact") -> dict[str, int]:
    """Bytes of every part, given those of all tensors by name: of a parameter, or of a quantized layer by its path.

    `head` int8: the lm_head is read in 8 bits, whatever type it comes in.
    """
    embedding, last = network.get_input_embeddings(), network.get_output_embeddings()
    tied, experts = _tied(embedding, last), _share_of_experts(network.config)
    tables = {ROW: _path(network, embedding), HEAD: _path(network, last)}
    parts = dict.fromkeys(PARTS, 0)
    for name, size in tensors.items():
        part = next((part for part, path in tables.items() if path and _inside(name, path)), None)
        if part is None:
            parts[_part_of(name)] += round(size * experts) if ".experts." in name else size
        elif part == HEAD or tied:
            parts[HEAD] += size
        else:
            rows = embedding.num_embeddings if hasattr(embedding, "num_embeddings") else len(embedding.weight)
            parts[ROW] += -(-size // rows)
    if head == "int8":
        parts[HEAD] = int(last.weight.numel())
    return parts


def _tied(embedding: Any, head: Any) -> bool:
    if isinstance(embedding, CompressedEmbedding) or isinstance(head, QuantizedLayer):
        return head is getattr(embedding, "table", None)
    return getattr(head, "weight", None) is embedding.weight


def _share_of_experts(config: Any) -> float:
    """Share of the experts that one token uses; 1 where the config does not say it."""
    used = getattr(config, "num_experts_per_tok", None)
    numbers = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    known = [number for number in numbers if isinstance(number, int) and number > 0]
    return min(1.0, used / known[0]) if isinstance(used, int) and known else 1.0


def _path(network: nn.Module, module: nn.Module | None) -> str | None:
    return next((path for path, other in network.named_modules() if other is module), None)


def _inside(name: str, path: str) -> bool:
    """True for the name of a tensor at the path; some files omit its first part."""
    return any(name == place or name.startswith(f"{place}.") for place in (path, path.partition(".")[2]) if place)


def _part_of(name: str) -> str:
    """Part of a tensor in a block or behind the last, by the words that all families use."""
    modules = name.lower().split(".")
    if any("norm" in module or module.startswith("ln_") for module in modules):
        return NORMS
    if any("attn" in module or "attention" in module for module in modules):
        return ATTENTION
    return MLP if any(module.isdigit() for module in modules) else OTHER
