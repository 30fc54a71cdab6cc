"""Losses of a model on the sequences of a text, and its divergence from another one that reads them beside it.

The logits of a sequence never exist as a whole: head, softmax and sums go through its tokens in chunks. For two models
that is done for the same chunk one after the other, so that nothing of either is kept but a few numbers a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aqlm_cli.errors import ModelError
from aqlm_cli.evaluation.protocols import ScoredSequence
from aqlm_cli.models import halves_of

ROWS_PER_CHUNK = 128
"""Rows of logits that exist at a time: with a vocabulary of 50,000 they take 25 MB in float32."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Negative log likelihoods of every scored token of a sequence, in nats, by each model. With two models, the first
    being the base, also KL(base || other), and whether both hold the same token for the likeliest."""

    losses: tuple[Tensor, ...]  # [m] float64 each
    divergence: Tensor | None = None  # [m] float64
    agreed: Tensor | None = None  # [m] bool


class Reader:
    """A network that tells the logits of some positions of a sequence in chunks."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self._halves: Any = None
        with suppress(ModelError):  # a head that is not separate gives all logits at once
            self._halves = halves_of(network)

    def chunks(self, ids: Tensor, first: int) -> Iterator[Tensor]:
        """The logits `[chunk, vocabulary]` of the tokens `ids[first:]`, each given those before it."""
        yield from self._rows(ids, slice(first - 1, -1))

    def following(self, ids: Tensor, first: int) -> Iterator[Tensor]:
        """The logits `[chunk, vocabulary]` of the tokens that follow each of `ids[first:]`, the last one included."""
        yield from self._rows(ids, slice(first, None))

    def _rows(self, ids: Tensor, places: slice) -> Iterator[Tensor]:
        if self._halves is None:
            logits = self._network(ids[None], use_cache=False).logits[0, places]
            yield from logits.split(ROWS_PER_CHUNK)
        else:
            for states in self._halves.states(ids[None])[0, places].split(ROWS_PER_CHUNK):
                yield self._halves.logits(states)


class KeptReader(Reader):
    """A reader that tells the logits which a network had of some sequences, whatever its blocks have become since.

    It keeps the hidden states that enter the head. ModelError for a network whose head is not separate.
    """

    def __init__(self, reader: Reader) -> None:
        self._network, self._halves = reader._network, halves_of(reader._network)
        self._kept: dict[bytes, Tensor] = {}  # [L, d] each

    @torch.inference_mode()
    def keep(self, ids: Tensor) -> None:
        """Read a sequence `[L]` with the network as it is now."""
        self._kept[_key(ids)] = self._halves.states(ids[None])[0]

    def chunks(self, ids: Tensor, first: int) -> Iterator[Tensor]:
        for states in self._kept[_key(ids)][first - 1 : -1].split(ROWS_PER_CHUNK):
            yield self._halves.logits(states)


def _key(ids: Tensor) -> bytes:
    content: bytes = ids.cpu().numpy().tobytes()
    return content


@torch.inference_mode()
def score(readers: Sequence[Reader], sequences: Sequence[ScoredSequence], device: torch.device) -> Iterator[Scored]:
    """The scores of one sequence after the other, by one model or by two."""
    for sequence in sequences:
        ids = sequence.ids.to(device)
        parts = []
        following = ids[sequence.first :].split(ROWS_PER_CHUNK)
        for tokens, *logits in zip(following, *(reader.chunks(ids, sequence.first) for reader in readers), strict=True):
            parts.append(_scored([log_probabilities(one) for one in logits], tokens))
        yield _joined(parts)


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax in float32, or in the type of the logits where that is wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def _scored(found: list[Tensor], tokens: Tensor) -> Scored:
    losses = tuple(-one.gather(1, tokens[:, None])[:, 0].double() for one in found)
    if len(found) == 1:
        return Scored(losses)
    base, other = found
    if base.shape != other.shape:
        raise ModelError(
            f"the model has {other.shape[1]} logits and its base model {base.shape[1]}; "
            "measure without the divergence: --no-divergence"
        )
    agreed = base.argmax(1) == other.argmax(1)
    weights = base.exp()
    terms = base.sub(other).mul_(weights)
    if not bool(base.isfinite().all()):  # a token that is impossible for both adds nothing
        terms = terms.masked_fill_(weights == 0, 0)
    return Scored(losses, terms.sum(1, dtype=torch.float64), agreed)


def _joined(parts: Sequence[Scored]) -> Scored:
    losses = tuple(torch.cat([part.losses[model] for part in parts]).cpu() for model in range(len(parts[0].losses)))
    if parts[0].divergence is None:
        return Scored(losses)
    return Scored(
        losses,
        torch.cat([part.divergence for part in parts if part.divergence is not None]).cpu(),
        torch.cat([part.agreed for part in parts if part.agreed is not None]).cpu(),
    )
