"""Decoding token by token, in compiled code where it supports the model, else in transformers; `name` says which.

transformers spends some milliseconds of Python on every token, most of the time of a small model, and seconds on its
own imports before the first. The compiled decoder needs neither the network nor, from a checkpoint, transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aqlm_cli.models.loading import load_network
from aqlm_cli.models.names import CODE_TENSORS
from aqlm_cli.models.native_checkpoint import take_native_layers
from aqlm_cli.models.quantization import is_native, is_quantized
from aqlm_cli.models.source import ModelSource, model_config, tensor_index
from aqlm_cli.models.stepping import Stepping
from aqlm_cli.runs.files import load_tensors
from aqlm_cli.spec.evaluate import Head
from aqlm_kernels import (
    AdditiveLinear,
    ByteRows,
    CompressedEmbedding,
    CompressedLinear,
    Decoder,
    DecoderBlock,
    DecoderLayer,
    HeadLayer,
    KernelError,
    RefinedLinear,
    choose,
    from_checkpoint,
    quantized_layers,
    smallest,
    why_not_compiled,
    why_not_head,
)

FAMILIES = ("llama", "mistral", "qwen2")
FIXED_ANGLES = ("default", "linear", "llama3", "yarn")  # rope types that do not change as the text grows
ATTENTION_IN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_OUT = "self_attn.o_proj"
NETWORK_IN = ("mlp.gate_proj", "mlp.up_proj")
NETWORK_OUT = "mlp.down_proj"
NORMS = ("input", "post_attention")
EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"
COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
"""Keys of config.json that give the sizes of the compiled decoder."""

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of dense weights."""

LUT_BYTES = {"cpu-avx512": 2, "cpu-avx512-8bit": 1, "cpu-lut": 0}


Quantized: TypeAlias = AdditiveLinear | CompressedLinear | RefinedLinear


class Decoding(Protocol):
    """A prompt, then token after token; `name` says which code runs."""

    name: str

    def prefill(self, ids: Tensor) -> Tensor:
        """Start again with a prompt [length]; the logits [vocabulary] after it."""
        ...

    def step(self, token: int) -> Tensor:
        """Append one token; the logits [vocabulary] after it."""
        ...


def decoding_of(network: nn.Module, max_length: int, backend: str | None = None, head: Head = "exact") -> Decoding:
    """Decoding of up to `max_length` tokens; packed layers multiply by the named backend, or the first that can.

    Raises KernelError if the named backend cannot serve, or for an int8 head in a model that transformers runs or whose
    lm_head is quantized.
    """
    parts = Parts.of(network)
    names = _backends(parts, backend)
    if backend is not None and not names:
        raise KernelError(f"backend {backend} needs packed layers, and the model has none; leave --backend out")
    reason = _why_not(parts, max_length, names)
    if reason is None:
        return _Compiled(parts, max_length, names, head)
    if head != "exact":
        raise KernelError(f"an int8 head needs the compiled decoder: {reason}; leave --head out")
    for layer in parts.layers.values():
        if isinstance(layer, AdditiveLinear):
            layer.backend = backend
    why = f" ({reason})" if quantized_layers(network) else ""
    return _Transformers(network, ", ".join(["transformers", *names]) + why)


def open_decoding(
    source: ModelSource, max_length: int, backend: str | None = None, head: Head = "exact", device: str = "cpu"
) -> Decoding:
    """Decoding of a model on this disk, which loads no network of transformers if the compiled decoder serves.

    transformers' own config would import all of it. A value that config.json lacks, as that of an older version, is not
    guessed: the network is loaded then.
    """
    config = _plain_config(source) if device == "cpu" and not source.trust_remote_code else None
    if config is not None:
        parts = Parts.read(source, config)
        names = _backends(parts, backend)
        if _why_not(parts, max_length, names) is None:
            return _Compiled(parts, max_length, names, head)
        del parts  # frees memory before the network is loaded
    return decoding_of(load_network(source, torch.float32, device), max_length, backend, head)


def _plain_config(source: ModelSource) -> Any:
    """config.json, if it and the tensor headers show that the compiled decoder serves; else None."""
    if not is_quantized(source):
        return None
    said, index = model_config(source), tensor_index(source.directory)
    rotary = said.get("rope_parameters")
    plain = (
        said.get("model_type") in FAMILIES
        and all(type(said.get(name)) is int and said[name] > 0 for name in COUNTS)
        and type(said.get("head_dim", 0)) in (int, type(None))
        and type(said.get("rms_norm_eps")) is float
        and type(said.get("tie_word_embeddings")) is bool
        and isinstance(said.get("hidden_act"), str)
        and isinstance(rotary, dict)
        and isinstance(rotary.get("rope_type"), str)
        and isinstance(rotary.get("rope_theta"), (int, float))
    )
    codebooks = [stored.shape for name, stored in index.items() if name.endswith(".codebooks")]
    norms = [name for name in index if name.endswith(f".{NORMS[0]}_layernorm.weight")]
    native = is_native(source)
    if not plain or not (codebooks or native) or len(norms) != said["num_hidden_layers"]:
        return None
    axes = 3 if native else 4
    return SimpleNamespace(**said) if all(len(shape) == axes and shape[1] <= 256 for shape in codebooks) else None


class Parts(NamedTuple):
    """Tensors and quantized layers of a model, by name. A tied head may be missing."""

    config: Any
    layers: Mapping[str, Quantized]  # those of blocks, and of embeddings and head, which are the same if tied
    tensors: Mapping[str, Tensor]  # all others

    @classmethod
    def of(cls, network: nn.Module) -> Parts:
        tensors = {path: parameter.detach() for path, parameter in network.named_parameters(remove_duplicate=False)}
        modules: dict[str, Any] = dict(quantized_layers(network))
        modules[HEAD] = dict(network.named_modules(remove_duplicate=False)).get(HEAD)  # which may be a table, if tied
        layers = {}
        for path, module in modules.items():
            layer = module.table if isinstance(module, CompressedEmbedding) else module
            if isinstance(layer, Quantized):
                layers[path] = layer
        return cls(network.config, layers, tensors)

    @classmethod
    def read(cls, source: ModelSource, config: Any) -> Parts:
        """Parts of an AQLM or native checkpoint; of two tensors that config.json ties, one may be missing from it.

        Two that are both stored stay two: transformers ties them only if they are equal, which changes no value.
        """
        files = {stored.file for stored in tensor_index(source.directory).values()}
        tensors = {name: tensor for file in files for name, tensor in load_tensors(file).items()}
        if is_native(source):
            return cls(config, take_native_layers(source, tensors), tensors)
        layers = {}
        for path in [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]:
            own = {
                name: tensors.pop(f"{path}.{name}") for name in (*CODE_TENSORS, "bias") if f"{path}.{name}" in tensors
            }
            if {"codebooks", "scales"} <= own.keys():
                layers[path] = AdditiveLinear(from_checkpoint(own), own.get("bias")).requires_grad_(False)
        return cls(config, layers, tensors)

    def weight(self, path: str) -> Quantized | Tensor | None:
        """The quantized layer there, or a dense weight; of embeddings and head of a tied model one may be missing."""
        paths = [path]
        if path in (EMBEDDINGS, HEAD) and self.config.tie_word_embeddings:
            paths += [HEAD if path == EMBEDDINGS else EMBEDDINGS]
        for path in paths:
            if path in self.layers:
                return self.layers[path]
            if f"{path}.weight" in self.tensors:
                return self.tensors[f"{path}.weight"]
        return None

    def linear(self, path: str) -> DecoderLayer:
        """The layer x W^T + bias there; dense weights in 16 bits where that is exact."""
        weight, bias = self.weight(path), self.tensors.get(f"{path}.bias")
        assert weight is not None and not isinstance(weight, RefinedLinear)  # which is for tables
        if not isinstance(weight, Tensor):
            return weight
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(narrowest(weight), requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias, requires_grad=False)
        return dense


class _Transformers:
    def __init__(self, network: nn.Module, name: str) -> None:
        self.name = name
        self._network: Any = network
        self._stepping = Stepping(network)

    def prefill(self, ids: Tensor) -> Tensor:
        self._stepping = Stepping(self._network)
        return self._forward(ids)

    def step(self, token: int) -> Tensor:
        return self._forward(torch.tensor([token], device=self._network.device))

    @torch.inference_mode()
    def _forward(self, ids: Tensor) -> Tensor:
        return self._stepping(ids[None])[0].float()


class _Compiled:
    def __init__(self, parts: Parts, max_length: int, backends: list[str], head: Head) -> None:
        self.name = ", ".join(["compiled decoder", *backends])
        decoder = _decoder(parts, max_length, LUT_BYTES[backends[0]] if backends else 0, head)
        decoder.step(0)  # compiles, which takes some seconds, unless an earlier process did
        self.prefill, self.step = decoder.prefill, decoder.step


def _backends(parts: Parts, backend: str | None) -> list[str]:
    """Backends of the additive layers, all but a table where rows are looked up alone."""
    layers = [layer for path, layer in parts.layers.items() if path != EMBEDDINGS or layer is parts.weight(HEAD)]
    multiplied = [layer.base if isinstance(layer, RefinedLinear) else layer for layer in layers]
    kinds = {(layer.codebooks.shape, layer.codes.device) for layer in multiplied if isinstance(layer, AdditiveLinear)}
    return sorted({choose(smallest(*shape), device, backend).name for shape, device in kinds})


# ------------------------------------------------------------------------------------------------ the compiled decoder


def _why_not(parts: Parts, max_length: int, backends: list[str]) -> str | None:
    """Reason why the compiled decoder cannot run the model, or None."""
    config = parts.config
    if config.model_type not in FAMILIES:
        return f"the compiled decoder supports {', '.join(FAMILIES)}, not {config.model_type}"
    if len(backends) > 1 or not LUT_BYTES.keys() >= set(backends) or not parts.layers:
        return f"the compiled decoder needs one of {', '.join(LUT_BYTES)}"
    if any(tensor.device.type != "cpu" for tensor in parts.tensors.values()):
        return "the compiled decoder runs on the CPU"
    if config.hidden_act != "silu":
        return f"the compiled decoder does not support {config.hidden_act}"
    if config.rope_parameters["rope_type"] not in FIXED_ANGLES:
        return f"the compiled decoder does not support {config.rope_parameters['rope_type']} position embeddings"
    if config.rope_parameters.get("partial_rotary_factor", 1) != 1:
        return "the compiled decoder does not support partial rotary embeddings"
    if (getattr(config, "sliding_window", None) or max_length) < max_length:
        return f"the compiled decoder does not support a sliding window of {config.sliding_window}"
    if _head_size(config) % 2 or config.num_attention_heads % config.num_key_value_heads:
        return "the compiled decoder needs an even head size, and as many query heads for each key head"
    for path, shape in _linear_shapes(config).items():
        reason = _why_not_linear(parts, path, shape)
        if reason is not None:
            return f"the compiled decoder {reason}"
    d, vocabulary = config.hidden_size, config.vocab_size
    reason = _why_not_linear(parts, HEAD, (vocabulary, d))
    if reason is not None:
        return f"the compiled decoder {reason}"
    embeddings = parts.weight(EMBEDDINGS)
    if embeddings is None or _shape(embeddings) != (vocabulary, d):
        return f"the compiled decoder needs {(vocabulary, d)} weights in {EMBEDDINGS}"
    norms = [f"{block}.{name}_layernorm.weight" for block in _block_paths(config) for name in NORMS]
    for name in (*norms, "model.norm.weight"):
        if name not in parts.tensors or parts.tensors[name].shape != (d,):
            return f"the compiled decoder needs a tensor {name} of {(d,)}"
    return None


def _why_not_linear(parts: Parts, path: str, shape: tuple[int, int]) -> str | None:
    weight = parts.weight(path)
    if weight is None:
        return f"needs a linear layer {path}"
    if _shape(weight) != shape:
        return f"needs {shape} weights in {path}"
    if isinstance(weight, Tensor) and weight.dtype not in FLOATING:
        return f"does not support the type of {path}, {weight.dtype}"
    refusal = why_not_head if path == HEAD else why_not_compiled
    if isinstance(weight, Quantized) and (reason := refusal(weight)) is not None:
        return f"cannot multiply by {path}, which {reason}"
    biased = weight.bias is not None if isinstance(weight, Quantized) else f"{path}.bias" in parts.tensors
    return f"does not support the bias of {path}" if biased and not path.endswith(ATTENTION_IN) else None


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(weight.shape) if isinstance(weight, Tensor) else (weight.out_features, weight.in_features)


def _block_paths(config: Any) -> list[str]:
    return [f"model.layers.{number}" for number in range(config.num_hidden_layers)]


def _linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Sizes (out, in) of every linear layer in the blocks."""
    d, f, e = config.hidden_size, config.intermediate_size, _head_size(config)
    heads, key_heads = config.num_attention_heads * e, config.num_key_value_heads * e
    shapes = dict(zip(ATTENTION_IN, [(heads, d), (key_heads, d), (key_heads, d)], strict=True))
    shapes |= {ATTENTION_OUT: (d, heads), **dict.fromkeys(NETWORK_IN, (f, d)), NETWORK_OUT: (d, f)}
    return {f"{block}.{name}": shape for block in _block_paths(config) for name, shape in shapes.items()}


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _decoder(parts: Parts, max_length: int, lut_bytes: int, head: Head) -> Decoder:
    config, embeddings = parts.config, parts.weight(EMBEDDINGS)
    assert embeddings is not None
    return Decoder(
        [_block(parts, block) for block in _block_paths(config)],
        embeddings=embeddings.matrix() if isinstance(embeddings, Quantized) else embeddings,
        norm=parts.tensors["model.norm.weight"],
        head=_head(parts, head),
        angles=_angles(config, max_length),
        key_heads=config.num_key_value_heads,
        epsilon=config.rms_norm_eps,
        lut_bytes=lut_bytes,
    )


def _head(parts: Parts, head: Head) -> Tensor | ByteRows | HeadLayer:
    weight = parts.weight(HEAD)
    assert weight is not None
    if isinstance(weight, Tensor):
        return ByteRows.of(weight) if head == "int8" else narrowest(weight)
    if head != "exact":
        raise KernelError("an int8 head is made of a 16-bit lm_head, and this one is quantized; leave --head out")
    return weight


def _block(parts: Parts, block: str) -> DecoderBlock:
    attention_norm, network_norm = (parts.tensors[f"{block}.{name}_layernorm.weight"] for name in NORMS)
    return DecoderBlock(
        attention_norm=attention_norm,
        attention_in=[parts.linear(f"{block}.{name}") for name in ATTENTION_IN],
        attention_out=parts.linear(f"{block}.{ATTENTION_OUT}"),
        network_norm=network_norm,
        network_in=[parts.linear(f"{block}.{name}") for name in NETWORK_IN],
        network_out=parts.linear(f"{block}.{NETWORK_OUT}"),
    )


def _angles(config: Any, max_length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, [max_length, e]."""
    e, settings = _head_size(config), config.rope_parameters
    if settings["rope_type"] == "default":
        frequencies, factor = settings["rope_theta"] ** -(torch.arange(0, e, 2).float() / e), 1.0
    else:
        known = config if isinstance(config, PreTrainedConfig) else AutoConfig.for_model(**vars(config))
        frequencies, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](known, "cpu", seq_len=max_length)
    angles = torch.outer(torch.arange(max_length).float(), frequencies).repeat(1, 2)  # [max_length, e]
    return angles.cos() * factor, angles.sin() * factor


def narrowest(weight: Tensor) -> Tensor:
    """The weight in 16 bits if that is exact: a model in float32 often comes from a file in 16 bits."""
    weight = weight.float() if weight.dtype == torch.float64 else weight
    for dtype in (torch.float16, torch.bfloat16) if weight.itemsize > 2 else ():
        if torch.equal(weight.to(dtype).to(weight.dtype), weight):
            return weight.to(dtype)
    return weight
