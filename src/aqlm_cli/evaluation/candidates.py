"""The models that `bench` times: loaded, run once to compile them, and compared with the same weights in float32."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_cli.evaluation import timing
from aqlm_cli.evaluation.llama_cpp import find_llama_models
from aqlm_cli.evaluation.matmul import relative_error
from aqlm_cli.evaluation.model import EvaluatedModel, packed_size
from aqlm_cli.evaluation.timing import Candidate
from aqlm_cli.events import Emit, Noted
from aqlm_cli.models import decoding_of
from aqlm_cli.models.blocks import count_parameters, replace_module
from aqlm_cli.models.random_models import empty_network, random_network, random_packed_network
from aqlm_cli.spec.config import BenchConfig, Head
from aqlm_cli.spec.schemes import Scheme
from aqlm_kernels import KernelError, QuantizedLayer, coded_layers

DTYPES = {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32}


def load_candidates(
    model: EvaluatedModel, base: EvaluatedModel | None, ids: Tensor, settings: BenchConfig
) -> list[Candidate]:
    """The model last, after the base model in every type; a model that is not quantized in every type, alone."""
    if base is not None:
        return [*_in_every_type(base, ids, settings.prompt), _quantized(model, ids, settings)]
    if model.is_quantized:
        return [_quantized(model, ids, settings)]
    if settings.backend is not None or settings.head != "exact":
        raise KernelError(f"{model.name} has no packed layers; leave --backend and --head out")
    return _in_every_type(model, ids, settings.prompt)


def candidates_of_shape(shape: str, scheme: Scheme, ids: Tensor, settings: BenchConfig, emit: Emit) -> list[Candidate]:
    """The same for a model of a shape alone, with random weights and codes: the types that fit in half the memory."""
    length, parameters = len(ids), count_parameters(empty_network(shape))
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    sizes = {name: dtype.itemsize * parameters for name, dtype in DTYPES.items()}
    left_out = [name for position, name in enumerate(sizes) if sum(list(sizes.values())[: position + 1]) > free]
    if left_out:
        emit(Noted(f"{', '.join(left_out)} would take more than half of this machine's memory, and is not measured"))
    packed = random_packed_network(shape, scheme)
    exact = None
    if "FP32" not in left_out:
        exact = timing.run_pass(decoding_of(dequantized(copy.deepcopy(packed)), length), ids, settings.prompt).logits
    decoding = decoding_of(packed, length, settings.backend, settings.head)
    logits = timing.run_pass(decoding, ids, settings.prompt).logits
    error = None if exact is None else relative_error(logits, exact)
    size, layers = packed_size(packed).bytes, tuple(coded_layers(packed).values())
    return [
        *(
            Candidate(
                name,
                decoding_of(random_network(shape, dtype), length),
                bytes=sizes[name],
                read_bytes=sizes[name] - dtype.itemsize * _embedded_only(packed),
                relative_error=None,
            )
            for name, dtype in DTYPES.items()
            if name not in left_out
        ),
        Candidate("packed", decoding, size, size - _unread(packed, settings.head), error, layers),
    ]


def llama_candidates(program: str | None, files: Sequence[str]) -> list[Candidate]:
    """Files that llama.cpp's benchmark runs."""
    return [
        Candidate(model.name, model, bytes=model.bytes, read_bytes=model.bytes, relative_error=None)
        for model in find_llama_models(program, files)
    ]


def _in_every_type(model: EvaluatedModel, ids: Tensor, prompt: int) -> list[Candidate]:
    networks = {name: model.network(dtype) for name, dtype in DTYPES.items()}
    decodings = {name: decoding_of(network, len(ids)) for name, network in networks.items()}
    logits = {name: timing.run_pass(decoding, ids, prompt).logits for name, decoding in decodings.items()}
    return [
        Candidate(
            name,
            decodings[name],
            bytes=DTYPES[name].itemsize * count_parameters(network),
            read_bytes=DTYPES[name].itemsize * (count_parameters(network) - _embedded_only(network)),
            relative_error=None if name == "FP32" else relative_error(logits[name], logits["FP32"]),
        )
        for name, network in networks.items()
    ]


def _quantized(model: EvaluatedModel, ids: Tensor, settings: BenchConfig) -> Candidate:
    reference = decoding_of(dequantized(model.network(torch.float32)), len(ids))
    exact = timing.run_pass(reference, ids, settings.prompt).logits
    del reference  # frees memory before the network is loaded again
    network = model.network(torch.float32)
    size = model.size(network)
    decoding = decoding_of(network, len(ids), settings.backend, settings.head)
    error = relative_error(timing.run_pass(decoding, ids, settings.prompt).logits, exact)
    read = size.bytes - _unread(network, settings.head) - size.copies
    return Candidate("packed", decoding, size.bytes, read, error, tuple(coded_layers(network).values()))


def _unread(network: Any, head: Head) -> int:
    """Bytes of a quantized model that one token does not read."""
    return 2 * _embedded_only(network) + (int(network.get_output_embeddings().weight.numel()) if head == "int8" else 0)


def _embedded_only(network: Any) -> int:
    """Weights of an embedding that is not the head, too: a token reads one row of them."""
    embedding, head = network.get_input_embeddings().weight, network.get_output_embeddings().weight
    return 0 if embedding is head else int(embedding.numel())


def dequantized(network: nn.Module) -> nn.Module:
    """The same weights as ordinary linear layers; the given network is changed."""
    for path, module in list(network.named_modules()):
        if isinstance(module, QuantizedLayer):
            weight, bias = module.matrix().dequantize(), module.trainable().get("bias")
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                linear.bias = bias
            replace_module(network, path, linear)
    return network
