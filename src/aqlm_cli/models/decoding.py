"""Decoding token by token, in compiled code where it supports the model, else in transformers; `name` says which.

transformers spends some milliseconds of Python on every token, most of the time of a small model, and seconds on its
own imports before the first. The compiled decoder needs neither the network nor, from a checkpoint, transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aqlm_cli.models.loading import load_network
from aqlm_cli.models.names import CODE_TENSORS
from aqlm_cli.models.quantization import is_quantized
from aqlm_cli.models.source import ModelSource, model_config, tensor_index
from aqlm_cli.models.stepping import Stepping
from aqlm_cli.runs.files import load_tensors
from aqlm_cli.spec.config import Head
from aqlm_kernels import (
    AdditiveLinear,
    ByteRows,
    Decoder,
    DecoderBlock,
    KernelError,
    choose,
    coded_layers,
    from_checkpoint,
    smallest,
)

FAMILIES = ("llama", "mistral", "qwen2")
FIXED_ANGLES = ("default", "linear", "llama3", "yarn")  # rope types that do not change as the text grows
ATTENTION_IN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_OUT = "self_attn.o_proj"
NETWORK_IN = ("mlp.gate_proj", "mlp.up_proj")
NETWORK_OUT = "mlp.down_proj"
LINEARS = len((*ATTENTION_IN, ATTENTION_OUT, *NETWORK_IN, NETWORK_OUT))  # linear layers in a block
NORMS = ("input", "post_attention")
EMBEDDINGS, LAST = "model.embed_tokens.weight", "lm_head.weight"
COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
"""Keys of config.json that give the sizes of the compiled decoder."""

LUT_BYTES = {"cpu-avx512": 2, "cpu-avx512-8bit": 1, "cpu-lut": 0}


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

    Raises KernelError if the named backend cannot serve, or for an int8 head in a model that transformers runs.
    """
    parts = Parts.of(network)
    layers = parts.layers.values()
    if backend is not None and not layers:
        raise KernelError(f"backend {backend} needs packed layers, and the model has none; leave --backend out")
    names = _backends(parts, backend)
    reason = _why_not(parts, max_length, names)
    if reason is None:
        return _Compiled(parts, max_length, names[0], head)
    if head != "exact":
        raise KernelError(f"an int8 head needs the compiled decoder: {reason}; leave --head out")
    for layer in layers:
        layer.backend = backend
    return _Transformers(network, ", ".join(["transformers", *names]) + (f" ({reason})" if layers else ""))


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
            return _Compiled(parts, max_length, names[0], head)
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
    if not plain or len(codebooks) != LINEARS * said["num_hidden_layers"]:
        return None
    return SimpleNamespace(**said) if all(len(shape) == 4 and shape[1] <= 256 for shape in codebooks) else None


class Parts(NamedTuple):
    """Tensors and linear layers of a model, by name."""

    config: Any
    layers: Mapping[str, AdditiveLinear]
    tensors: Mapping[str, Tensor]  # all others

    @classmethod
    def of(cls, network: nn.Module) -> Parts:
        tensors = {path: parameter.detach() for path, parameter in network.named_parameters(remove_duplicate=False)}
        return cls(network.config, coded_layers(network), tensors)

    @classmethod
    def read(cls, source: ModelSource, config: Any) -> Parts:
        """Parts of an AQLM checkpoint; of two tensors that config.json ties, one may be missing from it.

        Two that are both stored stay two: transformers ties them only if they are equal, which changes no value.
        """
        files = {stored.file for stored in tensor_index(source.directory).values()}
        tensors = {name: tensor for file in files for name, tensor in load_tensors(file).items()}
        layers = {}
        for path in [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]:
            own = {
                name: tensors.pop(f"{path}.{name}") for name in (*CODE_TENSORS, "bias") if f"{path}.{name}" in tensors
            }
            if {"codebooks", "scales"} <= own.keys():
                layers[path] = AdditiveLinear(from_checkpoint(own), own.get("bias")).requires_grad_(False)
        for name, other in ((EMBEDDINGS, LAST), (LAST, EMBEDDINGS)) if config.tie_word_embeddings else ():
            if other in tensors:
                tensors.setdefault(name, tensors[other])
        return cls(config, layers, tensors)


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
    def __init__(self, parts: Parts, max_length: int, backend: str, head: Head) -> None:
        self.name = f"compiled decoder, {backend}"
        decoder = _decoder(parts, max_length, LUT_BYTES[backend], head)
        decoder.step(0)  # compiles, which takes some seconds, unless an earlier process did
        self.prefill, self.step = decoder.prefill, decoder.step


def _backends(parts: Parts, backend: str | None) -> list[str]:
    kinds = {(layer.codebooks.shape, layer.codes.device) for layer in parts.layers.values()}
    return sorted({choose(smallest(*shape), device, backend).name for shape, device in kinds})


# ------------------------------------------------------------------------------------------------ the compiled decoder


def _why_not(parts: Parts, max_length: int, backends: list[str]) -> str | None:
    """Reason why the compiled decoder cannot run the model, or None."""
    config = parts.config
    if config.model_type not in FAMILIES:
        return f"the compiled decoder supports {', '.join(FAMILIES)}, not {config.model_type}"
    if len(backends) != 1 or backends[0] not in LUT_BYTES:
        return f"the compiled decoder needs one of {', '.join(LUT_BYTES)}"
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
        layer = parts.layers.get(path)
        if layer is None:
            return f"the compiled decoder needs {path} to be quantized"
        if (layer.out_features, layer.in_features) != shape:
            return f"the compiled decoder needs {shape} weights in {path}"
        if layer.bias is not None and not path.endswith(ATTENTION_IN):
            return f"the compiled decoder does not support the bias of {path}"
    for block in _block_paths(config):
        for stack in ATTENTION_IN, NETWORK_IN:
            if len({parts.layers[f"{block}.{name}"].codebooks.shape for name in stack}) > 1:
                return f"the compiled decoder needs one scheme for {', '.join(stack)} of {block}"
    for name, size in _other_shapes(config).items():
        if name not in parts.tensors or parts.tensors[name].shape != size:
            return f"the compiled decoder needs a tensor {name} of {size}"
    return None


def _block_paths(config: Any) -> list[str]:
    return [f"model.layers.{number}" for number in range(config.num_hidden_layers)]


def _linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Sizes (out, in) of every linear layer in the blocks."""
    d, f, e = config.hidden_size, config.intermediate_size, _head_size(config)
    heads, key_heads = config.num_attention_heads * e, config.num_key_value_heads * e
    shapes = dict(zip(ATTENTION_IN, [(heads, d), (key_heads, d), (key_heads, d)], strict=True))
    shapes |= {ATTENTION_OUT: (d, heads), **dict.fromkeys(NETWORK_IN, (f, d)), NETWORK_OUT: (d, f)}
    return {f"{block}.{name}": shape for block in _block_paths(config) for name, shape in shapes.items()}


def _other_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    d, vocabulary = config.hidden_size, config.vocab_size
    norms = [f"{block}.{name}_layernorm.weight" for block in _block_paths(config) for name in NORMS]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys([*norms, "model.norm.weight"], (d,))
    return {**shapes, EMBEDDINGS: (vocabulary, d), LAST: (vocabulary, d)}


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _decoder(parts: Parts, max_length: int, lut_bytes: int, head: Head) -> Decoder:
    config, tensors = parts.config, parts.tensors
    return Decoder(
        [_block(parts, block) for block in _block_paths(config)],
        embeddings=tensors[EMBEDDINGS],
        norm=tensors["model.norm.weight"],
        head=ByteRows.of(tensors[LAST]) if head == "int8" else narrowest(tensors[LAST]),
        angles=_angles(config, max_length),
        key_heads=config.num_key_value_heads,
        epsilon=config.rms_norm_eps,
        lut_bytes=lut_bytes,
    )


def _block(parts: Parts, block: str) -> DecoderBlock:
    layers, tensors = parts.layers, parts.tensors
    attention_norm, network_norm = (tensors[f"{block}.{name}_layernorm.weight"] for name in NORMS)
    return DecoderBlock(
        attention_norm=attention_norm,
        attention_in=[layers[f"{block}.{name}"] for name in ATTENTION_IN],
        attention_out=layers[f"{block}.{ATTENTION_OUT}"],
        network_norm=network_norm,
        network_in=[layers[f"{block}.{name}"] for name in NETWORK_IN],
        network_out=layers[f"{block}.{NETWORK_OUT}"],
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
