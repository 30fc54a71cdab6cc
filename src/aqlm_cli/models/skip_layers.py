"""Loading a part of a model through transformers' extension point for quantized models; the rest is never read.

A network accesses its modules while it is loaded: it ties weights of one block to those of another, computes buffers
for its blocks, and initializes a weight by the name of the layer that holds it. So a skipped module keeps its class,
its submodules and its weights; these are hidden from lists (`state_dict`, `named_parameters`, `named_buffers`), take no
memory, and are marked as initialized. transformers then neither reads nor initializes them, and access by name works.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from aqlm_cli.models.blocks import replace_module

KINDS = ("_parameters", "_buffers")

HIDDEN = "_aqlm_cli_hidden"
"""The attribute with the names that `_hide` took from each of KINDS."""

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


class Refillable:
    """One network without weights that `from_pretrained` fills part after part: its modules are made once.

    `network_type` stands for the class of the network. Whoever makes an instance of it gets the one network, with
    copies of the parts to fill in their places; after the load the empty parts take their places again.
    """

    def __init__(self, network_type: type[PreTrainedModel]) -> None:
        self._network: PreTrainedModel | None = None
        self._tied: dict[str, str] = {}
        self._parts: Sequence[str] = ()
        self._empty: dict[str, nn.Module] = {}

        def instance(_: type, *args: Any, **kwargs: Any) -> PreTrainedModel:
            if self._network is None:
                self._network = network_type(*args, **kwargs)
                self._tied = self._network.all_tied_weights_keys
            return self._prepared(self._network)

        self.network_type: type[PreTrainedModel] = type(
            network_type.__name__, (network_type,), {"__new__": instance, "__module__": network_type.__module__}
        )

    def filled(self, parts: Sequence[str], load: Callable[[], PreTrainedModel]) -> nn.Module:
        """The first of the parts, with its weights. `load` makes an instance of `network_type` and loads into it."""
        self._parts, self._empty = parts, {}
        try:
            return load().get_submodule(parts[0])
        finally:
            for path, module in self._empty.items():
                assert self._network is not None
                replace_module(self._network, path, module)

    def _prepared(self, network: PreTrainedModel) -> PreTrainedModel:
        network.all_tied_weights_keys = self._tied
        self._empty = {path: network.get_submodule(path) for path in self._parts}
        memo: dict[int, Any] = {}  # parts that share a weight go on sharing it
        for path, module in self._empty.items():
            part = deepcopy(module, memo)
            for inner in part.modules():
                show(inner)
            replace_module(network, path, part)
        return network


def _within(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


def _hide(module: nn.Module) -> None:
    """Turn the module's own parameters and buffers, which must be empty, into plain attributes."""
    for kind in KINDS:
        tensors = getattr(module, kind)
        hidden = module.__dict__.setdefault(HIDDEN, {}).setdefault(kind, [])
        for name, tensor in list(tensors.items()):
            if isinstance(tensor, Tensor):
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
                del tensors[name]
                module.__dict__[name] = tensor
                hidden.append(name)


def show(module: nn.Module) -> None:
    """Undo `_hide`: what was left out is a parameter or buffer again, and still empty."""
    for kind, names in module.__dict__.pop(HIDDEN, {}).items():
        for name in names:
            tensor = module.__dict__.pop(name)
            tensor.__dict__.pop("_is_hf_initialized", None)  # two modules may share it
            getattr(module, kind)[name] = tensor
    module.__dict__.pop("_is_hf_initialized", None)
