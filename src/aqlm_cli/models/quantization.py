"""Which method a model is quantized with already, from its config.json or, where that says nothing, from its tensors.

MLX has a key of its own in config.json, some have a file beside it, and old AutoGPTQ has neither in a copy made by
hand: the names and types of the tensors tell.
"""

from __future__ import annotations

from collections.abc import Mapping

from aqlm_cli.errors import ModelError, shortened
from aqlm_cli.models.source import ModelSource, StoredTensor, model_config, tensor_index
from aqlm_cli.models.weight_files import has_weights

WHOLE = {"F16", "BF16", "F32", "F64"}
"""Types that ordinary weights have."""


def is_coded(source: ModelSource) -> bool:
    """Whether it is an AQLM checkpoint."""
    return _said(source) == "aqlm"


def refuse_quantized(source: ModelSource) -> None:
    """ModelError for all that is not ordinary weights in 16, 32 or 64 bits."""
    method = _said(source)
    if method is None and has_weights(source.directory):
        method = _seen(tensor_index(source.directory))
    if method is not None:
        original = f", {source.base_model}" if source.base_model not in (None, source.name) else ""
        raise ModelError(
            f"{source.name} is quantized already, with {method}; use the model it was made from{original}, or a "
            f"copy of it in 16 bits"
        )


def _said(source: ModelSource) -> str | None:
    """What config.json says of how weights are stored; None for ordinary ones."""
    config = model_config(source)
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and "group_size" in mlx and "bits" in mlx:
        return f"MLX ({shortened(str(mlx['bits']))} bits, groups of {shortened(str(mlx['group_size']))})"
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    if "quant_method" in settings:
        return shortened(str(settings["quant_method"]))
    return "bitsandbytes" if "load_in_4bit" in settings or "load_in_8bit" in settings else "a method it does not name"


def _seen(stored: Mapping[str, StoredTensor]) -> str | None:
    """What its tensors are of; None for weights of ordinary types."""
    names = stored.keys()
    packed = next((name for name in names if name.endswith(".qweight")), None)
    if packed is not None:
        return f"GPTQ, AWQ or the like ({shortened(packed)})"
    odd = {name: tensor.dtype for name, tensor in stored.items() if name.endswith("weight") and len(tensor.shape) > 1}
    name = next((name for name, dtype in odd.items() if dtype not in WHOLE), None)
    if name is None:
        return None
    if odd[name] == "U32" and name.replace(".weight", ".biases") in names:
        return f"MLX ({shortened(name)} is of U32)"
    return f"numbers of the type {odd[name]} ({shortened(name)})"
