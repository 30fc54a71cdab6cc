"""One token after another, by compiled code where it knows the family, else by transformers' own loop: which, is said.

transformers spends some milliseconds of Python on every token, most of the time of a small model. The prompt is read by
transformers in either case: there the work is in the products.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aqlm_cli.config import Head
from aqlm_kernels import AdditiveLinear, ByteRows, Decoder, DecoderBlock, KernelError, choose

FAMILIES = ("llama", "mistral", "qwen2")
FIXED_ANGLES = ("default", "linear", "llama3", "yarn")  # which do not change as the text grows
WITH_BIAS = ("q_proj", "k_proj", "v_proj")
PLANES = {"cpu-avx512": 2, "cpu-avx512-8bit": 1, "cpu-lut": 0}


class Decoding(Protocol):
    """`name` says what runs; tokens follow on one another from the last `read`."""

    name: str

    def read(self, ids: Tensor) -> Tensor:
        """The logits [vocabulary] of what follows the prompt [length]."""
        ...

    def step(self, token: int) -> Tensor:
        """The logits [vocabulary] of what follows the token."""
        ...


def decoding_of(network: nn.Module, room: int, backend: str | None = None, head: Head = "exact") -> Decoding:
    """For sequences of up to `room` tokens; packed layers multiply by the named backend, or the first that can.

    Raises KernelError where the named backend cannot serve, or an int8 head is asked of a model that transformers runs.
    """
    layers = [module for module in network.modules() if isinstance(module, AdditiveLinear)]
    if backend is not None and not layers:
        raise KernelError(f"backend {backend} multiplies by packed layers, and the model has none; leave it out")
    names = sorted({choose(layer.packed(), layer.codes.device, backend).name for layer in layers})
    reason = _why_not(network, room, names)
    if reason is None:
        return _Compiled(network, room, names[0], head)
    if head != "exact":
        raise KernelError(f"an int8 head needs the compiled decoder: {reason}; leave --head out")
    for layer in layers:
        layer.backend = backend
    return _Transformers(network, ", ".join(["transformers", *names]) + (f" ({reason})" if layers else ""))


class _Transformers:
    def __init__(self, network: nn.Module, name: str) -> None:
        self.name = name
        self._network: Any = network
        self._cache: Any = None

    def read(self, ids: Tensor) -> Tensor:
        self._cache = None
        return self._forward(ids)

    def step(self, token: int) -> Tensor:
        return self._forward(torch.tensor([token], device=self._network.device))

    @torch.inference_mode()
    def _forward(self, ids: Tensor) -> Tensor:
        out = self._network(ids[None], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[0, -1].float()
        return logits


class _Compiled:
    def __init__(self, network: nn.Module, room: int, backend: str, head: Head) -> None:
        self.name = f"compiled decoder, {backend}"
        self._network: Any = network
        self._decoder = _decoder(network, room, PLANES[backend], head)
        self.step(0)  # compiles, in some seconds, where no earlier process has

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        out = self._network(ids[None], use_cache=True, logits_to_keep=1)
        layers = out.past_key_values.layers
        self._decoder.start([layer.keys[0] for layer in layers], [layer.values[0] for layer in layers])
        logits: Tensor = out.logits[0, -1].float()
        return logits

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        return self._decoder.step(token)


def _why_not(network: Any, room: int, backends: list[str]) -> str | None:
    """Why the compiled decoder cannot run this network, or None."""
    config = network.config
    if config.model_type not in FAMILIES:
        return f"the compiled decoder knows {', '.join(FAMILIES)}, this is {config.model_type}"
    if len(backends) != 1 or backends[0] not in PLANES:
        return f"the compiled decoder needs one of {', '.join(PLANES)}"
    if config.hidden_act != "silu":
        return f"the compiled decoder knows no {config.hidden_act}"
    rotary = getattr(network.model.rotary_emb, "rope_type", "default")
    if rotary not in FIXED_ANGLES:
        return f"the compiled decoder knows no {rotary} positions"
    if (getattr(config, "sliding_window", None) or room) < room:
        return f"the compiled decoder sees all tokens, this model {config.sliding_window}"
    for block in network.model.layers:
        for path, layer in _linears(block).items():
            if not isinstance(layer, AdditiveLinear):
                return f"the compiled decoder needs codes for {path}, too"
            if layer.bias is not None and path not in WITH_BIAS:
                return f"the compiled decoder knows no bias of {path}"
    return None


def _linears(block: Any) -> dict[str, nn.Module]:
    attention, mlp = block.self_attn, block.mlp
    names = {name: getattr(attention, name) for name in (*WITH_BIAS, "o_proj")}
    return {**names, **{name: getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}}


def _decoder(network: Any, room: int, planes: int, head: Head) -> Decoder:
    config, core = network.config, network.model
    cosines, sines = core.rotary_emb(torch.zeros(1, 1), torch.arange(room)[None])  # [1, room, e]
    return Decoder(
        [_block(block) for block in core.layers],
        embeddings=core.embed_tokens.weight,
        norm=core.norm.weight,
        head=ByteRows.of(network.lm_head.weight) if head == "int8" else narrowest(network.lm_head.weight),
        angles=(cosines[0], sines[0]),
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        epsilon=config.rms_norm_eps,
        planes=planes,
    )


def _block(block: Any) -> DecoderBlock:
    layers: dict[str, Any] = _linears(block)
    attention_in = [layers[name] for name in WITH_BIAS]
    return DecoderBlock(
        attention_norm=block.input_layernorm.weight,
        attention_in=[layer.packed() for layer in attention_in],
        attention_bias=[layer.bias for layer in attention_in],
        attention_out=layers["o_proj"].packed(),
        network_norm=block.post_attention_layernorm.weight,
        network_in=[layers[name].packed() for name in ("gate_proj", "up_proj")],
        network_out=layers["down_proj"].packed(),
    )


def narrowest(weight: Tensor) -> Tensor:
    """The same numbers in 16 bits, where that loses nothing: a model in float32 comes from a file in 16 bits."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(weight.to(dtype).to(weight.dtype), weight):
            return weight.to(dtype)
    return weight
