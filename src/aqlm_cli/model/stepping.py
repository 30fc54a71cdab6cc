"""A network that reads a text part by part, and keeps what it needs of the parts before."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

CACHES = ("past_key_values", "cache_params")
"""By what name a family takes and gives what it keeps: keys and values, or the states of a recurrence."""


class Stepping:
    """`stepping(ids)` gives the logits after these tokens, which follow those of the calls before.

    A family that keeps nothing, or nothing that it gives away, reads the whole text again each time.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network
        self.cache: Any = None
        self._ids: Tensor | None = None
        parameters = inspect.signature(network.forward).parameters
        self._name = next((name for name in CACHES if name in parameters), None)
        # Some families find the place of a token by the cache of their first layer, which may have no keys.
        self._places = "position_ids" in parameters
        self._caching = True

    def __call__(self, ids: Tensor) -> Tensor:
        """From `[b, T]` to `[b, vocabulary]`."""
        before = 0 if self._ids is None else self._ids.shape[1]
        self._ids = ids if self._ids is None else torch.cat([self._ids, ids], 1)
        read, first = (ids, before) if self.cache is not None else (self._ids, 0)
        kept = {} if self._name is None or self.cache is None else {self._name: self.cache}
        if self._places:
            kept["position_ids"] = torch.arange(first, first + read.shape[1], device=read.device)[None]
        out = self._forward(read, kept)
        self.cache = None if self._name is None else getattr(out, self._name, None)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _forward(self, ids: Tensor, kept: dict[str, Any]) -> Any:
        try:
            return self.network(input_ids=ids, use_cache=self._caching, logits_to_keep=1, **kept)
        except AttributeError:  # Blt asks its config for what a cache needs and it has not got
            if not self._caching or self.cache is not None:
                raise
            self._caching = False
            return self.network(input_ids=ids, use_cache=False, logits_to_keep=1, **kept)
