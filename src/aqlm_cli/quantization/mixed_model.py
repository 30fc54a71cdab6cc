"""MixedModel: the base model, some matrices of which are replaced for a while, and its divergence from itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from aqlm_cli.models import Network, attend_blockwise, halves_of
from aqlm_cli.models.blocks import find_blocks, replace_module, unfuse
from aqlm_cli.models.hidden_states import autocast
from aqlm_cli.models.plain_linear import is_plain
from aqlm_cli.quantization.training.distill import ChunkedDivergence
from aqlm_kernels import Matrix


class MixedModel:
    """A network in memory once, on which every mix is measured with the same sequences.

    Beside the network there are the hidden states that enter its head, of the sequences alone. A network without a
    separate backbone and lm_head raises ModelError.
    """

    @torch.no_grad()
    def __init__(self, network: Network, ids: Tensor, dtype: torch.dtype) -> None:
        """`ids` `[n, L]` are the sequences, `dtype` is the type of the matmuls."""
        attend_blockwise(network)
        for block in find_blocks(network).modules:
            unfuse(block)
        self._network, self._ids, self._dtype = network, ids, dtype
        self._halves = halves_of(network)
        self._states = [self._states_of(sequence) for sequence in ids]  # [L, d] each

    @torch.no_grad()
    def divergence(self, layers: Mapping[str, Matrix], tables: Mapping[str, Matrix]) -> float:
        """KL(base || mix) in nats a token, of the mix with these matrices of layers and of tables, by path."""
        total = 0.0
        weights = {path: matrix.dequantize() for path, matrix in tables.items()}
        with self._layers_replaced(layers):
            for sequence, base in zip(self._ids, self._states, strict=True):
                with self._tables_replaced(weights):
                    own = self._states_of(sequence)

                def mixed(states: Tensor) -> Tensor:
                    with self._tables_replaced(weights):
                        return self._logits(states)

                kl: Tensor = ChunkedDivergence.apply(own, base, mixed, self._logits)  # type: ignore[no-untyped-call]
                total += float(kl)
        return total / len(self._ids)

    def _states_of(self, sequence: Tensor) -> Tensor:
        device = self._network.device
        with autocast(device, self._dtype):
            return self._halves.states(sequence[None].to(device))[0].float()

    def _logits(self, states: Tensor) -> Tensor:
        with autocast(self._network.device, self._dtype):
            return self._halves.logits(states)

    @contextmanager
    def _layers_replaced(self, matrices: Mapping[str, Matrix]) -> Iterator[None]:
        originals: dict[str, nn.Module] = {}
        try:
            for path, matrix in matrices.items():
                layer = self._network.get_submodule(path)
                assert is_plain(layer)
                bias = None if layer.bias is None else layer.bias.detach()
                originals[path] = layer
                replace_module(self._network, path, _module(matrix, bias, layer.weight.device))
            yield
        finally:
            for path, layer in originals.items():
                replace_module(self._network, path, layer)

    @contextmanager
    def _tables_replaced(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Other values for the weights of tables; a tied head has them, too, for it is the same parameter."""
        parameters = {path: self._network.get_parameter(f"{path}.weight") for path in weights}
        originals = {path: parameter.data for path, parameter in parameters.items()}
        try:
            for path, parameter in parameters.items():
                parameter.data = weights[path].to(parameter.device, parameter.dtype)
            yield
        finally:
            for path, parameter in parameters.items():
                parameter.data = originals[path]


def _module(matrix: Matrix, bias: Tensor | None, device: torch.device) -> nn.Module:
    own = next(iter(matrix.tensors().values())).device
    return matrix.module(None if bias is None else bias.to(own)).requires_grad_(False).to(device)
