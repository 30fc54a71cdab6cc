"""The blocks of a decoder-only transformer: found, called alone, and watched.

A language model is an embedding, a list of blocks, a last norm and a head.  Quantization goes through that list block
by block, and for that it must call one block without the model around it.  What a block is given besides its hidden
states (rotary embeddings, masks, positions) differs by family, and in some families by layer: sliding and full
attention alternate, each with its own mask and its own rotary base.  None of it is rebuilt here.  The model runs once
with a hook on every block, and each hook writes down exactly what the model passed:

    calls = record_calls(network, ids)          # one BlockCall for each block
    hidden = first_inputs(network, ids)         # [b, L, d], what enters block 0
    for block, call in zip(find_blocks(network).modules, calls):
        hidden = call(block, hidden)            # what enters the next one
    logits = last_logits(network, calls, ids, hidden)

Only the first block has to be there for this; the others may have names and shapes alone (model/loading.py), and be
loaded as their turn comes.  Nothing here knows a family, or transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_cli.errors import ModelError
from aqlm_cli.plain_linear import is_plain, weight_readers, why_not_plain
from aqlm_cli.plan import ROUTER, Layer
from aqlm_cli.routers import router_paths


@dataclass(frozen=True)
class Blocks:
    """The model's repeated layers: `modules[i]` is the submodule at `paths[i]`."""

    path: str  # of the list itself, such as "model.layers"
    modules: tuple[nn.Module, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(f"{self.path}.{index}" for index in range(len(self.modules)))


def find_blocks(network: nn.Module) -> Blocks:
    """The `nn.ModuleList` that holds the most weights.

    Weight is a surer sign than length: a list of 64 experts lies inside a list of 28 blocks, and the vision tower of a
    model with eyes may be deeper than its text model.  Buffers count too, for the codes of a packed model are buffers.
    """
    lists = [(path, module) for path, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    path, found = max(lists, key=lambda entry: _elements(entry[1]), default=("", nn.ModuleList()))
    if _elements(found) == 0:
        raise ModelError(
            f"{type(network).__name__} has no list of repeated layers, so there are no blocks to quantize; "
            "choose a decoder-only transformer"
        )
    return Blocks(path, tuple(found))


def _elements(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def linears(block: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """Every linear layer of a block that its product can replace, by its full path, in the order in which the block
    defines them."""
    found = block.named_modules(prefix=prefix)
    return {path: module for path, module in found if is_plain(module)}


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule of `root` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


# ------------------------------------------------------------------------------------------------ what a plan must know


def describe_layers(network: nn.Module) -> list[Layer]:
    """Every matrix inside the blocks as the plan sees it; those that cannot be replaced come with the reason.

    Such are experts fused into one 3-D parameter, GPT-2's `Conv1D`, a router's bare matrix or a linear layer with a
    forward of its own, layers whose weight another module reads, and weights that two layers share: they are listed, so
    that the plan can say why they stay as they are.
    """
    found = find_blocks(network)
    blocks = dict(zip(found.paths, found.modules, strict=True))
    readers, shared = weight_readers(network, blocks), _shared_weights(network)
    layers: list[Layer] = []
    for prefix, block in blocks.items():
        routers = router_paths(block, prefix)
        for path, module in block.named_modules(prefix=prefix):
            if not is_plain(module):
                layers.extend(_other_matrices(path, module))
                continue
            reason = shared.get(f"{path}.weight")
            if path in readers:
                reason = f"{readers[path]} reads its weight itself"
            kind = ROUTER if path in routers else "linear"
            rows, columns = module.weight.shape
            layers.append(Layer(path, rows, columns, module.bias is not None, kind, reason))
    return layers


def _shared_weights(network: nn.Module) -> dict[str, str]:
    """By name, every parameter that has another name, too; and which."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: f"its weight is also {next(other for other in group if other != name)}"
        for group in names.values()
        for name in group
        if len(group) > 1
    }


def _other_matrices(path: str, module: nn.Module) -> Iterator[Layer]:
    why = why_not_plain(module) if isinstance(module, nn.Linear) else None
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim < 2:
            continue
        *rows, columns = parameter.shape
        held = f"{type(module).__name__} holds it as a tensor of shape {list(parameter.shape)}, not as nn.Linear"
        yield Layer(
            path=path if name == "weight" else f"{path}.{name}",
            out_features=torch.Size(rows).numel(),
            in_features=columns,
            bias=False,
            reason=why or held,
        )


def count_parameters(network: nn.Module) -> int:
    """Numbers that a checkpoint of the network stores; a head tied to the embeddings counts once."""
    unique = {id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() for tensor in unique.values())


# ------------------------------------------------------------------------------------------------ calling a block alone


@dataclass(frozen=True)
class BlockCall:
    """What the model gives one block besides its hidden states.

    `call(block, hidden [b', L, d])` returns the block's output `[b', L, d]`, for windows of the recorded length.
    Recorded with b windows, the call serves any b' <= b; recorded with one, any number, for its tensors broadcast.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden_name: str | None  # None where the hidden states are the first positional argument
    batch: int
    rest: tuple[Any, ...] | None = None  # what a block returns after its hidden states; None where it returns no tuple

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        args, kwargs = _first_rows((self.args, dict(self.kwargs)), self.batch, hidden.shape[0])
        if self.hidden_name is None:
            args = (hidden, *args)
        else:
            kwargs[self.hidden_name] = hidden
        out = block(*args, **kwargs)
        out_hidden: Tensor = out[0] if isinstance(out, tuple) else out  # [b', L, d]
        return out_hidden

    def answer(self, hidden: Tensor) -> Any:
        """What the model expects of a block that puts out `hidden`."""
        return hidden if self.rest is None else (hidden, *self.rest)


def _first_rows(value: Any, batch: int, rows: int) -> Any:
    """`value` with every tensor `[batch, ...]` in it cut to `[rows, ...]`; vectors are never one row a window."""
    if isinstance(value, Tensor):
        return value[:rows] if value.ndim > 1 and value.shape[0] == batch > rows else value
    if isinstance(value, (tuple, list)):
        return type(value)(_first_rows(item, batch, rows) for item in value)
    if isinstance(value, dict):
        return {key: _first_rows(item, batch, rows) for key, item in value.items()}
    return value


class _Reached(Exception):
    """Leaves a forward pass at the point up to which it was wanted."""


def first_inputs(network: nn.Module, ids: Tensor) -> Tensor:
    """The hidden states `[b, L, d]` that enter block 0 for the token ids `[b, L]`; no block and no head is computed."""
    entering: list[Tensor] = []

    def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append(_split(block, args, kwargs)[0])
        raise _Reached

    hook = find_blocks(network).modules[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        _run_until_reached(network, ids)
    finally:
        hook.remove()
    return entering[0]


def record_calls(network: nn.Module, ids: Tensor) -> list[BlockCall]:
    """For each block the arguments that the model gives it for the token ids `[b, L]`; the head is not computed.

    The first block is, to see what it returns; the others return the same, for none of their arguments depends on it.
    """
    blocks = find_blocks(network).modules
    given: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    returned: list[Any] = []

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((block, args, kwargs))

    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        returned.append(output)
        if len(returned) == len(blocks):
            raise _Reached

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(keep) for block in blocks]
    try:
        with _standing_in(blocks[1:], lambda _: returned[0]):
            _run_until_reached(network, ids)
    finally:
        for hook in hooks:
            hook.remove()
    rest = returned[0][1:] if isinstance(returned[0], tuple) else None
    return [replace(_split(*each)[1], rest=rest) for each in given]


def last_logits(network: nn.Module, calls: Sequence[BlockCall], ids: Tensor, hidden: Tensor) -> Tensor:
    """The logits `[b, L, vocabulary]` where the last block puts out `hidden` `[b, L, d]`; no block is computed."""
    with _standing_in(find_blocks(network).modules, lambda index: calls[index].answer(hidden)):
        logits: Tensor = network(input_ids=ids, use_cache=False).logits
    return logits


@contextmanager
def _standing_in(blocks: Sequence[nn.Module], answer: Callable[[int], Any]) -> Iterator[None]:
    """While open, none of the blocks computes: each returns what `answer` gives for its index."""

    def stand_in(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)  # the signature tells where the hidden states are
        def forward_in_its_place(*_: Any, **__: Any) -> Any:
            return answer(index)

        return forward_in_its_place

    for index, block in enumerate(blocks):
        block.forward = stand_in(index, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # that of the class shows again


def _split(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """The hidden states, which are the first parameter of `block.forward`, and everything else."""
    if args:
        hidden, name, args = args[0], None, args[1:]
    else:
        name = next(iter(inspect.signature(block.forward).parameters))
        hidden = kwargs[name]
        kwargs = {key: value for key, value in kwargs.items() if key != name}
    return hidden, BlockCall(args, kwargs, name, batch=hidden.shape[0])


def _run_until_reached(network: nn.Module, ids: Tensor) -> None:
    # no_grad and not inference_mode: what is recorded here takes part in later passes that do have gradients.
    with torch.no_grad():
        try:
            network(input_ids=ids, use_cache=False)
        except _Reached:
            return
    raise ModelError(f"{type(network).__name__} finished without calling its blocks, so they cannot be called alone")


# --------------------------------------------------------------------------------------- watching the inputs of linears


@contextmanager
def observe_inputs(block: nn.Module, callback: Callable[[tuple[str, ...], Tensor], None]) -> Iterator[None]:
    """While open, every forward of `block` ends with `callback(paths, x [tokens, in])` for each input of its linears.

    Layers that read the same tensor (q, k and v; gate and up) share one call, so what is computed from x, such as
    x^T x, is computed once.  "The same" means the same tensor object in this forward.  Paths are relative to the block.
    """
    inputs: dict[int, tuple[Tensor, list[str]]] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.setdefault(id(args[0]), (args[0], []))[1].append(path)

        return hook

    def report(*_: object) -> None:
        for x, paths in inputs.values():
            callback(tuple(paths), x.detach().reshape(-1, x.shape[-1]))
        inputs.clear()

    layers = linears(block, prefix="")
    hooks = [layer.register_forward_pre_hook(note(path)) for path, layer in layers.items()]
    hooks.append(block.register_forward_hook(report))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
