"""Trial of a packed checkpoint in transformers, before it is written: on the meta device, and in full if small.

The `aqlm` inference package replaces each quantized linear layer by its own module. That has no `weight`, and a network
that accesses one while it loads or computes fails. The package need not be installed for a trial: a stand-in has the
same parameters and no weight either, and transformers' own rule says which layers it replaces. A native checkpoint has
stand-ins of its own (stand_ins.py).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from aqlm_cli.errors import ModelError
from aqlm_cli.models.blocks import count_parameters, replace_module
from aqlm_cli.models.gaps import why_unfit
from aqlm_cli.models.loading import first_line, load_config, load_network, quiet, without_weights
from aqlm_cli.models.names import CODE_TENSORS, placements
from aqlm_cli.models.native_checkpoint import load_dense
from aqlm_cli.models.positions import stated_length
from aqlm_cli.models.quantization import is_native
from aqlm_cli.models.source import ModelSource, model_config, tensor_index
from aqlm_cli.models.stand_ins import NoWeight, NoWeightError, native_trial
from aqlm_cli.runs.files import TensorLayout
from aqlm_kernels import NATIVE, from_checkpoint

TRIAL = "aqlm-cli-trial"
"""Name of `Trial` in transformers."""

TOKENS = 40
"""Tokens of the trial forward, at most: more rows than the LUT kernels take."""

SMALL = 32_000_000
"""Most parameters of a network that is loaded twice, in 32 bits, to compare the logits."""

SAME = 1e-3
"""Relative difference of one token's logits above which they differ. Sums in another order change less than 1e-5, and
seldom select another expert."""

EXCEPTIONS = "linear_weights_not_to_quantize"


def refusal(
    network: transformers.PreTrainedModel,
    layouts: Mapping[str, TensorLayout],
    quantization: Mapping[str, Any] | None,
    quantized: Collection[str],
) -> str | None:
    """Reason why transformers could not load a checkpoint with these tensors, or compute with it; or None.

    `network` is without weights, `quantization` the description of the codes in config.json, and `quantized` the paths
    of the quantized layers; None and no paths if there are none.
    """
    tables = _tables(quantization)
    for names in network.all_tied_weights_keys.items():
        paths = {name.rpartition(".")[0] for name in names}
        if paths & set(quantized) and not paths & tables:
            return f"{names[0]} and {names[1]} share one tensor, which codes cannot express"
    try:
        loaded, missing = _load(network, layouts, quantization)
        if missing:
            return f"transformers would find no tensor for {missing[0]}"
        _run(loaded)
    except NoWeightError:
        assert quantization is not None
        return _looking(network, layouts, quantization)
    except Exception as error:  # a network may fail in any way on names and shapes that it does not expect
        return f"transformers {transformers.__version__} fails on it: {first_line(error)}"
    return None


def refuse_gaps(
    source: ModelSource, network: transformers.PreTrainedModel, layouts: Mapping[str, TensorLayout]
) -> None:
    """Raise ModelError if the model's files, with tensors of these layouts, do not fill its network."""
    try:
        _, report = _report(network, layouts, None, ignore_mismatched_sizes=True)
    except Exception:  # tensors that cannot be split or joined are named here, the rest by `refusal`
        placements(network, layouts)
        return

    def name_in_files(key: str) -> str:
        placement = next(placement for placement in placements(network, layouts) if key in placement.parameters)
        first, *others = placement.stored
        return first if placement.convert is None else f"{key} (made of {first} and {len(others)} more)"

    fault = why_unfit(report, name_in_files)
    if fault is not None:
        raise ModelError(f"{source.name} {fault}")


def _looking(
    network: transformers.PreTrainedModel, layouts: Mapping[str, TensorLayout], quantization: Mapping[str, Any]
) -> str:
    """Name the layers that must keep their weights: they are spared one by one until no weight is accessed."""
    spared: dict[str, str] = {}
    while True:
        try:
            loaded, _ = _load(network, layouts, _sparing(quantization, spared))
            _run(loaded)
        except NoWeightError as error:
            spared[error.path.rpartition(".")[2]] = error.path
            continue
        except Exception:  # spared layers have no weights here
            pass
        first, skips = next(iter(spared.values())), " ".join(rf"--skip '.*\.{name}'" for name in spared)
        family = network.config.model_type
        return (
            f"transformers accesses the weight of {first} in a network of the family {family}, and a quantized layer "
            f"has none ({skips} leaves such layers in 16 bits)"
        )


def _sparing(quantization: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The description of the codes in config.json without those of layers with these last names."""
    if quantization["quant_method"] == NATIVE:
        kept = {path: layer for path, layer in quantization["layers"].items() if path.rpartition(".")[2] not in names}
        return {**quantization, "layers": kept}
    return {**quantization, EXCEPTIONS: [*quantization[EXCEPTIONS], *(rf".*\.{name}$" for name in names)]}


def _tables(quantization: Mapping[str, Any] | None) -> set[str]:
    """Paths of matrices that are stored once for the embedding and the tied head."""
    layers = (quantization or {}).get("layers", {})
    return {path for path, layer in layers.items() if layer["duty"] == "table"}


def _load(
    network: transformers.PreTrainedModel, layouts: Mapping[str, TensorLayout], quantization: Mapping[str, Any] | None
) -> tuple[transformers.PreTrainedModel, Sequence[str]]:
    """The network as transformers would load it, and the parameters for which it would find no tensor."""
    loaded, report = _report(network, layouts, quantization)
    return loaded, sorted(report["missing_keys"])


def _report(
    network: transformers.PreTrainedModel,
    layouts: Mapping[str, TensorLayout],
    quantization: Mapping[str, Any] | None,
    **options: Any,
) -> tuple[transformers.PreTrainedModel, Mapping[str, Any]]:
    """The network as transformers would load it, and its loading info."""
    config = copy.deepcopy(network.config)
    if quantization is not None:
        native = quantization["quant_method"] == NATIVE
        described = native_trial(quantization, layouts) if native else {**quantization, "quant_method": TRIAL}
        config.quantization_config = described
    state = {name: torch.empty(layout.shape, dtype=layout.dtype, device="meta") for name, layout in layouts.items()}
    kind: Any = type(network)
    with quiet():
        loaded, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.bfloat16,  # grouped matmuls of experts run on the meta device in this type
            device_map={"": "meta"},
            output_loading_info=True,
            **options,
        )
    return loaded, report


@torch.no_grad()
def _run(loaded: transformers.PreTrainedModel) -> None:
    """Run on the meta device as far as that is possible; only access to a missing weight counts."""
    ids = torch.zeros((1, TOKENS), dtype=torch.long, device="meta")
    # Most networks read values to make a mask, and accept a mask of four dimensions as it is.
    for masks in {}, {"attention_mask": torch.zeros((1, 1, TOKENS, TOKENS), dtype=torch.bool, device="meta")}:
        try:
            with quiet():
                loaded(input_ids=ids, use_cache=False, **masks)
        except NoWeightError:
            raise
        except Exception:  # a step that depends on values
            continue


def disagreement(packed: ModelSource) -> str | None:
    """Difference between a packed checkpoint in transformers and in this package, or None.

    Compared on the meta device, and for a small model also by the logits of some tokens; of a native checkpoint, with
    those of its dequantized weights.
    """
    said, stored = model_config(packed).get("quantization_config"), tensor_index(packed.directory)
    network = without_weights(load_config(packed), packed.trust_remote_code)
    reason = refusal(network, {name: tensor.layout for name, tensor in stored.items()}, said, ())
    if reason is not None or count_parameters(network) > SMALL:
        return reason
    words = max(1, network.config.get_text_config().vocab_size // 2)  # tokens for images and the like come last
    stated = stated_length(model_config(packed))
    tokens = TOKENS if stated is None else min(TOKENS, stated[1])
    ids = torch.randint(0, words, (1, tokens), generator=torch.Generator().manual_seed(0))
    try:
        load = load_dense if is_native(packed) else load_network
        theirs, ours = _logits(_load_numbers(packed, said), ids), _logits(load(packed, torch.float32), ids)
    except Exception as error:  # any, see `refusal`
        return f"transformers {transformers.__version__} fails on it: {first_line(error)}"
    apart = (theirs - ours).norm(dim=-1) > SAME * ours.norm(dim=-1)  # [1, tokens]
    return "transformers computes other logits with it than aqlm" if apart.float().mean() > 0.5 else None


def _load_numbers(packed: ModelSource, quantization: Mapping[str, Any] | None) -> nn.Module:
    config = load_config(packed)
    if quantization is not None and not is_native(packed):
        config.quantization_config = {**quantization, "quant_method": TRIAL}
    with quiet():
        loaded: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            packed.directory, config=config, dtype=torch.float32, trust_remote_code=packed.trust_remote_code
        )
    return loaded.eval()


@torch.no_grad()
def _logits(network: nn.Module, ids: Tensor) -> Tensor:
    with quiet():
        logits: Tensor = network(input_ids=ids, use_cache=False).logits
    return logits.float()


class QuantizedLinear(NoWeight):
    """The stand-in for a layer of the inference package."""

    def __init__(self, path: str, linear: nn.Linear, settings: TrialSettings) -> None:
        super().__init__(path)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        group, books, bits = settings.in_group_size, settings.num_codebooks, settings.nbits_per_codebook
        layouts = {
            "codes": TensorLayout(
                torch.int8 if bits <= 8 else torch.int16, (self.out_features, self.in_features // group, books)
            ),
            "codebooks": TensorLayout(torch.float16, (books, 2**bits, 1, group)),
            "scales": TensorLayout(torch.float16, (self.out_features, 1, 1, 1)),
        }
        for name, layout in layouts.items():
            empty = torch.empty(layout.shape, dtype=layout.dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x.new_empty((*x.shape[:-1], self.out_features))
        matrix = from_checkpoint({name: getattr(self, name) for name in CODE_TENSORS})
        return nn.functional.linear(x, matrix.dequantize().to(x.dtype), self.bias)


@register_quantization_config(TRIAL)
class TrialSettings(QuantizationConfigMixin):
    """Description of the codes in config.json, as transformers parses it."""

    quant_method: Any

    def __init__(
        self,
        num_codebooks: int,
        nbits_per_codebook: int,
        in_group_size: int,
        linear_weights_not_to_quantize: list[str],
        **_: Any,
    ) -> None:
        self.quant_method = TRIAL
        self.num_codebooks = num_codebooks
        self.nbits_per_codebook = nbits_per_codebook
        self.in_group_size = in_group_size
        self.linear_weights_not_to_quantize = linear_weights_not_to_quantize


@register_quantizer(TRIAL)
class Trial(HfQuantizer):
    """Quantizer that inserts a stand-in wherever transformers would insert a layer of the inference package."""

    quantization_config: TrialSettings

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        settings = self.quantization_config
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and should_convert_module(path, settings.linear_weights_not_to_quantize):
                replace_module(model, path, QuantizedLinear(path, module, settings))

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
