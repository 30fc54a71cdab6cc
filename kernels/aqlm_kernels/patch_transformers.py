"""Layers of the inference package `aqlm`, as stock transformers loads them, become AdditiveLinear: right and fast."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from aqlm_kernels.errors import KernelError
from aqlm_kernels.hf_layout import from_checkpoint
from aqlm_kernels.linear import AdditiveLinear

Network = TypeVar("Network", bound=nn.Module)


def patch_transformers(network: Network) -> Network:
    """Replace, in place, every layer of `aqlm` in the network, which is returned. Biases and devices stay.

    Raises KernelError where there is no such layer, and for groups of several outputs.
    """
    layers = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if type(child).__module__.partition(".")[0] == "aqlm" and hasattr(child, "codes")
    ]
    if not layers:
        raise KernelError("the network has no layer of the package aqlm; load an AQLM checkpoint with transformers")
    child: Any
    for parent, name, child in layers:
        tensors = {key: getattr(child, key).detach() for key in ("codes", "codebooks", "scales")}
        if child.gemv_op is not None and tensors["codebooks"].shape[1] == 256 and not tensors["codes"].is_cuda:
            tensors["codes"] = tensors["codes"].transpose(0, 1)  # its first product on a CPU has exchanged these axes
        matrix = from_checkpoint(tensors)
        bias = getattr(child, "bias", None)
        layer = AdditiveLinear(matrix, None if bias is None else bias.detach())
        layer.train(child.training).requires_grad_(False)
        setattr(parent, name, layer)
    return network
