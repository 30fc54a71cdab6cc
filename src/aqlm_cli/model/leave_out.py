"""transformers' extension point for quantized models, used to load a model without the layers that have codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from aqlm_cli.blocks import replace_module

CODED = "aqlm-cli-codes"
"""The name under which transformers knows `LeaveOut`."""


def leaving_out(paths: Sequence[str]) -> dict[str, Any]:
    """A `quantization_config` that leaves the layers at `paths` out."""
    return {"quant_method": CODED, "paths": list(paths)}


@register_quantization_config(CODED)
class CodedLayers(QuantizationConfigMixin):
    """What transformers makes of `leaving_out`."""

    quant_method: Any

    def __init__(self, paths: list[str], quant_method: str) -> None:
        self.paths = paths
        self.quant_method = quant_method


@register_quantizer(CODED)
class LeaveOut(HfQuantizer):
    """transformers loads the model without the layers at `paths`."""

    quantization_config: CodedLayers

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for path in self.quantization_config.paths:
            replace_module(model, path, nn.Identity())

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
