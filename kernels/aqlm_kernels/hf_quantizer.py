"""Native checkpoints in stock transformers: a quantization config and a quantizer, registered under their method.

    import aqlm_kernels
    model = AutoModelForCausalLM.from_pretrained("packed")

The one module of this package that imports transformers; import_hooks.py imports it once somebody else has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from aqlm_kernels.errors import KernelError
from aqlm_kernels.matrices.matrix import QuantizedLayer
from aqlm_kernels.native import NATIVE, VERSION, fill, make_room, native_layers, packed_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # which is being imported when this module is

DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
"""Types of tensors by their names in safetensors."""


@register_quantization_config(NATIVE)
class NativeConfig(QuantizationConfigMixin):
    """`quantization_config` of a native checkpoint, as native.py describes it."""

    quant_method: Any

    def __init__(
        self, layers: dict[str, dict[str, str]], version: int = VERSION, quant_method: str = NATIVE, **_: Any
    ) -> None:
        self.quant_method = quant_method
        self.version = version
        self.layers = layers

    def __repr__(self) -> str:
        return f"{type(self).__name__}(version={self.version}, {len(self.layers)} layers)"


@register_quantizer(NATIVE)
class NativeQuantizer(HfQuantizer):
    """Makes the quantized layers of a native checkpoint while transformers loads it, and writes them when it saves."""

    requires_calibration = True
    quantization_config: NativeConfig
    dtype = torch.float32

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        layers = native_layers(self.quantization_config.to_dict())
        make_room(model, layers, self.empty_tensors(options.get("checkpoint_files") or ()), model.all_tied_weights_keys)
        _untie_quantized(model)

    def empty_tensors(self, files: Sequence[str]) -> Mapping[str, Mapping[str, Tensor]]:
        """Every tensor in the files, empty, by path of its module and last part of its name."""
        tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for file in files:
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - it is no dict
                    path, _, last = name.rpartition(".")
                    part = stored.get_slice(name)
                    dtype = DTYPES.get(part.get_dtype(), torch.float32)
                    tensors[path][last] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        return tensors

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        spread = set((getattr(model, "hf_device_map", None) or {}).values())
        if "disk" in spread or (len(spread) > 1 and "cpu" in spread):
            raise KernelError("a quantized model cannot be offloaded; leave cpu and disk out of its device_map")
        fill(model, self.dtype)
        network: Any = model
        embeddings = network.get_input_embeddings(), network.get_output_embeddings()
        if any(isinstance(module, QuantizedLayer) for module in embeddings):
            network.resize_token_embeddings = partial(_unresized, embeddings[0])
        network._weight_conversions = []  # saved under the names of its modules, by which quantized layers are known

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        adapters_alone = getattr(model, "_hf_peft_config_loaded", False)
        return (None if adapters_alone else packed_state(model)), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters on top of it."""
        return True


def _unresized(
    embeddings: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
) -> Any:
    """`resize_token_embeddings` of a model with a quantized table; KernelError for another number of tokens."""
    tokens = embeddings.num_embeddings
    wanted = tokens if new_num_tokens is None else new_num_tokens
    if wanted != tokens or wanted % (pad_to_multiple_of or 1):
        raise KernelError(
            f"quantized embeddings and heads cannot be resized from {tokens} tokens; resize the base model, then "
            "quantize it"
        )
    return embeddings


def _untie_quantized(model: PreTrainedModel) -> None:
    """Forget pairs of tied weights of which one has room for a quantized layer: there is no weight to tie."""
    listed = model.state_dict().keys()
    tied = {name: other for name, other in model.all_tied_weights_keys.items() if {name, other} <= listed}
    module: Any
    for module in model.modules():
        if hasattr(module, "_tied_weights_keys"):
            module._tied_weights_keys = None  # from which `tie_weights` would find them again
    model._tied_weights_keys = model.all_tied_weights_keys = tied
