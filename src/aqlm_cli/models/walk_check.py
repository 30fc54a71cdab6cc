"""Open a walk, after a check that it computes the same as the model.

Some different sequences go through the model's own forward, each block loaded as it is called, so that a model larger
than memory can be checked too. The inputs of each block are then compared with those of the walk, and so are the
logits: a model type that runs a block twice, or hands a tensor on in a way that the walk does not see, is refused by
name before any work.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_cli.errors import FOREIGN_ERRORS, ModelError, shortened
from aqlm_cli.models.blocks import Blocks, find_blocks
from aqlm_cli.models.walk import (
    HIDDEN,
    Form,
    Path,
    Walk,
    device_of,
    elements_of,
    family_of,
    leaves,
    shared_tensors,
    standing_in,
)

TOLERANCE = 1e-5
"""Tolerance for every input of a block and for the logits, relative to the tensor's largest entry. The same code on
the same values gives the same bits; the tolerance allows for a sum in another order."""

LENGTH = 24
"""Maximum tokens of a compared sequence."""

COUNTS = (3, 5, 7)
"""Numbers of sequences to try: the batch dimension is recognised by a size that no other dimension has."""


def open_walk(
    network: nn.Module,
    load: Callable[[int], nn.Module],
    ids: Tensor,
    dtype: torch.dtype = torch.float32,
    watch: Callable[[int], None] = lambda blocks: None,
) -> Walk:
    """The walk through `network`, whose blocks need no weights: `load` returns each by its index, in float32.

    `ids` `[n, L]` are text, of which some sequences are compared; `watch` is called with the count of finished blocks.
    Matmuls will be in `dtype`, or in float32 if a block cannot compute with another type. Raises ModelError for a model
    type whose blocks cannot be called one after another.
    """
    blocks = find_blocks(network)
    for count in COUNTS:
        chosen = distinct_sequences(ids, count).to(device_of(network))
        seen = _forward(network, blocks, load, chosen, dtype, watch)
        if not seen.ambiguous(count):
            break
    form = Form(tuple(seen.lengths), frozenset(), seen.batch_dims(count))
    walk = Walk(network, blocks, load, form, dtype if all(seen.computes) else torch.float32)
    return _checked(walk, seen, chosen)


def distinct_sequences(ids: Tensor, count: int) -> Tensor:
    """`[count, L']` of the tokens in `ids`, all different if the text has two distinct tokens or more."""
    tokens = ids.flatten()
    length = min(ids.shape[1], LENGTH)
    rows = torch.stack([tokens.roll(-shift * (len(tokens) // count)) for shift in range(count)])[:, :length]
    if len(rows.unique(dim=0)) < count:  # the text repeats itself: write 0, 1, 2 ... in the tokens that it has
        kinds, numbers = tokens.unique(), torch.arange(count)[:, None]
        rows = kinds[numbers // len(kinds) ** torch.arange(length).clamp(max=8) % len(kinds)]
    return rows


# ---------------------------------------------------------------------------------------- what the model really does


@dataclass(frozen=True, eq=False)
class _Seen:
    """Record of a forward pass of the model, by block."""

    given: list[dict[Path, Tensor]] = field(default_factory=list)  # every tensor in the arguments
    returned: list[dict[str, Tensor]] = field(default_factory=list)  # hidden states and handed-on tensors, by name
    lengths: list[int | None] = field(default_factory=list)  # of the tuple that each block returns
    computes: list[bool] = field(default_factory=list)  # True if the block runs with matmuls in `dtype`
    logits: list[Tensor] = field(default_factory=list)  # one, when all is done

    @property
    def elements(self) -> frozenset[int]:
        """Positions in the tuples that hold a tensor, beside the hidden states."""
        names = {tuple(_path(name)) for returned in self.returned for name in returned} - {("out", 0)}
        return frozenset(place for root, place, *_ in names if root == "out" and isinstance(place, int))

    def ambiguous(self, count: int) -> bool:
        """True if some tensor has more than one dimension of this size."""
        return any(list(tensor.shape).count(count) > 1 for returned in self.returned for tensor in returned.values())

    def batch_dims(self, count: int) -> dict[str, int]:
        """The dimension of this size in each tensor that has one."""
        tensors = [(name, list(tensor.shape)) for returned in self.returned for name, tensor in returned.items()]
        return {name: shape.index(count) for name, shape in tensors if count in shape}


def _forward(
    network: nn.Module,
    blocks: Blocks,
    load: Callable[[int], nn.Module],
    ids: Tensor,
    dtype: torch.dtype,
    watch: Callable[[int], None],
) -> _Seen:
    """The model's own forward on the token ids `[b, L]`, with each block loaded as it is called."""
    seen = _Seen()

    def compute(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number != len(seen.given):
            again = "runs its blocks more than once" if number < len(seen.given) else "leaves blocks out"
            raise ModelError(f"{family_of(network)} {again}, so it cannot be quantized block by block; not supported")
        seen.given.append(_copies(args, kwargs))
        before, block = dict(shared_tensors(args, kwargs)), load(number)
        seen.computes.append(dtype == torch.float32 or _computes(block, dtype, args, kwargs))
        returned = block(*args, **kwargs)
        seen.lengths.append(len(returned) if isinstance(returned, (tuple, list)) else None)
        tensors = {_name("out", place): value for place, value in enumerate(elements_of(returned))}
        tensors |= {name: tensor for name, tensor in shared_tensors(args, kwargs) if before.get(name) is not tensor}
        seen.returned.append({name: value.clone() for name, value in tensors.items() if isinstance(value, Tensor)})
        watch(number + 1)
        return returned

    try:
        with torch.no_grad(), standing_in(blocks, compute):
            seen.logits.append(network(input_ids=ids, use_cache=False).logits)
    except FOREIGN_ERRORS as error:
        reason = f"{type(error).__name__}: {shortened(str(error), 300)}"
        shape = f"{len(ids)} sequences of {ids.shape[1]} tokens"
        raise ModelError(f"{family_of(network)} fails on {shape} ({reason}); it is not supported") from error
    if len(seen.given) < len(blocks.modules):
        raise ModelError(f"{family_of(network)} finishes without calling all of its blocks; it is not supported")
    return seen


def _computes(block: nn.Module, dtype: torch.dtype, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True if the block runs under autocast to `dtype`: some blocks add tensors of different types."""
    own_args, own_kwargs = copy.deepcopy((args, dict(kwargs)))
    device = next(tensor.device for _, tensor in leaves((args, kwargs)))
    try:
        with torch.autocast(device.type, dtype):
            block(*own_args, **own_kwargs)
    except RuntimeError:
        return False
    return True


def _copies(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Path, Tensor]:
    """Copies of all tensors in the arguments, because a block may write to them."""
    return {path: tensor.clone() for path, tensor in leaves({"args": args, "kwargs": kwargs})}


# ---------------------------------------------------------------------------------------- what the walk makes of it


def _checked(walk: Walk, seen: _Seen, ids: Tensor) -> Walk:
    """The walk that hands on the fewest elements of the blocks' outputs and agrees with the forward pass."""

    def handing_on(elements: frozenset[int]) -> Walk:
        return replace(walk, form=replace(walk.form, needed=elements))

    if _difference(walk, seen, ids) is None:
        return walk
    needed = seen.elements
    reason = _difference(handing_on(needed), seen, ids)
    if reason is not None:
        raise ModelError(
            f"{family_of(walk.network)} cannot be quantized block by block: {reason}; use a model of another family"
        )
    for place in sorted(seen.elements):  # attention weights, say, are returned by many and needed by none
        if _difference(handing_on(needed - {place}), seen, ids) is None:
            needed -= {place}
    return handing_on(needed)


def _difference(walk: Walk, seen: _Seen, ids: Tensor) -> str | None:
    """First difference between the walk and the model's forward, or None."""
    hidden, handed = torch.empty(0), dict[str, Tensor]()
    try:
        hidden = walk.entering(ids)
        for index, wanted in enumerate(seen.given):
            given = walk.given(index, ids, hidden, handed)
            path = _first_difference(dict(leaves({"args": given.args, "kwargs": given.kwargs})), wanted)
            if path is not None:
                name = _argument(walk.blocks.modules[index], path)
                return f"block {index} would get another {name} than in the model"
            returned = {
                name: tensor.movedim(walk.form.batch_dims[name], 0) for name, tensor in seen.returned[index].items()
            }
            carried = {name: tensor for name, tensor in handed.items() if name in given.carried}
            hidden, handed = returned.pop(HIDDEN), carried | _needed(returned, walk.form)
        logits = walk.logits(ids, hidden, handed)
    except FOREIGN_ERRORS as error:
        return f"its forward fails without its blocks ({type(error).__name__}: {shortened(str(error))})"
    return None if _close(logits, seen.logits[0]) else "the logits differ from those of the model"


def _needed(returned: Mapping[str, Tensor], form: Form) -> dict[str, Tensor]:
    paths = {name: _path(name) for name in returned}
    return {name: returned[name] for name, (root, place, *_) in paths.items() if root != "out" or place in form.needed}


def _first_difference(given: Mapping[Path, Tensor], wanted: Mapping[Path, Tensor]) -> Path | None:
    for path in [*wanted, *(given.keys() - wanted.keys())]:
        if path not in given or path not in wanted or not _close(given[path], wanted[path]):
            return path
    return None


def _argument(block: nn.Module, path: Path) -> str:
    """Name of the parameter of the block's forward that holds the tensor, and the keys inside of it."""
    root, first, *inner = path
    names = list(inspect.signature(block.forward).parameters)
    name = names[first] if root == "args" and isinstance(first, int) and first < len(names) else first
    return ".".join(map(str, [name, *inner]))


def _close(tensor: Tensor, wanted: Tensor) -> bool:
    if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
        return False
    if not wanted.is_floating_point():
        return torch.equal(tensor, wanted)
    finite = wanted[wanted.isfinite()]
    bound = TOLERANCE * float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(tensor, wanted, rtol=0, atol=bound, equal_nan=True)


def _path(name: str) -> list[str | int]:
    path: list[str | int] = json.loads(name)
    return path


def _name(*path: str | int) -> str:
    return json.dumps(path)
