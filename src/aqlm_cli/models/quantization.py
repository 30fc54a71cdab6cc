"""Detection of models that are quantized already, from config.json or, if that says nothing, from their tensors.

MLX has its own key in config.json, other methods have a separate file, and a manual copy of an old AutoGPTQ model has
neither: then the names and types of the tensors decide.
"""

from __future__ import annotations

from collections.abc import Mapping

from aqlm_cli.errors import ModelError, shortened
from aqlm_cli.models.source import ModelSource, StoredTensor, model_config, tensor_index
from aqlm_cli.models.weight_files import has_weights
from aqlm_kernels import NATIVE

UNQUANTIZED = {"F16", "BF16", "F32", "F64"}
"""Types of ordinary weights."""


def is_quantized(source: ModelSource) -> bool:
    """True for a checkpoint in a quantized format that can be loaded: AQLM's or the native one."""
    return _method_in_config(source) in ("aqlm", NATIVE)


def is_native(source: ModelSource) -> bool:
    """True for a checkpoint in the native format (aqlm_kernels/native.py)."""
    return _method_in_config(source) == NATIVE


def refuse_quantized(source: ModelSource) -> None:
    """Raise ModelError unless the weights are ordinary ones in 16, 32 or 64 bits."""
    method = _method_in_config(source)
    if method is None and has_weights(source.directory):
        method = _method_in_tensors(tensor_index(source.directory))
    if method is not None:
        base = f", {source.base_model}" if source.base_model not in (None, source.name) else ""
        raise ModelError(
            f"{source.name} is quantized already, with {method}; use its base model{base}, or a copy of it in 16 bits"
        )


def _method_in_config(source: ModelSource) -> str | None:
    """Quantization method in config.json; None for ordinary weights."""
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


def _method_in_tensors(stored: Mapping[str, StoredTensor]) -> str | None:
    """Quantization method by names and types of the tensors; None for weights of ordinary types."""
    names = stored.keys()
    packed = next((name for name in names if name.endswith(".qweight")), None)
    if packed is not None:
        return f"GPTQ, AWQ or the like ({shortened(packed)})"
    odd = {name: tensor.dtype for name, tensor in stored.items() if name.endswith("weight") and len(tensor.shape) > 1}
    name = next((name for name, dtype in odd.items() if dtype not in UNQUANTIZED), None)
    if name is None:
        return None
    if odd[name] == "U32" and name.replace(".weight", ".biases") in names:
        return f"MLX ({shortened(name)} has type U32)"
    return f"values of type {odd[name]} ({shortened(name)})"
