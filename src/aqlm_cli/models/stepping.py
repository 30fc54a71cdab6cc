"""Calls of a network with one part of a text after the other, with its cache of the parts before."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_cli.errors import FOREIGN_ERRORS, ModelError, shortened
from aqlm_cli.models.walk import family_of

CACHES = ("past_key_values", "cache_params")
"""Names of the cache in a network's arguments and output: keys and values, or the states of a recurrence."""


class Stepping:
    """`stepping(ids)` returns the logits after these tokens, which follow those of the calls before.

    A network without a cache, one that does not return it, or one that fails with it, runs on the whole text each time.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network
        self.cache: Any = None
        self._ids: Tensor | None = None
        self._caching = True
        parameters = inspect.signature(network.forward).parameters
        self._name = next((name for name in CACHES if name in parameters), None)
        # Some networks derive positions from the cache of their first layer, which may have no keys.
        self._places = "position_ids" in parameters

    def __call__(self, ids: Tensor) -> Tensor:
        """Ids `[b, T]` -> logits `[b, vocabulary]`; ModelError if the network's forward fails."""
        first = 0 if self._ids is None or self.cache is None else self._ids.shape[1]
        self._ids = ids if self._ids is None else torch.cat([self._ids, ids], 1)
        if self._caching:
            try:
                out = self._forward(self._ids[:, first:], first)
            except FOREIGN_ERRORS:  # Blt reads a field that its config lacks, xLSTM's states do not fit
                self._caching, self.cache = False, None
            else:
                self.cache = None if self._name is None else getattr(out, self._name, None)
                return self._last(out)
        try:
            return self._last(self._forward(self._ids, 0))
        except FOREIGN_ERRORS as error:
            reason = f"{type(error).__name__}: {shortened(str(error), 300)}"
            length = self._ids.shape[1]
            raise ModelError(f"{family_of(self.network)} fails on a text of {length} tokens ({reason})") from error

    def _forward(self, ids: Tensor, first: int) -> Any:
        """Run on ids `[b, T]`, the first of which has position `first`."""
        kept = {} if self._name is None or self.cache is None else {self._name: self.cache}
        if self._places:
            kept["position_ids"] = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
        return self.network(input_ids=ids, use_cache=self._caching, logits_to_keep=1, **kept)

    def _last(self, out: Any) -> Tensor:
        logits: Tensor = out.logits[:, -1]
        return logits
