"""LoRA of peft on quantized layers, as `get_peft_model`, `PeftModel.from_pretrained` and `load_adapter` make it.

peft asks a fixed list of functions for the layer of an adapter, and has no way to add one: a class that the
configuration names (`_register_custom_module`) is not saved with it. So the function for the layers of `aqlm`, whose
adapter adds to the output of any layer, is asked for ours, too. import_hooks.py imports this module once peft has been.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.lora import model as _model
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from aqlm_kernels.matrices.matrix import QuantizedLayer

model: Any = _model
_dispatch_aqlm = model.dispatch_aqlm


class QuantizedLoraLinear(AqlmLoraLinear):
    """The adapter of peft for a layer of codes, into which it cannot be merged."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises NotImplementedError, as peft's own class does, with the way out."""
        raise NotImplementedError(
            "an adapter cannot be merged into the codes of a quantized layer; keep it beside the model, or merge it "
            "into the dequantized model that `aqlm pack --format dense` writes"
        )


def dispatch(target: nn.Module, adapter_name: str, config: Any, **options: Any) -> nn.Module | None:
    """The adapter of a quantized layer; None for a layer of another kind."""
    layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    adapter: nn.Module | None
    if isinstance(layer, QuantizedLayer) and hasattr(layer, "in_features"):  # which an embedding has not
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            adapter = QuantizedLoraLinear(target, adapter_name, config=config, **options)
    else:
        adapter = _dispatch_aqlm(target, adapter_name, config=config, **options)
    return adapter


model.dispatch_aqlm = dispatch
