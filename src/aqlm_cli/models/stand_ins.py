"""Stand-ins for the layers of a native checkpoint: they have its tensors and no weight, and compute on the meta device.

A trial (trial.py) puts them where transformers would have the quantized layers, and so finds a network that accesses a
weight while it loads or computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from aqlm_cli.models.blocks import replace_module
from aqlm_cli.runs.files import TensorLayout
from aqlm_kernels.hf_quantizer import NativeConfig, NativeQuantizer
from aqlm_kernels.native import EmbeddingRoom, HeadRoom, Room

TRIAL = "aqlm-cli-native-trial"
"""Name of `NativeTrial` in transformers."""


class NoWeightError(AttributeError):
    """Access to the weight of the layer at `path`, which is quantized."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} is quantized and has no weight")
        self.path = path


class NoWeight(nn.Module):
    """A module without a weight at `path`."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise NoWeightError(self.path)
        return super().__getattr__(name)


def native_trial(quantization: Mapping[str, Any], layouts: Mapping[str, TensorLayout]) -> dict[str, Any]:
    """The `quantization_config` of a native checkpoint with these tensors, for a trial."""
    return {**quantization, "quant_method": TRIAL, "tensors": dict(layouts)}


class _Linear(NoWeight):
    def __init__(self, path: str, shape: tuple[int, int], bias: nn.Parameter | None, buffers: Mapping[str, Tensor]):
        super().__init__(path)
        self.out_features, self.in_features = shape
        self.bias = bias
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], self.out_features))


class _Embedding(NoWeight):
    def __init__(self, room: EmbeddingRoom, dtype: torch.dtype) -> None:
        super().__init__(room.path)
        self.num_embeddings, self.embedding_dim = room.shape
        self.padding_idx, self.dtype = room.padding_idx, dtype
        for name, tensor in room.named_buffers():
            self.register_buffer(name, tensor)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.empty((*ids.shape, self.embedding_dim), dtype=self.dtype, device=ids.device)


@register_quantization_config(TRIAL)
class NativeTrialConfig(NativeConfig):
    """Settings of `native_trial`, as transformers parses them."""

    def __init__(self, tensors: dict[str, TensorLayout], **settings: Any) -> None:
        super().__init__(**settings)
        self.tensors = tensors


@register_quantizer(TRIAL)
class NativeTrial(NativeQuantizer):
    """Quantizer that inserts a stand-in wherever transformers would insert a quantized layer."""

    quantization_config: NativeTrialConfig

    def empty_tensors(self, files: Sequence[str]) -> Mapping[str, Mapping[str, Tensor]]:
        tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, layout in self.quantization_config.tensors.items():
            path, _, last = name.rpartition(".")
            tensors[path][last] = torch.empty(layout.shape, dtype=layout.dtype, device="meta")
        return tensors

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        super()._process_model_before_weight_loading(model, **options)
        heads: dict[str, tuple[int, int]] = {}
        for path, module in list(model.named_modules()):
            if isinstance(module, EmbeddingRoom):
                replace_module(model, path, _Embedding(module, self.dtype))
                heads |= dict.fromkeys(module.heads, module.shape)
            elif isinstance(module, Room):
                replace_module(model, path, _Linear(path, module.shape, module.bias, dict(module.named_buffers())))
        for path, shape in heads.items():
            room = model.get_submodule(path)
            assert isinstance(room, HeadRoom)
            replace_module(model, path, _Linear(path, shape, room.bias, {}))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        """Leave the stand-ins where they are."""
