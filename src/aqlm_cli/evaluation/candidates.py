"""The models that `bench` times: loaded, run once to compile them, and compared with the same weights in float32."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from aqlm_cli.evaluation import timing
from aqlm_cli.evaluation.llama_cpp import find_llama_models
from aqlm_cli.evaluation.matmul import relative_error
from aqlm_cli.evaluation.model import EvaluatedModel, packed_size
from aqlm_cli.evaluation.read_bytes import bytes_by_part
from aqlm_cli.evaluation.timing import Candidate
from aqlm_cli.events import Emit, Noted
from aqlm_cli.models import Decoding, decoding_of
from aqlm_cli.models.blocks import count_parameters, replace_module
from aqlm_cli.models.random_models import empty_network, random_network, random_packed_network
from aqlm_cli.spec.evaluate import BenchConfig
from aqlm_cli.spec.schemes import Scheme
from aqlm_kernels import AdditiveLinear, CompressedEmbedding, CompressedLinear, KernelError, QuantizedLayer

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


def candidates_of_shape(
    shape: str, schemes: tuple[Scheme, Scheme | None], ids: Tensor, settings: BenchConfig, emit: Emit
) -> list[Candidate]:
    """The same for a model of a shape alone, with random weights and codes: the types that fit in half the memory.

    The schemes are those of the layers in the blocks, and of embeddings and head, None: 16 bits.
    """
    length, parameters = len(ids), count_parameters(empty_network(shape))
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    sizes = {name: dtype.itemsize * parameters for name, dtype in DTYPES.items()}
    left_out = [name for position, name in enumerate(sizes) if sum(list(sizes.values())[: position + 1]) > free]
    if left_out:
        emit(Noted(f"{', '.join(left_out)} would take more than half of this machine's memory, and is not measured"))
    packed = random_packed_network(shape, *schemes)
    exact = None
    if "FP32" not in left_out:
        exact = timing.run_pass(decoding_of(dequantized(copy.deepcopy(packed)), length), ids, settings.prompt).logits
    decoding = decoding_of(packed, length, settings.backend, settings.head)
    logits = timing.run_pass(decoding, ids, settings.prompt).logits
    error = None if exact is None else relative_error(logits, exact)
    size, layers = packed_size(packed), _multiplied(packed)
    return [
        *(
            _dense(name, network := random_network(shape, dtype), decoding_of(network, length), None)
            for name, dtype in DTYPES.items()
            if name not in left_out
        ),
        Candidate("packed", decoding, size.bytes, bytes_by_part(packed, size.read, settings.head), error, layers),
    ]


def llama_candidates(program: str | None, files: Sequence[str]) -> list[Candidate]:
    """Files that llama.cpp's benchmark runs."""
    return [
        Candidate(model.name, model, bytes=model.bytes, read={}, relative_error=None)
        for model in find_llama_models(program, files)
    ]


def _in_every_type(model: EvaluatedModel, ids: Tensor, prompt: int) -> list[Candidate]:
    networks = {name: model.network(dtype) for name, dtype in DTYPES.items()}
    decodings = {name: decoding_of(network, len(ids)) for name, network in networks.items()}
    logits = {name: timing.run_pass(decoding, ids, prompt).logits for name, decoding in decodings.items()}
    errors = {name: None if name == "FP32" else relative_error(logits[name], logits["FP32"]) for name in networks}
    return [_dense(name, network, decodings[name], errors[name]) for name, network in networks.items()]


def _dense(name: str, network: nn.Module, decoding: Decoding, error: float | None) -> Candidate:
    named = {id(tensor): (path, tensor) for path, tensor in network.state_dict(keep_vars=True).items()}
    tensors = {path: DTYPES[name].itemsize * tensor.numel() for path, tensor in named.values()}
    return Candidate(name, decoding, sum(tensors.values()), bytes_by_part(network, tensors), error)


def _quantized(model: EvaluatedModel, ids: Tensor, settings: BenchConfig) -> Candidate:
    reference = decoding_of(dequantized(model.network(torch.float32)), len(ids))
    exact = timing.run_pass(reference, ids, settings.prompt).logits
    del reference  # frees memory before the network is loaded again
    network = model.network(torch.float32)
    size = model.size(network)
    decoding = decoding_of(network, len(ids), settings.backend, settings.head)
    error = relative_error(timing.run_pass(decoding, ids, settings.prompt).logits, exact)
    read = bytes_by_part(network, size.read, settings.head)
    return Candidate("packed", decoding, size.bytes, read, error, _multiplied(network))


def _multiplied(network: nn.Module) -> tuple[AdditiveLinear | CompressedLinear, ...]:
    """Quantized layers that x is multiplied by: all but a table in which rows are looked up alone."""
    modules = dict(network.named_modules(remove_duplicate=False))
    layers = {
        id(module): module
        for path, module in modules.items()
        if isinstance(module, AdditiveLinear | CompressedLinear) and not _inside(modules, path, CompressedEmbedding)
    }
    return tuple(layers.values())


def dequantized(network: nn.Module) -> nn.Module:
    """The same weights as ordinary linear layers and embeddings; the given network is changed."""
    modules = dict(network.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if isinstance(module, CompressedEmbedding):
            rows = module(torch.arange(module.num_embeddings))
            replace_module(network, path, nn.Embedding.from_pretrained(rows, padding_idx=module.padding_idx))
        elif isinstance(module, QuantizedLayer) and not _inside(modules, path, QuantizedLayer):
            replace_module(network, path, _linear(module))
    return network


def _inside(modules: Mapping[str, nn.Module], path: str, kind: type) -> bool:
    """True for a part of a module of this kind."""
    names = path.split(".")
    return any(isinstance(modules.get(".".join(names[:end])), kind) for end in range(1, len(names)))


def _linear(layer: QuantizedLayer) -> nn.Linear:
    weight, bias = layer.matrix().dequantize(), layer.trainable().get("bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = bias
    return linear
