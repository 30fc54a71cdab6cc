"""Loading a part of a model through transformers' extension point for quantized models; the rest is never read.

A network accesses its modules while it is loaded: it ties weights of one block to those of another, computes buffers
for its blocks, and initializes a weight by the name of the layer that holds it. So a skipped module keeps its class,
its submodules and its weights; these are hidden from lists (`state_dict`, `named_parameters`, `named_buffers`), take no
memory, and are marked as initialized. transformers then neither reads nor initializes them, and access by name works.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

LEFT_OUT = "aqlm-cli-left-out"
"""Name of `LeaveOut` in transformers."""


def leaving_out(paths: Sequence[str], kept: Collection[str] = ()) -> dict[str, Any]:
    """A `quantization_config` that leaves out the modules at `paths`, and all in them but what is at or in `kept`."""
    return {"quant_method": LEFT_OUT, "paths": list(paths), "kept": list(kept)}


@register_quantization_config(LEFT_OUT)
class LeftOut(QuantizationConfigMixin):
    """Settings of `leaving_out`, as transformers parses them."""

    quant_method: Any

    def __init__(self, paths: list[str], kept: list[str], quant_method: str) -> None:
        self.paths = paths
        self.kept = kept
        self.quant_method = quant_method


@register_quantizer(LEFT_OUT)
class LeaveOut(HfQuantizer):
    """transformers loads the model without the modules at `paths`."""

    quantization_config: LeftOut

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        settings = self.quantization_config
        for path in settings.paths:
            for name, module in model.get_submodule(path).named_modules(prefix=path):
                if not any(_within(name, kept) for kept in settings.kept):
                    _hide(module)
                    # A module with kept submodules may compute them, and finds its own hidden weights initialized.
                    module._is_hf_initialized = not any(_within(kept, name) for kept in settings.kept)
        listed = model.state_dict().keys()
        tied = model.all_tied_weights_keys
        model.all_tied_weights_keys = {name: tied[name] for name in tied if {name, tied[name]} <= listed}

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _within(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


def _hide(module: nn.Module) -> None:
    """Turn the module's own parameters and buffers, which must be empty, into plain attributes."""
    for kind in (module._parameters, module._buffers):
        for name, tensor in list(kind.items()):
            if isinstance(tensor, Tensor):
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
                del kind[name]
                module.__dict__[name] = tensor
