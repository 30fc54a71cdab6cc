"""The walk: one block of a transformer after another, each called with the inputs that the whole model gives it.

A language model is an embedding, a list of blocks, a last norm and a head. The inputs of a block besides its hidden
states differ by model type: rotary embeddings, masks, embeddings of its own tokens (Gemma 3n), keys of an earlier block
(Gemma 4), the router states of the one before (Zaya). None of it is rebuilt here. To call block i on some sequences,
the model's own forward runs on their token ids with stand-ins for the blocks, which return the blocks' outputs, and
stops at block i: its arguments are then those of the model. The expensive part, the blocks, is computed once.

    walk = open_walk(network, load, ids)              # refuses a model type for which this differs from the model
    hidden, handed = walk.entering(ids), {}           # [b, L, d]
    for index in range(len(walk.paths)):
        hidden, handed = walk.given(index, ids, hidden, handed).run(load(index))
    logits = walk.logits(ids, hidden, handed)

`handed` holds the tensors that blocks hand on besides their hidden states: further elements of the tuple that they
return, and entries of a dictionary that they share. Its names are paths in JSON: ["out", 1], ["kwargs",
"shared_kv_states", "full_attention", 0]. All tensors between two blocks have the batch dimension first. Nothing here
depends on a model type, or on transformers.

Shapes: b sequences, L tokens, d hidden size.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from aqlm_cli.errors import ModelError
from aqlm_cli.models.blocks import Blocks

Path: TypeAlias = tuple[str | int, ...]
"""Position of a tensor in the arguments of a block, or in its output."""

HIDDEN = json.dumps(["out", 0])
"""The name of the hidden states in `Form.batch_dims`."""


@dataclass(frozen=True)
class Form:
    """Structure of the values that the blocks of a model return and hand on."""

    lengths: tuple[int | None, ...]  # of the tuple that each block returns; None if it returns hidden states alone
    needed: frozenset[int]  # elements of these tuples, beside the hidden states, that the model passes to later blocks
    batch_dims: Mapping[str, int]  # the batch dimension of each tensor, by name


@dataclass(frozen=True, eq=False)
class BlockInput:
    """All inputs of one block for some sequences, hidden states included; can be used once."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    form: Form
    carried: frozenset[str] = frozenset()  # names of the tensors that earlier blocks handed on to this one

    @classmethod
    def alone(cls, hidden: Tensor) -> BlockInput:
        """Input of a block that takes hidden states `[b, L, d]` and nothing else."""
        return cls((hidden,), {}, Form((None,), frozenset(), {HIDDEN: 0}))

    @property
    def device(self) -> torch.device:
        return next(tensor.device for _, tensor in leaves((self.args, self.kwargs)))

    def __call__(self, block: nn.Module) -> Tensor:
        """The block's output, batch first."""
        return self.batch_first(elements_of(block(*self.args, **self.kwargs))[0])

    def differentiable(self, block: nn.Module) -> tuple[BlockInput, Tensor]:
        """The same inputs with hidden states that collect gradients, and those states, as the block takes them."""
        name = _hidden_name(block)
        leaf: Tensor = (self.args[0] if self.args else self.kwargs[name]).detach().requires_grad_()
        if self.args:
            return replace(self, args=(leaf, *self.args[1:])), leaf
        return replace(self, kwargs={**self.kwargs, name: leaf}), leaf

    def batch_first(self, hidden: Tensor) -> Tensor:
        """Hidden states as the block takes or returns them, batch first."""
        return self._batch_first(HIDDEN, hidden)

    def run(self, block: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """The block's output and the tensors that it hands on, batch first."""
        before = dict(shared_tensors(self.args, self.kwargs))
        elements = elements_of(block(*self.args, **self.kwargs))
        handed = {json.dumps(["out", place]): elements[place] for place in self.form.needed if place < len(elements)}
        for name, tensor in shared_tensors(self.args, self.kwargs):
            if name in self.carried or before.get(name) is not tensor:
                handed[name] = tensor
        tensors = {name: value for name, value in handed.items() if isinstance(value, Tensor)}
        first = {name: self._batch_first(name, tensor) for name, tensor in tensors.items()}
        return self._batch_first(HIDDEN, elements[0]), first

    def _batch_first(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.movedim(self.form.batch_dims[name], 0)


@dataclass(frozen=True, eq=False)
class Walk:
    """One pass through the blocks of `network`, which needs no weights in them: `load` returns a block by index."""

    network: nn.Module
    blocks: Blocks
    load: Callable[[int], nn.Module]
    form: Form
    dtype: torch.dtype = torch.float32  # of the matmuls in its blocks

    @property
    def paths(self) -> tuple[str, ...]:
        return self.blocks.paths

    @property
    def device(self) -> torch.device:
        return device_of(self.network)

    def last(self, layers: Sequence[str]) -> int:
        """The last block that holds one of the layers with these paths."""
        return max(i for i, path in enumerate(self.paths) if any(name.startswith(path + ".") for name in layers))

    def entering(self, ids: Tensor) -> Tensor:
        """The hidden states that enter block 0 for the token ids `[b, L]`, batch first; no block is computed."""
        args, kwargs = self._reached(0, ids, None, {})
        hidden: Tensor = args[0] if args else kwargs[_hidden_name(self.blocks.modules[0])]
        return hidden.movedim(self.form.batch_dims[HIDDEN], 0)

    def given(self, index: int, ids: Tensor, hidden: Tensor, handed: Mapping[str, Tensor]) -> BlockInput:
        """Inputs of block `index`: `hidden` is the output of the one before it, `handed` the tensors handed on so far.

        For block 0 these are the result of `entering` and an empty mapping.
        """
        args, kwargs = self._reached(index, ids, hidden, handed)
        placed = {name: self._placed(name, tensor) for name, tensor in handed.items()}
        _fill(args, kwargs, placed)
        return BlockInput(args, kwargs, self.form, frozenset(name for name in placed if json.loads(name)[0] != "out"))

    def logits(self, ids: Tensor, hidden: Tensor, handed: Mapping[str, Tensor], gradients: bool = False) -> Tensor:
        """The logits `[b, L, vocabulary]` for the last block's output `hidden`; no block is computed."""
        with torch.set_grad_enabled(gradients), standing_in(self.blocks, self._answers(hidden, handed)):
            logits: Tensor = self.network(input_ids=ids.to(self.device), use_cache=False).logits
        return logits

    def _reached(
        self, index: int, ids: Tensor, hidden: Tensor | None, handed: Mapping[str, Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that the model's own forward passes to block `index`."""
        reached: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        answers = self._answers(hidden, handed)

        def answer(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if number == index:
                reached.append((args, kwargs))
                raise _Reached
            return answers(number, args, kwargs)

        # no_grad and not inference_mode: these tensors take part in later passes that do have gradients.
        with torch.no_grad(), standing_in(self.blocks, answer):
            try:
                self.network(input_ids=ids.to(self.device), use_cache=False)
            except _Reached:
                return reached[0]
        raise ModelError(f"{family_of(self.network)} finishes without calling all of its blocks; it is not supported")

    def _answers(self, hidden: Tensor | None, handed: Mapping[str, Tensor]) -> Answer:
        placed = {HIDDEN: hidden} if hidden is not None else {}
        placed |= {name: tensor for name, tensor in handed.items() if json.loads(name)[0] == "out"}
        placed = {name: self._placed(name, tensor) for name, tensor in placed.items()}

        def answer(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            length = self.form.lengths[number]
            if length is None:
                return placed[HIDDEN]
            return tuple(placed.get(json.dumps(["out", place])) for place in range(length))

        return answer

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor on the model's device, with the model's batch dimension."""
        return tensor.to(self.device).movedim(0, self.form.batch_dims[name])


Answer: TypeAlias = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
"""Function from index and arguments of a block to its output."""


class _Reached(Exception):
    """Signal that ends a forward pass at the block that was asked for."""


@contextmanager
def standing_in(blocks: Blocks, answer: Answer) -> Iterator[None]:
    """Replace the forward of all blocks by `answer` while the context is open."""

    def stand_in(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)  # some networks inspect the signature
        def forward_in_its_place(*args: Any, **kwargs: Any) -> Any:
            return answer(index, args, kwargs)

        return forward_in_its_place

    for index, block in enumerate(blocks.modules):
        block.forward = stand_in(index, block.forward)
    try:
        yield
    finally:
        for block in blocks.modules:
            del block.forward  # restores the forward of the class


def _hidden_name(block: nn.Module) -> str:
    """Name of the first parameter of a block's forward, the hidden states."""
    return next(iter(inspect.signature(block.forward).parameters))


def elements_of(returned: Any) -> Sequence[Any]:
    return returned if isinstance(returned, (tuple, list)) else (returned,)


def device_of(network: nn.Module) -> torch.device:
    """Device of the network's weights; those in its blocks may be on the meta device."""
    return next(tensor.device for tensor in network.parameters() if not tensor.is_meta)


def family_of(network: nn.Module) -> str:
    kind = getattr(getattr(network, "config", None), "model_type", None)
    return f"the family {kind} ({type(network).__name__})" if kind else type(network).__name__


# ------------------------------------------------------------------------------------- what blocks hand to each other


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in nested mappings and sequences, with the keys that lead there."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, (tuple, list)):
        for place, inner in enumerate(value):
            yield from leaves(inner, (*path, place))


def shared_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, by name, in dictionaries among the arguments, to which a block may add more."""
    roots: list[tuple[Path, Any]] = [(("args", place), value) for place, value in enumerate(args)]
    roots += [(("kwargs", name), value) for name, value in kwargs.items()]
    for root, value in roots:
        if isinstance(value, MutableMapping):
            for path, tensor in leaves(value, root):
                yield json.dumps(path), tensor


def _fill(args: tuple[Any, ...], kwargs: Mapping[str, Any], handed: Mapping[str, Tensor]) -> None:
    """Put tensors that earlier blocks handed on into the dictionaries from which they came."""
    inside: dict[tuple[str, Any, Any], dict[Path, Tensor]] = {}
    for name, tensor in handed.items():
        root, *path = json.loads(name)
        if root != "out":
            inside.setdefault((root, path[0], path[1]), {})[tuple(path[2:])] = tensor
    for (root, key, entry), parts in inside.items():
        place = args if root == "args" else kwargs
        place[key][entry] = _built(parts)


def _built(parts: Mapping[Path, Tensor]) -> Any:
    """Nested tuples (integer keys) and dictionaries (string keys), built from their leaves."""
    if () in parts:
        return parts[()]
    heads = dict.fromkeys(path[0] for path in parts)
    inner = {head: _built({path[1:]: leaf for path, leaf in parts.items() if path[0] == head}) for head in heads}
    return tuple(inner[head] for head in sorted(heads)) if all(isinstance(head, int) for head in heads) else inner
